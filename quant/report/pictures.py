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
            points.append(_Point("/".join(part[-depth:]), bits, kl["mean"], error))
    if not points:
        raise QuantError(
            "--plot: no checkpoint has both a KL divergence that is a number and linears under the source's "
            "names: nothing is drawn"
        )
    return points


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
    for p in points:
        axes.errorbar([p.bits], [p.kl], yerr=[p.error], fmt="o", capsize=3)
        axes.annotate(p.label, (p.bits, p.kl), textcoords="offset points", xytext=(6, 4), fontsize=8)
    if all(p.kl > 0 for p in points):
        axes.set_yscale("log")
    axes.set(xlabel="bits per weight", ylabel="KL divergence, nats per token", title=title)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


_WIDTH, _HEIGHT = 860, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 170, 20, 50


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers within a range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 9)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within a range, or powers alone where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in ((1, 2, 5) if len(powers) <= 4 else (1,))]
    return [t for t in ticks if low <= t <= high]


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
    for t in _ticks(left, right):
        out.append(f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="{_TOP}" y2="{base}"/>')
        out.append(f'<text x="{x(t)}" y="{base + 18}" text-anchor="middle">{t:g}</text>')
    for t in _log_ticks(10**bottom, 10**top) if logarithmic else _ticks(bottom, top):
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
    for p, (low, high) in zip(points, ends, strict=True):
        label = html.escape(p.label)
        out.append(f'<line class="error" x1="{x(p.bits)}" x2="{x(p.bits)}" y1="{y(low)}" y2="{y(high)}"/>')
        out.append(
            f'<circle cx="{x(p.bits)}" cy="{y(p.kl)}" r="4"><title>{label}: {p.bits:.3f} bits, KL '
            f"{p.kl:.5f}</title></circle>"
        )
        out.append(f'<text x="{x(p.bits) + 8}" y="{y(p.kl) - 6}">{label}</text>')
    return "\n".join([*out, "</svg>"])


def _html(done: Sequence[Measured], points: Sequence[_Point], title: str) -> str:
    rows = []
    for one in done:
        bits = "" if one["bits_per_weight"] is None else f"{one['bits_per_weight']:.3f}"
        cells = [one["path"], one["scheme"], bits, f"{one['total_bytes']:,}"]
        for key, form in (("perplexity", ".4f"), ("kl", ".5f"), ("top1", ".2%")):
            m = one[key]
            cells.append("" if m is None else f"{m['mean']:{form}} ± {m['standard_error']:{form}}")
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
.grid {{ stroke: #ddd }} .axis {{ fill: none; stroke: #222 }}
.error {{ stroke: #1f5fa8; stroke-width: 1.5 }} circle {{ fill: #1f5fa8 }}
td, th {{ text-align: right; padding: .2em .8em }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left }}
</style>
<h1>{html.escape(title)}</h1>
{_svg(points)}
<table><tr>{heads}</tr>
{"".join(rows)}
</table>
</html>
"""
