#!/usr/bin/env python3
"""The ``quant`` command: from a Hugging Face checkpoint to a quantized model that vLLM serves.

Every subcommand parses, makes one library call and renders what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from quant.terminal import run


class QuantGroup(click.Group):
    """Also takes the original one-command form: ``quantize.py --model-path M …`` means ``quantize``, with ``--layer-wise`` ``layer-wise``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version", "-h"):
            args = ["layer-wise" if "--layer-wise" in args else "quantize", *(a for a in args if a != "--layer-wise")]
        return super().parse_args(ctx, args)


@click.group(cls=QuantGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quant", prog_name="quant")
def cli() -> None:
    """From a Hugging Face checkpoint to a quantized model that vLLM serves."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``quant`` command."""
    run(cli, "quant", argv)


if __name__ == "__main__":
    main()
