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
the last two ever raises the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quant.quantizers.grids import Grid

#: Outputs of a block of H_O, at the most.
OUTPUTS = 256
#: Rows and columns of a tile whose weights are rounded along its diagonals; and elements of all tiles that
#: are rounded at once from which on tiles are smaller, because the work on them outweighs its overhead.
_TILE, _SMALL_TILE, _MANY = 128, 64, 1 << 17
#: Columns of a sweep that are looked at with one product of matrices.
_PANEL = 64
#: Codes of a column and block that a sweep may change.
_CHANGES = 8
#: Steps of conjugate gradients in a refit.
_STEPS = 2


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
        codes: fp32 [N, K], those of ``grid``.
        scales: fp32 [N, G], as a file holds them.
        zeros: fp32 [N, G], or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    grid: Grid

    @property
    def shifted(self) -> torch.Tensor:
        """[N, G, g]: what scales are multiplied with."""
        grouped = self.codes.view(*self.scales.shape, -1)
        return grouped if self.zeros is None else grouped - self.zeros.unsqueeze(-1)

    def errors(self, weight: torch.Tensor) -> torch.Tensor:
        """E [N, K] of a weight [N, K]."""
        return weight - (self.shifted * self.scales.unsqueeze(-1)).view(weight.shape)


def loss(errors: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """fp32 [B], the loss of errors [N, K] block by block: its blocks add up.

    Args:
        inputs: H_I [K, K].
        outputs: H_O [B, b, b].
    """
    blocks = _blocked(errors, outputs)
    pushed = _blocked(errors @ inputs, outputs)
    return (torch.bmm(outputs, pushed) * blocks).sum((1, 2))


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
    """Codes fp32 [N, K] of a weight fp32 [N, K], rounded one by one with feedback along both dimensions.

    With H_I = R·Rᵀ and U its R with every column divided by its diagonal, V likewise of H_O, weight (i, k) is
    rounded from

        W_ik + g_ik + Σ_{j<i} V_ji · T_jk,   g_ik = Σ_{l<k} E_il · U_lk,   T = E + g

    Both sums are of what has been rounded already. The weights of a diagonal of a tile depend on none of each
    other, so a diagonal of the same tile of all blocks is rounded at once; what tiles push onto others are
    products of matrices.

    Args:
        scales, zeros: fp32 [N, G], of groups in file order.
        inputs: R of H_I [K, K] in the order of ``columns`` [K]; below its diagonal anything.
        outputs: R of each block of H_O [B, b, b] in the order of its ``rows`` [B, b]; likewise.
    """
    n, k = weight.shape
    count, size, _ = outputs.shape
    group = k // scales.shape[1]
    unit = torch.triu(outputs, 1) / outputs.diagonal(dim1=1, dim2=2).unsqueeze(1)
    places = (rows + torch.arange(count, device=rows.device).unsqueeze(1) * size).view(-1)
    arranged = _padded(weight, count * size)[places].index_select(1, columns)
    steps = _padded(scales, count * size, 1.0)[places]
    shifts = None if zeros is None else _padded(zeros, count * size)[places]
    errors, codes = torch.zeros_like(arranged), torch.empty_like(arranged)
    tile = _TILE if count * _TILE * _TILE <= _MANY else _SMALL_TILE
    for start in range(0, k, tile):
        panel = slice(start, min(start + tile, k))
        groups = columns[panel] // group
        known = torch.zeros(count * size, panel.stop - start, device=weight.device)
        if start:
            torch.mm(errors[:, :start], inputs[:start, panel] / inputs.diagonal()[panel], out=known)
        corner = torch.triu(inputs[panel, panel], 1) / inputs.diagonal()[panel]
        given = [arranged[:, panel], known, steps.index_select(1, groups)]
        given += [] if shifts is None else [shifts.index_select(1, groups)]
        made = _round_panel(
            [x.view(count, size, -1).flip(2).transpose(1, 2) for x in given],
            corner.t().flip(0, 1).contiguous(), unit, tile, grid,
        )  # fmt: skip
        for target, value in zip((codes, errors), made, strict=True):
            target[:, panel] = value.transpose(1, 2).flip(2).reshape(count * size, -1)
    result = torch.empty_like(codes)
    result[places[:, None], columns] = codes
    return result[:n]


def _round_panel(
    given: list[torch.Tensor], corner: torch.Tensor, unit: torch.Tensor, tile: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors of a panel of columns, [B, C, b] with its columns in reverse.

    Args:
        given: weights, what earlier panels feed back, scales and, where there are any, zeros; each likewise.
        corner: [C, C], of what column feeds back on which in the panel, columns in reverse.
        unit: V of each block, [B, b, b], without its diagonal.
    """
    count, width, size = given[0].shape
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
            inner = (error[:, i:end, first:] * corner[first:last, first:]).sum(-1)
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
        weight: fp32 [N, K].
        inputs, outputs: H_I [K, K] and H_O [B, b, b].

    Returns:
        them, and the loss before and after, fp32 [B].
    """
    shape, shifted = made.scales.shape, made.shifted
    count = len(outputs)

    def down(values: torch.Tensor) -> torch.Tensor:
        """Of [N, K] what each scale is multiplied with."""
        return (values.view(shifted.shape) * shifted).sum(-1)

    def along(values: torch.Tensor) -> torch.Tensor:
        """H_O · X · H_I of X [N, K]."""
        return torch.bmm(outputs, _blocked(values @ inputs, outputs)).view(-1, values.shape[1])[: len(values)]

    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """By block, [B, 1] for each output."""
        return _blocked(x * y, outputs).sum((1, 2), keepdim=True).clamp_min(1e-38)

    def spread(x: torch.Tensor) -> torch.Tensor:
        """[N, 1] of numbers by block."""
        return x.expand(count, outputs.shape[1], 1).reshape(-1, 1)[: shape[0]]

    errors = made.errors(weight)
    pushed = along(errors)
    before = _blocked(errors * pushed, outputs).sum((1, 2))
    size = shifted.shape[2]
    own = torch.stack(
        [
            (
                (shifted[:, a] @ inputs[a * size : (a + 1) * size, a * size : (a + 1) * size]) * shifted[:, a]
            ).sum(-1)
            for a in range(shape[1])
        ],
        1,
    )
    own *= outputs.diagonal(dim1=1, dim2=2).reshape(-1, 1)[: shape[0]]
    own.clamp_min_(own.mean() * 1e-6 + 1e-38)
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
    kept = scales.isfinite() & (scales > 1e-3 * made.scales)
    rounded = made.grid.stored(torch.where(kept, scales, made.scales))
    after = loss(replace(made, scales=rounded).errors(weight), inputs, outputs)
    lower = after < before
    chosen = torch.where(spread(lower.view(-1, 1, 1)), rounded, made.scales)
    return replace(made, scales=chosen), before, torch.where(lower, after, before)


def descend(
    weight: torch.Tensor,
    made: Codes,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    sweeps: int = 1,
) -> tuple[Codes, torch.Tensor]:
    """The same scales with codes that lower the loss: column by column, of each block the code whose change
    lowers it most, then the next, until none does or :data:`_CHANGES` were changed.

    Args:
        weight: fp32 [N, K].
        inputs, outputs: H_I [K, K] and H_O [B, b, b].

    Returns:
        the codes, and by how much the loss is lower, fp32 [B].
    """
    n, k = weight.shape
    count, size, _ = outputs.shape
    errors = _padded(made.errors(weight), count * size)
    codes = _padded(made.codes, count * size).clone()
    steps, group = _padded(made.scales, count * size, 1.0), k // made.scales.shape[1]
    order = torch.argsort(inputs.diagonal(), descending=True, stable=True)
    gained = torch.zeros(count, device=weight.device)
    for _ in range(sweeps):
        before = gained.clone()
        for start in range(0, k, _PANEL):
            panel = order[start : start + _PANEL]
            pushed = (errors @ inputs[:, panel]).view(count, size, -1)
            given = (
                torch.bmm(outputs, pushed),
                *(x.view(count, size, -1) for x in (codes[:, panel], steps[:, panel // group])),
            )
            slopes, current, scales = (x.permute(2, 0, 1).contiguous() for x in given)
            start_codes = current.clone()
            gained += _descend_panel(slopes, current, scales, inputs[panel][:, panel], outputs, made.grid)
            delta = (current - start_codes).mul_(scales)
            codes[:, panel] = current.permute(1, 2, 0).reshape(count * size, -1)
            errors[:, panel] -= delta.permute(1, 2, 0).reshape(count * size, -1)
        if torch.equal(gained, before):
            break
    return replace(made, codes=codes[:n]), gained


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
        among: H_I [P, P] among its columns.

    Returns:
        by how much the loss is lower, fp32 [B].
    """
    blocks = torch.arange(len(outputs), device=outputs.device)
    gained = torch.zeros(len(outputs), device=outputs.device)
    weights = outputs.diagonal(dim1=1, dim2=2).clamp_min(1e-38)
    for j, curvature in enumerate(among.diagonal().tolist()):
        if not curvature > 0:
            continue
        slope, code, scale, curve = slopes[j], codes[j], scales[j], weights * curvature
        began, divisor = slope.clone(), curve * scale
        for _ in range(_CHANGES):
            # the least of a parabola in this code, all others as they are
            target = grid.nearest((slope / divisor).add_(code))
            step = (target - code).mul_(scale)
            gain, best = torch.addcmul(2 * slope, step, curve, value=-1).mul_(step).max(1)
            better = gain > 0
            if not bool(better.any()):
                break
            chosen = torch.where(better, step[blocks, best], 0.0)
            code[blocks, best] = torch.where(better, target[blocks, best], code[blocks, best])
            slope -= outputs[blocks, best] * (chosen * curvature).unsqueeze(1)
            gained += torch.where(better, gain, 0.0)
        if j + 1 < len(slopes):
            slopes[j + 1 :] -= among[j, j + 1 :, None, None] * (began - slope).div_(curvature)
    return gained


def _padded(values: torch.Tensor, rows: int, fill: float = 0.0) -> torch.Tensor:
    """[rows, …] of values [N, …], ``fill`` behind them."""
    if len(values) == rows:
        return values
    return torch.cat([values, values.new_full((rows - len(values), *values.shape[1:]), fill)])


def _blocked(values: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """[B, b, …] of values [N, …], zeros behind them."""
    count, size, _ = outputs.shape
    return _padded(values, count * size).view(count, size, -1)
