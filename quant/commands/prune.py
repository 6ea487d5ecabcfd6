"""``quant prune``: the same model with fewer weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from quant import defaults
from quant.commands import options
from quant.commands.options import given
from quant.commands.quantize import fresh, run_job, selection_options, text_options
from quant.commands.terminal import Output, common_options, resumable
from quant.errors import UsageError, clipped
from quant.units import numbers

#: Methods that set weights to zero.
_OF_WEIGHTS = tuple(name for name in sorted(defaults.UNROUNDED) if name != "none")
#: The three kinds of pruning: the options that ask for one, and those that belong to it alone.
_KINDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "weights": (("sparsity", "pattern"), ("method", "layers", "ignore")),
    "blocks": (("drop_blocks", "blocks"), ("importance",)),
    "widths": (("experts", "intermediate_size", "kv_heads"), ("multiple_of", "tensor_parallel")),
}


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
    type=click.Choice(defaults.IMPORTANCES),
    default="kl",
    show_default=True,
    help="What a block counts for: KL divergence of the model without it; or how far it turns the hidden "
    "states, which takes one pass.",
)
@click.option(
    "--experts",
    type=int,
    help="Keep so many routed experts of each layer, those that add most to the tokens sent to them.",
)
@click.option(
    "--intermediate-size",
    type=int,
    help="Keep so many channels of each MLP, and fit its down projection to the loss of the others.",
)
@click.option(
    "--kv-heads",
    type=int,
    help="Keep so many KV heads of each block with all their query heads, and fit the output projection.",
)
@click.option(
    "--multiple-of",
    type=click.IntRange(1, 65536),
    default=128,
    show_default=True,
    help="Of what --intermediate-size is a multiple.",
)
@options.tensor_parallel(1)
@text_options(
    f"16 for blocks, else {defaults.SAMPLES}",
    f"512, for weights {defaults.SEQUENCE_LENGTH}, or the model's where that is smaller",
)
@options.device
@fresh
@options.upload
@common_options
def prune(out: Output, model_path: Path, output_path: Path, **asked: Any) -> None:
    """Make a model smaller: set weights to zero, leave out whole decoder blocks, or make all of them
    narrower. What is made is an ordinary checkpoint in the source's dtype, to be served, or quantized, like
    any other.

    \b
    quant prune -m models/Llama-3.1-8B -o out/Llama-3.1-8B-28 --drop-blocks 4
    quant prune -m models/Qwen3-30B-A3B -o out/Qwen3-30B-A3B-96 --experts 96
    """
    kind, chosen = _kind(asked)
    explicit = given(asked)
    foreign = [k for other, (_, own) in _KINDS.items() if other != kind for k in own if k in explicit]
    if foreign:
        raise UsageError(f"{_named(foreign)}: not of {_named(chosen[:1])}: leave it out")
    if kind != "weights":
        _smaller(out, model_path, output_path, kind, asked, explicit)
        return
    skipped = {name for asks, own in _KINDS.values() for name in (*asks, *own)} - {"layers", "ignore"}
    values = {k: v for k, v in explicit.items() if k not in skipped}
    setting = {k: asked[k] for k in chosen}
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


def _named(keys: Sequence[str]) -> str:
    return ", ".join(f"--{k.replace('_', '-')}" for k in keys)


def _kind(asked: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Which kind of pruning is asked for, and by which options.

    Raises:
        UsageError: none, or several; widths may be asked for together.
    """
    found = {kind: [k for k in asks if asked[k] is not None] for kind, (asks, _) in _KINDS.items()}
    found = {kind: chosen for kind, chosen in found.items() if chosen}
    if len(found) != 1 or any(len(chosen) > 1 for kind, chosen in found.items() if kind != "widths"):
        raise UsageError(
            "give one of --sparsity and --pattern (weights become zero), --drop-blocks and --blocks (blocks "
            "are left out), or any of --experts, --intermediate-size and --kv-heads (narrower blocks); "
            "to do several, prune what came out again"
        )
    return next(iter(found.items()))


def _smaller(
    out: Output,
    model_path: Path,
    output_path: Path,
    kind: str,
    asked: Mapping[str, Any],
    explicit: Mapping[str, Any],
) -> None:
    from quant.commands.render import results
    from quant.commands.uploading import finish

    with resumable(), out.progress() as progress:
        from quant.pipeline.memory import prepare_torch

        prepare_torch()
        from quant.pruning import Depth, Width, drop_blocks, narrow
        from quant.upload import destination, upload_problem

        to = destination(*(asked[k] for k in ("push_to_hub", "private", "commit_message", "replace_on_hub")))
        if to is not None and (problem := upload_problem(to)):
            raise UsageError(problem)
        if asked["chat_template"] is not None:
            raise UsageError("--chat-template: blocks are measured on plain text: leave it out")
        named = ("calibration_dataset", "samples", "sequence_length", "shuffle", "seed")
        text = {k: explicit[k] for k in named if k in explicit}
        rest = progress, out.outcome.command, bool(asked["fresh"])
        if kind == "widths":
            width = Width(
                experts=asked["experts"],
                channels=asked["intermediate_size"],
                heads=asked["kv_heads"],
                multiple_of=asked["multiple_of"],
                tensor_parallel=asked["tensor_parallel"],
                device=asked["device"],
                **text,
            )
            report = narrow(model_path, output_path, width, *rest)
        else:
            depth = Depth(
                drop=asked["drop_blocks"] or 0,
                blocks=_blocks(asked["blocks"]),
                measure=asked["importance"],
                device=asked["device"],
                **text,
            )
            if asked["drop_blocks"] is not None and asked["drop_blocks"] < 1:
                raise UsageError(f"--drop-blocks is {asked['drop_blocks']}: at least one goes")
            report = drop_blocks(model_path, output_path, depth, *rest)
    out.seconds = dict(report.seconds)
    finish(out, report, to, results.pruning)


def _blocks(text: str | None) -> tuple[int, ...]:
    """Numbers of blocks: 3,5 or 20-23.

    Raises:
        UsageError: something else.
    """
    try:
        return () if text is None else numbers(text)
    except ValueError as error:
        raise UsageError(
            f"--blocks is {clipped(text)}: {error}: numbers of blocks are needed, such as 3,5 or 20-23"
        ) from error
