"""Who may use it, what it does with requests that are wrong, and what it gives away."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from quant.errors import UsageError, clipped, first_line
from quant.serving.check.context import Context, Reply, together
from quant.serving.check.value import Check, Finding, Skip, Unexpected, judged, within
from quant.serving.client import said_by

#: Requests under way at once while the limit of a rate is looked for.
_AT_ONCE = 50
#: Bytes of a body that no prompt needs.
_OVERSIZED = 8 << 20
#: Seconds after which a log has what belongs to a request; bytes of a log's end that are searched.
_LOGGED, _END_OF_LOG = 1.0, 16 << 20
_DAY = 86400.0


# -- the key -------------------------------------------------------------------------------------------------


async def _status_with(context: Context, key: str | None, body: dict[str, Any] | None) -> Reply:
    """The answer to a request with another key."""
    path = "/v1/models" if body is None else "/v1/completions"
    async with replace(context.endpoint, api_key=key).client() as client:
        return await context.send("GET" if body is None else "POST", path, body, client=client)


async def keys(context: Context) -> list[Finding]:
    body = {"model": context.endpoint.model, "prompt": "a", "max_tokens": 1}
    without = [await _status_with(context, None, b) for b in (None, body)]
    if context.endpoint.api_key is None:
        return [_open(context, without)]
    wrong = [await _status_with(context, secrets.token_urlsafe(16), b) for b in (None, body)]
    right = [await _status_with(context, context.endpoint.api_key, b) for b in (None, body)]
    findings = []
    for name, replies in (("a missing key", without), ("a wrong key", wrong)):
        refused = all(r.status in (401, 403) for r in replies)
        text = ", ".join(f"{r.route}: {r.status}" for r in replies)
        todo = "start the server with its key (VLLM_API_KEY), and let no proxy add one"
        findings.append(judged(f"{name} is refused", refused, text, value=text, threshold="401", todo=todo))
    text = ", ".join(f"{r.route}: {r.status}" for r in right)
    findings.append(
        judged(
            "the right key is taken",
            all(r.status == 200 for r in right),
            text,
            value=text,
            threshold="200",
            todo=f"{said_by(right[-1].text[:500])}: see which key the server was started with",
        )  # fmt: skip
    )
    return findings


def _open(context: Context, replies: list[Reply]) -> Finding:
    """What to think of an endpoint for which no key was given."""
    if all(r.status in (401, 403) for r in replies):
        return Finding("a missing key is refused", "PASS", "401 without a key; --api-key-env has the rest "
                       "checked too")  # fmt: skip
    if context.endpoint.local:
        raise Skip("no key is given, and the address is this machine's own")
    return Finding(
        "a missing key is refused",
        "FAIL",
        "it answers without a key, and other machines reach it",
        replies[-1].status,
        "401",
        "start the server with a key (--api-key-env), and give it here",
    )


async def bind(context: Context) -> list[Finding]:
    """Whether a server of this machine listens on addresses that other machines reach, without a key."""
    if not context.endpoint.local:
        raise Skip("the endpoint is another machine's")
    port = urlsplit(context.endpoint.url).port or (443 if context.endpoint.url.startswith("https") else 80)
    try:
        seen = await asyncio.to_thread(psutil.net_connections, "tcp")
    except (psutil.Error, OSError) as error:
        raise Skip(f"the system does not tell who listens: {first_line(error)}") from error
    listening = [c.laddr for c in seen if c.status == psutil.CONN_LISTEN and c.laddr]
    addresses = {a.ip for a in listening if a.port == port}
    if not addresses:
        raise Skip(f"nobody of this system listens on port {port}: is it in a container?")
    wide = sorted(a for a in addresses if not ipaddress.ip_address(a).is_loopback)
    keyless = context.endpoint.api_key is None
    return [
        judged(
            "reachable as meant",
            not (wide and keyless),
            f"listens on {', '.join(sorted(addresses))}, {'without' if keyless else 'with'} a key",
            value=sorted(addresses),
            threshold="loopback, or a key",
            todo="whoever reaches the port can use the model: bind to 127.0.0.1 or start it with a key",
        )
    ]


# -- encryption ----------------------------------------------------------------------------------------------


def _certificate(host: str, port: int, ca: str | None) -> tuple[float, str]:
    """Days until the certificate ends, and the version of TLS."""
    context = ssl.create_default_context(cafile=ca)
    with socket.create_connection((host, port), timeout=15) as plain:
        with context.wrap_socket(plain, server_hostname=host) as encrypted:
            ends = (encrypted.getpeercert() or {}).get("notAfter")
            version = encrypted.version() or ""
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / _DAY if isinstance(ends, str) else float("nan")
    return days, version


async def encryption(context: Context) -> list[Finding]:
    parts = urlsplit(context.endpoint.url)
    host = parts.hostname or ""
    if parts.scheme == "http":
        local = context.endpoint.local
        text = (
            "http; it stays on this machine"
            if local
            else f"http to {host}: prompts, answers and key in the clear"
        )
        todo = "put a proxy with TLS in front"
        return [
            judged("encrypted", local, text, value="http", threshold="https", todo=todo, otherwise="WARN")
        ]
    limit = context.profile.security.certificate_days
    try:
        days, version = await asyncio.to_thread(_certificate, host, parts.port or 443, context.endpoint.ca)
    except ssl.SSLCertVerificationError as error:
        text = f"the certificate is not trusted: {error.verify_message}"
        return [Finding("encrypted", "FAIL", text, None, limit, "renew it, or name its authority with --ca")]
    except (OSError, ValueError) as error:
        return [Finding("encrypted", "FAIL", f"no encrypted connection: {first_line(error)}", None, limit,
                        "see the proxy that holds the certificate")]  # fmt: skip
    return [
        judged(
            "encrypted",
            days >= limit,
            f"{version}, the certificate ends in {days:.0f} days",
            value=round(days, 1),
            threshold=limit,
            todo="renew the certificate, or see why that does not happen by itself",
            otherwise="WARN",
        )
    ]


# -- requests that are wrong ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Malformed:
    """A request that must be refused: its body as JSON, or as bytes; None: it cannot be made here."""

    name: str
    body: Callable[[Context], Any]


def _good(context: Context, **changes: Any) -> dict[str, Any]:
    return {"model": context.endpoint.model, "prompt": "a", "max_tokens": 1, **changes}


def _nested(context: Context) -> bytes:
    head = json.dumps({"model": context.endpoint.model, "max_tokens": 1})[:-1]
    return f'{head}, "prompt": {"[" * 50_000}{"]" * 50_000}}}'.encode()


def _beyond(context: Context) -> dict[str, Any] | None:
    """A prompt of more tokens than the context, of whatever token is in every vocabulary."""
    return None if context.length is None else _good(context, prompt=[5] * (context.length + 64))


MALFORMED: tuple[Malformed, ...] = (
    Malformed("JSON that is cut off", lambda c: b'{"model": "'),
    Malformed("a list instead of an object", lambda c: [1]),
    Malformed("wrong types", lambda c: _good(c, prompt={"a": 1}, max_tokens="many")),
    Malformed("negative max_tokens", lambda c: _good(c, max_tokens=-1)),
    Malformed("a negative temperature", lambda c: _good(c, temperature=-1)),
    Malformed("a model that is not there", lambda c: _good(c, model=f"no-{secrets.token_hex(4)}")),
    Malformed("a token that is not there", lambda c: _good(c, prompt=[10**9])),
    Malformed("lists within lists", _nested),
    Malformed("a prompt beyond the context", _beyond),
    Malformed("8 MiB of text", lambda c: _good(c, prompt="a " * (_OVERSIZED // 2)) if c.length else None),
)


async def malformed(context: Context) -> list[Finding]:
    """Each must be a client's mistake, and the server answers afterwards."""
    faults, asked = [], 0
    for row in MALFORMED:
        body = row.body(context)
        if body is None:
            continue
        asked += 1
        context.say("malformed requests", asked, len(MALFORMED))
        raw = body if isinstance(body, bytes) else None
        try:
            reply = await context.send(
                "POST", "/v1/completions", None if raw is not None else body, content=raw, limit=30.0
            )
        except Unexpected:
            faults.append(f"{row.name}: no answer")
            continue
        if not reply.refused:
            faults.append(f"{row.name}: {reply.status}")
    findings = [
        judged(
            "malformed requests get 4xx",
            not faults,
            "; ".join(faults) or f"{asked} kinds are refused",
            value=asked - len(faults),
            threshold=asked,
            todo="an accepted mistake hides faults of clients, a 5xx or a closed connection may end the "
            "server: put a gateway in front that checks requests, and report it to the engine",
        )
    ]
    alive = await context.complete("a")
    findings.append(
        judged(
            "it lives after them",
            alive.status == 200,
            str(alive) if alive.status != 200 else "it answers",
            value=alive.status,
            threshold=200,
            todo="a single request takes the server down",
        )  # fmt: skip
    )
    return findings


# -- what stands in front ------------------------------------------------------------------------------------


async def rate_limit(context: Context) -> list[Finding]:
    if context.gateway is None:
        raise Skip("no --gateway is named")
    count = context.profile.security.rate_limit_requests
    body, gate, seen = _good(context), asyncio.Semaphore(_AT_ONCE), []

    async def one() -> None:
        async with gate:
            if 429 in seen:
                return
            reply = await context.send("POST", "/v1/completions", body, base=context.gateway, limit=30.0)
            seen.append(reply.status)

    await together([one() for _ in range(count)])
    return [
        judged(
            "the gateway limits the rate",
            429 in seen,
            f"429 after {seen.index(429)} requests"
            if 429 in seen
            else f"{len(seen)} requests at once, none got 429",
            value=seen.index(429) if 429 in seen else None,
            threshold=count,
            todo=f"one client can take all: limit requests in {context.gateway}, or raise "
            "rate_limit_requests of the profile to above its limit",
        )
    ]


@dataclass(frozen=True)
class Probe:
    """What a filter is tried with: a prompt that must be stopped, or whose answer must not match."""

    prompt: str
    blocked: bool
    absent: re.Pattern[str] | None


def read_probes(path: Path) -> list[Probe]:
    """Probes of a file, one JSON object a line: ``prompt`` with ``blocked: true``, or with ``absent``, a
    pattern.

    Raises:
        UsageError: it cannot be read, or a line is none.
    """
    try:
        lines = [x for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"--probes is {str(path)!r}: it cannot be read ({first_line(error)})") from error
    probes = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            absent = value.get("absent")
            probe = Probe(
                value["prompt"],
                value.get("blocked", False),
                re.compile(absent) if absent is not None else None,
            )
            sound = isinstance(probe.prompt, str) and isinstance(probe.blocked, bool)
        except (ValueError, TypeError, KeyError, AttributeError, re.error):
            sound = False
        if not sound or probe.blocked == (probe.absent is not None):
            raise UsageError(
                f"--probes is {str(path)!r}: line {number} is {clipped(line, 60)}: a JSON object with "
                "'prompt' and either 'blocked': true or 'absent': a pattern is needed"
            )
        probes.append(probe)
    if not probes:
        raise UsageError(f"--probes is {str(path)!r}: it holds no probe")
    return probes


async def filters(context: Context) -> list[Finding]:
    if context.probes is None:
        raise Skip("no --probes are given")
    passed, faults = 0, []
    for number, probe in enumerate(read_probes(context.probes), 1):
        context.say("filter probes", number)
        body = _good(context, prompt=probe.prompt, max_tokens=64, temperature=0)
        path = "/v1/completions"
        if context.endpoint.chat:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            path = "/v1/chat/completions"
        reply = await context.send("POST", path, body, base=context.gateway)
        stopped = reply.refused or reply.choice().get("finish_reason") == "content_filter"
        leaks = probe.absent is not None and not stopped and probe.absent.search(reply.content())
        if (probe.blocked and not stopped) or leaks:
            faults.append(f"probe {number} was {'answered' if probe.blocked else 'not filtered'}")
        else:
            passed += 1
    total = passed + len(faults)
    return [
        judged(
            "filters stop what they must",
            not faults,
            "; ".join(faults) or f"{total} probes",
            value=passed,
            threshold=total,
            todo="see the filter in front of the model",
        )  # fmt: skip
    ]


# -- the log -------------------------------------------------------------------------------------------------


def _end_of(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - _END_OF_LOG))
        return file.read().decode(errors="replace")


async def private_log(context: Context) -> list[Finding]:
    """A word that nobody else uses, in a prompt: it must not be in the log."""
    if context.log is None and context.server is None:
        raise Skip("no --log of the server is given")
    word = f"marker{secrets.token_hex(8)}"
    before = context.log.stat().st_size if context.log is not None else 0
    (await context.complete(f"Remember {word}.")).object()
    await asyncio.sleep(_LOGGED)
    if context.log is not None:
        after = context.log.stat().st_size
        text = _end_of(context.log, before if after >= before else 0)
    else:
        assert context.server is not None
        text = "\n".join(context.server.lines)
    return [
        judged(
            "prompts are not in the log",
            word not in text,
            "a marker of a prompt is not in it" if word not in text else "a marker of a prompt is in it",
            value=word in text,
            threshold=False,
            todo="whoever reads logs reads what people write: drop --enable-log-requests",
        )
    ]


CHECKS = (
    Check("a missing key is refused", keys, within(180)),
    Check("reachable as meant", bind, within(30)),
    Check("encrypted", encryption, within(60)),
    Check("malformed requests get 4xx", malformed, within(400)),
    Check("the gateway limits the rate", rate_limit, within(300)),
    Check("filters stop what they must", filters, within(1800)),
    Check("prompts are not in the log", private_log, within(180)),
)
