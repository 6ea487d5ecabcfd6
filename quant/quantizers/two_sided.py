"""Rounding under two Hessians, one of a linear's inputs and one of the gradients at its outputs: pure
functions on any device.

Of a linear y = W·x whose weights [N, K] become Ŵ, the loss that these functions lower is

    tr(H_O · E · H_I · Eᵀ),  E = W - Ŵ

where H_I [K, K] is of the inputs and H_O [N, N] of the outputs: the Kronecker approximation of the second
derivatives of the model's KL divergence by W (Tseng et al. 2025, YAQA, arXiv:2505.22988). With H_O = I it is
the loss of GPTQ. H_O is kept as blocks along its diagonal, [B, b, b], between which outputs do not feed back:
block i is of outputs i·b … (i+1)·b - 1, and those behind the last output are padding.

:func:`feed_back` rounds one weight after another and moves errors onto the weights that follow, along both
dimensions; :func:`refit` then fits the scales to the codes; :func:`descend` changes single codes. Neither of
the last two ever raises the loss. Several weights of one shape, each with Hessians of its own, go through
all of them at once with one more dimension in front: a step is short, and costs as much for one as for some.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quant.accelerator import on_accelerator
from quant.quantizers.columns import kernels_for
from quant.quantizers.grids import Grid
from quant.quantizers.products import product

#: Outputs of a block of H_O, at the most: where nothing else is asked for, and that may be asked for.
OUTPUTS, MOST_OUTPUTS = 256, 4096
#: Rows and columns of a tile whose weights are rounded along its diagonals; and elements of all tiles that
#: are rounded at once from which on tiles are smaller, because the work on them outweighs its overhead.
_TILE, _SMALL_TILE, _MANY = 128, 64, 1 << 17
#: Columns of a sweep that are looked at with one product of matrices.
_PANEL = 64
#: Codes of a column that a sweep may change, of a block of H_O of up to so many outputs; as many more of a
#: larger one.
_CHANGES, _AMONG = 4, 256
#: Steps of conjugate gradients in a refit: a second one lowers the loss by a fiftieth of a per cent more.
_STEPS = 1


def blocks_of(outputs: int, most: int = OUTPUTS) -> tuple[int, int]:
    """Number and size of the blocks of H_O for so many outputs.

    >>> blocks_of(384), blocks_of(200)
    ((2, 192), (1, 200))
    """
    count = -(-outputs // most)
    return count, -(-outputs // count)


@dataclass(frozen=True)
class Codes:
    """Codes under way: values are (codes - zeros) · scales.

    Attributes:
        codes: fp32 [..., N, K], those of ``grid``.
        scales: fp32 [..., N, G], as a file holds them.
        zeros: fp32 [..., N, G], or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    grid: Grid

    @property
    def shifted(self) -> torch.Tensor:
        """[..., N, G, g]: what scales are multiplied with."""
        grouped = self.codes.view(*self.scales.shape, -1)
        return grouped if self.zeros is None else grouped - self.zeros.unsqueeze(-1)

    def errors(self, weight: torch.Tensor) -> torch.Tensor:
        """E [..., N, K] of a weight [..., N, K]."""
        return weight - (self.shifted * self.scales.unsqueeze(-1)).view(weight.shape)


def loss(errors: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """fp32 [..., B], the loss of errors [..., N, K] block by block: its blocks add up.

    Args:
        inputs: H_I [..., K, K].
        outputs: H_O [..., B, b, b].
    """
    blocks = _blocked(errors, outputs)
    return (_along(errors, inputs, outputs) * blocks).sum((-2, -1))


def feed_back(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: torch.Tensor,
    columns: torch.Tensor,
    outputs: torch.Tensor,
    rows: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Codes fp32 [..., N, K] of a weight fp32 [..., N, K], rounded one by one with feedback along both
    dimensions.

    With H_I = R·Rᵀ and U its R with every column divided by its diagonal, V likewise of H_O, weight (i, k) is
    rounded from

        W_ik + g_ik + Σ_{j<i} V_ji · T_jk,   g_ik = Σ_{l<k} E_il · U_lk,   T = E + g

    Both sums are of what has been rounded already. The weights of a diagonal of a tile depend on none of each
    other, so a diagonal of the same tile of all blocks is rounded at once, of several weights at once, too;
    what tiles push onto others are products of matrices.

    Args:
        scales, zeros: fp32 [..., N, G], of groups in file order.
        inputs: R of H_I [..., K, K] in the order of ``columns`` [..., K]; below its diagonal anything.
        outputs: R of each block of H_O [..., B, b, b] in the order of its ``rows`` [..., B, b]; likewise.
    """
    if weight.ndim == 2:
        shift = None if zeros is None else zeros[None]
        given = weight[None], scales[None], shift, inputs[None], columns[None], outputs[None], rows[None]
        return feed_back(*given, grid)[0]
    sets, n, k = weight.shape
    count, size = rows.shape[1:]
    group = k // scales.shape[2]
    unit = torch.triu(outputs, 1) / outputs.diagonal(dim1=2, dim2=3).unsqueeze(2)
    places = (rows + torch.arange(count, device=rows.device).unsqueeze(1) * size).view(sets, -1)

    def arranged(values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        padded = _padded(values, count * size, fill)
        return torch.stack([x[place] for x, place in zip(padded, places, strict=True)])

    ordered = _columns(arranged(weight), columns)
    steps, shifts = arranged(scales, 1.0), None if zeros is None else arranged(zeros)
    errors, codes = torch.zeros_like(ordered), torch.empty_like(ordered)
    kernels = kernels_for(weight)
    tile = _TILE if sets * count * _TILE * _TILE <= _MANY else _SMALL_TILE
    for start in range(0, k, tile):
        panel = slice(start, min(start + tile, k))
        groups = columns[:, panel] // group
        scale = inputs.diagonal(dim1=1, dim2=2)[:, None, panel]
        known = torch.zeros(sets, count * size, panel.stop - start, device=weight.device)
        if start:
            known = products(errors[:, :, :start], inputs[:, :start, panel] / scale)
        corner = torch.triu(inputs[:, panel, panel], 1) / scale
        read = [ordered[:, :, panel], known, _columns(steps, groups)]
        read += [] if shifts is None else [_columns(shifts, groups)]
        if kernels is not None:
            blocked = [x.reshape(sets * count, size, -1) for x in read]
            made = kernels.round_both(
                *blocked[:3], None if shifts is None else blocked[3], corner.contiguous(),
                unit.view(-1, size, size), *grid.numbers,
            )  # fmt: skip
            for target, value in zip((codes, errors), made, strict=True):
                target[:, :, panel] = value.view(sets, count * size, -1)
            continue
        made = _round_panel(
            [x.view(sets * count, size, -1).flip(2).transpose(1, 2) for x in read],
            corner.transpose(1, 2).flip(1, 2).contiguous(), unit.view(-1, size, size), tile, grid,
        )  # fmt: skip
        for target, value in zip((codes, errors), made, strict=True):
            target[:, :, panel] = value.transpose(1, 2).flip(2).reshape(sets, count * size, -1)
    result = torch.empty_like(codes)
    for target, code, place, order in zip(result, codes, places, columns, strict=True):
        target[place[:, None], order] = code
    return result[:, :n]


def _round_panel(
    given: list[torch.Tensor], corner: torch.Tensor, unit: torch.Tensor, tile: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors of a panel of columns, [B, C, b] with its columns in reverse.

    Args:
        given: weights, what earlier panels feed back, scales and, where there are any, zeros; each likewise.
        corner: [S, C, C], of what column feeds back on which in the panel, columns in reverse; of B / S
            blocks each.
        unit: V of each block, [B, b, b], without its diagonal.
    """
    count, width, size = given[0].shape
    if len(corner) > 1:
        corner = corner.repeat_interleave(count // len(corner), 0)
    codes, errors = torch.empty_like(given[0]), torch.empty_like(given[0])
    moved = torch.zeros(count, width, size, device=corner.device)  # T
    for top in range(0, size, tile):
        rows = slice(top, min(top + tile, size))
        weight, known, scale, *zero = (x[:, :, rows].contiguous() for x in given)
        base = weight + known
        if top:
            base += torch.bmm(moved[:, :, :top], unit[:, :top, rows])
        above = unit[:, rows, rows].transpose(1, 2).contiguous()
        height = rows.stop - top
        code, error = torch.empty_like(weight), torch.zeros(count, height, width, device=corner.device)
        push = torch.zeros_like(weight)
        for offset in range(1 - width, height):
            first, i = max(0, -offset), max(0, offset)
            last = first + min(width - first, height - i)
            end = i + last - first
            inner = (error[:, i:end, first:] * corner[:, first:last, first:]).sum(-1)
            outer = (push[:, first:last, :end] * above[:, i:end, :end]).sum(-1)
            fed = known.diagonal(offset, 1, 2) + inner
            step, value = scale.diagonal(offset, 1, 2), weight.diagonal(offset, 1, 2)
            number = (base.diagonal(offset, 1, 2) + inner).add_(outer).div_(step)
            if zero:
                shift = zero[0].diagonal(offset, 1, 2)
                number.add_(shift)
            number = grid.nearest(number)
            code.diagonal(offset, 1, 2).copy_(number)
            missed = torch.addcmul(value, number - shift if zero else number, step, value=-1)
            error.diagonal(-offset, 1, 2).copy_(missed)
            push.diagonal(offset, 1, 2).copy_(fed.add_(missed))
        codes[:, :, rows], errors[:, :, rows], moved[:, :, rows] = code, error.transpose(1, 2), push
    return codes, errors


def refit(
    weight: torch.Tensor, made: Codes, inputs: torch.Tensor, outputs: torch.Tensor, steps: int = _STEPS
) -> tuple[Codes, torch.Tensor, torch.Tensor]:
    """The same codes with scales that lower the loss: conjugate gradients on its quadratic in the scales,
    block by block, rounded to the stored dtype. A block whose loss that would raise keeps its scales.

    Args:
        weight: fp32 [..., N, K].
        inputs, outputs: H_I [..., K, K] and H_O [..., B, b, b].

    Returns:
        them, and the loss before and after, fp32 [..., B].
    """
    shape, shifted = made.scales.shape, made.shifted
    rows, groups, size = shifted.shape[-3:]

    def down(values: torch.Tensor) -> torch.Tensor:
        """Of [..., N, K] what each scale is multiplied with."""
        return (values.view(shifted.shape) * shifted).sum(-1)

    def along(values: torch.Tensor) -> torch.Tensor:
        """H_O · X · H_I of X [..., N, K]."""
        return _along(values, inputs, outputs).flatten(-3, -2)[..., :rows, :]

    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """By block, [..., B]."""
        return _blocked(x * y, outputs).sum((-2, -1)).clamp_min(1e-38)

    def spread(x: torch.Tensor) -> torch.Tensor:
        """[..., N, 1] of numbers by block [..., B]."""
        return x.repeat_interleave(outputs.shape[-1], -1)[..., :rows].unsqueeze(-1)

    errors = made.errors(weight)
    pushed = along(errors)
    before = _blocked(errors * pushed, outputs).sum((-2, -1))
    own = torch.empty_like(made.scales)
    for a in range(groups):
        among = slice(a * size, (a + 1) * size)
        own[..., a] = (products(shifted[..., a, :], inputs[..., among, among]) * shifted[..., a, :]).sum(-1)
    own *= outputs.diagonal(dim1=-2, dim2=-1).flatten(-2)[..., :rows].unsqueeze(-1)
    own = torch.maximum(own, own.mean((-2, -1), keepdim=True) * 1e-6 + 1e-38)
    scales, residual = made.scales.clone(), down(pushed)
    step = direction = residual / own
    left = dot(residual, step)
    for _ in range(steps):
        applied = down(along((direction.unsqueeze(-1) * shifted).view(weight.shape)))
        length = spread(left / dot(direction, applied))
        scales += length * direction
        residual -= length * applied
        step = residual / own
        now = dot(residual, step)
        direction = step + spread(now / left) * direction
        left = now
    # a scale that would turn the signs of its group, or lose it, stays
    kept = scales.isfinite() & (scales / made.scales > 1e-3)
    rounded = made.grid.stored(torch.where(kept, scales, made.scales))
    after = loss(replace(made, scales=rounded).errors(weight), inputs, outputs)
    lower = after < before
    chosen = torch.where(spread(lower), rounded, made.scales)
    return replace(made, scales=chosen.view(shape)), before, torch.where(lower, after, before)


def descend(
    weight: torch.Tensor,
    made: Codes,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    sweeps: int = 1,
) -> tuple[Codes, torch.Tensor]:
    """The same scales with codes that lower the loss: column by column, of each block the code whose change
    lowers it most, then the next, until none does or as many as :data:`_CHANGES` says were
    changed.

    Args:
        weight: fp32 [..., N, K].
        inputs, outputs: H_I [..., K, K] and H_O [..., B, b, b].

    Returns:
        the codes, and by how much the loss is lower, fp32 [..., B].
    """
    if weight.ndim == 2:
        shift = None if made.zeros is None else made.zeros[None]
        one = replace(made, codes=made.codes[None], scales=made.scales[None], zeros=shift)
        one, gained = descend(*(weight[None], one, inputs[None], outputs[None]), sweeps)
        return replace(made, codes=one.codes[0]), gained[0]
    sets, n, k = weight.shape
    count, size = outputs.shape[1:3]
    errors = _padded(made.errors(weight), count * size)
    codes = _padded(made.codes, count * size).clone()
    steps, group = _padded(made.scales, count * size, 1.0), k // made.scales.shape[2]
    order = torch.argsort(inputs.diagonal(dim1=1, dim2=2), descending=True, stable=True)
    blocks = outputs.view(-1, size, size)
    gained = torch.zeros(sets * count, device=weight.device)
    for _ in range(sweeps):
        before = gained.clone()
        for start in range(0, k, _PANEL):
            panel = order[:, start : start + _PANEL]
            beside = _columns(inputs, panel)  # [S, K, P]
            given = (
                torch.bmm(blocks, products(errors, beside).view(sets * count, size, -1)),
                *(
                    _columns(x, p).view(sets * count, size, -1)
                    for x, p in ((codes, panel), (steps, panel // group))
                ),
            )
            slopes, current, scales = (x.permute(2, 0, 1).contiguous() for x in given)
            start_codes = current.clone()
            among = torch.stack([x[p] for x, p in zip(beside, panel, strict=True)])
            gained += _descend_panel(slopes, current, scales, among, blocks, made.grid)
            delta = (current - start_codes).mul_(scales)
            changes = current, delta
            new, moved = (x.permute(1, 2, 0).reshape(sets, count * size, -1) for x in changes)
            for i, columns in enumerate(panel):
                codes[i][:, columns] = new[i]
                errors[i][:, columns] -= moved[i]
        if torch.equal(gained, before):
            break
    return replace(made, codes=codes[:, :n]), gained.view(sets, count)


def _descend_panel(
    slopes: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    among: torch.Tensor,
    outputs: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """:func:`descend` on a panel of columns, in place.

    Args:
        slopes: (H_O · E · H_I) of its columns, [P, B, b]; codes and their scales likewise.
        among: H_I [S, P, P] among its columns; of B / S blocks each.

    Returns:
        by how much the loss is lower, fp32 [B].
    """
    changes = _CHANGES * max(1, outputs.shape[-1] // _AMONG)
    if (kernels := kernels_for(outputs)) is not None:
        given = slopes, codes, scales, among.contiguous(), outputs.contiguous(), changes
        lower: torch.Tensor = kernels.descend(*given, *grid.numbers)
        return lower
    blocks = torch.arange(len(outputs), device=outputs.device)
    gained = torch.zeros(len(outputs), device=outputs.device)
    weights = outputs.diagonal(dim1=1, dim2=2).clamp_min(1e-38)
    sets, each = len(among), len(outputs) // len(among)
    curvatures = among.diagonal(dim1=1, dim2=2).t()  # [P, S]
    live = (curvatures > 0).repeat_interleave(each, 1)
    curvatures = torch.where(curvatures > 0, curvatures, 1.0).repeat_interleave(each, 1)  # [P, B]
    # by how much each column's changes have turned its own slopes, for each unit of its curvature
    turned = torch.zeros(sets, len(slopes), slopes[0].numel() // sets, device=outputs.device)
    for j, (curvature, some) in enumerate(zip(curvatures.unsqueeze(-1), live, strict=True)):
        slope, code, scale, curve = slopes[j], codes[j], scales[j], weights * curvature
        if j:  # all at once when the column is reached: each at its change would read all that are ahead
            slope -= torch.bmm(among[:, j : j + 1, :j], turned[:, :j]).view(slope.shape)
        began, inverse = slope.clone(), 1 / (curve * scale)
        for _ in range(changes):
            # the least of a parabola in this code, all others as they are
            target = grid.nearest(torch.addcmul(code, slope, inverse))
            step = (target - code).mul_(scale)
            gain, best = torch.addcmul(2 * slope, step, curve, value=-1).mul_(step).max(1)
            better = (gain > 0) & some
            if not bool(better.any()):
                break
            chosen = torch.where(better, step[blocks, best], 0.0)
            code[blocks, best] = torch.where(better, target[blocks, best], code[blocks, best])
            slope -= outputs[blocks, best] * (chosen.unsqueeze(1) * curvature)
            gained += torch.where(better, gain, 0.0)
        turned[:, j] = (began - slope).div_(curvature).view(sets, -1)
    return gained


def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """fp32 [..., M, N] of fp32 [..., M, K] and [..., K, N]. On a CPU one after another: the faster library
    does not take a batch of them."""
    if on_accelerator(left):
        return left @ right
    if left.ndim == 2:
        return product(left, right)
    return torch.stack([product(x, y) for x, y in zip(left, right, strict=True)])


def _along(values: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """H_O · X · H_I of X [..., N, K], [..., B, b, K]."""
    return outputs @ _blocked(products(values, inputs), outputs)


def _columns(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns [S, N, C] of values [S, N, K] in each one's order [S, C]."""
    if len(values) == 1:
        return values.index_select(2, order[0])
    return torch.stack([x.index_select(1, o) for x, o in zip(values, order, strict=True)])


def _padded(values: torch.Tensor, rows: int, fill: float = 0.0) -> torch.Tensor:
    """[..., rows, X] of values [..., N, X], ``fill`` behind them."""
    if (missing := rows - values.shape[-2]) == 0:
        return values
    return torch.cat([values, values.new_full((*values.shape[:-2], missing, values.shape[-1]), fill)], -2)


def _blocked(values: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """[..., B, b, X] of values [..., N, X], zeros behind them."""
    count, size = outputs.shape[-3:-1]
    return _padded(values, count * size).view(*values.shape[:-2], count, size, -1)
