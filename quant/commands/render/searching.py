"""What a search foretells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant.commands.render import results
from quant.commands.render.tables import Column, draw
from quant.report.value import Report
from quant.units import format_seconds, format_size

if TYPE_CHECKING:
    from rich.console import Console


def table(console: Console, value: Mapping[str, Any], report: Report | None) -> None:
    """The candidates by size, those of the front marked, and what was made of them."""
    rows = sorted(value["candidates"], key=lambda e: (e["output_bytes"], e.get("kl", 0.0)))
    chosen = value.get("chosen")
    marks = [
        "→" if e["options"] == (chosen or {}).get("options") else "•" if e.get("front") else "" for e in rows
    ]
    columns = [
        Column("", marks),
        Column("scheme", [e["scheme"] for e in rows]),
        Column("method", [e["method"] for e in rows]),
        Column("KL, nats/token", [_kl(e) for e in rows], right=True),
        Column("size", [format_size(e["output_bytes"]) for e in rows], right=True),
        Column("bits", [f"{e['bits_per_weight']:.2f}" for e in rows], 1, True),
        Column("fits", ["yes" if e["fits"] else "no" for e in rows]),
        Column("time", [format_seconds(e["seconds"]) if "seconds" in e else "-" for e in rows], 1, True),
    ]
    draw(console, columns, emphasis=[i for i, m in enumerate(marks) if m == "→"], key=1)
    lines = [f"{value['target']}: {format_size(value['budget_bytes'])} of tensors at the most"]
    for label, reason in value["left_out"].items():
        lines.append(f"left out: {label}: {reason}")
    if chosen is None:
        lines.append("Dry run: nothing was run or written")
    else:
        sampled = value["sampled_blocks"]
        blocks = f"{'blocks' if len(sampled) > 1 else 'block'} {', '.join(map(str, sampled))}"
        lines.append(
            f"KL is foretold from {blocks} (there are {value['blocks']}), ± one standard error; • marks what "
            "no other beats in both size and KL"
        )
        if report is None:
            lines.append(f"→ {value['command']}")
    for line in lines:
        console.print(line, markup=False)
    if report is not None:
        results.quantization(console, report)


def _kl(entry: Mapping[str, Any]) -> str:
    if "kl" not in entry:
        return "-"
    return f"{entry['kl']:.5f} ± {entry['standard_error']:.5f}"
