"""``quant search``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from quant import defaults
from quant.commands import options
from quant.commands.options import given
from quant.commands.quantize import calibration_options, free_name, fresh
from quant.commands.terminal import Output, common_options, resumable
from quant.hub import named
from quant.progress import Event

if TYPE_CHECKING:
    from quant.report.value import Report


@click.command()
@options.model_path()
@options.output_path(required=False)
@options.target_size
@options.gpu
@options.context
@options.concurrency
@options.tensor_parallel(1)
@options.vllm_version
@click.option(
    "--search-blocks",
    type=click.IntRange(1),
    default=defaults.SEARCH_BLOCKS,
    show_default=True,
    help="Blocks that candidates are made of, spread over the depth.",
)
@click.option(
    "--search-samples",
    type=click.IntRange(2, 100_000),
    default=defaults.SEARCH_SAMPLES,
    show_default=True,
    help=f"Rows that they are made by, of {defaults.SEARCH_LENGTH} tokens at the most.",
)
@calibration_options
@options.device
@click.option("--dry-run", is_flag=True, help="Only say what there is to choose among; write nothing.")
@fresh
@common_options
def search(out: Output, search_blocks: int, search_samples: int, dry_run: bool, **asked: Any) -> None:
    """Foretell what methods and schemes would lose within a size or a GPU, from a sample of blocks, and make
    the best one. Without -o, only the table; without a size, --fit. Exit status 3 when nothing fits.

    \b
    quant search -m models/Llama-3.1-8B --target-size 5GiB
    quant search -m models/Llama-3.1-8B -o out/Llama-3.1-8B-best --gpu L40S-48GB --context 32k
    """
    from quant.commands.render import searching

    values = given(asked)
    if "output_path" not in values:
        values["output_path"] = free_name(values["model_path"])
    with resumable(), out.progress() as progress:
        from quant import jobs  # brings torch, which takes seconds

        progress(Event("planning"))
        found = jobs.search(values, progress, blocks=search_blocks, rows=search_samples, run=not dry_run)
        report: Report | None = None
        if found.chosen is not None and asked["output_path"] is not None:
            report = jobs.quantize(found.chosen, progress)
    value = found.to_dict() | {"report": None if report is None else report.to_dict()}
    if found.chosen is not None:
        recipe = found.chosen
        made = ["quant", "quantize", "-m", named(recipe.model_path), "-o", str(recipe.output_path)]
        value["command"] = f"{shlex.join(made)} {value['chosen']['options']}"
    out.result(value, lambda console: searching.table(console, value, report))
