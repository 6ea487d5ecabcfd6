"""The arithmetic of speculative sampling: pure functions of probabilities.

Sources: Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Temperature below which the likeliest token is taken: dividing by less would leave no number.
_GREEDY = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the target's tokens are drawn; a temperature below 1e-5 is greedy, as in vLLM
    (``vllm/sampling_params.py``)."""

    temperature: float = 0.0
    top_p: float = 1.0

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """fp32 logits [..., V] to the probabilities [..., V] that tokens are drawn with."""
        if self.temperature < _GREEDY:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        p = (logits / self.temperature).softmax(-1)
        if self.top_p >= 1:
            return p
        ordered, order = p.sort(-1, descending=True)
        # a token stays while those before it have not filled the share: the likeliest always does
        kept = ordered * (ordered.cumsum(-1) - ordered < self.top_p)
        p = torch.zeros_like(p).scatter(-1, order, kept)
        return p / p.sum(-1, keepdim=True)


def draw(p: torch.Tensor, generator: torch.Generator) -> int:
    """A token of probabilities [V]."""
    return int(torch.multinomial(p, 1, generator=generator))


def judge(
    target: torch.Tensor, proposed: list[int], draft: torch.Tensor | None, generator: torch.Generator
) -> tuple[int, int]:
    """Accepts a prefix of what was proposed, and draws one token more, so that the tokens are distributed as
    the target's own.

    Args:
        target: its probabilities [k + 1, V] at each proposed token and after the last.
        draft: the proposer's probabilities [k, V]; None where it proposed without chance (probability one).

    Returns:
        how many were accepted, and the token after them: of the target's distribution where all were, else of
        what the target has beyond the draft, max(p - q, 0) normalized.
    """
    for i, token in enumerate(proposed):
        p = target[i]
        q = float(draft[i, token]) if draft is not None else 1.0
        if float(torch.rand((), generator=generator)) < min(1.0, float(p[token]) / q):
            continue
        if draft is not None:
            rest = (p - draft[i]).clamp_min(0)
        else:
            rest = p.clone()
            rest[token] = 0
        # nothing beyond the draft but rounding: the target's own distribution
        return i, draw(rest if float(rest.sum()) > 0 else p, generator)
    return len(proposed), draw(target[len(proposed)], generator)


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens of a step of k proposals, each accepted with that probability given those before it:
    (1 - a^(k+1)) / (1 - a).

    >>> expected_tokens(0.5, 2), expected_tokens(1.0, 3), expected_tokens(0.0, 5)
    (1.75, 4.0, 1.0)
    """
    return float(k + 1) if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


def speed_up(tokens: float, verify: float, propose: float, step: float) -> float:
    """Times as fast as plain decoding.

    Args:
        tokens: of one speculative step.
        verify: seconds of the target's pass over the proposals and one token.
        propose: seconds of making the proposals.
        step: seconds of the target's pass over one token.
    """
    return tokens * step / (verify + propose)
