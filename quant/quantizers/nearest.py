"""Rounding to nearest: what the baseline is, and what other methods end in or fall back to."""

from __future__ import annotations

import torch

from quant.quantizers.floats import float_scales, round_floats
from quant.quantizers.rounding import round_weight, scale_dtype, weight_parameters
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor


def round_to_nearest(
    weight: torch.Tensor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    amax: torch.Tensor | None = None,
    *,
    search: bool = False,
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """A weight rounded to the nearest numbers of a scheme, integers or floats, with the scale of each group's
    range.

    Args:
        weight: fp32 [N, K]; left as it is.
        dtype: what scales of kind ``model`` are stored in.
        amax: largest magnitude of the fused layer, for schemes with a number for the whole tensor; None: the
            weight's own.
        search: shrink each group's range to the one of least squared error, instead of keeping it whole.
        importance: what the search weights errors with, as :func:`quant.quantizers.rounding.importance_of`
            gives it; None: all alike.
    """
    if scheme.type == "float":
        return round_floats(weight, scheme, float_scales(weight, scheme, amax, importance, search))
    dtype = scale_dtype(scheme, dtype)
    scales, zeros = weight_parameters(weight, scheme, dtype, importance, search)
    return integers(round_weight(weight, scales, zeros, scheme), scales, zeros, scheme, dtype)


def integers(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scheme: WeightScheme,
    dtype: torch.dtype,
) -> QuantizedTensor:
    """Integer codes int8 [N, K] with scales and zeros fp32 [N, G] that ``dtype`` and int8 hold exactly."""
    return QuantizedTensor(codes, scales.to(dtype), None if zeros is None else zeros.to(torch.int8), scheme)
