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

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The lowest and the highest code of integers and 0; of floats 0, 0 and their bits."""
        scheme = self.scheme
        return (0, 0, scheme.bits) if scheme.type == "float" else (scheme.low, scheme.high, 0)

    @property
    def kind(self) -> str:
        """What a file holds scales as: a dtype's name, of floats ``positive`` or ``e4m3`` numbers."""
        if self.scheme.type == "float":
            return "positive" if self.divisor is None else "e4m3"
        return str(self.dtype).removeprefix("torch.")

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """The code nearest to each of fp32 ``numbers``, which may be overwritten."""
        return nearest_code(numbers, *self.numbers)

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
        return nearest_scale(scales, self.kind, self.divisor)


def nearest_code(numbers: torch.Tensor, low: int, high: int, bits: int) -> torch.Tensor:
    """:meth:`Grid.nearest` of a grid's :attr:`~Grid.numbers`: all that an operation of a device is told."""
    return nearest_float(numbers, bits) if bits else numbers.round_().clamp_(low, high)


def nearest_scale(scales: torch.Tensor, kind: str, divisor: torch.Tensor | None) -> torch.Tensor:
    """:meth:`Grid.stored` of a grid's :attr:`~Grid.kind`, and a divisor that broadcasts to the scales."""
    if kind in ("positive", "e4m3"):
        return stored_float_scale(scales, divisor)
    return stored_scale(scales.abs(), getattr(torch, kind)).copysign(scales)
