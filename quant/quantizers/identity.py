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
        return refuse_scheme(scheme)

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        return Quantized(as_they_are(weight.clone(), scheme))


def refuse_scheme(scheme: WeightScheme) -> str | None:
    """Why a method that rounds nothing cannot make a scheme, or None."""
    if scheme == UNQUANTIZED.weights:
        return None
    return f"it leaves weights in the model's own dtype, {scheme} does not: leave the scheme out"


def as_they_are(values: torch.Tensor, scheme: WeightScheme) -> QuantizedTensor:
    """Weights fp32 [N, K] that are not rounded, as their own codes under scales of 1."""
    return QuantizedTensor(values, torch.ones(len(values), 1, device=values.device), None, scheme)


QuantizerRegistry.add(IdentityQuantizer.name, IdentityQuantizer)
