"""Which of its candidates each of several items takes so that all together stay within a number of bytes and
lose as little as possible: the multiple-choice knapsack, solved exactly.

Items are decided one after another. Of all partial choices those are kept that no other one beats in both
bytes and loss (Nemhauser and Ullmann 1969), and of these only the ones that may still win: a bound from below
says what the items left must lose within the bytes left, each item's candidates replaced by the lower convex
hull through them (the linear relaxation of Sinha and Zoltners 1979). What is dropped so can be no part of a
better choice than the best one found, so the last one standing is the best there is; sums of losses are fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Partial choices that are kept at once, at the most. More would need items by the thousand whose bytes are
#: all different; then choices that could only win by less than the gap told are dropped too.
_MOST = 1 << 21
#: Share of the loss by which a choice must promise to be better, once there are too many.
_GAP = 1e-6


@dataclass(frozen=True)
class Choice:
    """Of each item which candidate; bytes and loss of all; ``gap``: share of the loss by which a better
    choice may be overlooked, 0 where none is."""

    picks: tuple[int, ...]
    nbytes: int
    loss: float
    gap: float = 0.0


@dataclass(frozen=True)
class _Tail:
    """The relaxation of the last items: ``least`` bytes, and the loss by the bytes beyond those at the
    corners of a convex curve."""

    least: int
    extra: np.ndarray
    loss: np.ndarray

    def bound(self, room: np.ndarray) -> np.ndarray:
        """What these items lose at the least within so many bytes; inf where they do not fit."""
        return np.where(room < self.least, np.inf, np.interp(room - self.least, self.extra, self.loss))


def hull(candidates: Sequence[tuple[int, float]]) -> list[int]:
    """Which of (bytes, loss) lie on the lower convex hull, from the fewest bytes to the least loss.

    >>> hull([(1, 9.0), (2, 8.5), (3, 1.0), (4, 1.0), (5, 0.0)])
    [0, 2, 4]
    """
    order = sorted(range(len(candidates)), key=lambda i: (*candidates[i], i))
    kept: list[int] = []
    for i in order:
        size, loss = candidates[i]
        if kept and loss >= candidates[kept[-1]][1]:
            continue
        while len(kept) > 1:
            (b0, l0), (b1, l1) = candidates[kept[-2]], candidates[kept[-1]]
            if (l1 - l0) * (size - b0) < (loss - l0) * (b1 - b0):
                break
            kept.pop()
        kept.append(i)
    return kept


def allocate(items: Sequence[Sequence[tuple[int, float]]], budget: int) -> Choice | None:
    """The choice of least loss within ``budget`` bytes; of several the one of fewest bytes. None where even
    the smallest candidates take more.

    Args:
        items: of each its candidates, as whole bytes and finite losses of at least 0.

    >>> allocate([[(1, 9.0), (3, 1.0)], [(1, 4.0), (3, 2.0)]], 4)
    Choice(picks=(1, 0), nbytes=4, loss=5.0, gap=0.0)
    """
    if sum(min(size for size, _ in item) for item in items) > budget:
        return None
    if not items:
        return Choice((), 0, 0.0)
    # items with most to lose come first: the bound decides early what the small ones cannot mend
    order = sorted(range(len(items)), key=lambda i: -_spread(items[i]))
    tails = _tails([items[i] for i in order])
    gap = 0.0
    best = _greedy([items[i] for i in order], budget)
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for place, item in enumerate(items[i] for i in order):
        sizes, losses, before, taken = _extended(sizes, losses, item)
        for limit in (best, best * (1 - _GAP)):
            reached = losses + tails[place + 1].bound(budget - sizes)
            # rounding of the sums must not drop the best itself
            keep = reached <= limit + abs(limit) * 1e-12
            sizes, losses, before, taken = (x[keep] for x in (sizes, losses, before, taken))
            if len(sizes) <= _MOST:
                break
            gap = _GAP
        if not len(sizes):  # only with the gap: the choice by the hulls is as good
            return _by_hulls(items, order, budget, gap)
        history.append((before, taken))
    last = int(np.lexsort((sizes, losses))[0])
    picks, total, at = [0] * len(items), int(sizes[last]), last
    for place in range(len(items) - 1, -1, -1):
        before, taken = history[place]
        picks[order[place]] = int(taken[at])
        at = int(before[at])
    return Choice(tuple(picks), total, float(sum(items[i][p][1] for i, p in enumerate(picks))), gap)


def _spread(item: Sequence[tuple[int, float]]) -> float:
    return max(loss for _, loss in item) - min(loss for _, loss in item)


def _extended(
    sizes: np.ndarray, losses: np.ndarray, item: Sequence[tuple[int, float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Partial choices with one more item, those that none beats, by bytes; which one each comes from, and
    what it takes of the item."""
    count = len(sizes)
    more = np.concatenate([sizes + size for size, _ in item])
    lost = np.concatenate([losses + loss for _, loss in item])
    order = np.lexsort((lost, more))
    lost = lost[order]
    least = np.minimum.accumulate(lost)
    better = np.ones(len(order), bool)
    better[1:] = lost[1:] < least[:-1]
    order, lost = order[better], lost[better]
    return more[order], lost, order % count, order // count


def _tails(items: Sequence[Sequence[tuple[int, float]]]) -> list[_Tail]:
    """Of the items from each place on, and of none."""
    steps: list[tuple[float, int, float]] = []
    least, loss = 0, 0.0
    tails = [_tail(least, loss, steps)]
    for item in reversed(items):
        corners = hull(item)
        least, loss = least + item[corners[0]][0], loss + item[corners[0]][1]
        for i, j in zip(corners, corners[1:], strict=False):
            wider, gained = item[j][0] - item[i][0], item[i][1] - item[j][1]
            steps.append((gained / wider, wider, gained))
        tails.append(_tail(least, loss, steps))
    return tails[::-1]


def _tail(least: int, loss: float, steps: list[tuple[float, int, float]]) -> _Tail:
    steps = sorted(steps, reverse=True)
    extra = np.concatenate([[0.0], np.cumsum([float(wider) for _, wider, _ in steps])])
    lost = loss - np.concatenate([[0.0], np.cumsum([gained for *_, gained in steps])])
    return _Tail(least, extra, lost)


def _hull_picks(items: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """A choice along the hulls, steepest gains first, each taken where it still fits."""
    corners = [hull(item) for item in items]
    at = [0] * len(items)
    used = sum(item[c[0]][0] for item, c in zip(items, corners, strict=True))
    steps = sorted(
        (
            (item[a][1] - item[b][1]) / (item[b][0] - item[a][0]), -place, -number
        )
        for place, (item, c) in enumerate(zip(items, corners, strict=True))
        for number, (a, b) in enumerate(zip(c, c[1:], strict=False))
    )  # fmt: skip
    for _, place, number in reversed(steps):
        place, number = -place, -number
        if at[place] != number:
            continue
        a, b = corners[place][number : number + 2]
        wider = items[place][b][0] - items[place][a][0]
        if used + wider <= budget:
            used, at[place] = used + wider, number + 1
    return [c[i] for c, i in zip(corners, at, strict=True)]


def _greedy(items: Sequence[Sequence[tuple[int, float]]], budget: int) -> float:
    """The loss of a good choice: what no bound of a better one exceeds."""
    return sum(item[p][1] for item, p in zip(items, _hull_picks(items, budget), strict=True))


def _by_hulls(
    items: Sequence[Sequence[tuple[int, float]]], order: Sequence[int], budget: int, gap: float
) -> Choice:
    picks = [0] * len(items)
    for i, pick in zip(order, _hull_picks([items[i] for i in order], budget), strict=True):
        picks[i] = pick
    chosen = [item[p] for item, p in zip(items, picks, strict=True)]
    return Choice(tuple(picks), sum(b for b, _ in chosen), float(sum(x for _, x in chosen)), gap)
