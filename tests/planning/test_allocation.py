"""The knapsack against all choices there are, and on as many items as a large model has."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from quant.planning.allocation import Choice, allocate, hull


def best_of_all(items: list[list[tuple[int, float]]], budget: int) -> float | None:
    """By trying every choice."""
    losses = [
        sum(loss for _, loss in chosen)
        for chosen in itertools.product(*items)
        if sum(size for size, _ in chosen) <= budget
    ]
    return min(losses, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_better_than_the_one_found(seed: int) -> None:
    draw = random.Random(seed)
    items = [
        [
            # equal bytes, equal losses and candidates that others beat are among them
            (draw.randrange(1, 20), draw.choice([0.0, 1.0, draw.random() * 10, draw.random() * 1e-6]))
            for _ in range(draw.randrange(1, 5))
        ]
        for _ in range(draw.randrange(1, 7))
    ]
    for budget in (0, 10, 25, 40, 60, 1000):
        wanted, found = best_of_all(items, budget), allocate(items, budget)
        assert (found is None) == (wanted is None)
        if found is not None:
            chosen = [item[p] for item, p in zip(items, found.picks, strict=True)]
            assert found.loss == pytest.approx(wanted, abs=1e-15) == sum(loss for _, loss in chosen)
            assert found.nbytes == sum(size for size, _ in chosen) <= budget
            assert found.gap == 0


def test_a_model_of_hundreds_of_layers_is_decided_exactly_and_soon() -> None:
    draw = random.Random(0)
    shapes = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]
    items = []
    for _ in range(80):
        for k, n in shapes:
            hard = draw.lognormvariate(0, 1.5)
            items.append(
                [
                    (n * (k * bits // 8 + 2 * (k // group)), hard * 4.0**-bits * (1 + group / 256))
                    for bits, group in ((4, 4096 if k == 4096 else 14336), (4, 128), (4, 64), (4, 32))
                ]
                + [(n * (k + 2), hard * 4.0**-8), (2 * n * k, 0.0)]
            )
    weights = 80 * sum(n * k for k, n in shapes)
    start = time.process_time()
    found = allocate(items, int(weights * 4.5 / 8))
    assert time.process_time() - start < 30
    assert found is not None and found.gap == 0 and found.nbytes <= weights * 4.5 / 8
    # no single step that fits makes it better
    room = int(weights * 4.5 / 8) - found.nbytes
    for item, pick in zip(items, found.picks, strict=True):
        assert not [1 for size, loss in item if size - item[pick][0] <= room and loss < item[pick][1]]


def test_a_hull_is_convex_and_ends_at_the_least_loss() -> None:
    points = [(1, 9.0), (2, 8.5), (3, 1.0), (4, 1.0), (5, 0.0), (2, 9.5)]
    assert hull(points) == [0, 2, 4]
    assert hull([(5, 1.0)]) == [0]


def test_nothing_to_choose_is_a_choice_and_too_small_a_budget_is_none() -> None:
    assert allocate([], 0) == Choice((), 0, 0.0)
    assert allocate([[(10, 0.0)]], 9) is None
