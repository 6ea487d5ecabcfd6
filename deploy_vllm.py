#!/usr/bin/env python3
"""The ``quant-deploy`` command: from a quantized checkpoint to a vLLM that serves it.

Every subcommand parses, makes one library call and renders what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant.terminal import PATH, Output, common_options, run

if TYPE_CHECKING:
    from quant.serving.deployment import Deployment, DeploymentRequest


class DeployGroup(click.Group):
    """Also takes the original one-command form: ``deploy_vllm.py --model-path O …`` means ``serve``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version", "-h"):
            args = ["serve", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DeployGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quant", prog_name="quant-deploy")
def cli() -> None:
    """From a quantized checkpoint to a vLLM that serves it."""


def deployment_options(default_port: int = 8000) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What a deployment is asked for; each is a field of :class:`quant.serving.deployment.DeploymentRequest`."""
    options = [
        click.option("-m", "--model-path", type=PATH, required=True, help="Checkpoint directory."),
        click.option(
            "--gpu",
            help="GPU that it will run on, such as L40S-48GB: the context is fitted to it.  [default: those "
            "here]",
        ),
        click.option(
            "--tensor-parallel",
            type=click.IntRange(1, 1024),
            help="GPUs to split the model over.  [default: vllm_config.json's, or 1]",
        ),
        click.option(
            "--max-model-len",
            type=click.IntRange(1),
            help="Context to serve, in tokens.  [default: vllm_config.json's, or the model's]",
        ),
        click.option(
            "--gpu-memory-utilization",
            type=click.FloatRange(0, 1, min_open=True),
            help="Share of GPU memory that vLLM may take.  [default: vLLM's own, 0.92]",
        ),
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
        click.option(
            "--port",
            type=click.IntRange(0, 65535),
            default=default_port,
            show_default=True,
            help="Port; serve takes 0 for a free one.",
        ),
        click.option("--name", help="What clients call the model.  [default: the directory's name]"),
        click.option("--api-key-env", metavar="NAME", help="Environment variable that holds the API key."),
        click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_ARGUMENTS...]"),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _request(options: dict[str, Any]) -> DeploymentRequest:
    from quant.errors import Problems
    from quant.serving.deployment import DeploymentRequest

    wrong = [
        f"--{key} is {value!r}: {what} without spaces and control characters is needed"
        for key, what in (("host", "an address"), ("name", "a name"))
        if (value := options[key]) is not None and (not value.isprintable() or value.split() != [value])
    ]
    share = options["gpu_memory_utilization"]
    if share is not None and math.isnan(share):
        wrong.append(f"--gpu-memory-utilization is {share}: a share above 0 and at most 1 is needed")
    if wrong:
        raise Problems(wrong, exit_code=2)
    return DeploymentRequest(**options)


def _planned(out: Output, model_path: Path, options: dict[str, Any]) -> Deployment:
    from quant.serving.deployment import plan as make_plan

    deployment = make_plan(model_path, _request(options))
    for warning in deployment.warnings:
        out.warn(warning)
    return deployment


@cli.command()
@deployment_options()
@click.option(
    "--output",
    "kind",
    type=click.Choice(["shell", "compose", "kubernetes", "systemd"]),
    default="shell",
    show_default=True,
    help="What to print.",
)
@common_options
def plan(out: Output, model_path: Path, kind: str, **options: Any) -> None:
    """The exact vllm serve command for a checkpoint, and why each flag has its value.

    \b
    quant-deploy plan -m out/Llama-3.1-8B-W4A16 --output compose > compose.yaml
    """
    from quant.errors import UsageError
    from quant.serving.deployment import artefact

    if options["port"] == 0:
        raise UsageError("--port is 0: a plan names the port, from 1 to 65535; serve takes a free one for 0")
    deployment = _planned(out, model_path, options)
    text = artefact(deployment, kind)
    out.result(
        deployment.to_dict() | {"output": kind, "artefact": text}, lambda c: click.echo(text, nl=False)
    )


@cli.command()
@deployment_options()
@click.option(
    "--vllm-python",
    type=PATH,
    help="Python of the environment with vLLM.  [default: the variable QUANT_VLLM_PYTHON, or this one]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=1800.0,
    show_default=True,
    help="Seconds to wait until it is healthy.",
)
@click.option("--check", is_flag=True, help="Stop after the test completion.")
@click.option(
    "--exact-activations",
    is_flag=True,
    help="On CPUs with AMX: keep activations of 4-bit layers in 16 bits (vLLM rounds them to int8 for speed).",
)
@common_options
def serve(
    out: Output,
    model_path: Path,
    vllm_python: Path | None,
    timeout: float,
    check: bool,
    exact_activations: bool,
    **options: Any,
) -> None:
    """Start vLLM on a checkpoint, try a completion, report, serve until a signal.

    \b
    quant-deploy serve -m out/Llama-3.1-8B-W4A16 --port 8000 -- --max-num-seqs 64
    """
    from quant.report import deployment as report
    from quant.serving.process import serve as start

    deployment = _planned(out, model_path, options)

    def ready(value: dict[str, Any]) -> None:
        out.result(value, lambda c: report.serving(c, value))
        if not check:
            out.note(f"serving {value['model']} on {value['url']}; Ctrl-C stops it")

    out.note(f"starting vLLM on {deployment.model_path}")
    start(
        deployment,
        python=vllm_python,
        timeout=timeout,
        check=check,
        exact=exact_activations,
        log=out.note,
        ready=ready,
    )
    out.note("stopped")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``quant-deploy`` command."""
    run(cli, "quant-deploy", argv)


if __name__ == "__main__":
    main()
