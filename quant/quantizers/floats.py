"""Rounding to FP8 and FP4 with the scales of each scheme. Pure functions on any device; fp32 arithmetic.

As with integers, a scale is rounded to the dtype that the file holds before any code is chosen. E4M3 and E2M1
codes are rounded to nearest, ties to even, and saturate. Formats: FP8 of Micikevicius et al. 2022
(arXiv:2209.05433); MX of the OCP Microscaling Formats specification 1.0; NVFP4 as vLLM and compressed-tensors
store it: groups of 16 with E4M3 scales, all divided by one fp32 number of the tensor.

An MX scale is a power of two. The specification's own choice (the exponent of the largest magnitude less that
of the largest element) clips up to a quarter of that magnitude; here the next power up is tried as well, and
each group takes what gives the smaller squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant.accelerator import on_accelerator
from quant.schemes import BLOCK, WeightScheme
from quant.tensors import QuantizedTensor, code_values, largest_magnitude, scale_values

#: A scale of NVFP4 is at most this, the largest E4M3 number; of group and tensor together 448 · 6 is reached.
_E4M3 = 448.0
#: Exponent of the largest element: of E2M1 6 = 1.5 · 2², of E4M3 448 = 1.75 · 2⁸.
_LARGEST_EXPONENT = {4: 2, 8: 8}
#: Elements rounded at a time on a CPU, whose temporaries stay in its cache.
_CACHED = 1 << 18
#: Which scales of NVFP4 the search tries beside that of a group's whole range, in steps of E4M3, whose codes
#: are in the order of its numbers: about seven tenths to three halves of it. Smaller ones cut the range.
#: Larger ones reach no code of 6: next to it there is only 4, and a group whose largest magnitude lies
#: between is better off with that as its 4 (Cook et al. 2025, Four Over Six, arXiv:2512.02010).
_STEPS = (-4, -3, -2, -1, 1, 2, 3, 4, 5, 6)
_LARGEST_E4M3 = 0x7E


@dataclass(frozen=True)
class FloatScales:
    """Scales of a weight [N, K]: ``stored`` as :class:`quant.tensors.QuantizedTensor` holds them, ``wide``
    the fp32 multipliers [N, G], one a row and group whatever the strategy, and the number of the whole
    tensor."""

    stored: torch.Tensor
    wide: torch.Tensor
    global_scale: torch.Tensor | None = None

    def of(self, wide: torch.Tensor) -> torch.Tensor:
        """As stored, other multipliers [N, G] that this kind of scale holds exactly."""
        if self.stored.dtype == torch.float8_e4m3fn and self.global_scale is not None:
            return (wide * self.global_scale).to(torch.float8_e4m3fn)
        return wide if self.stored.shape == wide.shape and self.stored.dtype == wide.dtype else self.stored


def stored_float_scale(scale: torch.Tensor, divisor: torch.Tensor | None = None) -> torch.Tensor:
    """The multipliers that a file holds nearest to fp32 ones: those of E4M3 where all are divided by
    ``divisor``, else any."""
    return _positive(scale) if divisor is None else scale_values(_e4m3(scale * divisor), divisor)


def nearest_float(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest E4M3 (8 bits) or E2M1 (4 bits) numbers, fp32."""
    if bits == 8:
        return code_values(values.clamp(-_E4M3, _E4M3).to(torch.float8_e4m3fn))
    values = values.clamp(-6.0, 6.0)
    # of two, at most the magnitude: its exponent alone
    powers = values.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    step = powers.mul_(0.5).clamp_min_(0.5)
    return (values / step).round_().mul_(step)


def encode(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of numbers that :func:`nearest_float` gave: float8_e4m3fn, or uint8 with the sign in bit 3.

    The exponents of E2M1 and fp16 are biased by 1 and 15: times 2⁻¹⁴ the bits of an E2M1 number, the
    subnormal 0.5 too, are the uppermost of an fp16 one, but for the sign. -0 becomes 0.
    """
    if bits == 8:
        return values.to(torch.float8_e4m3fn)
    halves = values.mul(2.0**-14).add_(0.0).half().view(torch.int16)
    return (halves >> 9).bitwise_and_(7).bitwise_or_((halves >> 12).bitwise_and_(8)).to(torch.uint8)


def float_scales(
    weight: torch.Tensor,
    scheme: WeightScheme,
    amax: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    search: bool = False,
) -> FloatScales:
    """The scales of a float scheme.

    Args:
        weight: fp32 [N, K].
        amax: largest magnitude of the fused layer, for schemes with a number for the whole tensor; None: the
            weight's.
        importance: fp32 [K], weight of each squared error where scales are searched (groups of 16 and 32).
        search: try smaller and larger ranges per group of NVFP4 and keep that of least error.
    """
    n, k = weight.shape
    if scheme.strategy == "tensor":
        largest = largest_magnitude(weight) if amax is None else amax
        stored = _positive(largest / scheme.largest).reshape(1, 1)
        return FloatScales(stored, stored.expand(n, 1))
    if scheme.strategy == "block":
        rows, columns = -(-n // BLOCK), -(-k // BLOCK)
        padded = (
            torch.nn.functional.pad(weight, (0, columns * BLOCK - k, 0, rows * BLOCK - n))
            if n % BLOCK or k % BLOCK
            else weight
        )
        stored = _positive(
            largest_magnitude(padded.view(rows, BLOCK, columns, BLOCK), (1, 3)) / scheme.largest
        )
        return FloatScales(stored, stored.repeat_interleave(BLOCK, 0)[:n])
    groups = weight.view(n, scheme.groups(k), -1)
    if scheme.scales == "F32":
        stored = _positive(largest_magnitude(groups, -1) / scheme.largest)
        return FloatScales(stored, stored)
    weights = None if importance is None else importance.view(groups.shape[1], -1)
    largest = largest_magnitude(groups, -1)
    if scheme.scales == "U8":
        exponent = torch.floor(torch.log2(largest)) - _LARGEST_EXPONENT[scheme.bits]
        exponent = torch.where(largest == 0, 0.0, exponent).clamp(-127, 126).to(torch.int16)
        stored = _best(
            groups, [(exponent + 127 + up).to(torch.uint8) for up in (0, 1)], None, scheme, weights
        )
        return FloatScales(stored, scale_values(stored))
    whole = largest_magnitude(weight) if amax is None else amax
    divisor = torch.where(whole == 0, 1.0, _E4M3 * 6.0 / whole).reshape(1)
    whole_range = _e4m3(largest / 6.0 * divisor)
    codes = whole_range.view(torch.uint8).to(torch.int16)
    others = [
        (codes + step).clamp(1, _LARGEST_E4M3).to(torch.uint8).view(torch.float8_e4m3fn)
        for step in (_STEPS if search else ())
    ]
    stored = _best(groups, [whole_range, *others], divisor, scheme, weights)
    return FloatScales(stored, scale_values(stored, divisor), divisor)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """Scales of groups of zeros are 1; none is too small to divide by."""
    return torch.where(scale == 0, 1.0, scale.clamp_min(torch.finfo(torch.float32).tiny))


def _e4m3(scale: torch.Tensor) -> torch.Tensor:
    """Scales as E4M3, never 0: the smallest is 2⁻⁹; groups of zeros get 1."""
    return torch.where(scale == 0, 1.0, scale.clamp(2.0**-9, _E4M3)).to(torch.float8_e4m3fn)


def _best(
    groups: torch.Tensor,
    candidates: list[torch.Tensor],
    divisor: torch.Tensor | None,
    scheme: WeightScheme,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Of several stored scales [N, G], each group's of least squared error."""
    if len(candidates) == 1:
        return candidates[0]
    chosen = candidates[0].view(torch.uint8).clone()
    least = torch.full(chosen.shape, torch.inf, device=groups.device)
    for candidate in candidates:
        wide = scale_values(candidate, divisor).unsqueeze(-1)
        error = nearest_float(groups / wide, scheme.bits).mul_(wide).sub_(groups).square_()
        total = (error if importance is None else error.mul_(importance)).sum(-1)
        better = total < least
        least = torch.where(better, total, least)
        chosen = torch.where(better, candidate.view(torch.uint8), chosen)
    return chosen.view(candidates[0].dtype)


def _divided(weight: torch.Tensor, multipliers: torch.Tensor, g: int) -> torch.Tensor:
    """A weight fp32 [N, K] over the multipliers [N, G] of groups of ``g`` inputs (the last of blocks may be
    short)."""
    n, k = weight.shape
    if k % g:
        return weight / multipliers.repeat_interleave(g, 1)[:, :k]
    return (weight.view(n, -1, g) / multipliers.unsqueeze(-1)).view(n, k)


def round_floats(weight: torch.Tensor, scheme: WeightScheme, scales: FloatScales) -> QuantizedTensor:
    """The nearest numbers of a weight fp32 [N, K], by pieces of rows: whole temporaries would be larger than
    the weight."""
    n, k = weight.shape
    g = k if scheme.group_size == -1 else scheme.group_size
    rows = n if on_accelerator(weight) else max(1, _CACHED // k)
    codes = torch.empty(
        n, k, dtype=torch.float8_e4m3fn if scheme.bits == 8 else torch.uint8, device=weight.device
    )
    for start in range(0, n, rows):
        part = _divided(weight[start : start + rows], scales.wide[start : start + rows], g)
        codes[start : start + rows] = (
            part.clamp_(-_E4M3, _E4M3) if scheme.bits == 8 else encode(nearest_float(part, 4), 4)
        )
    return QuantizedTensor(codes, scales.stored, None, scheme, global_scale=scales.global_scale)
