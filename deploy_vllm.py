#!/usr/bin/env python3
"""The ``quant-deploy`` command: from a quantized checkpoint to a vLLM that serves it."""

from __future__ import annotations

from collections.abc import Sequence

import click

from quant.commands.group import LazyGroup
from quant.commands.terminal import run

SUBCOMMANDS = {
    "plan": "quant.commands.deploy:plan",
    "serve": "quant.commands.deploy:serve",
    "bench": "quant.commands.bench:bench",
    "check": "quant.commands.check:check",
    "speculate": "quant.commands.speculate:speculate",
}


def _original_form(arguments: list[str]) -> list[str]:
    """``deploy_vllm.py --model-path O …`` means ``serve``."""
    return ["serve", *arguments]


@click.group(
    cls=LazyGroup,
    subcommands=SUBCOMMANDS,
    implied=_original_form,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="quant", prog_name="quant-deploy")
def cli() -> None:
    """From a quantized checkpoint to a vLLM that serves it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``quant-deploy`` command."""
    run(cli, "quant-deploy", argv)


if __name__ == "__main__":
    main()
