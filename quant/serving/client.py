"""Asking an OpenAI-compatible endpoint, one streamed request at a time, and keeping when each piece of the
answer came. No torch, and nothing of one engine: vLLM, SGLang, llama.cpp's server, TGI and TensorRT-LLM
answer alike.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from quant.errors import QuantError, UsageError, clipped, first_line

if TYPE_CHECKING:
    import httpx2 as httpx

#: Seconds without a byte of the answer after which a request counts as stalled.
STALL = 120.0
#: Bytes of an answer that is no stream which are read to say what it was, and of a JSON answer at most.
_LOOKED_AT, _WHOLE = 2000, 1 << 28
#: Seconds that an idle connection is kept: less than servers keep theirs (uvicorn's five), so that none is
#: written to that its server is just closing.
_IDLE = 2.0
#: Tokens of an answer that tell whether it came as a stream; seconds for each within which no model makes
#: them one by one, and the share of the whole time within which they come where they were held back.
_TELLING, _AT_ONCE, _SHARE = 8, 1e-4, 0.02
#: Events for each token asked for, and beyond those, after which an answer goes on for ever.
_PIECES, _SPARE = 4, 64
#: Pieces beyond its tokens that say nothing against an answer: some hold none, or a part of one.
_ODD = 4
#: Seconds to connect in at most.
_CONNECT = 30.0
#: Tokens that no request has.
_NEVER = 1 << 31


class EndpointError(QuantError):
    """The endpoint does not answer, or not as an OpenAI-compatible one does; ``kind`` is one of :data:`KINDS`
    where a request failed."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Attributes:
        url: address up to the ``/v1`` of its routes, without it.
        model: the name that requests carry.
        chat: whether /v1/chat/completions is asked instead of /v1/completions.
        api_key: sent as a bearer token; never printed or written.
        ca: file of certificates to trust instead of the system's; ``insecure`` trusts any.
        stall: seconds without a byte after which a request is given up.
    """

    url: str
    model: str = ""
    chat: bool = False
    api_key: str | None = field(default=None, repr=False)
    ca: str | None = None
    insecure: bool = False
    stall: float = STALL

    @property
    def route(self) -> str:
        return f"{self.url}/v1/{'chat/' if self.chat else ''}completions"

    @property
    def local(self) -> bool:
        """Whether it is on this machine, whose GPUs are then the endpoint's."""
        return urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")

    def client(self, connections: int | None = None) -> httpx.AsyncClient:
        """A client with this endpoint's key, trust and patience; to be closed by its context.

        Args:
            connections: how many are kept open, or None for as many as there are requests.
        """
        import httpx2 as httpx

        verify: ssl.SSLContext | bool = not self.insecure
        if self.ca is not None and not self.insecure:
            verify = _context(self.ca)
        # events are read as they come: a proxy must not pack them
        headers = {"Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(self.stall, connect=min(self.stall, _CONNECT)),
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_IDLE
            ),
            verify=verify,
            # no proxy stands between us and a server of this machine
            trust_env=not self.local,
        )


def _context(ca: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--ca is {ca!r}: not a file of certificates ({first_line(error)})") from error


def endpoint_url(text: str, option: str = "--url") -> str:
    """The address of an endpoint as people write it, without a trailing slash, ``/v1`` or a route behind it.

    >>> endpoint_url("http://host:8000/v1/"), endpoint_url("localhost:8000")
    ('http://host:8000', 'http://localhost:8000')

    Raises:
        UsageError: not an http or https address.
    """
    given = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(given)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:  # a port that is no number or beyond 65535
        sound = None
    written = text.isprintable() and " " not in text
    if not sound or parts.query or parts.fragment or not written:
        raise UsageError(f"{option} is {clipped(text)}: give an address such as http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise UsageError(f"{option} holds a user name or password: give the key by --api-key-env instead")
    return re.sub(r"/v1(/chat)?/(completions|models)$", "/v1", given.rstrip("/")).removesuffix("/v1")


def api_key(variable: str | None) -> str | None:
    """The key that an environment variable holds.

    Raises:
        UsageError: it is not set or empty.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise UsageError(
            f"--api-key-env is {variable!r}: that variable is not set or empty: export it with the key first"
        )
    return sound_key(key, f"--api-key-env is {variable}: the key there")


def sound_key(key: str, what: str) -> str:
    """The key, where a header can carry it.

    Raises:
        UsageError: it cannot; the key is not in the message.
    """
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{what} holds a line break or letters that are not ASCII: no header can carry it")
    return key


@dataclass(frozen=True)
class Prompt:
    """What one request asks.

    Attributes:
        text: of a completion; token ids where the endpoint takes them; messages for a chat.
        tokens: how many tokens it was made to have; 0 where nobody counted.
        output_tokens: how many are asked for at most.
    """

    text: str | tuple[int, ...] | tuple[Mapping[str, Any], ...]
    tokens: int
    output_tokens: int

    def body(self, endpoint: Endpoint, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON body of a streamed request."""
        content: Any = list(self.text) if isinstance(self.text, tuple) else self.text
        if endpoint.chat and isinstance(content, str):
            content = [{"role": "user", "content": content}]
        return {
            "model": endpoint.model,
            "messages" if endpoint.chat else "prompt": content,
            "max_tokens": self.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling,
        }


@dataclass(frozen=True)
class Trace:
    """One request as it went; times are seconds of :func:`time.perf_counter`.

    Attributes:
        scheduled: when it was to be sent: latencies count from here, so that a client or server that is late
            cannot hide it (coordinated omission).
        sent: when it was.
        stamps: when each piece of the answer came that holds generated text.
        ended: when the last of those came, or when the request failed.
        prompt_tokens, output_tokens: as the endpoint counted them, else as they were meant.
        error: the kind of failure (:data:`KINDS`), empty where there is none; ``detail`` is its text.
        counted: whether the endpoint itself told ``output_tokens``.
        text: what was generated.
        model: which model answered, as the endpoint says; empty where it does not.
    """

    scheduled: float
    sent: float
    stamps: tuple[float, ...]
    ended: float
    prompt_tokens: int
    output_tokens: int
    error: str = ""
    detail: str = ""
    counted: bool = False
    text: str = ""
    model: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.stamps[0] - self.scheduled

    @property
    def e2el(self) -> float:
        """Seconds to the last token."""
        return self.ended - self.scheduled

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first, (E2E - TTFT) / (n - 1); None of a single token."""
        return (self.ended - self.stamps[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def whole(self) -> bool:
        """Whether its tokens came all at once, as where something on the way holds the stream back; False of
        too few to tell."""
        tokens, took = self.output_tokens, self.stamps[-1] - self.stamps[0]
        return tokens >= _TELLING and took < min(_AT_ONCE * tokens, _SHARE * (self.ended - self.sent))

    @property
    def itl(self) -> tuple[float, ...]:
        """Seconds between two pieces of the answer."""
        return tuple(b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False))


#: Kind of failure → what it means and what to do.
KINDS = {
    "connect": "no connection: is the server up, and is this its address?",
    "tls": "the encrypted connection failed: check the certificate, --ca, or http against https",
    "timeout": "no answer in time: the server is overloaded or hangs; --stall waits longer",
    "401": "the key was refused: give it by --api-key-env",
    "404": "the endpoint does not have that model or route",
    "429": "the endpoint limits requests: lower the rate or the concurrency",
    "4xx": "the request was refused",
    "5xx": "the server failed",
    "3xx": "the endpoint is at another address: give that one",
    "no stream": "the answer is not a stream of JSON events",
    "error event": "the server reported an error within its answer",
    "cut off": "the answer ended before it was complete",
    "empty": "an answer without a token",
    "endless": "the answer goes on beyond the tokens that were asked for",
    "miscounted": "the endpoint's counts of tokens (usage), or its pieces, cannot be: something on the way "
    "repeats or changes them",
}


def status_kind(status: int) -> str:
    """The kind of failure (:data:`KINDS`) that an error status is."""
    if status in (401, 403):
        return "401"
    if status < 300:  # an answer that is sound, and has nothing in it
        return "no stream"
    return str(status) if str(status) in KINDS else f"{min(max(status // 100, 3), 5)}xx"


class _Failed(Exception):
    def __init__(self, kind: str, detail: str):
        super().__init__(kind)
        self.kind, self.detail = kind, detail


async def _events(response: httpx.Response, stall: float) -> AsyncIterator[tuple[float, bytes]]:
    """The data of a stream of server-sent events, each with the time at which its end came.

    Raises:
        _Failed: something else than events, or nothing but signs of life for ``stall`` seconds.
    """
    rest, last, kind = b"", time.perf_counter(), b""
    async for piece in response.aiter_raw():
        now = time.perf_counter()
        rest += piece
        if len(rest) > 1 << 24:
            raise _Failed("no stream", "16 MiB without the end of an event")
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line.startswith(b"event:"):
                kind = line[6:].strip()
            elif not line.strip():
                kind = b""
            elif line.startswith(b"data:"):
                last = now
                if kind == b"error":
                    raise _Failed("error event", said_by(line[5:].decode(errors="replace").strip()))
                yield now, line[5:].strip()
        if now - last > stall:
            raise _Failed("timeout", f"no event for {stall:g} s, only signs of life")


async def _beginning(response: httpx.Response, count: int = _LOOKED_AT, seconds: float = math.inf) -> str:
    """The first bytes of an answer, which may have no end, or what of them came in so many seconds."""
    held, begun = bytearray(), time.perf_counter()
    async for piece in response.aiter_bytes():
        held += piece
        if len(held) >= count or time.perf_counter() - begun > seconds:
            break
    return held[:count].decode(errors="replace")


#: Keys of generated text in a piece: of completions, of chats, and of reasoning as vLLM and others call it.
_TEXTS = ("text", "content", "reasoning", "reasoning_content")


@dataclass
class _Answer:
    """What has been read of an answer so far."""

    stamps: list[float] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = False
    #: pieces that hold no token: what only says that the answer ends
    bare: int = 0
    model: str = ""

    def counted(self) -> int | None:
        """Tokens by the endpoint's own count; None where it does not count."""
        return _count(self.usage.get("completion_tokens")) or None

    @property
    def pieces(self) -> int:
        """How many pieces came that may hold a token."""
        return max(len(self.stamps) - self.bare, 0)

    def miscounted(self, asked: int) -> str:
        """What cannot be in its counts where so many tokens were asked for; empty where all can."""
        told = self.counted()
        if told is not None and told > asked:
            return f"{told} tokens where at most {asked} were asked for"
        if self.pieces > (most := asked if told is None else told) + _ODD:
            return f"{self.pieces} pieces for {most} tokens"
        return ""

    def take(self, now: float, data: bytes) -> None:
        """One event.

        Raises:
            _Failed: it is no JSON object, or reports an error.
        """
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _Failed("no stream", data[:200].decode(errors="replace")) from error
        if not isinstance(event, dict):
            raise _Failed("no stream", data[:200].decode(errors="replace"))
        if event.get("error") or event.get("object") == "error":
            raise _Failed("error event", clipped(event.get("error") or event.get("message"), 300))
        if isinstance(event.get("model"), str):
            self.model = event["model"]
        if isinstance(event.get("usage"), dict):
            self.usage = event["usage"]
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        choice = choices[0]
        delta = choice["delta"] if isinstance(choice.get("delta"), dict) else choice
        # what a model thinks before it answers is generated too
        text = next((t for key in _TEXTS if isinstance(t := delta.get(key), str) and t), "")
        last = bool(choice.get("finish_reason"))
        # a chat opens with the role alone; a piece may be empty text, as half a character is
        if text or "text" in delta or delta.get("tool_calls") or (last and self.stamps):
            self.stamps.append(now)
            self.parts.append(text)
            self.bare += bool(last and not text and not delta.get("tool_calls"))
        self.finished = self.finished or last


async def ask(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    prompt: Prompt,
    *,
    scheduled: float | None = None,
    sampling: Mapping[str, Any] | None = None,
    limit: float | None = None,
    begun: asyncio.Event | None = None,
) -> Trace:
    """Sends one request and reads its answer; a failure of any kind is in the trace, never raised.

    Args:
        scheduled: when it should have been sent; None: now.
        sampling: further keys of the request's body, such as the temperature.
        limit: seconds that the whole answer may take; a slow one that never stalls would go on for long.
        begun: set when the first piece of the answer comes, or when there will be none.
    """
    answer, sent = _Answer(), time.perf_counter()
    trace = Trace(sent if scheduled is None else scheduled, sent, (), sent, prompt.tokens, 0)
    kind, detail = "", ""
    try:
        await asyncio.wait_for(
            _read(client, endpoint, prompt, prompt.body(endpoint, sampling or {}), answer, begun), limit
        )
        if not answer.stamps:
            kind, detail = "empty", "the stream ended without a token"
        elif not answer.finished:
            kind, detail = "cut off", f"the stream ended after {len(answer.stamps)} pieces without its end"
        elif wrong := answer.miscounted(prompt.output_tokens):
            kind, detail = "miscounted", wrong
    except _Failed as failure:
        kind, detail = failure.kind, failure.detail
    except asyncio.TimeoutError:
        kind, detail = "timeout", f"not ended after {limit:g} s, {len(answer.stamps)} pieces came"
    except Exception as error:  # whatever a transport raises is one failed request, not the end of the run
        kind, detail = transport_kind(error, bool(answer.stamps)), first_line(error)
    if begun is not None:
        begun.set()
    counted = answer.counted()
    asked = _count(answer.usage.get("prompt_tokens"))
    return replace(
        trace,
        stamps=tuple(answer.stamps),
        ended=answer.stamps[-1] if answer.stamps and not kind else time.perf_counter(),
        prompt_tokens=prompt.tokens if asked is None else asked,
        output_tokens=answer.pieces if counted is None else counted,
        counted=counted is not None,
        error=kind,
        detail=detail,
        text="".join(answer.parts),
        model=answer.model,
    )


def _count(told: Any) -> int | None:
    """A number of tokens as an endpoint tells it; None where it is none."""
    return told if type(told) is int and 0 <= told < _NEVER else None


async def _read(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    prompt: Prompt,
    body: Mapping[str, Any],
    answer: _Answer,
    begun: asyncio.Event | None,
) -> None:
    most, events = _PIECES * prompt.output_tokens + _SPARE, 0
    async with _answered(client, endpoint, body) as response:
        if response.status_code != 200:
            elsewhere = response.headers.get("location")
            said = (
                clipped(elsewhere, 300)
                if elsewhere
                else said_by(await _beginning(response, seconds=endpoint.stall))
            )
            raise _Failed(status_kind(response.status_code), f"{response.status_code}: {said}")
        kind = response.headers.get("content-type", "")
        if "event-stream" not in kind:
            said = await _beginning(response, 200, endpoint.stall)
            raise _Failed("no stream", f"{kind or 'no content type'}: {said}")
        if (packed := response.headers.get("content-encoding", "identity")) != "identity":
            raise _Failed("no stream", f"its events are packed ({packed}), though that was declined")
        async for now, data in _events(response, endpoint.stall):
            answer.take(now, data)
            events += 1
            if begun is not None and answer.stamps:
                begun.set()
            if events > most:
                raise _Failed("endless", f"{events} events for {prompt.output_tokens} tokens")


@asynccontextmanager
async def _answered(
    client: httpx.AsyncClient, endpoint: Endpoint, body: Mapping[str, Any]
) -> AsyncIterator[httpx.Response]:
    """The answer once its head is complete.

    Raises:
        _Failed: it is not in time, though a part of it may be: the transport's own patience begins anew with
            each byte.
    """
    request, limit = client.build_request("POST", endpoint.route, json=body), endpoint.stall + _CONNECT
    try:
        response = await asyncio.wait_for(client.send(request, stream=True), limit)
    except asyncio.TimeoutError as error:
        raise _Failed("timeout", f"the head of the answer did not end within {limit:g} s") from error
    try:
        yield response
    finally:
        await response.aclose()


async def fetch(
    client: httpx.AsyncClient, method: str, url: str, limit: float, most: int = _WHOLE, **sent: Any
) -> tuple[httpx.Response, str]:
    """One request and its whole answer.

    Args:
        limit: seconds until it must be there.
        most: bytes of it that are read.
        sent: body and headers, as httpx takes them.

    Raises:
        asyncio.TimeoutError: it is not.
    """

    async def read() -> tuple[httpx.Response, str]:
        async with client.stream(method, url, **sent) as response:
            return response, await _beginning(response, most)

    return await asyncio.wait_for(read(), limit)


def said_by(said: str) -> str:
    """What an error's body says, whichever engine wrote it."""
    try:
        value = json.loads(said)
        error = value.get("error", value)
        inner = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        inner = said
    return clipped(said if inner is None else str(inner), 300) if said.strip() else "nothing more"


def transport_kind(error: Exception, begun: bool = False) -> str:
    """The kind of failure (:data:`KINDS`) that a transport's error is; ``begun``: whether an answer had."""
    import httpx2 as httpx

    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, ssl.SSLError) or "SSL" in str(chain) or "CERTIFICATE" in str(chain):
            return "tls"
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, httpx.TimeoutException):
        return "timeout"
    if isinstance(error, httpx.ConnectError):
        return "connect"
    return "cut off" if begun or isinstance(error, httpx.TransportError) else "no stream"


async def get_json(client: httpx.AsyncClient, endpoint: Endpoint, path: str, body: Any = None) -> Any:
    """GET, or POST of ``body``, answered by JSON.

    Raises:
        EndpointError: no answer, an error status, or no JSON; with what to do.
    """
    url = endpoint.url + path
    try:
        # one that never ends is given up like one that never begins
        response, said = await fetch(
            client, "GET" if body is None else "POST", url, endpoint.stall + _CONNECT, json=body
        )
    except Exception as error:
        kind = "timeout" if isinstance(error, asyncio.TimeoutError) else transport_kind(error)
        raise EndpointError(f"{url}: {first_line(error)}: {KINDS[kind]}", kind) from error
    if response.status_code != 200:
        kind = status_kind(response.status_code)
        elsewhere = response.headers.get("location")
        text = clipped(elsewhere, 300) if elsewhere else said_by(said[:_LOOKED_AT])
        raise EndpointError(f"{url} answered {response.status_code} ({text}): {KINDS[kind]}", kind)
    try:
        return json.loads(said)
    except (ValueError, RecursionError) as error:
        raise EndpointError(
            f"{url} answered no JSON ({clipped(said[:_LOOKED_AT], 80)}): is that an OpenAI-compatible "
            "endpoint? Give its address up to /v1",
            "no stream",
        ) from error


async def resolve(client: httpx.AsyncClient, endpoint: Endpoint) -> Endpoint:
    """The endpoint with the model's name: the one asked for, or the first that it has.

    Raises:
        EndpointError: it does not answer, or does not have that model.
    """
    listed = await get_json(client, endpoint, "/v1/models")
    data = listed.get("data") if isinstance(listed, dict) else None
    listed_models = data if isinstance(data, list) else []
    names = [m["id"] for m in listed_models if isinstance(m, dict) and isinstance(m.get("id"), str)]
    # what cannot be written to a terminal or sent as UTF-8 is nobody's name
    if not any(map(str.isprintable, names)):
        raise EndpointError(f"{endpoint.url}/v1/models names no model: {clipped(listed)}")
    names = [name for name in names if name.isprintable()]
    if endpoint.model and endpoint.model not in names:
        raise EndpointError(
            f"--served-model is {endpoint.model!r}: {endpoint.url} serves {', '.join(names[:10])}: "
            "name one of them"
        )
    return replace(endpoint, model=endpoint.model or names[0])
