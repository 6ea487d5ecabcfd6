"""Safetensors headers, read with suspicion and without torch.

A file starts with a little-endian 64-bit length, then that many bytes of JSON (name → dtype, shape, data
offsets), then the data. The checks follow the format's own rules (github.com/huggingface/safetensors,
"Format"): offsets lie inside the file, agree with dtype and shape, do not overlap and leave no holes. A
header that breaks one of them is refused before a byte of it is used.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint.folders import not_itself
from quant.errors import CheckpointError, clipped
from quant.remote import open_weights

#: bytes of one element
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
#: Floats that weights are trained in, and that engines turn into one another as they load.
WIDE_FLOATS = ("BF16", "F16", "F32", "F64")
_LARGEST_HEADER = 100_000_000
_MOST_SIDES = 64  # of a tensor's shape, as torch has it


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes ``start`` to ``end`` of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"a name appears twice: {clipped(Counter(names).most_common(1)[0][0])}")
    return made


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name, and the metadata, of one safetensors file.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header breaks a rule; the message names
            the file and the rule.
    """

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{file}: not a valid safetensors file: {why}. Download or copy it again")

    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise refuse("a pipe or a device, no file")
        with open_weights(file) as stream:
            size = found.st_size
            if size < 8:
                raise refuse(f"{size} bytes, fewer than the 8 of the header's length")
            head = stream.read(64)
            if what := not_itself(head):
                raise CheckpointError(f"{file}: {what}")
            (length,) = struct.unpack("<Q", head[:8])
            stream.seek(8)
            if length > min(size - 8, _LARGEST_HEADER):
                raise refuse(f"the header claims {length} bytes, the file has {size - 8} after it")
            raw = b""
            while len(raw) < length and (piece := stream.read(length - len(raw))):
                raw += piece
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise refuse(f"the header is not JSON ({str(error)[:120]})") from error
    if not isinstance(header, dict):
        raise refuse("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("__metadata__ is not an object of strings")
    data = 8 + length
    tensors = {}
    for name, entry in header.items():
        shown = clipped(name)
        if not name.isascii() and not _is_text(name):
            raise refuse(f"tensor {shown} has half of a surrogate pair in its name, which is no character")
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(f"tensor {shown} lacks dtype, shape or two data_offsets") from error
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise refuse(f"tensor {shown} has dtype {clipped(dtype)}; known: {', '.join(DTYPE_BYTES)}")
        numbers = (*shape, start, end) if isinstance(shape, list) and len(shape) <= _MOST_SIDES else ()
        if not numbers or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise refuse(
                f"tensor {shown} has shape {clipped(shape)} and offsets {clipped([start, end])}: whole "
                f"numbers from 0 up are needed, {_MOST_SIDES} sides at the most"
            )
        if end - start != (taken := math.prod(shape) * DTYPE_BYTES[dtype]):
            raise refuse(
                f"tensor {shown} of {dtype} {clipped(shape)} takes {taken} bytes, its offsets hold "
                f"{end - start}"
            )
        if data + end > size:
            raise refuse(f"tensor {shown} ends at byte {data + end}, the file at {size}: it is truncated")
        tensors[name] = TensorInfo(name, dtype, tuple(shape), file, data + start, data + end)
    position = data
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if info.start != position:
            raise refuse(
                f"tensor {clipped(info.name)} starts at byte {info.start}, the one before ends at "
                f"{position}: tensors overlap or leave a hole"
            )
        position = info.end
    if position != size:
        raise refuse(f"{size - position} bytes after the last tensor")
    return tensors, metadata
