"""A deployment on another engine than vLLM: whether it reads the checkpoint, and its own words for what is
asked. No torch.

What an engine reads, on which hardware, and what it calls each argument stands in :mod:`quant.engines`. How
much memory another engine takes is not known here, so no context is fitted to the GPU.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.gguf_path import gguf_file, model_stem
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.engines import ENGINES, Engine, reading_problem
from quant.engines.base import UNQUANTIZED
from quant.errors import UsageError, VerificationFailed, one_of
from quant.gguf.header import Header, read_header
from quant.gguf.ollama import Modelfile, modelfile, usual_context
from quant.hardware import count_in
from quant.planning.gguf import offload
from quant.serving.deployment import (
    STATED,
    Deployment,
    DeploymentRequest,
    check_order,
    folder_name,
    host_warnings,
    other_dtype,
    planned_gpu,
    stated_arguments,
)
from quant.serving.deployment import plan as plan_vllm
from quant.serving.passed_on import check_context, check_extra, named, with_ranks
from quant.units import meant_tokens
from quant.vllm.architectures import code_of
from quant.vllm.arguments import TRUST, Argument, engine_arguments
from quant.vllm.config import quantization_config
from quant.vllm.context import context_length

if TYPE_CHECKING:
    from quant.hardware import Gpu
    from quant.schemes import Scheme

#: Arguments that only vLLM has, and that say nothing of another engine.
_VLLM_ALONE = frozenset({"allow-deprecated-quantization", "limit-mm-per-prompt"})
_OPTIONS = {"tensor-parallel-size": "--tensor-parallel", "max-model-len": "--max-model-len"}


def plan(path: str | Path, request: DeploymentRequest, engine: str = "vllm") -> Deployment:
    """The deployment of a checkpoint, or of a GGUF file, on an engine.

    Raises:
        UsageError: no such engine, or something asked of it that it does not have; else as
            :func:`quant.serving.deployment.plan`.
        VerificationFailed: the engine does not read the checkpoint, or not on this GPU; the message says what
            it does read, and what to make.
        CheckpointError: no checkpoint, or no GGUF file.
    """
    if engine not in ENGINES:
        raise one_of("--engine", engine, list(ENGINES))
    row = ENGINES[engine]
    file = Path(path)
    if gguf_file(file) is not None and not row.files:
        others = " or --engine ".join(e.name for e in ENGINES.values() if e.files)
        raise VerificationFailed(
            f"{path}: a GGUF file, which {row.title} {row.release} is not planned with here: use "
            f"--engine {others}, or give the folder of the checkpoint that it was made from"
        )
    if row.flags is None:  # vLLM, whose words these are
        return plan_vllm(path, request)
    request.check()
    check_extra(request.extra, row.title, _own_flags(row))
    gpu = planned_gpu(request.gpu)
    if row.files:
        return _gguf(row, file, request, gpu)
    folder = file.absolute()
    checkpoint = open_checkpoint(folder)
    stated = stated_arguments(folder)
    request, parallel = with_ranks(request, stated, row.names(row.word("tensor-parallel-size")))
    check_order(path, parallel, "it is not in order", request.read_values)
    warnings = _check_reading(row, checkpoint, gpu)
    arguments, said = _translated(row, checkpoint, request, parallel, stated, gpu)
    name = folder_name(folder)
    wanted = _asked(request, context_length(checkpoint.config)).get("max-model-len")
    words = row.names(row.word("max-model-len"))
    check_context(
        checkpoint.config, name, int(wanted.value) if wanted else None, stated, named(request.extra), words,
        may_exceed=False,
    )  # fmt: skip
    if row.model_name:
        name = request.name or name
        called = "what clients call the model, wherever it lies"
        arguments.append(Argument(row.word("served-model-name"), name, called))
    elif request.name not in (None, name):
        raise UsageError(
            f"--name is {request.name!r}: {row.title} cannot be told a name; clients call the model "
            f"{name!r}, as its folder: leave --name out"
        )
    return _deployment(row, folder, name, arguments, request, parallel, [*warnings, *said], gpu, checkpoint)


def _deployment(
    engine: Engine,
    path: Path,
    name: str,
    arguments: list[Argument],
    request: DeploymentRequest,
    parallel: int,
    warnings: list[str],
    gpu: Gpu | None,
    stored: Checkpoint | int,
) -> Deployment:
    """The value, with what is to be said of its key and address."""
    arguments = [*arguments, *(Argument(flag, value, why) for flag, value, why in engine.always)]
    passed = named(request.extra)  # which wins
    arguments = [a for a in arguments if not any(n in passed for n in engine.names(a.name))]
    if request.api_key_env is not None and not engine.takes_key:
        raise UsageError(
            f"--api-key-env is {request.api_key_env}: {engine.title} {engine.release} checks no key: leave "
            "it out, and put a gateway in front that does"
        )
    if request.api_key_env is not None and not engine.key_variable:
        warnings.append(
            f"{engine.title} takes its key as an argument, which whoever may list the processes there reads"
        )
    instead = (
        "Name a variable with --api-key-env"
        if engine.takes_key
        else f"{engine.title} checks no key: put a gateway in front"
    )
    warnings += host_warnings(request, instead)
    return Deployment(
        path,
        name,
        request.host,
        request.port,
        parallel,
        tuple(arguments),
        request.extra,
        request.api_key_env,
        tuple(warnings),
        gpu,
        stored if isinstance(stored, int) else stored.nbytes,
        engine,
    )


def _check_reading(engine: Engine, checkpoint: Checkpoint, gpu: Gpu | None) -> list[str]:
    """
    Returns:
        what is not known of it.

    Raises:
        VerificationFailed: the engine does not read it, has no class of the model, or not on this GPU.
    """
    from quant.formats import find_format

    layers = find_format(checkpoint.config, checkpoint.tensors)
    schemes: list[tuple[Scheme, bool]] = []
    if layers is not None:
        kinds = [(linear.scheme, ".experts." in name) for name, linear in layers.linears.items()]
        schemes = list(dict.fromkeys(kinds))
    problem, unknown = reading_problem(
        engine, layers.format if layers is not None else UNQUANTIZED, schemes, gpu
    )
    if problem is not None:
        raise VerificationFailed(f"{checkpoint.path}: {problem}")
    served = engine.serves(checkpoint.config)
    if not served:
        classes = checkpoint.config.get("architectures") or checkpoint.config.get("model_type")
        called = ", ".join(map(str, classes)) if isinstance(classes, list) else str(classes)
    if served is None:
        unknown.append(
            f"{called} is a class of a later release: whether {engine.title} {engine.release} serves it is "
            "not known here"
        )
    elif not served:
        if engine.strict:
            raise VerificationFailed(
                f"{checkpoint.path}: {called} is not among the architectures that {engine.title} lists: "
                "serve it with --engine vllm"
            )
        unknown.append(
            f"{called} is not among {engine.title}'s own classes: it falls back on transformers' one, and "
            "whether that serves this checkpoint is not known here"
        )
        if checkpoint.config.get("auto_map"):
            unknown.append(
                f"the checkpoint brings code of its own ({code_of(checkpoint.config)}), which {engine.title} "
                f"runs with --{TRUST}: read it first"
            )
    return unknown


def _translated(
    engine: Engine,
    checkpoint: Checkpoint,
    request: DeploymentRequest,
    parallel: int,
    stated: Mapping[str, Any],
    gpu: Gpu | None,
) -> tuple[list[Argument], list[str]]:
    """What the checkpoint, ``vllm_config.json`` and the user ask, in the engine's words; and what was left
    out.

    Args:
        stated: of ``vllm_config.json``.

    Raises:
        UsageError: an option that the engine has no word for.
    """
    length, ranks = context_length(checkpoint.config), "tensor-parallel-size"
    wanted = {
        a.name: a
        for a in engine_arguments(checkpoint.config, side_file=checkpoint.quantization_file)
        if a.name not in _VLLM_ALONE and a.name != "max-model-len"  # its own way to the context is as good
    }
    for key, value in stated.items():
        known = key in wanted and wanted[key].value == value
        # "auto" leaves it to the checkpoint, from which the others are
        if key not in _VLLM_ALONE and (key, value) != ("max-model-len", length) and value != "auto":
            wanted[key] = wanted[key] if known else Argument(key, value, STATED)
    if checkpoint.config.get("auto_map") and engine.serves(checkpoint.config) is False:
        why = f"the checkpoint brings code of its own: {code_of(checkpoint.config)}"
        wanted[TRUST] = Argument(TRUST, True, why)
    computed = wanted["dtype"].value if "dtype" in wanted else None
    if gpu is not None and (other := other_dtype(gpu, computed, checkpoint.config)):
        wanted["dtype"] = other
    asked = _asked(request, length)
    if request.tensor_parallel is not None:
        asked[ranks] = Argument(ranks, request.tensor_parallel, "as asked; shapes were checked for it")
    if parallel == 1:
        wanted.pop(ranks, None)
        asked.pop(ranks, None)
        if engine.says_one_rank:
            wanted[ranks] = Argument(ranks, 1, "without it the model is cut over every GPU that it sees")
    return _in_words(engine, wanted | asked, asked)


def _asked(request: DeploymentRequest, length: int | None) -> dict[str, Argument]:
    """What the user asks, by vLLM's names."""
    values: Mapping[str, Any] = {
        "max-model-len": request.max_model_len and meant_tokens(request.max_model_len, length),
        "gpu-memory-utilization": request.gpu_memory_utilization,
        "kv-cache-dtype": None if request.kv_cache_dtype == "auto" else request.kv_cache_dtype,
        "max-num-seqs": request.max_num_seqs,
    }
    return {k: Argument(k, v, "as asked") for k, v in values.items() if v is not None}


def _in_words(
    engine: Engine, wanted: Mapping[str, Argument], asked: Mapping[str, Argument]
) -> tuple[list[Argument], list[str]]:
    arguments: list[Argument] = []
    said: list[str] = []
    for key, one in wanted.items():
        flag = (engine.flags or {}).get(key)
        if flag is None:
            said.append(f"{key} is an argument of vLLM's alone: it is left out for {engine.title}")
            continue
        value = flag.values.get(str(one.value), one.value)
        if value is None:
            continue
        if flag.name:
            reason = f"{one.reason}; {flag.note}" if flag.note else one.reason
            arguments.append(Argument(flag.name, value, reason))
        elif flag.instead and key in asked:
            raise UsageError(f"{_OPTIONS.get(key, f'--{key}')} is {one.value}: {flag.instead}")
        elif flag.instead and one.reason == STATED:  # what config.json says it reads by itself
            said.append(f"{key} {one.value} of vllm_config.json is left out: {flag.instead}")
    return arguments, said


def _own_flags(engine: Engine) -> dict[str, str]:
    """The flags of an engine that options set which this tool must know, with those options; see
    :func:`quant.serving.passed_on.check_extra`."""
    options = {"host": "--host", "port": "--port", "served-model-name": "--name"}
    own = {n: option for key, option in options.items() for n in engine.names(engine.word(key))}
    models = [*(w.lstrip("-") for w in engine.program if w.startswith("--")), *engine.model_aliases]
    return own | {"api-key": "--api-key-env"} | dict.fromkeys(models, "--model-path")


def _gguf(engine: Engine, path: Path, request: DeploymentRequest, gpu: Gpu | None) -> Deployment:
    """The deployment of a GGUF file.

    Raises:
        VerificationFailed: a folder of safetensors, which llama.cpp does not read; a split file for Ollama.
        CheckpointError: no such file, or its header breaks a rule of the format.
    """
    found = gguf_file(path)
    if found is None and (path.is_dir() or not path.exists()):
        checkpoint = open_checkpoint(path)  # what is no checkpoint at all is told as such
        exports = engine.exports
        if quantization_config(checkpoint.config) is None:  # it is the source
            exports = exports.replace("SOURCE", shlex.quote(str(path)))
        raise VerificationFailed(f"{path}: {engine.title} reads {engine.otherwise}. {exports}")
    header = read_header((found or path).absolute(), any_type=True)
    file = header.files[0]
    asked = _asked(request, None)
    many = request.max_num_seqs or 1
    if request.tensor_parallel is not None and request.tensor_parallel > 1:
        asked["tensor-parallel-size"] = Argument("tensor-parallel-size", request.tensor_parallel, "as asked")
    each = asked.get("max-model-len")
    if each is not None and not engine.by_variables and request.max_num_seqs is not None:
        why = f"{many} × {each.value} tokens, as asked"
        asked["max-model-len"] = Argument("max-model-len", int(each.value) * many, why)
    context = int(each.value) if each is not None else None
    count = count_in(request.gpu) or 1
    arguments, said = _in_words(engine, asked, asked)
    stem = model_stem(file)
    written, notes = Modelfile(), list[str]()
    if engine.by_variables:
        arguments = [a for a in arguments if a.name != engine.word("max-model-len")]
        context = context or usual_context(header)
        name, written = _for_ollama(engine, header, request, stem, context)
        (notes if written.templated else said).append(written.note)
    else:
        name = (request.name or stem).replace(",", "-")  # of which --alias would make several
        arguments.append(Argument("alias", name, "what clients call the model, wherever it lies"))
    if gpu is not None:
        fits = offload(header, gpu, count, context, many if context else 1)
        (notes if fits.whole else said).append(fits.text)
    size = sum(f.stat().st_size for f in header.files)
    made = _deployment(engine, file, name, arguments, request, count, said, gpu, size)
    return replace(made, notes=tuple(notes), modelfile=written)


#: What Ollama takes as a model's name: parts of a path, and a tag.
_OLLAMA_NAME = re.compile(r"([\w][\w.-]{0,79}/)*[\w][\w.-]{0,79}(:[\w][\w.-]{0,79})?", re.ASCII)


def _for_ollama(
    engine: Engine, header: Header, request: DeploymentRequest, stem: str, context: int | None
) -> tuple[str, Modelfile]:
    """The name that Ollama knows a file by, and its Modelfile.

    Raises:
        UsageError: a name that it does not take, or arguments that are passed on.
        VerificationFailed: a split file.
    """
    if request.extra:
        raise UsageError(
            f"{shlex.join(request.extra)} cannot be passed on: ollama serve takes no arguments: set Ollama's "
            "variables where it runs, and PARAMETER in its Modelfile (--output modelfile)"
        )
    file = header.files[0]
    if len(header.files) > 1:
        raise VerificationFailed(
            f"{file}: {engine.title} {engine.release} takes no model in several files: merge its "
            f"{len(header.files)} with llama-gguf-split --merge, or serve it with --engine llama.cpp"
        )
    if not str(file).isprintable():
        raise UsageError(f"{str(file)!r}: a Modelfile cannot name such a path: rename it")
    name = request.name or re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII).strip("-.")[:80] or "model"
    if not _OLLAMA_NAME.fullmatch(name):
        raise UsageError(
            f"--name is {name!r}: {engine.title} takes letters, digits, dots, dashes and underscores, and a "
            "tag behind a colon"
        )
    return name, modelfile(header, str(file), context)
