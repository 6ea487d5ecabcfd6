"""What a request for a recommendation leaves open: the context, the ranks, a share of the memory that others
leave, the dtype that kernels need, whole experts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from quant.hardware import Gpu
from quant.models.spec import ModelSpec
from quant.planning.choice import MACHINE
from quant.planning.cuts import group_problems, parallel_problems
from quant.planning.request import EngineRequest
from quant.planning.scenarios import Scenario
from quant.planning.start import usual_utilization, why_utilization
from quant.planning.storage import is_quantized, source_kernels
from quant.schemes import SchemeRow
from quant.units import meant_tokens
from quant.vllm.architectures import text_alone
from quant.vllm.arguments import NO_IMAGES, NO_IMAGES_WHY, instead_of_bfloat16
from quant.vllm.context import beyond_note
from quant.vllm.kernels import BF16_FORMATS, formats_of, has_fp8_cache, kernel_of
from quant.vllm.releases import rules_for

#: context planned for when none is asked, capped at the model's own
DEFAULT_CONTEXT = 8192
_WHOLE_EXPERTS = "planned with --enable-expert-parallel: GPUs that cut each expert cannot hold them"


def completed(
    spec: ModelSpec,
    devices: Sequence[Gpu],
    gpu: Gpu,
    request: EngineRequest,
    profile: Scenario | None,
    asked: SchemeRow | None,
    notes: list[str],
) -> EngineRequest:
    """The request with what it leaves open: the context, the ranks, a share of the memory that others leave,
    the dtype that kernels need, whole experts; and without a cache that the GPU lacks.

    Args:
        gpu: the smallest of the devices, which decides.
        asked: the one scheme that is planned, or None.
        notes: what is to be said of it is added.
    """
    if profile and request.kv_cache_dtype == "fp8" and not has_fp8_cache(devices[0]):
        request = replace(request, kv_cache_dtype="auto")
        notes.append(f"{devices[0].name} has no FP8: the scenario's FP8 cache is planned in 16 bits")
    if request.context is not None:
        request = replace(request, context=meant_tokens(request.context, spec.max_context))
    if request.context is None:
        request = replace(request, context=min(DEFAULT_CONTEXT, spec.max_context))
        notes.append(f"planned for a context of {request.context:,} tokens; --context asks for another")
    if beyond := beyond_note(request.context or 0, spec.max_context):
        notes.append(beyond)
    several = len(devices) > 1 and 1 <= request.pipeline_parallel <= len(devices)
    if several and request.tensor_parallel is None and request.pipeline_parallel == 1:
        request = _over_machines(spec, len(devices), request, notes)
    if several and request.tensor_parallel is None:
        most = len(devices) // request.pipeline_parallel
        ranks = next(t for t in range(most, 0, -1) if not parallel_problems(spec, t))
        request = replace(request, tensor_parallel=ranks)
        if unused := len(devices) - ranks * request.pipeline_parallel:
            notes.append(_unused(spec, len(devices), unused, request))
    if len({g.name for g in devices}) > 1:
        notes.append("the GPUs differ: every one gets the same share, so the smallest decides")
    if request.gpu_memory_utilization is None and gpu.platform != "cpu":
        default = rules_for(request.vllm_version, gpu.capability).utilization
        if (share := usual_utilization(gpu, default)) != default:
            request = replace(request, gpu_memory_utilization=share)
            notes.append(f"{why_utilization(gpu, default)}: utilization {share:.2f} instead of {default:.2f}")
    kernels = source_kernels(spec)
    if asked is not None and is_quantized(asked.scheme):
        kernel = kernel_of(asked.scheme)
        kernels |= {kernel}
        if formats_of(gpu).get(kernel) == "weight-only" and asked.scheme.activations is not None:
            notes.append(
                f"{gpu.name} computes {kernel} only as packed weights: activations stay in 16 bits, prompts "
                "gain no speed"
            )
    if (alone := kernels & BF16_FORMATS) and spec.dtype == "float16" and request.dtype is None:
        request = replace(request, dtype="bfloat16")
        notes.append(
            f"vLLM's weight-only kernels of {', '.join(sorted(alone))} take bf16 alone: planned with "
            "--dtype bfloat16"
        )
    if request.dtype is None and instead_of_bfloat16(gpu, [spec.model_type]) == "float32":
        request = replace(request, dtype="float32")
        notes.append(
            f"{gpu.name} has no bfloat16, and vLLM does not compute {spec.model_type} in float16: planned "
            "with --dtype float32"
        )
    if text_alone(spec.config) and not request.limit_mm_per_prompt:
        request = replace(request, limit_mm_per_prompt=json.loads(NO_IMAGES[1]))
        notes.append(f"{NO_IMAGES_WHY}: planned for text alone")
    if _cut_by_ranks(spec, request):
        request = replace(request, enable_expert_parallel=True)
        notes.append(_WHOLE_EXPERTS)
    return request


def _over_machines(spec: ModelSpec, count: int, request: EngineRequest, notes: list[str]) -> EngineRequest:
    """The request where so many GPUs are several machines: a stage of the layers on each, so that only
    activations cross the network."""
    machines, rest = divmod(count, MACHINE)
    if machines < 2 or rest or machines > spec.layers or parallel_problems(spec, MACHINE):
        return request
    notes.append(
        f"planned as {machines} machines of {MACHINE} GPUs: every machine holds a stage of the layers, and "
        "the command is run on the first of a Ray cluster that they form"
    )
    return replace(request, tensor_parallel=MACHINE, pipeline_parallel=machines)


def _unused(spec: ModelSpec, count: int, unused: int, request: EngineRequest) -> str:
    """Why some of so many GPUs have nothing to do, and what would give them something."""
    ranks, stages = request.ranks, request.pipeline_parallel
    said = f"{unused} of {count} GPUs stay{'s' if unused == 1 else ''} unused: "
    if ranks == count // stages:
        return f"{said}they do not divide into {stages} stages"
    if stages > 1:
        return f"{said}the layers of a stage divide over {ranks} at most"
    more = f" (--pipeline-parallel {count} makes stages of them)" if count <= spec.layers else ""
    return f"{said}the layers divide over {ranks} at most{more}"


def _cut_by_ranks(spec: ModelSpec, request: EngineRequest) -> bool:
    """Whether a checkpoint that is quantized already can be served by these ranks only where each holds whole
    experts: that keeps its values, which rounding it anew would not."""
    if not spec.moe or spec.quantization is None or request.ranks < 2 or request.enable_expert_parallel:
        return False
    return bool(group_problems(spec, None, request.ranks)) and not group_problems(
        spec, None, request.ranks, experts_whole=True
    )
