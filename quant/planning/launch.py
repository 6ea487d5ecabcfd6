"""What is run: the commands that make and serve a recommended checkpoint, and which engine suits the need."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.hardware import Gpu
from quant.hub import named, repository_of
from quant.models.spec import ModelSpec
from quant.planning.choice import Goal
from quant.planning.memory import MemoryPlan
from quant.planning.request import EngineRequest
from quant.planning.scheme_plans import SchemePlan
from quant.vllm.kernels import (
    formats_of,
)

#: stands in commands for the owner of a model on the Hub that is not known
OWNER = "OWNER"


@dataclass(frozen=True)
class Engine:
    """A serving engine and whether it suits the need."""

    name: str
    suits: bool
    why: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def commands_for(
    spec: ModelSpec,
    model: object,
    chosen: SchemePlan,
    method: str | None,
    request: EngineRequest,
    output_path: str | None,
) -> tuple[str, ...]:
    """The exact commands: make the checkpoint (unless it is served as it is), then serve it."""
    assert chosen.plan is not None
    source, _, revision = _source(spec, model).partition("@")
    of_revision = ["--revision", revision] if revision else []
    if chosen.scheme == "none":
        return (shlex.join([*shlex.split(serve_command(source, chosen.plan, request)), *of_revision]),)
    target = output_path or f"{Path(source).name}-{chosen.scheme}"
    fetch: tuple[str, ...] = ()
    # known by name only: quantizing needs its tensors
    if isinstance(model, str) and not Path(model).is_dir():
        there = ["--local-dir", Path(source).name]
        fetch = (shlex.join(["hf", "download", source, *of_revision, *there]),)
        source = Path(source).name
    parts = [
        "quant",
        "quantize",
        "--model-path",
        source,
        "--output-path",
        target,
        "--method",
        str(method),
        "--scheme",
        chosen.scheme,
    ]
    if chosen.group_size:
        parts += ["--group-size", str(chosen.group_size)]
    for key, value in chosen.row.needs.items():
        parts += [f"--{key.replace('_', '-')}", value]
    if request.ranks > 1:
        parts += ["--tensor-parallel", str(request.ranks)]
    return (*fetch, shlex.join(parts), serve_command(target, chosen.plan, request))


def _source(spec: ModelSpec, model: object) -> str:
    """What commands call the model: its Hub id where it has one, else its path. A name without an owner gets
    :data:`OWNER` before it."""
    if isinstance(model, Path) and repository_of(model):
        return named(model)
    if spec.hub or not isinstance(model, (str, Path)):
        return spec.hub or spec.name
    return str(model) if Path(model).exists() else f"{OWNER}/{str(model).strip()}"


def serve_command(checkpoint: str, planned: MemoryPlan, request: EngineRequest) -> str:
    """``vllm serve`` with the arguments that the plan was made with; defaults are left out.

    The context is always given: a default that depends on the model would make another plan than this one.
    """
    parts = ["vllm", "serve", checkpoint, "--max-model-len", str(planned.context)]
    if planned.tensor_parallel > 1:
        parts += ["--tensor-parallel-size", str(planned.tensor_parallel)]
    if planned.pipeline_parallel > 1:
        parts += ["--pipeline-parallel-size", str(planned.pipeline_parallel)]
    if request.dtype is not None:
        parts += ["--dtype", request.dtype]
    if request.gpu_memory_utilization is not None:
        parts += ["--gpu-memory-utilization", f"{request.gpu_memory_utilization:g}"]
    if request.kv_cache_dtype != "auto":
        parts += ["--kv-cache-dtype", request.kv_cache_dtype]
    if request.max_num_seqs is not None or planned.asks_sequences:
        parts += ["--max-num-seqs", str(planned.max_num_seqs)]
    if request.max_num_batched_tokens is not None:
        parts += ["--max-num-batched-tokens", str(request.max_num_batched_tokens)]
    for name in ("enforce_eager", "enable_expert_parallel", "language_model_only"):
        if getattr(request, name):
            parts.append(f"--{name.replace('_', '-')}")
    if request.limit_mm_per_prompt:
        parts += ["--limit-mm-per-prompt", json.dumps(dict(request.limit_mm_per_prompt))]
    if request.mm_encoder_tp_mode != "weights":
        parts += ["--mm-encoder-tp-mode", request.mm_encoder_tp_mode]
    return shlex.join(parts)


def engines_for(
    gpu: Gpu, plans: Sequence[SchemePlan], request: EngineRequest, goal: Goal
) -> tuple[Engine, ...]:
    """The engines in order of preference for this need; the first that suits is taken."""
    fits = any(p.meets for p in plans)
    cpu = gpu.platform == "cpu"
    laptop = gpu.kind == "laptop" and request.concurrency == 1
    latency = goal.objective == "latency"
    modern = gpu.platform == "cuda" and formats_of(gpu)["fp8"] == "native"
    if cpu:
        vllm = Engine("vLLM", False, "its CPU build serves, slower than llama.cpp for one user")
        llama = Engine("llama.cpp / Ollama", True, "runs a 4-bit GGUF on the CPU")
    else:
        vllm = Engine("vLLM", fits, "it holds what was asked" if fits else "no plan holds what was asked")
        why = (
            "one user on a laptop"
            if laptop
            else "for one user"
            if fits
            else "a 4-bit GGUF, with the layers that fit on the GPU"
        )
        llama = Engine("llama.cpp / Ollama", laptop or not fits, why)
    why = (
        "compiled kernels for one fixed model; worth its build where latency is all"
        if modern
        else "needs a GPU that computes in FP8"
    )
    trt = Engine("TensorRT-LLM", modern and latency and fits, why)
    tgi = Engine(
        "TGI",
        False,
        "for deployments that already run it; its development has ended, and vLLM serves the same models",
    )
    return (vllm, trt, llama, tgi) if vllm.suits else (llama, vllm, trt, tgi)
