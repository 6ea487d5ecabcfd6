#!/usr/bin/env python3
"""Writes docs/reference.md from the programs' own --help; with --check, fails where the file is not what they
say now."""

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deploy_vllm import cli as deploy  # noqa: E402
from quantize import cli as quant  # noqa: E402

REFERENCE = ROOT / "docs/reference.md"


def section(command: click.Command, name: str, depth: int) -> list[str]:
    context = click.Context(
        command, info_name=name, max_content_width=100, terminal_width=100, help_option_names=["-h", "--help"]
    )
    lines = [f"{'#' * depth} {name}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            found = command.get_command(context, sub)
            assert found is not None
            lines += section(found, f"{name} {sub}", depth + 1)
    return lines


def main() -> None:
    head = [
        "# Command reference",
        "",
        "Made from `--help` by `make docs`; `make lint` checks that it is current.",
        "",
    ]
    text = "\n".join([*head, *section(quant, "quant", 2), *section(deploy, "quant-deploy", 2)])
    if "--check" in sys.argv:
        if not REFERENCE.exists() or REFERENCE.read_text(encoding="utf-8") != text:
            raise SystemExit("docs/reference.md is not what --help says: run make docs")
    else:
        REFERENCE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
