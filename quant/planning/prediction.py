"""What a whole model loses, from a few of its blocks that were quantized and measured.

Of every block there is a cheap guess of what it loses (here that of rounding to nearest, under the diagonals
of both Hessians), and of sampled blocks what a method really makes of it. The guesses say how much more there
is in all blocks than in the sampled ones: a ratio estimator (Cochran, Sampling Techniques, 1977, ch. 6). What
the sampled blocks lose together is measured, and scaled by that. The scatter of the ratio among the sampled
blocks, each foretold by the others, says what the part that nobody measured may be off by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Of blocks that nobody measured, share of their loss that the guess is taken to be off by where a single
#: block was sampled, so that there is no scatter.
ALONE = 0.5


@dataclass(frozen=True)
class Predicted:
    """KL in nats per token; ``error``: one standard error; ``share``: of the loss that was measured."""

    kl: float
    error: float
    share: float


def extrapolate(
    rows: Sequence[float],
    sampled: Sequence[tuple[float, float]],
    others: Sequence[float],
) -> Predicted:
    """What all blocks lose.

    Args:
        rows: measured KL of each row of text, the sampled blocks quantized and no others.
        sampled: of each sampled block what its errors lose, and what the other sampled ones foretell of it,
            nats; at least one. What they foretell of a single one is of no account.
        others: of each other block what the sampled ones foretell.

    >>> extrapolate([0.02, 0.04], [(2.0, 2.0), (4.0, 4.0)], [3.0, 3.0])
    Predicted(kl=0.06, error=0.02, share=0.5)
    """
    measured = math.fsum(rows) / len(rows)
    lost, more = math.fsum(x for x, _ in sampled), math.fsum(others)
    if lost <= 0 or measured <= 0:  # nothing was rounded in the sampled blocks: the others are all there is
        return Predicted(max(measured, 0.0) + more, _error(rows) + more, 0.0 if more else 1.0)
    factor, unit = (lost + more) / lost, measured / lost
    # blocks are off each by itself, and all together as the ratio is
    off = math.sqrt(math.fsum(x * x for x in others) + more * more / len(sampled))
    error = math.hypot(_error(rows) * factor, unit * _scatter(sampled) * off)
    return Predicted(measured * factor, error, lost / (lost + more))


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """How many times their guesses blocks lose: sums of (loss, guess); 1 where nothing was guessed.

    >>> ratio([(2.0, 1.0), (4.0, 2.0)])
    2.0
    """
    guessed = math.fsum(g for _, g in pairs)
    return math.fsum(x for x, _ in pairs) / guessed if guessed > 0 else 1.0


def _scatter(sampled: Sequence[tuple[float, float]]) -> float:
    """By what share a block's loss is off from the one that the others foretell: the root of the mean square,
    each block counted by its loss."""
    if len(sampled) < 2:
        return ALONE
    total = math.fsum(told * told for _, told in sampled)
    return math.sqrt(math.fsum((x - told) ** 2 for x, told in sampled) / total) if total > 0 else ALONE


def _error(rows: Sequence[float]) -> float:
    """Standard error of the mean of rows; the mean itself where a single one says nothing of it."""
    count, mean = len(rows), math.fsum(rows) / len(rows)
    if count < 2:
        return abs(mean)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in rows) / (count - 1) / count)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (size, loss) no other beats or equals in both, smallest first; of equal ones the first.

    >>> front([(4.0, 0.3), (8.0, 0.1), (5.0, 0.4), (4.5, 0.2), (8.0, 0.1)])
    [0, 3, 1]
    """
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


def spread(count: int, wanted: int, kinds: Sequence[object]) -> list[int]:
    """Blocks to sample of ``count``: the first, the last and others at even distances, and one at least of
    each kind.

    Args:
        kinds: of each block what tells it from others of another build.

    >>> spread(12, 4, "aaaaaaaaaaaa"), spread(2, 4, "ab"), spread(8, 2, "abababab"), spread(8, 2, "aabaaaba")
    ([0, 4, 7, 11], [0, 1], [0, 7], [0, 2, 7])
    """
    several = min(count, wanted)
    chosen = {round(i * (count - 1) / (several - 1)) for i in range(several)} if several > 1 else {count // 2}
    seen = {kinds[i] for i in chosen}
    for i in range(count):
        if kinds[i] not in seen:
            seen.add(kinds[i])
            chosen.add(i)
    return sorted(chosen)
