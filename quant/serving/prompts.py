"""What a load test asks: prompts of a file, or windows of real text that the endpoint's own tokenizer counts.

Windows of one text begin at different places, so that an engine's prefix cache gives away nothing that is not
asked for with a shared prefix.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.calibration.files import bundled, documents
from quant.errors import QuantError, UsageError, clipped
from quant.serving.client import Endpoint, EndpointError, Prompt, get_json
from quant.serving.measures import Lengths

if TYPE_CHECKING:
    import httpx2 as httpx

#: Characters of text that are tokenized at a time, and that are read at most.
_PIECE, _TEXT = 100_000, 2_000_000


@dataclass(frozen=True)
class PromptRequest:
    """What prompts are asked for.

    Attributes:
        file: prompts, one a line (.txt), or objects with ``prompt`` or ``messages`` (.jsonl); None: windows
            of ``text``.
        text: file of text to cut windows from; None: the bundled wikipedia sample.
        shared_prefix: tokens that all prompts begin with.
    """

    input_tokens: Lengths
    output_tokens: Lengths
    file: Path | None = None
    text: Path | None = None
    shared_prefix: int = 0
    seed: int = 0


def read_prompts(path: Path, option: str = "--prompts") -> list[str | tuple[Any, ...]]:
    """Prompts of a file, which ``option`` named: texts, or tuples of chat messages.

    Raises:
        UsageError: it cannot be read, a line is no prompt, or it holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "it is not UTF-8 text"
        raise UsageError(f"{option} is {str(path)!r}: {reason}") from error
    found: list[str | tuple[Any, ...]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found.append(_prompt_of(line, path, number, option) if path.suffix == ".jsonl" else line)
    if not found:
        raise UsageError(f"{option} is {str(path)!r}: it holds no prompt: one a line is needed")
    return found


def _prompt_of(line: str, path: Path, number: int, option: str) -> str | tuple[Any, ...]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        messages = value.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            return tuple(messages)
        for key in ("prompt", "text"):
            if isinstance(value.get(key), str) and value[key]:
                return str(value[key])
    raise UsageError(
        f"{option} is {str(path)!r}: line {number} is {clipped(line, 60)}: a JSON object with 'prompt' or "
        "'messages' is needed"
    )


#: How engines are asked to tokenize: route → body of a text.
_TOKENIZERS: tuple[tuple[str, Callable[[Endpoint, str], dict[str, Any]]], ...] = (
    ("/tokenize", lambda e, t: {"model": e.model, "prompt": t, "add_special_tokens": False}),  # vLLM, SGLang
    ("/tokenize", lambda e, t: {"content": t}),  # llama.cpp
)


async def tokenize(client: httpx.AsyncClient, endpoint: Endpoint, text: str) -> list[int] | None:
    """The endpoint's own token ids of a text; None where it has no such route."""
    for route, body in _TOKENIZERS:
        try:
            answer = await get_json(client, endpoint, route, body(endpoint, text))
        except EndpointError:
            continue
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if isinstance(tokens, list) and tokens and all(isinstance(t, int) for t in tokens):
            return tokens
    return None


async def _characters_per_token(client: httpx.AsyncClient, endpoint: Endpoint, text: str) -> float:
    """From what the endpoint counts of one prompt's tokens, where it tokenizes nothing else.

    Raises:
        EndpointError: it counts no tokens.
    """
    route = endpoint.route.removeprefix(endpoint.url)
    body = Prompt(text, 0, 1).body(endpoint, {}) | {"stream": False}
    body.pop("stream_options")
    answer = await get_json(client, endpoint, route, body)
    usage = answer.get("usage") if isinstance(answer, dict) else None
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if not isinstance(counted, int) or counted < 1:
        raise EndpointError(
            f"{endpoint.url} neither tokenizes (/tokenize) nor counts tokens (usage): prompts of a "
            "stated length cannot be made for it: give your own with --prompts"
        )
    return len(text) / counted


class _Windows:
    """Windows of a text or its tokens that begin at places drawn by chance, each once until all are used."""

    def __init__(self, text: Sequence[Any], seed: int):
        self.text, self._random = text, random.Random(seed)
        self._used: set[int] = set()

    def next(self, length: int) -> Sequence[Any]:
        """So many characters or tokens, of the text's own type; behind its end it begins again."""
        n = len(self.text)
        if len(self._used) == n:
            self._used.clear()
        while (start := self._random.randrange(n)) in self._used:
            pass
        self._used.add(start)
        found = self.text[start : start + length]
        while len(found) < length:
            found = found + self.text[: length - len(found)]  # type: ignore[operator]
        return found


async def make_prompts(
    client: httpx.AsyncClient, endpoint: Endpoint, request: PromptRequest, count: int
) -> list[Prompt]:
    """That many prompts for an endpoint; those of a file are repeated where they are fewer.

    Raises:
        UsageError: the file of prompts or of text cannot be used, or messages meet an endpoint that is asked
            for completions.
        EndpointError: the endpoint counts no tokens.
    """
    generator = random.Random(request.seed)
    if request.file is not None:
        given = read_prompts(request.file)
        if not endpoint.chat and any(isinstance(g, tuple) for g in given):
            raise UsageError(f"--prompts is {str(request.file)!r}: it holds messages: add --chat")
        return [Prompt(given[i % len(given)], 0, request.output_tokens.draw(generator)) for i in range(count)]
    lengths = [
        (request.input_tokens.draw(generator), request.output_tokens.draw(generator)) for _ in range(count)
    ]
    longest = max(i for i, _ in lengths)
    if request.shared_prefix >= min(i for i, _ in lengths):
        raise UsageError(
            f"--shared-prefix is {request.shared_prefix}: it must be shorter than the shortest prompt, "
            f"{min(i for i, _ in lengths)} tokens"
        )
    text = _text(request.text)
    tokens = await tokenize(client, endpoint, text[:_PIECE])
    if tokens is not None and not endpoint.chat:
        for piece in range(_PIECE, len(text), _PIECE):
            if len(tokens) > 4 * longest + count:
                break
            tokens += await tokenize(client, endpoint, text[piece : piece + _PIECE]) or []
        windows = _Windows(tuple(tokens), request.seed)
        prefix = tuple(windows.next(request.shared_prefix))
        return [Prompt((*prefix, *windows.next(i - len(prefix))), i, o) for i, o in lengths]
    return await _by_characters(client, endpoint, request, text, lengths, tokens)


async def _by_characters(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    request: PromptRequest,
    text: str,
    lengths: Sequence[tuple[int, int]],
    tokens: Sequence[int] | None,
) -> list[Prompt]:
    """Windows of text whose number of tokens is as near as the text's mean characters per token."""
    if tokens is not None:
        ratio = len(text[:_PIECE]) / len(tokens)
    else:
        ratio = await _characters_per_token(client, endpoint, text[:1500])
    windows = _Windows(text, request.seed)

    def piece(count: int) -> str:
        return str(windows.next(round(count * ratio)))

    prefix = piece(request.shared_prefix) if request.shared_prefix else ""
    return [Prompt(prefix + piece(i - request.shared_prefix), i, o) for i, o in lengths]


def _text(path: Path | None) -> str:
    """The beginning of a text of any kind that calibration reads."""
    chosen = bundled("wikipedia") if path is None else path
    parts: list[str] = []
    try:
        for document in documents([chosen]):
            parts.append(document if isinstance(document, str) else "\n".join(str(m) for m in document))
            if sum(map(len, parts)) >= _TEXT:
                break
    except QuantError as error:
        raise UsageError(f"--text: {error}") from error
    text = "\n".join(parts)[:_TEXT]
    if not text.strip():
        raise UsageError(f"--text is {str(chosen)!r}: it is empty: give a file of text")
    return text
