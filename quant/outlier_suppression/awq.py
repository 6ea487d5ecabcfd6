"""AWQ's scaling (Lin et al. 2023, arXiv:2306.00978): inputs that carry much are given finer steps by scaling their weights up before rounding.

The factors are a power of each input's magnitude, s = m^alpha. The best alpha of a grid is the one whose rounded weights lose least of the layer's output. With
the Hessian H = E[x xᵀ] that loss is tr(E·H·Eᵀ), where E is what rounding W·diag(s) and dividing by s again changed: exact over all
calibration tokens, without running any of them again. Losses of rows add up, so a sample of rows decides; each candidate is rounded with the
clipping search that the method itself ends with, so that what clipping gains anyway is not credited to scaling. The magnitude is the root mean square of the input,
sqrt(diag H), where the paper takes the mean of |x|. No scaling (alpha = 0) is among the candidates: the choice is never worse than rounding
by this measure. Where nothing is quantized afterwards, that is the loss of 4 bits in groups of 128 with zero points, which the result is then made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.outlier_suppression.base import OutlierSuppressionRegistry, Place, Suppression
from quant.quantizers.awq import round_searched
from quant.schemes import UNQUANTIZED, Scheme, WeightScheme

#: Rows whose loss is measured, spread evenly over all. With the clipping search, this many of them choose better than 256 without it.
_ROWS = 128


@dataclass(frozen=True)
class AWQScaling:
    """``grid``: how many values of alpha are tried, from 0 up to 1."""

    grid: int = 20

    name: ClassVar[str] = "awq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    sources: ClassVar[frozenset[str]] = frozenset({"norm", "linear"})

    def __call__(self, weight: torch.Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype, place: Place) -> Suppression:
        if statistics.hessian is None:
            raise QuantError("awq needs calibration text: give --calibration-dataset, or use --method minmax")
        hessian = statistics.hessian
        magnitude = hessian.diagonal().clamp_min(0).sqrt()
        alive = magnitude > 0
        ones = torch.ones_like(magnitude)
        if not bool(alive.any()):
            return Suppression(ones, ("not scaled: no calibration token reaches the layer",))
        rows = weight[torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight)), device=weight.device).round().long()]
        importance = hessian.diagonal()
        made_for = scheme.weights if scheme != UNQUANTIZED else WeightScheme(4, 128 if weight.shape[1] % 128 == 0 else -1, False)
        best, best_loss, unscaled, chosen = ones, torch.inf, 0.0, 0.0
        tried: list[torch.Tensor] = []
        for index in range(self.grid + 1):
            alpha = index / self.grid
            factors = place.fit(_factors(magnitude, alive, alpha))
            if any(torch.equal(factors, t) for t in tried):
                continue  # powers of two leave few different ones
            tried.append(factors)
            rounded = round_searched(rows * factors, importance / factors.square(), made_for, dtype).dequantize()
            error = rounded.div_(factors).sub_(rows)
            loss = float(((error @ hessian) * error).sum())
            if index == 0:
                unscaled = loss
            if loss < best_loss:
                best, best_loss, chosen = factors, loss, alpha
        saved = 1 - best_loss / unscaled if unscaled else 0.0
        return Suppression(best, (f"scaled with alpha {chosen:g}: {max(saved, 0.0):.0%} less output error of rounding",))


def _factors(magnitude: torch.Tensor, alive: torch.Tensor, alpha: float) -> torch.Tensor:
    """m^alpha, its range centred on 1 as the paper does; 1 for inputs that are always zero."""
    factors = torch.where(alive, magnitude.clamp_min(1e-12) ** alpha, 1.0)
    used = factors[alive]
    return torch.where(alive, factors / (used.max() * used.min()).sqrt(), 1.0)


OutlierSuppressionRegistry.add(AWQScaling.name, AWQScaling)
