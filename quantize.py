#!/usr/bin/env python3
"""The ``quant`` command: from a Hugging Face checkpoint to a quantized model that vLLM serves."""

from __future__ import annotations

from collections.abc import Sequence

import click

from quant.commands.group import LazyGroup
from quant.commands.terminal import run

SUBCOMMANDS = {
    "batch": "quant.commands.batch:batch",
    "detect": "quant.commands.detect:detect",
    "distill": "quant.commands.distill:distill",
    "doctor": "quant.commands.doctor:doctor",
    "evaluate": "quant.commands.evaluate:evaluate",
    "export-gguf": "quant.commands.export_gguf:export_gguf",
    "export-vllm": "quant.commands.export_vllm:export_vllm",
    "inspect": "quant.commands.inspect:inspect",
    "layer-wise": "quant.commands.quantize:layer_wise",
    "list": "quant.commands.list:list_",
    "prune": "quant.commands.prune:prune",
    "quantize": "quant.commands.quantize:quantize",
    "recipe": "quant.commands.recipe:recipe",
    "recommend": "quant.commands.recommend:recommend",
    "report": "quant.commands.report:report",
    "search": "quant.commands.search:search",
    "smooth": "quant.commands.quantize:smooth",
    "verify": "quant.commands.verify:verify",
}


def _original_form(arguments: list[str]) -> list[str]:
    """``quantize.py --model-path M …`` means ``quantize``, with ``--layer-wise`` ``layer-wise``."""
    rest = [a for a in arguments if a != "--layer-wise"]
    return ["quantize" if len(rest) == len(arguments) else "layer-wise", *rest]


@click.group(
    cls=LazyGroup,
    subcommands=SUBCOMMANDS,
    implied=_original_form,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="quant", prog_name="quant")
def cli() -> None:
    """From a Hugging Face checkpoint to a quantized model that vLLM serves."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``quant`` command."""
    run(cli, "quant", argv)


if __name__ == "__main__":
    main()
