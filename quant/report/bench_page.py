"""A load test as one page: what each endpoint did under each load, and its curves."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from quant.report.charts import Curve, colours, curves_chart
from quant.report.page import document, table
from quant.units import format_size

#: What is drawn: heading, the axes with the keys of a level's figures.
_CURVES = (
    ("Throughput against latency", ("mean time per whole answer, s", "mean_e2el_ms", 1e-3),
     ("output tokens a second", "output_throughput", 1.0)),
    ("Time to first token against throughput", ("output tokens a second", "output_throughput", 1.0),
     ("TTFT P95, ms", "p95_ttft_ms", 1.0)),
    ("Time per output token against throughput", ("output tokens a second", "output_throughput", 1.0),
     ("TPOT P95, ms", "p95_tpot_ms", 1.0)),
)  # fmt: skip

#: How heads of columns of milliseconds begin.
_TIMES = ("TTFT", "TPOT", "E2EL")


def cell(value: object, form: str = ".1f") -> str:
    """A figure, or nothing where there is none."""
    return f"{value:{form}}" if isinstance(value, (int, float)) and math.isfinite(value) else ""


def with_interval(value: object, interval: Sequence[float] | None, form: str = ".1f") -> str:
    """A figure with half the width of its 95 % interval."""
    if interval is None or not cell(value):
        return cell(value, form)
    return f"{cell(value, form)} ± {(interval[1] - interval[0]) / 2:{form}}"


def columns(level: Mapping[str, Any], limits: bool) -> dict[str, str]:
    """One load's figures as tables show them."""
    row = {
        "load": str(level["level"]["text"]),
        "output tok/s": with_interval(level["output_throughput"], level["output_throughput_ci95"]),
        "req/s": cell(level["request_throughput"], ".2f"),
    }
    if limits:
        row["goodput req/s"] = cell(level["request_goodput"], ".2f")
    for name in ("ttft", "tpot", "e2el"):
        for key in ("p50", "p95", "p99"):
            row[f"{name.upper()} {key.upper()}"] = cell(level[f"{key}_{name}_ms"])
    row["failed"] = str(level["failed"]) if level["failed"] else ""
    return row


def bench_page(result: Mapping[str, Any]) -> str:
    """The page of a load test; ``result``: of :func:`quant.serving.bench.result_of`."""
    targets = result["targets"]
    limits = result["request"]["goodput_limits_ms"]
    names = [t["name"] for t in targets]
    key = "".join(
        f'<span><i style="background:{c}"></i> {html.escape(n)}</span>' for n, c in colours(names).items()
    )
    body = [
        f"<h1>Load test of {html.escape(', '.join(names))}</h1>",
        f"<p class=key>{key}</p>",
        "<p class=muted>The figure at a point is its load: requests at a time, or with /s a second.</p>",
    ]
    for title, across, up in _CURVES:
        curves = _curves(targets, across, up)
        if curves:
            chart = curves_chart(curves, across[0], up[0])
            body += [f"<h2>{html.escape(title)}</h2>", f"<div class=wide>{chart}</div>"]
    if result["ranking"]:
        rows = [
            [f"{what}: {result['ranking_of'][what]}",
             ", ".join(f"{v['name']} ({cell(v['value'], '.4g')})" for v in order)]
            for what, order in result["ranking"].items()
        ]  # fmt: skip
        body += ["<h2>Best first</h2>", table(["", ""], rows)]
    for target in targets:
        body += _target(target, bool(limits))
    body += ["<h2>Definitions</h2>", table(["", ""], [[k, v] for k, v in result["formulas"].items()])]
    body.append("<p class=muted>± half of the 95 % confidence interval.</p>")
    if limits:
        said = ", ".join(f"{k.upper()} at most {v:g} ms" for k, v in limits.items())
        body.append(f"<p class=muted>Goodput counts requests with {html.escape(said)}.</p>")
    return document("Load test", body)


def _curves(
    targets: Sequence[Mapping[str, Any]], across: tuple[str, str, float], up: tuple[str, str, float]
) -> list[Curve]:
    by_name = colours([t["name"] for t in targets])
    curves = []
    for target in targets:
        points = [
            (x * across[2], y * up[2], _label(level))
            for level in target["levels"]
            if math.isfinite(x := float(level[across[1]])) and math.isfinite(y := float(level[up[1]]))
        ]
        if points:
            curves.append(Curve(target["name"], by_name[target["name"]], tuple(points)))
    return curves


def _label(level: Mapping[str, Any]) -> str:
    rate = level["level"]["rate"]
    return f"{rate:g}/s" if rate is not None else str(level["level"]["concurrency"])


def _target(target: Mapping[str, Any], limits: bool) -> list[str]:
    body = [f"<h2>{html.escape(target['name'])}</h2>"]
    body.append(f"<p class=muted>{html.escape(target['model'])} at {html.escape(target['url'])}</p>")
    rows = [columns(level, limits) for level in target["levels"]]
    if rows:
        heads = [h for h in rows[0] if any(r[h] for r in rows)]
        said = [f"{h}, ms" if h.startswith(_TIMES) else h for h in heads]
        body.append(table(said, [[r[h] for h in heads] for r in rows], range(1, len(heads)), tight=True))
    if target["knee"]:
        body.append(
            f"<p>Most throughput for its latency: <b>{html.escape(target['knee']['text'])}</b> "
            "(the knee: largest throughput / mean latency).</p>"
        )
    server = [s for level in target["levels"] if (s := _server_row(level))]
    if server:
        heads = list(dict.fromkeys(h for row in server for h in row))
        cells = [[r.get(h, "") for h in heads] for r in server]
        body += ["<h3>Server side</h3>", table(heads, cells, range(1, len(heads)), tight=True)]
    failures = [
        [level["level"]["text"], kind, str(count)]
        for level in target["levels"]
        for kind, count in level["errors"].items()
    ]
    if failures:
        body += ["<h3>Failures</h3>", table(["load", "kind", "requests"], failures, [2])]
    body += [f"<p>{html.escape(note)}</p>" for note in target["notes"]]
    return body


def _server_row(level: Mapping[str, Any]) -> dict[str, str]:
    server = level["server"]
    if not server:
        return {}
    row = {"load": str(level["level"]["text"])}
    for name, value in server.items():
        words = name.removesuffix("_bytes").replace("_", " ")
        if isinstance(value, dict):
            row |= {f"{words}, {kind}": _measure(name, value[kind]) for kind in ("mean", "max")}
        else:
            row[words] = _measure(name, value)
    return row


def _measure(name: str, value: object) -> str:
    """A figure of the server with its unit: bytes and shares are told by their names."""
    if not cell(value) or not isinstance(value, (int, float)):
        return ""
    if name.endswith("_bytes"):
        return format_size(value)
    return f"{value:.1%}" if name.endswith(("_usage", "_rate")) else f"{value:.4g}"
