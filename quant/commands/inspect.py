"""``quant inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from quant.commands import options
from quant.commands.terminal import Output, common_options


@click.command()
@options.one_checkpoint
@common_options
def inspect(out: Output, checkpoint: Path) -> None:
    """What is in a checkpoint: parameters by role, bytes by dtype, scheme, format.

    \b
    quant inspect out/Llama-3.1-8B-W4A16
    quant inspect Llama-3.1-8B-Q4_0.gguf
    """
    from quant.commands.render import results
    from quant.evaluation.inspect import inspect as look

    value = look(checkpoint)
    out.result(value, lambda console: results.inspection(console, value))
