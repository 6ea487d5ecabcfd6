"""The numbers that a scheme has for weights: what refining and two-sided rounding know of integers and
floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant.quantizers.floats import nearest_float, stored_float_scale
from quant.quantizers.rounding import stored_scale
from quant.schemes import WeightScheme

#: Strategies by which a scale is of the weights of one output alone.
_OWN = ("group", "channel", "tensor_group")


@dataclass(frozen=True)
class Grid:
    """Codes and scales of a scheme.

    Attributes:
        dtype: what scales of integers are stored in.
        divisor: of NVFP4's scales, fp32, that broadcasts to them; or None.
    """

    scheme: WeightScheme
    dtype: torch.dtype
    divisor: torch.Tensor | None = None

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """The code nearest to each of fp32 ``numbers``, which may be overwritten."""
        if self.scheme.type == "float":
            return nearest_float(numbers, self.scheme.bits)
        return numbers.round_().clamp_(self.scheme.low, self.scheme.high)

    def rounded(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """Codes fp32 [N, K] nearest to a weight [N, K], with scales and zeros [N, G]."""
        numbers = weight.view(*scales.shape, -1) / scales.unsqueeze(-1)
        if zeros is not None:
            numbers += zeros.unsqueeze(-1)
        return self.nearest(numbers).view(weight.shape)

    @property
    def fitted(self) -> bool:
        """Whether scales can be fitted to codes: not where other outputs have the same scale; nor powers of
        two, which are a factor of two apart."""
        return self.scheme.strategy in _OWN and self.scheme.scales != "U8"

    def stored(self, scales: torch.Tensor) -> torch.Tensor:
        """The nearest scales that a file holds, fp32; of ``fitted`` schemes. Those of integers may be
        negative."""
        if self.scheme.type == "float":
            return stored_float_scale(scales, self.divisor)
        return stored_scale(scales.abs(), self.dtype).copysign(scales)
