"""GGUF files whose rows are others than their source's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from quant.evaluation.verify import verify

#: Ways to damage a matrix of the file, uint8 [N, bytes of a row], in place.
DAMAGE: dict[str, Callable[[np.ndarray], object]] = {
    "a row zeroed": lambda rows: rows[5].fill(0),
    "a quarter zeroed": lambda rows: rows[: len(rows) // 4].fill(0),
    "two rows swapped": lambda rows: rows.__setitem__([70, 80], rows[[80, 70]]),
    "all shifted by one": lambda rows: np.copyto(rows, np.roll(rows, 1, 0)),
    "a row twice": lambda rows: np.copyto(rows[9], rows[8]),
}


def damaged(source: Path, target: Path, tensor: str, how: str) -> Path:
    """A copy with one tensor damaged."""
    data = np.fromfile(source, np.uint8)
    stored = next(t for t in gguf.GGUFReader(source).tensors if t.name == tensor)
    start, size = int(stored.data_offset), int(stored.n_bytes)
    DAMAGE[how](data[start : start + size].reshape(int(stored.shape[1]), -1))
    data.tofile(target)
    return target


def assert_damage_is_told(file: Path, source: Path, scratch: Path) -> None:
    """That the file is whole, and no damage to one of its tensors passes."""
    assert verify(file, source=source).passed, file.name
    for number, how in enumerate(DAMAGE):
        tensor, name = [
            ("blk.0.ffn_up.weight", "layers.0.mlp.up_proj.weight"),
            ("token_embd.weight", "model.embed_tokens.weight"),
        ][number % 2]
        found = verify(damaged(file, scratch / "bad.gguf", tensor, how), source=source).failed
        assert len(found) == 1 and name in found[0], (file.name, tensor, how)
