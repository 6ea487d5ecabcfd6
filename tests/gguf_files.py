"""GGUF files written byte by byte: of any architecture and type, whether the gguf package knows it or not."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Name, ggml's number of the type, sides (innermost first), bytes.
Tensor = tuple[str, int, tuple[int, ...], int]
ONE: tuple[Tensor, ...] = (("token_embd.weight", 0, (8, 4), 128),)


def write_gguf(
    file: Path,
    keys: Mapping[str, str | int] | None = None,
    tensors: Sequence[Tensor] = ONE,
    size: int | None = None,
) -> Path:
    """A file of version 3 with zeros as data.

    Args:
        size: bytes of the whole, sparse; None: what the tensors take.
    """
    keys = {"general.architecture": "unheard-of"} | dict(keys or {})
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))

    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words.encode())) + words.encode()

    for key, value in keys.items():
        is_text = isinstance(value, str)
        out += text(key) + struct.pack("<I", 8 if is_text else 4)
        out += text(value) if isinstance(value, str) else struct.pack("<I", value)
    start = 0
    for name, kind, sides, nbytes in tensors:
        out += text(name) + struct.pack("<I", len(sides)) + struct.pack(f"<{len(sides)}Q", *sides)
        out += struct.pack("<IQ", kind, start)
        start += -(-nbytes // 32) * 32
    whole = -(-len(out) // 32) * 32 + start
    with file.open("wb") as stream:
        stream.write(out)
        stream.truncate(whole if size is None else size)
    return file
