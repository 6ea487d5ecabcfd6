"""Means over blocks of text, and how sure they are.

The tokens of one block have a context in common: an interval that took each for an observation of its own
would be too narrow. Observations are blocks (the chunks of an evaluation).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: What an interval covers.
CONFIDENCE = 0.95
#: Draws of blocks, and tokens of all draws that are looked at together.
_DRAWS, _AT_A_TIME = 1000, 1 << 22


@dataclass(frozen=True)
class Measured:
    """A value with its standard error over blocks.

    Attributes:
        interval: lower and upper end of what holds it with 95 % confidence; None of fewer than two blocks.
    """

    mean: float
    standard_error: float
    interval: tuple[float, float] | None = None


def student(freedom: int) -> float:
    """How many standard errors lie on either side of a mean in its 95 % interval: the 97.5 % point of
    Student's t (Abramowitz and Stegun 1964, 26.7.5, exact where ``freedom`` is 1 or 2, within 1 % beyond).

    >>> round(student(1), 3), round(student(2), 3), round(student(9), 3), round(student(10**6), 3)
    (12.706, 4.303, 2.262, 1.96)
    """
    level = (1 + CONFIDENCE) / 2
    if freedom == 1:
        return math.tan(math.pi * (level - 0.5))
    if freedom == 2:
        return CONFIDENCE * math.sqrt(2 / (4 * level * (1 - level)))
    z, n = statistics.NormalDist().inv_cdf(level), freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def mean_of(values: Sequence[float]) -> Measured:
    """The mean of one value a block."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Measured(mean, math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values))
    away = student(len(values) - 1) * error
    return Measured(mean, error, (mean - away, mean + away))


def quantile_of(values: torch.Tensor, share: float, seed: int = 0) -> Measured:
    """A quantile of all tokens, its error by drawing whole blocks again (Efron and Tibshirani 1993, chapter
    8): the standard deviation over the draws, and their middle 95 %.

    Args:
        values: [blocks, tokens].
        share: of the tokens that lie at or below it, such as 0.99.
    """
    blocks, tokens = values.shape
    ordered, order = values.flatten().double().sort()
    if not bool(torch.isfinite(ordered).all()):
        return Measured(math.nan, math.nan)
    found = float(ordered[_at(torch.ones(1, blocks, dtype=torch.int32), order // tokens, share)[0]])
    if blocks < 2:
        return Measured(found, math.nan)
    generator = torch.Generator().manual_seed(seed)
    draws = []
    at_a_time = max(1, _AT_A_TIME // values.numel())
    for first in range(0, _DRAWS, at_a_time):
        which = torch.randint(blocks, (min(at_a_time, _DRAWS - first), blocks), generator=generator)
        counts = torch.zeros(which.shape, dtype=torch.int32)
        counts.scatter_add_(1, which, torch.ones_like(which, dtype=torch.int32))
        draws.append(ordered[_at(counts, order // tokens, share)])
    drawn = torch.cat(draws)
    ends = drawn.quantile(torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64))
    return Measured(found, float(drawn.std()), (float(ends[0]), float(ends[1])))


def _at(counts: torch.Tensor, block: torch.Tensor, share: float) -> torch.Tensor:
    """Where in ordered values, of which each belongs to a ``block`` [tokens], the quantile is when blocks are
    there ``counts`` [draws, blocks] times."""
    weights = counts[:, block].cumsum(1)
    target = torch.ceil(share * weights[:, -1:].double()).to(weights.dtype)
    return torch.searchsorted(weights, target).clamp(max=len(block) - 1)[:, 0]
