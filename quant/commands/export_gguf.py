"""``quant export-gguf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant.commands import options
from quant.commands.quantize import calibration_options
from quant.commands.terminal import Output, common_options
from quant.commands.types import PATH
from quant.gguf.levels import LEVELS, OWN_LEVELS


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
    type=click.Choice([*LEVELS, *OWN_LEVELS], case_sensitive=False),
    show_default="what stores the source's codes as they are, else its dtype",
    help="Numbers of the matrices; the K levels and iq4_xs are made by llama.cpp's own library.",
)
@click.option(
    "--imatrix/--no-imatrix",
    default=True,
    show_default=True,
    help="Whether llama.cpp weighs errors by the inputs that calibration text shows (its importance matrix).",
)
@calibration_options
@common_options
def export_gguf(
    out: Output, model_path: Path, output_path: Path, level: str | None, imatrix: bool, **calibration: Any
) -> None:
    """Turn a checkpoint that can be read into one GGUF file for llama.cpp and Ollama.

    \b
    quant export-gguf -m out/Llama-3.1-8B-W4A16 -o Llama-3.1-8B-Q4_0.gguf --level q4_0
    """
    given = options.given(calibration)
    from quant.commands.render import results

    with out.progress() as progress:
        from quant.pipeline.memory import prepare_torch

        prepare_torch()
        from quant.pipeline.gguf import export_gguf as export

        made = export(model_path, output_path, level, imatrix=imatrix, calibration=given, progress=progress)
    out.result(made.to_dict(), lambda console: results.gguf_file(console, made))
