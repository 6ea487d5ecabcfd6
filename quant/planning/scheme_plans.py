"""A scheme on some GPUs: whether vLLM loads it there, what it leaves for the KV cache, how fast it may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from quant.catalog import stored_bytes
from quant.data import load_json
from quant.hardware import UNNAMED, Gpu
from quant.models.spec import ModelSpec
from quant.models.support import makeable_methods
from quant.planning.cuts import cpu_misfits, group_problems
from quant.planning.memory import MemoryPlan, plan
from quant.planning.request import EngineRequest
from quant.planning.speed import Speed
from quant.planning.storage import (
    file_bytes,
    is_quantized,
    loaded_schemes,
    requantizable,
    requantizing_problem,
    source_kernels,
)
from quant.planning.throughput import speed_of
from quant.schemes import AS_IT_IS, Scheme, SchemeRow
from quant.units import format_requests
from quant.vllm.architectures import architecture_problem
from quant.vllm.arguments import IN_FP32_ALONE, instead_of_bfloat16
from quant.vllm.config import source_method
from quant.vllm.kernels import (
    GROUP_SIZES,
    cpu_problems,
    formats_of,
    kernel_of,
    kernel_problem,
    parts_needed,
    serving_problem,
)
from quant.vllm.layers import ONE_FORM, family_problem, one_form_problem

#: what a checkpoint that is quantized already is called in tables
_QUANTIZED = "as it is"
#: what stands for a document where none tells a scheme's loss
UNKNOWN = "not known"
PLAN_KEYS = (
    "weights_bytes", "kv_bytes_per_token", "kv_cache_bytes", "kv_tokens", "max_context", "max_concurrency",
    "activation_bytes",
    "cuda_graph_bytes", "other_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class SchemePlan:
    """A candidate with its plan.

    Attributes:
        stored: what its linears are stored in: the row's scheme, with the largest groups that every rank can
            hold whole.
        fits: vLLM starts; ``meets``: it also holds the asked concurrency; ``safe``: with the margin left, and
            the plan's own error does not reach the limit.
        methods: those that make it of this model, the preferred one first.
    """

    row: SchemeRow
    stored: Scheme
    plan: MemoryPlan | None
    fits: bool
    meets: bool
    safe: bool
    why: str
    loss: tuple[float, float]
    loss_source: str
    speed: Speed | None
    methods: tuple[str, ...]
    checkpoint_bytes: int
    #: of the checkpoint as it is, in the words of tables
    dtype: str = AS_IT_IS.name
    #: what the GPU must be, where that is not known; empty where every one would do
    condition: str = ""

    @property
    def scheme(self) -> str:
        return self.row.name

    @property
    def makeable(self) -> bool:
        """Whether this build makes it, or nothing needs making."""
        return bool(self.methods) or not is_quantized(self.stored)

    @property
    def label(self) -> str:
        """Its name in tables and sentences: the dtype of an unquantized checkpoint, else the scheme's."""
        return self.dtype if self.scheme == AS_IT_IS.name else self.scheme

    @property
    def ready(self) -> bool:
        """Whether it is a checkpoint that is quantized already."""
        return self.scheme == AS_IT_IS.name and self.dtype.startswith(_QUANTIZED)

    def bound(self, name: str) -> float:
        """A bound of its speed in tokens a second, 0 where it is not known."""
        return float(getattr(self.speed, name) or 0.0) if self.speed else 0.0

    @property
    def title(self) -> str:
        return self.row.title or str(self.row.scheme)

    @property
    def group_size(self) -> int | None:
        """The group size, where it is not the scheme's own."""
        size = self.stored.weights.group_size
        return None if size == self.row.scheme.weights.group_size else size

    def to_dict(self) -> dict[str, Any]:
        value: dict[str, Any] = self.plan.to_dict() if self.plan else {}
        value.update(
            scheme=self.scheme, title=self.title, fits=self.fits, meets_request=self.meets,
            keeps_margin=self.safe, why=self.why,
            remedy=self.plan.remedy if self.plan else "", expected_loss_percent=list(self.loss),
            expected_loss_source=self.loss_source,
            speed=self.speed.to_dict() if self.speed else None, makeable=self.makeable,
            checkpoint_bytes=self.checkpoint_bytes,
            group_size=self.group_size,
        )  # fmt: skip
        for key in PLAN_KEYS:
            value.setdefault(key, None)
        return value


def dtype_label(spec: ModelSpec, request: EngineRequest, gpu: Gpu | None = None) -> str:
    """What a checkpoint as it is is called in tables: the dtype that it is served in, or how it is quantized.

    >>> from quant.catalog import find_model
    >>> dtype_label(find_model("microsoft/phi-2"), EngineRequest())
    'fp16'
    """
    if spec.quantization:
        return f"{_QUANTIZED} ({source_method(spec.quantization)})"
    name = request.dtype or spec.dtype
    if request.dtype is None and gpu is not None and (other := instead_of_bfloat16(gpu, [spec.model_type])):
        name = other  # vLLM falls back to it
    elif request.dtype is None and name in ("float32", "float64"):
        name = "bfloat16"
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}.get(name, name)


def plan_scheme(
    spec: ModelSpec,
    gpus: Sequence[Gpu],
    gpu: Gpu,
    row: SchemeRow,
    request: EngineRequest,
    margin: float,
) -> SchemePlan:
    """A candidate on some GPUs, of which ``gpu`` is the smallest: refused with the reason, or planned."""
    quality = load_json("quality.json")["schemes"].get(
        row.name, {"loss_percent": [0, 100], "source": UNKNOWN}
    )
    loss = (float(quality["loss_percent"][0]), float(quality["loss_percent"][1]))
    quantized = is_quantized(row.scheme)
    methods = makeable_methods(spec, row.scheme) if quantized else ()
    unquantized = dtype_label(spec, request, gpu)

    def refused(why: str) -> SchemePlan:
        return SchemePlan(
            row, row.scheme, None, False, False, False, why, loss, quality["source"], None, methods, 0,
            unquantized,
        )  # fmt: skip

    if (reason := _refusal(spec, gpu, row, request)) is not None:
        return refused(reason)
    if spec.quantization and quantized:
        spec = requantizable(spec)
    stored = _whole_groups(spec, row.scheme, request) if quantized else row.scheme
    laid_out = stored
    if quantized and spec.model_type in ONE_FORM:  # all but the experts stays in 16 bits
        form, _ = ONE_FORM[spec.model_type]
        spec, laid_out = replace(spec, quantization={"quant_method": form}), AS_IT_IS.scheme
    if misfits := cpu_misfits(spec, stored, gpu):
        return refused(misfits[0])
    condition = _condition(spec, gpu, row) if gpu.kind == UNNAMED else ""
    planned = with_fitting_states(spec, gpus, laid_out, request)
    meets = planned.fits and planned.max_concurrency >= request.concurrency
    safe = (
        meets and planned.sure and needed_bytes(planned, request.concurrency) <= gpu.free_bytes * (1 - margin)
    )
    why = _why(planned, request, meets, safe, margin)
    if condition:
        why = f"{why}; takes {condition}"
    size = file_bytes(spec, stored) if is_quantized(laid_out) else stored_bytes(spec)
    return SchemePlan(
        row, stored, planned, planned.fits, meets, safe, why, loss, quality["source"],
        speed_of(spec, gpu, planned, request),
        methods, size, unquantized, condition,
    )  # fmt: skip


def _refusal(spec: ModelSpec, gpu: Gpu, row: SchemeRow, request: EngineRequest) -> str | None:
    """Why vLLM does not serve a model in a scheme on a GPU, whatever memory it has; or None."""
    if reason := architecture_problem(spec.config, request.vllm_version):
        return reason
    quantized = is_quantized(row.scheme)
    if spec.unserved and not quantized:
        return spec.unserved
    if spec.quantization and quantized:
        if reason := requantizing_problem(spec, row.scheme):
            return reason
        spec = requantizable(spec)
    level = ".".join(map(str, gpu.capability)) if gpu.capability else gpu.architecture or gpu.platform
    part = f"{gpu.name} ({level})"
    method = None if quantized else source_method(spec.quantization)
    if (reason := serving_problem(gpu, method, spec.selects)) is not None:
        return f"{part}: {reason}"
    if (quantized or spec.quantization) and instead_of_bfloat16(gpu, [spec.model_type]) == "float32":
        return f"{part}: {IN_FP32_ALONE}"
    if quantized:
        return _kernel_refusal(spec, gpu, row, part)
    if gpu.platform != "rocm":
        missing = sorted(k for k in source_kernels(spec) if formats_of(gpu).get(k) == "no")
        if missing:
            return f"{part} has no kernel for {', '.join(missing)}, which the checkpoint is quantized to"
        return None
    # whose kernels of quantized checkpoints are not tabled
    reason = next(filter(None, (kernel_problem(x, gpu) for x in loaded_schemes(spec))), None)
    return None if reason is None else f"the checkpoint as it is: {reason}"


def _kernel_refusal(spec: ModelSpec, gpu: Gpu, row: SchemeRow, part: str) -> str | None:
    """Why a GPU does not compute a scheme that would be made; ``part`` is how the GPU is called."""
    kind = spec.model_type
    if reason := one_form_problem(kind, row.scheme) or family_problem((kind,), row.scheme):
        return reason
    kernel = kernel_of(row.scheme)
    state = formats_of(gpu).get(kernel, "no")
    if state == "no":
        return f"{part} has no kernel for {kernel}"
    if spec.moe and gpu.platform == "cpu" and (missing := cpu_problems(gpu, (), [kernel])):
        return missing[0].text
    if row.native and state not in ("native", "unknown"):
        return f"{part} computes {kernel} only as packed weights"
    return None


def _whole_groups(spec: ModelSpec, scheme: Scheme, request: EngineRequest) -> Scheme:
    """The scheme with the largest groups that every rank can hold whole, where their size is free."""
    if not scheme.group_size_is_free:
        return scheme
    own = scheme.weights.group_size
    smaller = sorted((g for g in GROUP_SIZES if g != -1 and (g < own or own == -1)), reverse=True)
    grouped = (scheme, *(scheme.with_group_size(g) for g in smaller))
    whole = request.enable_expert_parallel
    fitting = (s for s in grouped if not group_problems(spec, s, request.ranks, experts_whole=whole))
    return next(fitting, scheme)


def needed_bytes(planned: MemoryPlan, concurrency: int) -> int:
    """Bytes that a plan takes of a GPU with so many requests of its context under way."""
    needed = planned.requested_bytes - planned.kv_cache_bytes
    if planned.layout and planned.context:
        blocks = planned.layout.blocks_for(planned.context, planned.max_num_batched_tokens)
        needed += blocks * concurrency * planned.layout.bytes_per_block
    return needed


def _why(planned: MemoryPlan, request: EngineRequest, meets: bool, safe: bool, margin: float) -> str:
    """What a plan holds, and what it lacks of what was asked, in a sentence."""
    if planned.fits and not meets:
        return (
            f"holds {format_requests(planned.max_concurrency)} requests of {planned.context:,} tokens, "
            f"{request.concurrency} asked for"
        )
    if planned.tight:
        return f"{planned.why}; tight: {planned.tight}"
    if meets and not safe:
        return f"{planned.why}; leaves less than {margin:.0%} of the free memory"
    return planned.why


def _condition(spec: ModelSpec, gpu: Gpu, row: SchemeRow) -> str:
    """The GPUs that a scheme takes, where it is planned for memory alone."""
    if is_quantized(row.scheme):
        return parts_needed(kernel_of(row.scheme), row.native)
    return "; ".join(filter(None, (parts_needed(kernel, False) for kernel in sorted(source_kernels(spec)))))


def with_fitting_states(
    spec: ModelSpec, gpus: Sequence[Gpu], stored: Scheme, request: EngineRequest
) -> MemoryPlan:
    """The plan; where only the recurrent states of vLLM's default number of sequences do not fit, with as
    many sequences as surely do, which its command then asks for."""
    planned = plan(spec, gpus, stored, request)
    if planned.fits or not planned.lacks_states or request.max_num_seqs is not None:
        return planned
    error = planned.error_bytes // planned.layout.bytes_per_block if planned.layout else 0
    fewer = (planned.kv_blocks - error) // 8 * 8
    if fewer < max(request.concurrency, 8):
        return planned
    return plan(spec, gpus, stored, replace(request, max_num_seqs=fewer))
