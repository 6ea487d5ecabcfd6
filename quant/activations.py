"""Numbers of activations: what calibration writes into the file, and what the engine makes of x with them. Pure functions on any device."""

from __future__ import annotations

import torch

from quant.calibration.statistics import Statistics
from quant.schemes import ActivationScheme
from quant.tensors import InputParameters

#: Largest E4M3 and E2M1 numbers: what NVFP4's scales and codes can reach together.
_E4M3, _E2M1 = 448.0, 6.0


def input_parameters(statistics: Statistics | None, scheme: ActivationScheme | None) -> InputParameters | None:
    """The calibrated numbers that a scheme stores, from the range of the input; None where it stores none.

    All linears that vLLM fuses read one input, so they get one and the same.
    """
    if scheme is None or not scheme.calibrated:
        return None
    assert statistics is not None and statistics.minimum is not None and statistics.maximum is not None
    low, high = statistics.minimum.min().clamp(max=0), statistics.maximum.max().clamp(min=0)
    largest = torch.maximum(-low, high)
    if scheme.strategy == "tensor_group":
        return InputParameters(global_scale=(_E4M3 * _E2M1 / torch.where(largest == 0, 1.0, largest)).reshape(1))
    if scheme.number == "float":
        return InputParameters(scale=(torch.where(largest == 0, 1.0, largest) / _E4M3).reshape(1))
    levels = 2**scheme.bits - 1
    if scheme.symmetric:
        return InputParameters(scale=(torch.where(largest == 0, 1.0, largest) * 2 / levels).reshape(1))
    width = high - low
    scale = torch.where(width == 0, 1.0, width) / levels
    zero = (-(2 ** (scheme.bits - 1)) - low / scale).round().clamp(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
    return InputParameters(scale=scale.reshape(1), zero=zero.to(torch.int8).reshape(1))
