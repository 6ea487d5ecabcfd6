"""Several outputs beside one another: what each costs and what it lost."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.errors import Problems, QuantError
from quant.report.files import load_evaluation
from quant.report.page import document, table
from quant.report.pictures import SVG_STYLE, svg_of
from quant.report.value import REPORT, Report
from quant.units import format_seconds, format_share, format_size, mean_and_error


def summaries(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """One value for each output, from its report and from what ``quant evaluate --save`` measured.

    Raises:
        Problems: folders without a report of ours; all of them.
    """
    rows: list[dict[str, Any]] = []
    problems = []
    for folder in folders:
        report = Report.load(folder)
        if report is None:
            problems.append(
                f"{folder}: there is no {REPORT} in it that can be read: name outputs of quant quantize or "
                "export-vllm"
            )
            continue
        job, measured = report.quantization, load_evaluation(folder)
        errors = [x.error for x in job.layers if x.error is not None] if job is not None else []
        rows.append(
            {
                "path": str(folder),
                "source": report.source_path,
                "method": " and ".join(job.methods) if job is not None else "",
                "scheme": str(job.scheme.get("name", "")) if job is not None else "",
                "format": report.format,
                "bits_per_weight": job.bits_per_weight if job is not None else None,
                "total_bytes": report.output_bytes,
                "source_bytes": report.source_bytes,
                "worst_error": max(errors, default=None),
                "fallbacks": len(job.fallbacks) if job is not None else 0,
                "seconds": report.seconds.get("total"),
                "peak_rss_bytes": report.peak_rss_bytes,
                **{
                    k: None if measured is None else measured.get(k)
                    for k in ("text", "chunks", "tokens", "kl", "top1", "perplexity", "source_perplexity")
                },
            }
        )
    if problems:
        raise Problems(problems)
    return rows


def notes(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps these numbers from being compared."""
    said = []
    sources = dict.fromkeys(v["source"] for v in values)
    if len(sources) > 1:
        said.append(f"made from different sources: {', '.join(map(str, sources))}")
    measured = [v for v in values if v["kl"] is not None]
    if len({(v["text"], v["chunks"], v["tokens"]) for v in measured}) > 1:
        said.append("measured on different texts or chunks: their KL divergences are not comparable")
    for v in values:
        if v["kl"] is None:
            said.append(
                f"{v['path']}: KL was not measured: quant evaluate {v['path']} --against {v['source']} --save"
            )
    return said


def comparison_page(values: Sequence[Mapping[str, Any]]) -> str:
    """The page of several outputs; ``values``: of :func:`summaries`."""
    sources = dict.fromkeys(str(v["source"]) for v in values)
    of = f" of {Path(next(iter(sources))).name}" if len(sources) == 1 else ""
    body = [f"<h1>{len(values)} outputs{html.escape(of)}</h1>"]
    said = notes(values)
    if said:
        body.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in said) + "</ul>")
    try:
        body += ["<h2>Bits per weight against KL</h2>", f"<div class=wide>{svg_of(values)}</div>"]
    except QuantError:  # nothing has both
        body.pop()
        body.append("<p class=muted>No output has both bits per weight and a measured KL to draw.</p>")
    heads = [
        "output",
        "method",
        "scheme",
        "bits",
        "size",
        "KL, nats",
        "top-1",
        "worst layer",
        "fallbacks",
        "made in",
    ]
    rows = [
        [
            v["path"],
            v["method"],
            v["scheme"],
            "" if v["bits_per_weight"] is None else f"{v['bits_per_weight']:.3f}",
            format_size(v["total_bytes"]),
            mean_and_error(v["kl"], ".5f"),
            mean_and_error(v["top1"], ".2%"),
            "-" if v["worst_error"] is None else format_share(v["worst_error"]),
            str(v["fallbacks"]),
            "" if v["seconds"] is None else format_seconds(v["seconds"]),
        ]
        for v in values
    ]
    body.append(table(heads, rows, range(3, 10)))
    largest = max([*(v["total_bytes"] for v in values), *(v["source_bytes"] for v in values), 1])
    bars = [("the source", values[0]["source_bytes"])] if len({v["source"] for v in values}) == 1 else []
    bars += [(v["path"], v["total_bytes"]) for v in values]
    body.append("<h2>Size</h2><div class=bars>")
    for name, size in bars:
        body.append(
            f"<div>{html.escape(str(name))}<b>{html.escape(format_size(size))}</b>"
            f'<i style="width:{100 * size / largest:.1f}%"></i></div>'
        )
    body.append("</div>")
    style = (
        ".bars div { margin: .5rem 0; overflow-wrap: anywhere } .bars b { float: right; font-weight: normal }"
    )
    style += " .bars i { display: block; height: .6rem; background: #0072b2; border-radius: 3px }"
    return document(f"{len(values)} outputs beside one another", body, style + SVG_STYLE)
