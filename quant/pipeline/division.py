"""What the ranks of a job divide: calibration rows by their fixed parts, and units of the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant.calibration.parts import part_sizes
from quant.calibration.text import Rows
from quant.pipeline.layout import Unit
from quant.pipeline.methods import make_quantizer
from quant.pipeline.plan import JobPlan
from quant.pipeline.ranks import Ranks, asked_ranks

#: Which part of all rows each batch is of, and how many parts there are.
Parts = tuple[Sequence[int], int]


def share(rows: Rows, each: int, ranks: Ranks) -> tuple[list[torch.Tensor], int | None, Parts]:
    """A rank's batches of at most ``each`` rows, which of them is the held-out row, and which parts they are
    of. No batch is of two parts; every rank has the held-out row."""
    sizes = part_sizes(len(rows.tokens))
    tokens: list[torch.Tensor] = []
    of: list[int] = []
    pieces = rows.tokens.split(sizes)
    for part in ranks.own(len(sizes)):
        # alike, or what is freed of a small one leaves holes in the scratch file
        batches = pieces[part].split(-(-sizes[part] // -(-sizes[part] // each)))
        tokens += batches
        of += [part] * len(batches)
    held_out = None if rows.held_out is None else len(tokens)
    return [*tokens, *([rows.held_out] if rows.held_out is not None else [])], held_out, (of, len(sizes))


def rows_before(rows: Rows, ranks: Ranks) -> int:
    """Rows of the ranks before this one."""
    sizes = part_sizes(len(rows.tokens))
    return sum(sizes[: ranks.own(len(sizes)).start])


def waiting_sums(plan: JobPlan, parts: int) -> int:
    """Bytes of the sums of parts that are set aside at once, at the most, while others are summed.

    Args:
        parts: those that one process sums.
    """
    needy = {a for a in set(plan.assignments.values()) if "hessian" in make_quantizer(a).needs}
    widest = max((plan.linears[n].k for n, a in plan.assignments.items() if a in needy), default=0)
    return (parts - 1).bit_length() * 4 * widest**2


def shared_out(units: Sequence[Unit], ranks: int) -> list[int]:
    """Which rank makes each unit: the largest first, each for the rank that has the fewest bytes yet."""
    sizes = [sum(t.spec.nbytes for s in u.shards for t in s.tensors) for u in units]
    taken, owner = [0] * ranks, [0] * len(units)
    for index in sorted(range(len(units)), key=lambda i: -sizes[i]):
        owner[index] = min(range(ranks), key=lambda r: taken[r])
        taken[owner[index]] += sizes[index]
    return owner


def ranks_problem(plan: JobPlan, rows: int) -> str | None:
    """Why a calibrated job cannot be divided among the ranks that are asked for, or None."""
    count = asked_ranks(plan.recipe)
    if count > (parts := len(part_sizes(rows))):
        what = f"{rows} calibration rows" if parts == rows else f"{rows} calibration rows, in {parts} parts"
        return f"{count} ranks for {what}: use {parts} ranks at the most"
    return None
