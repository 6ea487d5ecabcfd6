"""Method ``none``: weights keep their values. What is left of a job is its outlier suppression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.calibration.statistics import Statistics
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.schemes import UNQUANTIZED, WeightScheme
from quant.tensors import QuantizedTensor


@dataclass(frozen=True)
class IdentityQuantizer:
    """Codes are the weights themselves, fp32, under scales of 1; a plain checkpoint stores them in the
    source's dtype."""

    name: ClassVar[str] = "none"
    suppressor: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    @staticmethod
    def refuse(scheme: WeightScheme) -> str | None:
        return (
            None
            if scheme == UNQUANTIZED.weights
            else f"it leaves weights as they are, {scheme} does not: leave the scheme out"
        )

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        return Quantized(
            QuantizedTensor(weight.clone(), torch.ones(len(weight), 1, device=weight.device), None, scheme)
        )


QuantizerRegistry.add(IdentityQuantizer.name, IdentityQuantizer)
