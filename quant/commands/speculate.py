"""``quant-deploy speculate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant.commands import options
from quant.commands.terminal import Output, common_options
from quant.commands.types import MODEL, PATH, FiniteRange
from quant.errors import UsageError, VerificationFailed
from quant.vllm.speculation import PROPOSERS


@click.command()
@options.one_checkpoint
@click.option(
    "--draft",
    type=MODEL,
    help="Smaller checkpoint that guesses: of the same tokenizer, or trained for this one (EAGLE-3).",
)
@click.option(
    "--proposer",
    "method",
    type=click.Choice(list(PROPOSERS)),
    show_default="what gains most, if any",
    help="Take this one.",
)
@click.option(
    "--tokens", type=click.IntRange(1, 32), default=5, show_default=True, help="Most tokens guessed at once."
)
@click.option(
    "--ngram",
    default="5,2",
    show_default=True,
    metavar="MAX,MIN",
    help="Longest and shortest run of tokens whose continuation is looked up.",
)
@click.option("--temperature", type=FiniteRange(0), default=0.0, show_default=True, help="Of sampling.")
@click.option(
    "--top-p", type=FiniteRange(0, 1, min_open=True), default=1.0, show_default=True, help="Of sampling."
)
@click.option(
    "--text", type=PATH, show_default="the bundled wikitext-2 test", help="Text to cut prompts from."
)
@click.option(
    "--prompt-count",
    "prompts",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Prompts measured.",
)
@click.option("--prompt-tokens", type=click.IntRange(8), default=64, show_default=True, help="Of each.")
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True, help="Of each answer.")
@click.option(
    "--sequences",
    "concurrency",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Sequences at a time, for --gpu: speculation pays little where many are served.",
)
@options.gpu
@click.option("--prove", is_flag=True, help="Serve it in vLLM without and with the choice, and compare.")
@options.vllm_python
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling.")
@options.device
@common_options
def speculate(
    out: Output,
    checkpoint: Path,
    ngram: str,
    tokens: int,
    temperature: float,
    top_p: float,
    prove: bool,
    vllm_python: Path | None,
    **given: Any,
) -> None:
    """Which speculative decoding pays for a checkpoint: its own prediction heads (MTP), an EAGLE-3 or DFlash
    draft, a smaller model, n-grams, suffixes. Acceptance is measured by exact rejection sampling on real
    text, speed-up follows from it, vLLM's --speculative-config is written, with --prove proved there.

    \b
    quant-deploy speculate out/Llama-3.1-8B-W4A16 --draft out/Llama-3.2-1B-W4A16 --gpu L40S-48GB
    """
    from quant.commands.render import speculation as render

    with out.progress("loading") as progress:  # torch, too, whose import is the longest wait of a short run
        from quant.speculation.measure import grid
        from quant.speculation.run import SpeculationRequest, predicted, prove_in_vllm
        from quant.speculation.run import speculate as run
        from quant.speculation.sampling import Sampling

        request = SpeculationRequest(
            most=tokens, ngram=_bounds(ngram), sampling=Sampling(temperature, top_p),
            new_tokens=given.pop("new_tokens"), prompt_tokens=given.pop("prompt_tokens"), **given,
        )  # fmt: skip
        value = run(checkpoint, request, progress)
        if prove:
            from quant.progress import Event

            found = predicted(value, checkpoint, request)
            value["predicted"] = None if found is None else found.to_dict()
            progress(Event("proving in vLLM", detail="without and with the speculation"))
            log = lambda line: out.details([line])  # noqa: E731
            value["vllm"] = prove_in_vllm(checkpoint, value, request, vllm_python, log)
    value["expected_tokens"] = grid((0.3, 0.5, 0.6, 0.7, 0.8, 0.9), (1, 2, 3, 4, 5, 8))
    out.result(value, lambda console: render.speculation(console, value, out.verbose))
    if not value.get("vllm", {"same": True})["same"]:
        proof = value["vllm"]
        raise VerificationFailed(
            f"vLLM's greedy text changes with the speculation in {proof['texts'] - proof['equal_texts']} of "
            f"{proof['texts']} prompts: kernels that round by batch shape may do that; compare in fp32 "
            "(-- --dtype float32), and do not use it where texts must repeat"
        )


def _bounds(text: str) -> tuple[int, int]:
    try:
        longest, shortest = map(int, text.split(","))
    except ValueError:
        longest = shortest = 0
    if not 1 <= shortest <= longest <= 64:
        raise UsageError(f"--ngram is {text!r}: give the longest and the shortest run, such as 5,2")
    return longest, shortest
