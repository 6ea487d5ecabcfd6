"""What ``quant-deploy check`` found, as people read it. The same values that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}
_LEAST = 30


def check(console: Console, value: Mapping[str, Any]) -> None:
    """One line a finding as far as the width allows, under WARN and FAIL what to do."""
    from rich.text import Text

    console.print(f"{value['model'] or 'no model'} at {value['url']}", style="bold", soft_wrap=True)
    width = max((len(f["name"]) for f in value["findings"]), default=0)
    beside = console.width - width - 9 >= _LEAST
    for group in dict.fromkeys(f["group"] for f in value["findings"]):
        console.print()
        console.print(group, style="bold")
        for finding in (f for f in value["findings"] if f["group"] == group):
            status = Text(f"  {finding['status']}", _STYLES[finding["status"]])
            name = finding["name"].ljust(width) if beside else finding["name"]
            indent = width + 10 if beside else 8
            lines = Text(finding["detail"]).wrap(console, max(console.width - indent, 12))
            head = status + Text(f"  {name}  " if beside else f"  {name}")
            rest = list(lines)
            if beside and rest:
                head.append_text(rest.pop(0))
            _emit(console, head)
            for line in rest:
                _emit(console, Text(" " * indent) + line)
            if finding["status"] in ("WARN", "FAIL") and finding["todo"]:
                for line in Text(f"→ {finding['todo']}").wrap(console, max(console.width - 8, 12)):
                    _emit(console, Text(" " * 8) + line)
    counts = ", ".join(f"{n} {status}" for status, n in value["counts"].items() if n)
    console.print()
    console.print(f"{counts} in {format_seconds(value['seconds'])}", style="bold", soft_wrap=True)
    if value.get("output"):
        console.print(f"written: {value['output']}", soft_wrap=True)


def _emit(console: Console, text: Any) -> None:
    text.rstrip()
    console.print(text, soft_wrap=True)
