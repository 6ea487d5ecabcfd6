"""``quant prune``: the same model with fewer weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant import defaults
from quant.commands import options
from quant.commands.options import given
from quant.commands.quantize import calibration_options, fresh, run_job, selection_options
from quant.commands.terminal import Output, common_options, resumable
from quant.errors import UsageError

#: Methods that set weights to zero.
_OF_WEIGHTS = tuple(name for name in sorted(defaults.UNROUNDED) if name != "none")
#: Options that belong to one of the two kinds alone.
_WEIGHTS, _BLOCKS = ("method", "sparsity", "pattern", "layers", "ignore"), ("importance",)


@click.command()
@options.model_path()
@options.output_path()
@click.option(
    "--sparsity",
    type=float,
    help="Set this share of the weights of every linear of the decoder to zero, above 0 and below 1.",
)
@click.option("--pattern", metavar="N:M", help="The same for all but N of every M weights: 2:4, 4:8.")
@click.option(
    "--method",
    type=click.Choice(_OF_WEIGHTS),
    default="sparsegpt",
    show_default=True,
    help="Which weights go: the smallest; those that are smallest beside their inputs; those whose absence "
    "the others can make up for, which are fitted to it.",
)
@selection_options
@click.option(
    "--drop-blocks", type=int, help="Leave out so many decoder blocks, those that the model needs least."
)
@click.option("--blocks", metavar="N,N,...", help="Leave out these decoder blocks.")
@click.option(
    "--importance",
    type=click.Choice(["kl", "angle"]),
    default="kl",
    show_default=True,
    help="What a block counts for: KL divergence of the model without it; or how far it turns the hidden "
    "states, which takes one pass.",
)
@calibration_options
@options.device
@fresh
@options.upload
@common_options
def prune(out: Output, model_path: Path, output_path: Path, **asked: Any) -> None:
    """Make a model smaller: set weights to zero, or leave out whole decoder blocks. What is made is an
    ordinary checkpoint in the source's dtype, to be served, or quantized, like any other.

    \b
    quant prune -m models/Llama-3.1-8B -o out/Llama-3.1-8B-28 --drop-blocks 4
    """
    of_blocks = [k for k in ("drop_blocks", "blocks") if asked[k] is not None]
    of_weights = [k for k in ("sparsity", "pattern") if asked[k] is not None]
    if len(of_blocks) + len(of_weights) != 1:
        raise UsageError(
            "give one of --sparsity, --pattern, --drop-blocks and --blocks: the first two set weights to "
            "zero, the others leave blocks out"
        )
    explicit = given(asked)
    foreign = [k for k in (_WEIGHTS if of_blocks else _BLOCKS) if k in explicit]
    if foreign:
        named = ", ".join(f"--{k.replace('_', '-')}" for k in foreign)
        raise UsageError(f"{named}: not of --{(of_blocks or of_weights)[0].replace('_', '-')}: leave it out")
    if of_blocks:
        _without_blocks(out, model_path, output_path, asked, explicit)
        return
    skipped = {"drop_blocks", "blocks", "importance", "method", "sparsity", "pattern"}
    values = {k: v for k, v in explicit.items() if k not in skipped}
    setting = {k: asked[k] for k in of_weights}
    run_job(
        out,
        {
            **values,
            "model_path": model_path,
            "output_path": output_path,
            "method": asked["method"],
            "format": "plain",
            "options": setting,
        },
    )


def _without_blocks(
    out: Output, model_path: Path, output_path: Path, asked: dict[str, Any], explicit: dict[str, Any]
) -> None:
    from quant.commands.render import results
    from quant.commands.uploading import finish

    with resumable(), out.progress() as progress:
        from quant.pipeline.memory import prepare_torch

        prepare_torch()
        from quant.pruning import Depth, drop_blocks
        from quant.upload import destination, upload_problem

        to = destination(*(asked[k] for k in ("push_to_hub", "private", "commit_message", "replace_on_hub")))
        if to is not None and (problem := upload_problem(to)):
            raise UsageError(problem)
        if asked["chat_template"] is not None:
            raise UsageError("--chat-template: blocks are measured on plain text: leave it out")
        text = ("calibration_dataset", "samples", "sequence_length", "shuffle", "seed")
        depth = Depth(
            drop=asked["drop_blocks"] or 0,
            blocks=_numbers(asked["blocks"]),
            measure=asked["importance"],
            device=asked["device"],
            **{k: explicit[k] for k in text if k in explicit},
        )
        if asked["drop_blocks"] is not None and asked["drop_blocks"] < 1:
            raise UsageError(f"--drop-blocks is {asked['drop_blocks']}: at least one goes")
        report = drop_blocks(
            model_path, output_path, depth, progress, out.outcome.command, bool(asked["fresh"])
        )
    out.seconds = dict(report.seconds)
    finish(out, report, to, results.pruning)


def _numbers(text: str | None) -> tuple[int, ...]:
    """Numbers of blocks: 3,5 or 20-23.

    Raises:
        UsageError: something else.
    """
    found: list[int] = []
    for part in (text or "").split(",") if text is not None else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 12:
            raise UsageError(f"--blocks is {text!r}: numbers of blocks are needed, such as 3,5 or 20-23")
        end = int(last) if dash else int(first)
        if end < int(first) or end - int(first) > 10_000:
            raise UsageError(f"--blocks is {text!r}: {part.strip()} is no range of blocks")
        found += range(int(first), end + 1)
    return tuple(found)
