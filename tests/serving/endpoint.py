"""An OpenAI-compatible server of the tests: it streams tokens at stated moments and misbehaves as told. What
is tested is the client; the real server's tests are in tests/vllm."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.serving.engine import Engine

#: What it does otherwise than it should: drop the chat template; compute wrongly while several are served;
#: accept what is malformed; fail at it; close on it; write prompts into its log; other answers every time.
_LIES = ("template", "batch", "lax", "fragile", "closes", "logs", "random", "schema")
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class Behaviour:
    """How the server answers.

    Attributes:
        ttft, itl: seconds to the first token and between two.
        root: folder of the checkpoint that it says it serves.
        fault: see ``_FAULTS``; ``every``: it shows in each n-th request.
        slots: requests at a time, the others wait; 0: all.
        engine: what computes the answers; None: words that mean nothing.
        lies: see ``_LIES``.
        certificate: files of a certificate and its key: it speaks TLS.
        stall_after, stall: the whole server stands still for so many seconds once, after so many requests.
        counted: whether it tells its usage.
    """

    ttft: float = 0.01
    itl: float = 0.002
    fault: str = ""
    every: int = 1
    slots: int = 0
    stall_after: int = 0
    stall: float = 0.0
    key: str = ""
    root: str = ""
    counted: bool = True
    tokenizes: bool = True
    refuses: tuple[str, ...] = ()
    engine: Engine | None = None
    lies: tuple[str, ...] = ()
    length: int = 4096
    certificate: tuple[str, str] | None = None
    answer: Callable[[int], str] = lambda i: f" w{i}"
    seen: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)


class FakeEndpoint:
    """The server; ``url`` is its address."""

    def __init__(self, behaviour: Behaviour):
        self.behaviour = behaviour
        self.url = ""
        self.running = self.most = 0
        self.log: list[str] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.tasks: set[asyncio.Task[Any] | None] = set()

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        b = self.behaviour
        self.slots = asyncio.Semaphore(b.slots or 10**6)
        encryption = None
        if b.certificate is not None:
            encryption = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            encryption.load_cert_chain(*b.certificate)
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=4096, ssl=encryption)
        self.url = f"http{'s' if encryption else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        await self._end(server)

    async def _end(self, server: asyncio.Server) -> None:
        """Ends every connection. asyncio makes one of an accepted socket in a task of its own: cancelled
        before it begins, or begun when the server is closed, it leaves that socket open."""
        until = time.perf_counter() + 5
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            if server.is_serving() and others <= self.tasks:
                server.close()
            for writer in self.writers:  # what a client did not read would keep its socket open
                writer.transport.abort()
            late = time.perf_counter() > until  # a handshake that its client never ends
            for task in others if late else others & self.tasks:
                task.cancel()
            await asyncio.wait(others, timeout=0.05)
        server.close()
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.sleep(0.05)  # the transports end their connections in a later turn

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self.tasks.add(asyncio.current_task())
        try:
            while True:
                first = await reader.readexactly(1)
                if first == b"\x16":  # a TLS hello
                    return await _plain(writer, 400, "not TLS")
                head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                line, *headers = head.split("\r\n")
                fields = {k.lower(): v.strip() for k, _, v in (h.partition(":") for h in headers) if v}
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                try:
                    value = json.loads(body) if body else {}
                except (ValueError, RecursionError):
                    value = None
                await self._answer(line.split()[1], fields, value, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, path: str, fields: dict[str, str], body: Any, writer: asyncio.StreamWriter
    ) -> None:
        b = self.behaviour
        b.seen[path] += 1
        if b.key and fields.get("authorization") != f"Bearer {b.key}":
            return await _plain(writer, 401, {"error": {"message": "no"}})
        if path == "/v1/models":
            return await _plain(
                writer, 200, {"data": [{"id": "m", "root": b.root or None, "max_model_len": b.length}]}
            )
        if path == "/health":
            return await _plain(writer, 200, "")
        if path == "/metrics":
            return await _plain(writer, 200, _METRICS.format(running=self.running))
        if path.startswith("/v1/") and (reason := _refusal(body, b.length)) and "lax" not in b.lies:
            if "closes" in b.lies:
                return writer.close()
            status = 500 if "fragile" in b.lies else 404 if "model" in reason else 400
            return await _plain(writer, status, {"error": {"message": reason}})
        if path == "/tokenize" and b.engine is not None and "messages" in body:
            return await _plain(
                writer, 200, {"tokens": b.engine.chat(body["messages"], "template" in b.lies)}
            )
        if path == "/tokenize" and b.engine is not None and "prompt" in body:
            return await _plain(writer, 200, {"tokens": b.engine.encode(body["prompt"])})
        if path == "/tokenize" and b.tokenizes and "prompt" in body:
            return await _plain(writer, 200, {"tokens": list(range(len(body["prompt"]) // 4))})
        if path.startswith("/v1/") and path.endswith("completions"):
            if not isinstance(body, dict):  # it takes anything
                return await _plain(writer, 200, {})
            b.bodies.append(body)
            if any(key in body for key in b.refuses):
                return await _plain(writer, 400, {"error": {"message": f"unknown {b.refuses}"}})
            if b.fault and b.seen["asked"] % b.every == b.every - 1:
                b.seen["asked"] += 1
                return await self._fault(body, writer)
            b.seen["asked"] += 1
            if b.stall and b.seen["asked"] == b.stall_after:
                time.sleep(b.stall)
            async with self.slots:
                self.running += 1
                self.most = max(self.most, self.running)
                try:
                    if b.engine is not None and not body.get("stream"):
                        return await self._compute(body, writer)
                    return await self._stream(body, writer, path.endswith("chat/completions"))
                finally:
                    self.running -= 1
        await _plain(writer, 404, {"error": {"message": "no such route"}})

    async def _compute(self, body: Any, writer: asyncio.StreamWriter) -> None:
        """The engine's own answer to a request that is not streamed."""
        b = self.behaviour
        assert b.engine is not None
        if "logs" in b.lies:
            self.log.append(str(body))
        if "messages" in body:
            tokens = b.engine.chat(body["messages"], "template" in b.lies)
        else:
            tokens = b.engine.encode(body["prompt"])
        await asyncio.sleep(0.01)  # others may come meanwhile
        wrong = "batch" in b.lies and self.running > 1
        value = await asyncio.to_thread(b.engine.complete, tokens, body, wrong)
        choice = value["choices"][0]
        if "random" in b.lies and "text" in choice:
            choice["text"] = str(b.seen["asked"])
        if "schema" in b.lies and "message" in choice:
            choice["message"] = {"content": "{blue"}
        await _plain(writer, 200, value)

    async def _stream(
        self, body: Any, writer: asyncio.StreamWriter, chat: bool, upto: int | None = None
    ) -> None:
        b = self.behaviour
        tokens = body["max_tokens"] if upto is None else upto
        prompt = body.get("prompt", body.get("messages"))
        if not body.get("stream"):
            usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": 1}
            return await _plain(writer, 200, {"choices": [{"text": " x"}], "usage": usage})
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": "c-0", "object": kind, "created": 0, "model": "m"}
        writer.write(_STREAM)
        begun = time.perf_counter()
        for i in range(tokens):
            await asyncio.sleep(max(0.0, begun + b.ttft + i * b.itl - time.perf_counter()))
            last = upto is None and i == tokens - 1
            part = {"delta": {"content": b.answer(i)}} if chat else {"text": b.answer(i)}
            _event(writer, head | {"choices": [part | {"finish_reason": "length" if last else None}]})
        if upto is None:
            if b.counted:
                usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens}
                _event(writer, head | {"choices": [], "usage": usage})
            _chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async def _fault(self, body: Any, writer: asyncio.StreamWriter) -> None:
        kind = self.behaviour.fault
        if kind.isdigit():
            return await _plain(writer, int(kind), {"error": {"message": "because"}})
        if kind == "html":
            return await _plain(writer, 200, "<html>gateway</html>", "text/html")
        if kind == "garbage":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 14\r\n\r\n")
            writer.write(b"data: \x00\xff{{{\n\n")
            return await writer.drain()
        if kind == "event":
            writer.write(_STREAM)
            _event(writer, {"error": {"message": "out of blocks"}})
            writer.write(b"0\r\n\r\n")
            return await writer.drain()
        if kind == "cut":
            await self._stream(body, writer, False, upto=2)
            writer.close()
        elif kind == "drop":
            writer.close()
        elif kind == "hang":
            await asyncio.sleep(30)
            writer.close()


_METRICS = """vllm:num_requests_running {running}
vllm:num_requests_waiting 0
vllm:kv_cache_usage_perc 0.1
vllm:prompt_tokens_total 5
vllm:generation_tokens_total 5
vllm:num_preemptions_total 3
process_resident_memory_bytes 1000000
"""


def _refusal(body: Any, length: int) -> str:
    """What a sound server has against a request; empty where it has nothing."""
    if not isinstance(body, dict):
        return "no object"
    prompt, most = body.get("prompt", "a"), body.get("max_tokens", 1)
    ids = prompt if isinstance(prompt, list) else []
    while ids and isinstance(ids[0], list) and not isinstance(ids[0], bool) and len(ids[0]) > 1:
        ids = ids[0]
    if not isinstance(prompt, (str, list)) or not all(isinstance(i, int) and 0 <= i < 10**6 for i in ids):
        return "no prompt"
    if len(prompt) > length * 16 or len(ids) > length:
        return "beyond the context"
    if not isinstance(most, int) or most < 1 or body.get("temperature", 0) < 0:
        return "out of range"
    return "" if body.get("model", "m") == "m" else "no such model"


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _event(writer: asyncio.StreamWriter, value: Any) -> None:
    _chunk(writer, b"data: %s\n\n" % json.dumps(value).encode())


async def _plain(writer: asyncio.StreamWriter, status: int, value: Any, kind: str = "") -> None:
    data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    kind = kind or ("text/plain" if isinstance(value, str) else "application/json")
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()


@contextmanager
def endpoint(**behaviour: Any) -> Iterator[FakeEndpoint]:
    """Runs a server in a thread."""
    fake, ready = FakeEndpoint(Behaviour(**behaviour)), threading.Event()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        loop.run_until_complete(fake.serve(ready, stop))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
