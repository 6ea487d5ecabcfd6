"""``quant export-gguf``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from quant.commands import options
from quant.commands.quantize import calibration_options
from quant.commands.terminal import Output, common_options
from quant.commands.types import PATH
from quant.errors import UsageError
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
@click.option(
    "--modelfile",
    is_flag=True,
    help="Write NAME.Modelfile beside NAME.gguf, of which ollama create -f makes a model: template, stops, "
    "context.",
)
@calibration_options
@common_options
def export_gguf(
    out: Output,
    model_path: Path,
    output_path: Path,
    level: str | None,
    imatrix: bool,
    modelfile: bool,
    **calibration: Any,
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

        beside = output_path.with_suffix(".Modelfile")
        if modelfile and beside.exists():
            raise UsageError(f"{beside}: exists already: remove it, or leave --modelfile out")
        made = export(model_path, output_path, level, imatrix=imatrix, calibration=given, progress=progress)
        if modelfile:
            from quant.gguf.header import read_header
            from quant.gguf.ollama import modelfile as written

            text = written(read_header(output_path))
            beside.write_text(text.text, encoding="utf-8")
            made = replace(made, notes=(*made.notes, f"{beside}: {text.note}"))
    out.result(made.to_dict(), lambda console: results.gguf_file(console, made))
