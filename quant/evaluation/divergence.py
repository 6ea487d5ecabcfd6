"""How far two models' distributions of the next token are apart, token by token, from slices of their logits.

The logits of 2,048 tokens over a vocabulary of 256,000 take two GiB in fp32, and their softmax and all that
is made of it as much again each. Here both models' logits come a few columns of the vocabulary at a time, and
everything that is wanted of a token is kept in running sums: log Σ exp with its maximum, as an online softmax
has them (Milakov and Gimelshein 2018, arXiv:1805.02867), the same sum of p·(log p - log q), and the largest
few. Exponentials are fp32, their sums fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

#: Values of one model's logits that are in memory at a time, and columns of the vocabulary among them: 32 MiB
#: in fp32, of which about six are there at once.
SLICE, COLUMNS = 1 << 23, 1 << 15
#: How many of the likeliest tokens are compared.
TOP = 5

#: Logits fp32 [N, C] of the same N tokens for columns ``first`` to ``last`` of the vocabulary, in a tensor
#: that the receiver may write to.
Logits = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class TokenNumbers:
    """Of each token, on the CPU, fp32 [...] where nothing else is said.

    Attributes:
        nll, source_nll: negative log-likelihood of the text's own token, nats.
        kl: KL(source ‖ candidate), nats.
        top1: 1 where both have the same likeliest token, else 0.
        top5: share of the source's five likeliest that are among the candidate's five.
        choice: int64, the candidate's likeliest token.
        source_most: log-probability of the source's likeliest token.
        among, source_among: log-probabilities fp64 [..., W] of the tokens that were asked for.
    """

    nll: torch.Tensor
    source_nll: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    top1: torch.Tensor | None = None
    top5: torch.Tensor | None = None
    choice: torch.Tensor | None = None
    source_most: torch.Tensor | None = None
    among: torch.Tensor | None = None
    source_among: torch.Tensor | None = None

    def rows(self, first: int, last: int) -> TokenNumbers:
        return self._each(lambda values: values[first:last])

    def columns(self, first: int, last: int) -> TokenNumbers:
        return self._each(lambda values: values[:, first:last])

    @staticmethod
    def joined(parts: list[TokenNumbers], dim: int) -> TokenNumbers:
        """Several along a dimension."""
        made: dict[str, Any] = {}
        for field in fields(TokenNumbers):
            values = [getattr(p, field.name) for p in parts]
            made[field.name] = None if values[0] is None else torch.cat(values, dim)
        return TokenNumbers(**made)

    def shaped(self, *shape: int) -> TokenNumbers:
        """Its tokens in another shape."""
        return self._each(lambda values: values.view(*shape, *values.shape[1:]))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TokenNumbers:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        made: dict[str, Any] = {name: None if v is None else change(v) for name, v in values}
        return TokenNumbers(**made)


def slices(vocabulary: int, columns: int = COLUMNS) -> Iterator[tuple[int, int]]:
    """Ranges of columns that make up a vocabulary.

    >>> list(slices(10, 4))
    [(0, 4), (4, 8), (8, 10)]
    """
    return ((first, min(first + columns, vocabulary)) for first in range(0, vocabulary, columns))


class _Running:
    """What the columns that one model has shown so far say of N tokens."""

    def __init__(self, tokens: int, device: torch.device, asked: torch.Tensor | None):
        # not minus infinity, which a masked column less would be NaN
        self.most = torch.full((tokens,), torch.finfo(torch.float32).min, device=device)
        self.sum = torch.zeros(tokens, dtype=torch.float64, device=device)
        self.top = torch.empty(tokens, 0, device=device)
        self.which = torch.empty(tokens, 0, dtype=torch.int64, device=device)
        self.asked = asked
        self.found = None if asked is None else torch.zeros(asked.shape, dtype=torch.float32, device=device)

    def take(self, logits: torch.Tensor, first: int, top: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds columns [N, C] that start at ``first``.

        Returns:
            exp(logits - maximum) [N, C], and what sums of such before these have to be multiplied by, [N]
            fp64.
        """
        values, which = logits.topk(min(top, logits.shape[1]), dim=-1)
        self.top, order = torch.cat([self.top, values], 1).topk(
            min(top, self.top.shape[1] + values.shape[1]), dim=-1
        )
        self.which = torch.cat([self.which, which + first], 1).gather(1, order)
        if self.asked is not None and self.found is not None:
            inside = (self.asked >= first) & (self.asked < first + logits.shape[1])
            picked = logits.gather(1, (self.asked - first).clamp(0, logits.shape[1] - 1))
            self.found = torch.where(inside, picked, self.found)
        most = torch.maximum(self.most, logits.amax(-1))
        scale = (self.most.double() - most).exp()
        weights = (logits - most[:, None]).exp_()
        self.sum = self.sum * scale + weights.sum(-1, dtype=torch.float64)
        self.most = most
        return weights, scale

    @property
    def log_sum(self) -> torch.Tensor:
        return self.most.double() + self.sum.log()

    def logs(self) -> torch.Tensor:
        """Log-probabilities fp64 of the tokens asked for."""
        assert self.found is not None
        return self.found.double() - self.log_sum[:, None]


def token_numbers(
    candidate: Logits,
    source: Logits | None,
    ranges: list[tuple[int, int]],
    wanted: torch.Tensor,
    among: torch.Tensor | None = None,
) -> TokenNumbers:
    """Compares both models' distributions of N tokens.

    Args:
        ranges: of columns, each of which is asked of both models once, in this order.
        wanted: int64 [N], the text's own tokens, on the device that computes.
        among: int64 [N, W], tokens whose log-probabilities are wanted too.

    Returns:
        numbers of shape [N].
    """
    asked = wanted[:, None] if among is None else torch.cat([wanted[:, None], among], 1)
    own = _Running(len(wanted), wanted.device, asked)
    if source is None:
        for first, last in ranges:
            own.take(candidate(first, last), first, 1)
        logs = own.logs()
        return TokenNumbers(
            _kept(-logs[:, 0]),
            choice=own.which[:, 0].cpu(),
            among=None if among is None else logs[:, 1:].cpu(),
        )
    other = _Running(len(wanted), wanted.device, asked)
    crossed = torch.zeros_like(other.sum)
    for first, last in ranges:
        q, p = candidate(first, last), source(first, last)
        own.take(q, first, TOP)
        weights, scale = other.take(p, first, TOP)
        # a token that neither can give, minus infinity in both, counts for nothing
        parts = torch.where(weights > 0, p.sub_(q).mul_(weights), 0.0)
        crossed = crossed * scale + parts.sum(-1, dtype=torch.float64)
    kl = crossed / other.sum - (other.log_sum - own.log_sum)
    mine, theirs = own.logs(), other.logs()
    same = (other.which[:, :, None] == own.which[:, None, :]).any(-1).float().mean(-1)
    return TokenNumbers(
        nll=_kept(-mine[:, 0]),
        source_nll=_kept(-theirs[:, 0]),
        kl=_kept(kl),
        top1=_kept(own.which[:, 0] == other.which[:, 0]),
        top5=_kept(same),
        choice=own.which[:, 0].cpu(),
        source_most=_kept(other.top[:, 0].double() - other.log_sum),
        among=None if among is None else mine[:, 1:].cpu(),
        source_among=None if among is None else theirs[:, 1:].cpu(),
    )


def _kept(values: torch.Tensor) -> torch.Tensor:
    return values.float().cpu()
