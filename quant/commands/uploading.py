"""The end of a command that makes an output: its upload where one is asked for, and what is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quant.commands.terminal import Output, console
from quant.errors import QuantError

if TYPE_CHECKING:
    from rich.console import Console

    from quant.report.value import Report
    from quant.upload import Destination


def finish(
    out: Output,
    report: Report,
    to: Destination | None,
    draw: Callable[[Console, Report], None],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Uploads an output and prints what was made; where the upload fails too, for the output is there.

    Args:
        more: keys of the result beside the report's.
    """
    value = {**report.to_dict(), **(more or {})}
    if to is None:
        out.result(value, lambda console: draw(console, report))
        return
    from quant.upload import upload

    try:
        with out.progress("upload") as progress:
            uploaded = upload(report.output_path, to, progress)
    except QuantError:
        if not out.json:
            draw(console(), report)
        raise

    def both(console: Console) -> None:
        draw(console, report)
        words = f"on the Hub: {uploaded.url}, {uploaded.revision} at {uploaded.commit[:12]}"
        console.print(words, soft_wrap=True, markup=False)

    out.result({**value, "hub": uploaded.to_dict()}, both)
