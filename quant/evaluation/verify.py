"""Will vLLM load it, and is it whole? Judged from the files alone: no torch, no vLLM.

The checks are those of the formats' contracts (:mod:`quant.formats`), of vLLM's fused layers and tensor
parallelism, and of the promise that every tensor and side file of the source is accounted for. Each finding
says what, which value, which rule.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quant.checkpoint.gguf_path import gguf_file
from quant.checkpoint.header import WIDE_FLOATS
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError, QuantError
from quant.evaluation.accounting import (
    Noted,
    copied_tensors,
    counterpart,
    differing_cuts,
    noted_tensors,
    side_file_problems,
    source_problems,
)
from quant.evaluation.agreement import file_problems
from quant.evaluation.values import scan_values
from quant.evaluation.verify_gguf import verify_gguf
from quant.formats import Format, QuantizedLayers, find_format
from quant.formats.base import UnreadMethod, config_problems
from quant.formats.legacy import repaired
from quant.models.account import stacked_experts
from quant.models.linears import built_linears, fused_refs
from quant.models.roles import leftovers_note
from quant.models.vectors import lost_bias
from quant.report.value import REPORT, Report
from quant.vllm.architectures import architecture_problem, own_code
from quant.vllm.cache import cache_problems
from quant.vllm.config import (
    heads_of,
    model_types,
    parts,
    quantization_config,
    stated,
    stated_dtype,
    text_path,
)
from quant.vllm.layers import (
    BuiltLayer,
    built_layers,
    built_plain,
    expert_problem,
    is_head,
    module_class,
    reordered,
    shape_problems,
    sharing_layers,
)
from quant.vllm.methods import method_problem
from quant.vllm.names import misplaced_experts, unfound_expert, unread_note, unread_spellings
from quant.vllm.releases import VLLM_VERSION

#: Findings of one check that are said; more are counted.
_MOST = 5
#: Options in advice that those who make a checkpoint have, and those who verify one have not.
_ADVISED = re.compile(r"--(?:format|scheme|ignore|group-size|symmetric|method)\b")
#: Classes of modules with a row for each token.
_TABLES = ("LMHead", "Embedding")
#: Floats that vLLM turns into one another as it loads; a power of two stays what it is.
_TURNED = {*WIDE_FLOATS, "F8_E8M0"}


@dataclass(frozen=True)
class Check:
    """One question with its answer; ``detail`` says what was found."""

    name: str
    passed: bool
    detail: str


@dataclass
class Verification:
    """All checks of one checkpoint."""

    path: str
    checks: list[Check] = field(default_factory=list)
    content_hash: str = ""

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks)

    @property
    def failed(self) -> list[str]:
        return [f"{c.name}: {c.detail}" for c in self.checks if not c.passed]

    def add(self, name: str, problems: Iterable[str], good: str) -> None:
        wrong = list(problems)
        more = f" (and {len(wrong) - _MOST} more)" if len(wrong) > _MOST else ""
        said = "; ".join(wrong[:_MOST]) + more
        named = dict.fromkeys(_ADVISED.findall(said))
        whose = f" ({', '.join(named)}: of quant quantize and quant export-vllm)" if named else ""
        self.checks.append(Check(name, not wrong, said + whose if wrong else good))

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "passed": self.passed,
            "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks],
            "content_hash": self.content_hash,
        }


def verify(
    path: str | Path,
    *,
    tensor_parallel: int = 1,
    source: str | Path | None = None,
    target: str = "vllm",
    vllm_version: str | None = None,
    served: bool = True,
    changed: Sequence[str] | None = None,
    made: Sequence[str] | None = None,
    read_values: bool = True,
) -> Verification:
    """Checks a checkpoint directory statically.

    Args:
        tensor_parallel: the degree it will be served with.
        source: the checkpoint it was made from, to account for every tensor and side file.
        target: ``vllm``, or ``other`` to leave out what only vLLM demands.
        vllm_version: the release that must have the model's class; None: the one that the report in the
            directory names, else the planned one.
        served: it is asked for one.
        changed: tensors of the source into which scaling was folded; None: those that the report in the
            directory names.
        made: tensors that calibration added; None: likewise.
        read_values: look at every byte; otherwise at config and headers alone, as is quick, and nothing is
            compared with ``source``.

    Raises:
        CheckpointError: the directory cannot be read at all. Everything else is a failed check.
    """
    result = Verification(str(path))
    if (file := gguf_file(Path(path))) is not None:
        return verify_gguf(result, file, source)
    checkpoint = open_checkpoint(path)
    result.add(
        "files",
        [],
        f"{len(checkpoint.tensors)} tensors in {len(checkpoint.weight_files)} files, headers valid"
        + (f"; {note}" if (note := leftovers_note(checkpoint.tensors.values())) else ""),
    )
    if (told := _format(result, checkpoint, target)) is None:
        return result
    layers, unread = told
    result.add("config", _config_problems(checkpoint.config), unread or _describe(layers))
    result.add(
        "names and shapes",
        file_problems(checkpoint, layers),
        "embedding, head, blocks, experts and heads are those that config.json implies",
    )
    if layers is not None:
        _check_layers(result, checkpoint, layers, target)
    if target == "vllm":
        release = (vllm_version or _made_for(checkpoint.path)) if served else None
        _check_engine(result, checkpoint, layers, tensor_parallel, release, bool(unread))
    if not read_values:
        return result
    origin = None if source is None else repaired(open_checkpoint(source))[0]
    own = changed is not None or made is not None or Report.load(checkpoint.path) is not None
    origin = None if origin is None else counterpart(checkpoint.path, origin)
    noted = noted_tensors(checkpoint.path)
    noted = replace(
        noted,
        folded=noted.folded if changed is None else changed,
        added=noted.added if made is None else made,
    )
    copies = set() if origin is None else copied_tensors(checkpoint, origin, layers, noted)
    values = scan_values(checkpoint, layers, source=origin, copies=copies, target=target)
    result.content_hash = values.content_hash
    result.add(
        "values",
        values.problems,
        "every float is finite, every scale is non-zero, packed words agree with the config",
    )
    if origin is not None:
        differing = values.differing | differing_cuts(checkpoint, origin, layers, noted)
        _check_source(result, checkpoint, origin, layers, differing, noted, own)
        if noted.own_values and changed is None:  # else no report is written of it yet
            _check_own_values(result, checkpoint, noted)
    return result


def _format(
    result: Verification, checkpoint: Checkpoint, target: str
) -> tuple[QuantizedLayers | None, str] | None:
    """The quantized layers as config.json has them (None: it says nothing of any), and why they are not read
    where vLLM loads a method that is not read here; None where no other check has anything to go by."""
    try:
        mended, _ = repaired(checkpoint)
        layers = find_format(mended.config, mended.tensors)
    except UnreadMethod as error:
        refused = method_problem(error.method) if target == "vllm" else str(error)
        unread = (
            f"quantized as quant_method {error.method!r}, which vLLM loads and which is not read here: its "
            "quantized tensors are not checked"
        )
        result.add("format", [f"{refused}: {error}"] if refused else [], unread)
        return None if refused else (None, unread)
    except QuantError as error:
        result.add("format", [str(error)], "")
        return None
    if quantization_config(checkpoint.config) is not None:
        return layers, ""
    if layers is None or not layers.linears:
        return None, ""  # a file of an earlier quantization, which vLLM does not read
    problem = (
        f"config.json says nothing of the quantization ({_describe(layers)}), a file beside it does: vLLM "
        "reads config.json alone: quant export-vllm writes it there"
    )
    result.add("format", [problem], "")
    return None


def _check_engine(
    result: Verification,
    checkpoint: Checkpoint,
    layers: QuantizedLayers | None,
    tensor_parallel: int,
    release: str | None,
    unread: bool,
) -> None:
    """What vLLM alone demands; ``release`` None where it is not asked for its model class."""
    config = checkpoint.config
    if release is not None:
        if misplaced := misplaced_experts(model_types(config), checkpoint.tensors):
            result.add("modules", [misplaced], "")
        if dropped := lost_bias(checkpoint.tensors, config, checkpoint.is_zero):
            result.add("biases", [dropped], "")
        reason = architecture_problem(config, release)
        note = unread_note(model_types(config), checkpoint.tensors)
        good = own_code(config) or f"one that vLLM {release} serves{f'; but {note}' if note else ''}"
        result.add("model class", [reason] if reason else [], good)
    held = layers.linears if layers else {}
    built = [] if unread else built_linears(checkpoint.tensors, config, held)
    result.add(
        "tensor parallel",
        shape_problems(built, tensor_parallel, heads_of(config)),
        f"heads and shapes divide for {tensor_parallel} rank{'s' if tensor_parallel > 1 else ''}",
    )


def _check_source(
    result: Verification,
    checkpoint: Checkpoint,
    origin: Checkpoint,
    layers: QuantizedLayers | None,
    differing: Collection[str],
    noted: Noted,
    own: bool,
) -> None:
    """Every tensor and side file of the source is accounted for; ``own``: this project made it."""
    result.add(
        "tensors of the source",
        source_problems(checkpoint, origin, layers, differing, noted.added),
        "each linear is there, and all else byte for byte (the source is quantized itself)"
        if quantization_config(origin.config) is not None
        else f"all {len(origin.tensors)} are there, in the same dtypes and shapes; nothing here tells which "
        "values have to be the source's"
        if layers is None and not own
        else f"all {len(origin.tensors)} are quantized or copied byte for byte{noted.exceptions()}",
    )
    result.add(
        "side files",
        side_file_problems(checkpoint, origin, own),
        "all there, byte for byte" if own else "all there, and saying the same",
    )


def _check_own_values(result: Verification, checkpoint: Checkpoint, noted: Noted) -> None:
    """Values that were fitted, taught or scaled have nothing in the source to be compared with; that the file
    is the one which the report in its directory was written of stands for them."""
    report = Report.load(checkpoint.path)
    result.add(
        "values of its own",
        []
        if report is not None and report.output_hash == result.content_hash
        else [
            f"{', '.join(noted.own_values)}: the source does not tell their values, and the weights are not "
            f"those that {REPORT} was written of: make it again"
        ],
        f"{', '.join(noted.own_values)}: the source does not tell what they should be; they are as they were "
        "written, by the hash in the report",
    )


def loading_problems(path: str | Path) -> list[str]:
    """What vLLM would not load of a quantized checkpoint, as far as its headers tell, or of a GGUF file; of
    one that is not quantized, or by a method that is not read here, nothing.

    Raises:
        CheckpointError: the directory cannot be read at all.
    """
    if gguf_file(Path(path)) is not None:
        return [
            "vLLM has no loader of GGUF files since 0.24 (a plugin has): quant-deploy plan -m "
            f"{path} --engine llama.cpp serves it as it is"
        ]
    checkpoint = open_checkpoint(path)
    if quantization_config(checkpoint.config) is None:
        return []
    try:
        mended, _ = repaired(checkpoint)
        layers = find_format(mended.config, mended.tensors)
    except UnreadMethod:
        return []
    except QuantError as error:
        return [str(error)]
    if layers is None:
        return []
    built = built_linears(mended.tensors, mended.config, layers.linears)
    return [
        *vllm_refusals(checkpoint, layers, layers.form),
        *shape_problems(built, 1, heads_of(mended.config)),
    ]


def _made_for(folder: Path) -> str:
    """The release of vLLM that a checkpoint was made for, as the report beside it says; else the planned
    one."""
    report = Report.load(folder)
    settings = report.quantization.settings if report is not None and report.quantization else {}
    return str(settings.get("vllm_version") or VLLM_VERSION)


def _check_layers(result: Verification, checkpoint: Checkpoint, layers: QuantizedLayers, target: str) -> None:
    """The checks that only a quantized checkpoint has."""
    form, linears = layers.form, list(layers.linears.values())
    dtype = stated_dtype(checkpoint.config) or ""
    result.add(
        "quantized layers",
        _layer_problems(checkpoint, layers, form, dtype),
        f"{len(linears)} linears"
        f"{f' and {len(layers.stacks)} stacks of experts' if layers.stacks else ''} "
        "have the tensors, dtypes and shapes of "
        f"{layers.format}{_rounded_scales(checkpoint, layers, form, dtype)}",
    )
    if target == "vllm":
        result.add(
            "vLLM takes it",
            vllm_refusals(checkpoint, layers, form),
            "bits, symmetry and group sizes are ones that vLLM loads, and the config names what is quantized",
        )
        result.add(
            "fused layers",
            _fused_problems(checkpoint, layers),
            "shards of each fused layer are quantized alike, or not at all",
        )
        single = form.lasts("global_scale", "inputs")
        result.add(
            "shared numbers",
            (f"{p}, of which vLLM keeps one" for p in _differing(checkpoint, layers, single)),
            f"one for all shards of a fused layer{_rounded_anew(checkpoint, layers, form)}",
        )
    if cache := (quantization_config(checkpoint.config) or {}).get("kv_cache_scheme"):
        result.add(
            "KV cache",
            cache_problems(checkpoint.tensors, cache),
            "every attention layer has the scales of its FP8 cache",
        )
    heads = [f"{x.name} is quantized ({x.scheme})" for x in linears if module_class(x.name) in _TABLES]
    result.add("head and embeddings", _head_problems(checkpoint, layers), "; ".join(heads) or "unquantized")


def _describe(layers: QuantizedLayers | None) -> str:
    if layers is None:
        return "not quantized: an ordinary checkpoint"
    schemes = [*(str(x.scheme) for x in layers.linears.values())]
    schemes += [str(x.weights) for x in layers.stacks.values()]
    return f"{layers.format}: {', '.join(dict.fromkeys(schemes))}"


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with config.json, whatever the format."""
    problems = []
    if "quantization_config" in config and any("quantization_config" in p for p in list(parts(config))[:-1]):
        where = ".".join(text_path(config))
        problems.append(f"quantization_config stands both at the top and in {where}: keep the one at the top")
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        problems.append("architectures is missing: vLLM chooses the model class by it")
    return problems


def vllm_refusals(checkpoint: Checkpoint, layers: QuantizedLayers, form: Format) -> list[str]:
    """What vLLM does not load in this format, or would read wrongly by its config."""
    schemes = dict.fromkeys(x.scheme for x in layers.linears.values())
    refused = list(dict.fromkeys(reason for s in schemes if (reason := form.refuse(s, "vllm"))))
    refused += _unread(checkpoint, layers, form)
    try:
        config = quantization_config(checkpoint.config) or {}
        unread = unread_spellings(str(checkpoint.config.get("model_type")), layers.stored)
        return refused + unread + config_problems(config, layers, _members(checkpoint, layers))
    except CheckpointError as error:
        return [*refused, str(error)]


def _unread(checkpoint: Checkpoint, layers: QuantizedLayers, form: Format) -> list[str]:
    """Quantized linears that vLLM builds in 16 bits, or reads in a wrong order."""
    matrices = [n.removesuffix(".weight") for n in checkpoint.tensors if n.endswith(".weight")]
    plain = built_plain({*matrices, *layers.linears}, checkpoint.config, layers.format == "fp8")
    problems = [f"{n} is quantized: {plain[n]}" for n in layers.linears if n in plain]
    kinds = model_types(checkpoint.config)
    reason = expert_problem(next(iter(kinds), ""), layers.linears.values(), layers.format)
    unfound = unfound_expert(kinds, layers.linears)
    problems += [p for p in (reason, unfound) if p]
    for name, linear in layers.linears.items():
        if reordered(name, linear.scheme, form.name, kinds):
            problems.append(
                f"{name}: vLLM's loader reorders its outputs, which {linear.scheme} in format {form.name} "
                "does not bear"
            )
    return problems


def _members(checkpoint: Checkpoint, layers: QuantizedLayers) -> dict[str, BuiltLayer]:
    """The layers that vLLM builds so that they may be quantized, each with the linears of the file that
    become it, quantized or not."""
    matrices = {
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    fused = fused_refs(checkpoint.tensors, checkpoint.config)  # all of a layer's in one tensor
    matrices |= {*fused, *stacked_experts(checkpoint.tensors, checkpoint.config, fused.values())}
    return built_layers(sorted(matrices | set(layers.linears)), checkpoint.config)


def _layer_problems(checkpoint: Checkpoint, layers: QuantizedLayers, form: Format, dtype: str) -> list[str]:
    problems = []
    optional = tuple(f".{last}" for last in form.lasts("group_index"))  # natural order needs none
    if not layers.linears and not layers.stacks:
        where = checkpoint.quantization_file
        problems.append(
            f"{where} says quantized, but no tensor is: vLLM reads that file and would look for scales: "
            "remove it"
            if where
            else "the config says quantized, but no tensor is: vLLM would look for scales: remove its "
            "quantization_config, or fetch the checkpoint again"
        )
    for linear in layers.linears.values():
        try:
            specs = form.specs(linear, dtype or checkpoint.tensors[next(iter(checkpoint.tensors))].dtype)
        except QuantError as error:
            problems.append(f"{linear.name}: {error}")
            continue
        for spec in specs:
            name = layers.tensor(spec.name)
            info = checkpoint.tensors.get(name)
            if info is None:
                if not spec.name.endswith(optional):
                    problems.append(f"{name} is missing")
            elif not _same_shape(info.shape, spec.shape):
                problems.append(f"{name} has shape {info.shape}, the contract is {spec.shape}")
            # vLLM turns floats into one another as it loads
            elif info.dtype != spec.dtype and not {info.dtype, spec.dtype} <= _TURNED:
                problems.append(f"{name} is {info.dtype}, the contract is {spec.dtype}")
        if f"{linear.name}.weight" in checkpoint.tensors and f"{linear.name}.weight" not in {
            s.name for s in specs
        }:
            problems.append(f"{linear.name}.weight is left beside its quantized form")
        problems += form.problems(linear)
    return problems


def _same_shape(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether vLLM loads a tensor of one shape into a parameter of the other: one number has two of them
    (`parameter.py::PerTensorScaleParameter`, `_assert_and_load`)."""
    return shape == wanted or (wanted == (1,) and shape == ())


def _rounded_scales(checkpoint: Checkpoint, layers: QuantizedLayers, form: Format, dtype: str) -> str:
    """What to say of scales that are stored in another float type than the model's: vLLM loads them, rounded
    once more."""
    stored = {
        checkpoint.tensors[s.name].dtype
        for linear in layers.linears.values()
        for s in form.specs(linear, dtype)
        if dtype and s.dtype == dtype and s.name in checkpoint.tensors
    } - {dtype}
    return (
        f"; scales are {', '.join(sorted(stored))}, which vLLM rounds to the model's {dtype} as it loads"
        if stored
        else ""
    )


def _fused_problems(checkpoint: Checkpoint, layers: QuantizedLayers) -> list[str]:
    """Layers that vLLM builds as one although their shards are not of one scheme."""
    problems = []
    for fused, built in _members(checkpoint, layers).items():
        schemes = {
            str(layers.linears[n].scheme) if n in layers.linears else "unquantized" for n in built.linears
        }
        if len(schemes) > 1:
            problems.append(
                f"{fused}: its shards are {', '.join(sorted(schemes))}: vLLM builds them as one layer"
            )
    return problems


def _differing(checkpoint: Checkpoint, layers: QuantizedLayers, lasts: Sequence[str]) -> list[str]:
    """Shards of a fused layer that have several of a number of which vLLM keeps one."""
    problems = []
    for names in sharing_layers(layers.linears, model_types(checkpoint.config)):
        for last in lasts:
            stored = (layers.tensor(f"{n}.{last}") for n in names)
            tensors = [t for t in stored if t in checkpoint.tensors]
            if len({b"".join(checkpoint.read_bytes(t)) for t in tensors}) > 1:
                shards = ", ".join(n.rpartition(".")[2] for n in names)
                problems.append(f"{names[0].rpartition('.')[0]}: {shards} differ in {last}")
    return problems


def _rounded_anew(checkpoint: Checkpoint, layers: QuantizedLayers, form: Format) -> str:
    """What to say of FP8 shards with a scale each: vLLM serves them, a little farther from the source than
    the file is."""
    if any(x.weights.strategy != "tensor" for x in layers.linears.values()):
        return ""
    several = _differing(checkpoint, layers, form.lasts("scales"))
    return (
        f"; {several[0]}{f' (and {len(several) - 1} more)' if len(several) > 1 else ''}: vLLM rounds their "
        "codes anew to the largest"
        if several
        else ""
    )


def _head_problems(checkpoint: Checkpoint, layers: QuantizedLayers) -> list[str]:
    # `compressed_tensors_embedding.py`: codes are looked up by row
    problems = [
        f"{x.name} is quantized ({x.scheme}): of embeddings vLLM takes symmetric weight-only "
        "integers in compressed-tensors alone"
        for x in layers.linears.values()
        if module_class(x.name) == "Embedding"
        and (
            layers.format != "compressed-tensors"
            or x.activations is not None
            or not x.weights.symmetric
            or x.weights.type != "int"
        )
    ]
    if stated(checkpoint.config, "tie_word_embeddings"):
        problems += [
            f"{n} is quantized although the config ties it to the embedding"
            for n in layers.linears
            if is_head(n)
        ]
    return problems
