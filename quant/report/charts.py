"""Small charts as SVG, drawn here so that a page needs no network and no library."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: One colour for each method, told apart by people who see red and green alike (Okabe and Ito 2008), with a
#: grey for its black, which a dark page would hide.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
#: Points per character of a label at 12 points, for its width.
_CHARACTER, _LINE = 6.6, 14.0


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each different name, in order."""
    return {n: COLOURS[i % len(COLOURS)] for i, n in enumerate(dict.fromkeys(names))}


@dataclass(frozen=True)
class Box:
    """A rectangle of a chart, in points; y grows downwards."""

    left: float
    top: float
    width: float
    height: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.left + other.width
            and other.left < self.left + self.width
            and self.top < other.top + other.height
            and other.top < self.top + self.height
        )


def place_labels(
    points: Sequence[tuple[float, float]], labels: Sequence[str], area: Box, taken: Sequence[Box] = ()
) -> list[tuple[Box, bool]]:
    """Where labels stand so that none covers another, a point or what is ``taken``, and all are inside the
    area.

    Returns:
        for each label its box, and whether it is so far from its point that a line should lead there.
    """
    marks = [Box(x - 5, y - 5, 10, 10) for x, y in points]
    used = [*taken]
    placed: list[tuple[Box, bool]] = []
    for (x, y), label in zip(points, labels, strict=True):
        width = max(len(label) * _CHARACTER, 1)
        best: Box | None = None
        for distance in range(0, 2 * int(area.height), 4):
            ring = [
                (x + 8, y - _LINE / 2 - distance),
                (x + 8, y - _LINE / 2 + distance),
                (x - 8 - width, y - _LINE / 2 - distance),
                (x - 8 - width, y - _LINE / 2 + distance),
            ]
            for left, top in ring:
                box = Box(left, top, width, _LINE)
                inside = (
                    area.left <= box.left
                    and box.left + box.width <= area.left + area.width
                    and area.top <= box.top
                    and box.top + box.height <= area.top + area.height
                )
                if inside and not any(box.meets(b) for b in (*used, *marks)):
                    best = box
                    break
            if best is not None:
                break
        if best is None:  # more labels than room: beneath one another at the edge
            best = Box(area.left + area.width - width, area.top + _LINE * len(placed), width, _LINE)
        used.append(best)
        placed.append((best, abs(best.top + _LINE / 2 - y) > _LINE))
    return placed


def layers_chart(
    values: Sequence[tuple[int, str, float]], axis: str, kinds: Mapping[str, str], logarithmic: bool
) -> str:
    """A point for each linear: its block across, its value up, a colour for each kind of linear.

    Args:
        values: block, name, value; finite, and positive where ``logarithmic``.
        kinds: kind → colour; the kind is the last part of a name.
    """
    width, height, left, bottom, top = 860.0, 340.0, 70.0, 40.0, 12.0
    blocks = [b for b, _, _ in values]
    first, last = min(blocks), max(blocks)

    def scaled(value: float) -> float:
        return math.log10(value) if logarithmic else value

    low, high = min(scaled(v) for *_, v in values), max(scaled(v) for *_, v in values)
    margin = (high - low or abs(high) or 1) * 0.1
    low, high = low - margin, high + margin

    def x(block: int) -> float:
        span = max(last - first, 1)
        return round(left + 12 + (block - first) / span * (width - left - 30), 1)

    def y(value: float) -> float:
        return round(height - bottom - (scaled(value) - low) / (high - low) * (height - bottom - top), 1)

    out = [f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(axis)} by layer">']
    for tick in log_ticks(10**low, 10**high) if logarithmic else ticks(low, high):
        out.append(f'<line class="grid" x1="{left}" x2="{width - 10}" y1="{y(tick)}" y2="{y(tick)}"/>')
        out.append(f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    step = max(1, math.ceil((last - first + 1) / 20))
    for block in range(first, last + 1, step):
        out.append(f'<text x="{x(block)}" y="{height - bottom + 16}" text-anchor="middle">{block}</text>')
    out.append(f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - 10}"/>')
    out.append(
        f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">block</text>'
        f'<text transform="translate(14 {(height - bottom + top) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(axis)}</text>"
    )
    for block, name, value in values:
        kind = name.rpartition(".")[2]
        out.append(
            f'<circle cx="{x(block)}" cy="{y(value)}" r="3.5" fill="{kinds[kind]}"><title>'
            f"{html.escape(name)}: {value:.4g}</title></circle>"
        )
    return "\n".join([*out, "</svg>"])


@dataclass(frozen=True)
class Options:
    """What a layer might be: points (across, up), of which the one at ``taken`` was chosen; None: none of
    them."""

    name: str
    points: tuple[tuple[float, float], ...]
    taken: tuple[float, float] | None


def options_chart(layers: Sequence[Options], across: str, up: str, kinds: Mapping[str, str]) -> str:
    """A thin line through the options of each layer, and a point at what was taken; up is logarithmic.

    Args:
        layers: positive values upwards.
        kinds: kind → colour; the kind is the last part of a name.
    """
    width, height, left, bottom, top, right = 860.0, 380.0, 76.0, 44.0, 12.0, 16.0
    every = [p for layer in layers for p in layer.points]
    low, high = (f(math.log10(y) for _, y in every) for f in (min, max))
    margin = (high - low or 1.0) * 0.06
    low, high = low - margin, high + margin
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    first, last = first - 0.2, last + 0.2

    def x(value: float) -> float:
        return round(left + (value - first) / (last - first) * (width - left - right), 1)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return round(height - bottom - share * (height - bottom - top), 1)

    out = [f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(up)}">']
    for tick in log_ticks(10**low, 10**high):
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        out.append(f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(first, last):
        out.append(f'<text x="{x(tick)}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>')
    out.append(
        f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">{html.escape(across)}</text>'
        f'<text transform="translate(14 {(height - bottom + top) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(up)}</text>"
    )
    for layer in layers:
        colour = kinds[layer.name.rpartition(".")[2]]
        path = "L".join(f"{x(a)} {y(b)}" for a, b in sorted(layer.points))
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1" opacity="0.35"/>')
    for layer in layers:
        if layer.taken is not None:
            a, b = layer.taken
            out.append(
                f'<circle cx="{x(a)}" cy="{y(b)}" r="4" fill="{kinds[layer.name.rpartition(".")[2]]}"><title>'
                f"{html.escape(layer.name)}: {a:.3f}, {b:.4g}</title></circle>"
            )
    return "\n".join([*out, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers within a range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 9)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within a range, or powers alone where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [m * 10.0**p for p in powers for m in ((1, 2, 5) if len(powers) <= 4 else (1,))]
    return [t for t in values if low <= t <= high]


@dataclass(frozen=True)
class Curve:
    """Points in the order of their load, each with what is written beside it."""

    name: str
    colour: str
    points: tuple[tuple[float, float, str], ...]


def curves_chart(curves: Sequence[Curve], across: str, up: str) -> str:
    """Curves from a common origin at zero, each point labelled; no label covers a point or another.

    Args:
        curves: finite values, none negative.
        across, up: what the axes are.
    """
    width, height, left, bottom, top, right = 860.0, 340.0, 76.0, 44.0, 16.0, 20.0
    far = max(x for c in curves for x, _, _ in c.points) * 1.06 or 1.0
    high = max(y for c in curves for _, y, _ in c.points) * 1.12 or 1.0

    def x(value: float) -> float:
        return round(left + value / far * (width - left - right), 1)

    def y(value: float) -> float:
        return round(height - bottom - value / high * (height - bottom - top), 1)

    out = [f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(up)}">']
    for tick in ticks(0, high):
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        out.append(f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(0, far):
        out.append(f'<text x="{x(tick)}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>')
    out.append(
        f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">{html.escape(across)}</text>'
        f'<text transform="translate(16 {(height - bottom + top) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(up)}</text>"
    )
    area = Box(left + 4, top, width - left - right, height - bottom - top)
    points = [(x(a), y(b)) for c in curves for a, b, _ in c.points]
    labels = [label for c in curves for *_, label in c.points]
    for curve in curves:
        path = "L".join(f"{x(a)} {y(b)}" for a, b, _ in curve.points)
        out.append(f'<path d="M{path}" fill="none" stroke="{curve.colour}" stroke-width="2"/>')
        for a, b, label in curve.points:
            out.append(
                f'<circle cx="{x(a)}" cy="{y(b)}" r="4" fill="{curve.colour}"><title>'
                f"{html.escape(f'{curve.name}, {label}: {a:.4g}, {b:.4g}')}</title></circle>"
            )
    for (box, _), label in zip(place_labels(points, labels, area), labels, strict=True):
        out.append(
            f'<text class="point" x="{box.left:.1f}" y="{box.top + 11:.1f}">{html.escape(label)}</text>'
        )
    return "\n".join([*out, "</svg>"])
