"""Safetensors headers, read with suspicion and without torch.

A file starts with a little-endian 64-bit length, then that many bytes of JSON (name → dtype, shape, data
offsets), then the data. The checks follow the format's own rules (github.com/huggingface/safetensors,
"Format"): offsets lie inside the file, agree with dtype and shape, do not overlap and leave no holes. A
header that breaks one of them is refused before a byte of it is used.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint.folders import not_itself
from quant.errors import CheckpointError

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
        raise ValueError(f"a name appears twice: {next(n for n in names if names.count(n) > 1)!r}")
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
        with file.open("rb") as stream:
            size = file.stat().st_size
            if size < 8:
                raise refuse(f"{size} bytes, fewer than the 8 of the header's length")
            head = stream.read(64)
            if what := not_itself(head):
                raise CheckpointError(f"{file}: {what}")
            (length,) = struct.unpack("<Q", head[:8])
            stream.seek(8)
            if length > min(size - 8, _LARGEST_HEADER):
                raise refuse(f"the header claims {length} bytes, the file has {size - 8} after it")
            raw = stream.read(length)
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
        if not name.isascii() and not _is_text(name):
            raise refuse(f"tensor {name!r} has half of a surrogate pair in its name, which is no character")
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(f"tensor {name!r} lacks dtype, shape or two data_offsets") from error
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise refuse(f"tensor {name!r} has dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise refuse(
                f"tensor {name!r} has shape {shape!r} and offsets {entry['data_offsets']!r}: whole numbers "
                "from 0 up are needed"
            )
        if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise refuse(
                f"tensor {name!r} of {dtype} {shape} takes {math.prod(shape) * DTYPE_BYTES[dtype]} bytes, "
                f"its offsets hold {end - start}"
            )
        if data + end > size:
            raise refuse(f"tensor {name!r} ends at byte {data + end}, the file at {size}: it is truncated")
        tensors[name] = TensorInfo(name, dtype, tuple(shape), file, data + start, data + end)
    position = data
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if info.start != position:
            raise refuse(
                f"tensor {info.name!r} starts at byte {info.start}, the one before ends at {position}: "
                "tensors overlap or leave a hole"
            )
        position = info.end
    if position != size:
        raise refuse(f"{size - position} bytes after the last tensor")
    return tensors, metadata
