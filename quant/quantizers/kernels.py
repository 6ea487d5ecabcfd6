"""Triton kernels of :mod:`quant.quantizers.columns`: a program holds the run of columns of a few rows of one
weight in registers and goes through its columns one after another.

Nothing is fused into products with a sum, and divisions are rounded as torch's are, so that a device gives
the codes of the steps by torch to the bit. ``TRITON_INTERPRET=1`` runs them on a CPU. Names in capitals are
known when a kernel is compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.accelerator import launching_on
from quant.quantizers.columns import LEAST

#: Rows of a weight that one program takes: 128 columns of them are 32 registers of each of 128 threads.
_ROWS, _WARPS = 32, 4
#: What a program knows of the dtype that a file holds scales in: smallest and largest number.
_LIMITS = {
    **{n: (torch.finfo(d).smallest_normal, torch.finfo(d).max) for n, d in
       (("float32", torch.float32), ("bfloat16", torch.bfloat16))},
    "float16": (torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps, 65504.0),
    "e4m3": (2.0**-9, 448.0),
    "positive": (torch.finfo(torch.float32).tiny, torch.inf),
}  # fmt: skip


@triton.jit
def _row(tile, index, columns):  # type: ignore[no-untyped-def]
    """Row ``index`` [R] of a tile [P, R]."""
    return tl.sum(tl.where(columns[:, None] == index, tile, 0.0), 0)


@triton.jit
def _whole(numbers):  # type: ignore[no-untyped-def]
    """The whole numbers nearest to numbers of less than 2²², ties to even: what is left beside 1.5 · 2²³."""
    return (numbers + 12582912.0) - 12582912.0


@triton.jit
def _nearest_float(numbers, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest E4M3 or E2M1 numbers: steps are a power of two each, 2⁻³ or 2⁻¹ of that of the number."""
    largest = 448.0 if BITS == 8 else 6.0
    share = 0.125 if BITS == 8 else 0.5
    least = 0.001953125 if BITS == 8 else 0.5
    clamped = tl.minimum(tl.maximum(numbers, -largest), largest)
    power = (clamped.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power * share, least)
    size = _whole(tl.div_rn(tl.abs(clamped), step)) * step
    sign = clamped.to(tl.int32, bitcast=True) & -2147483648
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(numbers, low, high, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest code."""
    if BITS:
        return _nearest_float(numbers, BITS)
    return _whole(tl.minimum(tl.maximum(numbers, low), high))


@triton.jit
def _stored(scales, divisor, least, largest, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest positive scales that a file holds."""
    if KIND == "e4m3":
        scaled = scales * divisor
        clamped = tl.minimum(tl.maximum(scaled, least), largest)
        return tl.div_rn(_nearest_float(tl.where(scaled == 0.0, 1.0, clamped), 8), divisor)
    clamped = tl.minimum(tl.maximum(scales, least), largest)
    if KIND == "positive":
        return tl.where(scales == 0.0, 1.0, clamped)
    if KIND == "bfloat16":
        bits = clamped.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    if KIND == "float16":
        held = clamped.to(tl.float16).to(tl.float32)
        # of subnormal ones the next larger, which does not cut the range
        return tl.where((held < clamped) & (held < 6.103515625e-05), held + least, held)
    return clamped


@triton.jit(do_not_specialize=["weights"])  # 1 would be a number of Python's
def _round(  # type: ignore[no-untyped-def]
    errors, feedback, codes, triangle, inverse, scales, zeros, groups,
    rows, width, weights, of_triangle, of_row, of_column, of_groups, low, high,
    BITS: tl.constexpr, ZEROS: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Of weight ``program_id(1)`` some rows; all tensors [P, B, N] and [G, B, N] are contiguous."""
    b, own = tl.program_id(1), tl.program_id(0) * R + tl.arange(0, R)
    live, columns = own < rows, tl.arange(0, P)
    step = weights.to(tl.int64) * rows
    place = b.to(tl.int64) * rows + own
    ahead = (columns[:, None] < width) & live[None, :]
    inner = tl.load(feedback + columns[:, None] * step + place[None, :], mask=ahead, other=0.0)
    for c in range(0, width):
        group = tl.load(groups + b * of_groups + c)
        scale = tl.load(scales + group * step + place, mask=live, other=1.0)
        error = tl.load(errors + c * step + place, mask=live, other=0.0)
        factor = tl.load(inverse + c * weights + b)
        number = tl.div_rn(error + _row(inner, c, columns) * factor, scale)
        if ZEROS:
            zero = tl.load(zeros + group * step + place, mask=live, other=0.0)
            code = _nearest(number + zero, low, high, BITS)
            error = error - (code - zero) * scale
        else:
            code = _nearest(number, low, high, BITS)
            error = error - code * scale
        tl.store(codes + c * step + place, code.to(codes.dtype.element_ty), mask=live)
        tl.store(errors + c * step + place, error, mask=live)
        onto = triangle + b.to(tl.int64) * of_triangle + c * of_row + columns * of_column
        factors = tl.load(onto, mask=(columns > c) & (columns < width), other=0.0)
        inner = inner + factors[:, None] * error[None, :]


def round_columns(
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
    """``quant::round_columns`` by one kernel."""
    width, weights, rows = errors.shape
    with launching_on(errors):
        _round[(triton.cdiv(rows, _ROWS), weights)](
            errors, feedback, codes, triangle, inverse, scales, scales if zeros is None else zeros, groups,
            rows, width, weights, *triangle.stride(), groups.stride(0), float(low), float(high),
            BITS=bits, ZEROS=zeros is not None, P=triton.next_power_of_2(width), R=_ROWS,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["weights"])  # 1 would be a number of Python's
def _refine(  # type: ignore[no-untyped-def]
    errors, codes, scales, zeros, pushed, among, columns, groups, divisor,
    rows, width, size, weights, of_among, of_row, of_column, of_columns, of_groups,
    low, high, least, largest, share,
    BITS: tl.constexpr, ZEROS: tl.constexpr, FIT: tl.constexpr, KIND: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Of weight ``program_id(1)`` some rows; tensors as those of :func:`_round`, ``errors`` and ``codes`` of
    all columns."""
    b, own = tl.program_id(1), tl.program_id(0) * R + tl.arange(0, R)
    live, number = own < rows, tl.arange(0, P)
    step = weights.to(tl.int64) * rows
    place = b.to(tl.int64) * rows + own
    inside = (number[:, None] < width) & live[None, :]
    slopes = tl.load(pushed + number[:, None] * step + place[None, :], mask=inside, other=0.0)
    column = tl.load(columns + b * of_columns + number, mask=number < width, other=0)
    shown = tl.load(codes + column[:, None] * step + place[None, :], mask=inside, other=0).to(tl.float32)
    hessian = among + b.to(tl.int64) * of_among + number * of_row
    for start in range(0, width, size):
        group = tl.load(groups + b * of_groups + start)
        scale = tl.load(scales + group * step + place, mask=live, other=1.0)
        change = tl.zeros([R], tl.float32)
        zero = tl.zeros([R], tl.float32)
        if ZEROS:
            zero = tl.load(zeros + group * step + place, mask=live, other=0.0)
        if FIT:
            slope, curve = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
            applied = tl.zeros([P, R], tl.float32)
            for j in range(start, start + size):
                value = _row(shown, j, number) - zero
                beside = tl.load(hessian + j * of_column, mask=number < width, other=0.0)
                curvature = tl.load(among + b.to(tl.int64) * of_among + j * (of_row + of_column))
                slope = slope + value * _row(slopes, j, number)
                curve = curve + value * (2.0 * _row(applied, j, number) + curvature * value)
                applied = applied + beside[:, None] * value[None, :]
            best = scale + tl.div_rn(slope, curve)
            kept = (tl.abs(best) < float("inf")) & (best > share * scale)
            by = tl.load(divisor + b) if KIND == "e4m3" else 1.0
            best = _stored(tl.where(kept, best, scale), by, least, largest, KIND)
            change = best - scale
            better = change * (change * curve - 2.0 * slope) < 0.0
            change = tl.where(better, change, 0.0)
            scale = tl.where(better, best, scale)
            tl.store(scales + group * step + place, scale, mask=live)
            for j in range(start, start + size):
                value = (_row(shown, j, number) - zero) * change
                beside = tl.load(
                    hessian + j * of_column, mask=(number >= start) & (number < width), other=0.0
                )
                slopes = slopes - beside[:, None] * value[None, :]
        for j in range(start, start + size):
            at = tl.load(columns + b * of_columns + j) * step + place
            if not FIT:
                scale = tl.load(
                    scales + tl.load(groups + b * of_groups + j) * step + place, mask=live, other=1.0
                )
            code = _row(shown, j, number)
            beside = tl.load(hessian + j * of_column, mask=(number > j) & (number < width), other=0.0)
            curvature = tl.load(among + b.to(tl.int64) * of_among + j * (of_row + of_column))
            target = code + _row(slopes, j, number) * tl.div_rn(1.0, scale) * tl.div_rn(1.0, curvature)
            target = _nearest(target, low, high, BITS)
            rise = (target - code) * scale
            error = tl.load(errors + at, mask=live, other=0.0)
            tl.store(errors + at, error - ((code - zero) * change + rise), mask=live)
            tl.store(codes + at, target.to(codes.dtype.element_ty), mask=live)
            slopes = slopes - beside[:, None] * rise[None, :]


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
    low: int,
    high: int,
    bits: int,
    kind: str,
    divisor: torch.Tensor | None,
) -> None:
    """``quant::refine_columns`` by one kernel."""
    width, weights, rows = pushed.shape
    with launching_on(errors):
        _refine[(triton.cdiv(rows, _ROWS), weights)](
            errors, codes, scales, scales if zeros is None else zeros, pushed, among, columns, groups,
            scales if divisor is None else divisor,
            rows, width, size or width, weights, *among.stride(), columns.stride(0), groups.stride(0),
            float(low), float(high), *_LIMITS[kind], LEAST,
            BITS=bits, ZEROS=zeros is not None and size > 0, FIT=size > 0, KIND=kind,
            P=triton.next_power_of_2(width), R=_ROWS,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _round_both(  # type: ignore[no-untyped-def]
    weights, known, scales, zeros, corners, units, codes, errors, moved,
    size, width, each, low, high,
    BITS: tl.constexpr, ZEROS: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A block of outputs, row after row, and each row's columns one after another."""
    block, columns, some = tl.program_id(0), tl.arange(0, C), tl.arange(0, R)
    live = columns < width
    begin = block.to(tl.int64) * size * width
    corner = corners + (block // each).to(tl.int64) * width * width + columns
    unit = units + block.to(tl.int64) * size * size
    for i in range(0, size):
        at = begin + i * width + columns
        value = tl.load(weights + at, mask=live, other=0.0)
        fed = tl.load(known + at, mask=live, other=0.0)
        scale = tl.load(scales + at, mask=live, other=1.0)
        zero = tl.zeros([C], tl.float32)
        if ZEROS:
            zero = tl.load(zeros + at, mask=live, other=0.0)
        outer = tl.zeros([C], tl.float32)
        for top in range(0, i, R):
            rows = top + some
            factors = tl.load(unit + rows * size + i, mask=rows < i, other=0.0)
            above = (rows[:, None] < i) & live[None, :]
            tile = tl.load(moved + begin + rows[:, None] * width + columns[None, :], mask=above, other=0.0)
            outer = outer + tl.sum(factors[:, None] * tile, 0)
        base, inner = value + fed, tl.zeros([C], tl.float32)
        for k in range(0, width):
            code = _nearest(tl.div_rn(base + inner + outer, scale) + zero, low, high, BITS)
            missed = tl.sum(tl.where(columns == k, value - (code - zero) * scale, 0.0), 0)
            onto = tl.load(corner + k * width, mask=live & (columns > k), other=0.0)
            inner = inner + missed * onto
        # what a column is rounded from does not change once it is reached
        code = _nearest(tl.div_rn(base + inner + outer, scale) + zero, low, high, BITS)
        missed = value - (code - zero) * scale
        tl.store(codes + at, code, mask=live)
        tl.store(errors + at, missed, mask=live)
        tl.store(moved + at, missed + fed + inner, mask=live)
        tl.debug_barrier()


def round_both(
    weights: torch.Tensor,
    known: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    corners: torch.Tensor,
    units: torch.Tensor,
    low: int,
    high: int,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors [B, b, C] of a panel of columns with feedback along both sides, by one kernel; a
    program takes a block of outputs.

    Args:
        weights, known, scales, zeros: of the panel, contiguous fp32 [B, b, C]; ``known``: what earlier panels
            feed back.
        corners: U of the panel without its diagonal, contiguous fp32 [S, C, C]; of B / S blocks each.
        units: V of each block without its diagonal, contiguous fp32 [B, b, b].
        low, high, bits: of :attr:`quant.quantizers.grids.Grid.numbers`.
    """
    blocks, size, width = weights.shape
    codes, errors, moved = (torch.empty_like(weights) for _ in range(3))
    with launching_on(weights):
        _round_both[(blocks,)](
            weights, known, scales, scales if zeros is None else zeros, corners, units, codes, errors, moved,
            size, width, blocks // len(corners), float(low), float(high),
            BITS=bits, ZEROS=zeros is not None, C=triton.next_power_of_2(width), R=_ROWS,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, errors


@triton.jit
def _descend(  # type: ignore[no-untyped-def]
    slopes, codes, scales, among, outputs, turned, gains,
    blocks, size, width, each, changes, low, high,
    BITS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The columns of a block of outputs one after another, of each the best changes."""
    block, rows = tl.program_id(0), tl.arange(0, B)
    live = rows < size
    hessian = outputs + block.to(tl.int64) * size * size
    between = among + (block // each).to(tl.int64) * width * width
    weights = tl.maximum(tl.load(hessian + rows * (size + 1), mask=live, other=1.0), 1e-38)
    gained = 0.0
    for j in range(0, width):
        at = (j * blocks + block).to(tl.int64) * size + rows
        slope = tl.load(slopes + at, mask=live, other=0.0)
        for i in range(0, j):
            before = tl.load(turned + (i * blocks + block).to(tl.int64) * size + rows, mask=live, other=0.0)
            slope = slope - tl.load(between + j * width + i) * before
        curvature = tl.load(between + j * (width + 1))
        seen = curvature > 0.0
        curvature = tl.where(seen, curvature, 1.0)
        scale = tl.load(scales + at, mask=live, other=1.0)
        code = tl.load(codes + at, mask=live, other=0.0)
        began, curve = slope, weights * curvature
        inverse = tl.div_rn(1.0, curve * scale)
        for _ in range(0, changes):
            target = _nearest(code + slope * inverse, low, high, BITS)
            step = (target - code) * scale
            gain = tl.where(live, (2.0 * slope - step * curve) * step, -1.0)
            most, best = tl.where(seen, tl.max(gain, 0), 0.0), tl.argmax(gain, 0)
            here = (rows == best) & (gain > 0.0) & (gain <= most)
            chosen = tl.sum(tl.where(here, step, 0.0), 0)
            code = tl.where(here, target, code)
            slope = slope - tl.load(hessian + best * size + rows, mask=live, other=0.0) * (chosen * curvature)
            gained = gained + tl.maximum(most, 0.0)
        tl.store(codes + at, code, mask=live)
        tl.store(turned + at, tl.div_rn(began - slope, curvature), mask=live)
        tl.debug_barrier()
    tl.store(gains + block, gained)


def descend(
    slopes: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    among: torch.Tensor,
    outputs: torch.Tensor,
    changes: int,
    low: int,
    high: int,
    bits: int,
) -> torch.Tensor:
    """What :func:`quant.quantizers.two_sided.descend` does with a panel of columns, by one kernel.

    Args:
        slopes, codes, scales: contiguous fp32 [P, B, b]; codes are changed in place.
        among: H_I among the columns, contiguous fp32 [S, P, P]; of B / S blocks each.
        outputs: H_O of each block, contiguous fp32 [B, b, b].
        changes: of a column, at the most.

    Returns:
        by how much the loss is lower, fp32 [B].
    """
    width, blocks, size = slopes.shape
    turned, gains = torch.empty_like(slopes), torch.empty(blocks, device=slopes.device)
    with launching_on(slopes):
        _descend[(blocks,)](
            slopes, codes, scales, among, outputs, turned, gains,
            blocks, size, width, blocks // len(among), changes, float(low), float(high),
            BITS=bits, B=triton.next_power_of_2(size), num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return gains
