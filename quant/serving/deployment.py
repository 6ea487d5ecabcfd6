"""From a checkpoint to the exact ``vllm serve`` command, with the reason for each flag. No torch.

What the checkpoint decides comes from :mod:`quant.vllm.arguments`; ``vllm_config.json`` beside the weights
wins over that, and an option of the user over both. The API key never stands on a command line: vLLM reads it
from ``VLLM_API_KEY``.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant import defaults
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.documents import read_document
from quant.engines import ENGINES, Engine
from quant.errors import (
    CheckpointError,
    Problems,
    QuantError,
    UsageError,
    VerificationFailed,
    clipped,
    one_of,
)
from quant.evaluation.verify import verify
from quant.gguf.ollama import Modelfile
from quant.hardware import count_in
from quant.hub import model_name, repository_of
from quant.serving.passed_on import VLLM_ALIASES, check_context, check_extra, named, with_ranks
from quant.units import format_size, meant_tokens
from quant.vllm.architectures import code_of, own_code
from quant.vllm.arguments import (
    IN_FP32_ALONE,
    TRUST,
    Argument,
    engine_arguments,
    instead_of_bfloat16,
)
from quant.vllm.config import model_types, quantization_config
from quant.vllm.context import (
    ALLOW,
    LONGEST,
    OVERRIDES,
    beyond_note,
    context_length,
    is_allowed,
    overridden,
)
from quant.vllm.releases import VLLM_VERSION
from quant.vllm.speculation import translated

if TYPE_CHECKING:
    from quant.hardware import Gpu
    from quant.vllm.kernels import CpuProblem

#: No engine asks a hub for a local checkpoint.
_ASKS_NO_HUB = {"HF_HUB_OFFLINE": "1"}
#: vLLM asks no hub for a local checkpoint and reports no usage; nothing leaves the machine unasked.
OFFLINE = {**_ASKS_NO_HUB, **ENGINES["vllm"].environment, "DO_NOT_TRACK": "1"}
#: What ``--kv-cache-dtype`` takes; ``fp8`` is E4M3.
CACHE_DTYPES = ("auto", "fp8")
#: Why an argument of ``vllm_config.json`` has its value.
STATED = "vllm_config.json of the checkpoint says so"
#: Flags that this tool must know to find, name and guard the server, with the option that sets each.
_OWN_FLAGS = {
    "model": "--model-path",
    "host": "--host",
    "port": "--port",
    "api-key": "--api-key-env",
    "served-model-name": "--name",
    "config": "vllm_config.json beside the weights",
    "uds": "--host and --port",
    "root-path": "a proxy in front",
    "ssl-keyfile": "a proxy in front",
    "ssl-certfile": "a proxy in front",
}


@dataclass(frozen=True)
class DeploymentRequest:
    """What the user asks of a deployment. None leaves a value to ``vllm_config.json``, then to the
    checkpoint.

    Attributes:
        gpu: name of the GPU that it will run on; None: those that are here, or none known.
        kv_cache_dtype: ``auto`` leaves it to the checkpoint.
        port: TCP port; 0 takes a free one when the server is started here.
        api_key_env: name of the environment variable that holds the key.
        extra: further arguments of the engine, passed on as they are.
        read_values: look at every value of the checkpoint, as before it is served; otherwise at config and
            headers alone.
    """

    gpu: str | None = None
    tensor_parallel: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_dtype: str = "auto"
    max_num_seqs: int | None = None
    host: str = defaults.HOST
    port: int = defaults.PORT
    name: str | None = None
    api_key_env: str | None = None
    extra: tuple[str, ...] = ()
    read_values: bool = True

    def check(self) -> None:
        """
        Raises:
            Problems: everything that is wrong with it, as the options say it (exit status 2).
        """
        wrong = [
            f"--{key} is {value!r}: {what} without spaces and control characters is needed"
            for key, value, what in (("host", self.host, "an address"), ("name", self.name, "a name"))
            if value is not None and (not value.isprintable() or value.split() != [value])
        ]
        share = self.gpu_memory_utilization
        if share is not None and math.isnan(share):
            wrong.append(f"--gpu-memory-utilization is {share}: a share above 0 and at most 1 is needed")
        if self.max_num_seqs is not None and self.max_num_seqs < 1:
            wrong.append(f"--max-num-seqs is {self.max_num_seqs}: one sequence or more is needed")
        if self.kv_cache_dtype not in CACHE_DTYPES:
            wrong.append(str(one_of("--kv-cache-dtype", self.kv_cache_dtype, CACHE_DTYPES)))
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            wrong.append(
                "--api-key-env takes the name of an environment variable, such as API_KEY, never the key "
                "itself"
            )
        if wrong:
            raise Problems(wrong, exit_code=2)


@dataclass(frozen=True)
class Deployment:
    """A checkpoint with everything that its server is told."""

    model_path: Path
    name: str
    host: str
    port: int
    tensor_parallel: int
    arguments: tuple[Argument, ...]
    extra: tuple[str, ...]
    api_key_env: str | None
    warnings: tuple[str, ...]
    #: the GPU that it is planned for, where one is named or here, and bytes of the tensors
    gpu: Gpu | None = None
    checkpoint_bytes: int = 0
    engine: Engine = ENGINES["vllm"]
    #: its context is beyond the model's positions, which vLLM takes under a variable alone
    beyond: bool = False
    #: what is known of how it fits, which asks for nothing
    notes: tuple[str, ...] = ()
    #: of an engine that is told a model by one
    modelfile: Modelfile = Modelfile()

    @property
    def platform(self) -> str:
        """Kind of hardware it is planned for (:attr:`quant.hardware.Gpu.platform`); NVIDIA's where none is
        known."""
        return self.gpu.platform if self.gpu is not None else "cuda"

    @property
    def ranks(self) -> int:
        """GPUs that it takes: tensor times pipeline parallel."""
        passed = named(self.extra)
        pipeline = passed.get("pipeline-parallel-size", passed.get("pp", "1"))
        return self.tensor_parallel * (int(pipeline) if pipeline.isdigit() else 1)

    def demand_trust(self) -> None:
        """
        Raises:
            UsageError: the engine would run code of the checkpoint, and nobody said that it may.
        """
        if any(a.name == TRUST for a in self.arguments):
            code = code_of(open_checkpoint(self.model_path).config)
            raise UsageError(
                f"{self.model_path}: the model's class is code of the checkpoint ({code}), which is not run "
                f"here unasked: read it, then start it with quant-deploy serve … -- --{TRUST}"
            )

    @property
    def environment(self) -> dict[str, str]:
        """Variables that keep the engine from asking a hub and from reporting usage; and what lets it take
        such a context."""
        longer = {ALLOW: "1"} if self.beyond else {}
        asks = {**_ASKS_NO_HUB, **self.engine.environment, "DO_NOT_TRACK": "1", **longer}
        return asks | ({a.name: str(a.value) for a in self.reasons()} if self.engine.by_variables else {})

    def word(self, name: str) -> str:
        """The engine's name of an argument of vLLM's."""
        return self.engine.word(name)

    def flags(self, *, host: str | None = None, port: int | None = None) -> list[str]:
        """Everything behind the model, as words of a command."""
        if self.engine.by_variables:
            return []
        planned = [
            *self.arguments,
            Argument(self.word("host"), host or self.host, ""),
            Argument(self.word("port"), self.port if port is None else port, ""),
        ]
        return [word for a in planned for word in a.words] + list(self.extra)

    @property
    def command(self) -> list[str]:
        if self.engine.by_variables:
            return list(self.engine.program)
        return [*self.engine.program, str(self.model_path), *self.flags()]

    def key_words(self, key: str) -> list[str]:
        """The API key as words of a command, where the engine has no variable for it.

        Args:
            key: how whoever runs the command refers to it.
        """
        asked = self.api_key_env is not None and self.engine.takes_key and not self.engine.key_variable
        return ["--api-key", key] if asked else []

    def shown(self, argument: Argument) -> str:
        """An argument as it is set."""
        if self.engine.by_variables:
            return f"{argument.name}={argument.value}"
        return " ".join(argument.words)

    def reasons(self) -> list[Argument]:
        """Every flag with its reason, those of the address included."""
        where = (
            "reachable from this machine only"
            if is_loopback(self.host)
            else "as asked: reachable from other machines"
        )
        if self.engine.by_variables:
            host = f"[{self.host}]" if ":" in self.host else self.host
            return [*self.arguments, Argument(self.word("host"), f"{host}:{self.port}", where)]
        return [
            *self.arguments,
            Argument(self.word("host"), self.host, where),
            Argument(self.word("port"), self.port, "where clients connect"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """With ``$NAME`` in the place of the API key, which stands in the variable ``NAME``."""
        key = {self.engine.key_variable: f"${self.api_key_env}"} if self.engine.key_variable else {}
        return {
            "engine": self.engine.name,
            "engine_release": self.engine.release,
            "model_path": str(self.model_path),
            "name": self.name,
            "command": [*self.command, *self.key_words(f"${self.api_key_env}")],
            "environment": self.environment | (key if self.api_key_env else {}),
            "api_key_env": self.api_key_env,
            "arguments": [{"name": a.name, "value": a.value, "reason": a.reason} for a in self.reasons()],
            "extra": list(self.extra),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            **({"modelfile": self.modelfile.text} if self.modelfile.text else {}),
        }


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def plan(path: str | Path, request: DeploymentRequest) -> Deployment:
    """The deployment of a checkpoint.

    Raises:
        CheckpointError: the directory or its ``vllm_config.json`` cannot be read.
        VerificationFailed: vLLM would not load it, or would read wrong values.
        Problems: see :meth:`DeploymentRequest.check`.
        UsageError: an extra argument that one of our own options sets, or a GPU that is not known.
    """
    request.check()
    extra, renamed = translated(request.extra)
    request = replace(request, extra=extra)
    check_extra(request.extra, "vLLM", _OWN_FLAGS)
    folder = Path(path).absolute()
    checkpoint = open_checkpoint(folder)
    stated = stated_arguments(folder)
    passed_on = named(request.extra)
    config = overridden(checkpoint.config, passed_on)
    ranks = ("tensor-parallel-size", *VLLM_ALIASES["tensor-parallel-size"])
    request, parallel = with_ranks(request, stated, ranks)
    check_order(path, parallel, "vLLM cannot serve it", request.read_values)
    _check_kernels(checkpoint, request)
    derived = engine_arguments(config, tensor_parallel=parallel, side_file=checkpoint.quantization_file)
    chosen = {a.name: a for a in derived}
    own = own_code(config)
    if own is not None:
        chosen[TRUST] = Argument(
            TRUST, True, f"the model's class is code of the checkpoint: {code_of(config)}"
        )
    for key, value in stated.items():
        if key not in chosen or chosen[key].value != value:
            chosen[key] = Argument(key, value, STATED)
    length = request.max_model_len and meant_tokens(request.max_model_len, context_length(config))
    asked = {
        "tensor-parallel-size": request.tensor_parallel,
        "max-model-len": length,
        "gpu-memory-utilization": request.gpu_memory_utilization,
        "kv-cache-dtype": None if request.kv_cache_dtype == "auto" else request.kv_cache_dtype,
        "max-num-seqs": request.max_num_seqs,
    }
    for key, wanted in asked.items():
        if wanted is not None and not (key == "tensor-parallel-size" and wanted == 1):
            why = "as asked; shapes were checked for it" if key == "tensor-parallel-size" else "as asked"
            chosen[key] = Argument(key, wanted, why)
        elif wanted == 1:
            chosen.pop(key, None)
    name = request.name or folder_name(folder)
    length = check_context(config, name, length, stated, passed_on, ("max-model-len",))
    beyond = beyond_note(length or 0, context_length(config))
    warnings = [*renamed, *(said for said in (own, beyond) if said)]
    warnings += _fit(folder, config, chosen, request, parallel)
    chosen["served-model-name"] = Argument(
        "served-model-name", name, "what clients call the model, wherever it lies"
    )
    arguments = tuple(
        a for a in chosen.values() if not any(n in passed_on for n in (a.name, *VLLM_ALIASES.get(a.name, ())))
    )
    warnings += host_warnings(request, "Name a variable with --api-key-env")
    return Deployment(
        folder,
        name,
        request.host,
        request.port,
        parallel,
        arguments,
        request.extra,
        request.api_key_env,
        tuple(warnings),
        planned_gpu(request.gpu),
        checkpoint.nbytes,
        beyond=beyond is not None,
    )


def check_order(path: str | Path, parallel: int, otherwise: str, read_values: bool = True) -> None:
    """
    Args:
        path: the checkpoint, as it was given.
        read_values: see :class:`DeploymentRequest`.
        otherwise: what it means where it is not in order.

    Raises:
        VerificationFailed: it is not, or not for that degree of tensor parallelism.
    """
    checked = verify(Path(path).absolute(), tensor_parallel=parallel, read_values=read_values)
    if not checked.passed:
        more = f" (and {len(checked.failed) - 3} more)" if len(checked.failed) > 3 else ""
        raise VerificationFailed(
            f"{path}: {otherwise}: {'; '.join(checked.failed[:3])}{more}. quant verify {path} lists every "
            "check"
        )


def folder_name(folder: Path) -> str:
    """What clients call a model that nobody named: its name on the Hub where it came from there, else its
    folder's."""
    return model_name(folder) if repository_of(folder) else folder.name


def host_warnings(request: DeploymentRequest, instead: str) -> list[str]:
    """What is to be said of an address that others reach, without a key.

    Args:
        instead: what guards it.
    """
    if is_loopback(request.host) or request.api_key_env is not None:
        return []
    return [
        f"--host is {request.host} without an API key: whoever reaches port {request.port} can use the "
        f"model. {instead}, or bind to {defaults.HOST}"
    ]


def other_dtype(gpu: Gpu, dtype: object, config: Mapping[str, Any]) -> Argument | None:
    """What a model computes in on a GPU that has no bf16, in its place: fp16, or fp32; None elsewhere."""
    from quant.vllm.kernels import BF16_CAPABILITY

    if dtype != "bfloat16" or (other := instead_of_bfloat16(gpu, model_types(config))) is None:
        return None
    level, least = (".".join(map(str, c)) for c in (gpu.capability or (), BF16_CAPABILITY))
    why = f"{gpu.name} (compute capability {level}) has no bfloat16, which takes {least}"
    if other == "float32":
        why += ", and vLLM does not compute this family in float16"
    return Argument("dtype", other, why)


def _check_kernels(checkpoint: Checkpoint, request: DeploymentRequest) -> None:
    """
    Raises:
        VerificationFailed: vLLM has no kernel for a scheme of the checkpoint on the GPU, or the CPU, that is
            named.
    """
    from quant.formats import find_format
    from quant.hardware import named_gpu
    from quant.vllm.kernels import kernel_problem

    device = named_gpu(request.gpu) if request.gpu is not None else None
    if device is not None and device.platform == "cpu":
        for lacking in cpu_problems(checkpoint.path, device, request.kv_cache_dtype):
            if lacking.fails:
                raise VerificationFailed(f"{checkpoint.path}: {lacking.text}")
        return
    layers = find_format(checkpoint.config, checkpoint.tensors)
    if device is None or layers is None:
        return
    for scheme in dict.fromkeys(x.scheme for x in layers.linears.values()):
        if problem := kernel_problem(scheme, device):
            raise VerificationFailed(f"{checkpoint.path}: {problem}")


def planned_gpu(gpu: str | None) -> Gpu | None:
    """The GPU that is named, or the first that is here; None where neither is.

    Raises:
        UsageError: there is no GPU of that name.
    """
    from quant.hardware import detect, named_gpu

    return named_gpu(gpu) if gpu is not None else next(iter(detect().gpus), None)


#: vLLM's own flags under which the accounting of memory does not hold.
_UNPLANNED = frozenset(
    {
        "cpu-offload-gb",
        "kv-cache-memory-bytes",
        "pipeline-parallel-size",
        "pp",
        OVERRIDES,
        "speculative-config",
    }
)
#: Share of the longest context that the memory holds which is asked for, and what it is a multiple of: the
#: accounting is an estimate.
_SURE, _STEP = 0.95, 256


def _fit(
    folder: Path,
    config: Mapping[str, Any],
    chosen: dict[str, Argument],
    request: DeploymentRequest,
    parallel: int,
) -> list[str]:
    """Fits ``chosen`` to the GPU, where one is named or here: its dtype, the share of its memory that is
    free, and the context.

    Returns:
        warnings: what vLLM is expected to refuse although it was asked for.

    Raises:
        UsageError: there is no GPU of that name.
    """
    from quant.hardware import detect, named_gpus
    from quant.planning.start import usual_utilization, why_utilization
    from quant.vllm.kernels import FP8_CACHE_CAPABILITY, has_fp8_cache
    from quant.vllm.releases import rules_for

    if request.gpu is not None:
        gpus = named_gpus(request.gpu, count=None if count_in(request.gpu) else parallel)
    else:
        gpus = list(detect().gpus)
    if not gpus:
        return []
    taken = [gpus[0].note] if gpus[0].note else []
    if gpus[0].platform == "cpu":
        stated = named(request.extra) | {name: str(a.value) for name, a in chosen.items()}
        return [x.text for x in cpu_problems(folder, gpus[0], stated.get("kv-cache-dtype", "auto"))]
    if len(gpus) < parallel:
        return [
            f"tensor parallel {parallel} takes as many GPUs, {len(gpus)} "
            f"{'is' if len(gpus) == 1 else 'are'} {'here' if request.gpu is None else 'named'}"
        ]
    gpu = min(gpus[:parallel], key=lambda g: g.free_bytes)
    if other := other_dtype(gpu, chosen["dtype"].value, config):
        chosen["dtype"] = other
        if other.value == "float32" and quantization_config(config) is not None:
            taken.append(f"{gpu.name}: {IN_FP32_ALONE}: vLLM is expected to refuse")
    default = rules_for(VLLM_VERSION, gpu.capability).utilization
    passed_on = named(request.extra)
    share = passed_on.get("gpu-memory-utilization", chosen.get("gpu-memory-utilization"))
    if share is None and (usual := usual_utilization(gpu, default)) != default:
        why = why_utilization(gpu, default)
        chosen["gpu-memory-utilization"] = Argument("gpu-memory-utilization", usual, why)
    cache = passed_on.get("kv-cache-dtype") or str(getattr(chosen.get("kv-cache-dtype"), "value", "auto"))
    if cache.startswith("fp8") and not has_fp8_cache(gpu):
        taken.append(
            f"vLLM keeps an FP8 KV cache from compute capability {'.'.join(map(str, FP8_CACHE_CAPABILITY))} "
            f"on, and {gpu.name} has less: leave --kv-cache-dtype out"
        )
    if _UNPLANNED & {name.split(".")[0] for name in passed_on}:
        return taken
    return [*taken, *_fit_context(folder, chosen, request, parallel, gpus, passed_on)]


def cpu_problems(folder: Path, cpu: Gpu, cache_dtype: str = "auto") -> list[CpuProblem]:
    """Why vLLM's CPU build does not serve a checkpoint on a CPU, or computes wrongly with it there; empty
    where nothing is known of the checkpoint."""
    from quant.formats.base import find_format
    from quant.vllm import kernels
    from quant.vllm.config import model_types
    from quant.vllm.layers import layer_shapes

    checkpoint = open_checkpoint(folder)
    try:
        layers = find_format(checkpoint.config, checkpoint.tensors)
    except CheckpointError:  # of a kind that is not read here
        layers = None
    linears: set[str] = set()
    experts: set[str] = set()
    quantized = layers.linears if layers is not None else {}
    for name, linear in quantized.items():
        kernel = kernels.kernel_of(linear.scheme)
        (experts if ".experts." in name else linears).add(kernel)
    built = layer_shapes(quantized.values(), model_types(checkpoint.config))
    misfits = kernels.cpu_shape_problems((kernels.kernel_of(x.scheme), name, n, k) for name, x, n, k in built)
    problems = kernels.cpu_problems(cpu, linears, experts, cache_dtype)
    turned = [kernels.CPU_LATENT] if _turns_latents(checkpoint) else []
    return [*problems, *turned, *map(kernels.CpuProblem, misfits)]


def _turns_latents(checkpoint: Checkpoint) -> bool:
    """Whether it has latent attention with rotary positions."""
    from quant.catalog import model_from_config

    try:
        spec = model_from_config(checkpoint.config)
    except QuantError:  # of a kind that is not planned here
        return False
    return any(layer.kind == "mla" for layer in spec.cache) and not checkpoint.config.get("mla_use_nope")


def _fit_context(
    folder: Path,
    chosen: dict[str, Argument],
    request: DeploymentRequest,
    parallel: int,
    gpus: Sequence[Gpu],
    passed_on: dict[str, str],
) -> list[str]:
    """Lowers a context that nobody asked for to what the memory holds beside the weights."""
    from quant.catalog import load_model
    from quant.planning.memory import plan
    from quant.planning.request import EngineRequest, at_context

    stated = {name: argument.value for name, argument in chosen.items()} | passed_on
    try:
        spec = load_model(folder)
        length, share = stated.get("max-model-len"), stated.get("gpu-memory-utilization")
        longest = LONGEST if is_allowed() else spec.max_context
        engine = EngineRequest(
            context=None if length is None else min(int(length), longest),
            tensor_parallel=parallel,
            gpu_memory_utilization=None if share is None else float(share),
            kv_cache_dtype="fp8" if str(stated.get("kv-cache-dtype")).startswith("fp8") else "auto",
            enforce_eager="enforce-eager" in stated,
            dtype=str(chosen["dtype"].value),
            max_num_seqs=int(stated["max-num-seqs"]) if "max-num-seqs" in stated else None,
            max_num_batched_tokens=int(passed_on["max-num-batched-tokens"])
            if "max-num-batched-tokens" in passed_on
            else None,
        )
        planned = plan(spec, gpus, None, engine)
        sure = planned.sure_context or planned.max_context
        fitting = min(int(planned.max_context * _SURE), sure) // _STEP * _STEP
        asked = request.max_model_len is not None or "max-model-len" in passed_on
        if (
            not planned.fits
            and fitting
            and not asked
            and plan(spec, gpus, None, at_context(engine, fitting)).fits
        ):
            held = (
                f"what {format_size(planned.kv_cache_bytes)} of KV cache hold on {gpus[0].name}; the "
                f"model's own is {spec.max_context:,}"
            )
            chosen["max-model-len"] = Argument("max-model-len", fitting, held)
            return []
    # a model the planner does not know, a value only vLLM reads ("auto", "8k")
    except (QuantError, ValueError) as error:
        return [f"whether it fits {gpus[0].name} is not known: {error}"]
    if planned.sure:
        return []
    if planned.tight:
        return [f"{gpus[0].name} is tight: whether vLLM starts is {_in_its_words(planned.tight)}"]
    return [
        f"vLLM is expected to refuse this on {gpus[0].name}: {_in_its_words(planned.why)}"
        + (f". What would do: {_in_its_words(planned.remedy)}" if planned.remedy else "")
    ]


def _in_its_words(text: str) -> str:
    """What the planner says, with vLLM's name of the context's option, as a deployment has it."""
    return re.sub(r"--context (\d+)( \(vLLM: --max-model-len \d+\))?", r"--max-model-len \1", text)


def stated_arguments(folder: Path) -> dict[str, str | int | float]:
    """The engine arguments that were written beside the weights; none where there is no such file."""
    file = folder / "vllm_config.json"
    if not file.is_file():
        return {}
    try:
        values = read_document(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as JSON ({error}): write it anew with quant export-vllm, or delete it"
        ) from error
    if not isinstance(values, dict) or not all(
        isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in values.values()
    ):
        raise CheckpointError(
            f"{file}: an object of engine arguments with plain values is needed: write it anew with quant "
            "export-vllm"
        )
    for key, value in values.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
            raise CheckpointError(
                f"{file}: {clipped(key)} is no engine argument: names are like max-model-len"
            )
        if key in _OWN_FLAGS or key == TRUST:
            raise CheckpointError(
                f"{file}: {key} does not belong there: it is given when the server is started"
            )
        if key in ("max-model-len", "tensor-parallel-size") and (not isinstance(value, int) or value < 1):
            raise CheckpointError(f"{file}: {key} is {clipped(value)}: a whole number from 1 is needed")
    return values
