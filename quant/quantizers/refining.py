"""What GPTQ leaves of a layer's loss, lowered further: scales fitted to codes, then codes changed one by one.

With the Hessian H [K, K] of the inputs, the loss of a weight's errors E [N, K] is tr(E · H · Eᵀ). It is a
parabola in each scale, all codes as they are, and in each code, all scales as they are; so every step here
takes the best of one number and never raises the loss. A group's scale is fitted before its codes are looked
at, and what a group changes is known to the groups that follow: one product of E with H in all.

Both steps with a second Hessian, of the outputs, are in :mod:`quant.quantizers.two_sided`. As in
:mod:`quant.quantizers.gptq`, several weights are worked on at once, each with a Hessian of its own, and
everything is kept transposed, [K, B, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quant.accelerator import on_accelerator
from quant.quantizers.columns import RUN, fit, refine_columns, stacked
from quant.quantizers.grids import Grid
from quant.quantizers.products import product

#: Columns that are looked at with one product of E and H; and of those that act on each other one by one.
_PANEL, _RUN = RUN, 32
#: Columns of a wide group that are multiplied with H at once on a device, of which few large operations are
#: wanted.
_MANY = 1024


@dataclass(frozen=True)
class Solved:
    """Weights under way, all tensors changed in place: values are (codes - zeros) · scales.

    Attributes:
        errors: fp32 [K, B, N], weights less values.
        codes: [K, B, N], int8 or, of floats, their fp32 values.
        scales: fp32 [G, B, N].
        zeros: fp32 [G, B, N], or None.
        groups: int64 [K] of each weight, the group of each column.
        grid: which codes and scales there are.
    """

    errors: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    groups: Sequence[torch.Tensor]
    grid: Grid


def refine(solved: Solved, hessians: Sequence[torch.Tensor]) -> None:
    """Fits scales and changes codes so that the loss of each weight falls.

    Args:
        hessians: of each weight's inputs, fp32 [K, K], in the order that its columns have in ``solved``.
    """
    k, count = len(solved.errors), len(solved.scales)
    panels: list[tuple[torch.Tensor, slice | None]]
    if solved.grid.fitted:
        # [B, G, g]: the columns of each group; stable, so in the order that they were visited
        members = torch.stack([torch.argsort(g, stable=True).view(count, -1) for g in solved.groups])
    if solved.grid.fitted and k // count <= _PANEL:
        several = _PANEL // (k // count)
        panels = [
            (members[:, i : i + several].flatten(1), slice(i, min(i + several, count)))
            for i in range(0, count, several)
        ]
    else:
        for group in range(count) if solved.grid.fitted else ():
            _refit_wide(solved, hessians, group, members[:, group])
        every = torch.arange(k, device=solved.errors.device).expand(len(hessians), k)
        panels = [(every[:, i : i + _PANEL], None) for i in range(0, k, _PANEL)]
    for columns, groups in panels:
        _refine_panel(solved, hessians, columns, groups)


def _refine_panel(
    solved: Solved, hessians: Sequence[torch.Tensor], columns: torch.Tensor, groups: slice | None
) -> None:
    """Refines some columns, [B, P] of each weight; ``groups``: which groups they make up, whole and in
    order, or None."""
    width = columns.shape[1]
    rows: list[torch.Tensor] = []
    for b, (hessian, own) in enumerate(zip(hessians, columns, strict=True)):
        # slices of one weight, which have one Hessian and one order
        same = b > 0 and hessian is hessians[0] and solved.groups[b] is solved.groups[0]
        rows.append(rows[0] if same else hessian.index_select(0, own))
    among = stacked([r.index_select(1, c) for r, c in zip(rows, columns, strict=True)])
    made = [product(r, solved.errors[:, b]) for b, r in enumerate(rows)]
    if on_accelerator(among):
        pushed = made[0].unsqueeze(1) if len(made) == 1 else torch.stack(made, 1)
        of = stacked([g[c] for g, c in zip(solved.groups, columns, strict=True)])
        size = 0 if groups is None else width // (groups.stop - groups.start)
        refine_columns(
            solved.errors, solved.codes, solved.scales, solved.zeros, pushed, among, columns, of, size,
            solved.grid,
        )  # fmt: skip
        return
    pushed = torch.stack(made, 1)
    codes = _take(solved.codes, columns).float()
    moved = torch.zeros_like(pushed)
    if groups is None:
        of = torch.stack([g[c] for g, c in zip(solved.groups, columns, strict=True)])
        scales, size = _take(solved.scales, of), width
    else:
        scales = solved.scales[groups]
        size = width // len(scales)
    inverse = 1.0 / scales
    for start in (i for begin in range(0, width, size) for i in range(begin, begin + size, _RUN)):
        end = min(start + _RUN, start - start % size + size)
        run, later = slice(start, end), slice(end, width)
        if groups is not None and solved.grid.fitted and not start % size:
            group, whole = start // size, slice(start, start + size)
            zeros = None if solved.zeros is None else solved.zeros[groups][group]
            shifted = codes[whole] if zeros is None else codes[whole] - zeros
            curve = (shifted * _product(among[:, whole, whole], shifted)).sum(0)
            change = fit(scales[group], (shifted * pushed[whole]).sum(0), curve, solved.grid.stored)
            inverse[group] = 1.0 / scales[group]
            shifted = shifted * change
            moved[whole] += shifted
            pushed[start:] -= _product(among[:, start:, whole], shifted)
        if groups is None:
            own, small = scales[run], inverse[run]
        else:
            own, small = (x[start // size].expand(end - start, *x.shape[1:]) for x in (scales, inverse))
        stepped = _descend(pushed[run], codes[run], own, small, among[:, run, run], solved.grid)
        moved[run] += stepped
        if end < width:
            pushed[later] -= _product(among[:, later, run], stepped)
    for b, places in enumerate(columns):
        solved.errors[:, b].index_add_(0, places, moved[:, b], alpha=-1)
        solved.codes[:, b].index_copy_(0, places, codes[:, b].to(solved.codes.dtype))


def _descend(
    pushed: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    inverse: torch.Tensor,
    among: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Changes each code of a run of columns, one column after another, to the one of least loss.

    Args:
        pushed: H · E of the run's columns, [R, B, N]; kept up to date.
        codes: fp32 [R, B, N], changed in place.
        scales, inverse: of each column, and their reciprocals, [R, B, N].
        among: H among the columns, [B, R, R].

    Returns:
        by how much values rose, [R, B, N].
    """
    rises = torch.empty_like(pushed)
    between = among.permute(1, 2, 0).unsqueeze(-1)  # [R, R, B, 1]
    softness = 1.0 / between.diagonal().permute(2, 0, 1)  # [R, B, 1]
    last = len(pushed) - 1
    for i, (push, code, scale, small, rise) in enumerate(
        zip(pushed.unbind(), codes.unbind(), scales.unbind(), inverse.unbind(), rises.unbind(), strict=True)
    ):
        torch.mul(push, small, out=rise)
        torch.addcmul(code, rise, softness[i], out=rise)
        rise.copy_(grid.nearest(rise)).sub_(code)
        code.add_(rise)
        rise.mul_(scale)
        if i < last:
            pushed[i + 1 :].addcmul_(between[i + 1 :, i], rise, value=-1)
    return rises


def _refit_wide(solved: Solved, hessians: Sequence[torch.Tensor], group: int, members: torch.Tensor) -> None:
    """Fits the scales of one group of many columns, ``members`` [B, g] of each weight."""
    scales = solved.scales[group]
    zeros = None if solved.zeros is None else solved.zeros[group]
    slope, curve = torch.zeros_like(scales), torch.zeros_like(scales)
    alone = len(solved.scales) == 1
    step = _MANY if on_accelerator(scales) else _PANEL
    for b, (hessian, own) in enumerate(zip(hessians, members, strict=True)):
        shifted = solved.codes[:, b].index_select(0, own).float()
        shifted = shifted if zeros is None else shifted.sub_(zeros[b])
        for start in range(0, len(own), step):
            some = own[start : start + step]
            rows, part = hessian.index_select(0, some), shifted[start : start + step]
            applied = product(rows if alone else rows.index_select(1, own), shifted)
            curve[b] += (part * applied).sum(0)
            # E · H · codes is read from either side
            if alone:
                slope[b] += (solved.errors[:, b].index_select(0, some) * applied).sum(0)
            else:
                slope[b] += (part * product(rows, solved.errors[:, b])).sum(0)
    change = fit(scales, slope, curve, solved.grid.stored)
    for b, own in enumerate(members):
        shifted = solved.codes[:, b].index_select(0, own).float()
        shifted = shifted if zeros is None else shifted.sub_(zeros[b])
        solved.errors[:, b].index_add_(0, own, shifted.mul_(change[b]), alpha=-1)


def _take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[P, B, N]: of values [K, B, N] the rows [B, P] of each weight."""
    return torch.stack([values[:, b].index_select(0, own) for b, own in enumerate(places)], 1)


def _product(matrices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[P, B, N] of matrices [B, P, R] and values [R, B, N]; on a CPU each weight's own, so that its codes do
    not depend on the batch."""
    if not on_accelerator(values):
        return torch.stack([matrix @ values[:, b] for b, matrix in enumerate(matrices)], 1)
    return torch.bmm(matrices, values.transpose(0, 1)).transpose(0, 1)
