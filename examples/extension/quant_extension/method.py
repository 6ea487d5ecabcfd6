"""HQQ (Badri and Shaji 2023) from a package of its own: scale and zero point of each group from the weights
alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.calibration.statistics import Statistics
from quant.quantizers import Quantized
from quant.quantizers.rounding import round_weight, weight_parameters
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor


@dataclass(frozen=True)
class MyHQQ:
    """``norm`` is p of the lp norm, ``penalty`` β for errors counted in steps of the scale."""

    norm: float = 0.7
    penalty: float = 3.0
    iterations: int = 20

    name: ClassVar[str] = "my-hqq"
    needs: ClassVar[frozenset[str]] = frozenset()

    @staticmethod
    def refuse(scheme: WeightScheme) -> str | None:
        if scheme.type == "float" or scheme.symmetric:
            return f"moves zero points, which {scheme} has none of"
        return None

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        scales, zeros = weight_parameters(weight, scheme, dtype)  # [N, G] each: the range of each group
        assert zeros is not None
        groups = weight.view(len(weight), scheme.groups(weight.shape[1]), -1)  # [N, G, g]
        scale, zero = scales.unsqueeze(-1), zeros.unsqueeze(-1)
        least = self.cost(groups, scale, zero, scheme)
        for _ in range(self.iterations):
            codes = (groups / scale + zero).round().clamp(scheme.low, scheme.high)
            error = groups / scale - (codes - zero)
            kept = (error.abs() - error.abs().pow(self.norm - 1) / self.penalty).clamp(min=0)
            wanted = groups - torch.copysign(kept, error) * scale
            # the line through (code, wanted weight) of least squares, and what a file can hold of it
            spread = codes - codes.mean(-1, keepdim=True)
            slope = (spread * wanted).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True)
            slope = torch.where(slope.isfinite() & (slope > 0), slope, scale).to(dtype).float()
            origin = codes.mean(-1, keepdim=True) - wanted.mean(-1, keepdim=True) / slope
            origin = origin.round().clamp(scheme.low, scheme.high)
            cost = self.cost(groups, slope, origin, scheme)
            better = cost < least
            if not bool(better.any()):
                break
            least = torch.where(better, cost, least)
            scale, zero = torch.where(better, slope, scale), torch.where(better, origin, zero)
        scales, zeros = scale.squeeze(-1), zero.squeeze(-1)
        codes = round_weight(weight, scales, zeros, scheme)
        return Quantized(QuantizedTensor(codes, scales.to(dtype), zeros.to(torch.int8), scheme))

    @staticmethod
    def cost(
        groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: WeightScheme
    ) -> torch.Tensor:
        """Squared error of each group, [N, G, 1]."""
        codes = (groups / scale + zero).round().clamp(scheme.low, scheme.high)
        return ((codes - zero) * scale - groups).square().sum(-1, keepdim=True)
