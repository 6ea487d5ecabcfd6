"""What an operator relies on: health, metrics, an orderly end, a start again, memory that does not grow."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from quant.serving.check.context import Context
from quant.serving.check.performance import prompts_for
from quant.serving.check.value import Check, Finding, Skip, Unexpected, judged, skipped, within
from quant.serving.client import KINDS, Prompt, Trace, ask
from quant.serving.installation import ServerError
from quant.serving.load import Level, run_level
from quant.serving.measures import student
from quant.serving.process import GRACE
from quant.serving.server_metrics import COUNTERS, GAUGES, figures, parse_metrics, resident_bytes
from quant.units import format_seconds, format_size

if TYPE_CHECKING:
    from quant.serving.foreign import ForeignServer
    from quant.serving.process import Server

#: Figures that alerts and dashboards are made of.
_NEEDED = ("running", "queue", "kv_cache_usage", "prompt_tokens", "output_tokens")
#: Seconds between two looks: at health while draining, at memory.
_LOOK, _MEMORY_LOOKS = 0.05, 200
_HOUR = 3600.0
#: Tokens that the request under way is asked for while the server is told to end.
_DRAINED = 512
_NOT_OURS = (
    "the server is not ours to stop: give --checkpoint without --url, and it starts one; or its --pid, and "
    "it is ended"
)
#: Seconds that it may take at the speed of the load.
_DRAINING = 5.0


async def health(context: Context) -> list[Finding]:
    reply = await context.send("GET", "/health")
    if reply.status == 404:
        raise Skip("the endpoint has no /health")
    todo = "a balancer would take it out: see its log"
    passed, text = reply.status == 200, f"answers {reply.status}"
    return [judged("/health", passed, text, value=reply.status, threshold=200,
                   todo=todo)]  # fmt: skip


async def metrics(context: Context) -> list[Finding]:
    reply = await context.send("GET", "/metrics")
    known = figures(parse_metrics(reply.text)) if reply.status == 200 else {}
    missing = [name for name in _NEEDED if name not in known]
    series = {name: (GAUGES | COUNTERS)[name] for name in missing}
    text = f"{len(_NEEDED) - len(missing)} of {len(_NEEDED)} needed series"
    if reply.status != 200:
        text = f"/metrics answers {reply.status}"
    wanted = "; ".join(f"{name} ({' or '.join(names)})" for name, names in series.items())
    return [
        judged(
            "/metrics",
            not missing,
            text,
            value=len(known),
            threshold=len(_NEEDED),
            todo=f"missing: {wanted}: start the engine with its metrics, and let the proxy pass them to the "
            "monitoring",
            otherwise="WARN" if known else "FAIL",
        )
    ]


# -- memory over time ----------------------------------------------------------------------------------------


def slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Growth by the hour and half of its 95 % interval, by least squares over all but the first quarter, in
    which caches fill; of values as far apart as they are independent (one in four).

    Args:
        times: seconds.
    """
    begin = len(times) // 4
    t, v = np.asarray(times[begin:]) / _HOUR, np.asarray(values[begin:], dtype=float)
    if len(t) < 8 or np.ptp(t) == 0:
        return math.nan, math.inf
    away = t - t.mean()
    rate = float((away * (v - v.mean())).sum() / (away**2).sum())
    rest = v - v.mean() - rate * away
    independent = max(len(t) // 4, 3)
    spread = math.sqrt(
        float((rest**2).sum()) / (independent - 2) / float((away**2).sum()) * len(t) / independent
    )
    return rate, student(independent - 2) * spread


async def _memory(context: Context) -> float | None:
    """Bytes that the server holds now."""
    if (held := context.held) is not None:
        return float(await asyncio.to_thread(lambda: held.resident_bytes))
    reply = await context.send("GET", "/metrics", limit=10.0)
    return resident_bytes(reply.text) if reply.status == 200 else None


async def soak(context: Context) -> list[Finding]:
    if context.soak is None:
        raise Skip("no --soak is asked for")
    if not await _memory(context):
        raise Skip("the endpoint does not tell its memory (process_resident_memory_bytes of /metrics)")
    p, end = context.profile.performance, time.monotonic() + context.soak
    prompts = await prompts_for(context, 64, 77)
    times: list[float] = []
    values: list[float] = []

    async def look() -> None:
        begun = time.monotonic()
        while time.monotonic() < end:
            try:
                held = await _memory(context)
            except Unexpected:  # too busy to tell
                held = None
            if held:
                times.append(time.monotonic() - begun)
                values.append(held)
            context.say("soak", time.monotonic() - begun, context.soak or 0)
            await asyncio.sleep(max(0.1, (context.soak or 0) / _MEMORY_LOOKS))

    traces: list[Trace] = []
    looking = asyncio.create_task(look())
    try:
        while (left := end - time.monotonic()) > 0:
            level = Level(concurrency=p.concurrency)
            run = await run_level(
                context.client, context.endpoint, prompts, level, seconds=max(left, 1.0),
                sampling={"temperature": 0.0},
            )  # fmt: skip
            traces += run.summary.traces
            if not run.summary.good:
                looking.cancel()
                break
        await asyncio.wait([looking])
    finally:
        looking.cancel()
    return [_growth(context, times, values), _errors(traces)]


def _errors(traces: Sequence[Trace]) -> Finding:
    """Of the load of a soak; what its end cut off is no failure."""
    failed = [t for t in traces if t.error and t.error != "timeout"]
    kinds = sorted({t.error for t in failed})
    text = f"{len(failed)} of {len(traces)} requests failed{': ' if kinds else ''}{', '.join(kinds)}"
    return judged("requests of the soak", bool(traces) and not failed, text, value=len(failed), threshold=0,
                  todo="; ".join(KINDS[k] for k in kinds))  # fmt: skip


def _growth(context: Context, times: Sequence[float], values: Sequence[float]) -> Finding:
    limit = context.profile.operation.growth_per_hour
    rate, half = slope(times, values)
    name, spent = "memory over time", format_seconds(context.soak or 0)
    if not math.isfinite(rate):
        return skipped(name, f"{len(values)} looks in {spent} say nothing of a slope: soak for longer")
    text = f"{format_size(rate)} ± {format_size(half)} an hour over {spent}, now {format_size(values[-1])}"
    if rate + half <= limit:
        return Finding(name, "PASS", text, rate, limit)
    if rate - half > limit:
        todo = "it will run out of memory: restart it in time, and report it to the engine"
        return Finding(name, "FAIL", text, rate, limit, todo)
    return Finding(name, "WARN", f"{text}: too uncertain", rate, limit, "soak for longer (--soak 1h)")


# -- the end and the start -----------------------------------------------------------------------------------


async def drain(context: Context) -> list[Finding]:
    """SIGTERM while a request is under way."""
    if (server := context.held) is None:
        raise Skip(_NOT_OURS)
    limit = context.profile.operation.drain_seconds
    most = _some_seconds_of_tokens(context)
    prompt = Prompt("The history of the town begins", 0, most)
    sampling = {"temperature": 0, "ignore_eos": True}
    begun = asyncio.Event()
    under_way = asyncio.create_task(
        ask(context.client, context.endpoint, prompt, sampling=sampling, limit=limit + 30, begun=begun)
    )
    await begun.wait()
    told = time.perf_counter()
    server.ask_to_end(first_alone=True)
    ready, accepted = await _while_ending(context, server, told + limit)
    trace = await under_way
    ended = trace.ended - told
    if trace.stamps and not trace.error and trace.ended < told:
        finding = skipped("requests under way are finished", "the request had ended before the signal came")
    else:
        finding = judged(
            "requests under way are finished",
            not trace.error,
            f"{trace.output_tokens} of {most} tokens came"
            + (
                f", then: {trace.error} ({trace.detail})"
                if trace.error
                else f", the last {ended:.1f} s after SIGTERM"
            ),
            value=trace.output_tokens,
            threshold=most,
            todo="a rollout cuts answers off: start vLLM with --shutdown-timeout 60, and give its supervisor "
            "as long before it kills",
        )
    return [
        finding,
        judged(
            "not ready while it ends",
            not ready,
            f"/health answered 200 for {ready:.1f} s after SIGTERM, while new requests "
            f"{'were answered' if accepted else 'failed'}"
            if ready
            else "/health did not answer 200 after SIGTERM",
            value=round(ready, 2),
            threshold=0,
            todo="a balancer goes on sending to it: take it out before it is told to end (preStop)",
            otherwise="WARN",
        ),
    ]


def _some_seconds_of_tokens(context: Context) -> int:
    """As many as the load's streams had in a few seconds, within what the context allows."""
    speed = context.facts.get("load", {}).get("median_tpot_ms")
    wanted = _DRAINED if not speed or not math.isfinite(speed) else int(1000 * _DRAINING / speed)
    return max(16, min(wanted, _DRAINED, (context.length or 2 * _DRAINED) - 16))


async def _while_ending(context: Context, server: Server | ForeignServer, until: float) -> tuple[float, int]:
    """Looks at health and sends new requests until the server no longer listens.

    Returns:
        seconds for which /health said that it is ready, from the first second on, and how many new requests
        were answered then.
    """
    told, ready, accepted = time.perf_counter(), 0.0, 0
    body = {"model": context.endpoint.model, "prompt": "a", "max_tokens": 1}
    while server.alive and time.perf_counter() < until:
        try:
            reply = await context.send("GET", "/health", limit=2.0)
            if reply.status == 200 and time.perf_counter() - told > 1.0:
                ready = time.perf_counter() - told
                new = await context.send("POST", "/v1/completions", body, limit=2.0)
                accepted += new.status == 200
        except Unexpected:
            pass
        await asyncio.sleep(_LOOK)
    return ready, accepted


async def restart(context: Context) -> list[Finding]:
    if (server := context.server) is None:
        ended = "it has been ended (--pid), and starting it is its owner's: give --checkpoint without --url"
        raise Skip(_NOT_OURS if context.foreign is None else ended)
    await asyncio.to_thread(server.stop)
    context.say("starting it again")
    try:
        await asyncio.to_thread(server.start, context.started)
    except ServerError as error:
        return [Finding("starts again", "FAIL", str(error).splitlines()[0], todo="see the log of its start")]
    begun = time.perf_counter()
    answered = await context.complete("a")
    seconds = server.load_seconds + time.perf_counter() - begun
    limit = context.profile.operation.restart_seconds
    return [
        judged(
            "starts again",
            answered.status == 200 and seconds <= limit,
            f"{format_seconds(seconds)} to the first answer" if answered.status == 200 else str(answered),
            value=round(seconds, 2),
            threshold=limit,
            todo="an outage lasts as long: keep compiled kernels between starts, the checkpoint on a fast "
            "disk, or a second replica",
        )
    ]


def _soaked(context: Context) -> float:
    return 3 * (context.soak or 0) + 120


def _drained(context: Context) -> float:
    return 2 * context.profile.operation.drain_seconds + 90


def _restarted(context: Context) -> float:
    return context.started + 3 * GRACE + 120


CHECKS = (
    Check("/health", health, within(60)),
    Check("/metrics", metrics, within(60)),
    Check("memory over time", soak, _soaked),
    Check("requests under way are finished", drain, _drained),
    Check("starts again", restart, _restarted),
)
