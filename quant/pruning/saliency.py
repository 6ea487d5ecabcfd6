"""Which of a block's units are needed least, and what the others become without them: pure functions of
matrices.

Units are runs of columns of the matrix that reads them: channels of an MLP before its down projection, the
outputs of a group of heads before the output projection. With H = E[x·xᵀ] of its inputs, the outputs lose
tr(W_u·((H⁻¹)_uu)⁻¹·W_uᵀ) when unit u goes and all other columns make up for it as well as they can; when it
has gone, the loss of each other one is another (the structured form of optimal brain surgeon that Kurtic et
al. 2023, arXiv:2302.04089, prune transformers by).
"""

from __future__ import annotations

import torch

from quant.errors import SourceFault
from quant.quantizers.factors import damp

#: Share of the Hessian's diagonal that is added to it.
DAMPING = 0.01
#: Rounds in which units go; in each, those of the least loss together.
_ROUNDS = 32


def least_units(
    weight: torch.Tensor, hessian: torch.Tensor, size: int, stay: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The units without which the outputs lose least.

    Args:
        weight: fp32 [N, K], the matrix that reads them.
        hessian: fp32 [K, K], mean of x·xᵀ.
        size: columns of a unit, which lie beside one another.
        stay: how many stay, of K / size.

    Returns:
        int64 [stay], those that stay, rising; and fp32 [K / size], what each would have cost when it went, or
        would cost next: mean squared error of the outputs, summed over them.

    Raises:
        SourceFault: the inputs are not finite, or H cannot be inverted.
    """
    units = weight.shape[1] // size
    values, inverse = weight.clone(), inverted(hessian)
    left = torch.ones(units, dtype=torch.bool, device=weight.device)
    costs = torch.zeros(units, device=weight.device)
    going = units - stay
    most = max(1, -(-going // _ROUNDS))
    while True:
        alive = left.nonzero().squeeze(1)
        costs[alive] = _losses(values, inverse, size)[alive]
        if not going:
            break
        count = min(most, going)
        gone = alive[costs[alive].argsort(stable=True)[:count]]
        columns = (gone[:, None] * size + torch.arange(size, device=gone.device)).flatten()
        _without(values, inverse, columns)
        left[gone] = False
        going -= count
    return left.nonzero().squeeze(1).cpu(), costs.cpu()


def inverted(hessian: torch.Tensor) -> torch.Tensor:
    """The inverse of the damped H [K, K]; ``hessian`` is left as it is.

    Raises:
        SourceFault: see :func:`least_units`.
    """
    for rung in range(4):
        damped = hessian.clone()
        damp(damped.diagonal(), DAMPING * 10**rung, rung > 0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(lower.diagonal().isfinite().all()):
            return torch.cholesky_inverse(lower)
    raise SourceFault("inputs of a block are not finite or all alike: run quant evaluate on the source")


def _losses(values: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    """fp32 [K / size], of each unit; of one that has gone 0."""
    if size == 1:
        diagonal = inverse.diagonal()
        # what has gone has a row of zeros
        return values.square().sum(0) / diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny)
    units = inverse.shape[0] // size
    squares = torch.stack([inverse[s : s + size, s : s + size] for s in range(0, units * size, size)])
    columns = values.unflatten(1, (units, size)).permute(1, 2, 0)  # [U, size, N]
    live = squares.diagonal(dim1=1, dim2=2).sum(1) > 0
    losses = torch.zeros(units, device=values.device)
    solved = torch.linalg.solve(squares[live], columns[live])
    losses[live] = (columns[live] * solved).sum((1, 2))
    return losses


def _without(values: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor) -> None:
    """Takes columns out of W and of H⁻¹, in place: the others of W make up for them, and H⁻¹ becomes the
    inverse of what is left of H."""
    square = inverse[columns][:, columns]
    solved = torch.linalg.solve(square, inverse[columns])  # [c, K]
    values -= values[:, columns] @ solved
    inverse -= inverse[:, columns] @ solved
    values[:, columns] = 0.0
    inverse[columns], inverse[:, columns] = 0.0, 0.0


def made_up_for(weight: torch.Tensor, hessian: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The matrix fp32 [N, k] that comes nearest to W·x from the inputs at ``places`` int64 [k] alone:
    W·H[:, p]·(H[p, p])⁻¹, damped."""
    kept = hessian[places][:, places].clone()
    damp(kept.diagonal(), DAMPING)
    wanted = weight @ hessian[:, places] + weight[:, places] * (kept.diagonal() - hessian.diagonal()[places])
    made: torch.Tensor = torch.linalg.solve(kept, wanted.t(), left=True).t().contiguous()
    return made


def best_of_groups(scores: torch.Tensor, stay: int, groups: int) -> torch.Tensor:
    """int64 [stay], rising: the units with the highest scores [U]; of each of ``groups`` runs of units as
    many (0: of all together). Of equals the first."""
    rows = scores.view(max(1, groups), -1)
    best = rows.argsort(dim=1, descending=True, stable=True)[:, : stay // len(rows)]
    first = torch.arange(len(rows))[:, None] * rows.shape[1]
    return (best + first).flatten().sort().values
