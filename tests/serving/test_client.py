"""What one streamed request makes of answers of every kind, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from deploy_vllm import main
from quant.serving.bench import BenchRequest, _bench
from quant.serving.check.profile import Profile
from quant.serving.check.run import CheckRequest, _check
from quant.serving.client import Endpoint, EndpointError, Prompt, Trace, ask, get_json
from quant.serving.load import Level
from quant.serving.measures import Lengths
from quant.serving.prompts import PromptRequest
from quant.serving.server_metrics import read_metrics

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n%s\r\n"
Script = Callable[[asyncio.StreamWriter, bytes], AsyncIterator[bytes]]


def _piece(text: str | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]}


def _said(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def _usage(tokens: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}}


def _data(*events: Any, end: bytes = b"\n\n", done: bool = True) -> bytes:
    lines = [b"data: " + json.dumps(e, ensure_ascii=False).encode() + end for e in events]
    return b"".join(lines) + (b"data: [DONE]" + end if done else b"")


_THREE = (_piece(" à"), _piece(" b"), _piece("", "length"))


def _ask(script: Script, *, chat: bool = False, stall: float = 5.0, tokens: int = 8) -> Trace:
    """One request to a server that writes what the script says, one write each, and closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            async for part in script(writer, head):
                writer.write(part)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def main() -> Trace:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        endpoint = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m", chat, stall=stall)
        try:
            async with endpoint.client() as client:
                return await asyncio.wait_for(ask(client, endpoint, Prompt("x", 3, tokens)), 20)
        finally:
            server.close()

    return asyncio.run(main())


def _bytes(*parts: bytes) -> Script:
    async def script(writer: asyncio.StreamWriter, head: bytes) -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return script


@pytest.mark.parametrize(
    ("parts", "text", "tokens", "counted"),
    [
        # usage tells, whatever the pieces: lines end as they like, comments and other fields stand between
        ([_data(*_THREE, _usage(3), end=b"\r\n\r\n")], " à b", 3, True),
        ([b": ping\n\nevent: x\nid: 1\n" + _data(*_THREE, _usage(3)) + b": bye\n"], " à b", 3, True),
        # each byte by itself, also the two of one character
        ([bytes([b]) for b in _data(*_THREE, _usage(3))], " à b", 3, True),
        # several tokens in a piece; a usage in each; one that counts nothing until the end
        ([_data(_piece(" a b c"), _piece(" d", "stop"), _usage(4))], " a b c d", 4, True),
        ([_data(*({**e, "usage": {"completion_tokens": i}} for i, e in enumerate(_THREE)))], " à b", 2, True),
        # no usage: pieces are counted, but not the one that only says that it ends
        ([_data(*_THREE)], " à b", 2, False),
        ([_data(_piece(" a"), _piece(" b", "length"))], " a b", 2, False),
        ([_data(_piece(" a"), _piece(""), _piece(" b", "stop"))], " a b", 3, False),  # half a character
        ([_data(*_THREE, _usage(None))], " à b", 2, False),
        ([_data(*_THREE, _usage(-2))], " à b", 2, False),
        ([_data(*_THREE, _usage(True))], " à b", 2, False),
        ([_data(*_THREE, {"choices": [], "usage": {"prompt_tokens": 10**400}})], " à b", 2, False),
        # neither the end's word nor its last event's blank line
        ([_data(*_THREE, done=False)], " à b", 2, False),
    ],
)
def test_sound_answers_in_every_dress(parts: list[bytes], text: str, tokens: int, counted: bool) -> None:
    trace = _ask(_bytes(_HEAD % b"connection: close\r\n", *parts))
    assert (trace.error, trace.text, trace.output_tokens, trace.counted) == ("", text, tokens, counted)
    assert trace.prompt_tokens == 3
    assert list(trace.stamps) == sorted(trace.stamps) and trace.ended == trace.stamps[-1]


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_what_a_model_thinks_is_generated_too(key: str) -> None:
    events = [
        _said({"role": "assistant", "content": ""}),
        _said({key: "hm"}),
        _said({"content": "7"}, "stop"),
    ]
    trace = _ask(_bytes(_HEAD % b"", _data(*events, _usage(2))), chat=True)
    assert trace.text == "hm7" and len(trace.stamps) == 2


def _then(end: str) -> Callable[[], Script]:
    """Answers without an end: pieces, comments or a page for ever."""
    parts = {
        "pieces": (_HEAD % b"", _data(_piece(" a"), done=False)),
        "empty pieces": (_HEAD % b"", _data(_piece(""), done=False)),
        "comments": (_HEAD % b"", b": processing\n\n"),
        "error page": (b"HTTP/1.1 502 Bad\r\ncontent-type: text/html\r\n\r\n", b"<p>sorry</p>"),
        "page": (b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\n\r\n", b"<p>welcome</p>"),
        "no line": (_HEAD % b"", b"x" * 65536),
        "nothing": (_HEAD % b"", _data({"choices": []}, done=False)),
        "roles": (_HEAD % b"", _data(_said({"role": "assistant"}), done=False)),
        "ends": (_HEAD % b"" + _data(_piece(" a", "stop")), b"data: [DONE]\n\n"),
        "head": (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        "to be continued": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    }

    def made() -> Script:
        async def script(writer: asyncio.StreamWriter, head: bytes) -> AsyncIterator[bytes]:
            first, more = parts[end]
            yield first
            while True:
                yield more
                await asyncio.sleep(0.001)

        return script

    return made


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (_then("pieces"), "endless", "97 events for 8 tokens"),
        (_then("empty pieces"), "endless", "events for 8 tokens"),
        (_then("nothing"), "endless", "events for 8 tokens"),
        (_then("roles"), "endless", "events for 8 tokens"),
        (_then("ends"), "endless", "events for 8 tokens"),
        (_then("head"), "timeout", "the head of the answer did not end"),
        (_then("to be continued"), "timeout", "the head of the answer did not end"),
        (_then("comments"), "timeout", "no event for 0.3 s"),
        (_then("error page"), "5xx", "sorry"),
        (_then("page"), "no stream", "welcome"),
        (_then("no line"), "timeout", "no event for 0.3 s"),
        (lambda: _bytes(_HEAD % b"", _data(*_THREE, _usage(9))), "miscounted", "9 tokens where at most 8"),
        (
            lambda: _bytes(_HEAD % b"content-encoding: gzip\r\n", gzip.compress(_data(*_THREE))),
            "no stream",
            "packed (gzip)",
        ),
        (
            lambda: _bytes(b"HTTP/1.1 307 X\r\nlocation: http://other/\r\ncontent-length: 0\r\n\r\n"),
            "3xx",
            "http://other/",
        ),
        (lambda: _bytes(_HEAD % b"", _data(_piece(" a"), done=False)), "cut off", "after 1 pieces"),
        (lambda: _bytes(_HEAD % b"", b'data: {"choices": [{"te\n\n'), "no stream", "choices"),
        (lambda: _bytes(_HEAD % b"", b"data: [1, 2]\n\n"), "no stream", "[1, 2]"),
        (lambda: _bytes(_HEAD % b"", b"data: " + b"[" * 100_000 + b"\n\n"), "no stream", "[[["),
        (lambda: _bytes(_HEAD % b"", _data({"error": {"message": "no blocks"}})), "error event", "no blocks"),
        (
            lambda: _bytes(_HEAD % b"", _data(_piece(" a"), {"object": "error", "message": "no room"})),
            "error event",
            "no room",
        ),
        (lambda: _bytes(_HEAD % b"", b"event: error\ndata: no room\n\n"), "error event", "no room"),
        # fewer tokens than pieces, and each piece twice, with and without a count
        (lambda: _bytes(_HEAD % b"", _data(*8 * [_THREE[0]], *_THREE, _usage(1))), "miscounted", "10 pieces"),
        (lambda: _bytes(_HEAD % b"", _data(*16 * [_THREE[0]], _THREE[2])), "miscounted", "16 pieces for 8"),
        (lambda: _bytes(_HEAD % b"", _data(*16 * [_THREE[0]], _THREE[2], _usage(8))), "miscounted", "16 p"),
        (lambda: _bytes(_HEAD % b"", b'data: {"choices": [{"text": "\xe9"}]}\n\n'), "no stream", ""),
        (
            lambda: _bytes(_HEAD % b"transfer-encoding: chunked\r\n", b"40\r\n" + _data(_THREE[0])[:20]),
            "cut off",
            "",
        ),
        (lambda: _bytes(_HEAD % b"", _data({"choices": 7}, {"choices": [None]})), "empty", "without a token"),
        (lambda: _bytes(b"HTTP/1.1 204 X\r\n\r\n"), "no stream", "204: nothing more"),
        (lambda: _bytes(b"HTTP/1.1 422 X\r\n\r\n" + b"[" * 9999), "4xx", "422: '[[["),
        (lambda: _bytes(b"HTTP/1.1 301 X\r\nlocation: \x1b[2J\r\n\r\n"), "3xx", "301: '\\x1b[2J'"),
        (lambda: _bytes(b"not HTTP\r\n\r\n"), "cut off", ""),
        (lambda: _bytes(), "cut off", ""),
    ],
)  # fmt: skip
def test_each_bad_answer_has_its_kind_and_an_end(
    script: Callable[[], Script], kind: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.serving.client._CONNECT", 0.5)
    begun = time.monotonic()
    trace = _ask(script(), stall=0.3)
    assert trace.error == kind and words in trace.detail
    assert time.monotonic() - begun < 15


def test_events_are_asked_for_unpacked() -> None:
    async def script(writer: asyncio.StreamWriter, head: bytes) -> AsyncIterator[bytes]:
        assert b"accept-encoding: identity" in head.lower()
        yield _HEAD % b"" + _data(*_THREE)

    assert _ask(script).error == ""


def _scripted(answers: Callable[[str, Any], list[bytes]], work: Callable[[Endpoint], Any]) -> Any:
    """Runs work against a server that closes after each answer without having said so, and waits a little
    where a part of it is empty."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(x.lower().split(b": ", 1) for x in head.split(b"\r\n") if b": " in x)
            body = await reader.readexactly(int(fields.get(b"content-length", 0)))
            for part in answers(head.split()[1].decode(), json.loads(body or b"{}")):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0 if part else 0.005)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        writer.close()

    async def main() -> Any:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=256)
        try:
            return await work(Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", stall=2.0))
        finally:
            server.close()

    return asyncio.run(main())


def _json(value: Any) -> list[bytes]:
    data = json.dumps(value).encode()
    return [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data),
        data,
    ]


def _whole(path: str, body: Any) -> list[bytes]:
    """The model's name, or an answer that was held back until it was complete."""
    if path.endswith("models"):
        return _json({"data": [{"id": "m"}]})
    if not body.get("stream"):
        return _json({"choices": [{"text": " x"}], "usage": {"prompt_tokens": 9, "completion_tokens": 1}})
    count = body["max_tokens"]
    data = _data(*[_piece(f" {i}") for i in range(count - 1)], _piece(" z", "length"), _usage(count))
    return [_HEAD % b"transfer-encoding: chunked\r\n" + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)]


def test_a_server_that_drops_connections_and_a_proxy_that_holds_streams_back() -> None:
    """Connections end after each answer unannounced, so the next must not be lost on them; each answer comes
    whole, which is said, for its first token's time is not the engine's."""

    async def load(endpoint: Endpoint) -> Any:
        lengths = Lengths("fixed", 8, 8)
        prompts = PromptRequest(lengths, lengths)
        request = BenchRequest(prompts, (Level(concurrency=2),), 20, 0)
        return await _bench(endpoint, request, "", {}, lambda event: None)

    result = _scripted(_whole, load)
    level = result.levels[0]
    assert level["completed"] == 20 and level["failed"] == 0 and level["total_output_tokens"] == 160
    assert level["came_whole"] == 20 and any("holds the stream back" in n for n in result.notes)

    report = _scripted(_whole, _walk)
    failed = {f.name for f in report.findings if f.status == "FAIL"}
    assert failed == {"answers are streamed"}, report.findings


async def _walk(endpoint: Endpoint) -> Any:
    """The check of performance with eight requests of eight tokens."""
    profile = Profile.model_validate(
        {"performance": {"input_tokens": 8, "output_tokens": 8, "requests": 8, "long_prompts": {}}}
    )
    return await _check(endpoint, CheckRequest(profile, groups=("performance",)), lambda event: None)


def test_answers_that_come_whole_only_under_load_are_no_failure_of_a_proxy() -> None:
    """As where neither the server nor this program gets a processor: asked alone they are streamed."""
    asked = 0

    def answers(path: str, body: Any) -> list[bytes]:
        nonlocal asked
        if not body.get("stream"):
            return _whole(path, body)
        asked += 1
        if asked <= 10:  # two that warm up, and the load
            return _whole(path, body)
        count = body["max_tokens"]
        pieces = [*[_piece(f" {i}") for i in range(count - 1)], _piece(" z", "length"), _usage(count)]
        parts = [
            b"%x\r\n%s\r\n" % (len(data), data)
            for data in (_data(piece, done=piece is pieces[-1]) for piece in pieces)
        ]
        streamed = [x for part in parts for x in (part, b"")]
        return [_HEAD % b"transfer-encoding: chunked\r\n", *streamed, b"0\r\n\r\n"]

    found = {f.name: f for f in _scripted(answers, _walk).findings}
    said = found["answers are streamed"]
    assert said.status == "WARN" and "8 of 8 answers came whole under the load, 0 of 3" in said.detail


def test_another_model_other_prompts_and_figures_that_cannot_be_are_told() -> None:
    """Of the answers' own words; and a /metrics that says anything, for ever, harms no load test."""

    async def load(endpoint: Endpoint) -> Any:
        lengths = Lengths("fixed", 8, 8)
        request = BenchRequest(PromptRequest(lengths, lengths), (Level(concurrency=2),), 4, 0)
        return await _bench(endpoint, request, "", {}, lambda event: None)

    def answers(metrics: list[bytes]) -> Callable[[str, Any], list[bytes]]:
        def answer(path: str, body: Any) -> list[bytes]:
            if path.endswith("metrics"):
                return metrics
            if path.endswith("models"):
                return _json({"data": [7, {"id": None}, {"id": "m"}]})
            if not body.get("stream"):
                return _whole(path, body)
            pieces = [{**_piece(" a"), "model": "other"}] * (body["max_tokens"] - 1)
            told = {"choices": [], "usage": {"prompt_tokens": 4000, "completion_tokens": body["max_tokens"]}}
            return [_HEAD % b"", _data(*pieces, _piece(" z", "length"), told)]

        return answer

    odd = (
        b'vllm:num_requests_waiting 1e308\nvllm:num_requests_waiting{a="1"} 1e308\n'
        b"vllm:spec_decode_num_draft_tokens_total %d\nvllm:prefix_cache_queries_total %d\n"
    )
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"
    result = _scripted(answers([head, odd % (time.monotonic_ns(), 5)]), load)
    assert result.levels[0]["completed"] == 4 and result.levels[0]["answered_by"] == ["other"]
    assert any("they are of 'other', not of m" in n for n in result.notes)
    assert any("counts 4,000 tokens in a prompt of 8" in n for n in result.notes)

    failed = {f.name: f for f in _scripted(answers([head]), _walk).findings if f.status == "FAIL"}
    assert "of 'other', not of m" in failed["answers are of the model"].detail

    async def look(endpoint: Endpoint) -> Any:
        async with endpoint.client() as client:
            return await read_metrics(client, endpoint)

    assert _scripted(answers([head, *[b"a 1\n" * 9999] * 100_000]), look) == {}


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n",
            "no answer in time|no JSON",
        ),  # or more than is read
        (b"HTTP/1.1 301 X\r\nlocation: https://there/\r\ncontent-length: 0\r\n\r\n", "https://there/"),
    ],
)
def test_a_plain_answer_without_an_end_or_elsewhere_is_told(head: bytes, words: str) -> None:
    async def work(endpoint: Endpoint) -> Any:
        async with endpoint.client() as client:
            await get_json(client, endpoint, "/v1/models")

    def answers(path: str, body: Any) -> list[bytes]:
        return [head, *([b" " * 65536] * 100_000 if b"200" in head else [])]

    with pytest.raises(EndpointError, match=words):
        _scripted(answers, work)


def _names(model: bytes) -> bytes:
    """The list of one model, whose name no terminal shows."""
    data = b'{"data": [{"id": "%s"}]}' % model
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data)


@pytest.mark.parametrize("command", ["bench", "check"])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 12\r\n\r\n<h1>hi</h1>\n",
            "no JSON ('<h1>hi",
        ),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "names no model"),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{"data": 5}', "names no model"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n" + b"[" * 12, "no JSON"),
        (_names(b"\\ud800"), "names no model: {'data': [{'id': '\\ud800'}]}"),
        (_names(b"\\u001b[2J"), "names no model: {'data': [{'id': '\\x1b[2J'}]}"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "ended before it was complete"),
        (None, "the server is overloaded or hangs"),  # it is starting: it listens and does not answer yet
    ],
)
def test_what_is_no_endpoint_is_told_in_a_line(
    command: str,
    answer: bytes | None,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])
                    if answer is not None:
                        held[-1].recv(65536)
                        held[-1].sendall(answer)
                        held[-1].close()

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    command,
                    "--url",
                    url,
                    "--stall",
                    "0.5" if answer is None else "10",
                    *(["--concurrency", "1"] if command == "bench" else []),
                ]
            )
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for connection in held:
            connection.close()
    said = capsys.readouterr()
    lines = [x for x in (said.err + said.out).splitlines() if words in x]
    assert "Traceback" not in said.err and len(lines) == 1, said
    # of an endpoint that is there and does not answer in time there is a report of the check
    assert stop.value.code == (4 if answer is None and command == "check" else 1)


def test_a_fast_engine_is_no_proxy_that_holds_back() -> None:
    """Bursts of many tokens, as a long speculation makes them, still come one after another."""

    def whole(*stamps: float, tokens: int = 64) -> bool:
        return Trace(0.0, 0.0, stamps, stamps[-1], 9, tokens).whole

    assert whole(0.500, 0.5001) and whole(0.5)
    assert not whole(0.050, 0.052, 0.054) and not whole(0.01, 2.0)
    assert not whole(0.5, tokens=4)  # too few to tell
