"""``quant report``."""

from __future__ import annotations

from pathlib import Path

import click

from quant.commands.terminal import Output, common_options
from quant.commands.types import PATH
from quant.errors import UsageError


@click.command()
@click.argument("outputs", metavar="OUT...", type=PATH, nargs=-1, required=True)
@click.option(
    "--output",
    type=PATH,
    show_default="quant_report.html in a single OUT",
    help="File to write: the HTML page.",
)
@common_options
def report(out: Output, outputs: tuple[Path, ...], output: Path | None) -> None:
    """One page over an output, or over several beside one another: bits against KL, size, errors, times. KL
    is there once quant evaluate --save has measured it.

    \b
    quant report out/gptq out/awq out/fp8 --output compared.html
    """
    from quant.commands.render import results
    from quant.report.compare import notes, summaries
    from quant.report.files import write_page

    if len(set(map(Path.absolute, outputs))) < len(outputs):
        raise UsageError("an output is named twice: leave one of them out")
    values = summaries(outputs)
    if output is not None or len(outputs) == 1:
        written = write_page(outputs, values, output)
        out.note(f"{written}: open it in a browser")
    for line in notes(values):
        out.note(line)
    page = str(written) if output is not None or len(outputs) == 1 else None
    out.result({"outputs": values, "page": page}, lambda console: results.outputs(console, values))
