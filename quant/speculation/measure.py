"""How much of what a proposer guesses the target accepts, on real text, by exact rejection sampling."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from quant.speculation.proposers import Model, Proposer
from quant.speculation.sampling import Sampling, expected_tokens, judge, speed_up


class Target(Protocol):
    """What judges: logits [last, V] after each of the last tokens."""

    def logits(self, tokens: list[int], last: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Acceptance:
    """What happened in some steps; the names are those of vLLM's counters.

    Attributes:
        steps: passes of the target; ``drafts`` of them had proposals.
        draft_tokens, accepted: tokens proposed, and accepted.
        by_position: of the drafts, how many were accepted up to the first, second … token.
        tokens: what was generated.
    """

    steps: int
    drafts: int
    draft_tokens: int
    accepted: int
    by_position: tuple[int, ...]
    tokens: int

    @property
    def rate(self) -> float:
        """Share of the proposed tokens that was accepted (vLLM's acceptance rate)."""
        return self.accepted / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 1.0

    @property
    def first(self) -> float:
        """Share of drafts whose first token was accepted."""
        return self.by_position[0] / self.drafts if self.drafts and self.by_position else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "num_drafts": self.drafts, "num_draft_tokens": self.draft_tokens,
            "num_accepted_tokens": self.accepted, "accepted_by_position": list(self.by_position),
            "tokens": self.tokens, "acceptance_rate": self.rate, "tokens_per_step": self.tokens_per_step,
        }  # fmt: skip


def generate(
    target: Target,
    proposer: Proposer,
    prompt: Sequence[int],
    new_tokens: int,
    k: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> tuple[list[int], Acceptance]:
    """Continues a prompt by speculative decoding.

    Returns:
        exactly ``new_tokens`` tokens, distributed as the target's own, and what was accepted on the way.
    """
    read = tokens = list(prompt)
    steps = drafts = proposed_tokens = accepted = 0
    by_position = [0] * k
    while len(tokens) < len(prompt) + new_tokens:
        left = len(prompt) + new_tokens - len(tokens)
        # the pass that reads the prompt judges nothing: proposals start with the first new token, as in vLLM
        proposed, q = proposer.propose(tokens, k) if steps else ([], None)
        rows = target.logits(tokens + proposed, len(proposed) + 1)
        kept, follows = judge(sampling.probabilities(rows), proposed, q, generator)
        steps += 1
        if proposed:
            drafts += 1
            proposed_tokens += len(proposed)
            accepted += kept
            for i in range(kept):
                by_position[i] += 1
        read = [*tokens, *proposed[:kept], follows]
        tokens = read[: len(tokens) + left]
    proposer.ended(read)
    made = tokens[len(prompt) :]
    return made, Acceptance(steps, drafts, proposed_tokens, accepted, tuple(by_position), len(made))


def measure(
    target: Model,
    proposer: Proposer,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    k: int,
    sampling: Sampling,
    seed: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> Acceptance:
    """Acceptance over some prompts together.

    Args:
        done: told how many prompts are through.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, prompt in enumerate(prompts):
        found.append(generate(target, proposer, prompt, new_tokens, k, sampling, generator)[1])
        done(number + 1)
    return Acceptance(
        sum(a.steps for a in found),
        sum(a.drafts for a in found),
        sum(a.draft_tokens for a in found),
        sum(a.accepted for a in found),
        tuple(sum(a.by_position[i] for a in found) for i in range(k)),
        sum(a.tokens for a in found),
    )


def by_length(acceptance: Acceptance, k: int) -> float:
    """Tokens of a step were at most k of the measured proposals made: from the shares by position of a
    measurement with as many or more."""
    if not acceptance.steps:
        return 1.0
    return 1 + sum(acceptance.by_position[:k]) / acceptance.steps


@dataclass(frozen=True)
class Latencies:
    """Seconds of a pass of the target over so many tokens, and of one proposal, or of all where they are made
    ``at_once``; planned or measured."""

    target: Callable[[int], float]
    proposal: float
    source: str
    at_once: bool = False


def measured_latencies(target: Model, proposals: Mapping[int, Sequence[float]]) -> Latencies:
    """From the passes that were made here, by the number of tokens; medians, so that the first is no
    outlier. Of the target those over at most 32 tokens count, of a proposer those over at most 4.

    Args:
        proposals: seconds of the passes that proposed, by tokens read; empty: proposing takes no time.
    """
    known = {n: statistics.median(times) for n, times in _short(target.seconds, 32).items()}

    def seconds(tokens: int) -> float:
        nearest = min(known, key=lambda n: abs(n - tokens))
        return known[nearest]

    proposal = 0.0
    if proposals:
        proposal = statistics.median(x for times in _short(proposals, 4).values() for x in times)
    return Latencies(seconds, proposal, "passes measured here, one sequence")


def _short(passes: Mapping[int, Sequence[float]], most: int) -> dict[int, Sequence[float]]:
    """Those over at most so many tokens; where all had more, those that had the fewest."""
    return {n: times for n, times in passes.items() if n <= max(most, min(passes))}


def table(acceptance: Acceptance, latencies: Latencies, most: int) -> list[dict[str, float]]:
    """Tokens of a step and times as fast, for each number of proposals up to ``most``."""
    return [
        {
            "k": k,
            "tokens_per_step": (tokens := by_length(acceptance, k)),
            "speed_up": speed_up(
                tokens,
                latencies.target(k + 1),
                (1 if latencies.at_once else k) * latencies.proposal,
                latencies.target(1),
            ),
        }
        for k in range(1, most + 1)
    ]


def grid(rates: Sequence[float], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Expected tokens of a step by acceptance and number of proposals."""
    return [{"acceptance": a, **{f"k={k}": round(expected_tokens(a, k), 3) for k in lengths}} for a in rates]
