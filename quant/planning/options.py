"""The options that ``recommend`` shares with other commands that plan, as one decorator, and what they mean
as one request."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from quant.planning.memory import EngineRequest
from quant.terminal import Size
from quant.vllm.releases import VLLM_VERSION

#: option → the field of EngineRequest
_FIELDS = (
    "context", "concurrency", "kv_cache_dtype", "tensor_parallel", "pipeline_parallel",
    "gpu_memory_utilization", "max_num_seqs",
    "max_num_batched_tokens", "enforce_eager", "vllm_version",
)  # fmt: skip


def gpu_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--gpu``, ``--gpu-count`` and ``--gpu-memory``."""
    for option in (
        click.option(
            "--gpu-memory", type=Size(), help="Memory of one GPU where it is not the table's: 40GiB."
        ),
        click.option(
            "--gpu-count", type=int, help="How many GPUs: all that are here, or one of a named part."
        ),
        click.option(
            "--gpu",
            metavar="NAME",
            help="Plan for this GPU instead of those here: L40S-48GB, h100, 'RTX 3070 Ti Laptop', cpu.",
        ),
    ):
        command = option(command)
    return command


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's arguments as planning options; the command receives them as one :class:`EngineRequest` in
    ``engine``."""

    @click.option("--context", type=int, help="Tokens of the longest request (vLLM's --max-model-len).")
    @click.option(
        "--concurrency",
        type=int,
        default=1,
        show_default=True,
        help="Requests of that length at the same time.",
    )
    @click.option(
        "--kv-cache-dtype", default="auto", show_default=True, help="auto (the model's own) or fp8."
    )
    @click.option("--tensor-parallel", type=int, help="GPUs that share every layer [default: all].")
    @click.option("--pipeline-parallel", type=int, default=1, show_default=True, help="Stages of layers.")
    @click.option(
        "--gpu-memory-utilization", type=float, help="Share of the GPU's whole memory that vLLM may use."
    )
    @click.option("--max-num-seqs", type=int, help="Sequences in one batch.")
    @click.option("--max-num-batched-tokens", type=int, help="Tokens in one batch.")
    @click.option("--enforce-eager", is_flag=True, help="No CUDA graphs: less memory, slower decoding.")
    @click.option(
        "--vllm-version",
        default=VLLM_VERSION,
        show_default=True,
        help="The release whose accounting is used.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in _FIELDS}
        return command(*args, engine=EngineRequest(**given), **kwargs)

    return wrapped
