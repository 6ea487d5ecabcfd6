"""Every tensor of a checkpoint beside the same tensor of its source, values dequantized."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.reader import open_checkpoint
from quant.formats.reading import dequantized


@dataclass(frozen=True)
class TensorDifference:
    """Of one tensor: whether all values are equal, signal to noise in dB, and the largest absolute difference."""

    name: str
    equal: bool
    snr_db: float | None
    largest: float


@dataclass(frozen=True)
class Comparison:
    tensors: tuple[TensorDifference, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "equal": sum(t.equal for t in self.tensors),
            "different": [asdict(t) for t in self.tensors if not t.equal],
            "only_here": list(self.only_here),
            "only_there": list(self.only_there),
        }


def compare(path: str | Path, against: str | Path) -> Comparison:
    """Compares two checkpoints tensor by tensor, each read in its own format, in fp32.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    here, there = dequantized(open_checkpoint(path)), dequantized(open_checkpoint(against))
    found = []
    for name in sorted(set(here.tensors) & set(there.tensors)):
        a, b = here.read(name).float(), there.read(name).float()
        if a.shape != b.shape:
            found.append(TensorDifference(name, False, None, float("inf")))
            continue
        difference = a - b
        noise, signal = float(difference.square().sum()), float(b.square().sum())
        snr = 10 * torch.log10(torch.tensor(signal / noise)).item() if noise and signal else None
        found.append(TensorDifference(name, bool(torch.equal(a, b)), snr, float(difference.abs().max()) if a.numel() else 0.0))
    return Comparison(
        tuple(found), tuple(sorted(set(here.tensors) - set(there.tensors))), tuple(sorted(set(there.tensors) - set(here.tensors)))
    )
