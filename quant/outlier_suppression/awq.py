"""AWQ's scaling (Lin et al. 2023, arXiv:2306.00978): inputs that carry much are given finer steps by scaling
their weights up before rounding.

The factors are a power of each input's magnitude, s = m^alpha, or that over a power of the share that its
weights have in their groups' ranges, s = m^alpha / w^(1 - alpha), which evens the weights out. The best of a
grid is the one whose rounded weights lose least of the layer's output. With the Hessian H = E[x xᵀ] that loss
is tr(E·H·Eᵀ), where E is what rounding W·diag(s) and dividing by s again changed: exact over all calibration
tokens, without running any of them again. Losses of rows add up, so a sample of rows decides; each candidate
is rounded with the clipping search that the method itself ends with, so that what clipping gains anyway is
not credited to scaling. The magnitude is the root mean square of the input, sqrt(diag H), where the paper
takes the mean of |x|. No scaling (alpha = 0) is among the candidates: the choice is never worse than rounding
by this measure. Where nothing is quantized afterwards, that is the loss of 4 bits in groups of 128 with zero
points, which the result is then made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.outlier_suppression.base import OutlierSuppressionRegistry, Place, Suppression
from quant.quantizers.nearest import round_to_nearest
from quant.quantizers.products import product
from quant.quantizers.rounding import importance_of, scaled_importance
from quant.schemes import UNQUANTIZED, Scheme, WeightScheme

#: Most and fewest rows whose loss is measured, spread evenly over all, and the elements that they are cut
#: down to in between. All candidates are tried on the same rows, so few are enough to tell which is better.
_ROWS, _FEWEST, _ELEMENTS = 128, 32, 1 << 17
#: Every so many steps of the grid are tried where factors are powers of two: those between become the same.
_COARSE = 4


@dataclass(frozen=True)
class AWQScaling:
    """``grid``: steps of alpha from 0 up to 1."""

    grid: int = 20

    name: ClassVar[str] = "awq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    sources: ClassVar[frozenset[str]] = frozenset({"norm", "linear"})

    def __call__(
        self, weight: torch.Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype, place: Place
    ) -> Suppression:
        if statistics.hessian is None:
            raise QuantError("awq needs calibration text: give --calibration-dataset, or use --method minmax")
        hessian = statistics.hessian
        magnitude = hessian.diagonal().clamp_min(0).sqrt()
        alive = magnitude > 0
        made_for = (
            scheme.weights
            if scheme != UNQUANTIZED
            else WeightScheme(4, 128 if weight.shape[1] % 128 == 0 else -1, False)
        )
        share = _shares(weight, made_for)
        ones = torch.ones_like(magnitude)
        if not bool(alive.any()):
            return Suppression(ones, ("not scaled: no calibration token reaches the layer",))
        count = min(max(_FEWEST, min(_ROWS, _ELEMENTS // len(magnitude))), len(weight))
        rows = weight[torch.linspace(0, len(weight) - 1, count, device=weight.device).round().long()]
        importance = importance_of(hessian, made_for)
        tried: list[tuple[float, str, torch.Tensor]] = []
        for step in range(0, self.grid + 1, _COARSE if place.exact else 1):
            alpha = step / self.grid
            for even in (False, True):
                power = magnitude.clamp_min(1e-12) ** alpha / (share ** (1 - alpha) if even else 1.0)
                factors = place.fit(_centred(power, alive))
                if any(torch.equal(factors, other) for _, _, other in tried):
                    continue  # powers of two are few
                rounded = round_to_nearest(
                    rows * factors,
                    made_for,
                    dtype,
                    search=True,
                    importance=scaled_importance(importance, factors),
                ).dequantize()
                error = rounded.div_(factors).sub_(rows)
                how = f"alpha {alpha:g}{', weights evened out' if even else ''}"
                tried.append((float((product(error, hessian) * error).sum()), how, factors))
        unscaled = tried[0][0]
        loss, how, factors = min(tried, key=lambda candidate: candidate[0])
        if how == "alpha 0":
            return Suppression(
                factors, ("not scaled: no factors tried make the output error of rounding less",)
            )
        saved = 1 - loss / unscaled if unscaled else 0.0
        return Suppression(factors, (f"scaled with {how}: {saved:.0%} less output error of rounding",))


def _centred(factors: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Factors with their range centred on 1, as the paper does; 1 for inputs that are always zero."""
    used = factors[alive]
    return torch.where(alive, factors / (used.max() * used.min()).sqrt(), 1.0)


def _shares(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """fp32 [K]: mean over the rows of a weight [N, K] of each element's magnitude as a share of the largest
    in its group; 1 for columns of zeros."""
    n, k = weight.shape
    groups = weight.view(n, scheme.groups(k) if scheme.strategy in ("group", "tensor_group") else 1, -1).abs()
    mean = (groups / groups.amax(-1, keepdim=True).clamp_min(1e-12)).mean(0).view(k)
    return torch.where(mean > 0, mean, 1.0)


OutlierSuppressionRegistry.add(AWQScaling.name, AWQScaling)
