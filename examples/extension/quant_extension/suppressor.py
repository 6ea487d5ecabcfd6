"""Takes the square root of how far an input's largest value stands out among all inputs, whatever the weights
are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.calibration.statistics import Statistics
from quant.outlier_suppression import Suppression
from quant.outlier_suppression.base import Place
from quant.schemes import Scheme


@dataclass(frozen=True)
class Root:
    """``alpha`` is the power: 0 moves nothing, 1 makes all inputs alike."""

    alpha: float = 0.5

    name: ClassVar[str] = "root"
    needs: ClassVar[frozenset[str]] = frozenset({"range"})
    sources: ClassVar[frozenset[str]] = frozenset({"norm"})

    def __call__(
        self, weight: torch.Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype, place: Place
    ) -> Suppression:
        largest = statistics.abs_max
        usual = largest.median()
        factors = torch.where((largest > usual) & (usual > 0), largest / usual, 1.0).pow(self.alpha)
        return Suppression(
            place.fit(factors), (f"{int((factors > 1).sum())} of {len(factors)} inputs made smaller",)
        )
