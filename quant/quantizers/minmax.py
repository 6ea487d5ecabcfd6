"""Rounding to nearest with the scale of each group's range: the baseline, and the only method that needs no
data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant import defaults
from quant.calibration.statistics import Statistics
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.nearest import round_to_nearest
from quant.schemes import WeightScheme


@dataclass(frozen=True)
class MinMaxQuantizer:
    """``clip_search`` shrinks each group's range to the one of least squared error; without it the range is
    kept whole."""

    clip_search: bool = defaults.CLIP_SEARCH["minmax"]

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
        return Quantized(round_to_nearest(weight, scheme, dtype, amax, search=self.clip_search))


QuantizerRegistry.add(MinMaxQuantizer.name, MinMaxQuantizer)
