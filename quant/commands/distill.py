"""``quant distill``: a smaller or quantized model taught by its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant.commands import options
from quant.commands.options import given
from quant.commands.quantize import calibration_options, fresh
from quant.commands.terminal import Output, common_options, resumable
from quant.commands.types import ModelType
from quant.errors import QuantError, UsageError


@click.command()
@options.model_path()
@options.output_path()
@click.option(
    "--teacher",
    type=ModelType(True),
    required=True,
    help="The checkpoint whose words are learned: what the model was pruned or quantized from.",
)
@click.option("--steps", type=int, default=200, show_default=True, help="Steps of the optimizer.")
@click.option("--batch", type=int, default=4, show_default=True, help="Rows a step.")
@click.option(
    "--accumulate", type=int, default=1, show_default=True, help="Batches of which a step has the gradients."
)
@click.option(
    "--learning-rate",
    type=float,
    show_default="2e-4 for weights, 2e-3 for norms and scales, as shares of themselves",
    help="The highest; it rises over a twentieth of the steps and falls as a cosine.",
)
@click.option(
    "--teacher-temperature",
    "temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Of both distributions, while training.",
)
@click.option(
    "--teacher-share",
    type=float,
    default=1.0,
    show_default=True,
    help="Of the loss; the rest is the cross-entropy of the text itself.",
)
@click.option(
    "--train",
    type=click.Choice(["weights", "numbers"]),
    show_default="numbers of a quantized model, else weights",
    help="All weights; or norms, biases and scales alone.",
)
@click.option(
    "--held-out", type=int, default=8, show_default=True, help="Rows to judge on, behind those of --samples."
)
@click.option("--judge-every", type=int, default=20, show_default=True, help="Steps between two judgements.")
@click.option(
    "--patience",
    type=int,
    default=5,
    show_default=True,
    help="Judgements without a better one after which it ends; 0: never.",
)
@click.option(
    "--recompute",
    is_flag=True,
    help="Run blocks once more on the way back, which takes a third more time and far less memory.",
)
@calibration_options
@options.device
@fresh
@options.upload
@common_options
def distill(
    out: Output, model_path: Path, output_path: Path, teacher: Path, teacher_share: float, **asked: Any
) -> None:
    """Teach a pruned or quantized model what its source says: what is written is the same checkpoint with
    better numbers in it. A quantized one keeps its codes; its norms and scales are trained.

    \b
    quant distill -m out/Llama-3.1-8B-28 --teacher models/Llama-3.1-8B -o out/Llama-3.1-8B-28-taught
    """
    from quant.commands.render import results
    from quant.commands.uploading import finish

    with resumable(), out.progress() as progress:
        from quant.pipeline.memory import prepare_torch

        prepare_torch()
        from quant.distillation import Distillation
        from quant.distillation import distill as taught
        from quant.upload import destination, upload_problem

        to = destination(*(asked[k] for k in ("push_to_hub", "private", "commit_message", "replace_on_hub")))
        if to is not None and (problem := upload_problem(to)):
            raise QuantError(problem)
        if asked["chat_template"] is not None:
            raise UsageError("--chat-template: students are taught on plain text: leave it out")
        own = {k: v for k, v in given(asked).items() if k in Distillation.__dataclass_fields__}
        how = Distillation(**own, alpha=teacher_share)
        report = taught(
            model_path, teacher, output_path, how, progress, out.outcome.command, bool(asked["fresh"])
        )
    out.seconds = dict(report.seconds)
    finish(out, report, to, results.teaching)
