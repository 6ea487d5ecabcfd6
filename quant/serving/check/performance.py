"""How fast it answers under load, against the limits of the profile. Figures are those of
:mod:`quant.serving.measures`; a request without a first token counts as one that waits for ever."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from quant.errors import clipped
from quant.serving.check.context import Context
from quant.serving.check.value import Check, Finding, Skip, Unexpected, judged, skipped
from quant.serving.client import KINDS, EndpointError, Prompt, Trace, ask
from quant.serving.load import Level, Run, run_level
from quant.serving.measures import Lengths, percentile_interval
from quant.serving.prompts import PromptRequest, make_prompts

#: Tokens of an answer of the sustained load and of a long prompt: enough for a rate.
_FEW = 32
#: The largest load that is tried; requests for each at a time.
_MOST, _ROUNDS = 1024, 3
#: Requests that are sent one at a time where those of the load came whole.
_ALONE = 3
_OVERLOADED = "serve fewer at a time (--max-num-seqs), quantize further, or take a faster GPU or more of them"


def _lengths(context: Context) -> tuple[int, int]:
    """Tokens of a prompt and of an answer: the profile's, shortened to the endpoint's context."""
    p = context.profile.performance
    if context.length is None or p.input_tokens + p.output_tokens < context.length:
        return p.input_tokens, p.output_tokens
    output = max(2, min(p.output_tokens, context.length // 3))
    return max(1, context.length - output - 16), output


async def _prompts(context: Context, tokens: int, output: int, count: int, seed: int) -> list[Prompt]:
    """
    Raises:
        Unexpected: the endpoint counts no tokens and refuses to answer.
    """
    request = PromptRequest(
        Lengths("fixed", tokens, tokens), Lengths("fixed", output, output), shared_prefix=0, seed=seed
    )
    try:
        return await make_prompts(context.client, context.endpoint, request, count)
    except EndpointError as error:
        raise Unexpected(str(error)) from error


async def prompts_for(context: Context, count: int, seed: int) -> list[Prompt]:
    """Prompts as the profile has them, as far as the endpoint's context allows.

    Raises:
        Unexpected: see :func:`_prompts`.
    """
    tokens, output = _lengths(context)
    return await _prompts(context, tokens, output, count, seed)


async def _run(
    context: Context, prompts: Sequence[Prompt], concurrency: int, seconds: float, phase: str
) -> Run:
    """A closed loop; where the engine refuses ``ignore_eos``, without it."""

    def done(ended: int) -> None:
        context.say(phase, ended, len(prompts))

    run = None
    for wish in ({"ignore_eos": True}, {}):
        run = await run_level(
            context.client,
            context.endpoint,
            prompts,
            Level(concurrency=concurrency),
            sampling={"temperature": 0, **wish},
            seconds=seconds,
            done=done,
        )
        if set(run.summary.errors) != {"4xx"}:
            break
    assert run is not None
    return run


def first_tokens(traces: Sequence[Trace], percent: float) -> float:
    """A percentile of the milliseconds to the first token, infinite where too many had none."""
    waits = [1000 * t.ttft if t.stamps else math.inf for t in traces]
    # no interpolation: between a number and infinity there is none
    return float(np.percentile(waits, percent, method="higher")) if waits else math.inf


def stream_rate(traces: Sequence[Trace]) -> float:
    """Tokens a second that 19 in 20 streams reach; 0 where none came. An answer that did not end in time
    counts with what came of it."""
    rates = []
    for t in traces:
        if not t.stamps:
            rates.append(0.0)
        elif t.output_tokens > 1 or t.error:
            rates.append(max(t.output_tokens - 1, 0) / max(t.ended - t.stamps[0], 1e-9))
    return float(np.percentile(rates, 5, method="lower")) if rates else 0.0


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if math.isfinite(value) else "never"


def _number(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


async def load(context: Context) -> list[Finding]:
    p = context.profile.performance
    tokens, output = _lengths(context)
    warm = await _prompts(context, tokens, output, 2, 1)
    await _run(context, warm, 2, p.seconds, "warming up")
    prompts = await _prompts(context, tokens, output, p.requests, 2)
    run = await _run(context, prompts, p.concurrency, p.seconds, f"load, {p.concurrency} at a time")
    summary, traces = run.summary, run.summary.traces
    context.facts["load"] = summary.to_dict() | {"client": run.client.to_dict()}
    kinds = "; ".join(f"{n} × {kind}: {KINDS[kind]}" for kind, n in summary.errors.items())
    details = "; ".join(dict.fromkeys(t.detail for t in traces if t.error))[:200]
    findings = [
        judged(
            "requests are answered",
            bool(traces) and not summary.errors,
            f"{len(summary.good)} of {len(traces)} requests of {tokens} + {output} tokens, {p.concurrency} "
            f"at a time{f': {details}' if details else ''}",
            value=len(summary.good),
            threshold=len(traces),
            todo=kinds,
        )
    ]
    if others := sorted({t.model for t in traces if t.model} - {context.endpoint.model}):
        text = f"answers say that they are of {clipped(', '.join(others))}, not of {context.endpoint.model}"
        todo = "see which server the address, or the proxy before it, leads to"
        findings.append(Finding("answers are of the model", "FAIL", text, todo=todo))
    for percent, limit in ((95, p.ttft_p95_ms), (99, p.ttft_p99_ms)):
        if limit is None:
            continue
        value = first_tokens(traces, percent)
        sure = percentile_interval(len(traces), percent) is not None
        few = "" if sure else f"; {len(traces)} requests are too few to bound it with 95 % confidence"
        findings.append(
            judged(
                f"TTFT P{percent}",
                value <= limit,
                f"{_ms(value)} to the first token of {percent} in 100 requests{few}",
                value=_number(value),
                threshold=limit,
                todo=_OVERLOADED,
            )
        )
    rate = stream_rate(traces)
    if (limit := p.stream_tokens_per_second) is not None:
        text = f"{rate:.1f} tokens/s or more in 19 of 20 streams"
        findings.append(
            judged(
                "tokens/s of a stream",
                rate > limit,
                text,
                value=_number(rate),
                threshold=limit,
                todo=_OVERLOADED,
            )  # fmt: skip
        )
    if (limit := p.tokens_per_second) is not None:
        total = summary.output_throughput
        text = f"{total:.1f} output tokens/s of {p.concurrency} streams together"
        findings.append(
            judged(
                "tokens/s of all streams",
                total > limit,
                text,
                value=_number(total),
                threshold=limit,
                todo=f"load it with more at a time; {_OVERLOADED}",
            )  # fmt: skip
        )
    if summary.held_back:
        alone = await _run(context, prompts[:_ALONE], 1, p.seconds, "asking alone whether answers come whole")
        findings.append(_held_back(run, alone))
    if run.client.saturated:
        text = "this program's own loop was late: its latencies are upper bounds"
        findings.append(Finding("the client keeps up", "WARN", text, todo="check from a less busy machine"))
    return findings


def _held_back(load: Run, alone: Run) -> Finding:
    """Answers of a load came whole. A buffer on the way holds back those to one request at a time too; a
    server or a client that got no processor under the load does not."""
    counts = [
        f"{sum(t.whole for t in run.summary.good)} of {len(run.summary.good)} answers"
        for run in (load, alone)
    ]
    text = f"{counts[0]} came whole under the load, {counts[1]} asked one at a time"
    if alone.summary.held_back:
        todo = (
            "something on the way holds the stream back: turn its buffer off (nginx: proxy_buffering off; "
            "X-Accel-Buffering: no)"
        )
        return Finding("answers are streamed", "FAIL", text, todo=todo)
    return Finding("answers are streamed", "WARN", text, todo="check from, and serve on, a less busy machine")


def _kept(context: Context, run: Run) -> str:
    """Why a load breaks the limits; empty where it keeps them."""
    p, traces = context.profile.performance, run.summary.traces
    if run.summary.errors:
        return ", ".join(f"{n} × {kind}" for kind, n in run.summary.errors.items())
    wait, rate = first_tokens(traces, 95), stream_rate(traces)
    if p.ttft_p95_ms is not None and wait > p.ttft_p95_ms:
        return f"TTFT P95 is {_ms(wait)}"
    if p.stream_tokens_per_second is not None and rate <= p.stream_tokens_per_second:
        return f"a stream has {rate:.1f} tokens/s"
    return ""


async def sustained(context: Context) -> list[Finding]:
    """Twice the load each time until it breaks a limit, or time is over."""
    p = context.profile.performance
    if (wanted := p.sustained_concurrency) is None:
        raise Skip("the profile asks for none")
    tokens, output = _lengths(context)
    end, concurrency, best, why = time.monotonic() + p.seconds, 1, 0, ""
    while concurrency <= _MOST and not why and time.monotonic() < end:
        count = min(_ROUNDS * concurrency, 512)
        prompts = await _prompts(
            context, tokens, min(output, _FEW), max(count, concurrency), 10 + concurrency
        )
        # all its seconds, though the whole's may be nearly over: a load that is cut off breaks no limit
        run = await _run(context, prompts, concurrency, p.seconds, f"{concurrency} at a time")
        why = _kept(context, run)
        if not why:
            best = concurrency
            if best >= wanted and best >= 4 * p.concurrency:
                why = "it was not tried with more"
        concurrency = wanted if best < wanted < 2 * best else 2 * concurrency
    over = "" if why else f"; time was over after {p.seconds:g} s"
    tried = f": {why}" if why else over
    return [
        judged(
            "requests at a time within the limits",
            best >= wanted,
            f"{best} at a time{tried}",
            value=best,
            threshold=wanted,
            todo=_OVERLOADED if why else "give it more time (seconds of the profile)",
            otherwise="FAIL" if why else "WARN",
        )
    ]


async def long_prompts(context: Context) -> list[Finding]:
    table = dict(sorted(context.profile.performance.long_prompts.items()))
    if not table:
        raise Skip("the profile names none")
    longest = None if context.length is None else context.length - _FEW
    lengths = {n: limit for n, limit in table.items() if longest is None or n <= longest}
    if longest is not None and longest not in lengths and 0 < longest < max(table):
        lengths[longest] = next(limit for n, limit in table.items() if n > longest)
    findings = []
    for length, limit in sorted(lengths.items()):
        name = f"a prompt of {length:,} tokens"
        context.say(name)
        (prompt,) = await _prompts(context, length, 1, 1, length)
        bound = max(4 * limit / 1000, 30.0)
        trace = await ask(context.client, context.endpoint, prompt, sampling={"temperature": 0}, limit=bound)
        findings.append(_long(name, trace, length, limit))
    beyond = [n for n in table if n not in lengths]
    if beyond:
        text = f"the endpoint takes {context.length} tokens"
        findings += [skipped(f"a prompt of {n:,} tokens", text) for n in beyond]
    return findings


def _long(name: str, trace: Trace, length: int, limit: float) -> Finding:
    wait = first_tokens([trace], 50)
    if trace.error:
        return Finding(name, "FAIL", trace.detail or trace.error, None, limit, KINDS[trace.error])
    # windows of text have their length only nearly where the endpoint does not tokenize
    if trace.prompt_tokens < 0.8 * length:
        text = f"the endpoint read {trace.prompt_tokens} tokens of {length}"
        return Finding(name, "FAIL", text, trace.prompt_tokens, length, "it cuts prompts: see its settings")
    return judged(
        name,
        wait <= limit,
        f"{_ms(wait)} to the first token, nothing else being served",
        value=_number(wait),
        threshold=limit,
        todo="long prompts are computed too slowly: quantize activations too (FP8, INT8), or use more GPUs",
    )


def _some(factor: float, least: float) -> Any:
    """A bound by the profile's seconds."""
    return lambda context: factor * context.profile.performance.seconds + least


CHECKS = (
    # warm-up, and the load once more without ignore_eos: each ends within twice its seconds
    Check("requests are answered", load, _some(8, 60)),
    Check("requests at a time within the limits", sustained, _some(4, 60)),
    Check("long prompts", long_prompts, _some(4, 600)),
)
