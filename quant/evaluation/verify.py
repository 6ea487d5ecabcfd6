"""Will vLLM load it, and is it whole? Judged from the files alone: no torch, no vLLM.

The checks are those of the formats' contracts (:mod:`quant.formats`), of vLLM's fused layers and tensor
parallelism, and of the promise that every tensor and side file of the source is accounted for. Each finding
says what, which value, which rule.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.header import FLOATS, TensorInfo
from quant.checkpoint.reader import STALE, Checkpoint, open_checkpoint
from quant.errors import QuantError
from quant.formats import FormatRegistry, QuantizedLayers, find_format
from quant.formats.base import names_listed
from quant.formats.compressed_tensors import matches
from quant.formats.gptq import dynamic_rule
from quant.formats.reading import dequantized
from quant.models.linears import LinearRef, fused_tensors
from quant.vllm.cache import CACHE_SCALES, cache_problems
from quant.vllm.config import parts, quantization_config, stated_dtype, text_path
from quant.vllm.layers import Linear, fused_name, shape_problems, shared_name
from quant.vllm.releases import VLLM_VERSION

if TYPE_CHECKING:
    import torch

#: Bytes judged, hashed and compared at a time: few enough to stay in the processor's cache.
_CHUNK = 1 << 20
#: Files scanned at once.
_SCANS = 4
#: Floats that vLLM turns into one another as it loads.
_WIDE = ("BF16", "F16", "F32", "F64")
#: Numbers of a linear that vLLM keeps once for a fused layer.
_ONCE = ("input_scale", "input_zero_point", "input_global_scale", "weight_global_scale")
#: Last parts of names whose values are multipliers or divisors.
_SCALES = (
    "weight_scale",
    "weight_scale_inv",
    "scales",
    "input_scale",
    "input_global_scale",
    "weight_global_scale",
    *CACHE_SCALES,
)
_MOST = 5
#: Keys that vLLM accepts inside ``weights`` and ``input_activations`` of a compressed-tensors group; any
#: other is refused when it loads.
_ARGUMENT_KEYS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype",
    "observer", "observer_kwargs",
}  # fmt: skip


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
        found = list(problems)
        more = f" (and {len(found) - _MOST} more)" if len(found) > _MOST else ""
        self.checks.append(Check(name, not found, "; ".join(found[:_MOST]) + more if found else good))

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
    changed: Sequence[str] | None = None,
    made: Sequence[str] | None = None,
) -> Verification:
    """Checks a checkpoint directory statically.

    Args:
        tensor_parallel: the degree it will be served with.
        source: the checkpoint it was made from, to account for every tensor and side file.
        target: ``vllm``, or ``other`` to leave out what only vLLM demands.
        changed: tensors of the source into which scaling was folded; None: those that the report in the
            directory names.
        made: tensors that calibration added; None: likewise.

    Raises:
        CheckpointError: the directory cannot be read at all. Everything else is a failed check.
    """
    result = Verification(str(path))
    checkpoint = open_checkpoint(path)
    result.add(
        "files",
        [],
        f"{len(checkpoint.tensors)} tensors in {len(checkpoint.weight_files)} files, headers valid",
    )
    try:
        found = find_format(checkpoint.config, checkpoint.tensors)
    except QuantError as error:
        result.add("format", [str(error)], "")
        return result
    quantization = quantization_config(checkpoint.config)
    result.add("config", _config_problems(checkpoint.config), _describe(found))
    if found is not None and quantization is not None:
        dtype = stated_dtype(checkpoint.config) or ""
        linears = list(found.linears.values())
        result.add(
            "quantized layers",
            _layer_problems(checkpoint, found, dtype),
            f"{len(linears)} linears have the tensors, dtypes and shapes of "
            f"{found.format}{_rounded_scales(checkpoint, found, dtype)}",
        )
        if target == "vllm":
            form = FormatRegistry.get(found.format)
            refused = dict.fromkeys(r for x in linears if (r := form.refuse(x.scheme, "vllm")))
            result.add(
                "vLLM takes it",
                [*refused, *_gptq_refusals(quantization), *_awq_refusals(found)],
                "bits, symmetry and group sizes are ones that vLLM loads",
            )
            result.add(
                "fused layers",
                _fused_problems(checkpoint, found, quantization),
                "shards of each fused layer agree, by their own names and by the fused one",
            )
            result.add(
                "shared numbers",
                (f"{p}, of which vLLM keeps one" for p in _differing(checkpoint, found, _ONCE)),
                f"one for all shards of a fused layer{_rounded_anew(checkpoint, found)}",
            )
            result.add(
                "tensor parallel",
                shape_problems(linears, tensor_parallel),
                f"shapes divide for {tensor_parallel} rank(s)",
            )
        if cache := quantization.get("kv_cache_scheme"):
            result.add(
                "KV cache",
                cache_problems(checkpoint.tensors, cache),
                "every attention layer has the scales of its FP8 cache",
            )
        result.add("head and embeddings", _head_problems(checkpoint, found), "unquantized")
    origin = None if source is None else open_checkpoint(source)
    noted = _noted(checkpoint.path)
    changed, made = noted["folded"] if changed is None else changed, noted["added"] if made is None else made
    copies = set() if origin is None or found is None else _copies(checkpoint, origin, found, changed)
    values, differing, result.content_hash = _scan(checkpoint, found, origin, copies)
    result.add(
        "values", values, "every float is finite, every scale is non-zero, packed words agree with the config"
    )
    if origin is not None:
        result.add(
            "tensors of the source",
            _source_problems(checkpoint, origin, found, differing, made),
            "each linear is there, and all else byte for byte (the source is quantized itself)"
            if "quantization_config" in origin.config
            else f"all {len(origin.tensors)} are quantized or copied byte for "
            f"byte{f', {len(changed)} with scaling folded in' if changed else ''}",
        )
        result.add("side files", _side_file_problems(checkpoint, origin), "all there, byte for byte")
    return result


def _describe(found: QuantizedLayers | None) -> str:
    if found is None:
        return "not quantized: an ordinary checkpoint"
    schemes = ", ".join(dict.fromkeys(str(x.scheme) for x in found.linears.values()))
    return f"{found.format}: {schemes}"


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if "quantization_config" in config and any("quantization_config" in p for p in list(parts(config))[:-1]):
        where = ".".join(text_path(config))
        problems.append(f"quantization_config stands both at the top and in {where}: keep the one at the top")
    quantization = quantization_config(config)
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        problems.append("architectures is missing: vLLM chooses the model class by it")
    if quantization and str(quantization.get("quant_method")) == "compressed-tensors":
        for name, group in quantization.get("config_groups", {}).items():
            for part in ("weights", "input_activations"):
                unknown = sorted(set(group.get(part) or {}) - _ARGUMENT_KEYS)
                if unknown:
                    problems.append(
                        f"config_groups.{name}.{part} has the keys {', '.join(unknown)}, which vLLM refuses"
                    )
            if (group.get("weights") or {}).get("actorder") in ("group", "dynamic", True):
                problems.append(
                    f"config_groups.{name} has activation order {group['weights']['actorder']!r}, which "
                    "vLLM refuses"
                )
        if quantization.get("sparsity_config"):
            problems.append(f"sparsity_config is not empty: vLLM {VLLM_VERSION} has no sparse kernels left")
    return problems


def _gptq_refusals(quantization: Mapping[str, Any]) -> list[str]:
    problems = []
    if quantization.get("quant_method") == "gptq":
        if quantization.get("desc_act") and quantization.get("group_size") != -1:
            problems.append("desc_act is true with groups: vLLM refuses it")
        if not quantization.get("sym", True):
            problems.append("sym is false: vLLM refuses it")
        for pattern, rule in (quantization.get("dynamic") or {}).items():
            if (
                not pattern.startswith("-:")
                and rule.get("desc_act")
                and rule.get("group_size", quantization.get("group_size")) != -1
            ):
                problems.append(f"dynamic rule {pattern!r} has desc_act with groups: vLLM refuses it")
        if quantization.get("checkpoint_format", "gptq") != "gptq":
            problems.append(
                f"checkpoint_format is {quantization['checkpoint_format']!r}: vLLM reads zero points as v1"
            )
    return problems


def _awq_refusals(found: QuantizedLayers) -> list[str]:
    others = sorted(set(found.options["packing"].values()) - {"gemm"}) if found.format == "awq" else []
    return [
        f"the words are packed as AutoAWQ's {x}: vLLM reads every AWQ file as gemm; quant export-vllm "
        "converts it"
        for x in others
    ]


def _layer_problems(checkpoint: Checkpoint, found: QuantizedLayers, dtype: str) -> list[str]:
    form, problems = FormatRegistry.get(found.format), []
    if not found.linears:
        problems.append("the config says quantized, but no tensor is")
    for linear in found.linears.values():
        try:
            specs = form.specs(linear, dtype or checkpoint.tensors[next(iter(checkpoint.tensors))].dtype)
        except QuantError as error:
            problems.append(f"{linear.name}: {error}")
            continue
        for spec in specs:
            info = checkpoint.tensors.get(spec.name)
            if info is None:
                if spec.name.endswith(".g_idx"):
                    continue  # natural order needs none
                problems.append(f"{spec.name} is missing")
            elif info.shape != spec.shape:
                problems.append(f"{spec.name} has shape {info.shape}, the contract is {spec.shape}")
            elif info.dtype != spec.dtype and not (info.dtype in _WIDE and spec.dtype in _WIDE):
                problems.append(f"{spec.name} is {info.dtype}, the contract is {spec.dtype}")
        if f"{linear.name}.weight" in checkpoint.tensors and f"{linear.name}.weight" not in {
            s.name for s in specs
        }:
            problems.append(f"{linear.name}.weight is left beside its quantized form")
        problems += form.problems(linear)
    return problems


def _rounded_scales(checkpoint: Checkpoint, found: QuantizedLayers, dtype: str) -> str:
    """What to say of scales that are stored in another float type than the model's: vLLM loads them, rounded
    once more."""
    form = FormatRegistry.get(found.format)
    stored = {
        checkpoint.tensors[s.name].dtype
        for linear in found.linears.values()
        for s in form.specs(linear, dtype)
        if dtype and s.dtype == dtype and s.name in checkpoint.tensors
    } - {dtype}
    return (
        f"; scales are {', '.join(sorted(stored))}, which vLLM rounds to the model's {dtype} as it loads"
        if stored
        else ""
    )


def _fused_problems(
    checkpoint: Checkpoint, found: QuantizedLayers, quantization: Mapping[str, Any]
) -> list[str]:
    problems = []
    present = {
        n.removesuffix(".weight")
        for n in checkpoint.tensors
        if n.endswith(".weight") and len(checkpoint.tensors[n].shape) == 2
    }
    members: dict[str, list[str]] = {}
    for name in sorted(present | set(found.linears)):
        members.setdefault(fused_name(name), []).append(name)
    for fused, names in members.items():
        if len(names) < 2:
            continue
        schemes = {str(found.linears[n].scheme) if n in found.linears else "unquantized" for n in names}
        if len(schemes) > 1:
            problems.append(
                f"{fused}: its shards are {', '.join(sorted(schemes))}: vLLM builds them as one layer"
            )
    if quantization.get("quant_method") == "compressed-tensors":
        problems += _name_problems(members, found, quantization)
    if quantization.get("quant_method") == "fp8":
        problems += _native_problems(members, found, quantization)
    if found.format == "gptq":
        problems += _dynamic_problems(members, found, quantization)
    return problems


def _name_problems(
    members: Mapping[str, list[str]], found: QuantizedLayers, quantization: Mapping[str, Any]
) -> list[str]:
    """The config's names and regexes, judged as vLLM does: the fused name first, then every shard."""
    problems = []
    ignore = names_listed(quantization, "ignore")
    for fused, names in members.items():
        ignored = {n: any(matches(i, n) for i in ignore) for n in names}
        by_fused = len(names) > 1 and any(matches(i, fused) for i in ignore)
        for name in names:
            quantized = name in found.linears
            if quantized and (ignored[name] or by_fused):
                problems.append(
                    f"{name} is quantized, but the ignore list hits "
                    f"{'it' if ignored[name] else f'its fused name {fused}'}"
                )
            elif (
                not quantized and not ignored[name] and not by_fused and _would_be_linear(name, quantization)
            ):
                problems.append(
                    f"{name} is not quantized, but neither ignored: vLLM would look for packed weights"
                )
    return problems


def _would_be_linear(name: str, quantization: Mapping[str, Any]) -> bool:
    """Whether the config's targets claim a module: by class they claim every linear but heads and embeddings."""
    if re.search(r"(^|\.)(lm_head|embed\w*|wte|wpe|\w*norm\w*|\w*_embeddings?)$", name):
        return False
    targets = [str(t) for g in quantization.get("config_groups", {}).values() for t in g.get("targets", [])]
    return any(t == "Linear" or matches(t, name) for t in targets)


def _native_problems(
    members: Mapping[str, list[str]], found: QuantizedLayers, quantization: Mapping[str, Any]
) -> list[str]:
    """The names of a native fp8 config, which vLLM compares exactly."""
    ignored = {
        str(n) for n in quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or []
    }
    problems = []
    for fused, names in members.items():
        for name in names:
            if name in found.linears and (name in ignored or fused in ignored):
                problems.append(f"{name} is quantized, but ignored_layers names it")
            elif (
                name not in found.linears and len(names) > 1 and name not in ignored and fused not in ignored
            ):
                problems.append(
                    f"{name} is not quantized, but ignored_layers does not name it: vLLM would look for its "
                    "scale"
                )
    return problems


def _differing(checkpoint: Checkpoint, found: QuantizedLayers, numbers: Sequence[str]) -> list[str]:
    """Shards of a fused layer that have several of a number of which vLLM keeps one."""
    members: dict[str, list[str]] = {}
    for name in found.linears:
        members.setdefault(shared_name(name), []).append(name)
    problems = []
    for names in members.values():
        for last in numbers:
            tensors = [f"{n}.{last}" for n in names if f"{n}.{last}" in checkpoint.tensors]
            if len({b"".join(checkpoint.read_bytes(t)) for t in tensors}) > 1:
                shards = ", ".join(n.rpartition(".")[2] for n in names)
                problems.append(f"{names[0].rpartition('.')[0]}: {shards} differ in {last}")
    return problems


def _rounded_anew(checkpoint: Checkpoint, found: QuantizedLayers) -> str:
    """What to say of FP8 shards with a scale each: vLLM serves them, a little farther from the source than
    the file is."""
    if any(x.weights.strategy != "tensor" for x in found.linears.values()):
        return ""
    layers = _differing(checkpoint, found, ["weight_scale"])
    return (
        f"; {layers[0]}{f' (and {len(layers) - 1} more)' if len(layers) > 1 else ''}: vLLM rounds their "
        "codes anew to the largest"
        if layers
        else ""
    )


def _dynamic_problems(
    members: Mapping[str, list[str]], found: QuantizedLayers, quantization: Mapping[str, Any]
) -> list[str]:
    """The numbers that a GPTQ config gives each layer, with its ``dynamic`` rules asked as vLLM does: by the
    fused name, never by a shard's."""
    problems = []
    for fused, names in members.items():
        linear = next((found.linears[n] for n in names if n in found.linears), None)
        if linear is None:
            continue  # vLLM sees from the tensors which layers are not quantized
        rule = dynamic_rule(quantization, fused)
        if rule is None:
            problems.append(f"{fused} is quantized, but a rule of dynamic leaves it out")
            continue
        for key, held in (("bits", linear.weights.bits), ("group_size", linear.weights.group_size)):
            stated = rule.get(key, quantization.get(key))
            whole = linear.k if held == -1 else held  # one group of all inputs has two names
            if stated != held and (linear.k if stated == -1 else stated) != whole:
                problems.append(
                    f"{fused} has {key} {held}, the config gives it {stated} under that name, by which vLLM "
                    "asks"
                )
    return problems


def _head_problems(checkpoint: Checkpoint, found: QuantizedLayers) -> list[str]:
    problems = [
        f"{n} is quantized: vLLM keeps embeddings in full precision"
        for n in found.linears
        if re.search(r"(^|\.)embed\w*$", n)
    ]
    if checkpoint.config.get("tie_word_embeddings") and "lm_head" in found.linears:
        problems.append("lm_head is quantized although the config ties it to the embedding")
    return problems


def _copies(
    checkpoint: Checkpoint, source: Checkpoint, found: QuantizedLayers, changed: Collection[str]
) -> set[str]:
    """Tensors that must have the source's bytes."""
    source = dequantized(source)
    return {
        name
        for name, info in source.tensors.items()
        if name not in changed
        and name not in source.computed
        and not (name.endswith(".weight") and name.removesuffix(".weight") in found.linears)
        and (copy := checkpoint.tensors.get(name)) is not None
        and (copy.dtype, copy.shape) == (info.dtype, info.shape)
    }


def _scan(
    checkpoint: Checkpoint, found: QuantizedLayers | None, source: Checkpoint | None, copies: Collection[str]
) -> tuple[list[str], set[str], str]:
    """Reads every byte once, several files at a time.

    Returns:
        values that no engine can use; those of ``copies`` whose bytes differ from the source's; a hash over
        all files.
    """
    files = checkpoint.weight_files
    with ThreadPoolExecutor(max(1, min(_SCANS, len(files), os.cpu_count() or 1))) as pool:
        scans = list(pool.map(lambda file: _scan_file(file, checkpoint, found, source, copies), files))
    problems = [p for scan in scans for p in scan[0]]
    digests = sorted(f"{file.name} {scan[2]}" for file, scan in zip(files, scans, strict=True))
    return (
        problems,
        {n for scan in scans for n in scan[1]},
        hashlib.sha256("\n".join(digests).encode()).hexdigest(),
    )


def _scan_file(
    file: Path,
    checkpoint: Checkpoint,
    found: QuantizedLayers | None,
    source: Checkpoint | None,
    copies: Collection[str],
) -> tuple[list[str], list[str], str]:
    """:func:`_scan` of one file."""
    problems, differing, digest = [], [], hashlib.sha256()
    tensors = sorted((t for t in checkpoint.tensors.values() if t.file == file), key=lambda t: t.start)
    with file.open("rb", buffering=0) as stream:
        digest.update(stream.read(tensors[0].start) if tensors else b"")
    for info in tensors:
        judge = _judge(info, found)
        # an order is judged as a whole
        chunk = max(1, info.nbytes) if info.name.endswith(".g_idx") else _CHUNK
        original = source.read_bytes(info.name, chunk) if source is not None and info.name in copies else None
        for piece in checkpoint.read_bytes(info.name, chunk):
            digest.update(piece)
            if judge is not None and (wrong := judge(piece)):
                problems.append(f"{info.name} {wrong}")
                judge = None
            if original is not None and next(original) != piece:
                differing.append(info.name)
                original = None
    return problems, differing, digest.hexdigest()


def _judge(info: TensorInfo, found: QuantizedLayers | None) -> Callable[[bytes], str | None] | None:
    """What a tensor's bytes are tested for."""
    import numpy as np

    module, _, last = info.name.rpartition(".")
    linear = found.linears.get(module) if found else None
    if linear is not None and last == "qzeros" and linear.weights.symmetric and found is not None:
        middle = 2 ** (linear.weights.bits - 1) - found.options["zero_offset"]
        if linear.weights.bits in (2, 4, 8):
            word = sum(middle << s for s in range(0, 32, linear.weights.bits))
            return lambda b: (
                None
                if bool((np.frombuffer(b, "<u4") == word).all())
                else f"is not the constant {word:#010x} of symmetric weights"
            )
    if linear is not None and last == "g_idx":
        g = linear.k // linear.weights.groups(linear.k)
        natural = (np.arange(linear.k) // g).astype("<i4").tobytes()
        return lambda b: None if b == natural else "is reordered: vLLM drops it and reads wrong values"
    if linear is not None and last == "weight_shape" and (info.dtype, info.shape) != ("I64", (2,)):
        return None  # the layer's own check has said so
    if linear is not None and last == "weight_shape":
        return lambda b: (
            None
            if tuple(np.frombuffer(b, "<i8")) == (linear.n, linear.k)
            else f"says {tuple(np.frombuffer(b, '<i8').tolist())}, the tensors {(linear.n, linear.k)}"
        )
    scale = last in _SCALES and (linear is not None or last in CACHE_SCALES)
    if scale and info.dtype == "U8":  # E8M0: a power of two, all ones is NaN
        return lambda b: (
            f"holds {count} NaN" if (count := int((np.frombuffer(b, "u1") == 0xFF).sum())) else None
        )
    if info.dtype == "F8_E4M3":  # it has no infinity, and one NaN of each sign

        def eight_bits(piece: bytes) -> str | None:
            codes = np.frombuffer(piece, "u1")
            magnitudes = codes & 0x7F
            # counted only where there is one: a maximum costs far less than a comparison
            if magnitudes.size and int(magnitudes.max()) == 0x7F:
                return f"holds {np.count_nonzero(magnitudes == 0x7F)} NaN"
            if scale and (count := np.count_nonzero((codes == 0) | (codes > 0x7F))):
                return f"holds {count} scales that are not positive"
            return None

        return eight_bits
    if info.dtype not in FLOATS or info.dtype.startswith("F8"):
        return None
    positive = scale and last not in ("weight_scale", "weight_scale_inv", "scales")
    # infinity and NaN are the numbers whose bits without the sign are at least infinity's
    word, infinity = {
        "BF16": ("<u2", 0x7F80),
        "F16": ("<u2", 0x7C00),
        "F32": ("<u4", 0x7F800000),
        "F64": ("<u8", 0x7FF << 52),
    }[info.dtype]

    def finite(piece: bytes) -> str | None:
        words = np.frombuffer(piece, word)
        magnitudes = words & words.dtype.type(np.iinfo(words.dtype).max >> 1)
        if magnitudes.size and int(magnitudes.max()) >= infinity:
            return f"holds {int((magnitudes >= words.dtype.type(infinity)).sum())} NaN or infinite values"
        if scale and not magnitudes.all():
            return f"holds {int((magnitudes == 0).sum())} zero scales"
        return "is negative" if positive and bool((words != magnitudes).any()) else None

    return finite


def _noted(path: Path) -> dict[str, list[str]]:
    """What the report in an output directory says of tensors: those with scaling folded in, and those added."""
    try:
        tensors = json.loads((path / "quant_report.json").read_text(encoding="utf-8"))["tensors"]
        return {k: [str(n) for n in tensors.get(k, [])] for k in ("folded", "added")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {"folded": [], "added": []}


def _source_problems(
    checkpoint: Checkpoint,
    source: Checkpoint,
    found: QuantizedLayers | None,
    differing: Collection[str],
    made: Sequence[str],
) -> list[str]:
    problems = []
    linears = found.linears if found else {}
    source = dequantized(source)
    fused = fused_tensors(source.tensors, source.config)
    apart = {name: refs for name, refs in fused.items() if name not in checkpoint.tensors}
    own = (
        {s.name for x in linears.values() for s in FormatRegistry.get(found.format).specs(x, "BF16")}
        if found
        else set()
    )
    for name, info in source.tensors.items():
        module = name.removesuffix(".weight")
        if module in linears and name.endswith(".weight"):
            if info.shape != (linears[module].n, linears[module].k):
                problems.append(
                    f"{name} is {info.shape} in the source, {(linears[module].n, linears[module].k)} here"
                )
            continue
        copy = checkpoint.tensors.get(name)
        if name in apart:
            problems += _apart_problems(checkpoint, source, linears, name, apart[name])
        elif copy is None:
            problems.append(f"{name} of the source is lost")
        elif name in source.computed:
            if copy.shape != info.shape:
                problems.append(f"{name} was {info.shape}, is {copy.shape}")
        elif (copy.dtype, copy.shape) != (info.dtype, info.shape):
            problems.append(f"{name} was {info.dtype} {info.shape}, is {copy.dtype} {copy.shape}")
        elif name in differing:
            problems.append(f"{name} differs from the source although it is not quantized")
    made = [
        *made,
        *(f"{ref.name}.{last}" for refs in apart.values() for ref in refs for last in ("weight", "bias")),
    ]
    problems += [
        f"{n} is not in the source"
        for n in checkpoint.tensors
        if n not in source.tensors and n not in own and n not in made
    ]
    return problems


def _apart_problems(
    checkpoint: Checkpoint,
    source: Checkpoint,
    linears: Mapping[str, Linear],
    name: str,
    refs: Sequence[LinearRef],
) -> list[str]:
    """What is missing of a fused tensor of experts that was taken apart: each must be quantized, or be there as it
    was."""
    problems = []
    for ref in refs:
        bias = ref.bias is not None and ref.bias.tensor == name
        part, last = (ref.bias, "bias") if ref.bias is not None and bias else (ref.weight, "weight")
        held = linears.get(ref.name)
        if held is not None and not bias:
            if (held.n, held.k) != (ref.n, ref.k):
                problems.append(
                    f"{ref.name} is {(ref.n, ref.k)} in the source's {name}, {(held.n, held.k)} here"
                )
        elif f"{ref.name}.{last}" not in checkpoint.tensors:
            problems.append(f"{ref.name}, a part of the source's {name}, is lost")
        elif not _same_values(checkpoint.read(f"{ref.name}.{last}"), part.read(source)):
            problems.append(f"{ref.name}.{last} differs from the source although it is not quantized")
    return problems


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


def _side_file_problems(checkpoint: Checkpoint, source: Checkpoint) -> list[str]:
    problems = []
    for file in source.side_files():
        if file.dropped or file.relative in STALE:
            continue
        copy = checkpoint.path / file.relative
        if not copy.is_file():
            problems.append(f"{file.relative} is missing")
        elif copy.read_bytes() != file.path.read_bytes():
            problems.append(f"{file.relative} differs")
    return problems
