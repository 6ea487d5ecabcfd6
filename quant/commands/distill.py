"""``quant distill``: a smaller or quantized model taught by its source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from quant import defaults
from quant.commands import options
from quant.commands.bench import endpoint_of, endpoint_options
from quant.commands.options import given
from quant.commands.quantize import fresh, text_options
from quant.commands.terminal import Output, common_options, resumable
from quant.commands.types import PATH, ModelType
from quant.errors import QuantError, UsageError

#: Options that say how data is made, and go with --generate alone.
_GENERATING = (
    "url", "answers", "concurrency", "max_tokens", "sampling_temperature", "shortest", "model", "chat",
    "api_key_env", "ca", "insecure", "stall",
)  # fmt: skip
#: Those that both uses have.
_BOTH = ("generate", "output_path", "seed", "fresh")


@click.command()
@options.model_path(required=False)
@options.output_path()
@click.option(
    "--teacher",
    type=ModelType(True),
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
    show_default="2e-4 for weights, 5e-3 for norms and scales, as shares of themselves",
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
@click.option(
    "--feature-weight",
    type=float,
    default=0.0,
    show_default=True,
    help="Of the difference between the hidden states of both behind matching blocks, added to the loss.",
)
@click.option(
    "--generate",
    type=PATH,
    metavar="TASKS",
    help="Make text instead of training: --url answers these tasks, one a line (text, or JSON with prompt or "
    "messages), into the JSON lines of --output-path.",
)
@click.option("--url", help="Endpoint, such as http://127.0.0.1:8000, that answers the tasks of --generate.")
@click.option("--answers", type=int, default=1, show_default=True, help="--generate: to each task.")
@click.option("--concurrency", type=int, default=8, show_default=True, help="--generate: requests at a time.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="--generate: of an answer.")
@click.option(
    "--sampling-temperature", type=float, default=0.7, show_default=True, help="--generate: of the answers."
)
@click.option(
    "--shortest", type=int, default=20, show_default=True, help="--generate: least characters of an answer."
)
@endpoint_options
@text_options(defaults.LESSON_SAMPLES, "the smaller of 512 and the model's")
@options.device
@fresh
@options.upload
@common_options
def distill(out: Output, output_path: Path, **asked: Any) -> None:
    """Teach a pruned or quantized model what its source says: what is written is the same checkpoint with
    better numbers in it. A quantized one keeps its codes; its norms and scales are trained.

    \b
    quant distill -m out/Llama-3.1-8B-28 --teacher models/Llama-3.1-8B -o out/Llama-3.1-8B-28-taught
    quant distill --generate tasks.txt --url http://127.0.0.1:8000 --chat -o data.jsonl
    """
    explicit = given(asked)
    if asked["generate"] is not None:
        if foreign := sorted(explicit.keys() - {*_GENERATING, *_BOTH}):
            raise UsageError(f"{_named(foreign)}: not of --generate, which trains nothing: leave it out")
        _generate(out, output_path, asked)
        return
    if foreign := [k for k in _GENERATING if k in explicit]:
        raise UsageError(f"{_named(foreign)}: of --generate alone: leave it out, or give --generate")
    if missing := [k for k in ("model_path", "teacher") if asked[k] is None]:
        raise UsageError(f"{_named(missing)} is missing: a student and its teacher are needed to train")
    _teach(out, output_path, asked, explicit)


def _named(keys: Iterable[str]) -> str:
    called = {"model": "served-model"}
    return ", ".join(f"--{called.get(k, k).replace('_', '-')}" for k in keys)


def _generate(out: Output, output_path: Path, asked: Mapping[str, Any]) -> None:
    from quant.commands.render.results import generated
    from quant.distillation.generate import Generation, generate

    if asked["url"] is None:
        raise UsageError("--generate: give --url of the endpoint that answers")
    how = Generation(
        asked["generate"],
        asked["answers"],
        asked["concurrency"],
        asked["max_tokens"],
        asked["sampling_temperature"],
        asked["seed"],
        asked["shortest"],
    )
    with resumable(), out.progress() as progress:
        made = generate(how, endpoint_of(asked["url"], asked), output_path, progress, bool(asked["fresh"]))
    out.result(made.to_dict(), lambda console: generated(console, made))


def _teach(out: Output, output_path: Path, asked: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
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
        own = {k: v for k, v in explicit.items() if k in Distillation.__dataclass_fields__}
        how = Distillation(**own, alpha=asked["teacher_share"])
        report = taught(
            asked["model_path"],
            asked["teacher"],
            output_path,
            how,
            progress,
            out.outcome.command,
            bool(asked["fresh"]),
        )
    out.seconds = dict(report.seconds)
    finish(out, report, to, results.teaching)
