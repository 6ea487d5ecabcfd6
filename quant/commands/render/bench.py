"""What ``quant-deploy bench`` measured, as people read it. The same values that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant.commands.render.tables import Column, draw
from quant.report.bench_page import cell, columns

if TYPE_CHECKING:
    from rich.console import Console

#: Columns by how soon a narrow terminal goes without them.
_WEIGHTS = {
    "TTFT P99": 9, "TPOT P99": 8, "E2EL P99": 7, "E2EL P50": 6, "req/s": 5, "TPOT P50": 4, "E2EL P95": 3,
}  # fmt: skip
_BAR = 20


def bench(console: Console, value: Mapping[str, Any]) -> None:
    limits = bool(value["request"]["goodput_limits_ms"])
    most = max((x["output_throughput"] for t in value["targets"] for x in t["levels"]), default=0) or 1
    for target in value["targets"]:
        console.print(f"{target['name']}: {target['model']} at {target['url']}", style="bold", soft_wrap=True)
        rows = [columns(level, limits) for level in target["levels"]]
        if not rows:
            continue
        bars = [
            ("█" * round(_BAR * x["output_throughput"] / most)).ljust(_BAR, "░") for x in target["levels"]
        ]
        shown = [
            Column(head, [r[head] for r in rows], _WEIGHTS.get(head, 0), right=head != "load")
            for head in rows[0]
        ]
        shown.insert(2, Column("of the most", bars, 10))
        draw(console, shown)
        if target["knee"]:
            console.print(f"most throughput for its latency: {target['knee']['text']}", soft_wrap=True)
        for level in target["levels"]:
            for kind, count in level["errors"].items():
                console.print(f"{level['level']['text']}: {count} failed: {kind}", soft_wrap=True)
        console.print()
    for what, order in value["ranking"].items():
        names = ", ".join(f"{v['name']} ({cell(v['value'], '.4g')})" for v in order)
        console.print(f"best by {what}: {names}", soft_wrap=True)
    formulas = "; ".join(f"{name}: {formula}" for name, formula in value["formulas"].items())
    console.print(f"Times in ms; ± half of a 95 % interval. {formulas}", style="dim")
    for path in value.get("files", []):
        console.print(f"written: {path}", soft_wrap=True)
