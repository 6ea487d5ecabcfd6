"""Scales, zero points and rounding: the arithmetic that every integer method shares. Pure functions on any device.

A scale is rounded to the dtype it will be stored in *before* codes are chosen, so that the file holds exactly the values the method saw.
"""

from __future__ import annotations

import torch

from quant.schemes import WeightScheme

#: Shrink factors tried by the clipping search, from the full range down to half of it.
SEARCH_STEPS = 32


def _parameters(
    low: torch.Tensor, high: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (fp32, representable in ``dtype``) and zero point (fp32 integer, or None) of ranges ``low`` ≤ 0 ≤ ``high`` of any shape."""
    levels = scheme.high - scheme.low
    scale = 2 * torch.maximum(-low, high) / levels if scheme.symmetric else (high - low) / levels
    limits = torch.finfo(dtype)
    # a group of zeros gets scale 1 (its codes are 0); one too small for the dtype gets the smallest normal number
    scale = torch.where(scale == 0, 1.0, scale.clamp(limits.tiny, limits.max)).to(dtype).float()
    if scheme.symmetric:
        return scale, None
    return scale, (scheme.low - low / scale).round_().clamp_(scheme.low, scheme.high)


def _round(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: WeightScheme) -> torch.Tensor:
    """Codes, as whole fp32 numbers, of values that scale and zero broadcast to."""
    codes = values / scale
    codes = codes.round_() if zero is None else codes.add_(zero).round_()
    return codes.clamp_(scheme.low, scheme.high)


def _restore(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    return codes * scale if zero is None else (codes - zero) * scale


def group_parameters(
    groups: torch.Tensor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    search: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of each group of weights.

    Args:
        groups: fp32 [..., g], one group in the last dimension.
        dtype: what scales are stored in.
        importance: fp32, broadcastable to ``groups``: weight of each squared error in the search (mean square of the input it multiplies).
        search: try :data:`SEARCH_STEPS` smaller ranges per group and keep the one of least error, instead of the full range.

    Returns:
        scales fp32 [...] with values that ``dtype`` holds exactly, and zeros fp32 [...] or None when symmetric.
    """
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    scale, zero = _parameters(low, high, scheme, dtype)
    if not search:
        return scale, zero

    def error(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        s, z = scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
        squared = _restore(_round(groups, s, z, scheme), s, z).sub_(groups).square_()
        return (squared if importance is None else squared.mul_(importance)).sum(-1)

    best = error(scale, zero)
    for step in range(1, SEARCH_STEPS):
        shrink = 1 - 0.5 * step / SEARCH_STEPS
        s, z = _parameters(low * shrink, high * shrink, scheme, dtype)
        candidate = error(s, z)
        better = candidate < best
        best = torch.where(better, candidate, best)
        scale = torch.where(better, s, scale)
        if zero is not None and z is not None:
            zero = torch.where(better, z, zero)
    return scale, zero


def weight_parameters(
    weight: torch.Tensor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    search: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`group_parameters` of a whole weight [N, K] (importance [K]): scales and zeros [N, G]."""
    n, k = weight.shape
    g = k // scheme.groups(k)
    return group_parameters(weight.view(n, -1, g), scheme, dtype, None if importance is None else importance.view(-1, g), search)


def round_weight(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: WeightScheme) -> torch.Tensor:
    """int8 codes [N, K] of a weight rounded to nearest, with scales and zeros [N, G]."""
    n, k = weight.shape
    groups = weight.view(n, scales.shape[1], -1)
    return _round(groups, scales.unsqueeze(-1), None if zeros is None else zeros.unsqueeze(-1), scheme).view(n, k).to(torch.int8)
