"""``quant recommend``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant import defaults
from quant.commands import options
from quant.commands.terminal import Output, common_options
from quant.commands.types import TOKENS, ItemLimits, Size
from quant.errors import UsageError
from quant.vllm.arguments import TOWER_MODES

if TYPE_CHECKING:
    from quant.planning.request import EngineRequest

#: option → the field of EngineRequest
_FIELDS = (
    "context", "concurrency", "kv_cache_dtype", "tensor_parallel", "pipeline_parallel",
    "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "vllm_version",
    "enable_expert_parallel", "language_model_only", "limit_mm_per_prompt", "mm_encoder_tp_mode",
)  # fmt: skip


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's arguments as planning options; the command receives them as one :class:`EngineRequest` in
    ``engine``."""

    @options.context
    @options.concurrency
    @options.kv_cache_dtype
    @options.tensor_parallel("all")
    @click.option("--pipeline-parallel", type=int, default=1, show_default=True, help="Stages of layers.")
    @options.gpu_memory_utilization
    @options.max_num_seqs
    @click.option("--max-num-batched-tokens", type=TOKENS, help="Tokens in one batch.")
    @click.option("--enforce-eager", is_flag=True, help="No CUDA graphs: less memory, slower decoding.")
    @click.option(
        "--enable-expert-parallel", is_flag=True, help="GPUs hold whole experts, not a part of each."
    )
    @click.option("--language-model-only", is_flag=True, help="Leave the vision tower out.")
    @click.option(
        "--limit-mm-per-prompt",
        type=ItemLimits(),
        default="{}",
        show_default="vLLM's own",
        help="Images and videos a prompt may have: video=0 saves memory.",
    )
    @click.option(
        "--mm-encoder-tp-mode",
        type=click.Choice(TOWER_MODES),
        default="weights",
        show_default=True,
        help="GPUs share the vision tower's weights, or each holds it whole (data).",
    )
    @options.vllm_version
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from quant.planning.request import EngineRequest

        asked = {name: kwargs.pop(name) for name in _FIELDS}
        return command(*args, engine=EngineRequest(**asked), **kwargs)

    return wrapped


@click.command()
@options.model_path(required=False, download=False)
@click.option(
    "--model",
    metavar="NAME",
    shell_complete=options.completed("models"),
    help="A model by name, where there is no checkpoint: Qwen2.5-7B-Instruct; or by Hub id.",
)
@click.option(
    "--online",
    is_flag=True,
    is_eager=True,
    help="Read the config.json of a Hub id from the Hub where the cache lacks it; weights are not fetched.",
)
@options.gpu
@click.option("--gpu-count", type=int, help="How many GPUs: all that are here, or as --gpu says.")
@click.option(
    "--gpu-memory",
    type=Size(),
    help="Memory of one GPU where it is not the table's: 40GiB; alone, a plan for any GPU of that size.",
)
@engine_options
@options.scheme("the best of all that may be recommended")
@click.option(
    "--policy", default="vllm", show_default=True, help="vllm, or rule-of-thumb (the original design's)."
)
@click.option(
    "--objective",
    type=click.Choice(tuple(defaults.OBJECTIVES)),
    show_default="the scenario's, else balanced",
    help="What decides among the schemes that fit: the fastest within "
    f"{defaults.OBJECTIVES['balanced'][1]:g} % of expected loss, the most precise, or the fastest within "
    f"{defaults.OBJECTIVES['throughput'][1]:g} %, for all requests or for one.",
)
@click.option(
    "--scenario",
    metavar="NAME",
    shell_complete=options.completed("scenarios"),
    help="chat, code, high-throughput, low-latency or multi-model.",
)
@common_options
def recommend(
    model_path: Path | None, model: str | None, online: bool, gpu: str | None, gpu_count: int | None,
    gpu_memory: int | None, engine: EngineRequest,
    scheme: str | None, policy: str, objective: str | None, scenario: str | None, out: Output,
) -> None:  # fmt: skip
    """Which scheme fits this model on this or a named GPU, and why. Of a checkpoint only the headers are
    read; --scheme plans just that one, `none` the checkpoint as it is. Exit status 3 when nothing fits.

    \b
    quant recommend --model-path ./Llama-3.1-8B-Instruct
    quant recommend --model Qwen2.5-32B-Instruct --gpu L40S-48GB --context 16384 --concurrency 4
    """
    from quant.checkpoint.reader import open_checkpoint
    from quant.commands.render import planning
    from quant.evaluation.agreement import demand_agreement
    from quant.planning.recommendation import recommend as choose

    if (model_path is None) == (model is None):
        raise UsageError("give the model once: --model-path DIRECTORY, or --model NAME")
    if model == "":
        raise UsageError("--model is empty: give a name such as Qwen2.5-7B-Instruct")
    if model_path is not None and any(model_path.glob("*.safetensors")):
        # what is printed would be refused by the command that it is for
        demand_agreement(open_checkpoint(model_path), build=False)
    with out.progress("asking the Hub") if online else nullcontext():
        recommendation = choose(
            model_path if model_path is not None else str(model),
            gpu,
            engine,
            scenario=scenario,
            objective=objective,
            policy=policy,
            scheme=scheme,
            gpu_count=gpu_count,
            gpu_memory=gpu_memory,
            online=online,
        )
    out.result(
        recommendation.to_dict(), lambda console: planning.show_recommendation(recommendation, console)
    )
    out.details(planning.speeds(recommendation))
    out.details(planning.sources(recommendation))
    if recommendation.recommended is None:
        raise click.exceptions.Exit(3)
