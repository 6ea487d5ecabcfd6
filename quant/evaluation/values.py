"""The bytes of a checkpoint, read once: numbers that no engine can use, copies that differ from their source,
and a hash over all files. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quant.checkpoint.header import FLOATS, TensorInfo
from quant.checkpoint.reader import Checkpoint
from quant.errors import NotFinite, QuantError
from quant.formats import QuantizedLayers
from quant.formats.base import ValueCheck
from quant.models.roles import leftover
from quant.remote import open_weights
from quant.vllm.cache import CACHE_SCALES
from quant.vllm.layers import Linear

#: Bytes judged, hashed and compared at a time: few enough to stay in the processor's cache.
_CHUNK = 1 << 20
#: Files scanned at once.
_SCANS = 4


@dataclass(frozen=True)
class Values:
    """What the bytes of a checkpoint showed.

    Attributes:
        problems: values that no engine can use, a line for each tensor.
        differing: names of the ``copies`` whose bytes differ from the source's.
        content_hash: over all files.
    """

    problems: list[str]
    differing: frozenset[str]
    content_hash: str


def scan_values(
    checkpoint: Checkpoint,
    layers: QuantizedLayers | None,
    *,
    source: Checkpoint | None = None,
    copies: Collection[str] = (),
    target: str = "vllm",
) -> Values:
    """Reads every byte once, several files at a time.

    Args:
        source: the checkpoint whose bytes the tensors named in ``copies`` must have.
        target: ``vllm``, or ``other`` to leave out what only vLLM demands.
    """
    files = checkpoint.weight_files
    with ThreadPoolExecutor(max(1, min(_SCANS, len(files), os.cpu_count() or 1))) as pool:
        scans = list(
            pool.map(lambda file: _scan_file(file, checkpoint, layers, source, copies, target), files)
        )
    digests = sorted(f"{file.name} {scan.content_hash}" for file, scan in zip(files, scans, strict=True))
    return Values(
        [p for scan in scans for p in scan.problems],
        frozenset(n for scan in scans for n in scan.differing),
        hashlib.sha256("\n".join(digests).encode()).hexdigest(),
    )


def _scan_file(
    file: Path,
    checkpoint: Checkpoint,
    layers: QuantizedLayers | None,
    source: Checkpoint | None,
    copies: Collection[str],
    target: str,
) -> Values:
    """:func:`scan_values` of one file, whose hash is over its bytes."""
    problems, differing, digest = [], [], hashlib.sha256()
    tensors = sorted((t for t in checkpoint.tensors.values() if t.file == file), key=lambda t: t.start)
    with open_weights(file) as stream:
        digest.update(stream.read(tensors[0].start) if tensors else b"")
    for info in tensors:
        whole = _whole_check(info, layers, target)
        # of a mask that no engine reads infinity is a value like others
        check = whole or (None if leftover(info) else _check_of_numbers(info, layers))
        # what the format tests is a pattern over the whole tensor; floats are judged piece by piece
        chunk = _CHUNK if whole is None else max(1, info.nbytes)
        original: Iterator[bytes] | None = None
        if source is not None and info.name in copies:
            original = source.read_bytes(info.name, chunk)
        for piece in checkpoint.read_bytes(info.name, chunk):
            digest.update(piece)
            if check is not None and (wrong := check(piece)):
                problems.append(f"{info.name} {wrong}")
                check = None
            if original is not None and next(original) != piece:
                differing.append(info.name)
                original = None
    return Values(problems, frozenset(differing), digest.hexdigest())


def _linear_of(name: str, layers: QuantizedLayers | None) -> Linear | None:
    return None if layers is None else layers.linears.get(name.rpartition(".")[0])


def _whole_check(info: TensorInfo, layers: QuantizedLayers | None, target: str) -> ValueCheck | None:
    """What a quantized linear's tensor is tested for as a whole: the format's own check, and natural order of
    groups where vLLM will read them."""
    linear = _linear_of(info.name, layers)
    if linear is None or layers is None:
        return None
    form, last = layers.form, info.name.rpartition(".")[2]
    if form.parts.get(last) == "group_index" and target == "vllm":
        return _natural_order(linear)
    check = form.value_check(linear, last, layers.options) if last in form.parts else None
    if check is None:
        return None
    try:
        contract = {s.name: (s.dtype, s.shape) for s in form.specs(linear, "BF16")}
    except QuantError:
        contract = {}
    # where it does not fit, the check of the layers says so
    return check if contract.get(info.name) == (info.dtype, info.shape) else None


def _natural_order(linear: Linear) -> ValueCheck:
    """Tests a group index, int32 [K]: vLLM has no path for any other order than k // group size."""
    import numpy as np

    size = linear.k // linear.weights.groups(linear.k)
    natural = (np.arange(linear.k) // size).astype("<i4").tobytes()
    return lambda data: None if data == natural else "is reordered: vLLM drops it and reads wrong values"


def finite_pieces(checkpoint: Checkpoint, name: str) -> Iterator[bytes]:
    """The bytes of a tensor as the file has them, in pieces.

    Raises:
        NotFinite: it holds NaN or infinity, and is no leftover buffer.
    """
    info = checkpoint.info(name)
    check = None if leftover(info) else _check_of_numbers(info, None)
    for piece in checkpoint.read_bytes(name):
        if check is not None and check(piece):
            raise NotFinite(info.file, name)
        yield piece


def _check_of_numbers(
    info: TensorInfo, layers: QuantizedLayers | None
) -> Callable[[bytes], str | None] | None:
    """What every piece of a tensor of floats is tested for: finite values, and multipliers that are not
    zero."""
    last = info.name.rpartition(".")[2]
    role = None
    if layers is not None and _linear_of(info.name, layers) is not None:
        role = layers.form.parts.get(last)
    if layers is not None and any(info.name in stack.tensors[1:] for stack in layers.stacks.values()):
        role = "scales"
    single = role in ("global_scale", "inputs") or last in CACHE_SCALES
    multiplier = role == "scales" or single or (layers is not None and info.name in _stack_scales(layers))
    if info.dtype == "U8" and multiplier:
        return _exponents
    if info.dtype == "F8_E4M3":
        return _eight_bits(multiplier)
    if info.dtype not in FLOATS or info.dtype.startswith("F8"):
        return None
    return _floats(info.dtype, nonzero=multiplier, positive=single)


def _stack_scales(layers: QuantizedLayers) -> set[str]:
    """The multipliers of experts in one tensor."""
    return {n for x in layers.stacks.values() for n in x.tensors if "scale" in n.rpartition(".")[2]}


def _exponents(piece: bytes) -> str | None:
    """E8M0: powers of two, and all ones is NaN."""
    import numpy as np

    count = int((np.frombuffer(piece, "u1") == 0xFF).sum())
    return f"holds {count} NaN" if count else None


def _eight_bits(positive: bool) -> Callable[[bytes], str | None]:
    """E4M3: it has no infinity, and one NaN of each sign."""
    import numpy as np

    def check(piece: bytes) -> str | None:
        codes = np.frombuffer(piece, "u1")
        magnitudes = codes & 0x7F
        # counted only where there is one: a maximum costs far less than a comparison
        if magnitudes.size and int(magnitudes.max()) == 0x7F:
            return f"holds {np.count_nonzero(magnitudes == 0x7F)} NaN"
        if positive and (count := np.count_nonzero((codes == 0) | (codes > 0x7F))):
            return f"holds {count} scales that are not positive"
        return None

    return check


#: Header dtype → the unsigned word of its width, and the bits of infinity.
_INFINITIES = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF << 52),
}


def _floats(dtype: str, nonzero: bool, positive: bool) -> Callable[[bytes], str | None]:
    """Infinity and NaN are the numbers whose bits without the sign are at least infinity's."""
    import numpy as np

    word, infinity = _INFINITIES[dtype]

    def check(piece: bytes) -> str | None:
        words = np.frombuffer(piece, word)
        magnitudes = words & words.dtype.type(np.iinfo(words.dtype).max >> 1)
        if magnitudes.size and int(magnitudes.max()) >= infinity:
            return f"holds {int((magnitudes >= words.dtype.type(infinity)).sum())} NaN or infinite values"
        if nonzero and not magnitudes.all():
            return f"holds {int((magnitudes == 0).sum())} zero scales"
        return "is negative" if positive and bool((words != magnitudes).any()) else None

    return check
