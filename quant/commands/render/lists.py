"""What there is to choose from, and what is installed, as people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant.commands.render.tables import Column, draw
from quant.units import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from quant.doctor import Finding


def kinds(console: Console, counts: Mapping[str, int], about: Mapping[str, str]) -> None:
    draw(
        console,
        [Column("kind", list(counts)), Column("known", [str(n) for n in counts.values()], right=True)],
        Column("", [about[k] for k in counts]),
    )


def items(console: Console, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The things of one kind, a row each."""
    if not rows:
        console.print(f"none of the {kind} has that in its name: quant list {kind} shows all")
        return

    def column(heading: str, key: str, weight: int = 0, right: bool = False) -> Column:
        return Column(heading, [_cell(x[key]) for x in rows], weight, right)

    about = Column("", [x["about"] for x in rows])
    name = column(kind.removesuffix("s"), "name")
    if kind == "schemes":
        columns = [
            name,
            column("weights", "weight_bits", 1, True),
            column("inputs", "activation_bits", 1, True),
            column("usual methods", "methods", 2),
        ]
        about = Column(
            "",
            [
                ", ".join(
                    [
                        x["about"],
                        *([] if x["vllm"] else ["no kernel in vLLM"]),
                        *([f"with {v}" for v in x["needs"].values()]),
                    ]
                )
                for x in rows
            ],
        )
    elif kind == "methods":
        columns = [
            name,
            column("text", "calibration", 1),
            column("default scheme", "scheme", 2),
            column("paper", "source", 3),
        ]
    elif kind == "formats":
        columns = [name, column("vLLM's word", "quant_method", 1), column("KV scales", "kv_cache_scales", 2)]
    elif kind == "models":
        columns = [
            name,
            column("type", "type", 1),
            column("layers", "layers", 2, True),
            Column("context", [f"{x['context']:,}" if x["context"] else "?" for x in rows], 1, True),
        ]
    elif kind == "gpus":
        columns = [
            Column("GPU", [x["name"] for x in rows]),
            Column("memory", [format_size(x["memory_bytes"]) for x in rows], 0, True),
            column("compute", "capability", 1),
            Column(
                "bandwidth", [f"{x['bandwidth_bytes_per_second'] / 1e9:,.0f} GB/s" for x in rows], 2, True
            ),
            column("computes natively", "native", 3),
        ]
    elif kind == "engines":
        read = [(x, r) for x in rows for r in x["reads"]]
        columns = [
            Column("engine", [x["name"] for x, _ in read]),
            Column("release", [x["release"] for x, _ in read], 3),
            Column("reads", [r["format"] for _, r in read]),
            Column("schemes", [_cell(r["schemes"] or None) for _, r in read]),
            Column(
                "compute",
                [f"{r['capability'] or '?'}–{r['until'] or ''}" if r["schemes"] else "-" for _, r in read],
                1,
            ),
            Column("on", [_cell(r["platforms"]) for _, r in read], 2),
        ]
        about = Column("", [x["about"] for x, _ in read])
    else:
        columns = [
            name,
            column("objective", "objective", 1),
            Column("arguments", [" ".join(f"{k}={v}" for k, v in x["defaults"].items()) for x in rows], 2),
        ]
    draw(console, columns, about)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


_MARKS = {"ok": "[green]✓[/]", "note": "-", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}


def findings(console: Console, results: Sequence[Finding]) -> None:
    """Each thing with its mark, and beneath it the next step."""
    draw(
        console,
        [Column("", [_MARKS[f.state] for f in results], markup=True), Column("", [f.name for f in results])],
        Column("", [f.found + (f" → {f.next}" if f.next else "") for f in results]),
        key=1,
    )
