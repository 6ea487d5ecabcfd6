"""Tables that fit the width they are drawn in: columns of less weight are left out, what still does not fit
becomes a block per row, and no cell is ever cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_GAP = 2
#: The least width of the last, free column, and the most lines that it may take in a row.
_LEAST, _MOST_LINES = 28, 3


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        cells: one for each row; text, with rich's markup where ``markup``.
        weight: 0: it is always there; the larger, the sooner it is left out.
        right: whether numbers stand under one another by their end.
    """

    heading: str
    cells: Sequence[str]
    weight: int = 0
    right: bool = False
    markup: bool = False

    def texts(self) -> list[Text]:
        from rich.text import Text

        return [Text.from_markup(c) if self.markup else Text(c) for c in self.cells]


def draw(
    console: Console,
    columns: Sequence[Column],
    notes: Column | None = None,
    emphasis: Sequence[int] = (),
    key: int = 0,
) -> None:
    """Draws rows.

    Args:
        notes: a last column of free text: beside the row where it fits in a few lines, else beneath it.
        emphasis: numbers of the rows that stand out.
        key: which column names a row where each is drawn as a block.
    """
    from rich.cells import cell_len
    from rich.text import Text

    # a column that says nothing in any row only takes room
    chosen = [c for c in columns if c.weight == 0 or any(x not in ("", "-") for x in c.cells)]
    cells = {id(c): c.texts() for c in chosen}

    def width(column: Column) -> int:
        return max(cell_len(column.heading), *(t.cell_len for t in cells[id(column)]), 0)

    def total() -> int:
        return sum(map(width, chosen)) + _GAP * (len(chosen) - 1)

    left_out = []
    while total() > console.width and any(c.weight for c in chosen):
        dropped = max(chosen, key=lambda c: c.weight)
        chosen.remove(dropped)
        left_out.append(dropped.heading)
    texts = [] if notes is None else notes.texts()
    if total() > console.width:
        _blocks(console, columns, texts, notes, key)
        return
    room = console.width - total() - _GAP
    longest = max((t.cell_len for t in texts), default=0)
    beside = bool(longest) and (
        longest <= room or (room >= _LEAST and longest <= room * _MOST_LINES - _LEAST // 2)
    )

    def line(parts: Sequence[Text], style: str = "") -> Text:
        row = Text(style=style)
        for number, (column, part) in enumerate(zip(chosen, parts, strict=True)):
            pad = " " * (width(column) - part.cell_len)
            row.append(" " * _GAP if number else "")
            for piece in (Text(pad), part) if column.right else (part, Text(pad)):
                row.append_text(piece)
        return row

    def emit(text: Text) -> None:
        text.rstrip()
        console.print(text, soft_wrap=True)

    head = line([Text(c.heading) for c in chosen], "bold")
    if beside and notes is not None:
        head.append(" " * _GAP + notes.heading)
    if head.plain.strip():
        emit(head)
    for number in range(len(columns[0].cells)):
        row = line([cells[id(c)][number] for c in chosen], "bold" if number in emphasis else "")
        if not texts or not texts[number].cell_len:
            emit(row)
        elif beside:
            first, *more = texts[number].wrap(console, room)
            emit(row + Text(" " * _GAP) + first)
            for piece in more:
                emit(Text(" " * (total() + _GAP)) + piece)
        else:
            emit(row)
            for piece in texts[number].wrap(console, max(console.width - 4, 8)):
                emit(Text("    ") + piece)
    if left_out:
        what = f"Wider terminals and --json also show: {', '.join(reversed(left_out))}"
        for piece in Text(what, "dim").wrap(console, console.width):
            emit(piece)


def _blocks(
    console: Console, columns: Sequence[Column], texts: Sequence[Text], notes: Column | None, key: int
) -> None:
    """Each row as lines of heading and value, beneath what names it."""
    from rich.text import Text

    cells = [c.texts() for c in columns]
    for number in range(len(columns[0].cells)):
        if number:
            console.print()
        named = Text(style="bold")
        for one in range(key + 1):  # marks stand before the name
            named.append_text(cells[one][number]).append(" " if one < key else "")
        console.print(named, soft_wrap=True)
        for column, values in list(zip(columns, cells, strict=True))[key + 1 :]:
            if values[number].cell_len and values[number].plain != "-":
                console.print(Text(f"  {column.heading}: ") + values[number], soft_wrap=True)
        if notes is not None and texts[number].cell_len:
            for piece in texts[number].wrap(console, max(console.width - 2, 8)):
                console.print(Text("  ") + piece, soft_wrap=True)
