"""A Hessian as GPTQ solves with it: damped, in the order that its columns are visited, and factored as R·Rᵀ
with R upper triangular."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quant.accelerator import on_accelerator
from quant.quantizers.products import add_product

#: Rows of the Hessian that are put in order at a time, on a CPU and on a device, of which few operations are
#: wanted.
_ROWS, _MANY_ROWS = 128, 1024
#: Columns of a Hessian that are factored on a CPU before what they push onto all before them is applied; and
#: of those that are factored by LAPACK.
_WIDE, _NARROW = 192, 64
#: Columns that are chosen between two updates of all others by :func:`smallest_last`.
_CHOSEN = 64
#: Each rung multiplies the damping by ten; a Hessian that is not positive definite at the last one is not
#: usable.
_RUNGS = 4
#: The least that is divided by in :func:`smallest_last`, of matrices whose diagonal has a mean of 1.
_TINY = 1e-30
#: Share of the diagonal's mean that no element is below.
LEAST = 1e-12


def factorize_all(
    hessians: Sequence[torch.Tensor], damping: float, orders: Sequence[torch.Tensor | None]
) -> list[tuple[Factor | None, float]]:
    """:func:`factorize` of each. On a GPU all are factored at once, which one of them alone would not fill;
    those that fail go their own way up the ladder."""
    if len(hessians) == 1 or not on_accelerator(hessians[0]):
        return [factorize(h, damping, order) for h, order in zip(hessians, orders, strict=True)]
    return factorize_together(hessians, damping, orders)


def factorize_together(
    hessians: Sequence[torch.Tensor], damping: float, orders: Sequence[torch.Tensor | None]
) -> list[tuple[Factor | None, float]]:
    """:func:`factorize` of each, by one batched Cholesky factorization."""
    k = len(hessians[0])
    flipped = torch.empty(len(hessians), k, k, device=hessians[0].device)
    for target, hessian, order in zip(flipped, hessians, orders, strict=True):
        reverse = _visits(order, hessian).flip(0)
        for start in range(0, k, _MANY_ROWS):  # indexing the whole matrix twice would hold a third copy
            rows = slice(start, start + _MANY_ROWS)
            torch.index_select(hessian[reverse[rows]], 1, reverse, out=target[rows])
    damp(flipped.diagonal(dim1=1, dim2=2), damping)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    usable = (failed == 0) & lower.diagonal(dim1=1, dim2=2).isfinite().all(1)
    upper = lower.flip(1, 2)
    return [
        (Factor(upper[i], whole=flipped[i].flip(0, 1)), damping)
        if good
        else factorize(hessians[i], damping, orders[i])
        for i, good in enumerate(usable.tolist())
    ]


def factorize(
    hessian: torch.Tensor, damping: float, order: torch.Tensor | None
) -> tuple[Factor | None, float]:
    """R with R·Rᵀ = H + damping · diag H (see :func:`damp`), rows and columns taken in ``order``. R takes the
    place of ``hessian``.

    Factored in fp32; where that fails, in fp64 with the same damping, and then with ten times more until the
    last rung.

    Returns:
        R and the damping that was needed, or None and the last damping tried.
    """
    wanted = damping
    for rung in range(_RUNGS):
        wanted = damping * 10**rung
        ordered = _ordered(hessian, order)
        damp(ordered.diagonal(), wanted, rung > 0)
        squares = None if on_accelerator(ordered) else [ordered[s, s].clone() for s in _panels(len(ordered))]
        if squares is None:
            whole = ordered.clone()
            if _factored(ordered):
                return Factor(ordered, whole=whole), wanted
        elif _factored(ordered):
            hessian.set_(ordered)  # type: ignore[call-overload]  # or two matrices would wait for the solve
            return Factor(hessian, squares), wanted
        visits = _visits(order, hessian)
        precise = hessian[visits][:, visits].double()
        damp(precise.diagonal(), wanted, rung > 0)
        lower, failed = torch.linalg.cholesky_ex(precise.flip(0, 1))
        if not failed and bool(lower.diagonal().isfinite().all()):
            return Factor(lower.flip(0, 1).float(), whole=precise.float()), wanted
    return None, wanted


def smallest_last(hessians: torch.Tensor) -> torch.Tensor:
    """int64 [B, K], for each of the positive definite matrices [B, K, K], which are overwritten, an order of
    its columns in which R of R·Rᵀ = H has a small sum of squares on its diagonal: what the loss counts the
    rounding errors of columns by.

    The last column's square is its own element of H; that of the one before is what is left of its element
    when the last column is known, and so on. So the smallest is taken for the last place, and again of what
    is left: a Cholesky factorization that pivots on the smallest element, as V-BLAST detects the strongest
    signal first (Wolniansky et al. 1998) and Chen et al. 2025 (arXiv:2507.18553) order GPTQ's columns.
    Blocks of columns are applied to the others by products of matrices.
    """
    count, k, _ = hessians.shape
    each = torch.arange(count, device=hessians.device)
    names = torch.arange(k, device=hessians.device).repeat(count, 1)
    mean = hessians.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    hessians.div_(torch.where(mean > 0, mean, 1.0))
    chosen: list[torch.Tensor] = []
    while len(chosen) < k:
        # what was chosen stays in the matrices until it is a quarter of them: copies take time, too
        size = hessians.shape[1]
        taken = torch.zeros(count, size, dtype=torch.bool, device=hessians.device)
        end = min(k, len(chosen) + max(_CHOSEN, size // 4))
        while len(chosen) < end:
            some = min(_CHOSEN, end - len(chosen))
            diagonal = hessians.diagonal(dim1=1, dim2=2)
            least = (diagonal * torch.finfo(diagonal.dtype).eps).clamp_(min=_TINY)
            left = diagonal.masked_fill(taken, torch.inf)
            columns = torch.zeros(count, size, some, device=hessians.device)
            places = []
            for j in range(some):
                pivot, place = left.min(1)
                own = columns[each, place, :j].unsqueeze(-1)
                column = hessians[each, place] - torch.bmm(columns[:, :, :j], own).squeeze(-1)
                root = torch.maximum(pivot, least[each, place]).sqrt_().unsqueeze(-1)
                column = torch.div(column, root, out=columns[:, :, j])
                left.addcmul_(column, column, value=-1)[each, place] = torch.inf
                places.append(place)
            now = torch.stack(places, 1)
            taken.scatter_(1, now, True)
            chosen += names.gather(1, now).unbind(1)
            hessians.baddbmm_(columns, columns.transpose(1, 2), alpha=-1)
        rest = torch.argsort(taken.byte(), dim=1, stable=True)[:, : k - len(chosen)]
        hessians = torch.stack([h[r[:, None], r] for h, r in zip(hessians, rest, strict=True)])
        names = names.gather(1, rest)
    return torch.stack(chosen, 1).flip(1)


def _visits(order: torch.Tensor | None, hessian: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(hessian), device=hessian.device) if order is None else order


def _ordered(hessian: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """[K, K] with rows and columns in ``order``."""
    if order is None:
        return hessian.clone()
    ordered = torch.empty_like(hessian)
    step = _MANY_ROWS if on_accelerator(hessian) else _ROWS
    for start in range(0, len(hessian), step):  # indexing the whole matrix twice would hold a third copy
        rows = slice(start, start + step)
        torch.index_select(hessian.index_select(0, order[rows]), 1, order, out=ordered[rows])
    return ordered


def _panels(k: int) -> list[slice]:
    """The runs of columns that :func:`_factored` takes one after another on a CPU."""
    return [slice(max(stop - _WIDE, 0), stop) for stop in range(k, 0, -_WIDE)]


def damp(diagonal: torch.Tensor, damping: float, more: bool = False) -> None:
    """Adds to each element of the diagonal [..., K] of a matrix a share of itself, so that codes do not
    depend on the inputs' units: a share of the mean, which a few inputs of large activations set, would
    outweigh all that the others have in common. Dead inputs, whose other elements are zero too, and nearly
    dead ones get :data:`LEAST` of the mean before, so that scales are not fitted to them; all get 1 where all
    are dead.

    ``more``: the matrix is damaged, as one share was not enough; then none gets less than a share of the
    mean."""
    mean = diagonal.mean(-1, keepdim=True)
    if more:
        diagonal += damping * torch.maximum(diagonal, mean)
    else:
        least = torch.where(mean == 0, 1.0, LEAST * mean)
        torch.maximum(diagonal, least, out=diagonal).mul_(1 + damping)


def _factored(matrix: torch.Tensor) -> bool:
    """Puts R, upper triangular with R·Rᵀ = H, in the place of the upper triangle of H [K, K], which is all
    that is read; or returns False, and H is lost. On a CPU what lies below the squares of :func:`_panels`
    along the diagonal stays as it is.

    On a CPU by products of matrices, some columns after others, from the last to the first: torch clears the
    other triangle behind LAPACK's routine, against the order of the memory, which takes half as long again.
    """
    k = len(matrix)
    for columns in [slice(0, k)] if on_accelerator(matrix) else _panels(k):
        begin, stop = columns.start, columns.stop
        done = matrix[:stop, stop:]
        panel = matrix[:stop, begin:stop].clone()
        add_product(panel, done, done[begin:].t(), alpha=-1)
        if not _factored_panel(panel):
            return False
        matrix[:stop, begin:stop] = panel
    return True


def _factored_panel(panel: torch.Tensor) -> bool:
    """:func:`_factored` of the last columns, [S, W], of a matrix [S, S] that the columns behind have been
    applied to."""
    above, width = len(panel) - panel.shape[1], panel.shape[1]
    narrow = width if on_accelerator(panel) else _NARROW
    for stop in range(width, 0, -narrow):
        start = max(stop - narrow, 0)
        top, bottom = above + start, above + stop
        if stop < width:
            done = panel[:bottom, stop:]
            panel[:bottom, start:stop].addmm_(done, done[top:].t(), alpha=-1)
        square = panel[top:bottom, start:stop]
        # the lower Cholesky factor of a matrix read backwards is R read backwards
        lower, failed = torch.linalg.cholesky_ex(square.flip(0, 1))
        if failed or not bool(lower.diagonal().isfinite().all()):
            return False
        factor = square.copy_(lower.flip(0, 1))
        if top:
            one = torch.eye(stop - start, device=panel.device)
            inverse = torch.linalg.solve_triangular(factor, one, upper=True)
            panel[:top, start:stop] = panel[:top, start:stop] @ inverse.t()
    return True


@dataclass(frozen=True)
class Factor:
    """R of the H in question in the upper triangle of ``upper`` [K, K]. H itself is ``whole``; or else below
    the diagonal of ``upper``, but for ``squares``, which are those of :func:`_panels` along it."""

    upper: torch.Tensor
    squares: Sequence[torch.Tensor] | None = None
    whole: torch.Tensor | None = None

    def block(self, rows: slice, columns: slice) -> torch.Tensor:
        """R[rows, columns]; below the diagonal, anything."""
        return self.upper[rows, columns]

    def diagonal(self) -> torch.Tensor:
        return self.upper.diagonal()

    def importance(self, order: torch.Tensor | None) -> torch.Tensor:
        """fp32 [K], in file order: R_kk² of each column, by which the loss counts what rounding changes in it
        when earlier columns' errors have been fed back. That of a column whose errors later ones can take up
        is far less than its diagonal of H."""
        squares = self.diagonal().square()
        return squares if order is None else torch.empty_like(squares).index_copy_(0, order, squares)

    def hessian(self) -> torch.Tensor:
        """H [K, K], damped, in the order of R; R may be lost."""
        if self.whole is not None:
            return self.whole
        assert self.squares is not None
        matrix, panels = self.upper, _panels(len(self.upper))
        for number, (columns, square) in enumerate(zip(panels, self.squares, strict=True)):
            matrix[columns, columns] = square
            for left in panels[number + 1 :]:
                matrix[left, columns] = matrix[columns, left].t()
        return matrix
