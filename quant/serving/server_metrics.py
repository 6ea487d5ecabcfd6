"""What the server says of itself while it is loaded: its ``/metrics`` in Prometheus's text form, under one
name whichever engine it is, and its GPUs through NVML where they are this machine's.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quant.hardware import detect
from quant.serving.client import Endpoint, fetch
from quant.vllm import metrics

if TYPE_CHECKING:
    import httpx2 as httpx

#: Seconds between two looks.
PERIOD = 0.5
#: Seconds in which it must tell, bytes beyond which nobody does; size beyond which a figure means nothing.
_PATIENCE, _MOST, _SANE = 5.0, 1 << 22, 1e18

#: Figure → the series of other engines than vLLM that hold it: SGLang, llama.cpp's server, TGI.
_OTHERS: dict[str, tuple[str, ...]] = {
    "running": ("sglang:num_running_reqs", "llamacpp:requests_processing", "tgi_batch_current_size"),
    "queue": ("sglang:num_queue_reqs", "llamacpp:requests_deferred", "tgi_queue_size"),
    "kv_cache_usage": ("sglang:token_usage", "llamacpp:kv_cache_usage_ratio"),
    "preemptions": ("sglang:num_retracted_reqs_total",),
    "prompt_tokens": ("sglang:prompt_tokens_total", "llamacpp:prompt_tokens_total"),
    "output_tokens": ("sglang:generation_tokens_total", "llamacpp:tokens_predicted_total"),
}


def _series(of_vllm: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: (metrics.PREFIX + own, *_OTHERS.get(name, ())) for name, own in of_vllm.items()}


#: Figure → the series of each engine that hold it.
GAUGES, COUNTERS = _series(metrics.GAUGES), _series(metrics.COUNTERS)
#: Figures of several engines in one server that are shares and are not added up.
_SHARES = {"kv_cache_usage"}

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{.*\})?\s+(\S+)(?:\s+\d+)?\s*")


def parse_metrics(text: str) -> dict[str, list[float]]:
    """Samples of each series, all its labels together.

    >>> parse_metrics('# HELP a b\\na{x="1"} 2\\na{x="2"} 3.5\\nb NaN\\n')
    {'a': [2.0, 3.5]}
    """
    series: dict[str, list[float]] = {}
    for line in text.splitlines():
        match = None if line.startswith("#") else _SAMPLE.fullmatch(line)
        if match is None:
            continue
        try:
            value = float(match[2])
        except ValueError:
            continue
        if abs(value) < _SANE:
            series.setdefault(match[1], []).append(value)
    return series


#: Share → differences of counters that it is made of, and what is added.
_RATES = (
    ("prefix_hit_rate", "prefix_hits", "prefix_queries", 0.0),
    ("acceptance_rate", "accepted_tokens", "draft_tokens", 0.0),
    ("tokens_per_step", "accepted_tokens", "drafts", 1.0),
)
#: A number as labels have it.
_NUMBER = re.compile(r"[0-9]{1,15}")
#: The series of vLLM whose labels describe its KV cache.
_CACHE = re.compile(rf"{metrics.PREFIX}{metrics.CACHE_CONFIG}\{{(.*)\}}")


def cache_tokens(text: str) -> int | None:
    """Tokens that the KV caches of a vLLM hold together, as its metrics' labels say; None where they do not.

    >>> cache_tokens('vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0')
    1600
    """
    total = 0
    for line in text.splitlines():
        if match := _CACHE.match(line):
            labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[1]))
            stated = labels.get("kv_cache_size_tokens", "")
            blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            if _NUMBER.fullmatch(stated):
                total += int(stated)
            elif _NUMBER.fullmatch(blocks) and _NUMBER.fullmatch(size):
                total += int(blocks) * int(size)
    return total or None


def resident_bytes(text: str) -> float | None:
    """Memory of the server's own process, as Prometheus's clients tell it; None where it is not told."""
    values = parse_metrics(text).get("process_resident_memory_bytes")
    return max(values) if values else None


def figures(series: Mapping[str, list[float]]) -> dict[str, float]:
    """The known figures of one look, under our names."""
    known: dict[str, float] = {}
    for name, candidates in (GAUGES | COUNTERS).items():
        values = next((series[c] for c in candidates if c in series), None)
        if values:
            known[name] = max(values) if name in _SHARES else math.fsum(values)
    return known


async def read_metrics(client: httpx.AsyncClient, endpoint: Endpoint) -> dict[str, list[float]]:
    """The endpoint's series now; none where it does not tell."""
    try:
        response, text = await fetch(client, "GET", f"{endpoint.url}/metrics", _PATIENCE, _MOST)
    except Exception:  # a server that is too busy to tell, or has none: the load test goes on
        return {}
    whole = response.status_code == 200 and len(text) < _MOST
    return parse_metrics(text) if whole else {}


@dataclass
class ServerView:
    """What was seen of a server from one moment to another."""

    looks: list[dict[str, float]] = field(default_factory=list)
    gpus: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any] | None:
        """Means and maxima of gauges, differences of counters and the shares made of them; None where the
        server told nothing and no GPU is here."""
        value: dict[str, Any] = {}
        for name in GAUGES:
            seen = [look[name] for look in self.looks if name in look]
            if seen:
                value[name] = {"mean": math.fsum(seen) / len(seen), "max": max(seen)}
        for name in COUNTERS:
            seen = [look[name] for look in self.looks if name in look]
            if len(seen) > 1:
                value[name] = seen[-1] - seen[0]
        for share, part, whole, beside in _RATES:
            if part in value and value.get(whole):
                value[share] = beside + value[part] / value[whole]
        for name in ("used_bytes", "power_watts"):
            seen = [look[name] for look in self.gpus if name in look]
            if seen:
                value[f"gpu_{name}"] = {"mean": math.fsum(seen) / len(seen), "max": max(seen)}
        return value or None


def _gpus() -> dict[str, float]:
    """Memory in use and power of this machine's GPUs together; empty without one."""
    seen = detect().gpus
    if not seen:
        return {}
    look = {"used_bytes": float(sum(g.used_bytes or 0 for g in seen))}
    watts = [g.health.power_watts for g in seen if g.health and g.health.power_watts is not None]
    return look | ({"power_watts": math.fsum(watts)} if watts else {})


@asynccontextmanager
async def observed(client: httpx.AsyncClient, endpoint: Endpoint) -> AsyncIterator[ServerView]:
    """Looks at a server before, while and after the body runs."""
    view, stop = ServerView(), asyncio.Event()
    has_gpus = endpoint.local and bool(_gpus())

    async def look() -> None:
        seen = figures(await read_metrics(client, endpoint))
        if seen:
            view.looks.append(seen)
        if has_gpus:  # in a thread: the driver may take its time
            view.gpus.append(await asyncio.to_thread(_gpus))

    async def repeat() -> None:
        while not stop.is_set():
            try:
                await asyncio.wait_for(stop.wait(), PERIOD)
            except asyncio.TimeoutError:
                await look()

    await look()
    task = asyncio.create_task(repeat()) if view.looks or view.gpus else None
    try:
        yield view
    finally:
        stop.set()
        if task is not None:
            await task
            await look()
