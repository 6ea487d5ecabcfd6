"""How many bytes a weight takes under every scheme and source format, and on which GPU its parts land.

Byte counts follow the files' contracts: codes, scales, zero points and the shape record of each quantized
linear. Embeddings, the head, norms and routers stay in the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from quant.architectures import DTYPE_BYTES, ModelSpec, Weight
from quant.errors import UsageError
from quant.vllm.config import source_method
from quant.vllm.releases import Rules


def _up(value: float, multiple: int) -> int:
    return ceil(value / multiple) * multiple


@dataclass(frozen=True)
class Storage:
    """One way to store a linear's [N, K] matrix. ``bytes`` counts everything that the file holds for it, with
    16-bit scales."""

    name: str
    bits: float
    bytes: Callable[[int, int, int], float]
    group: int = 0
    source: str = ""


def packed(bits: int, group: int = 128, symmetric: bool = True) -> Storage:
    """compressed-tensors ``pack-quantized``: int32 words along K, a scale a group, zero points packed along
    N, the shape as two int64.

    >>> packed(4).bytes(4096, 4096, 2)
    8650768.0
    """

    def size(n: int, k: int, width: int) -> float:
        groups = 1 if group == -1 else ceil(k / group)
        zeros = 0 if symmetric else ceil(n * bits / 32) * 4 * groups
        return float(n * ceil(k * bits / 32) * 4 + n * groups * width + zeros + 16)

    return Storage(f"int{bits}", bits, size, group)


def _gptq(bits: int, group: int) -> Storage:
    def size(n: int, k: int, width: int) -> float:
        groups = 1 if group == -1 else ceil(k / group)
        return float(ceil(k * bits / 32) * 4 * n + n * groups * width + groups * ceil(n * bits / 32) * 4)

    return Storage(f"int{bits}", bits, size, group)


PLAIN = Storage("plain", 16, lambda n, k, width: float(n * k * width))
INT8 = Storage("int8", 8, lambda n, k, width: float(n * k + 4 * n))
FP8 = Storage("fp8", 8, lambda n, k, width: float(n * k + 4 * n))
FP8_BLOCK = Storage("fp8-block", 8, lambda n, k, width: float(n * k + 4 * ceil(n / 128) * ceil(k / 128)), 128)
# one number of the weight, one of the input
NVFP4 = Storage("nvfp4", 4, lambda n, k, width: n * k / 2 + n * k / 16 + 8, 16)
NVFP4A16 = Storage("nvfp4", 4, lambda n, k, width: n * k / 2 + n * k / 16 + 4, 16)
MXFP4 = Storage("mxfp4", 4, lambda n, k, width: n * k / 2 + n * k / 32, 32)
MXFP8 = Storage("mxfp8", 8, lambda n, k, width: n * k + n * k / 32, 32)
#: NF4 with double quantization: half a byte, a byte of scale for 64 values, 4 bytes for 256 such scales
NF4 = Storage("nf4", 4, lambda n, k, width: n * k * (0.5 + 1 / 64 + 4 / (64 * 256)), 64)

#: storage of a scheme that the recommendation may name
SCHEME_STORAGE: dict[str, Storage] = {
    "none": PLAIN,
    "fp8": FP8,
    "w8a8-fp8": FP8,
    "w8a8-fp8-tensor": Storage("fp8", 8, lambda n, k, width: float(n * k + 4)),
    "w8a16-fp8": FP8,
    "fp8-block": FP8_BLOCK,
    "w8a8-int8": INT8,
    "w8a16": packed(8),
    "w8a16-asym": packed(8, symmetric=False),
    "w4a16": packed(4),
    "w4a16-asym": packed(4, symmetric=False),
    "nvfp4": NVFP4,
    "nvfp4a16": NVFP4A16,
    "mxfp4": MXFP4,
    "mxfp4a16": MXFP4,
    "mxfp8": MXFP8,
}

#: schemes whose group size is the user's to choose
GROUPED = ("w4a16", "w4a16-asym", "w8a16", "w8a16-asym")

#: roles whose linears a scheme quantizes
QUANTIZED_ROLES = frozenset({"attention", "mlp", "experts", "shared_experts"})


def source_storage(spec: ModelSpec) -> tuple[Storage, Callable[[Weight], bool]]:
    """How the checkpoint itself stores its linears, and which ones.

    Raises:
        UsageError: a quant_method whose sizes are not known.
    """
    config = spec.quantization
    if not config:
        return PLAIN, lambda w: False
    method = source_method(config) or ""
    covered = _covered(config)
    if method in ("gptq", "auto-gptq", "gptq-marlin"):
        return _gptq(int(config.get("bits", 4)), int(config.get("group_size", 128))), covered
    if method in ("awq", "auto-awq", "awq-marlin"):
        return _gptq(
            int(config.get("bits", config.get("w_bit", 4))),
            int(config.get("group_size", config.get("q_group_size", 128))),
        ), covered
    if method == "fp8":
        return (FP8_BLOCK if config.get("weight_block_size") else FP8), covered
    if method == "bitsandbytes":
        return (INT8 if config.get("load_in_8bit") else NF4), covered
    if method in ("mxfp4", "gpt-oss-mxfp4"):
        return MXFP4, lambda w: w.role == "experts" and len(w.shape) == 2
    if method == "modelopt":
        algorithm = str(config.get("quant_algo", "")).upper()
        return (FP8 if algorithm.startswith("FP8") else NVFP4), covered
    if method == "compressed-tensors":
        for group in (config.get("config_groups") or {}).values():
            weights = (group or {}).get("weights") or {}
            bits, size = int(weights.get("num_bits", 8)), weights.get("group_size")
            if weights.get("type") == "float":
                kind = _float_kernel(bits, size)
                return {"mxfp4": MXFP4, "mxfp8": MXFP8, "nvfp4": NVFP4}.get(kind) or (
                    FP8_BLOCK if weights.get("strategy") == "block" else FP8
                ), covered
            if config.get("format") == "int-quantized" or group.get("input_activations"):
                return INT8, covered
            return packed(bits, int(size) if size else -1, bool(weights.get("symmetric", True))), covered
        return PLAIN, lambda w: False
    if any(w.stored_bytes for w in spec.weights):  # its tensors were counted: no formula is needed
        return PLAIN, lambda w: False
    raise UsageError(
        f"the checkpoint's quant_method is {method!r}: its sizes are not known; give the checkpoint's "
        "directory (--model-path), whose "
        "tensors can be counted"
    )


def _float_kernel(bits: int, group_size: Any) -> str:
    """The number format of float weights in compressed-tensors: microscaling has groups of 32."""
    return f"mxfp{bits}" if group_size == 32 else "nvfp4" if bits == 4 else "fp8"


def source_kernels(spec: ModelSpec) -> frozenset[str]:
    """The number formats that a checkpoint which is already quantized asks of a GPU, by their names in
    :data:`quant.vllm.kernels.FORMAT_CAPABILITIES`; empty where nothing is quantized, or by a method whose kernels
    are not known here."""
    config = spec.quantization or {}
    method = source_method(config) or ""
    if method in ("gptq", "auto-gptq", "gptq-marlin", "awq", "auto-awq", "awq-marlin"):
        return frozenset({f"int{config.get('bits', config.get('w_bit', 4))}-weights"})
    if method == "fp8":
        return frozenset({"fp8"})
    found = set()
    for group in (config.get("config_groups") or {}).values() if method == "compressed-tensors" else ():
        weights = (group or {}).get("weights") or {}
        bits, inputs = int(weights.get("num_bits", 8)), (group or {}).get("input_activations")
        if weights.get("type") == "float":
            found.add(_float_kernel(bits, weights.get("group_size")))
        elif inputs is None:
            found.add(
                f"int{bits}-weights{'-asym' if bits == 8 and not weights.get('symmetric', True) else ''}"
            )
        elif bits == 8:
            found.add("int8")
    return frozenset(found)


def _covered(config: Mapping[str, Any]) -> Callable[[Weight], bool]:
    """Which weights a source's ignore list leaves quantized. The list's short names are compared with the
    planner's names."""
    import re

    ignored = (
        config.get("ignore")
        or config.get("ignored_layers")
        or config.get("modules_to_not_convert")
        or config.get("llm_int8_skip_modules")
        or []
    )
    patterns = []
    for entry in ignored:
        text = str(entry)
        patterns.append(
            re.compile(text[3:])
            if text.startswith("re:")
            else re.compile(re.escape(text).replace(r"\*", ".*") + "$")
        )

    def covered(weight: Weight) -> bool:
        if not weight.linear or weight.role not in QUANTIZED_ROLES:
            return False
        module = "mlp" if weight.role in ("mlp", "experts", "shared_experts") else "self_attn"
        name = weight.name.removesuffix(".weight")
        full = (
            name
            if name.startswith("model.")
            else f"model.layers.{weight.layer}.{name if name.startswith(module) else f'{module}.{name}'}"
        )
        return not any(p.match(full) or p.match(name) for p in patterns)

    return covered


def storage_of(scheme: str, group_size: int | None = None) -> Storage:
    """The storage of a scheme's name, with another group size where the scheme has groups that can be chosen.

    Raises:
        UsageError: unknown scheme.
    """
    from quant.errors import one_of

    if scheme not in SCHEME_STORAGE:
        raise one_of("--scheme", scheme, sorted(SCHEME_STORAGE))
    storage = SCHEME_STORAGE[scheme]
    if group_size is not None and scheme in GROUPED:
        return packed(int(storage.bits), group_size, not scheme.endswith("-asym"))
    return storage


def checkpoint_bytes(spec: ModelSpec, scheme: str, group_size: int | None = None) -> int:
    """Bytes of tensors in the checkpoint that quantizing ``spec`` with ``scheme`` writes.

    Linears whose inner size the groups do not divide stay as they are.
    """
    storage = storage_of(scheme, group_size)
    width = DTYPE_BYTES[spec.dtype]
    total = 0.0
    for weight in spec.weights:
        if quantizable(weight, storage):
            total += storage.bytes(weight.shape[0], weight.shape[1], int(width)) * weight.count
        else:
            total += weight.stored_bytes or weight.parameters * width
    return int(total)


def file_bytes(spec: ModelSpec, scheme: str, group_size: int | None = None) -> int:
    """Bytes of the safetensors files: :func:`checkpoint_bytes` and the headers, which matter for small
    models.

    A header has an entry a tensor: its name, dtype, shape and two offsets. Names that only a config gave are
    taken as long as the usual ones.
    """
    tensors = checkpoint_bytes(spec, scheme, group_size)
    storage = storage_of(scheme, group_size)
    digits = len(str(tensors))
    parts = [
        "weight_packed",
        "weight_scale",
        "weight_shape",
        *(["weight_zero_point"] if scheme.endswith("-asym") else []),
    ]
    if scheme == "none":
        parts = []
    elif storage.name in ("int8", "fp8", "fp8-block", "mxfp8") and scheme not in GROUPED:
        parts = ["weight", "weight_scale"]
    elif storage is MXFP4:
        parts = ["weight_packed", "weight_scale"]
    elif storage.name == "nvfp4":
        parts = [
            "weight_packed",
            "weight_scale",
            "weight_global_scale",
            *(["input_global_scale"] if scheme == "nvfp4" else []),
        ]
    header = 16
    for weight in spec.weights:
        name = (
            weight.name
            if weight.stored_bytes
            else f"model.layers.{weight.layer}.self_attn.{weight.name}.weight"
        )
        base = name.removesuffix(".weight")
        names = [f"{base}.{p}" for p in parts] if parts and quantizable(weight, storage) else [name]
        shape = len(str(list(weight.shape)).replace(" ", ""))
        header += weight.count * sum(
            len(n) + len('"":{"dtype":"I32","shape":,"data_offsets":[,]},') + shape + 2 * digits
            for n in names
        )
    return tensors + header


def quantizable(weight: Weight, storage: Storage) -> bool:
    """Whether a scheme with this storage quantizes this weight."""
    if storage is PLAIN or not weight.linear or len(weight.shape) != 2 or weight.role not in QUANTIZED_ROLES:
        return False
    return storage.group <= 0 or weight.shape[1] % storage.group == 0


# -- in memory -----------------------------------------------------------------------------------------------


def stage_layers(layers: int, stages: int, rules: Rules) -> list[range]:
    """The decoder blocks of every pipeline stage.

    >>> from quant.vllm.releases import rules_for
    >>> [len(r) for r in stage_layers(61, 4, rules_for("0.32"))]
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
    spec: ModelSpec, scheme: str, tensor_parallel: int, pipeline_parallel: int, rules: Rules,
    capability: tuple[int, int] | None,
    dtype_bytes: int, group_size: int | None = None,
) -> list[int]:  # fmt: skip
    """Bytes of weights on a GPU of each pipeline stage after loading.

    Beyond the file's bytes: vocabularies padded to 64 rows and cut by rank, KV heads repeated when there are
    fewer than ranks, the absorbed copies that latent attention makes of ``kv_b_proj``, the padding of MXFP4
    kernels, and the table of rotary cosines and sines.
    """
    storage: Storage
    if scheme == "none":
        storage, covered = source_storage(spec)
    else:
        storage = storage_of(scheme, group_size)

        def covered(w: Weight) -> bool:
            return quantizable(w, storage)

    stages = stage_layers(spec.layers, pipeline_parallel, rules)
    totals = [float(spec.rotary_bytes)] * pipeline_parallel
    first, last = 0, pipeline_parallel - 1
    from_file = scheme == "none" and spec.quantization and any(w.stored_bytes for w in spec.weights)
    for weight in spec.weights:
        if weight.role == "mtp":
            continue
        size = _rank_bytes(
            spec,
            weight,
            storage if covered(weight) and not from_file else None,
            tensor_parallel,
            dtype_bytes,
            capability,
            rules,
            bool(from_file),
        )
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
    storage: Storage | None,
    ranks: int,
    width: int,
    capability: tuple[int, int] | None,
    rules: Rules,
    from_file: bool,
) -> float:
    shape = list(weight.shape)
    share = 1.0
    if weight.split == "vocab":
        shape[0] = _up(shape[0], 64 * ranks) // ranks
    elif weight.split == "kv":
        share = 1 / min(ranks, spec.kv_heads)
    elif weight.split == "column":
        share = 1 / ranks
    elif weight.split == "row" and len(shape) > 1:
        share = 1 / ranks
    elif weight.role == "vision":
        share = 1 / ranks if rules.engine == "v1" and len(shape) > 1 else 1.0
    if from_file and weight.stored_bytes:
        changed = prod(shape) / max(prod(weight.shape), 1)
        size = weight.stored_bytes * (changed if weight.split == "vocab" else share)
        if weight.stored_dtype == "F32" and len(weight.shape) >= 2 and weight.split in ("vocab",):
            size *= width / 4
    elif storage is None:
        size = prod(shape) * weight.count * width * share
    else:
        n, k = shape[0], shape[1]
        if storage is MXFP4:
            n, k = _mxfp4_padding(n, k, weight.split, ranks, capability, rules)
            share = 1.0
        elif weight.split == "row":
            k = ceil(k * share)
            share = 1.0
        else:
            n = ceil(n * share)
            share = 1.0
        size = storage.bytes(n, k, width) * weight.count * share
    if (
        weight.name.removesuffix(".weight").endswith("kv_b_proj")
        and rules.mla
        and not rules.version < (0, 7, 1)
    ):
        size += prod(weight.shape) * width / ranks  # W_UK and W_UV, absorbed
    return size


def _mxfp4_padding(
    n: int, k: int, split: str, ranks: int, capability: tuple[int, int] | None, rules: Rules
) -> tuple[int, int]:
    """The sizes to which MXFP4 expert kernels pad. Marlin: the inner size to 128, the hidden size to 256;
    Triton (Hopper, 0.12 on): the output size of each matrix to 256."""
    triton = capability is not None and capability[0] == 9 and rules.version >= (0, 12, 0)
    inner, hidden = (n, k) if split == "column" else (k, n)
    inner = ceil(inner / ranks)
    if triton:
        inner, hidden = _up(inner, 64), _up(hidden, 256)
    else:
        inner, hidden = _up(inner, 128), _up(hidden, 256)
    return (inner, hidden) if split == "column" else (hidden, inner)
