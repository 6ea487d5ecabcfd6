"""Calibration text: documents to tokens, tokens to rows of one length. Which files hold documents is in
:mod:`quant.calibration.files`, how a row of one is written in :mod:`quant.calibration.records`.

Rows are cut from the running text in file order, without padding, so that every token of a row is real. With
``shuffle`` they are drawn from the whole text by a generator of our own; the process's global seed is never
touched.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.calibration.files import documents
from quant.calibration.records import Document, Messages, Tally, TextError

#: Characters tokenized at a time: the start of a large file is enough for most jobs.
_PIECE = 1 << 20


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


def _pieces(text: str) -> Iterator[str]:
    """The text in runs of one to two million characters, cut where a line starts with something other than
    white space; a run without such a line is cut before a word, or anywhere where there is none either."""
    start = 0
    while len(text) - start > _PIECE:
        least, most = start + _PIECE, start + 2 * _PIECE
        cut = text.find("\n", least, most)
        while cut != -1 and cut + 1 < len(text) and text[cut + 1].isspace():
            cut = text.find("\n", cut + 1, most)
        if cut != -1:
            end = cut + 1
        elif len(text) <= most:
            break
        else:
            end = space if (space := text.rfind(" ", least, most)) != -1 else most
        yield text[start:end]
        start = end
    yield text[start:]


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
            f"the chat template cannot take the text's messages ({error}): mend them, or {way_out}"
        ) from error
    return text


def token_runs(
    tokenizer: Any, sources: Iterable[Document], chat_template: bool | None
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
        if isinstance(source, str) and chat_template:
            source = [{"role": "user", "content": source}]
        if not isinstance(source, str):
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
    wanted = (samples + 1) * length
    ids: list[int] = []
    characters = 0
    tally = Tally()

    def counted() -> Iterator[Document]:
        nonlocal characters
        for document in documents(paths, tally):
            characters += (
                len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
            )
            yield document

    for run in token_runs(tokenizer, counted(), chat_template):
        ids.extend(run)
        if not shuffle and len(ids) >= wanted:
            break
    available = len(ids) // length
    if available < samples:
        missing = samples * length - len(ids)
        about = f", about {round(missing * characters / len(ids)):,} characters" if ids else ""
        raise TextError(
            f"the calibration text has {len(ids):,} tokens, {samples} rows of {length} take "
            f"{samples * length:,}: {missing:,} tokens{about} are missing. "
            "Give more text, or fewer --samples, or a shorter --sequence-length"
            + "".join(f"; {note}" for note in tally.notes())
        )
    rows = torch.tensor(ids[: available * length], dtype=torch.int64).view(available, length)
    if shuffle:
        rows = rows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))]
    rows = rows[: samples + 1].clone()
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

    def text(document: Document) -> str:
        if isinstance(document, str):
            return document
        if getattr(tokenizer, "chat_template", None):
            return _through_template(tokenizer, document, "evaluate on plain text")
        return _joined(document)

    for piece in itertools.chain.from_iterable(_pieces(text(d)) for d in documents([path], tally)):
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
