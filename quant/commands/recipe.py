"""``quant recipe init``."""

from __future__ import annotations

from pathlib import Path

import click

from quant.commands import options
from quant.commands.terminal import Output, common_options
from quant.commands.types import PATH
from quant.errors import UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def recipe() -> None:
    """Recipes: a job in a YAML file, which quant quantize takes with --config.

    \b
    quant recipe init -m models/Llama-3.1-8B --gpu L40S-48GB > job.yaml
    """


@recipe.command()
@options.model_path(download=False)
@click.option("-o", "--output-path", type=PATH, help="Output directory that the recipe names.")
@options.gpu
@options.tensor_parallel("the GPUs here, or 1")
@click.option(
    "--method",
    metavar="NAME",
    shell_complete=options.completed("methods"),
    show_default="as recommended",
    help="Rounding method.",
)
@options.scheme("as recommended")
@click.option("--output", type=PATH, show_default="stdout", help="File to write; it must not exist.")
@common_options
def init(
    out: Output,
    model_path: Path,
    output_path: Path | None,
    gpu: str | None,
    tensor_parallel: int | None,
    method: str | None,
    scheme: str | None,
    output: Path | None,
) -> None:
    """Write a commented recipe for a model and GPU: what would be chosen, and every other key with its
    default and meaning.

    \b
    quant recipe init -m models/Llama-3.1-8B --gpu L40S-48GB --output job.yaml
    """
    from quant.starter import starter_recipe

    if output is not None and output.exists():
        raise UsageError(f"--output is {str(output)!r}: it is there already; name another file, or remove it")
    text = starter_recipe(
        model_path, output_path, gpu=gpu, method=method, scheme=scheme, tensor_parallel=tensor_parallel
    )
    if output is not None:
        output.write_text(text, encoding="utf-8")
        out.note(f"{output}: edit it, then quant quantize --config {output}")
    value = {"recipe": text, "output": None if output is None else str(output)}
    out.result(value, lambda c: None if output is not None else click.echo(text, nl=False))
