"""Rounding to nearest with the scale of each group's range: the baseline, and the only method that needs no
data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.calibration.statistics import Statistics
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.floats import float_scales, round_floats
from quant.quantizers.rounding import round_weight, scale_dtype, weight_parameters
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor


@dataclass(frozen=True)
class MinMaxQuantizer:
    """``clip_search`` shrinks each group's range to the one of least squared error; without it the range is
    kept whole."""

    clip_search: bool = False

    name: ClassVar[str] = "minmax"
    suppressor: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    @staticmethod
    def refuse(scheme: WeightScheme) -> str | None:
        return None

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        if scheme.type == "float":
            return Quantized(
                round_floats(weight, scheme, float_scales(weight, scheme, amax, search=self.clip_search))
            )
        dtype = scale_dtype(scheme, dtype)
        scales, zeros = weight_parameters(weight, scheme, dtype, search=self.clip_search)
        codes = round_weight(weight, scales, zeros, scheme)
        return Quantized(
            QuantizedTensor(codes, scales.to(dtype), None if zeros is None else zeros.to(torch.int8), scheme)
        )


QuantizerRegistry.add(MinMaxQuantizer.name, MinMaxQuantizer)
