"""How a detection and a recommendation look to people, and where what they say is from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from quant.commands.render import prose
from quant.commands.render.tables import Column, draw
from quant.hardware import Detection, Gpu
from quant.health import Health
from quant.planning.memory import MemoryPlan
from quant.planning.recommendation import Recommendation
from quant.planning.scheme_plans import UNKNOWN, SchemePlan
from quant.units import format_count, format_seconds, format_size
from quant.vllm.kernels import formats_of

if TYPE_CHECKING:
    from rich.console import Console

_YES, _NO, _TIGHT = "[green]✓[/]", "[red]✗[/]", "[yellow]~[/]"


def _rate(value: float | None) -> str:
    return "?" if not value else f"{_rounded(value):,.10g} t/s"


def _rounded(value: float) -> float:
    """A predicted figure with as many digits as it deserves: two."""
    return float(f"{value:.2g}")


def _speed(one: SchemePlan, about: str, bound: str) -> str:
    """What a speed will be about, else its bound; the bound alone where ``about`` is empty."""
    if one.plan is None or one.speed is None:
        return "-"
    if about and one.speed.about is not None:
        return f"~{_rate(getattr(one.speed.about, about))}"
    limit = getattr(one.speed, bound)
    return f"≤{_rate(limit)}" if limit else "?"


def _about(recommendation: Recommendation) -> str:
    """A sentence of how fast the chosen plan will be about, or why none says so; empty where nothing is
    chosen."""
    one = next((p for p in recommendation.plans if p.scheme == recommendation.recommended), None)
    if one is None or one.plan is None or one.speed is None:
        return ""
    about = one.speed.about
    if about is None:
        return f"speed: {one.speed.unknown}" + (
            "; the table has its bounds" if one.speed.decode_bound else ""
        )
    streams = ""
    if about.sequences > 1:
        streams = f", {_rate(about.batch)} (± {about.batch_error:.0%}) for {about.sequences} together"
    first = about.first_token_seconds
    waited = format_seconds(first) if first >= 10 else f"{max(first, 0.001):.2g} s"
    return (
        f"speed: about {_rate(about.decode)} (± {about.decode_error:.0%}) for one stream{streams}, the first "
        f"token after {waited}, with half of {one.plan.context:,} tokens cached; so "
        "near came nine in ten published figures of the kind"
    )


def speeds(recommendation: Recommendation) -> list[str]:
    """What each scheme's speed will be about, with the roofline's bound beside it."""
    lines = []
    for one in recommendation.plans:
        if one.plan is None or one.speed is None:
            continue
        speed, about = one.speed, one.speed.about
        together = f"{recommendation.request.concurrency} together"
        pairs = (
            ("one stream", about and about.decode, speed.decode_bound),
            (together, about and about.batch, speed.batch_decode_bound),
            ("with prompts", about and about.served, speed.served_bound),
        )
        told = [f"{n} {f'about {_rate(a)}, ' if a else ''}at most {_rate(b)}" for n, a, b in pairs]
        why = f" ({speed.unknown})" if speed.unknown else ""
        lines.append(
            f"speed of {one.label}: {'; '.join(told)}; prompts at most {_rate(speed.prefill_bound)}{why}"
        )
    return lines


def _mark(one: SchemePlan) -> str:
    """✓ it holds what was asked, ~ the plan's own error decides whether it starts, ✗ it does not."""
    if one.plan is not None and one.plan.tight:
        return _TIGHT
    return _YES if one.meets else _NO


def show_gpus(gpus: Sequence[Gpu], console: Console) -> None:
    """One table of GPUs, then what each computes natively."""

    def level(gpu: Gpu) -> str:
        return ".".join(map(str, gpu.capability)) if gpu.capability else gpu.architecture or "-"

    draw(
        console,
        [
            Column("GPU", [str(g.index) for g in gpus]),
            Column("name", [f"{g.name} ({g.mig})" if g.mig else g.name for g in gpus]),
            Column("total", [format_size(g.total_bytes) for g in gpus], 0, True),
            Column("used", [format_size(g.used_bytes) for g in gpus], 2, True),
            Column("free", [format_size(g.free_bytes) for g in gpus], 0, True),
            Column("compute", [level(g) for g in gpus], 1),
            Column(
                "bandwidth",
                [f"{g.bandwidth / 1e9:,.0f} GB/s" if g.bandwidth else "?" for g in gpus],
                3,
                True,
            ),
            Column("driver", [g.driver or "-" for g in gpus], 4),
        ],
        key=1,
    )
    for gpu in gpus:
        by_state: dict[str, list[str]] = {}
        for number, state in formats_of(gpu).items():
            by_state.setdefault(state, []).append(number)
        native, packed = (
            ", ".join(by_state.get("native", [])) or "nothing",
            ", ".join(by_state.get("weight-only", [])) or "nothing",
        )
        console.print(f"GPU {gpu.index}: computes natively {native}; as packed weights {packed}")
        if gpu.health is not None:
            console.print(f"  {_health(gpu.health)}")
        for process in gpu.processes:
            console.print(
                f"  {format_size(process.used_bytes)} held by {process.name or 'a process'} (pid "
                f"{process.pid})"
            )
        if gpu.torch_reserved_bytes is not None and gpu.torch_allocated_bytes is not None:
            console.print(
                f"  torch here: {format_size(gpu.torch_allocated_bytes)} allocated, "
                f"{format_size(gpu.torch_reserved_bytes)} reserved"
            )


def _health(health: Health) -> str:
    parts = []
    if health.temperature is not None:
        slows = health.slowdown_temperature
        parts.append(f"{health.temperature} °C" + (f" (slows down at {slows})" if slows else ""))
    if health.power_watts is not None:
        limit = health.power_limit_watts
        parts.append(f"{health.power_watts:.0f} W" + (f" of {limit:.0f}" if limit else ""))
    if health.throttled_by is not None:
        parts.append(
            f"held down by {' and '.join(health.throttled_by)}" if health.throttled_by else "not throttled"
        )
    return ", ".join(parts)


def gpu_sources(gpus: Sequence[Gpu]) -> list[str]:
    """For each kind of GPU, its facts by the driver or the document that they are from."""
    lines = []
    for gpu in {g.name: g for g in gpus}.values():
        by_source: dict[str, list[str]] = {}
        for fact, source in gpu.sources.items():
            by_source.setdefault(source, []).append(fact.replace("_", " "))
        lines += [f"{gpu.name}: {', '.join(facts)}: {source}" for source, facts in by_source.items()]
    return lines


def sources(recommendation: Recommendation) -> list[str]:
    """Where a recommendation's facts are from: of the GPUs, the model, the expected losses and vLLM's
    accounting."""
    return [
        *gpu_sources(recommendation.gpus),
        f"{recommendation.model.name}: shapes: {recommendation.model.source}",
        *(f"loss of {p.scheme}: {p.loss_source}" for p in recommendation.plans),
        f"memory: as vLLM {recommendation.request.vllm_version} accounts it",
    ]


def show_nothing_to_quantize(recommendation: Recommendation, console: Console) -> None:
    """A job that would make nothing: the unquantized model fits."""
    lines = [
        f"Nothing to quantize: {recommendation.reason}",
        "Nothing was written. To serve it as it is:",
        *recommendation.commands,
    ]
    said, commands = lines[:2], lines[2:]
    for line in said:
        prose(console, line)
    console.print("\n".join(commands), soft_wrap=True, markup=False)


def show_detection(detection: Detection, console: Console) -> None:
    if detection.gpus:
        show_gpus(detection.gpus, console)
    if detection.note:
        console.print(detection.note)
    if not detection.gpus:
        console.print(
            "Plan for a part that is not here with --gpu NAME (`quant detect --gpu list` shows all), or for "
            "the CPU with --gpu cpu."
        )
    host = detection.host
    console.print(
        f"host: {format_size(host.ram_available_bytes)} of {format_size(host.ram_total_bytes)} RAM free, "
        f"{host.cpus} CPUs, "
        f"{format_size(host.disk_free_bytes)} of disk free"
    )


def _plans(console: Console, recommendation: Recommendation) -> None:
    """A row for each scheme that can be planned; below them the others, those with one reason together."""
    plans = [one for one in recommendation.plans if one.plan is not None]
    refused: dict[str, list[str]] = {}
    for one in recommendation.plans:
        if one.plan is None:
            refused.setdefault(one.why, []).append(one.label)

    def loss(one: SchemePlan) -> str:
        if one.loss[1] == 0:
            return "0 %"
        return "?" if one.loss_source == UNKNOWN else f"{one.loss[0]:g}–{one.loss[1]:g} %"

    def planned(form: Callable[[MemoryPlan], str]) -> list[str]:
        return [form(one.plan) for one in plans if one.plan is not None]

    def rates(about: str, bound: str) -> list[str]:
        return [_speed(one, about, bound) for one in plans]

    if plans:
        draw(
            console,
            [
                Column("", [_mark(one) for one in plans], markup=True),
                Column("scheme", [one.label for one in plans]),
                Column("weights", planned(lambda p: format_size(p.weights_bytes)), 0, True),
                Column("KV cache", planned(lambda p: format_size(p.kv_cache_bytes)), 4, True),
                Column("KV tokens", planned(lambda p: f"{p.kv_tokens:,}"), 1, True),
                Column("longest", planned(lambda p: f"{p.max_context:,}"), 2, True),
                Column("loss", [loss(one) for one in plans], 0, True),
                Column("decode", rates("decode", "decode_bound"), 3, True),
                Column("batch", rates("batch", "batch_decode_bound"), 5, True),
                Column("prefill", rates("", "prefill_bound"), 6, True),
            ],
            Column("why", [one.why for one in plans]),
            emphasis=[n for n, one in enumerate(plans) if one.scheme == recommendation.recommended],
            key=1,
        )
    for why, labels in refused.items():
        prose(console, f"✗  {', '.join(labels)}: {why}")


def show_recommendation(recommendation: Recommendation, console: Console) -> None:
    """Every scheme with ✓, ~ (tight) or ✗ and why, the choice in a sentence, then the commands."""
    gpu, request, model = recommendation.gpus[0], recommendation.request, recommendation.model
    count = f"{len(recommendation.gpus)} × " if len(recommendation.gpus) > 1 else ""
    about = f" (± {model.uncertainty:.0%})" if model.uncertainty else ""
    console.print(
        f"[bold]{model.name}[/]: {format_count(model.parameters)} parameters{about}, {model.dtype}; "
        f"{count}{gpu.name}, {format_size(gpu.total_bytes)}"
    )
    if recommendation.thumb:
        thumb = recommendation.thumb
        draw(
            console,
            [
                Column("", [_YES if row["fits"] else _NO for row in thumb], markup=True),
                Column("scheme", [row["scheme"] for row in thumb]),
                Column("needed", [f"{row['needed_bytes'] / 1e9:.2f} GB" for row in thumb], 0, True),
            ],
            Column("why", [row["why"] for row in thumb]),
            key=1,
        )
    else:
        parts = [
            f"context {request.context:,}",
            f"concurrency {request.concurrency}",
            f"vLLM {request.vllm_version}",
        ]
        parts += [f"tensor parallel {request.ranks}"] if request.ranks > 1 else []
        parts += [f"pipeline parallel {request.pipeline_parallel}"] if request.pipeline_parallel > 1 else []
        console.print(", ".join(parts))
        _plans(console, recommendation)
    console.print()
    prose(console, recommendation.reason)
    engine = next((e for e in recommendation.engines if e.suits), None)
    if recommendation.recommended is None and engine is not None:
        prose(console, f"what may serve it: {engine.name} ({engine.why})")
    elif engine is not None and not recommendation.thumb:
        prose(console, f"serve with {engine.name}: {engine.why}")
        for other in recommendation.engines:  # vLLM's are the commands below
            if other is not engine and (other.suits or other.name == "vLLM"):
                prose(console, f"or with {other.name}: {other.why}")
    if about := _about(recommendation):
        prose(console, about)
    for line in recommendation.notes:
        prose(console, f"note: {line}", "dim")
    for command in recommendation.commands:
        console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)
