"""Rows of a data set, in the shapes that people publish them in, to documents: plain texts or conversations.

A row is one line of JSON, one element of a JSON array, one record of a CSV file or one row of a table.
:data:`SHAPES` says which of its columns hold what; adding a shape is adding a line there.

- Names are compared without regard to case. Shapes are tried in the order of the table; one whose columns are
  empty or null leaves the row to the next, so an empty ``text`` beside ``messages`` is passed over.
- A message is ``role`` and ``content``, or ``from`` and ``value`` (ShareGPT). Names of roles are translated
  to those that chat templates know. A null content is an empty one. Of content in parts the texts are joined
  by line breaks, as vLLM joins them for templates that take strings; parts of other kinds are counted.
- Pairs (Alpaca, prompt and completion, question and answer) are conversations of one turn.
- A row that holds nothing is counted; a value of another type than the shape needs is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.errors import QuantError, clipped

#: One message: ``role`` and ``content`` are strings; what else it has (tool calls, a name) is kept as it is.
Messages = list[dict[str, Any]]
Document = str | Messages


@dataclass(frozen=True)
class Streamed:
    """A plain text that is read as it is asked for, in pieces of any length."""

    pieces: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.pieces()


_SURROGATE = re.compile("[\\ud800-\\udfff]")

#: Names of roles that chat templates do not know, and those that they do.
_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant",
    "observation": "tool",
}  # fmt: skip
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text", "parts")
#: Columns of rows that are one message each of a list.
_MESSAGE = (("role", "content"), ("from", "value"), ("role", "parts"), ("role", "tool_calls"))
#: Kinds of parts of a message that are text.
_TEXT_PARTS = ("text", "input_text", "output_text")
#: An assistant's message that calls a tool may have no content at all.
_CALLS = ("tool_calls", "function_call")
#: Columns of an opening message of the system, beside a conversation or a pair.
_SYSTEM = ("system", "system_prompt")
#: Columns that a message names.
_MOST_COLUMNS = 12


class TextError(QuantError):
    """Text that cannot be read or is too short."""


@dataclass
class Tally:
    """What was read of a text, and what was passed over on the way.

    Attributes:
        rows: rows read; files of plain text have none.
        empty: of them those that hold nothing; ``first_empty`` is where the first is.
        parts: parts of messages that are not text, by kind.
        tools: rows whose definitions of tools were left out.
        files: a sentence for each choice among files.
    """

    rows: int = 0
    empty: int = 0
    first_empty: str = ""
    parts: Counter[str] = field(default_factory=Counter)
    tools: int = 0
    files: list[str] = field(default_factory=list)

    def notes(self) -> tuple[str, ...]:
        """Sentences for people; none where all that was read was used."""
        notes = list(self.files)
        if self.empty:
            notes.append(
                f"{self.empty:,} of the {self.rows:,} rows read hold no text and were passed over (the first "
                f"is {self.first_empty})"
            )
        if self.parts:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.parts.most_common(6))
            notes.append(f"parts of messages that are not text were left out: {kinds}")
        if self.tools:
            rows = "1 row" if self.tools == 1 else f"{self.tools:,} rows"
            notes.append(f"the definitions of tools of {rows} were left out")
        return tuple(notes)


def described(value: Any) -> str:
    """The type of a value read from JSON or a table, and a short one itself.

    >>> described(3), described([1]), described(None)
    ('a number (3)', 'a list', 'null')
    """
    if value is None:
        return "null"
    kinds = {
        bool: "a boolean", int: "a number", float: "a number", str: "a string", bytes: "bytes",
        list: "a list", tuple: "a list", dict: "an object",
    }  # fmt: skip
    kind = next((name for t, name in kinds.items() if isinstance(value, t)), f"a {type(value).__name__}")
    return kind if isinstance(value, (list, tuple, dict, bytes)) else f"{kind} ({clipped(value, 40)})"


def _missing(value: Any) -> bool:
    """Whether a cell holds nothing; pandas writes NaN into those."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def string(value: Any, what: str, where: str) -> str:
    """A value as text; of null the empty one.

    Raises:
        TextError: it is none, or not Unicode: JSON may spell half of a surrogate pair, and tokenizers fail
            on it.
    """
    if _missing(value):
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise TextError(f"{where}: {what} is not UTF-8 text (byte {error.start})") from error
    if not isinstance(value, str):
        raise TextError(f"{where}: {what} is {described(value)}: a string is needed there")
    if not value.isascii() and _SURROGATE.search(value):
        raise TextError(
            f"{where}: holds half of a surrogate pair, which is no character: mend or remove that record"
        )
    return value


@dataclass(frozen=True)
class Row:
    """A row while it is read: its columns by name in lower case, where it is, and where to count."""

    values: Mapping[str, Any]
    where: str
    tally: Tally

    def string(self, key: str) -> str:
        return string(self.values.get(key), f'"{key}"', self.where)

    def messages(self, key: str) -> Messages:
        """A column that holds a conversation: a list of messages, JSON of one, or strings of user and
        assistant in turn."""
        value = self.values.get(key)
        if isinstance(value, str) and value.strip():  # a cell of a CSV file
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise TextError(
                    f'{self.where}: "{key}" is a string that is not JSON ({clipped(value, 40)}): a list of '
                    "messages is needed there"
                ) from error
        if _missing(value) or value == "":
            return []
        if not isinstance(value, list):
            raise TextError(
                f'{self.where}: "{key}" is {described(value)}: a list of messages is needed there'
            )
        return [self._message(m, f'message {n} of "{key}"', n) for n, m in enumerate(value, 1)]

    def turn(self, key: str, role: str) -> Messages:
        """A column that holds one side of a pair: a string, or messages already."""
        value = self.values.get(key)
        if value == [] or is_conversation(value):
            return self.messages(key)
        content = self.string(key)
        return [{"role": role, "content": content}] if content.strip() else []

    def history(self) -> Messages:
        """Earlier turns of an Alpaca row: pairs of question and answer."""
        turns = self.values.get("history")
        if _missing(turns) or turns == "":
            return []
        if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 for t in turns):
            raise TextError(f'{self.where}: "history" is not a list of pairs of question and answer')
        return [
            {"role": role, "content": string(x, '"history"', self.where)}
            for pair in turns
            for role, x in zip(("user", "assistant"), pair, strict=True)
        ]

    def opened(self, messages: Messages) -> Messages:
        """The messages after that of the system, where a column of the row holds one."""
        system = next((s for key in _SYSTEM if (s := self.string(key)).strip()), "")
        if not system or not messages or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    def _message(self, value: Any, what: str, number: int) -> dict[str, Any]:
        if isinstance(value, str):
            return {
                "role": "user" if number % 2 else "assistant",
                "content": string(value, what, self.where),
            }
        if not isinstance(value, dict):
            raise TextError(f"{self.where}: {what} is {described(value)}: role and content are needed")
        role_key = next((k for k in _ROLE_KEYS if k in value), None)
        content_key = next((k for k in _CONTENT_KEYS if k in value), None)
        if role_key is None or (content_key is None and not any(value.get(k) for k in _CALLS)):
            raise TextError(
                f"{self.where}: {what} has {', '.join(map(str, value)) or 'nothing'}: role and content, or "
                "from and value, are needed"
            )
        role = value[role_key]
        if not isinstance(role, str):
            raise TextError(f'{self.where}: "{role_key}" of {what} is {described(role)}: a string is needed')
        content = self._content(value.get(content_key), what)
        # a table gives every message all fields that any of them has
        rest = {k: v for k, v in value.items() if k not in (role_key, content_key) and v is not None}
        return {"role": _ROLES.get(role.lower(), role), "content": content, **rest}

    def _content(self, value: Any, what: str) -> str:
        if not isinstance(value, (list, dict)):
            return string(value, f"the content of {what}", self.where)
        texts = []
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str):
                texts.append(string(part, f"a part of {what}", self.where))
                continue
            if not isinstance(part, dict):
                raise TextError(f"{self.where}: a part of {what} is {described(part)}: text is needed")
            kind = part.get("type")
            if kind in _TEXT_PARTS or (kind is None and part.get("text") is not None):
                texts.append(string(part.get("text"), f"the text of a part of {what}", self.where))
            else:  # without a type, the column that is filled says what it is
                named = kind or next((k for k, v in part.items() if v is not None), "empty")
                self.tally.parts[str(named)[:40]] += 1
        return "\n".join(t for t in texts if t)


@dataclass(frozen=True)
class Shape:
    """A way to write a row: the columns that it must have, others that are read too, and its reader.

    Attributes:
        read: the document; an empty one where these columns hold nothing.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Document]
    optional: tuple[str, ...] = ()


def _text(column: str) -> Shape:
    return Shape((column,), lambda row: row.string(column))


def _conversation(column: str) -> Shape:
    return Shape((column,), lambda row: row.opened(row.messages(column)), _SYSTEM)


def _pair(question: str, answer: str = "", context: str = "") -> Shape:
    """A question, with more to it in ``context``, and its answer; an answer that begins with the user's
    message is a conversation of its own."""

    def read(row: Row) -> Messages:
        asked = row.turn(question, "user")
        if context and (more := row.turn(context, "user")):
            asked = [{"role": "user", "content": "\n\n".join(m["content"] for m in [*asked, *more])}]
        answered = row.turn(answer, "assistant") if answer else []
        if answered and answered[0]["role"] in ("user", "system"):
            asked = []
        turns = [*asked, *answered]
        return row.opened([*row.history(), *turns] if turns else [])

    return Shape(
        tuple(c for c in (question, answer) if c),
        read,
        ((context,) if context else ()) + (*_SYSTEM, "history"),
    )


#: Columns of conversations: of OpenAI and TRL, ShareGPT, LMSYS-Chat, and others.
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog")

#: Ways to write a row, the first that fits and holds something is taken.
SHAPES: tuple[Shape, ...] = (
    _text("text"),
    *map(_conversation, CONVERSATIONS),
    _pair("instruction", "output", context="input"),  # Alpaca
    _pair("instruction", "response", context="context"),  # Dolly
    _pair("prompt", "completion"),  # TRL
    _pair("prompt", "response"),
    _pair("prompt", "chosen"),  # preferences; the answer that was rejected is left
    _pair("question", "answer"),
    _pair("question", "response"),  # OpenOrca
    _pair("query", "response"),
    _pair("problem", "solution"),
    _pair("input", "output"),
    _pair("instruction", context="input"),
    _pair("prompt"),
    Shape(("chosen",), lambda row: row.messages("chosen") if is_conversation(row.values["chosen"])
          else row.string("chosen")),  # the prompt is part of the answer
    *map(_text, ("content", "raw_content", "document", "article", "passage", "body", "sentence", "code")),
)  # fmt: skip

#: Columns that any shape reads; of a table no others are.
COLUMNS = frozenset(c for s in SHAPES for c in (*s.columns, *s.optional)) | {"tools"}

#: What is read, for messages.
READ = ", ".join(" + ".join(s.columns) for s in SHAPES)


def is_conversation(value: Any) -> bool:
    """Whether a list is one conversation rather than several rows."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and any(m.keys() >= set(keys) for keys in _MESSAGE) for m in value)
    )


def has_shape(columns: Iterable[str]) -> bool:
    """Whether a row of these columns is in one of the :data:`SHAPES`."""
    named = {c.strip().lower() for c in columns}
    return any(named.issuperset(s.columns) for s in SHAPES)


def document(value: Any, where: str, tally: Tally) -> Document | None:
    """A row as a document; None where it holds nothing.

    Raises:
        TextError: a value of another type than its column is read as.
    """
    if _missing(value):
        return None
    if isinstance(value, str):
        return content if (content := string(value, "the row", where)).strip() else None
    if is_conversation(value):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise TextError(
            f"{where}: the row is {described(value)}: an object is needed, with one of {READ}; or a string"
        )
    values: dict[str, Any] = {}
    for key, x in value.items():
        values.setdefault(str(key).strip().lower(), x)
    row = Row(values, where, tally)
    for shape in SHAPES:
        if not all(c in values for c in shape.columns):
            continue
        read = shape.read(row)
        if any(m["content"].strip() for m in read) if isinstance(read, list) else read.strip():
            if values.get("tools") not in (None, [], "", "[]"):
                tally.tools += 1
            return read
    return None


def documents_of(rows: Iterable[tuple[str, Any]], source: str, tally: Tally) -> Iterator[Document]:
    """Documents of a file's rows, each with where it is.

    Raises:
        TextError: a row that cannot be read, or a file of which no row holds text.
    """
    columns: dict[str, None] = {}
    count, empty = 0, True
    for where, value in rows:
        count += 1
        tally.rows += 1
        read = document(value, where, tally)
        if read is not None:
            empty = False
            yield read
            continue
        tally.empty += 1
        tally.first_empty = tally.first_empty or where
        if empty and isinstance(value, dict) and len(columns) < _MOST_COLUMNS:
            columns.update(dict.fromkeys(map(str, value)))
    if count and empty:
        none = "its only row holds no text" if count == 1 else f"none of its {count:,} rows holds text"
        raise TextError(
            f"{source}: {none}: {columns_named(columns)}. Read are {READ}: rename a column, or fill it"
        )


def columns_named(columns: Iterable[str]) -> str:
    """
    >>> columns_named(["id", "label"])
    'the columns are id, label'
    """
    names = [n if len(n) <= 40 else f"{n[:39]}…" for n in map(str, columns)]
    more = f" and {len(names) - _MOST_COLUMNS} more" if len(names) > _MOST_COLUMNS else ""
    return f"the columns are {', '.join(names[:_MOST_COLUMNS])}{more}" if names else "they have no columns"
