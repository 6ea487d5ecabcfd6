"""``quant-deploy bench``: endpoints or checkpoints under load, one after another, and their comparison."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.reader import open_checkpoint
from quant.checkpoint.writer import write_text
from quant.errors import QuantError, UsageError, clipped
from quant.progress import Event, Progress, silent
from quant.report.bench_page import bench_page
from quant.report.files import load_evaluation
from quant.serving.client import KINDS, Endpoint, EndpointError, Prompt, ask, resolve
from quant.serving.load import Level, Run, run_level
from quant.serving.measures import FORMULAS, knee, mostly_whole
from quant.serving.prompts import PromptRequest, make_prompts
from quant.serving.server_metrics import observed

if TYPE_CHECKING:
    import httpx2 as httpx

#: Kinds of failure with which no load test begins.
_HOPELESS = ("connect", "tls", "401", "404", "no stream", "5xx")
#: Gain of throughput by twice the load below which a sweep ends, and the largest load it tries.
_GAIN, _MOST = 1.05, 1024
#: Tokens that a chat template may put around a prompt.
_BESIDE = 256


@dataclass(frozen=True)
class BenchRequest:
    """A load test.

    Attributes:
        levels: loads, one after another; empty: one request at a time and twice as many each time, until
            throughput gains less than a twentieth.
        requests: of each level; None: eight for each at a time, at least 50.
        warm_up: requests before the first level, which are in no figure.
        limits: of goodput, milliseconds by metric.
        sampling: keys of every request's body.
        ignore_eos: ask for exactly the output tokens that are meant, where the engine knows how.
    """

    prompts: PromptRequest
    levels: tuple[Level, ...] = ()
    requests: int | None = None
    warm_up: int = 4
    limits: Mapping[str, float] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    ignore_eos: bool = True

    def count(self, level: Level) -> int:
        if self.requests is not None:
            return self.requests
        return max(50, 8 * (level.concurrency or 0), math.ceil(20 * (level.rate or 0)))


@dataclass(frozen=True)
class TargetResult:
    """What one endpoint did under each load.

    Attributes:
        name: what it is called in tables.
        levels: one object a load: ``level``, vLLM's keys, ``client``, ``server``.
        facts: of the checkpoint behind it, where one was given: its size, KL, load seconds.
        notes: what a reader of the figures should know.
    """

    name: str
    endpoint: Endpoint
    levels: tuple[dict[str, Any], ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def knee(self) -> int | None:
        """Which level gives the most throughput for its latency; see :func:`quant.serving.measures.knee`."""
        return knee([(x["output_throughput"], x["mean_e2el_ms"]) for x in self.levels])

    @property
    def best(self) -> dict[str, Any] | None:
        """The level of most output tokens a second."""
        done = [x for x in self.levels if x["completed"]]
        return max(done, key=lambda x: float(x["output_throughput"]), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "url": self.endpoint.url,
            "model": self.endpoint.model,
            "levels": list(self.levels),
            "knee": None if self.knee is None else self.levels[self.knee]["level"],
            "facts": dict(self.facts),
            "notes": list(self.notes),
        }


def check_concurrency(levels: Sequence[Level]) -> None:
    """
    Raises:
        UsageError: a level needs more connections than this machine has ports or open files for.
    """
    most = max((level.concurrency or 0 for level in levels), default=0)
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        low, high = 32768, 60999
    if most > high - low:
        raise UsageError(
            f"--concurrency is {most}: this machine has {high - low} ports for connections to one address: "
            "ask for fewer, or load from several machines"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + 256
    if wanted > soft:
        if hard != resource.RLIM_INFINITY and wanted > hard:
            raise UsageError(
                f"--concurrency is {most}: this process may open {hard} files (ulimit -n): raise the limit "
                "or ask for fewer"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bench_endpoint(
    endpoint: Endpoint,
    request: BenchRequest,
    *,
    name: str = "",
    facts: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> TargetResult:
    """Loads one endpoint as asked.

    Raises:
        EndpointError: it cannot be asked at all.
        UsageError: prompts that cannot be made.
    """
    check_concurrency(request.levels)
    return asyncio.run(_bench(endpoint, request, name, facts or {}, progress))


async def _bench(
    endpoint: Endpoint, request: BenchRequest, name: str, facts: Mapping[str, Any], progress: Progress
) -> TargetResult:
    async with endpoint.client() as client:
        progress(Event("asking for the model", detail=endpoint.url))
        endpoint = await resolve(client, endpoint)
        sampling, notes = await _probe(client, endpoint, request)
        request = replace(request, sampling=sampling)
        progress(Event("warming up", detail=f"{request.warm_up} requests"))
        await _warm_up(client, endpoint, request)
        results: list[dict[str, Any]] = []
        for level in request.levels or ():
            results.append(await _level(client, endpoint, request, level, name, progress))
        if not request.levels:
            results = await _sweep(client, endpoint, request, name, progress)
    slow = [x["level"]["text"] for x in results if x["client"]["saturated"]]
    if slow:
        notes.append(
            f"this client was the bottleneck at {', '.join(slow)}: its own loop was late or its core busy: "
            "those latencies are upper bounds; load from a faster machine, or several"
        )
    if whole := [x for x in results if mostly_whole(x["came_whole"], x["completed"])]:
        busy = all(x["client"]["saturated"] for x in whole)
        notes.append(
            "answers came whole: something between here and the engine holds the stream back (a proxy's "
            "buffer"
            + (", or no processor here was free to pass its pieces on" if busy else "")
            + "): TTFT and TPOT are not the engine's, and its users see no first token sooner"
        )
    if others := sorted({name for x in results for name in x["answered_by"]} - {endpoint.model}):
        notes.append(f"answers say that they are of {clipped(', '.join(others))}, not of {endpoint.model}")
    for told, meant in [(x["mean_input_tokens"], x["meant_input_tokens"]) for x in results]:
        if meant and told is not None and not meant / 2 - _BESIDE <= told <= 2 * meant + _BESIDE:
            notes.append(
                f"the endpoint counts {told:,.0f} tokens in a prompt of {meant:,.0f}: its counts are wrong, "
                "or something on the way changes prompts"
            )
            break
    if any(x["output_tokens_counted_by_endpoint"] is False for x in results):
        notes.append("the endpoint does not count tokens (usage): pieces of the stream are counted instead")
    return TargetResult(name or endpoint.model, endpoint, tuple(results), facts, tuple(notes))


async def _probe(
    client: httpx.AsyncClient, endpoint: Endpoint, request: BenchRequest
) -> tuple[dict[str, Any], list[str]]:
    """One short request, to learn what the endpoint takes.

    Returns:
        the keys of every request's body, and notes.

    Raises:
        EndpointError: it cannot be answered.
    """
    text = Prompt("The capital of France is", 5, 4)
    wishes = [{"ignore_eos": True}, {}] if request.ignore_eos else [{}]
    trace = None
    for wish in wishes:
        sampling = {**request.sampling, **wish}
        trace = await ask(client, endpoint, text, sampling=sampling)
        if not trace.error:
            if request.ignore_eos and not wish:
                return sampling, ["the endpoint refuses ignore_eos: answers may end before the tokens asked"]
            return sampling, []
        if trace.error in _HOPELESS:
            break
    assert trace is not None
    raise EndpointError(
        f"{endpoint.route} for {endpoint.model!r}: {trace.detail or trace.error}: {KINDS[trace.error]}"
    )


async def _warm_up(client: httpx.AsyncClient, endpoint: Endpoint, request: BenchRequest) -> None:
    if not request.warm_up:
        return
    seed = request.prompts.seed + 1_000_003  # other prompts than those that are measured
    prompts = await make_prompts(client, endpoint, replace(request.prompts, seed=seed), request.warm_up)
    await run_level(
        client, endpoint, prompts, Level(concurrency=min(request.warm_up, 8)), sampling=request.sampling
    )


async def _level(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    request: BenchRequest,
    level: Level,
    name: str,
    progress: Progress,
) -> dict[str, Any]:
    count = request.count(level)
    # each level its own prompts: those of the one before are in the server's prefix cache
    seed = request.prompts.seed + 7919 * (level.concurrency or 0) + round(1000 * (level.rate or 0))
    prompts = await make_prompts(client, endpoint, replace(request.prompts, seed=seed), count)
    phase = f"{f'{name}: ' if name else ''}{level}"

    def done(ended: int) -> None:
        progress(Event(phase, ended, count, detail="requests"))

    progress(Event(phase, 0, count, detail="requests"))
    async with observed(client, endpoint) as view:
        run = await run_level(
            client,
            endpoint,
            prompts,
            level,
            sampling=request.sampling,
            limits=request.limits,
            seed=seed,
            done=done,
        )
    meant = sum(p.tokens for p in prompts) / len(prompts)
    result = _result(run) | {"meant_input_tokens": meant, "server": view.to_dict()}
    errors = f", {result['failed']} failed" if result["failed"] else ""
    progress(Event(phase, count, count, f"{phase}: {result['output_throughput']:.1f} output tok/s{errors}"))
    return result


def _result(run: Run) -> dict[str, Any]:
    level, good = run.level, run.summary.good
    return {
        "level": {"text": str(level), "concurrency": level.concurrency, "rate": level.rate},
        "max_concurrency": level.concurrency,
        "request_rate": "inf" if level.rate is None else level.rate,
        **run.summary.to_dict(),
        "mean_input_tokens": sum(t.prompt_tokens for t in good) / len(good) if good else None,
        "answered_by": sorted({t.model for t in good if t.model}),
        "client": run.client.to_dict(),
    }


async def _sweep(
    client: httpx.AsyncClient, endpoint: Endpoint, request: BenchRequest, name: str, progress: Progress
) -> list[dict[str, Any]]:
    """Twice the load each time until it gains nothing."""
    results: list[dict[str, Any]] = []
    concurrency, last = 1, 0.0
    while concurrency <= _MOST:
        level = Level(concurrency=concurrency)
        check_concurrency([level])
        results.append(await _level(client, endpoint, request, level, name, progress))
        throughput = float(results[-1]["output_throughput"])
        if throughput < _GAIN * last or results[-1]["failed"] > results[-1]["completed"]:
            break
        concurrency, last = 2 * concurrency, throughput
    return results


# -- several targets -----------------------------------------------------------------------------------------

#: What targets are ranked by: name → (value of a target or None, whether more is better).
_Value = Callable[[TargetResult], float | None]


def _fact(key: str) -> _Value:
    def read(target: TargetResult) -> float | None:
        value = target.facts.get(key)
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    return read


def _throughput(target: TargetResult) -> float | None:
    return float(target.best["output_throughput"]) if target.best else None


def _latency(target: TargetResult) -> float | None:
    done = [float(x["p95_e2el_ms"]) for x in target.levels if x["completed"]]
    return min(done) if done else None


def _memory(target: TargetResult) -> float | None:
    seen = [
        x["server"]["gpu_used_bytes"]["max"]
        for x in target.levels
        if x["server"] and "gpu_used_bytes" in x["server"]
    ]
    return max(seen) if seen else _fact("checkpoint_bytes")(target)


RANKINGS: dict[str, tuple[_Value, bool, str]] = {
    "throughput": (_throughput, True, "most output tok/s of any load"),
    "latency": (_latency, False, "lowest P95 of whole answers, ms"),
    "memory": (_memory, False, "bytes on the GPUs, else of the checkpoint"),
    "quality": (_fact("kl"), False, "KL to the source (quant evaluate --save)"),
}


def rank(targets: Sequence[TargetResult]) -> dict[str, list[dict[str, Any]]]:
    """The targets by each figure that they have, best first."""
    ranked: dict[str, list[dict[str, Any]]] = {}
    for name, (read, more, _) in RANKINGS.items():
        values = [(t.name, value) for t in targets if (value := read(t)) is not None]
        if values:
            values.sort(key=lambda v: v[1], reverse=more)
            ranked[name] = [{"name": n, "value": v} for n, v in values]
    return ranked


def result_of(targets: Sequence[TargetResult], request: BenchRequest) -> dict[str, Any]:
    """Everything that was measured, as JSON, CSV and the page are made of it."""
    return {
        "targets": [t.to_dict() for t in targets],
        "ranking": rank(targets) if len(targets) > 1 else {},
        "ranking_of": {name: words for name, (_, _, words) in RANKINGS.items()},
        "formulas": FORMULAS,
        "request": {
            "input_tokens": vars(request.prompts.input_tokens),
            "output_tokens": vars(request.prompts.output_tokens),
            "prompts": str(request.prompts.file) if request.prompts.file else None,
            "shared_prefix": request.prompts.shared_prefix,
            "goodput_limits_ms": dict(request.limits),
            "sampling": dict(request.sampling),
            "seed": request.prompts.seed,
        },
    }


def as_csv(result: Mapping[str, Any]) -> str:
    """One line a target and load."""
    rows = []
    for target in result["targets"]:
        for level in target["levels"]:
            flat = {k: v for k, v in level.items() if isinstance(v, (int, float, str)) or v is None}
            rows.append({"target": target["name"], "model": target["model"], **flat})
    text = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def prepare_folder(folder: Path | None) -> None:
    """Makes the folder of the results before the first request, so that none is measured in vain.

    Raises:
        UsageError: it cannot be made or written to.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output is {str(folder)!r}: {error.strerror}: name another folder") from error


def write_results(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Writes a test's JSON, CSV and page; returns their paths."""
    texts = {
        "bench.json": json.dumps(without_nan(result), indent=1, allow_nan=False),
        "bench.csv": as_csv(result),
        "bench.html": bench_page(result),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def without_nan(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What is known of a checkpoint beside its load: the bytes of its tensors and its measured KL."""
    evaluation = load_evaluation(path)
    kl = (evaluation or {}).get("kl")
    return {
        "checkpoint": str(path),
        "checkpoint_bytes": open_checkpoint(path).nbytes,
        "kl": None if kl is None else kl["mean"],
    }


def failed_everywhere(targets: Sequence[TargetResult]) -> QuantError | None:
    """The error of a test in which nothing was answered."""
    if any(level["completed"] for t in targets for level in t.levels):
        return None
    kinds = {kind for t in targets for level in t.levels for kind in level["errors"]}
    said = "; ".join(f"{kind}: {KINDS[kind]}" for kind in sorted(kinds))
    return QuantError(f"no request was answered: {said or 'none was sent'}")
