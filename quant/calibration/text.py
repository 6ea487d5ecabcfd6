"""Calibration text: documents to tokens, tokens to rows of one length. Which files hold documents is in
:mod:`quant.calibration.files`, how a row of one is written in :mod:`quant.calibration.records`.

Rows are cut from the running text in file order, without padding, so that every token of a row is real. With
``shuffle`` they are drawn from the whole text by a generator of our own; the process's global seed is never
touched.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from quant.calibration.files import streamed
from quant.calibration.records import Document, Messages, Streamed, Tally, TextError
from quant.errors import DiskFull, first_line
from quant.units import format_size

#: Characters tokenized at a time: the start of a large file is enough for most jobs.
_PIECE = 1 << 20
#: Bytes of token ids that stay in memory.
_HELD = 64 << 20


@dataclass(frozen=True)
class Rows:
    """Token ids for calibration.

    Attributes:
        tokens: int64 [samples, length].
        held_out: int64 [1, length], the row after the last: errors of a layer are measured on it. None when
            the text ended.
        digest: of all tokens, for fingerprints.
        notes: what was passed over on the way, a sentence each.
    """

    tokens: torch.Tensor
    held_out: torch.Tensor | None
    digest: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What a report says of them."""
        return {
            "rows": len(self.tokens),
            "length": self.tokens.shape[1],
            "digest": self.digest,
            "notes": list(self.notes),
        }


def _pieces(text: str | Streamed) -> Iterator[str]:
    """The text in runs of one to two million characters, cut where a line starts with something other than
    white space; a run without such a line is cut before a word, or anywhere where there is none either. Of a
    streamed one no more is read than the cut of the next run takes."""
    source = iter([text] if isinstance(text, str) else text)
    held, start, ended = "", 0, False
    while True:
        if not ended and len(held) - start <= 2 * _PIECE:  # a cut looks one character beyond two million
            parts = [held[start:]]
            size, start = len(parts[0]), 0
            while size <= 2 * _PIECE and not ended:
                more = next(source, None)
                ended = more is None
                parts.append(more or "")
                size += len(parts[-1])
            held = "".join(parts)
        if len(held) - start <= _PIECE:
            break
        least, most = start + _PIECE, start + 2 * _PIECE
        cut = held.find("\n", least, most)
        while cut != -1 and cut + 1 < len(held) and held[cut + 1].isspace():
            cut = held.find("\n", cut + 1, most)
        if cut != -1:
            end = cut + 1
        elif len(held) <= most:
            break
        else:
            end = space if (space := held.rfind(" ", least, most)) != -1 else most
        yield held[start:end]
        start = end
    yield held[start:]


class _Tokens:
    """Token ids one behind the other, four bytes each: in memory while they are few, then in a temporary
    file."""

    def __init__(self, most: int = _HELD):
        self._file = tempfile.SpooledTemporaryFile(most)
        self.count = 0

    def __enter__(self) -> _Tokens:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def extend(self, ids: Sequence[int]) -> None:
        """
        Raises:
            DiskFull: the folder for temporary files has no room for them.
        """
        try:
            self._file.write(array("i", ids).tobytes())
        except OSError as error:
            raise DiskFull(
                f"{tempfile.gettempdir()}: cannot hold {format_size(4 * self.count)} of token ids "
                f"({error.strerror}): free some room, or leave --shuffle out"
            ) from error
        self.count += len(ids)

    def rows(self, numbers: Iterable[int], length: int) -> torch.Tensor:
        """int64 [rows, length], of those numbers."""
        made = []
        for number in numbers:
            self._file.seek(4 * number * length)
            made.append(torch.frombuffer(bytearray(self._file.read(4 * length)), dtype=torch.int32).long())
        return torch.stack(made)


def _joined(messages: Messages) -> str:
    """A conversation as plain text, for tokenizers without a template."""
    return "\n\n".join(m["content"] for m in messages if m["content"])


def _through_template(tokenizer: Any, messages: Messages, way_out: str) -> str:
    """
    Raises:
        TextError: the template refuses the messages; it says ``way_out``.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    # templates are programs of their authors: jinja2's errors, or whatever they raise
    except Exception as error:
        raise TextError(
            f"the chat template cannot take the text's messages ({first_line(error)}): mend them, or "
            f"{way_out}"
        ) from error
    return text


def token_runs(
    tokenizer: Any, sources: Iterable[Document | Streamed], chat_template: bool | None
) -> Iterator[list[int]]:
    """Token ids, document by document; long texts in several runs.

    Args:
        chat_template: conversations go through the tokenizer's template (None and True) or are joined as
            plain text (False); with True plain texts become the message of a user.

    Raises:
        TextError: a template is wanted and the tokenizer has none, or it refuses the messages.
    """
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise TextError(
            "--chat-template: the tokenizer has no chat template: use --no-chat-template, or leave it out"
        )
    for source in sources:
        if isinstance(source, (str, Streamed)) and chat_template:
            source = [{"role": "user", "content": "".join(source)}]
        if isinstance(source, list):
            if chat_template is False:
                source = _joined(source)
            elif not getattr(tokenizer, "chat_template", None):
                raise TextError(
                    "the calibration text holds messages and the tokenizer has no chat template: use "
                    "--no-chat-template"
                )
            else:
                text = _through_template(tokenizer, source, "use --no-chat-template")
                yield tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has put them in
                continue
        for number, piece in enumerate(_pieces(source)):
            yield tokenizer(piece, add_special_tokens=number == 0)["input_ids"]


def calibration_rows(
    tokenizer: Any,
    paths: Sequence[Path],
    samples: int,
    length: int,
    *,
    vocabulary: int,
    shuffle: bool = False,
    seed: int = 0,
    chat_template: bool | None = None,
) -> Rows:
    """``samples`` rows of ``length`` tokens, and one more to measure errors on where the text has it.

    Raises:
        TextError: too little text (the message says how much is missing), or token ids that the model does
            not have.
    """
    if samples < 1 or length < 2:
        raise TextError(f"{samples} rows of {length} tokens are no text: one row of two tokens is the least")
    wanted = (samples + 1) * length
    characters = 0
    tally = Tally()

    def read(text: Streamed) -> Iterator[str]:
        nonlocal characters
        for piece in text:
            characters += len(piece)
            yield piece

    def counted() -> Iterator[Document | Streamed]:
        nonlocal characters
        for document in streamed(paths, tally):
            if isinstance(document, Streamed):
                yield Streamed(partial(read, document))
                continue
            characters += (
                len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
            )
            yield document

    with _Tokens() as ids:
        for run in token_runs(tokenizer, counted(), chat_template):
            ids.extend(run)
            if not shuffle and ids.count >= wanted:
                break
        available = ids.count // length
        if available < samples:
            missing = samples * length - ids.count
            about = f", about {round(missing * characters / ids.count):,} characters" if ids.count else ""
            raise TextError(
                f"the calibration text has {ids.count:,} tokens, {samples} rows of {length} take "
                f"{samples * length:,}: {missing:,} tokens{about} are missing. "
                "Give more text, or fewer --samples, or a shorter --sequence-length"
                + "".join(f"; {note}" for note in tally.notes())
            )
        order: Iterable[int] = range(available)
        if shuffle:
            order = torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()
        rows = ids.rows(islice(order, samples + 1), length)
    if int(rows.max()) >= vocabulary:
        raise TextError(
            f"the tokenizer gives token {int(rows.max())}, the model has {vocabulary}: the tokenizer "
            "belongs to another model"
        )
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return Rows(rows[:samples], rows[samples:] if len(rows) > samples else None, digest, tally.notes())


def evaluation_rows(
    tokenizer: Any, path: Path, length: int, chunks: int, note: Callable[[str], None] = lambda sentence: None
) -> torch.Tensor:
    """int64 [up to ``chunks``, length]: each row is the start token followed by ``length`` - 1 tokens of the
    text (without a start token, ``length``). Conversations go through the chat template of a tokenizer that
    has one.

    Args:
        note: is told what of the text was passed over.

    Raises:
        TextError: the text does not fill one row.
    """
    start = tokenizer.bos_token_id
    lead = [] if start is None else [start]
    step = length - len(lead)
    ids: list[int] = []
    tally = Tally()

    def text(document: Document | Streamed) -> str | Streamed:
        if isinstance(document, (str, Streamed)):
            return document
        if getattr(tokenizer, "chat_template", None):
            return _through_template(tokenizer, document, "evaluate on plain text")
        return _joined(document)

    for piece in itertools.chain.from_iterable(_pieces(text(d)) for d in streamed([path], tally)):
        ids.extend(tokenizer(piece, add_special_tokens=False)["input_ids"])
        if len(ids) >= step * chunks:
            break
    count = min(chunks, len(ids) // step)
    if not count:
        raise TextError(
            f"{path}: has {len(ids):,} tokens, one chunk of {length} takes {step:,}: give more text, or a "
            "smaller --length" + "".join(f"; {sentence}" for sentence in tally.notes())
        )
    for sentence in tally.notes():
        note(sentence)
    return torch.tensor([lead + ids[i * step : (i + 1) * step] for i in range(count)])
