"""Errors of means and quantiles over blocks: whether intervals hold what they say they do."""

from __future__ import annotations

import math

import pytest
import torch

from quant.evaluation.intervals import mean_of, quantile_of, student


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (99, 1.984)],
)
def test_student_s_table(freedom: int, value: float) -> None:
    assert student(freedom) == pytest.approx(value, rel=0.01)


def drawn(blocks: int, tokens: int, seed: int) -> torch.Tensor:
    """Tokens of a block have much in common: [blocks, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(blocks, 1, generator=generator)
    return own + 0.5 * torch.randn(blocks, tokens, generator=generator)


def test_intervals_over_blocks_hold_the_mean_and_those_over_tokens_would_not() -> None:
    held = by_tokens = 0
    for seed in range(300):
        values = drawn(12, 50, seed)
        found = mean_of(values.mean(1).tolist())
        assert found.interval is not None
        held += found.interval[0] <= 0 <= found.interval[1]
        error = float(values.std()) / math.sqrt(values.numel())
        by_tokens += abs(float(values.mean())) <= 1.96 * error
    assert 0.92 <= held / 300 <= 0.98 and by_tokens / 300 < 0.5


def test_a_quantile_s_interval_is_over_blocks() -> None:
    truth = float(drawn(20_000, 50, 999).flatten().kthvalue(900_000).values)
    held = sum(
        (ends := quantile_of(drawn(40, 50, seed), 0.9).interval) is not None and ends[0] <= truth <= ends[1]
        for seed in range(100)
    )
    assert 0.86 <= held / 100 <= 1
    values = drawn(40, 50, 0)
    found = quantile_of(values, 0.9)
    assert found.mean == float(values.flatten().sort().values[math.ceil(0.9 * 2000) - 1])
    assert found == quantile_of(values, 0.9)  # its draws are its own
    assert 0.1 < found.standard_error < 0.5


def test_one_block_has_no_error_and_what_is_not_finite_no_value() -> None:
    assert mean_of([1.5]).interval is None and math.isnan(mean_of([1.5]).standard_error)
    assert quantile_of(torch.tensor([[1.0, 2.0]]), 0.99).mean == 2
    assert math.isnan(quantile_of(torch.tensor([[1.0, torch.nan]]), 0.99).mean)
