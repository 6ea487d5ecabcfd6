"""``quant doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from quant.commands.terminal import Output, common_options
from quant.commands.types import PATH


@click.command()
@click.option(
    "--vllm-python",
    type=PATH,
    show_default="the variable QUANT_VLLM_PYTHON, or this one",
    help="Python of the environment with vLLM.",
)
@common_options
def doctor(out: Output, vllm_python: Path | None) -> None:
    """What is installed here and fits together: packages, torch and CUDA, GPUs, vLLM, memory and disk, the
    Hugging Face cache; and the next step for what is missing. Exit status 1 when something will fail.

    \b
    quant doctor
    quant doctor --vllm-python .venv-vllm/bin/python
    """
    from quant.commands.render import lists
    from quant.doctor import examine

    findings = examine(vllm_python)
    problems = [f for f in findings if f.state == "problem"]
    value = {"ok": not problems, "findings": [f.to_dict() for f in findings]}
    out.result(value, lambda console: lists.findings(console, findings))
    if problems:
        raise click.exceptions.Exit(1)
