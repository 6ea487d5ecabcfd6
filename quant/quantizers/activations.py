"""Numbers of activations: what calibration writes into the file, and what the engine makes of x with them.
Pure functions on any device."""

from __future__ import annotations

import torch

from quant.calibration.statistics import Statistics
from quant.quantizers.floats import nearest_float
from quant.schemes import ActivationScheme
from quant.tensors import InputParameters

#: Largest E4M3 and E2M1 numbers: what NVFP4's scales and codes can reach together.
_E4M3, _E2M1 = 448.0, 6.0


def input_parameters(
    statistics: Statistics | None, scheme: ActivationScheme | None
) -> InputParameters | None:
    """The calibrated numbers that a scheme stores, from the range of the input; None where it stores none.

    All linears that vLLM fuses read one input, so they get one and the same.
    """
    if scheme is None or not scheme.calibrated:
        return None
    assert statistics is not None and statistics.minimum is not None and statistics.maximum is not None
    low, high = statistics.minimum.min().clamp(max=0), statistics.maximum.max().clamp(min=0)
    largest = torch.maximum(-low, high)
    if scheme.strategy == "tensor_group":
        return InputParameters(
            global_scale=(_E4M3 * _E2M1 / torch.where(largest == 0, 1.0, largest)).reshape(1)
        )
    if scheme.type == "float":
        return InputParameters(scale=(torch.where(largest == 0, 1.0, largest) / _E4M3).reshape(1))
    levels = 2**scheme.bits - 1
    if scheme.symmetric:
        return InputParameters(scale=(torch.where(largest == 0, 1.0, largest) * 2 / levels).reshape(1))
    width = high - low
    scale = torch.where(width == 0, 1.0, width) / levels
    zero = (
        (-(2 ** (scheme.bits - 1)) - low / scale)
        .round()
        .clamp(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
    )
    return InputParameters(scale=scale.reshape(1), zero=zero.to(torch.int8).reshape(1))


def fake_quantize(
    x: torch.Tensor, scheme: ActivationScheme, parameters: InputParameters | None = None
) -> torch.Tensor:
    """The numbers that vLLM's kernels compute with in place of x.

    Integers and FP8 follow vLLM's CUDA kernels; its CPU kernels give the same int8 codes. Where backends
    differ this takes: of FP8, a quotient by the scale (kernels with static scales multiply by its reciprocal,
    which can move a tie); of MXFP4, the power of two at which the largest magnitude is not clipped (vLLM's
    emulation rounds that exponent). Weight-only kernels that stand in for FP8, NVFP4 and MX on hardware
    without them leave x alone, and so are closer to the unquantized model than this.

    Args:
        x: [..., K] of any floating dtype; K is a multiple of the group size, or the last group is short (FP8
            groups alone).
        parameters: the calibrated numbers, for schemes that have them.

    Returns:
        [..., K] in the dtype of x.
    """
    wide = x.float()
    values = (
        _integers(wide, scheme, parameters) if scheme.type == "int" else _floats(wide, scheme, parameters)
    )
    return values.to(x.dtype)


def _integers(x: torch.Tensor, scheme: ActivationScheme, parameters: InputParameters | None) -> torch.Tensor:
    low, high = -(2.0 ** (scheme.bits - 1)), 2.0 ** (scheme.bits - 1) - 1
    if not scheme.dynamic:
        assert parameters is not None and parameters.scale is not None
        scale, zero = parameters.scale.to(x), 0.0 if parameters.zero is None else parameters.zero.to(x)
        return ((x / scale).round_() + zero).clamp_(low, high).sub_(zero).mul_(scale)
    if scheme.symmetric:
        largest = _nonzero(x.abs().amax(-1, keepdim=True))
        return (x * (high / largest)).round_().clamp_(low, high).mul_(largest / high)
    least = x.amin(-1, keepdim=True)  # the range need not reach zero: the zero point is an int32
    scale = _nonzero((x.amax(-1, keepdim=True) - least) / (high - low))
    zero = (low - least / scale).round()
    return ((x / scale).round_() + zero).clamp_(low, high).sub_(zero).mul_(scale)


def _floats(x: torch.Tensor, scheme: ActivationScheme, parameters: InputParameters | None) -> torch.Tensor:
    if not scheme.dynamic:
        assert parameters is not None and parameters.scale is not None
        scale = parameters.scale.to(x)
        return nearest_float(x / scale, scheme.bits).mul_(scale)
    if scheme.strategy == "token":
        # vLLM keeps scales of tokens above this, so that FP8's smallest numbers stay usable
        scale = (x.abs().amax(-1, keepdim=True) / _E4M3).clamp_min(1 / (_E4M3 * 512))
        return nearest_float(x / scale, scheme.bits).mul_(scale)
    if scheme.strategy == "tensor":
        scale = _nonzero(x.abs().amax() / _E4M3)
        return nearest_float(x / scale, scheme.bits).mul_(scale)
    assert scheme.group_size is not None
    k = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -k % scheme.group_size)).unflatten(-1, (-1, scheme.group_size))
    largest = groups.abs().amax(-1, keepdim=True)
    if scheme.strategy == "tensor_group":
        assert parameters is not None and parameters.global_scale is not None
        whole = parameters.global_scale.to(x)
        scale = (whole * (largest * (1 / _E2M1))).clamp_max(_E4M3).to(torch.float8_e4m3fn).float() / whole
        return (nearest_float(groups / _nonzero(scale), scheme.bits) * scale).flatten(-2)[..., :k]
    if scheme.scales == "U8":
        top = _E2M1 if scheme.bits == 4 else _E4M3
        scale = torch.exp2(
            torch.ceil(torch.log2(largest.clamp_min(torch.finfo(torch.float32).tiny) / top)).clamp_(-127, 127)
        )
    else:
        scale = largest.clamp_min(1e-10) / _E4M3
    return (nearest_float(groups / scale, scheme.bits).mul_(scale)).flatten(-2)[..., :k]


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 1.0, scale)
