"""Runs of columns that act on each other, as one operation of a device.

Rounding a column takes half a dozen short steps, and so does changing its codes afterwards. On a CPU they are
calls of torch (:mod:`quant.quantizers.gptq`, :mod:`quant.quantizers.refining`); a device would be told of
each of them, which takes it longer than doing it. Here a run of columns is one operation,
``quant::round_columns`` or ``quant::refine_columns``: one Triton kernel where Triton is
(:mod:`quant.quantizers.kernels`; torch's CUDA builds bring it), and the same steps by torch elsewhere.

Both do the same arithmetic in the same order, a product and a sum rounded each on its own, so that they give
the same codes to the bit; they are not the last bit of what a CPU's loop gives, which sums by products of
matrices. Rows of a weight depend on none of each other.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch

from quant.quantizers.grids import Grid, nearest_code, nearest_scale

#: Columns of a run, at the most: a kernel holds that many of a few rows in registers.
RUN = 128
#: A scale is not fitted to less than this share of what it was: that would turn the signs of its group, or
#: lose it.
LEAST = 1e-3


@cache
def _triton() -> ModuleType | None:
    """The kernels, where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from quant.quantizers import kernels

    return kernels


def kernels_for(tensor: torch.Tensor) -> ModuleType | None:
    """The kernels, where they can be run on a tensor's device: CUDA's, or any under Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _triton() if tensor.device.type == "cuda" or interpreted else None


def run_of(size: int, groups: int) -> int:
    """Columns of a run within which no group of ``size`` columns starts but at its first.

    >>> run_of(128, 32), run_of(4096, 1), run_of(32, 4), run_of(192, 4)
    (128, 128, 32, 64)
    """
    return RUN if groups == 1 else math.gcd(size, RUN)


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, …]; of a single one a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack([*tensors])


def round_columns(
    errors: torch.Tensor,
    feedback: torch.Tensor,
    codes: torch.Tensor,
    triangle: torch.Tensor,
    inverse: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    groups: torch.Tensor,
    grid: Grid,
) -> None:
    """Rounds a run of P columns of B weights one after another, each with the feedback of those before it.

    Args:
        errors: fp32 [P, B, N], a run of rows of a contiguous [K, B, N]: weights, overwritten with what
            rounding left of them.
        feedback: fp32 [P, B, N], likewise: Σ_j (W_j - Ŵ_j) · R_jk over the columns before the run;
            overwritten.
        codes: int8 [P, B, N] (of floats their fp32 values), likewise: where codes are put.
        triangle: R of the run, fp32 [B, P, P].
        inverse: 1 / R_kk, fp32 [P, B].
        scales, zeros: fp32 [G, B, N], contiguous.
        groups: int64 [B, P], the group of each column.
    """
    torch.ops.quant.round_columns(
        errors, feedback, codes, triangle, inverse, scales, zeros, groups, *grid.numbers
    )


def refine_columns(
    errors: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    pushed: torch.Tensor,
    among: torch.Tensor,
    columns: torch.Tensor,
    groups: torch.Tensor,
    size: int,
    grid: Grid,
) -> None:
    """Fits the scales of each group of a run of P columns to its codes, then changes each of its codes to the
    one of least loss, group after group; see :mod:`quant.quantizers.refining`.

    Args:
        errors: fp32 [K, B, N], weights less values; kept up to date.
        codes: int8 [K, B, N], or fp32 of floats; changed in place.
        scales, zeros: fp32 [G, B, N]; scales are changed in place.
        pushed: H · E of the run's columns, fp32 [P, B, N]; overwritten.
        among: H among them, fp32 [B, P, P].
        columns: int64 [B, P]: which they are.
        groups: int64 [B, P]: the group of each.
        size: columns of a group, which then make up the run, one group after another, and whose scales are
            fitted; 0: scales stay.
    """
    divisor = None if grid.divisor is None else grid.divisor.reshape(-1)
    torch.ops.quant.refine_columns(
        errors, codes, scales, zeros, pushed, among, columns, groups, size, *grid.numbers, grid.kind,
        divisor,
    )  # fmt: skip


def fit(
    scales: torch.Tensor,
    slope: torch.Tensor,
    curve: torch.Tensor,
    stored: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Puts better scales in the place of ``scales`` fp32 [B, N]; returns by how much each rose.

    With a scale changed by d the loss changes by d · (d · ``curve`` - 2 · ``slope``).

    Args:
        stored: the scales that a file holds for these.
    """
    best = scales + slope / curve
    best = stored(torch.where(best.isfinite() & (best > LEAST * scales), best, scales))
    change = best - scales
    better = change * (change * curve - 2 * slope) < 0
    scales.copy_(torch.where(better, best, scales))
    return torch.where(better, change, 0.0)


@torch.library.custom_op("quant::round_columns", mutates_args=("errors", "feedback", "codes"))
def _round_columns(
    errors: torch.Tensor,
    feedback: torch.Tensor,
    codes: torch.Tensor,
    triangle: torch.Tensor,
    inverse: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    groups: torch.Tensor,
    low: int,
    high: int,
    bits: int,
) -> None:
    kernels = kernels_for(errors)
    if kernels is not None:
        kernels.round_columns(
            errors, feedback, codes, triangle, inverse, scales, zeros, groups, low, high, bits
        )
        return
    own = torch.arange(len(triangle), device=errors.device)
    for c, (error, pushed) in enumerate(zip(errors.unbind(), feedback.unbind(), strict=True)):
        scale, zero = _of_group(scales, zeros, groups[:, c], own)
        number = error.add(pushed * inverse[c].unsqueeze(-1)).div_(scale)
        code = nearest_code(number if zero is None else number.add_(zero), low, high, bits)
        codes[c] = code
        error.sub_((code if zero is None else code.sub_(zero)).mul_(scale))
        feedback[c + 1 :] += triangle[:, c, c + 1 :].t().unsqueeze(-1) * error


@torch.library.custom_op("quant::refine_columns", mutates_args=("errors", "codes", "scales", "pushed"))
def _refine_columns(
    errors: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    pushed: torch.Tensor,
    among: torch.Tensor,
    columns: torch.Tensor,
    groups: torch.Tensor,
    size: int,
    low: int,
    high: int,
    bits: int,
    kind: str,
    divisor: torch.Tensor | None,
) -> None:
    kernels = kernels_for(errors)
    if kernels is not None:
        kernels.refine_columns(
            errors, codes, scales, zeros, pushed, among, columns, groups, size, low, high, bits, kind, divisor
        )
        return
    own = torch.arange(len(columns), device=errors.device)
    shown = codes[columns.t(), own].float()
    between = among.permute(1, 2, 0).unsqueeze(-1)  # [P, P, B, 1]
    softness = 1.0 / between.diagonal().permute(2, 0, 1)
    moved = torch.zeros_like(pushed)
    for start in range(0, len(pushed), size or len(pushed)):
        run = slice(start, start + size if size else len(pushed))
        if size:
            scale, zero = _of_group(scales, zeros, groups[:, start], own)
            shifted = shown[run] if zero is None else shown[run] - zero
            change = _fitted(scale, shifted, pushed[run], between[run, run], kind, divisor)
            scales[groups[:, start], own] = scale
            for j, values in enumerate((shifted * change).unbind()):
                moved[start + j] = values
                pushed[start:] -= between[start:, start + j] * values
        for j in range(run.start, run.stop):
            scale, _ = _of_group(scales, None, groups[:, j], own)
            code = shown[j] + pushed[j] * (1.0 / scale) * softness[j]
            rise = nearest_code(code, low, high, bits).sub_(shown[j])
            shown[j] += rise
            rise *= scale
            moved[j] += rise
            pushed[j + 1 :] -= between[j + 1 :, j] * rise
    codes[columns.t(), own] = shown.to(codes.dtype)
    errors[columns.t(), own] -= moved


def _fitted(
    scale: torch.Tensor,
    shifted: torch.Tensor,
    pushed: torch.Tensor,
    between: torch.Tensor,
    kind: str,
    divisor: torch.Tensor | None,
) -> torch.Tensor:
    """Puts better scales in the place of ``scale`` [B, N]; returns by how much each rose."""
    slope, curve, applied = torch.zeros_like(scale), torch.zeros_like(scale), torch.zeros_like(shifted)
    for j, values in enumerate(shifted.unbind()):
        slope += values * pushed[j]
        curve += values * (2 * applied[j] + between[j, j] * values)
        applied += between[:, j] * values
    by = None if divisor is None else divisor.unsqueeze(-1)
    return fit(scale, slope, curve, lambda best: nearest_scale(best, kind, by))


def _of_group(
    scales: torch.Tensor, zeros: torch.Tensor | None, groups: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, N]: scales and zeros [G, B, N] of a column whose groups are [B]."""
    return scales[groups, own], None if zeros is None else zeros[groups, own]
