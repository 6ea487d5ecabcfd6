"""HQQ, half-quadratic quantization (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine
Learning Models"): better scales and zero points from the weights alone, no data.

Rounding to the range of a group lets its few largest weights decide the scale of all. HQQ measures the error
W - Ŵ by its lp norm with p < 1 instead, which forgives a few large errors for many small ones. The norm is
split off with an auxiliary error E (half-quadratic splitting) and the two halves are solved in turn, with a
penalty β that grows from step to step:

1. E ← shrink(W - Ŵ), the proximal operator of the lp norm: errors are made smaller by |x|^(p-1)/β, small ones
vanish; 2. scale and zero point ← least squares of W - E, given the codes.

The paper moves the zero point alone and stores it as a float. A file that vLLM reads holds zero points as
integers of the codes' own range, which takes nearly all of that away (on tinylm-11m the KL of W4 g128 is 1.00
times that of plain rounding), so the second half here solves for scale and zero point together, and every
step is judged by what a file can hold of it: the zero point rounded, the scale of that zero point solved for
and rounded to its dtype. Of all steps, the plain range's among them, each group keeps the one of least
squared error: the lp norm says where to look, squares say what it costs the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.calibration.statistics import Statistics
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.nearest import integers
from quant.quantizers.rounding import round_weight, rows_at_a_time, stored_scale, weight_parameters
from quant.schemes import WeightScheme


@dataclass(frozen=True)
class HQQQuantizer:
    """Settings of HQQ.

    Attributes:
        norm: p of the lp norm, above 0 and at most 1.
        penalty: β of the first step, for errors counted in steps of the scale; at 3 only errors beyond 0.43
            steps survive the shrinkage.
        growth: what β is multiplied by after each step.
        iterations: steps.
    """

    norm: float = 0.7
    penalty: float = 3.0
    growth: float = 1.01
    iterations: int = 20

    name: ClassVar[str] = "hqq"
    suppressor: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 1:
            raise ValueError(f"norm is {self.norm}: p of the lp norm is above 0 and at most 1")
        if not (self.penalty > 0 and self.growth >= 1):
            raise ValueError(
                f"penalty is {self.penalty} and growth {self.growth}: the one is above 0, the other at "
                "least 1"
            )
        if not 1 <= self.iterations <= 1000:
            raise ValueError(f"iterations is {self.iterations}: must be 1 to 1000")

    @staticmethod
    def refuse(scheme: WeightScheme) -> str | None:
        return (
            f"optimises scales and zero points of integers, it does not make {scheme}"
            if scheme.type == "float"
            else None
        )

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        n, k = weight.shape
        groups = weight.view(n, scheme.groups(k), -1)
        scales, zeros = weight_parameters(weight, scheme, dtype)
        step = rows_at_a_time(groups)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            scales[rows], better = self.improve(
                groups[rows], scales[rows], None if zeros is None else zeros[rows], scheme, dtype
            )
            if zeros is not None and better is not None:
                zeros[rows] = better
        codes = round_weight(weight, scales, zeros, scheme)
        return Quantized(integers(codes, scales, zeros, scheme, dtype))

    def improve(
        self,
        groups: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points of no larger squared error than the given ones.

        Args:
            groups: fp32 [N, G, g], one group in the last dimension.
            scales, zeros: fp32 [N, G], where to start; zeros None when symmetric.

        Returns:
            the same kind of values: scales that ``dtype`` holds exactly, whole zeros in the range of the
                codes.
        """
        scale = scales.unsqueeze(-1)
        zero = torch.zeros_like(scale) if zeros is None else zeros.unsqueeze(-1)
        best_scale, best_zero, least = scale, zero, squared_error(groups, scale, zero, scheme)
        penalty = self.penalty
        for _ in range(self.iterations):
            codes = (groups / scale + zero).round_().clamp_(scheme.low, scheme.high)
            error = shrink(groups / scale - (codes - zero), penalty, self.norm).mul_(scale)
            wanted = groups - error
            if zeros is None:
                stored_zero = zero
            else:
                scale, zero = line(codes, wanted, scale, zero)
                stored_zero = zero.round().clamp_(scheme.low, scheme.high)
            steps = codes - stored_zero
            slope = (steps * wanted).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
            # no slope: all codes equal the zero point, or the wanted values overflow
            slope = torch.where(slope.isfinite() & (slope > 0), slope, best_scale)
            nearest = stored_scale(slope, dtype)
            if zeros is None:
                scale = nearest
            cost = squared_error(groups, nearest, stored_zero, scheme)
            better = cost < least
            least = torch.where(better, cost, least)
            best_scale = torch.where(better, nearest, best_scale)
            best_zero = torch.where(better, stored_zero, best_zero)
            penalty *= self.growth
        return best_scale.squeeze(-1), None if zeros is None else best_zero.squeeze(-1)


def shrink(values: torch.Tensor, penalty: float, norm: float) -> torch.Tensor:
    """The proximal operator of the lp norm as the paper has it, elementwise: sign(x) · max(|x| - |x|^(p-1)/β,
    0); 0 stays 0."""
    size = values.abs()
    # |x|^(p-1) is infinite at 0, and so is what is taken away
    return torch.copysign((size - size.pow(norm - 1) / penalty).clamp_min_(0), values)


def line(
    codes: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and (fractional) zero point of the least squares of ``wanted ≈ (codes - zero) · scale`` over the
    last dimension, [..., 1] each; where the codes are all alike, or the line does not rise, those given."""
    middle, mean = codes.mean(-1, keepdim=True), wanted.mean(-1, keepdim=True)
    spread = codes - middle
    slope = (spread * (wanted - mean)).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True)
    usable = slope.isfinite() & (slope > 0)
    slope = torch.where(usable, slope, scale)
    return slope, torch.where(usable, middle - mean / slope, zero)


def squared_error(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: WeightScheme
) -> torch.Tensor:
    """Σ (W - Ŵ)² over the last dimension, [..., 1], of weights rounded with these scales and zero points."""
    values = (groups / scale).add_(zero).round_().clamp_(scheme.low, scheme.high).sub_(zero).mul_(scale)
    return values.sub_(groups).square_().sum(-1, keepdim=True)


QuantizerRegistry.add(HQQQuantizer.name, HQQQuantizer)
