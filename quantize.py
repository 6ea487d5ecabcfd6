#!/usr/bin/env python3
"""The ``quant`` command: from a Hugging Face checkpoint to a quantized model that vLLM serves.

Every subcommand parses, makes one library call and renders what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from quant.errors import UsageError
from quant.planning.options import engine_options, gpu_options
from quant.terminal import Output, common_options, run

if TYPE_CHECKING:
    from quant.planning.memory import EngineRequest


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


@cli.command()
@click.option("--gpu", metavar="NAME", help="Facts of a named GPU, no hardware needed; `list` shows all names.")
@common_options
def detect(gpu: str | None, out: Output) -> None:
    """The GPUs here: memory, who uses it, what each computes natively.

    \b
    quant detect
    quant detect --gpu L40S-48GB --json
    """
    from quant.hardware import detect as look
    from quant.hardware import gpu_names, named_gpu
    from quant.planning.render import show_detection, show_gpus

    if gpu == "list":
        names = gpu_names()
        out.result({"names": names}, lambda console: console.print("\n".join(names)))
    elif gpu:
        named = named_gpu(gpu)
        out.result({"gpus": [named.to_dict()]}, lambda console: show_gpus([named], console))
    else:
        found = look()
        out.result(found.to_dict(), lambda console: show_detection(found, console))


@cli.command()
@click.option("-m", "--model-path", type=click.Path(), help="A checkpoint directory; only its headers are read.")
@click.option("--model", metavar="NAME", help="A model by name, where there is no checkpoint: Qwen2.5-7B-Instruct.")
@gpu_options
@engine_options
@click.option("--scheme", metavar="NAME", help="Plan just this scheme (`none`: the checkpoint as it is).")
@click.option("--policy", default="vllm", show_default=True, help="vllm, or rule-of-thumb (the original design's).")
@click.option("--scenario", metavar="NAME", help="chat, code, high-throughput, low-latency or multi-model.")
@common_options
def recommend(
    model_path: str | None, model: str | None, gpu: str | None, gpu_count: int | None, gpu_memory: int | None, engine: EngineRequest,
    tensor_parallel_given: bool, scheme: str | None, policy: str, scenario: str | None, out: Output,
) -> None:  # fmt: skip
    """Which scheme fits this model on this or a named GPU, and why. Exit status 3 when nothing fits.

    \b
    quant recommend --model-path ./Llama-3.1-8B-Instruct
    quant recommend --model Qwen2.5-32B-Instruct --gpu L40S-48GB --context 16384 --concurrency 4
    """
    from pathlib import Path

    from quant.planning.recommendation import recommend as choose
    from quant.planning.render import show_recommendation

    if (model_path is None) == (model is None):
        raise UsageError("give the model once: --model-path DIRECTORY, or --model NAME")
    subject: str | Path = Path(model_path) if model_path is not None else str(model)
    found = choose(
        subject, gpu, engine, scenario=scenario, policy=policy, scheme=scheme, gpu_count=gpu_count, gpu_memory=gpu_memory,
        tensor_parallel_given=tensor_parallel_given,
    )  # fmt: skip
    out.result(found.to_dict(), lambda console: show_recommendation(found, console))
    if found.recommended is None:
        raise click.exceptions.Exit(3)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``quant`` command."""
    run(cli, "quant", argv)


if __name__ == "__main__":
    main()
