"""Which text a checkpoint is measured on: one file, or the bundled texts of several domains; in chunks of
which length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant import defaults
from quant.calibration.files import bundled
from quant.calibration.text import evaluation_rows
from quant.checkpoint.reader import Checkpoint
from quant.errors import QuantError, UsageError
from quant.offline import load_tokenizer
from quant.progress import Event, Progress
from quant.vllm.context import context_length

#: Domain → its bundled text. Where each is from and its licence: quant/calibration/data/SOURCE.md.
DOMAINS = {
    "prose": "wikitext-2-test",
    "code": "code.txt",
    "chinese": "chinese.txt",
    "maths": "maths.txt",
    "chat": "chat.jsonl",
}
#: Share of a text's tokens that may be the tokenizer's word for what it does not know, before it is said.
_UNKNOWN = 0.05


@dataclass(frozen=True)
class EvaluationText:
    """Chunks of one text: int64 [chunks, length], each with the start token in front where there is one."""

    name: str
    file: Path
    rows: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """What to measure on.

    Attributes:
        text: any text that calibration reads; None for the bundled wikitext-2 test.
        length: tokens a chunk, the start token included; None for the smaller of 512 (``long_context``:
            8,192) and the model's context.
        chunks: at most so many of each text; None for 100 (``domains``: 16, ``long_context``: 8).
        domains: the bundled texts of :data:`DOMAINS` instead of one.
        long_context: chunks that reach positions beyond 4,096 where the model's context does.
    """

    text: Path | None = None
    length: int | None = None
    chunks: int | None = None
    domains: bool = False
    long_context: bool = False

    def __post_init__(self) -> None:
        if self.domains and self.text is not None:
            raise UsageError(f"--domains has texts of its own: leave --text {self.text} out, or it")

    @property
    def most(self) -> int:
        """Chunks of each text at the most."""
        if self.chunks is not None:
            return self.chunks
        if self.long_context:
            return defaults.LONG_CHUNKS
        return defaults.DOMAIN_CHUNKS if self.domains else defaults.EVALUATION_CHUNKS

    def resolved(self, *checkpoints: Checkpoint) -> int:
        """Tokens a chunk: see :func:`chunk_length`."""
        return chunk_length(self.length, *checkpoints, long_context=self.long_context)

    def texts(
        self, checkpoint: Checkpoint, length: int, progress: Progress
    ) -> tuple[tuple[EvaluationText, ...], tuple[str, ...]]:
        """The texts in a checkpoint's tokens, and what has to be said of them.

        Raises:
            TextError: one that does not fill a chunk.
        """
        tokenizer, notes = load_tokenizer(checkpoint.path), []
        if self.domains:
            files = {name: bundled(text) for name, text in DOMAINS.items()}
        else:
            file = self.text if self.text is not None else bundled("wikitext-2-test")
            files = {Path(file).name: Path(file)}
        made = []
        for name, file in files.items():

            def note(sentence: str, file: Path = file) -> None:
                notes.append(f"evaluation text: {sentence}")

            rows = evaluation_rows(tokenizer, file, length, self.most, note)
            made.append(EvaluationText(name, file, rows))
            if (share := _unknown(tokenizer, rows)) > _UNKNOWN:
                notes.append(
                    f"{name}: {share:.0%} of its tokens are unknown to the tokenizer: its numbers say "
                    "little of such text"
                )
        if self.long_context and length <= defaults.LONG_POSITION:
            context = context_length(checkpoint.config)
            why = "" if context is None or context > length else ", which is all of its context"
            notes.append(
                f"{checkpoint.path}: chunks have {length:,} tokens{why}: no position beyond "
                f"{defaults.LONG_POSITION:,} is measured"
            )
        for sentence in notes:
            progress(Event("text", message=sentence, warning=True))
        return tuple(made), tuple(notes)


def _unknown(tokenizer: Any, rows: torch.Tensor) -> float:
    unknown = getattr(tokenizer, "unk_token_id", None)
    start = getattr(tokenizer, "bos_token_id", None)
    return 0.0 if unknown is None or unknown == start else float((rows == unknown).float().mean())


def chunk_length(asked: int | None, *checkpoints: Checkpoint, long_context: bool = False) -> int:
    """Tokens a chunk: those asked for, or the smaller of 512 (with ``long_context`` 8,192) and the shortest
    context.

    Raises:
        QuantError: more are asked for than a model's context has.
    """
    contexts = [x for c in checkpoints if (x := context_length(c.config)) is not None]
    if asked is not None and contexts and asked > min(contexts):
        raise QuantError(f"--length is {asked}: the model's longest context is {min(contexts)}")
    usual = defaults.LONG_LENGTH if long_context else defaults.EVALUATION_LENGTH
    return asked or min([usual, *contexts])


def joined(texts: Sequence[EvaluationText]) -> torch.Tensor:
    """The chunks of all, one text behind the other."""
    return torch.cat([t.rows for t in texts])
