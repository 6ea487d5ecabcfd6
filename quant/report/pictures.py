"""Checkpoints of one model as a picture: what each costs in bits per weight, and what it lost."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quant.errors import QuantError, UsageError
from quant.report.charts import Box, colours, log_ticks, place_labels, ticks
from quant.report.value import Report
from quant.units import mean_and_error

#: One checkpoint: keys of :meth:`quant.evaluation.comparison.Compared.to_dict`.
Measured = Mapping[str, Any]


def check_plot(path: Path) -> None:
    """
    Raises:
        UsageError: a file name of another kind, or a folder that is not there.
        QuantError: a PNG without matplotlib.
    """
    if path.suffix not in (".png", ".html"):
        raise UsageError(f"--plot is {str(path)!r}: pictures are made as .html or .png")
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"--plot is {str(path)!r}: there is no folder {path.absolute().parent}: make it first"
        )
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(
            f"--plot is {str(path)!r}: "
            f"{'is a directory' if path.is_dir() else 'its folder cannot be written to'}: name another file"
        )
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise QuantError(
            "--plot: a .png takes matplotlib: pip install 'quant[plots]', or name a .html file, which takes "
            "nothing"
        )


@dataclass(frozen=True)
class _Point:
    label: str
    bits: float
    kl: float
    error: float
    #: drawn in one colour: the rounding method where the checkpoint's report names it, else the scheme
    group: str


def _points(done: Sequence[Measured]) -> list[_Point]:
    """What can be drawn, labelled by the shortest ends of the paths that tell them apart.

    Raises:
        QuantError: nothing can.
    """
    parts = [Path(one["path"]).absolute().parts for one in done]
    depth = next(
        (d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(parts)), 1
    )
    points = []
    for one, part in zip(done, parts, strict=True):
        bits, kl = one["bits_per_weight"], one["kl"]
        if bits is not None and kl is not None and math.isfinite(kl["mean"]):
            error = kl["standard_error"] if math.isfinite(kl["standard_error"]) else 0.0
            points.append(_Point("/".join(part[-depth:]), bits, kl["mean"], error, _group(one)))
    if not points:
        raise QuantError(
            "--plot: no checkpoint has both a KL divergence that is a number and linears under the source's "
            "names: nothing is drawn"
        )
    return points


def _group(one: Measured) -> str:
    report = Report.load(one["path"])
    methods = report.quantization.methods if report is not None and report.quantization is not None else ()
    return " and ".join(methods) or str(one["scheme"])


def plot(path: Path, done: Sequence[Measured]) -> None:
    """Draws bits per weight against KL with its standard error, one labelled point a checkpoint, as PNG or
    HTML by the file's name. KL has a logarithmic axis unless one is zero."""
    points = _points(done)
    first = done[0]
    title = f"{first['against']}, {Path(first['text']).name}, {first['chunks']} chunks"
    if path.suffix == ".png":
        _draw_png(path, points, title)
    else:
        path.write_text(_html(done, points, title), encoding="utf-8")


def _draw_png(path: Path, points: Sequence[_Point], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shades = colours([p.group for p in points])
    for p in points:
        known = axes.get_legend_handles_labels()[1]
        label = None if p.group in known else p.group
        axes.errorbar(
            [p.bits], [p.kl], yerr=[p.error], fmt="o", capsize=3, color=shades[p.group], label=label
        )
        axes.annotate(p.label, (p.bits, p.kl), textcoords="offset points", xytext=(6, 4), fontsize=8)
    if all(p.kl > 0 for p in points):
        axes.set_yscale("log")
    else:
        axes.axhline(0, linestyle="--", color="#666", linewidth=1)
    axes.legend(title="the source itself has KL 0", fontsize=8, title_fontsize=8)
    axes.set(xlabel="bits per weight", ylabel="KL divergence, nats per token", title=title)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


_WIDTH, _HEIGHT = 860, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 170, 20, 50


def _svg(points: Sequence[_Point]) -> str:
    logarithmic = all(p.kl > 0 for p in points)

    def scaled(y: float) -> float:
        return math.log10(y) if logarithmic else y

    def span(values: Sequence[float]) -> tuple[float, float]:
        low, high = min(values), max(values)
        margin = (high - low or abs(high) or 1.0) * 0.12
        return low - margin, high + margin

    left, right = span([p.bits for p in points])
    # an error bar that reaches zero has no end on a logarithmic axis
    ends = [
        (max(p.kl - p.error, p.kl / 10) if logarithmic else p.kl - p.error, p.kl + p.error) for p in points
    ]
    bottom, top = span([scaled(e) for pair in ends for e in pair])

    def x(bits: float) -> float:
        return round(_LEFT + (bits - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(kl: float) -> float:
        return round(
            _HEIGHT - _BOTTOM - (scaled(kl) - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM), 1
        )

    base, edge = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    out = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="bits per weight against KL '
        'divergence">'
    ]
    for t in ticks(left, right):
        out.append(f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="{_TOP}" y2="{base}"/>')
        out.append(f'<text x="{x(t)}" y="{base + 18}" text-anchor="middle">{t:g}</text>')
    for t in log_ticks(10**bottom, 10**top) if logarithmic else ticks(bottom, top):
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{edge}" y1="{y(t)}" y2="{y(t)}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{y(t) + 4}" text-anchor="end">{t:g}</text>')
    out.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{base}H{edge}"/>')
    out.append(
        f'<text x="{(_LEFT + edge) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">bits per weight</text>'
    )
    middle = (_TOP + base) / 2
    out.append(
        f'<text transform="translate(20 {middle}) rotate(-90)" text-anchor="middle">KL divergence, nats per '
        "token</text>"
    )
    if bottom <= 0 <= top and not logarithmic:
        out.append(f'<line class="source" x1="{_LEFT}" x2="{edge}" y1="{y(0)}" y2="{y(0)}"/>')
        zero = y(0) - 4
    else:  # zero has no place on a logarithmic axis
        out.append(f'<line class="source" x1="{_LEFT}" x2="{edge}" y1="{base - 2}" y2="{base - 2}"/>')
        zero = base - 6.0
    out.append(f'<text x="{_LEFT + 6}" y="{zero}" class="note">the source: KL 0</text>')
    shades = colours([p.group for p in points])
    for p, (low, high) in zip(points, ends, strict=True):
        at, shade = x(p.bits), shades[p.group]
        caps = "".join(f"M{at - 4} {y(end)}h8" for end in (low, high))
        out.append(
            f'<path class="error" stroke="{shade}" d="M{at} {y(low)}V{y(high)}{caps}"/>' if p.error else ""
        )
    places = [(x(p.bits), y(p.kl)) for p in points]
    note = Box(_LEFT, zero - 12, 110, 16)
    legend = Box(_WIDTH - 155, _TOP, 155, 16 * len(shades) + 4)
    boxes = place_labels(
        places, [p.label for p in points], Box(_LEFT, _TOP, _WIDTH - _LEFT - 4, base - _TOP), [note, legend]
    )
    for p, (cx, cy), (box, far) in zip(points, places, boxes, strict=True):
        label = html.escape(p.label)
        out.append(
            f'<circle class="point" cx="{cx}" cy="{cy}" r="4" fill="{shades[p.group]}"><title>{label}: '
            f"{p.bits:.3f} bits, KL {p.kl:.5f}</title></circle>"
        )
        middle = round(box.top + box.height / 2, 1)
        if far:
            end = box.left if box.left > cx else box.left + box.width
            out.append(f'<line class="lead" x1="{cx}" y1="{cy}" x2="{round(end, 1)}" y2="{middle}"/>')
        out.append(f'<text class="label" x="{round(box.left, 1)}" y="{middle + 4}">{label}</text>')
    for number, (group, shade) in enumerate(shades.items()):
        place = _TOP + 8 + 16 * number
        out.append(f'<rect x="{_WIDTH - 150}" y="{place - 5}" width="10" height="10" fill="{shade}"/>')
        out.append(f'<text x="{_WIDTH - 135}" y="{place + 4}">{html.escape(group)}</text>')
    return "\n".join(filter(None, [*out, "</svg>"]))


def svg_of(done: Sequence[Measured]) -> str:
    """The picture alone, for a page that has :data:`SVG_STYLE`.

    Raises:
        QuantError: nothing can be drawn.
    """
    return _svg(_points(done))


#: How the parts of the picture look.
SVG_STYLE = """
.grid { stroke: var(--line, #ddd) } .axis { fill: none; stroke: var(--ink, #222) }
.error { stroke-width: 1.5; fill: none } .source { stroke: var(--quiet, #666); stroke-dasharray: 5 4 }
.lead { stroke: var(--quiet, #bbb) } .note { fill: var(--quiet, #666) }
svg { font-family: ui-monospace, monospace }
.label, .note { paint-order: stroke; stroke: var(--paper, #fff); stroke-width: 4px; stroke-linejoin: round }
"""


def _html(done: Sequence[Measured], points: Sequence[_Point], title: str) -> str:
    rows = []
    for one in done:
        bits = "" if one["bits_per_weight"] is None else f"{one['bits_per_weight']:.3f}"
        cells = [one["path"], one["scheme"], bits, f"{one['total_bytes']:,}"]
        for key, form in (("perplexity", ".4f"), ("kl", ".5f"), ("top1", ".2%")):
            m = one[key]
            cells.append(mean_and_error(m, form))
        rows.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    heads = "".join(
        f"<th>{h}</th>"
        for h in ("path", "scheme", "bits per weight", "bytes", "perplexity", "KL, nats per token", "top-1")
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; max-width: 1100px; color: #222 }}
svg {{ width: 100%; max-width: {_WIDTH}px; font-size: 12px }}
{SVG_STYLE}td, th {{ text-align: right; padding: .2em .8em }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left }}
</style>
<h1>{html.escape(title)}</h1>
{_svg(points)}
<table><tr>{heads}</tr>
{"".join(rows)}
</table>
</html>
"""
