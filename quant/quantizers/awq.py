"""AWQ (Lin et al. 2023, arXiv:2306.00978): scaling of inputs (:mod:`quant.outlier_suppression.awq`), then rounding with a clipping search.

The clipping search weights each squared error with the mean square of the input that it multiplies, the diagonal of the scaled Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.floats import float_scales, round_floats
from quant.quantizers.rounding import round_weight, scale_dtype, weight_parameters
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor


@dataclass(frozen=True)
class AWQQuantizer:
    """``clip_search``: shrink each group's range to the one of least weighted error; without it the range is kept whole."""

    clip_search: bool = True

    name: ClassVar[str] = "awq"
    suppressor: ClassVar[str] = "awq"
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
        return Quantized(round_searched(weight, statistics.hessian.diagonal(), scheme, dtype, amax, self.clip_search))


def round_searched(
    weight: torch.Tensor,
    importance: torch.Tensor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    amax: torch.Tensor | None = None,
    search: bool = True,
) -> QuantizedTensor:
    """A weight [N, K] rounded to nearest, ranges searched for least error weighted by ``importance`` fp32 [K], the mean square of inputs."""
    if scheme.number == "float":
        return round_floats(weight, scheme, float_scales(weight, scheme, amax, importance, search))
    dtype = scale_dtype(scheme, dtype)
    scales, zeros = weight_parameters(weight, scheme, dtype, importance, search)
    codes = round_weight(weight, scales, zeros, scheme)
    return QuantizedTensor(codes, scales.to(dtype), None if zeros is None else zeros.to(torch.int8), scheme)


QuantizerRegistry.add(AWQQuantizer.name, AWQQuantizer)
