"""How good a checkpoint is: perplexity, and KL divergence and agreement of the likeliest tokens with its
source.

Both models run in fp32 block by block, so that only the weights differ and neither is ever in memory whole;
logits come in slices (see :mod:`quant.evaluation.divergence`), so that a vocabulary's size does not show in
the peak. Where the candidate's scheme quantizes activations, or has scales of an FP8 KV cache, its run rounds
them as vLLM does (see :mod:`quant.evaluation.simulation`). Values are means over chunks of text; standard
errors and intervals are over chunks, not tokens (see :mod:`quant.evaluation.intervals`). Perplexity is the
exponential of the mean negative log-likelihood per token (natural logarithm); KL(source ‖ candidate) is in
nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quant.accelerator import device_of
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError, VerificationFailed
from quant.evaluation import divergence
from quant.evaluation.agreement import demand_agreement
from quant.evaluation.divergence import TokenNumbers, token_numbers
from quant.evaluation.intervals import Measured, mean_of, quantile_of
from quant.evaluation.simulation import Simulation
from quant.evaluation.texts import EvaluationText, Sample, joined
from quant.formats.reading import dequantized
from quant.models.calls import call_block
from quant.models.classes import CannotRun
from quant.models.skeleton import Skeleton
from quant.progress import Event, Progress, silent

_BATCH_TOKENS = 2048
#: Where the table by position has its first edge; each later one is twice as far.
_FIRST_EDGE = 512
#: Of all tokens' KL: the one in a hundred that lost most.
_TAIL = 0.99


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What was measured on some tokens. Without a source only perplexity.

    Attributes:
        loss: the rise of the negative log-likelihood, nats per token; its error is that of the difference
            chunk by chunk, far less than the perplexities'.
        top1, top5: share of tokens where both have the same likeliest token; share of the source's five
            likeliest that are among the candidate's five.
        kl_p99, kl_max: what one token in a hundred loses at least, and the token that loses most.
    """

    tokens: int
    chunks: int
    perplexity: Measured
    source_perplexity: Measured | None = None
    kl: Measured | None = None
    top1: Measured | None = None
    perplexity_increase: float | None = None
    loss: Measured | None = None
    top5: Measured | None = None
    kl_p99: Measured | None = None
    kl_max: float | None = None


@dataclass(frozen=True, kw_only=True)
class Part(Measures):
    """A part of the tokens: a domain's text, or positions.

    Attributes:
        first, last: of positions, how many tokens come before the predicted ones, both included; None of a
            domain.
    """

    name: str
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Measures):
    """A checkpoint, measured.

    Attributes:
        activations: what else than weights was rounded in the candidate's run.
        positions: the same by the number of tokens that come before, where chunks are longer than 512.
        domains: the same for each text, where there are several; ``worst_domain`` names that of largest KL.
        notes: what has to be said of the texts.
    """

    path: str
    against: str | None
    text: str
    activations: str | None = None
    positions: tuple[Part, ...] = ()
    domains: tuple[Part, ...] = ()
    worst_domain: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def demand(self, limit: float | None) -> None:
        """
        Raises:
            VerificationFailed: perplexity rose by more than ``limit`` (0.05 is 5 %), or is not a number.
        """
        if not math.isfinite(self.perplexity.mean):
            raise VerificationFailed(
                f"{self.path}: perplexity is {self.perplexity.mean}: the checkpoint is broken, run quant "
                "verify on it"
            )
        if (
            limit is not None
            and self.perplexity_increase is not None
            and not self.perplexity_increase <= limit
        ):
            raise VerificationFailed(
                f"{self.path}: perplexity rose by {self.perplexity_increase:.2%}, the limit is {limit:.2%}"
            )


class Runner:
    """A checkpoint, quantized or not, as a model that runs block by block in fp32."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, simulation: Simulation | None = None):
        self.skeleton = Skeleton(dequantized(checkpoint), device, torch.float32)
        self.simulation = simulation

    def hidden(
        self,
        batches: list[torch.Tensor],
        progress: Progress,
        phase: str,
        seen: Callable[[int, list[torch.Tensor]], None] = lambda block, states: None,
    ) -> list[torch.Tensor]:
        """The states behind the last block; ``seen`` is given those behind each."""
        hidden, calls = self.skeleton.embed(batches)
        with torch.no_grad():
            for index in range(self.skeleton.block_count):
                block = self.skeleton.load_block(index)
                rounded = (
                    self.simulation.inside(
                        block, self.skeleton.block_prefix(index), self.skeleton.linears(index)
                    )
                    if self.simulation
                    else nullcontext()
                )
                with rounded:
                    for b, states in enumerate(hidden):
                        hidden[b] = call_block(block, states, calls[b][index])
                self.skeleton.free_block(index)
                seen(index, hidden)
                progress(Event(phase, index + 1, self.skeleton.block_count))
        return hidden

    @property
    def tokens(self) -> int:
        """Tokens that it can read and give."""
        return min(self.skeleton.vocabulary, self.skeleton.outputs)

    def can_cut(self, batch: torch.Tensor, hidden: torch.Tensor, ranges: list[tuple[int, int]]) -> bool:
        """Whether logits may be asked for in these ranges of columns; tried on one token."""
        return self.skeleton.head_can_be_cut(batch[:1, :1], hidden[..., :1, :1, :].contiguous(), ranges)

    def logits(self, batch: torch.Tensor, hidden: torch.Tensor, columns: tuple[int, int]) -> torch.Tensor:
        """Logits fp32 [B · T, C] of some columns of the vocabulary."""
        whole = columns == (0, self.skeleton.outputs)
        found = self.skeleton.logits(batch, hidden, None if whole else columns)
        return found.float().flatten(0, 1)


class Source:
    """A checkpoint that others are compared with. It is run once, when the first of them is.

    Args:
        length: tokens a chunk, where others than this checkpoint have a say in it too.
    """

    def __init__(
        self,
        path: str | Path,
        sample: Sample | None = None,
        length: int | None = None,
        device: str | None = None,
        progress: Progress = silent,
    ):
        self.path = str(path)
        checkpoint = open_checkpoint(path)
        demand_agreement(checkpoint)
        sample = sample or Sample()
        self.texts, self.notes = sample.texts(checkpoint, length or sample.resolved(checkpoint), progress)
        self.runner = Runner(checkpoint, device_of(device))
        self._hidden: list[torch.Tensor] | None = None

    def hidden(self, batches: list[torch.Tensor], progress: Progress) -> list[torch.Tensor]:
        """The states before the head; the batches are always those of the same texts."""
        if self._hidden is None:
            self._hidden = self.runner.hidden(batches, progress, "source")
        return self._hidden


@contextmanager
def only_measured() -> Iterator[None]:
    """Offers those who cannot have a model run what measures it without.

    Raises:
        CheckpointError: in the place of :class:`quant.models.skeleton.CannotRun`, which tells how to quantize
            such a model.
    """
    try:
        yield
    except CannotRun as error:
        raise CheckpointError(
            f"{error.reason}: this model cannot be run here block by block, so neither perplexity nor KL is "
            "measured: compare its tensors with quant verify --against SOURCE, or measure it in the engine "
            "that serves it"
        ) from error


@only_measured()
def evaluate(
    path: str | Path,
    *,
    against: str | Path | Source | None = None,
    text: str | Path | None = None,
    length: int | None = None,
    chunks: int | None = None,
    domains: bool = False,
    long_context: bool = False,
    device: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measures a checkpoint on a text, or on the bundled ones of several domains.

    Args:
        against: the checkpoint it was made from; adds KL, agreement and the rise of perplexity. A
            :class:`Source` has texts of its own, and is not run again.
        text, length, chunks, domains, long_context: see :class:`quant.evaluation.texts.Sample`.

    Raises:
        QuantError: a checkpoint that cannot be read or run, too little text, models whose tokenizers differ.
    """
    target = device_of(device)
    sample = Sample(None if text is None else Path(text), length, chunks, domains, long_context)
    checkpoint = open_checkpoint(path)
    demand_agreement(checkpoint)
    if against is not None and not isinstance(against, Source):
        others = [checkpoint, open_checkpoint(against)]
        against = Source(against, sample, sample.resolved(*others), device, progress)
    if against is None:
        texts, notes = sample.texts(checkpoint, sample.resolved(checkpoint), progress)
    else:
        texts, notes = against.texts, against.notes
    simulation = Simulation(checkpoint)
    runner = Runner(checkpoint, target, simulation)
    numbers = run_both(runner, against, joined(texts), target, progress)
    return evaluation_of(path, against, texts, notes, simulation, numbers)


def evaluation_of(
    path: str | Path,
    against: Source | None,
    texts: Sequence[EvaluationText],
    notes: tuple[str, ...],
    simulation: Simulation,
    numbers: TokenNumbers,
) -> Evaluation:
    """What numbers of the tokens of texts [chunks, T] say."""
    return Evaluation(
        path=str(path),
        against=None if against is None else against.path,
        text=str(texts[0].file) if len(texts) == 1 else ", ".join(t.name for t in texts),
        activations=simulation.description,
        notes=notes,
        **_summary(numbers),
        **_parts(numbers, texts),
    )


def run_both(
    runner: Runner,
    against: Source | None,
    rows: torch.Tensor,
    device: torch.device,
    progress: Progress,
    among: torch.Tensor | None = None,
) -> TokenNumbers:
    """Runs a candidate and its source on rows of tokens [R, T].

    Args:
        among: int64 [R, T - 1, W], tokens whose log-probabilities are wanted too.

    Returns:
        numbers of [R, T - 1] tokens.

    Raises:
        CheckpointError: the tokens or the source are of another model.
    """
    runners = [runner, *([] if against is None else [against.runner])]
    _demand_one_vocabulary(runners, against, rows)
    batches = list(rows.split(max(1, _BATCH_TOKENS // rows.shape[1])))
    hidden = [
        runner.hidden(batches, progress, "candidate"),
        *([] if against is None else [against.hidden(batches, progress)]),
    ]
    asked = None if among is None else among.split(len(batches[0]))
    parts: list[TokenNumbers] = []
    done, total = 0, rows[:, 1:].numel()
    with ExitStack() as stack, torch.no_grad():
        for one in runners:
            stack.enter_context(one.skeleton.outside())
        ranges = columns_of(runners, batches[0], [h[0] for h in hidden])

        def noted(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(Event("compare", done, total, detail="tokens"))

        for index, batch in enumerate(batches):
            states = [h[index][..., :-1, :] for h in hidden]
            which = None if asked is None else asked[index]
            parts.append(compared(runners, batch, states, ranges, which, device, noted))
    return TokenNumbers.joined(parts, 0)


def columns_of(
    runners: Sequence[Runner], batch: torch.Tensor, states: Sequence[torch.Tensor]
) -> list[tuple[int, int]]:
    """Ranges of columns in which all of them give logits; tried on the first token of a batch [B, T] with
    its states. The models' outer parts are to be loaded (:meth:`Skeleton.outside`)."""
    vocabulary = runners[0].skeleton.outputs
    ranges = list(divergence.slices(vocabulary, divergence.COLUMNS))
    if len(ranges) == 1 or all(r.can_cut(batch, h, ranges) for r, h in zip(runners, states, strict=True)):
        return ranges
    return [(0, vocabulary)]


def compared(
    runners: Sequence[Runner],
    tokens: torch.Tensor,
    states: Sequence[torch.Tensor],
    ranges: list[tuple[int, int]],
    among: torch.Tensor | None,
    device: torch.device,
    noted: Callable[[int], None] = lambda tokens: None,
) -> TokenNumbers:
    """Numbers [B, T] of tokens [B, T + 1] from the states [..., T, H] of all but the last, so many tokens at
    a time that logits stay small.

    Args:
        noted: is told how many tokens are done.
    """
    length, pieces = tokens.shape[1] - 1, []
    step = max(1, divergence.SLICE // (ranges[0][1] * len(tokens)))
    for first in range(0, length, step):
        last = min(first + step, length)
        some = [h[..., first:last, :].contiguous() for h in states]
        which = None if among is None else among[:, first:last]
        pieces.append(_compared(runners, tokens[:, first : last + 1], some, ranges, which, device))
        noted(len(tokens) * (last - first))
    return TokenNumbers.joined(pieces, 1)


def _demand_one_vocabulary(runners: Sequence[Runner], against: Source | None, rows: torch.Tensor) -> None:
    sizes, path = [r.tokens for r in runners], runners[0].skeleton.checkpoint.path
    if int(rows.max()) >= min(sizes):
        raise CheckpointError(
            f"{path}: the text has token {int(rows.max())}, the model {sizes[0]}: the tokenizer belongs to "
            "another model"
        )
    if against is not None and sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{path}: has a vocabulary of {sizes[0]:,}, {against.path} one of {sizes[1]:,}: it was not made "
            "from that checkpoint"
        )


def _compared(
    runners: Sequence[Runner],
    tokens: torch.Tensor,
    states: Sequence[torch.Tensor],
    ranges: list[tuple[int, int]],
    among: torch.Tensor | None,
    device: torch.device,
) -> TokenNumbers:
    """Numbers [B, T] of tokens [B, T + 1] from the states [..., T, H] of all but the last."""
    batch = tokens[:, :-1]

    def logits(runner: Runner, hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        return runner.logits(batch, hidden, (first, last))

    own, *other = [partial(logits, r, h) for r, h in zip(runners, states, strict=True)]
    wanted = tokens[:, 1:].reshape(-1).to(device)
    asked = None if among is None else among.flatten(0, 1).to(device)
    found = token_numbers(own, other[0] if other else None, ranges, wanted, asked)
    return found.shaped(*batch.shape)


def _summary(numbers: TokenNumbers) -> dict[str, Any]:
    """Fields of :class:`Part` of tokens [chunks, T]."""
    nll = numbers.nll.double().mean(1).tolist()
    own = _perplexity(nll)
    found: dict[str, Any] = {
        "tokens": numbers.nll.numel(),
        "chunks": len(numbers.nll),
        "perplexity": own,
    }
    if numbers.source_nll is None:
        return found
    assert numbers.kl is not None and numbers.top1 is not None and numbers.top5 is not None
    source = numbers.source_nll.double().mean(1).tolist()
    other = _perplexity(source)
    return found | {
        "source_perplexity": other,
        "kl": mean_of(numbers.kl.double().mean(1).tolist()),
        "top1": mean_of(numbers.top1.double().mean(1).tolist()),
        "perplexity_increase": own.mean / other.mean - 1,
        "loss": mean_of([a - b for a, b in zip(nll, source, strict=True)]),
        "top5": mean_of(numbers.top5.double().mean(1).tolist()),
        "kl_p99": quantile_of(numbers.kl, _TAIL),
        "kl_max": float(numbers.kl.max()),
    }


def _parts(numbers: TokenNumbers, texts: Sequence[EvaluationText]) -> dict[str, Any]:
    """The same by domain and by position."""
    domains = []
    if len(texts) > 1:
        first = 0
        for text in texts:
            last = first + len(text.rows)
            domains.append(Part(name=text.name, **_summary(numbers.rows(first, last))))
            first = last
    positions, length = [], numbers.nll.shape[1]
    if length > _FIRST_EDGE:
        for lower, upper in edges(length):
            # the token at index i is predicted from the i + 1 tokens up to it
            name = f"{lower:,}–{upper:,}"
            part = _summary(numbers.columns(lower - 1, upper))
            positions.append(Part(name=name, first=lower, last=upper, **part))
    worst = max(domains, key=lambda d: d.kl.mean if d.kl is not None else -math.inf, default=None)
    return {
        "domains": tuple(domains),
        "positions": tuple(positions),
        "worst_domain": None if worst is None or worst.kl is None else worst.name,
    }


def edges(length: int) -> list[tuple[int, int]]:
    """First and last number of tokens that come before, of each row of the table by position.

    >>> edges(1500)
    [(1, 512), (513, 1024), (1025, 1500)]
    """
    found, upper = [], 0
    while upper < length:
        lower, upper = upper + 1, min(2 * upper or _FIRST_EDGE, length)
        found.append((lower, upper))
    return found


def _perplexity(nll: list[float]) -> Measured:
    mean = mean_of(nll)

    def power(value: float) -> float:
        try:
            return math.exp(value)
        except OverflowError:
            return math.inf

    value = power(mean.mean)
    ends = None if mean.interval is None else (power(mean.interval[0]), power(mean.interval[1]))
    return Measured(value, value * mean.standard_error, ends)
