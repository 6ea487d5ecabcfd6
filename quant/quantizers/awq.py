"""AWQ (Lin et al. 2023, arXiv:2306.00978): scaling of inputs (:mod:`quant.outlier_suppression.awq`), then
rounding with a clipping search.

The clipping search takes the range of each group whose rounding changes the group's share of the output
least, by the scaled Hessian of the group's inputs; where there are no groups, or the numbers are floating, by
its diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant import defaults
from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.nearest import round_to_nearest
from quant.quantizers.rounding import importance_of
from quant.schemes import WeightScheme


@dataclass(frozen=True)
class AWQQuantizer:
    """``clip_search``: shrink each group's range to the one of least weighted error; without it the range is
    kept whole."""

    clip_search: bool = defaults.CLIP_SEARCH["awq"]

    name: ClassVar[str] = "awq"
    suppressor: ClassVar[str] = defaults.SUPPRESSORS["awq"]
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

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
        if statistics is None or statistics.hessian is None:
            raise QuantError("awq needs calibration text: give --calibration-dataset, or use --method minmax")
        importance = importance_of(statistics.hessian, scheme) if self.clip_search else None
        return Quantized(
            round_to_nearest(weight, scheme, dtype, amax, search=self.clip_search, importance=importance)
        )

    def slices(
        self,
        slices: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> list[Quantized]:
        """Slices [S, N, K] of the rows of one weight, one after another."""
        return [self(weight, statistics, scheme, dtype, amax) for weight in slices]


QuantizerRegistry.add(AWQQuantizer.name, AWQQuantizer)
