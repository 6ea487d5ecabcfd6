"""Calibration text: files to documents, documents to tokens, tokens to rows of one length.

Rows are cut from the running text in file order, without padding, so that every token of a row is real. With
``shuffle`` they are drawn from the whole text by a generator of our own; the process's global seed is never
touched.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import torch

from quant.errors import QuantError

#: Characters tokenized at a time: the start of a large file is enough for most jobs.
_PIECE = 1 << 20

_SURROGATE = re.compile("[\\ud800-\\udfff]")

Messages = list[dict[str, str]]


class TextError(QuantError):
    """Text that cannot be read or is too short."""


@dataclass(frozen=True)
class Rows:
    """Token ids for calibration.

    Attributes:
        tokens: int64 [samples, length].
        held_out: int64 [1, length], the row after the last: errors of a layer are measured on it. None when
            the text ended.
        digest: of all tokens, for fingerprints.
    """

    tokens: torch.Tensor
    held_out: torch.Tensor | None
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """What a report says of them."""
        return {"rows": len(self.tokens), "length": self.tokens.shape[1], "digest": self.digest}


def bundled(name: str) -> Path:
    """Path of a text that ships with the package: ``wikipedia`` or ``wikitext-2-test``."""
    return Path(str(resources.files("quant.calibration.data") / f"{name}.txt.gz"))


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _txt(path: Path) -> Iterator[str]:
    with _open(path) as stream:
        yield stream.read()


def _characters(text: str, where: str) -> str:
    """The text, unless it cannot be encoded: JSON may spell half of a surrogate pair, and tokenizers fail on
    it."""
    if not text.isascii() and _SURROGATE.search(text):
        raise TextError(
            f"{where}: holds half of a surrogate pair, which is no character: mend or remove that record"
        )
    return text


def _record(value: Any, where: str) -> str | Messages:
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            return _characters(value["text"], where)
        messages = value.get("messages")
        if (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            )
        ):
            for message in messages:
                _characters(message["content"], where)
            return messages
    raise TextError(f'{where}: needs "text" (a string) or "messages" (a list of role and content)')


def _jsonl(path: Path) -> Iterator[str | Messages]:
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TextError(
                    f"{path}, line {number}: not JSON ({error}): give one JSON object a line"
                ) from error
            yield _record(value, f"{path}, line {number}")


def _parquet(path: Path) -> Iterator[str | Messages]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TextError(f"{path}: reading parquet needs pyarrow: pip install 'quant[parquet]'") from error
    try:
        file = parquet.ParquetFile(path)
        columns = [c for c in ("text", "messages") if c in file.schema_arrow.names]
        if not columns:
            raise TextError(
                f"{path}: has columns {', '.join(file.schema_arrow.names)}: one named text or messages is "
                "needed"
            )
        for number, batch in enumerate(file.iter_batches(columns=columns)):
            for value in batch.to_pylist():
                yield _record(value, f"{path}, batch {number}")
    except (OSError, ValueError) as error:
        raise TextError(f"{path}: is not a readable parquet file: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[str | Messages]]] = {
    ".txt": _txt, ".md": _txt, ".text": _txt, ".utf8": _txt, ".jsonl": _jsonl, ".ndjson": _jsonl,
    ".parquet": _parquet,
}  # fmt: skip


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _beginning(path: Path) -> Iterator[str]:
    """The text in pieces of 64 KiB."""
    with _open(path) as stream:
        yield from iter(lambda: stream.read(1 << 16), "")


def documents(
    paths: Sequence[Path], readers: Mapping[str, Callable[[Path], Iterator[str | Messages]]] = _READERS
) -> Iterator[str | Messages]:
    """Texts and conversations of files and directories (sorted by name), in order; ``readers`` by the kind of
    file.

    Raises:
        TextError: a path that does not exist, an unknown kind of file, a directory without known files,
            invalid content.
    """
    for path in paths:
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.is_file() and _suffix(f) in _READERS)
            if not files:
                raise TextError(f"{path}: no file of a known kind in it ({', '.join(_READERS)})")
        elif path.exists() and not path.is_file():
            raise TextError(
                f"{path}: is neither a regular file nor a directory: write the text to a file first"
            )
        elif path.exists():
            files = [path]
        else:
            raise TextError(f"{path}: there is no such calibration text")
        for file in files:
            reader = readers.get(_suffix(file))
            if reader is None:
                raise TextError(
                    f"{file}: unknown kind of text: known are {', '.join(_READERS)}, each also as .gz"
                )
            try:
                yield from reader(file)
            except UnicodeDecodeError as error:
                raise TextError(f"{file}: not UTF-8 text (byte {error.start}): convert it first") from error
            except (OSError, EOFError, zlib.error) as error:
                raise TextError(f"{file}: cannot be read: {error}") from error


def empty_texts(paths: Sequence[Path]) -> list[str]:
    """What is wrong with texts before any of it is tokenized: each that is not there, of no known kind or not
    readable; or that all of them together hold nothing. Each is read until it says something."""
    readers = {kind: _beginning if reader is _txt else reader for kind, reader in _READERS.items()}
    problems, empty = [], True
    for path in paths:
        try:
            empty = (
                not any(d.strip() if isinstance(d, str) else d for d in documents([path], readers)) and empty
            )
        except TextError as error:
            problems.append(str(error))
            empty = False
    if empty:
        problems.append(
            f"{', '.join(map(str, paths))}: the calibration text is empty: give some, or leave "
            "--calibration-dataset out for the bundled one"
        )
    return problems


def _pieces(text: str) -> Iterator[str]:
    """The text in runs of about a million characters, cut where a line starts with something other than white
    space."""
    start = 0
    while len(text) - start > _PIECE:
        cut = text.find("\n", start + _PIECE)
        while cut != -1 and cut + 1 < len(text) and text[cut + 1].isspace():
            cut = text.find("\n", cut + 1)
        if cut == -1:
            break
        yield text[start : cut + 1]
        start = cut + 1
    yield text[start:]


def token_runs(
    tokenizer: Any, sources: Iterator[str | Messages], chat_template: bool | None
) -> Iterator[list[int]]:
    """Token ids, document by document; long texts in several runs.

    Args:
        chat_template: conversations go through the tokenizer's template (None and True) or are joined as
            plain text (False); with True plain texts become the message of a user.

    Raises:
        TextError: a template is wanted and the tokenizer has none.
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
                source = "\n\n".join(m["content"] for m in source)
            elif not getattr(tokenizer, "chat_template", None):
                raise TextError(
                    "the calibration text holds messages and the tokenizer has no chat template: use "
                    "--no-chat-template"
                )
            else:
                try:
                    source = tokenizer.apply_chat_template(source, tokenize=False)
                # templates are programs of their authors: jinja2's errors, or whatever they raise
                except Exception as error:
                    raise TextError(
                        f"the chat template cannot take the calibration text's messages ({error}): mend "
                        "them, or use --no-chat-template"
                    ) from error
                yield tokenizer(source, add_special_tokens=False)["input_ids"]  # the template has put them in
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

    def counted() -> Iterator[str | Messages]:
        nonlocal characters
        for document in documents(paths):
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
    return Rows(rows[:samples], rows[samples:] if len(rows) > samples else None, digest)


def evaluation_rows(tokenizer: Any, path: Path, length: int, chunks: int) -> torch.Tensor:
    """int64 [up to ``chunks``, length]: each row is the start token followed by ``length`` - 1 tokens of the
    text (without a start token, ``length``).

    Raises:
        TextError: the text does not fill one row.
    """
    start = tokenizer.bos_token_id
    lead = [] if start is None else [start]
    step = length - len(lead)
    ids: list[int] = []
    for piece in itertools.chain.from_iterable(_pieces(d) for d in documents([path]) if isinstance(d, str)):
        ids.extend(tokenizer(piece, add_special_tokens=False)["input_ids"])
        if len(ids) >= step * chunks:
            break
    count = min(chunks, len(ids) // step)
    if not count:
        raise TextError(
            f"{path}: has {len(ids):,} tokens, one chunk of {length} takes {step:,}: give more text, or a "
            "smaller --length"
        )
    return torch.tensor([lead + ids[i * step : (i + 1) * step] for i in range(count)])
