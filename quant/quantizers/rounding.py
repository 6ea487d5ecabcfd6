"""Scales, zero points and rounding: the arithmetic that every integer method shares. Pure functions on any
device.

A scale is rounded to the dtype it will be stored in *before* codes are chosen, so that the file holds exactly
the values the method saw.
"""

from __future__ import annotations

from itertools import product

import torch

from quant.accelerator import on_accelerator
from quant.schemes import WeightScheme

#: The clipping search tries this many ranges per group, from the whole one down to a share of it. Fewer bits
#: gain from cutting deeper.
SEARCH_STEPS = 10
SEARCH_FLOOR = {2: 0.4, 3: 0.6, 4: 0.7, 8: 0.9}
#: Of weights that errors are fed back to: how far before the last code a value begins to cost more than a
#: twelfth of a step squared, which rounding costs in the middle; and how much more behind that, by the cube
#: of the distance. With 0.6 steps of what is fed back, at the root mean square, the integral over a normal
#: distribution is that cube to 0.06 steps squared up to two steps behind the last code.
_REACH, _BEYOND = 1.0, 1.9
#: Ranges that are tried of such weights: from a share of the whole one to more than it; then four around the
#: best.
_FED_FLOOR, _FED_TOP, _FED_STEPS = {2: 0.35, 3: 0.5, 4: 0.6}, 1.14, 10
_AROUND = (-0.4, -0.2, 0.2, 0.4)
#: Elements searched at a time on a CPU: temporaries stay in its cache, which is worth a factor of five.
_CACHED = 1 << 19
#: Inputs of the widest group whose errors are weighted with its whole Hessian.
_WIDEST = 256
#: Elements searched at a time on a GPU: enough to fill it, with temporaries of 256 MiB.
_ON_GPU = 1 << 26


def _parameters(
    low: torch.Tensor, high: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (fp32, representable in ``dtype``) and zero point (fp32 integer, or None) of ranges ``low`` ≤ 0 ≤
    ``high`` of any shape."""
    levels = scheme.high - scheme.low
    scale = 2 * torch.maximum(-low, high) / levels if scheme.symmetric else (high - low) / levels
    # a group of zeros gets scale 1 (its codes are 0)
    scale = torch.where(scale == 0, 1.0, stored_scale(scale, dtype))
    if scheme.symmetric:
        return scale, None
    return scale, (scheme.low - low / scale).round_().clamp_(scheme.low, scheme.high)


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers fp32 that ``dtype`` holds of positive scales: the nearest, but never 0 nor infinite.

    fp16 weights of a standard deviation of 2e-5 have scales below its smallest normal number (6.1e-5): they
    are stored as subnormal ones, which hold fewer digits but which every engine multiplies with. There the
    next larger number is taken: a step is a large part of a scale, and a smaller one would cut off the range.
    """
    limits = torch.finfo(dtype)
    if dtype != torch.float16:
        return scale.clamp(limits.smallest_normal, limits.max).to(dtype).float()
    step = limits.smallest_normal * limits.eps
    stored = scale.clamp(step, limits.max).to(dtype).float()
    cut = (stored < scale) & (stored < limits.smallest_normal)
    return torch.where(cut, stored + step, stored)


def small_scales(scales: torch.Tensor) -> tuple[int, float]:
    """Of stored scales, how many lie below the smallest normal number of fp16, and how large the largest
    share is that rounding may have changed one of them by; (0, 0) of those in a dtype of more range."""
    if scales.dtype != torch.float16:
        return 0, 0.0
    limits = torch.finfo(scales.dtype)
    sizes = scales.abs()
    small = sizes[sizes < limits.smallest_normal].float()
    if not small.numel():
        return 0, 0.0
    return small.numel(), float(limits.smallest_normal * limits.eps / small.min())


def _round(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: WeightScheme
) -> torch.Tensor:
    """Codes, as whole fp32 numbers, of values that scale and zero broadcast to."""
    codes = values / scale
    codes = codes.round_() if zero is None else codes.add_(zero).round_()
    return codes.clamp_(scheme.low, scheme.high)


def group_parameters(
    groups: torch.Tensor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    search: bool = False,
    signed: bool = False,
    fed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of each group of weights.

    Args:
        groups: fp32 [N, G, g], one group in the last dimension.
        dtype: what scales are stored in.
        importance: what the search weights errors with: fp32 [G, g], the mean square of the input that each
            one multiplies; or [G, g, g], the Hessian of each group's inputs, by which the error is that of
            the group's share of the output.
        search: try smaller ranges per group and keep the one of least error, instead of the whole range.
        signed: of a symmetric scheme search among negative scales, too: its codes reach one step further down
            than up, so that a group whose largest weight is positive is better off mirrored.
        fed: the errors of other weights will be moved onto each one before it is rounded, as GPTQ does and
            YAQA more so; importance is of one weight each. What is searched for is then the least expected
            error (:func:`_expected`): that of rounding these very weights to nearest, by chance small at one
            scale and large at the next, is not what comes of it. Of codes of up to 4 bits.

    Returns:
        scales fp32 [N, G] with values that ``dtype`` holds exactly, and zeros fp32 [N, G] or None when
        symmetric.
    """
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    if not search:
        return _parameters(low, high, scheme, dtype)
    rows = rows_at_a_time(groups)
    runs = (slice(i, i + rows) for i in range(0, len(groups), rows))
    parts = [
        _searched(groups[run], low[run], high[run], scheme, dtype, importance, signed, fed) for run in runs
    ]
    zeros = [z for _, z in parts if z is not None]
    return torch.cat([s for s, _ in parts]), torch.cat(zeros) if zeros else None


def rows_at_a_time(groups: torch.Tensor) -> int:
    """How many rows of [N, G, g] to search at once: as many as stay in the cache of a CPU, or as fill a
    GPU."""
    return max(1, (_ON_GPU if on_accelerator(groups) else _CACHED) // groups[0].numel())


def _searched(
    groups: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    importance: torch.Tensor | None,
    signed: bool,
    fed: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of all ranges, each group's of least error; of least expected error where errors are ``fed`` back."""
    buffer, error_of = torch.empty_like(groups), _expected if fed else _changed
    best = torch.full_like(low, torch.inf)
    share, sign = torch.ones_like(low), torch.ones_like(low)
    # stands where no error can be compared: weights whose squares overflow
    scale, zero = _parameters(low, high, scheme, dtype)

    def attempt(shares: torch.Tensor | float, signs: torch.Tensor | float) -> None:
        nonlocal best, share, sign, scale, zero
        s, z = _parameters(low * shares, high * shares, scheme, dtype)
        s = s * signs
        error = error_of(groups, s, z, scheme, importance, buffer)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, s, scale)
        if fed:
            share, sign = torch.where(better, shares, share), torch.where(better, signs, sign)
        if zero is not None and z is not None:
            zero = torch.where(better, z, zero)

    floor, signs = SEARCH_FLOOR[scheme.bits], (1.0, -1.0) if signed and scheme.symmetric else (1.0,)
    if not fed:
        for number, one in product(range(SEARCH_STEPS), signs):
            attempt(1 - (1 - floor) * number / (SEARCH_STEPS - 1), one)
        return scale, zero
    floor = _FED_FLOOR[scheme.bits]
    step = (_FED_TOP - floor) / (_FED_STEPS - 1)
    for number, one in product(range(_FED_STEPS), signs):
        attempt(floor + step * number, one)
    middle = share
    for offset in _AROUND:
        attempt(middle + offset * step, sign)
    return scale, zero


def _changed(
    groups: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: WeightScheme,
    importance: torch.Tensor | None,
    buffer: torch.Tensor,
) -> torch.Tensor:
    """Error [N, G] of groups [N, G, g] that are rounded to nearest with scales and zeros [N, G]. ``buffer``:
    overwritten."""
    wide, shift = scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
    torch.div(groups, wide, out=buffer)
    if shift is None:
        buffer.round_().clamp_(scheme.low, scheme.high)
    else:
        buffer.add_(shift).round_().clamp_(scheme.low, scheme.high).sub_(shift)
    # in one pass over memory; whether it is rounded minus exact or the reverse is all the same
    return _error(torch.addcmul(groups, buffer, wide, value=-1, out=buffer), importance)


def _expected(
    groups: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: WeightScheme,
    importance: torch.Tensor | None,
    buffer: torch.Tensor,
) -> torch.Tensor:
    """Expected error [N, G] of groups [N, G, g] onto whose weights errors are fed back before they are
    rounded with scales and zeros [N, G], times twelve: the square of a step in the middle of the range, and
    towards its ends and beyond more (:data:`_BEYOND`). ``buffer``: overwritten."""
    numbers = torch.div(groups, scale.unsqueeze(-1), out=buffer)
    middle, half = (scheme.low + scheme.high) / 2, (scheme.high - scheme.low) / 2
    numbers -= middle if zero is None else middle - zero.unsqueeze(-1)
    beyond = numbers.abs_().sub_(half - _REACH).clamp_(min=0)
    cost = beyond.square().mul_(beyond).mul_(_BEYOND).add_(1.0)
    if importance is not None:
        cost.mul_(importance)
    return cost.sum(-1) * scale.square()


def _error(difference: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Error [N, G] of each group from what rounding changed [N, G, g], which is overwritten; ``importance``
    as in :func:`group_parameters`."""
    if importance is None:
        return difference.square_().sum(-1)
    if importance.ndim == 2:
        return difference.square_().mul_(importance).sum(-1)
    groups = difference.transpose(0, 1)
    return (torch.bmm(groups, importance) * groups).sum(-1).t()


def scale_dtype(scheme: WeightScheme, model: torch.dtype) -> torch.dtype:
    """What scales of integers are stored in: the model's dtype, or fp32 where vLLM keeps them so (W8A8)."""
    return torch.float32 if scheme.scales == "F32" else model


def weight_parameters(
    weight: torch.Tensor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    search: bool = False,
    signed: bool = False,
    fed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`group_parameters` of a whole weight [N, K] (importance [K], or by groups): scales and zeros [N,
    G]."""
    n, k = weight.shape
    g = k // scheme.groups(k)
    if importance is not None and importance.ndim == 1:
        importance = importance.view(-1, g)
    return group_parameters(weight.view(n, -1, g), scheme, dtype, importance, search, signed, fed)


def importance_of(hessian: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """The importance that a Hessian fp32 [K, K] gives to errors in the groups of a scheme: the block of each
    group, [G, g, g]; for groups too wide for that to be cheap, and for floating numbers, the diagonal, [G, g]
    or [K]."""
    k = len(hessian)
    if scheme.type == "float":
        return hessian.diagonal().clone()
    g = k // scheme.groups(k)
    if g > _WIDEST:
        return hessian.diagonal().reshape(-1, g)
    return torch.stack([hessian[i : i + g, i : i + g] for i in range(0, k, g)])


def scaled_importance(importance: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The importance of errors when inputs are divided by ``factors`` fp32 [K]."""
    if importance.ndim < 3:
        return importance / factors.square().view(importance.shape)
    grouped = factors.view(importance.shape[:2])
    return importance / grouped.unsqueeze(1) / grouped.unsqueeze(2)


def round_weight(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: WeightScheme
) -> torch.Tensor:
    """int8 codes [N, K] of a weight rounded to nearest, with scales and zeros [N, G]."""
    n, k = weight.shape
    groups = weight.view(n, scales.shape[1], -1)
    return (
        _round(groups, scales.unsqueeze(-1), None if zeros is None else zeros.unsqueeze(-1), scheme)
        .view(n, k)
        .to(torch.int8)
    )
