"""How good a checkpoint is: perplexity, and KL divergence and top-1 agreement with its source.

Both models run in fp32 block by block, so that only the weights differ and neither is ever in memory whole.
Where the candidate's scheme quantizes activations, or has scales of an FP8 KV cache, its run rounds them as
vLLM does (see :mod:`quant.evaluation.simulation`). Values are means over chunks of text; standard errors are
over chunks. Perplexity is the exponential of the mean negative log-likelihood per token (natural logarithm);
KL(source ‖ candidate) is in nats per token.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quant import defaults
from quant.calibration.files import bundled
from quant.calibration.text import evaluation_rows
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.devices import device_of
from quant.errors import CheckpointError, QuantError, VerificationFailed
from quant.evaluation.agreement import demand_agreement
from quant.evaluation.simulation import Simulation
from quant.formats.reading import dequantized
from quant.models.calls import call_block
from quant.models.classes import CannotRun
from quant.models.skeleton import Skeleton
from quant.offline import load_tokenizer
from quant.progress import Event, Progress, silent
from quant.vllm.context import context_length

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Measured:
    """A mean over chunks with its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured. Without a source only perplexity. ``activations`` says what else than weights was
    rounded in the candidate's run."""

    path: str
    against: str | None
    text: str
    tokens: int
    chunks: int
    perplexity: Measured
    source_perplexity: Measured | None = None
    kl: Measured | None = None
    top1: Measured | None = None
    perplexity_increase: float | None = None
    activations: str | None = None

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

    def hidden(self, batches: list[torch.Tensor], progress: Progress, phase: str) -> list[torch.Tensor]:
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
                progress(Event(phase, index + 1, self.skeleton.block_count))
        return hidden

    def log_probabilities(self, batch: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.skeleton.logits(batch, hidden)[:, :-1].float().log_softmax(-1)


class Source:
    """A checkpoint that others are compared with. It is run once, when the first of them is.

    Args:
        length: tokens a chunk; None for the smaller of 512 and this model's context.
    """

    def __init__(
        self,
        path: str | Path,
        text: str | Path | None = None,
        length: int | None = None,
        chunks: int = 0,
        device: str | None = None,
        progress: Progress = silent,
    ):
        self.path = str(path)
        checkpoint = open_checkpoint(path)
        demand_agreement(checkpoint)
        self.file = Path(text) if text is not None else bundled("wikitext-2-test")
        length = chunk_length(length, checkpoint)
        self.rows = evaluation_rows(
            load_tokenizer(checkpoint.path),
            self.file,
            length,
            chunks or defaults.EVALUATION_CHUNKS,
            _noting(progress),
        )
        self.runner = Runner(checkpoint, device_of(device))
        self._hidden: list[torch.Tensor] | None = None

    def hidden(self, batches: list[torch.Tensor], progress: Progress) -> list[torch.Tensor]:
        """The states before the head; the batches are always those of ``rows``."""
        if self._hidden is None:
            self._hidden = self.runner.hidden(batches, progress, "source")
        return self._hidden


def chunk_length(asked: int | None, *checkpoints: Checkpoint) -> int:
    """Tokens a chunk: those asked for, or the smaller of 512 and the shortest context.

    Raises:
        QuantError: more are asked for than a model's context has.
    """
    contexts = [x for c in checkpoints if (x := context_length(c.config)) is not None]
    if asked is not None and contexts and asked > min(contexts):
        raise QuantError(f"--length is {asked}: the model's longest context is {min(contexts)}")
    return asked or min([defaults.EVALUATION_LENGTH, *contexts])


def _noting(progress: Progress) -> Callable[[str], None]:
    """Says what of an evaluation text was passed over."""
    return lambda note: progress(Event("text", message=f"evaluation text: {note}", warning=True))


def _measured(values: list[float]) -> Measured:
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Measured(mean, math.nan)
    return Measured(mean, statistics.stdev(values) / math.sqrt(len(values)))


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
    chunks: int = defaults.EVALUATION_CHUNKS,
    device: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measures a checkpoint on a text.

    Args:
        against: the checkpoint it was made from; adds KL, top-1 agreement and the rise of perplexity. A
            :class:`Source` has text, length and chunks of its own, and is not run again.
        text: any text that calibration reads; the bundled wikitext-2 test by default.
        length: tokens a chunk, the start token included; None for the smaller of 512 and the model's context.

    Raises:
        QuantError: a checkpoint that cannot be read or run, too little text, models whose tokenizers differ.
    """
    target = device_of(device)
    checkpoint = open_checkpoint(path)
    demand_agreement(checkpoint)
    if against is not None and not isinstance(against, Source):
        against = Source(against, text, chunk_length(length, checkpoint), chunks, device, progress)
    if against is None:
        file = Path(text) if text is not None else bundled("wikitext-2-test")
        rows = evaluation_rows(
            load_tokenizer(checkpoint.path),
            file,
            chunk_length(length, checkpoint),
            chunks,
            _noting(progress),
        )
    else:
        file, rows = against.file, against.rows
    simulation = Simulation(checkpoint)
    runners = [Runner(checkpoint, target, simulation), *([] if against is None else [against.runner])]
    if int(rows.max()) >= min(r.skeleton.vocabulary for r in runners):
        raise CheckpointError(
            f"{path}: the text has token {int(rows.max())}, the model {runners[0].skeleton.vocabulary}: the "
            "tokenizer belongs to another model"
        )
    sizes = [r.skeleton.vocabulary for r in runners]
    if against is not None and sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{path}: has a vocabulary of {sizes[0]:,}, {against.path} one of {sizes[1]:,}: it was not made "
            "from that checkpoint"
        )
    batches = list(rows.split(max(1, _BATCH_TOKENS // rows.shape[1])))
    hidden = [
        runners[0].hidden(batches, progress, "candidate"),
        *([] if against is None else [against.hidden(batches, progress)]),
    ]
    nll: list[float] = []
    source_nll: list[float] = []
    kl: list[float] = []
    agree: list[float] = []
    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(runner.skeleton.outside())
        for index, batch in enumerate(batches):
            wanted = batch[:, 1:, None].to(target)
            logs = [
                r.log_probabilities(batch, states[index]) for r, states in zip(runners, hidden, strict=True)
            ]
            nll += (-logs[0].gather(-1, wanted)).mean((1, 2)).tolist()
            if against is not None:
                source_nll += (-logs[1].gather(-1, wanted)).mean((1, 2)).tolist()
                kl += (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean(-1).tolist()
                agree += (logs[0].argmax(-1) == logs[1].argmax(-1)).float().mean(-1).tolist()
            progress(Event("compare", index + 1, len(batches)))
    own = _perplexity(nll)
    if against is None:
        return Evaluation(
            str(path),
            None,
            str(file),
            rows[:, 1:].numel(),
            len(rows),
            own,
            activations=simulation.description,
        )
    other = _perplexity(source_nll)
    return Evaluation(
        str(path),
        against.path,
        str(file),
        rows[:, 1:].numel(),
        len(rows),
        own,
        other,
        _measured(kl),
        _measured(agree),
        own.mean / other.mean - 1,
        simulation.description,
    )


def _perplexity(nll: list[float]) -> Measured:
    mean = _measured(nll)
    try:
        value = math.exp(mean.mean)
    except OverflowError:
        value = math.inf
    return Measured(value, value * mean.standard_error)
