"""Every tensor of a checkpoint beside the same tensor of its source, values dequantized."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.evaluation.accounting import counterpart
from quant.formats.reading import dequantized
from quant.models.stacking import apart
from quant.report.value import Report

#: How far the projection of a column on the source's may be from 1: upwards, and downwards at 8 and at 2
#: bits.
_MOST, _LEAST_SHARE, _LARGEST_SHARE = 1.4, 0.3, 0.7
#: How many times the mean squared difference of a norm's confirmed columns another one may have.
_NOISE = 4.0


@dataclass(frozen=True)
class TensorDifference:
    """Of one tensor: whether all values are equal, signal to noise in dB, and the largest absolute
    difference; ``scaled``: scaling was folded into it, and taken out before it was compared."""

    name: str
    equal: bool
    snr_db: float | None
    largest: float
    scaled: bool = False


@dataclass(frozen=True)
class Comparison:
    tensors: tuple[TensorDifference, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "equal": sum(t.equal for t in self.tensors),
            "scaled": [t.name for t in self.tensors if t.scaled],
            "different": [asdict(t) for t in self.tensors if not t.equal],
            "only_here": list(self.only_here),
            "only_there": list(self.only_there),
        }


def compare(path: str | Path, against: str | Path) -> Comparison:
    """Compares two checkpoints tensor by tensor, each read in its own format, in fp32. Tensors of ``path``
    that scaling was folded into are compared in the scale of the source. Of a norm that took factors nothing
    but its own values says which, so the linears that read it must agree: a gain that they do not confirm is
    a difference.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    here, there = dequantized(open_checkpoint(path)), dequantized(open_checkpoint(against))
    there = counterpart(path, there)
    here, there = apart(here, there.tensors), apart(there, here.tensors)
    common = set(here.tensors) & set(there.tensors)
    folds = _Folds(Path(path), here, there)
    tensors = []
    # weights first: norms and biases are judged by them
    for name in sorted(common, key=lambda n: len(here.tensors[n].shape) < 2):
        stored, b = here.read(name), there.read(name).float()
        if stored.shape != b.shape:
            tensors.append(TensorDifference(name, False, None, float("inf")))
            continue
        a, scaled = folds.undone(name, stored, b)
        difference = a - b
        noise, signal = float(difference.square().sum()), float(b.square().sum())
        snr = 10 * torch.log10(torch.tensor(signal / noise)).item() if noise and signal else None
        largest = float(difference.abs().max()) if a.numel() else 0.0
        tensors.append(TensorDifference(name, bool(torch.equal(a, b)), snr, largest, scaled))
    return Comparison(
        tuple(sorted(tensors, key=lambda t: t.name)),
        tuple(sorted(set(here.tensors) - set(there.tensors))),
        tuple(sorted(set(there.tensors) - set(here.tensors))),
    )


class _Folds:
    """The scaling that the report in a directory tells of, and what takes it out of tensors again."""

    def __init__(self, path: Path, here: Checkpoint, there: Checkpoint):
        from quant.outlier_suppression.base import norm_factors

        #: weight → in the order in which it was scaled: factors fp32 [K] of its columns, or the dimension
        #: along which it has powers of two
        self._steps: dict[str, list[torch.Tensor | int]] = {}
        #: norm → its factors and gain offset; reader of a norm → that norm
        self._norms: dict[str, tuple[torch.Tensor, float]] = {}
        self._readers: dict[str, str] = {}
        #: norm → fp64 [K] each, sums over its readers: products of columns with the source's, the source's
        #: squares, squared differences
        self._witness: dict[str, torch.Tensor] = {}
        #: linear → fp32 [N], what its rows were multiplied by
        self._rows: dict[str, torch.Tensor] = {}
        #: those of them that are quantized, whose rows are estimates
        self._rounded = {n.rpartition(".")[0] for n in here.computed}
        report = Report.load(path)
        folds = () if report is None or report.quantization is None else report.quantization.folds.values()
        for fold in folds:
            # a report that somebody edited may name anything
            linears, norm = [f"{n}.weight" for n in fold.linears], f"{fold.source}.weight"
            shape = here.tensors[norm].shape if norm in here.tensors else ()
            linears = [n for n in linears if n in here.tensors and len(here.tensors[n].shape) == 2]
            if fold.kind == "linear":
                for name, dim in ((norm, 1), *((n, 0) for n in linears)):
                    if name != norm or len(shape) == 2:
                        self._steps.setdefault(name, []).append(dim)
            elif len(shape) == 1 and norm in there.tensors and there.tensors[norm].shape == shape:
                linears = [n for n in linears if here.tensors[n].shape[1:] == shape]
                factors = norm_factors(there.read(norm), here.read(norm), fold.norm_offset)
                self._norms[fold.source] = factors, fold.norm_offset
                for name in linears:
                    self._steps.setdefault(name, []).append(factors)
                    self._readers[name] = fold.source

    def undone(self, name: str, stored: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """A tensor as it would be without the scaling, fp32, and whether there was any; ``b`` is the
        source's, fp32."""
        module, _, last = name.rpartition(".")
        a = stored.float()
        if module in self._norms:
            return (
                self._norm(module, a, b)
                if last == "weight"
                else self._bias(stored, b, 1 / self._norms[module][0])
            )
        if last == "bias" and module in self._rows:
            factors = self._rows[module]
            if module in self._rounded:  # the bias itself tells powers of two exactly
                own = stored.float() / b
                factors = torch.where(
                    (own.log2() == own.log2().round()) & ((own / factors).log2().abs() <= 1), own, factors
                )
            return self._bias(stored, b, factors)
        scaled = False
        for step in self._steps.get(name, ()):
            factors = step if isinstance(step, torch.Tensor) else _powers(a, b, step)
            a = a / factors
            scaled = scaled or bool((factors != 1).any())
            if isinstance(step, int) and step == 1:
                self._rows[module] = self._rows.get(module, torch.ones(())) * factors.flatten()
        if (norm := self._readers.get(name)) is not None:
            sums = torch.stack([x.sum(0, dtype=torch.float64) for x in (a * b, b * b, (a - b).square_())])
            self._witness[norm] = self._witness[norm] + sums if norm in self._witness else sums
        return a, scaled

    def _norm(self, name: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """A norm whose factors its readers confirm is the source's; elsewhere the gain that its readers make
        of it stands."""
        factors, offset = self._norms[name]
        if name not in self._witness:
            return a, False
        products, squares, differences = self._witness[name]
        ratio = torch.where(squares > 0, products / squares, 1.0).float()
        # A column's projection is 1, less the share that rounding and clipping took of it. Of a small column,
        # mostly rounded away, it says little; but there the difference, in the scale that was rounded, is no
        # larger than that of its neighbours.
        share = float((differences.sum() / squares.sum()).sqrt())
        confirmed = ((ratio < _MOST) & (ratio > 1 - min(max(share, _LEAST_SHARE), _LARGEST_SHARE))) | (
            factors == 1
        )
        noise = differences * factors.double().square()
        if bool(confirmed.any()):
            confirmed |= noise <= _NOISE * noise[confirmed].mean()
        return torch.where(confirmed, b, (b + offset) * ratio - offset), bool((factors != 1).any())

    def _bias(
        self, stored: torch.Tensor, b: torch.Tensor, factors: torch.Tensor
    ) -> tuple[torch.Tensor, bool]:
        """A bias that was multiplied by ``factors`` and rounded to its dtype."""
        kept = stored == (b * factors).to(stored.dtype)
        return torch.where(kept, b, stored.float() / factors), bool((factors != 1).any())


def _powers(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """The power of two by which each row (``dim`` 1) or column (0) of ``a`` is larger than the same of ``b``,
    from the projection of the one on the other: folds into linears are powers of two, and rounding is far
    from moving a projection by half of one."""
    ratio = (a * b).sum(dim, keepdim=True) / b.square().sum(dim, keepdim=True)
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).log2().round().exp2()
