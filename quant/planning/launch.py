"""What is run: the commands that make and serve a recommended checkpoint, and which engine suits the need."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant import defaults
from quant.engines import ENGINES, reading_problem
from quant.engines.base import UNQUANTIZED
from quant.hardware import Gpu
from quant.hub import named, repository_of
from quant.models.spec import ModelSpec
from quant.models.support import GRADIENTS
from quant.planning.choice import Goal
from quant.planning.gguf import advised
from quant.planning.memory import MemoryPlan
from quant.planning.request import EngineRequest
from quant.planning.scheme_plans import SchemePlan
from quant.schemes import AS_IT_IS, PRESETS, Scheme
from quant.vllm.architectures import own_code
from quant.vllm.arguments import TRUST
from quant.vllm.kernels import kernel_of

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
    made = f"{Path(source).name.removesuffix('.gguf')}-{chosen.scheme}"
    target = source if chosen.scheme == "none" else output_path or made
    serve = serve_command(target, chosen.plan, request)
    if own_code(spec.config):
        serve += f" --{TRUST}"
    if chosen.scheme == "none":
        return (shlex.join([*shlex.split(serve), *of_revision]),)
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
        # which goes on without gradients where a block turns out to have none
        *(["--effort", defaults.EFFORT] if method in GRADIENTS else ["--method", str(method)]),
        "--scheme",
        chosen.scheme,
    ]
    if chosen.group_size:
        parts += ["--group-size", str(chosen.group_size)]
    for key, value in chosen.row.needs.items():
        parts += [f"--{key.replace('_', '-')}", value]
    if request.ranks > 1:
        parts += ["--tensor-parallel", str(request.ranks)]
    return (*fetch, shlex.join(parts), serve)


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
    gpu: Gpu,
    plans: Sequence[SchemePlan],
    request: EngineRequest,
    goal: Goal,
    spec: ModelSpec,
    chosen: SchemePlan | None,
) -> tuple[Engine, ...]:
    """The engines in order of preference for this need; the first that suits is taken.

    llama.cpp comes first where there is no GPU, one user on a laptop, or no plan that holds what was asked:
    it alone keeps a part of the layers on the CPU, in less than four bits if need be. Of the servers of many
    requests vLLM comes first, because its memory is what was planned. SGLang and TensorRT-LLM suit where
    they read the scheme on this GPU, by the table of :mod:`quant.engines`, and the need is theirs: SGLang
    orders waiting requests by the prefix that they share (Zheng et al. 2024, "SGLang: Efficient Execution of
    Structured Language Model Programs", section 3), which pays where several run at a time; TensorRT-LLM is
    NVIDIA's own kernels, where latency is the objective. TGI is in maintenance mode (its README).
    """
    fits = any(p.meets for p in plans)
    laptop = gpu.kind == "laptop" and request.concurrency == 1
    tokens = request.context or spec.max_context
    if gpu.platform == "cpu":
        vllm = Engine("vLLM", False, "its CPU build serves, slower than llama.cpp for one user")
        llama = Engine("llama.cpp / Ollama", True, f"on the CPU: {advised(spec, gpu, tokens)}")
    else:
        vllm = Engine("vLLM", fits, "it holds what was asked" if fits else "no plan holds what was asked")
        why = "one user on a laptop" if laptop else "for one user" if fits else advised(spec, gpu, tokens)
        llama = Engine("llama.cpp / Ollama", laptop or not fits, why)
    tgi = Engine(
        "TGI",
        False,
        "for deployments that already run it; it is in maintenance mode, and vLLM serves the same models",
    )
    tensorrt = _tensorrt(spec, plans, chosen, gpu, goal)
    others = (_sglang(spec, chosen, gpu, request), tensorrt, llama, tgi)
    return (vllm, *others) if vllm.suits else (llama, vllm, *(e for e in others if e is not llama))


def _sglang(spec: ModelSpec, chosen: SchemePlan | None, gpu: Gpu, request: EngineRequest) -> Engine:
    reads, why = _readable("sglang", spec, chosen, gpu)
    if not reads:
        return Engine("SGLang", False, why)
    if request.concurrency < 2:
        return Engine("SGLang", False, f"{why}; what it does better takes several requests at a time")
    return Engine("SGLang", True, f"{why}; it runs requests together that share a prefix (agents, chats)")


def _tensorrt(
    spec: ModelSpec, plans: Sequence[SchemePlan], chosen: SchemePlan | None, gpu: Gpu, goal: Goal
) -> Engine:
    reads, why = _readable("tensorrt-llm", spec, chosen, gpu)
    if goal.objective != "latency":
        said = f"{why}; worth another tool where latency is all" if reads else why
        return Engine("TensorRT-LLM", False, said)
    # it may read another scheme that holds what was asked, the smallest of which is the fastest for one
    holding = [(p.plan.weights_bytes, i, p) for i, p in enumerate(plans) if p.meets and p.plan]
    for _, _, plan in [] if reads or chosen is None else sorted(holding):
        reads, other = _readable("tensorrt-llm", spec, plan, gpu)
        if reads:
            why = other
            break
    said = f"{why}, by NVIDIA's own kernels for few requests at a time" if reads else why
    return Engine("TensorRT-LLM", reads, said)


def _readable(name: str, spec: ModelSpec, chosen: SchemePlan | None, gpu: Gpu) -> tuple[bool, str]:
    """Whether an engine reads a scheme of this model on this GPU, and what is to be said of it."""
    engine = ENGINES[name]
    if chosen is None:
        return False, "no plan holds what was asked"
    served = engine.serves(spec.config) if spec.config else True
    if not served:
        unserved = (
            "whether it serves {} is not known here" if served is None else "{} is not among its models"
        )
        return False, unserved.format(spec.architecture or spec.model_type)
    if chosen.scheme == AS_IT_IS.name and spec.quantization is not None:
        return False, "what it reads of a checkpoint that is quantized already is told by quant-deploy plan"
    ways: list[tuple[str, list[tuple[Scheme, bool]], str]] = [
        (UNQUANTIZED, [], "it serves the model as it is")
        if chosen.scheme == AS_IT_IS.name
        else (
            "compressed-tensors",
            [(chosen.stored, experts) for experts in ([False, True] if spec.moe else [False])],
            f"it reads {chosen.scheme}",
        )
    ]
    if kernel_of(chosen.stored) == "fp8":  # another layout of as many bits
        said = "it reads FP8 blocks (quantize --scheme fp8-block --format fp8)"
        ways.append(("fp8", [(PRESETS["fp8-block"], False)], said))
    problem = None
    for format, schemes, said in ways:
        found, _ = reading_problem(engine, format, schemes, gpu)
        if found is None:
            return True, said
        problem = problem or found
    return False, problem.why if problem is not None else ""
