"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): moves a share of each input's range into the weights that
read it.

Input j is divided by ``s_j = max|x_j|^α / max|w_j|^(1-α)`` (the paper's equation 4): at α = 1 all inputs get
one range, at α = 0 all columns of the weight do. The factors are divided by their geometric mean, which
changes neither side's relative ranges and keeps a norm's gain where it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from quant import defaults
from quant.calibration.statistics import Statistics
from quant.outlier_suppression.base import OutlierSuppressionRegistry, Place, Suppression
from quant.quantizers.activations import fake_quantize, input_parameters
from quant.quantizers.nearest import round_to_nearest
from quant.schemes import PRESETS, UNQUANTIZED, Scheme

#: What ``auto`` tries, beside leaving the inputs as they are: these, then on both sides of the best ever
#: smaller steps.
ALPHAS, STEPS = (0.25, 0.5, 0.75), (0.1, 0.05)
#: What the error on a sample has to fall to for inputs to be scaled: less is as likely the sample's.
GAIN = 0.9
#: An error, the alpha that makes it (None: inputs as they are), and the factors.
Tried = tuple[float, float | None, torch.Tensor]


@dataclass(frozen=True)
class SmoothQuant:
    """``alpha``: the share of an input's range that goes into the weights, from 0 to 1; or ``auto``: for each
    group of linears the one of least squared error of their outputs, weights rounded to nearest and inputs
    quantized as the scheme says, over a sample of tokens. Where nothing is quantized, that is the error of
    ``w8a8-int8``, which the result is then made for."""

    alpha: float | Literal["auto"] = defaults.ALPHA

    name: ClassVar[str] = "smooth_quant"
    sources: ClassVar[frozenset[str]] = frozenset({"norm"})

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not (isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha is {self.alpha!r}: must be a number from 0 to 1, or auto")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"range", "sample"}) if self.alpha == "auto" else frozenset({"range"})

    def __call__(
        self, weight: torch.Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype, place: Place
    ) -> Suppression:
        largest, columns = statistics.abs_max, weight.abs().amax(0)
        dead = int((largest == 0).sum())
        notes = (
            (f"{dead} of {len(largest)} inputs are zero on all calibration tokens: they are not scaled",)
            if dead
            else ()
        )
        if self.alpha != "auto":
            return Suppression(place.fit(smoothing_factors(largest, columns, self.alpha)), notes)
        scheme = PRESETS["w8a8-int8"] if scheme == UNQUANTIZED else scheme
        even = torch.ones_like(largest)

        def tried(alpha: float | None) -> Tried:
            factors = even if alpha is None else place.fit(smoothing_factors(largest, columns, alpha))
            return _error(weight, statistics, scheme, dtype, factors), alpha, factors

        def least(*found: Tried) -> Tried:
            return min(found, key=lambda x: math.inf if math.isnan(x[0]) else x[0])

        best = least(*map(tried, ALPHAS))
        for step in STEPS:
            assert best[1] is not None
            best = least(best, *(tried(round(best[1] + s, 2)) for s in (-step, step)))
        alone = tried(None)
        _, alpha, factors = best if best[0] < GAIN * alone[0] else alone
        chosen = "none" if alpha is None else f"{alpha:g}"
        return Suppression(factors, (f"alpha {chosen}", *notes))


def smoothing_factors(largest: torch.Tensor, columns: torch.Tensor, alpha: float) -> torch.Tensor:
    """fp32 [K] with geometric mean 1, from the largest magnitude of each input and of each column of the
    weight, [K] each; 1 where one of the two is zero or not finite."""
    live = (largest > 0) & (columns > 0) & torch.isfinite(largest) & torch.isfinite(columns)
    logs = (
        alpha * torch.where(live, largest, 1.0).log2() - (1 - alpha) * torch.where(live, columns, 1.0).log2()
    )
    mean = logs.sum() / live.sum().clamp_min(1)
    return torch.where(live, torch.exp2(logs - mean), 1.0)


def _error(
    weight: torch.Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype, factors: torch.Tensor
) -> float:
    """Squared error of the outputs on the sample when both sides are quantized after the fold."""
    assert statistics.sample is not None
    after = replace(statistics, hessian=None).divided(factors)
    assert after.sample is not None
    x = after.sample
    if scheme.activations is not None:
        x = fake_quantize(x, scheme.activations, input_parameters(after, scheme.activations))
    rounded = round_to_nearest(weight * factors, scheme.weights, dtype).dequantize()
    return float((x @ rounded.t() - statistics.sample @ weight.t()).square().sum(dtype=torch.float64))


OutlierSuppressionRegistry.add(SmoothQuant.name, SmoothQuant)
