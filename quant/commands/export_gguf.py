"""``quant export-gguf``."""

from __future__ import annotations

from pathlib import Path

import click

from quant.commands import options
from quant.commands.terminal import Output, common_options
from quant.commands.types import PATH
from quant.gguf.levels import LEVELS


@click.command("export-gguf")
@options.model_path()
@click.option(
    "-o",
    "--output-path",
    type=PATH,
    required=True,
    help="The GGUF file to be made; it must not exist.",
)
@click.option(
    "--level",
    "--type",
    "level",
    type=click.Choice(list(LEVELS), case_sensitive=False),
    help="Numbers of the matrices. Default: what stores the source's codes as they are, else its dtype.",
)
@common_options
def export_gguf(out: Output, model_path: Path, output_path: Path, level: str | None) -> None:
    """Turn a checkpoint that can be read into one GGUF file for llama.cpp and Ollama.

    \b
    quant export-gguf -m out/Llama-3.1-8B-W4A16 -o Llama-3.1-8B-Q4_0.gguf --level q4_0
    """
    from quant.commands.render import results

    with out.progress() as progress:
        from quant.pipeline.memory import prepare_torch

        prepare_torch()
        from quant.pipeline.gguf import export_gguf as export

        made = export(model_path, output_path, level, progress=progress)
    out.result(made.to_dict(), lambda console: results.gguf_file(console, made))
