"""How many bytes a model's weights take in every scheme and source format, and on which GPU its parts land.

Byte counts follow the files' contracts: codes, scales, zero points and the shape record of each quantized
linear. Embeddings, the head, norms and routers stay in the model's own dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any

from quant.errors import QuantError, UsageError, clipped
from quant.models.spec import DTYPE_BYTES, ModelSpec, Weight
from quant.schemes import BLOCK, PRESETS, Scheme, WeightScheme
from quant.vllm.config import source_method
from quant.vllm.kernels import kernel_of
from quant.vllm.lists import left_out
from quant.vllm.releases import Rules

_EXPERTS = re.compile(r"(?<![^.])experts\.")


def _up(value: float, multiple: int) -> int:
    return ceil(value / multiple) * multiple


def is_quantized(scheme: Scheme | None) -> bool:
    """Whether a scheme changes anything: None and :data:`quant.schemes.UNQUANTIZED` stand for the checkpoint
    as it is."""
    return scheme is not None and scheme.weights.bits != 16


# -- how a checkpoint stores its own linears -----------------------------------------------------------------


@dataclass(frozen=True)
class ForeignScheme(Scheme):
    """A scheme as another tool's file stores it.

    Attributes:
        size: (N, K, bytes of a value of the model's dtype) → bytes of what the file holds of a linear.
        tabled: whether vLLM runs it with the kernels of :data:`quant.vllm.kernels.FORMAT_CAPABILITIES`.
        padded: whether vLLM pads what a rank gets to whole groups.
    """

    size: Callable[[int, int, int], float] = field(kw_only=True)
    tabled: bool = field(default=False, kw_only=True)
    padded: bool = field(default=False, kw_only=True)

    def stored_bytes(self, n: int, k: int, width: int) -> float:
        return self.size(n, k, width)


#: Weight → the scheme in which it is stored; None: in a floating-point dtype.
SchemeOf = Callable[[Weight], Scheme | None]

#: NF4 with double quantization: half a byte, a byte of scale for 64 values, 4 bytes for 256 such scales. Its
#: 64 values follow one another through the whole tensor, so that no cut divides them.
_NF4 = ForeignScheme(
    "nf4",
    WeightScheme(4, -1, True, "float", "tensor"),
    size=lambda n, k, width: n * k * (0.5 + 1 / 64 + 4 / (64 * 256)),
)


def _foreign(preset: str) -> ForeignScheme:
    """The numbers of a preset, run by other kernels than those of our files."""
    scheme = PRESETS[preset]
    return ForeignScheme(scheme.name, scheme.weights, scheme.activations, size=scheme.stored_bytes)


def _packed_words(bits: int, group: int) -> ForeignScheme:
    """GPTQ and AWQ: words, scales, and zero points whether or not there are any; no shape record."""

    def size(n: int, k: int, width: int) -> float:
        groups = 1 if group == -1 else ceil(k / group)
        return ceil(k * bits / 32) * 4 * n + n * groups * width + groups * ceil(n * bits / 32) * 4

    return ForeignScheme(f"w{bits}a16", WeightScheme(bits, group), size=size, tabled=True)


def _gptq(config: Mapping[str, Any]) -> SchemeOf:
    return _covered(config, _packed_words(int(config.get("bits", 4)), int(config.get("group_size", 128))))


def _awq(config: Mapping[str, Any]) -> SchemeOf:
    bits = int(config.get("bits", config.get("w_bit", 4)))
    group = int(config.get("group_size", config.get("q_group_size", 128)))
    return _covered(config, _packed_words(bits, group))


def _fp8(config: Mapping[str, Any]) -> SchemeOf:
    block = config.get("weight_block_size")
    if block and list(block) != [BLOCK, BLOCK]:
        rows, columns = int(block[0]), int(block[1])
        return _covered(
            config,
            ForeignScheme(
                "fp8-block",
                WeightScheme(8, columns, True, "float", "group", "F32"),
                PRESETS["fp8-block"].activations,
                size=lambda n, k, width: n * k + 4 * ceil(n / rows) * ceil(k / columns),
            ),
        )
    return _covered(config, PRESETS["fp8-block" if config.get("weight_block_size") else "w8a8-fp8-tensor"])


def _bitsandbytes(config: Mapping[str, Any]) -> SchemeOf:
    return _covered(config, _foreign("w8a8-int8") if config.get("load_in_8bit") else _NF4)


def _modelopt(config: Mapping[str, Any]) -> SchemeOf:
    """ModelOpt's files: FP8, NVFP4, or both (``MIXED_PRECISION``), where ``quantized_layers`` names each
    module's. Where that list is missing, attention counts as FP8 and the rest as NVFP4, as in the files
    that are published."""
    algorithm = str(config.get("quant_algo", "")).upper()
    named: Mapping[str, Any] = config.get("quantized_layers") or {}
    if algorithm != "MIXED_PRECISION" and not named:
        return _covered(config, _modelopt_scheme(algorithm))
    listed = _listed(config)

    def scheme(weight: Weight) -> Scheme | None:
        if not _is_quantizable(weight) or listed(weight):
            return None
        if not named:
            return _modelopt_scheme("FP8" if weight.role == "attention" else "NVFP4")
        entry = next((named[n] for n in module_names(weight) if n in named), None)
        return None if entry is None else _modelopt_scheme(str(entry.get("quant_algo", "")).upper())

    return scheme


def _modelopt_scheme(algorithm: str) -> ForeignScheme:
    if algorithm == "MXFP8":
        return _foreign("mxfp8")
    return _foreign("w8a8-fp8" if algorithm.startswith("FP8") else "nvfp4")


def _mxfp4(config: Mapping[str, Any]) -> SchemeOf:
    """gpt-oss: its experts and nothing else. Their loader cuts groups between ranks (`models/gpt_oss.py`)."""
    scheme = replace(_foreign("mxfp4a16"), padded=True)
    return lambda weight: scheme if weight.role == "experts" and len(weight.shape) == 2 else None


def _compressed_tensors(config: Mapping[str, Any]) -> SchemeOf:
    """Every config group with a scheme of its own, and what its targets name."""
    # the formats take a quarter of the time to the answer, and few checkpoints are quantized already
    from quant.formats.compressed_tensors import group_scheme, targeted

    groups: Mapping[str, Any] = config.get("config_groups") or {}
    schemes = {
        name: group_scheme(group, str(group.get("format") or config.get("format")), f"config group {name}")
        for name, group in groups.items()
    }
    listed, group_of = _listed(config), targeted(groups)

    def scheme(weight: Weight) -> Scheme | None:
        if not _is_quantizable(weight) or listed(weight):
            return None
        group = group_of(*module_names(weight))
        return None if group is None else schemes[group]

    return scheme


#: ``quant_method`` in vLLM's spelling → what the rest of such a quantization_config says of every weight
_SOURCES: dict[str, Callable[[Mapping[str, Any]], SchemeOf]] = {
    "gptq": _gptq,
    "auto-gptq": _gptq,
    "gptq-marlin": _gptq,
    "awq": _awq,
    "auto-awq": _awq,
    "awq-marlin": _awq,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
    "gpt-oss-mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "modelopt-fp4": _modelopt,
    "modelopt-mxfp8": _modelopt,
    "modelopt-mixed": _modelopt,
    "fbgemm-fp8": lambda config: _covered(config, _foreign("w8a8-fp8")),
    "compressed-tensors": _compressed_tensors,
}


def source_schemes(spec: ModelSpec) -> SchemeOf:
    """In which scheme the checkpoint itself stores each weight.

    Raises:
        UsageError: a quant_method whose sizes are not known, or a config that cannot be understood; not where
            the tensors themselves were counted.
    """
    config = spec.quantization
    if not config:
        return lambda weight: None
    method = source_method(config) or ""
    try:
        if method in _SOURCES:
            return _SOURCES[method](config)
        reason = "its sizes are not known"
    except (QuantError, AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        reason = f"its config cannot be understood ({str(error)[:200]})"
    if any(w.stored_bytes for w in spec.weights):  # no formula is needed
        return lambda weight: None
    raise UsageError(
        f"the checkpoint's quant_method is {clipped(method)}: {reason}; give the checkpoint's directory "
        "(--model-path), whose tensors can be counted"
    )


def requantizable(spec: ModelSpec) -> ModelSpec:
    """A model whose checkpoint is quantized already as a job sees it that starts from the values: with
    nothing quantized, and the shapes that its linears have unpacked."""
    return replace(spec, weights=spec.unpacked or spec.weights, unpacked=(), quantization=None)


def requantizing_problem(spec: ModelSpec, scheme: Scheme) -> str | None:
    """Why it is no use to quantize a checkpoint that is quantized already to a scheme: it cannot be read
    here, or gets no smaller; None where neither is so."""
    from quant.formats import FormatRegistry
    from quant.formats.base import FOREIGN

    method = source_method(spec.quantization) or ""
    read = {m for f in (*FormatRegistry, *FOREIGN.values()) for m in (f.quant_method, *f.also)}
    if method not in read:
        return f"the checkpoint is already quantized ({method}), which is not read here: quantize its source"
    try:
        own = source_schemes(spec)
    except UsageError as error:
        return str(error)
    stored = [s.weights.bits for w in spec.unpacked or spec.weights if (s := own(w)) is not None]
    if stored and scheme.weights.bits >= max(stored):
        return (
            f"the checkpoint is already quantized ({method}) to {max(stored)} bits: as many or more gain no "
            "room, and lose a little"
        )
    return None


def source_kernels(spec: ModelSpec) -> frozenset[str]:
    """The number formats that a checkpoint which is already quantized asks of a GPU, by their names in
    :data:`quant.vllm.kernels.FORMAT_CAPABILITIES`; empty where nothing is quantized, or by a method whose
    kernels are not tabled."""
    own = source_schemes(spec)
    schemes = {own(w) for w in spec.unpacked or spec.weights}
    return frozenset(
        kernel_of(s) for s in schemes if s is not None and (not isinstance(s, ForeignScheme) or s.tabled)
    )


def loaded_schemes(spec: ModelSpec) -> list[Scheme]:
    """The schemes that a checkpoint which is already quantized has its linears in, as far as their kernels
    are those of our own files: gpt-oss' experts have their own."""
    own = source_schemes(spec)
    schemes = dict.fromkeys(own(w) for w in spec.unpacked or spec.weights)
    return [s for s in schemes if s is not None and not (isinstance(s, ForeignScheme) and s.padded)]


def module_names(weight: Weight) -> tuple[str, ...]:
    """What a file may call the module of a weight, whose own name is the end of it where only a config is
    known: in a causal language model, and in the text part of a wrapper."""
    name = weight.name.removesuffix(".weight")
    if weight.stored_bytes or weight.layer < 0:
        return (name,)
    tail = f"layers.{weight.layer}.{_EXPERTS.sub('experts.0.', name)}"
    return tuple(f"{prefix}.{tail}" for prefix in ("model", "language_model.model", "model.language_model"))


def _listed(config: Mapping[str, Any]) -> Callable[[Weight], bool]:
    """Which weights a source's list leaves unquantized."""
    listed = left_out(config)
    return lambda weight: listed(*module_names(weight))


def _covered(config: Mapping[str, Any], scheme: Scheme) -> SchemeOf:
    """One scheme for everything but what the config lists."""
    listed = _listed(config)
    return lambda weight: scheme if _is_quantizable(weight) and not listed(weight) else None


def _is_quantizable(weight: Weight) -> bool:
    return weight.linear and len(weight.shape) == 2


# -- what a scheme makes of a checkpoint ---------------------------------------------------------------------


def quantizable(weight: Weight, scheme: Scheme | None) -> bool:
    """Whether a scheme quantizes this weight: linears whose inputs its groups do not divide stay as they
    are."""
    if scheme is None or scheme.weights.bits == 16 or not _is_quantizable(weight):
        return False
    group = scheme.weights.group_size
    return group == -1 or weight.shape[1] % group == 0


def checkpoint_bytes(spec: ModelSpec, scheme: Scheme | None = None) -> int:
    """Bytes of tensors in the checkpoint that quantizing ``spec`` with ``scheme`` writes; None: as it is."""
    width = DTYPE_BYTES[spec.dtype]
    total = 0.0
    for weight in spec.weights:
        if scheme is not None and quantizable(weight, scheme):
            total += scheme.stored_bytes(weight.shape[0], weight.shape[1], int(width)) * weight.count
        else:
            total += weight.stored_bytes or weight.parameters * width
    return int(total)


def file_bytes(spec: ModelSpec, scheme: Scheme | None = None) -> int:
    """Bytes of the safetensors files: :func:`checkpoint_bytes` and the headers, which matter for small
    models.

    A header has an entry a tensor: its name, dtype, shape and two offsets. Names that only a config gave are
    taken as long as the usual ones.
    """
    tensors = checkpoint_bytes(spec, scheme)
    digits = len(str(tensors))
    parts = [] if scheme is None else list(scheme.stored_tensors(1, 1, 2))
    header = 16
    for weight in spec.weights:
        names = [weight.tensor]
        if scheme is not None and quantizable(weight, scheme):
            base = names[0].removesuffix(".weight")
            names = [f"{base}.{last}" for last in parts]
        shape = len(str(list(weight.shape)).replace(" ", ""))
        header += weight.count * sum(
            len(n) + len('"":{"dtype":"I32","shape":,"data_offsets":[,]},') + shape + 2 * digits
            for n in names
        )
    return tensors + header


# -- in memory -----------------------------------------------------------------------------------------------


def stage_layers(layers: int, stages: int, rules: Rules) -> list[range]:
    """The decoder blocks of every pipeline stage.

    >>> from quant.vllm.releases import rules_for
    >>> [len(r) for r in stage_layers(61, 4, rules_for())]
    [15, 15, 16, 15]
    """
    each, rest = divmod(layers, stages)
    counts = [each] * stages
    if rules.last_stage_takes_rest:
        counts[-1] += rest
    else:
        for i in range(2, rest + 2):
            counts[-i if i <= stages else -1] += 1
    starts = [sum(counts[:i]) for i in range(stages)]
    return [range(s, s + n) for s, n in zip(starts, counts, strict=True)]


def loaded_bytes(
    spec: ModelSpec, scheme: Scheme | None, tensor_parallel: int, pipeline_parallel: int, rules: Rules,
    dtype_bytes: int, *, tower: str = "weights", experts_whole: bool = False,
) -> list[int]:  # fmt: skip
    """Bytes of weights on a GPU of each pipeline stage after loading; ``scheme`` None: as they are.

    Args:
        tower: how ranks share the vision tower: ``weights`` (its linears are cut), ``data`` (every rank holds
            it whole), ``none`` (it is not loaded).
        experts_whole: ranks hold whole experts instead of a part of each.

    Beyond the file's bytes: vocabularies padded to 64 rows and cut by rank, KV heads repeated when there are
    fewer than ranks, the absorbed copies that latent attention makes of ``kv_b_proj``, the padding of MXFP4
    kernels, and the table of rotary cosines and sines.
    """
    planned = scheme if is_quantized(scheme) else None
    own = source_schemes(spec)
    stages = stage_layers(spec.layers, pipeline_parallel, rules)
    totals = [float(spec.rotary_bytes)] * pipeline_parallel
    first, last = 0, pipeline_parallel - 1
    from_file = planned is None and bool(spec.quantization) and any(w.stored_bytes for w in spec.weights)
    for weight in spec.weights:
        if weight.role == "mtp" or (weight.role == "tower" and tower == "none"):
            continue
        stored = own(weight) if planned is None else planned if quantizable(weight, planned) else None
        size = _rank_bytes(
            spec, weight, None if from_file else stored, tensor_parallel, dtype_bytes, rules, from_file,
            tower, experts_whole,
        )  # fmt: skip
        if weight.layer >= 0:
            stage = next(i for i, r in enumerate(stages) if weight.layer in r)
            totals[stage] += size
        elif weight.role in ("head",) or weight.name in ("norm.weight", "norm.bias"):
            totals[last] += size
        else:
            totals[first] += size
            if weight.role == "embedding" and spec.tied and last:
                totals[last] += size
    return [int(t) for t in totals]


def _rank_bytes(
    spec: ModelSpec,
    weight: Weight,
    stored: Scheme | None,
    ranks: int,
    width: int,
    rules: Rules,
    from_file: bool,
    tower: str,
    experts_whole: bool,
) -> float:
    """Bytes of a weight on one rank, stored in a scheme or (None) in ``width`` bytes a value."""
    shape = list(weight.shape)
    share = 1.0
    if weight.role == "experts" and experts_whole:
        share = 1 / ranks
    elif weight.split == "vocab":
        shape[0] = _up(shape[0], 64 * ranks) // ranks
    elif weight.split == "kv":
        share = 1 / min(ranks, spec.kv_heads)
    elif weight.split == "column":
        share = 1 / ranks
    elif weight.split == "row" and len(shape) > 1:
        share = 1 / ranks
    elif weight.role == "tower":
        cut = rules.engine == "v1" or spec.vision_shape.get("crossed")
        share = 1 / ranks if cut and len(shape) > 1 and tower == "weights" else 1.0
    if from_file and weight.stored_bytes:
        changed = prod(shape) / max(prod(weight.shape), 1)
        size = weight.stored_bytes * (changed if weight.split == "vocab" else share)
        if weight.stored_dtype == "F32" and len(weight.shape) >= 2 and weight.split in ("vocab",):
            size *= width / 4
    elif stored is None:
        size = prod(shape) * weight.count * width * share
        if weight.role == "experts" and len(shape) == 2 and rules.expert_padding:
            size += _row_padding(shape, weight, ranks, width, rules, experts_whole)
    elif weight.role == "experts" and experts_whole:
        size = stored.stored_bytes(shape[0], shape[1], width) * weight.count * share
    else:
        n, k = shape[0], shape[1]
        if kernel_of(stored) == "mxfp4":
            n, k = _mxfp4_padding(n, k, weight.split, ranks, rules)
        elif weight.split == "row":
            k = ceil(k * share)
        else:
            n = ceil(n * share)
        size = stored.stored_bytes(n, k, width) * weight.count
    if weight.name.removesuffix(".weight").endswith("kv_b_proj") and rules.mla:
        size += prod(weight.shape) * width / ranks  # W_UK and W_UV, absorbed
    return size


def _row_padding(
    shape: Sequence[int], weight: Weight, ranks: int, width: int, rules: Rules, experts_whole: bool
) -> float:
    """Bytes that the rows of unquantized experts are lengthened by on one rank, where they are a multiple of
    512 bytes (``_maybe_pad_weight`` of `unquantized_fused_moe_method.py`)."""
    cut = 1 if experts_whole else ranks
    row = shape[1] / (cut if weight.split == "row" else 1)
    rows = shape[0] * weight.count / (ranks if experts_whole or weight.split == "column" else 1)
    return rules.expert_padding * rows if row * width % 512 == 0 else 0.0


def _mxfp4_padding(n: int, k: int, split: str, ranks: int, rules: Rules) -> tuple[int, int]:
    """The sizes to which the kernels of MXFP4 experts pad: the hidden size to 256, the inner size on a rank
    to ``rules.mxfp4_inner``."""
    inner, hidden = (n, k) if split == "column" else (k, n)
    inner, hidden = _up(ceil(inner / ranks), rules.mxfp4_inner), _up(hidden, 256)
    return (inner, hidden) if split == "column" else (hidden, inner)
