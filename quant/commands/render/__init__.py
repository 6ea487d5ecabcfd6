"""Results as people read them: the same values that ``--json`` prints, drawn with rich."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

#: A blank between a number and its unit, and what stands for it while lines are broken.
_UNIT = re.compile(r"(?<=\d) (?=(?:[KMGT]iB|[KMGT]?B|t/s|tokens?|%|s|min|dB)\b|%)|(?<=±) (?=\d)")
_JOINT = "\ue000"


def prose(console: Console, text: str, style: str = "") -> None:
    """Words, wrapped to the width that they are read at, a number with its unit; where there is none, such as
    in a log, in one line, to be searched."""
    from rich.text import Text

    from quant.commands.terminal import unseen

    if unseen():
        console.print(Text(text, style), soft_wrap=True)
        return
    together = Text(_UNIT.sub(_JOINT, text), style)
    for line in together.wrap(console, console.width):
        line.plain = line.plain.replace(_JOINT, " ")
        line.rstrip()
        console.print(line)


def table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """Two columns without a frame: what, and the value, shown as they are: a path may look like markup."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    console.print(grid)
