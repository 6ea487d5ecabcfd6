"""Every tensor of a checkpoint beside the same tensor of its source, values dequantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.reader import Checkpoint, open_checkpoint
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
    """Compares two checkpoints tensor by tensor, each read in its own format, in fp32. Linears of ``path`` that scaling was folded into are
    compared in the scale of the source; norms that took the scaling are shown as the different tensors they are.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    here, there = dequantized(open_checkpoint(path)), dequantized(open_checkpoint(against))
    undo = _undone_folds(Path(path), here, there)
    found = []
    for name in sorted(set(here.tensors) & set(there.tensors)):
        a, b = here.read(name).float(), there.read(name).float()
        if a.shape != b.shape:
            found.append(TensorDifference(name, False, None, float("inf")))
            continue
        for step in undo.get(name, ()):
            a = step(a, b)
        difference = a - b
        noise, signal = float(difference.square().sum()), float(b.square().sum())
        snr = 10 * torch.log10(torch.tensor(signal / noise)).item() if noise and signal else None
        found.append(TensorDifference(name, bool(torch.equal(a, b)), snr, float(difference.abs().max()) if a.numel() else 0.0))
    return Comparison(
        tuple(found), tuple(sorted(set(here.tensors) - set(there.tensors))), tuple(sorted(set(there.tensors) - set(here.tensors)))
    )


Undo = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _undone_folds(path: Path, here: Checkpoint, there: Checkpoint) -> dict[str, list[Undo]]:
    """By tensor name, what takes the scaling out of it that the directory's report tells of."""
    from quant.pipeline.folding import norm_factors

    undo: dict[str, list[Undo]] = {}
    try:
        folds = json.loads((path / "quant_report.json").read_text(encoding="utf-8"))["folds"].values()
        for fold in folds:
            linears, norm = [f"{n}.weight" for n in fold["linears"]], f"{fold['source']}.weight"
            if fold["kind"] == "linear":
                undo.setdefault(norm, []).append(lambda a, b: a / _powers(a, b, 1))
                for name in linears:
                    undo.setdefault(name, []).append(lambda a, b: a / _powers(a, b, 0))
            elif norm in here.tensors and norm in there.tensors:
                factors = norm_factors(there.read(norm), here.read(norm), float(fold["norm_offset"]))
                for name in linears:
                    undo.setdefault(name, []).append(lambda a, b, factors=factors: a / factors)  # type: ignore[misc]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # no report, or not one of ours: tensors are compared as they are
    return undo


def _powers(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """The power of two by which each row (``dim`` 1) or column (0) of ``a`` is larger than the same of ``b``, from the projection of the one
    on the other: folds into linears are powers of two, and rounding is far from moving a projection by half of one."""
    ratio = (a * b).sum(dim, keepdim=True) / b.square().sum(dim, keepdim=True)
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).log2().round().exp2()
