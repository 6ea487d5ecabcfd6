"""Which scheme to take: every candidate gets a plan, an expected loss and bounds of speed; then one is
chosen, with its reason.

The choice, of what fits with the asked context and concurrency and keeps a margin of the free memory,
follows an objective: ``balanced`` (the fastest scheme within 1 % of expected loss, 16 bits where that
gains nothing), ``quality`` (the most precise), ``throughput`` and ``latency`` (the fastest within an accepted
loss).
What fits is vLLM's business (:mod:`quant.planning.memory`); the margin affects only what is chosen.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from quant import defaults
from quant.catalog import load_model, stored_bytes
from quant.data import load_json
from quant.errors import NothingFits, UsageError, one_of
from quant.hardware import UNNAMED, Gpu, cpu_device, resolve_gpus
from quant.hub import named, repository_of
from quant.models.spec import ModelSpec
from quant.models.support import DATA_FREE, makeable_methods, method_problem, scheme_problem
from quant.planning.cuts import cpu_misfits, group_problems, parallel_problems
from quant.planning.memory import EngineRequest, MemoryPlan, largest_utilization, plan
from quant.planning.rule_of_thumb import rule_of_thumb
from quant.planning.scenarios import Scenario, load_scenario
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
from quant.schemes import AS_IT_IS, Scheme, SchemeRegistry, SchemeRow, candidates
from quant.units import format_requests, format_size, meant_tokens
from quant.vllm.architectures import architecture_problem, text_alone
from quant.vllm.arguments import NO_IMAGES, NO_IMAGES_WHY
from quant.vllm.config import source_method
from quant.vllm.kernels import (
    BF16_FORMATS,
    GROUP_SIZES,
    cpu_problems,
    formats_of,
    gpu_dict,
    has_bfloat16,
    has_fp8_cache,
    kernel_of,
    kernel_problem,
    parts_needed,
    serving_problem,
)
from quant.vllm.layers import ONE_FORM, family_problem, one_form_problem
from quant.vllm.releases import rules_for

#: share of the free memory that the chosen plan leaves unused
MARGIN = 0.10
#: context planned for when none is asked, capped at the model's own
DEFAULT_CONTEXT = 8192
#: sequences planned for where nothing fits with vLLM's own number of them: fewer graphs, a smaller sampler
_FEW = 16
#: what a checkpoint that is quantized already is called in tables
_QUANTIZED = "as it is"
#: GPUs of a machine; more are stages on further machines
_MACHINE = 8
#: a first start's compilation is told of from so many bytes on
_COMPILE_SAID = 256 * 2**20
#: contexts planned for where none is asked and the usual one does not fit
_SHORTER = (4096, 2048)
_WHOLE_EXPERTS = "planned with --enable-expert-parallel: GPUs that cut each expert cannot hold them"
#: a faster scheme is taken for a more precise one where it is faster by more than this share
_GAIN = 0.1
#: stands in commands for the owner of a model on the Hub that is not known
_OWNER = "OWNER"
POLICIES = ("vllm", "rule-of-thumb")
#: what stands for a document where none tells a scheme's loss
UNKNOWN = "not known"


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
        for key in _PLAN_KEYS:
            value.setdefault(key, None)
        return value


_PLAN_KEYS = (
    "weights_bytes", "kv_bytes_per_token", "kv_cache_bytes", "kv_tokens", "max_context", "max_concurrency",
    "activation_bytes",
    "cuda_graph_bytes", "other_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """A serving engine and whether it suits the need."""

    name: str
    suits: bool
    why: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Recommendation:
    """The choice and everything it was made from.

    ``recommended`` is None when nothing fits; then ``reason`` says what would. ``method`` is how `quant
    quantize` makes the scheme (None for ``none`` and for schemes that this build does not make), ``commands``
    what to run, in order.
    """

    model: ModelSpec
    gpus: tuple[Gpu, ...]
    request: EngineRequest
    plans: tuple[SchemePlan, ...]
    recommended: str | None
    method: str | None
    reason: str
    commands: tuple[str, ...]
    engines: tuple[Engine, ...]
    scenario: str | None = None
    policy: str = "vllm"
    notes: tuple[str, ...] = ()
    group_size: int | None = None
    thumb: tuple[dict[str, Any], ...] = ()

    @property
    def plan(self) -> MemoryPlan | None:
        """The plan of the chosen scheme."""
        return next((p.plan for p in self.plans if p.scheme == self.recommended), None)

    @property
    def engine(self) -> str:
        """The engine to serve with."""
        return next(e.name for e in self.engines if e.suits)

    def check(self) -> Recommendation:
        """Itself.

        Raises:
            NothingFits: no scheme was recommended; the message says what would fit.
        """
        if self.recommended is None:
            raise NothingFits(self.reason)
        return self

    def to_dict(self) -> dict[str, Any]:
        chosen = None
        if self.recommended is not None:
            chosen = {
                "scheme": self.recommended, "method": self.method, "group_size": self.group_size,
                "reason": self.reason,
                "commands": list(self.commands), "engine": self.engine,
            }  # fmt: skip
        return {
            "gpu": {**gpu_dict(self.gpus[0]), "count": len(self.gpus)}, "model": self.model.to_dict(),
            "recommended": chosen,
            "reason": self.reason,
            "plans": [dict(t) for t in self.thumb] or [p.to_dict() for p in self.plans],
            "engines": [e.to_dict() for e in self.engines], "scenario": self.scenario, "policy": self.policy,
            "notes": list(self.notes),
        }  # fmt: skip


def recommend(
    model: str | Path | ModelSpec | Mapping[str, Any],
    gpus: str | Gpu | Sequence[Gpu] | None = None,
    request: EngineRequest | None = None,
    *,
    scenario: str | Scenario | None = None,
    objective: str | None = None,
    policy: str = "vllm",
    scheme: str | None = None,
    makeable_only: bool = False,
    gpu_count: int | None = None,
    gpu_memory: int | None = None,
    margin: float = MARGIN,
    output_path: str | None = None,
    online: bool = False,
) -> Recommendation:
    """Which scheme this model should be served in.

    Args:
        model: a checkpoint directory, a config.json, a config mapping, a name, or a spec.
        gpus: a GPU's name, GPUs, or None for those here.
        request: vLLM's arguments; context and concurrency in tokens and sequences. All GPUs share the layers
            where it does not say.
        scenario: a profile whose arguments fill what ``request`` leaves open, and whose objective decides.
        objective: of :data:`quant.defaults.OBJECTIVES`; None: the scenario's, else ``balanced``.
        policy: ``vllm``, or ``rule-of-thumb`` for the original design's rule.
        scheme: plan just this one.
        makeable_only: choose among the checkpoint as it is and the schemes that this build makes of it.
        margin: share of the free memory to leave unused by the chosen plan.
        output_path: where the commands write and serve from.
        online: whether the config.json of a Hub id is fetched where the cache lacks it.

    Raises:
        UsageError, Problems: the request is wrong or contradicts itself (exit status 2).
        QuantError: no GPU here and none named; the checkpoint cannot be read.

    >>> recommend("meta-llama/Llama-3.1-8B-Instruct", "L40S-48GB").recommended
    'w8a8-fp8'
    >>> recommend("meta-llama/Llama-3.1-8B-Instruct", "L40S-48GB", objective="quality").recommended
    'none'
    >>> recommend("meta-llama/Llama-3.1-70B-Instruct", "H100").recommended
    'w4a16'
    """
    if policy not in POLICIES:
        raise one_of("--policy", policy, POLICIES)
    if not 0 <= margin < 1:
        raise UsageError(f"margin is {margin}: a share of the free memory, from 0 up to but not including 1")
    spec = load_model(model, online)
    devices = _gpus(gpus, gpu_count, gpu_memory)
    request = request or EngineRequest()
    if policy == "rule-of-thumb":
        asked = {"--scheme": scheme, "--scenario": scenario, "--objective": objective}
        if given := next((option for option, value in asked.items() if value is not None), None):
            raise UsageError(
                f"--policy rule-of-thumb contradicts {given}: the rule knows only its own four schemes; "
                "leave one of them out"
            )
        return _thumb(spec, devices, request)
    profile = load_scenario(scenario) if isinstance(scenario, str) else scenario
    goal = Goal.of(objective, profile)
    if profile:
        request = profile.request(spec, request)
    own_context, own_ranks = request.context is None, request.tensor_parallel is None
    gpu = min(devices, key=lambda g: (g.total_bytes, g.free_bytes))
    rows = _candidates(spec) if scheme is None else [_asked(scheme)]
    if makeable_only:
        rows = [row for row in rows if not is_quantized(row.scheme) or makeable_methods(spec, row.scheme)]
    notes = [*([devices[0].note] if devices[0].note else []), *spec.notes]
    if gpu.kind == UNNAMED:
        notes.append(
            "memory alone is planned: name the GPU (--gpu) for its speed and what it computes; chosen among "
            "what every GPU from compute capability 7.5 on serves"
        )
    request = _completed(spec, devices, gpu, request, profile, None if scheme is None else rows[0], notes)
    request.check(spec, devices)
    plans = tuple(_plan_one(spec, devices, gpu, row, request, margin) for row in rows)
    chosen = _choose(plans, goal)
    # a scheme whose weights alone are too large needs no second look; what is within the limit gets one
    # before another is made at a loss, of a file that is quantized already that file
    hopeful = [p for p in plans if p.plan and p.plan.weights_bytes < p.plan.requested_bytes]
    if chosen is not None:
        lossy = chosen.loss[1] > goal.limit and (spec.quantization or goal.objective == "balanced")
        hopeful = [
            p
            for p in hopeful
            if lossy and (p.ready if spec.quantization else p.loss[1] <= goal.limit and not p.condition)
        ]
    what = "nothing" if chosen is None else f"nothing within {goal.limit:g} % of expected loss"
    others = _smaller(request, gpu, own_context and chosen is None, what)
    if chosen is None and own_ranks:
        others = chain(others, _stages(spec, request))
    for smaller, said in others if hopeful else ():
        again = tuple(_plan_one(spec, devices, gpu, p.row, smaller, margin) for p in hopeful)
        other = _choose(again, goal)
        if other is not None and (chosen is None or other.ready or other.safe >= chosen.safe):
            chosen, request = other, smaller
            replanned = {p.scheme: p for p in again}
            plans = tuple(
                replanned.get(row.name) or _plan_one(spec, devices, gpu, row, smaller, margin) for row in rows
            )
            notes.append(said)
            break
    commands: tuple[str, ...] = ()
    method = None
    if chosen is not None:
        notes += _notes_on(spec, chosen, gpu)
        method = chosen.methods[0] if chosen.methods else None
        if chosen.makeable:
            commands = _commands(spec, model, chosen, method, request, output_path)
        if any(f"{_OWNER}/" in command for command in commands):
            notes.append(
                f"{_OWNER} stands for who publishes {spec.name} on the Hub, which its name does not tell: "
                "give owner/name for commands that run as they are"
            )
    return Recommendation(
        model=spec, gpus=tuple(devices), request=request, plans=plans,
        recommended=chosen.scheme if chosen else None, method=method,
        reason=_reason(spec, gpu, plans, chosen, request, goal), commands=commands,
        engines=_engines(gpu, plans, request, goal), scenario=profile.name if profile else None,
        notes=tuple(notes), group_size=chosen.group_size if chosen else None,
    )  # fmt: skip


def _candidates(spec: ModelSpec) -> list[SchemeRow]:
    """What is recommended unasked, and the one scheme of a family whose experts vLLM reads in no other."""
    rows = candidates()
    _, only = ONE_FORM.get(spec.model_type, ("", ""))
    return rows if not only or any(row.name == only for row in rows) else [*rows, SchemeRegistry.get(only)]


def _completed(
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
    several = len(devices) > 1 and 1 <= request.pipeline_parallel <= len(devices)
    if several and request.tensor_parallel is None and request.pipeline_parallel == 1:
        request = _over_machines(spec, len(devices), request, notes)
    if several and request.tensor_parallel is None:
        most = len(devices) // request.pipeline_parallel
        ranks = next(t for t in range(most, 0, -1) if not parallel_problems(spec, t))
        request = replace(request, tensor_parallel=ranks)
    if len({g.name for g in devices}) > 1:
        notes.append("the GPUs differ: every one gets the same share, so the smallest decides")
    if request.gpu_memory_utilization is None and gpu.platform != "cpu":
        default = rules_for(request.vllm_version, gpu.capability).utilization
        if gpu.total_bytes * default > gpu.free_bytes:
            share = largest_utilization(gpu)
            request = replace(request, gpu_memory_utilization=share)
            notes.append(
                f"{format_size(gpu.total_bytes - gpu.free_bytes)} is held by others: utilization "
                f"{share:.2f} instead of {default:.2f}"
            )
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
    machines, rest = divmod(count, _MACHINE)
    if machines < 2 or rest or machines > spec.layers or parallel_problems(spec, _MACHINE):
        return request
    notes.append(
        f"planned as {machines} machines of {_MACHINE} GPUs: every machine holds a stage of the layers, and "
        "the command is run on the first of a Ray cluster that they form"
    )
    return replace(request, tensor_parallel=_MACHINE, pipeline_parallel=machines)


def _route(spec: ModelSpec, chosen: SchemePlan, gpu: Gpu) -> str:
    """How a checkpoint that is quantized already gets to run on a GPU; empty where that needs no word."""
    if not spec.quantization:
        return ""
    method = source_method(spec.quantization)
    if not chosen.ready:
        return (
            f"made from the {method} checkpoint: its weights are dequantized as they are read, then rounded "
            f"to {chosen.scheme}; that loss is in addition to their own"
        )
    packed = sorted(k for k in source_kernels(spec) if formats_of(gpu).get(k) == "weight-only")
    if not packed or "fp8" not in packed:
        return ""
    return (
        f"{gpu.name} does not compute in FP8: vLLM unpacks these weights on the way (Marlin, W8A16) and "
        "computes in 16 bits: they take the memory of FP8, and prompts gain no speed"
    )


def _notes_on(spec: ModelSpec, chosen: SchemePlan, gpu: Gpu) -> list[str]:
    """What is to be said of the choice: how it gets to run, its first start, who makes it, and another method
    than the usual."""
    notes = [route] if (route := _route(spec, chosen, gpu)) else []
    if chosen.plan is not None and chosen.plan.compile_bytes >= _COMPILE_SAID:
        more = chosen.plan.kv_cache_bytes + chosen.plan.compile_bytes
        notes.append(
            f"the first start compiles, and has {format_size(chosen.plan.kv_cache_bytes)} of KV cache; "
            f"the next ones find the result cached, and have {format_size(more)}"
        )
    if not chosen.makeable:
        made = ", ".join(row.name for row in SchemeRegistry if makeable_methods(spec, row.scheme))
        notes.append(
            f"this build does not make {chosen.scheme} of this model: "
            f"{scheme_problem(spec, chosen.stored)}; take a published {chosen.scheme} checkpoint"
            f"{f', or one of {made}' if made else ''}"
        )
    if chosen.methods and (method := chosen.methods[0]) != (preferred := chosen.row.methods[0]):
        unlike = "; the loss is that of calibrated checkpoints" if method in DATA_FREE else ""
        notes.append(
            f"--method {method} instead of {preferred}: "
            f"{method_problem(spec, chosen.stored, preferred)}{unlike}"
        )
    return notes


def _cut_by_ranks(spec: ModelSpec, request: EngineRequest) -> bool:
    """Whether a checkpoint that is quantized already can be served by these ranks only where each holds whole
    experts: that keeps its values, which rounding it anew would not."""
    if not spec.moe or spec.quantization is None or request.ranks < 2 or request.enable_expert_parallel:
        return False
    return bool(group_problems(spec, None, request.ranks)) and not group_problems(
        spec, None, request.ranks, experts_whole=True
    )


def _smaller(
    request: EngineRequest, gpu: Gpu, own_context: bool, what: str = "nothing"
) -> Iterator[tuple[EngineRequest, str]]:
    """Requests to try where nothing surely fits, each with what to say of it: fewer sequences than vLLM's own
    number, an FP8 cache, then a shorter context, where they were not asked for. ``what`` is said not to fit.
    """
    asked = request
    if request.max_num_seqs is None and request.concurrency <= _FEW:
        request = replace(request, max_num_seqs=_FEW)
        yield request, f"planned with --max-num-seqs {_FEW}: with vLLM's own number {what} surely fits"
    known = gpu.platform != "cpu" and gpu.kind != UNNAMED
    if request.kv_cache_dtype == "auto" and known and has_fp8_cache(gpu):
        said = f"planned with --kv-cache-dtype fp8: with the cache in 16 bits {what} surely fits"
        yield replace(asked, kv_cache_dtype="fp8"), said
        request = replace(request, kv_cache_dtype="fp8")
        if request.max_num_seqs != asked.max_num_seqs:
            yield request, f"{said}, nor with more than {_FEW} sequences"
    for context in _SHORTER if own_context else ():
        if context < (request.context or 0):
            said = f"planned for {context:,} tokens: with more nothing surely fits"
            yield replace(request, context=context), said


def _stages(spec: ModelSpec, request: EngineRequest) -> Iterator[tuple[EngineRequest, str]]:
    """The same GPUs in stages of fewer ranks, which cut groups that all of them would not divide."""
    if request.pipeline_parallel > 1:
        return
    for ranks in (t for t in range(request.ranks - 1, 0, -1) if request.ranks % t == 0):
        stages = request.ranks // ranks
        if stages <= spec.layers and not parallel_problems(spec, ranks):
            changed = replace(request, tensor_parallel=ranks, pipeline_parallel=stages)
            yield (
                changed,
                f"planned as {stages} stages of {ranks} GPU{'s' if ranks > 1 else ''}: over {request.ranks} "
                "that share every layer nothing surely fits",
            )


def _gpus(gpus: str | Gpu | Sequence[Gpu] | None, count: int | None, memory: int | None) -> list[Gpu]:
    if isinstance(gpus, Gpu):
        return [replace(gpus, index=i) for i in range(count or 1)]
    if gpus is None or isinstance(gpus, str):
        return resolve_gpus(gpus, count, memory)
    if not gpus:
        return [cpu_device()]
    return list(gpus)


def _asked(scheme: str) -> SchemeRow:
    """The row of a scheme that is asked for by name: it may run as packed weights, too.

    Raises:
        UsageError: there is no such scheme, or vLLM has no kernel for it.
    """
    if scheme == AS_IT_IS.name:
        return replace(AS_IT_IS, native=False)
    if scheme not in SchemeRegistry or not (row := SchemeRegistry.get(scheme)).methods:
        planned = [AS_IT_IS.name, *(row.name for row in SchemeRegistry if row.methods)]
        raise one_of("--scheme", scheme, sorted(planned))
    return replace(row, native=False)


def dtype_label(spec: ModelSpec, request: EngineRequest, gpu: Gpu | None = None) -> str:
    """What a checkpoint as it is is called in tables: the dtype that it is served in, or how it is quantized.

    >>> from quant.catalog import find_model
    >>> dtype_label(find_model("microsoft/phi-2"), EngineRequest())
    'fp16'
    """
    if spec.quantization:
        return f"{_QUANTIZED} ({source_method(spec.quantization)})"
    name = request.dtype or spec.dtype
    if request.dtype is None and gpu is not None and not has_bfloat16(gpu):
        return "fp16"  # vLLM falls back to it
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "bf16", "float64": "bf16"}.get(name, name)


def _plan_one(
    spec: ModelSpec,
    gpus: Sequence[Gpu],
    gpu: Gpu,
    row: SchemeRow,
    request: EngineRequest,
    margin: float,
) -> SchemePlan:
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

    if reason := architecture_problem(spec.config, request.vllm_version):
        return refused(reason)
    if spec.quantization and quantized:
        if reason := requantizing_problem(spec, row.scheme):
            return refused(reason)
        spec = requantizable(spec)
    part = (
        f"{gpu.name} "
        f"({'.'.join(map(str, gpu.capability)) if gpu.capability else gpu.architecture or gpu.platform})"
    )
    method = None if quantized else source_method(spec.quantization)
    if (reason := serving_problem(gpu, method, spec.selects)) is not None:
        return refused(f"{part}: {reason}")
    if quantized:
        kind = spec.model_type
        if reason := one_form_problem(kind, row.scheme) or family_problem((kind,), row.scheme):
            return refused(reason)
        kernel = kernel_of(row.scheme)
        state = formats_of(gpu).get(kernel, "no")
        if state == "no":
            return refused(f"{part} has no kernel for {kernel}")
        if spec.moe and gpu.platform == "cpu" and (missing_kernels := cpu_problems(gpu, (), [kernel])):
            return refused(missing_kernels[0].text)
        if row.native and state not in ("native", "unknown"):
            return refused(f"{part} computes {kernel} only as packed weights")
    # whose kernels of quantized checkpoints are not tabled
    elif gpu.platform != "rocm":
        missing = sorted(k for k in source_kernels(spec) if formats_of(gpu).get(k) == "no")
        if missing:
            return refused(
                f"{part} has no kernel for {', '.join(missing)}, which the checkpoint is quantized to"
            )
    elif reason := next(filter(None, (kernel_problem(x, gpu) for x in loaded_schemes(spec))), None):
        return refused(f"the checkpoint as it is: {reason}")
    stored = row.scheme
    if quantized and stored.group_size_is_free:
        own = stored.weights.group_size
        smaller = sorted((g for g in GROUP_SIZES if g != -1 and (g < own or own == -1)), reverse=True)
        grouped = (stored, *(stored.with_group_size(g) for g in smaller))
        whole = request.enable_expert_parallel
        fitting = (s for s in grouped if not group_problems(spec, s, request.ranks, experts_whole=whole))
        stored = next(fitting, stored)
    laid_out = stored
    if quantized and spec.model_type in ONE_FORM:  # all but the experts stays in 16 bits
        form, _ = ONE_FORM[spec.model_type]
        spec, laid_out = replace(spec, quantization={"quant_method": form}), AS_IT_IS.scheme
    if misfits := cpu_misfits(spec, stored, gpu):
        return refused(misfits[0])
    condition = _condition(spec, gpu, row) if gpu.kind == UNNAMED else ""
    planned = _with_fitting_states(spec, gpus, laid_out, request)
    meets = planned.fits and planned.max_concurrency >= request.concurrency
    free = gpu.free_bytes
    needed = planned.requested_bytes - planned.kv_cache_bytes
    if planned.layout and planned.context:
        in_flight = planned.max_num_batched_tokens
        needed += (
            planned.layout.blocks_for(planned.context, in_flight)
            * request.concurrency
            * planned.layout.bytes_per_block
        )
    safe = meets and planned.sure and needed <= free * (1 - margin)
    why = planned.why
    if planned.fits and not meets:
        why = (
            f"holds {format_requests(planned.max_concurrency)} requests of {planned.context:,} tokens, "
            f"{request.concurrency} asked for"
        )
    elif planned.tight:
        why = f"{planned.why}; tight: {planned.tight}"
    elif meets and not safe:
        why = f"{planned.why}; leaves less than {margin:.0%} of the free memory"
    if condition:
        why = f"{why}; takes {condition}"
    size = file_bytes(spec, stored) if is_quantized(laid_out) else stored_bytes(spec)
    return SchemePlan(
        row, stored, planned, planned.fits, meets, safe, why, loss, quality["source"],
        speed_of(spec, gpu, planned, request),
        methods, size, unquantized, condition,
    )  # fmt: skip


def _condition(spec: ModelSpec, gpu: Gpu, row: SchemeRow) -> str:
    """The GPUs that a scheme takes, where it is planned for memory alone."""
    if is_quantized(row.scheme):
        return parts_needed(kernel_of(row.scheme), row.native)
    return "; ".join(filter(None, (parts_needed(kernel, False) for kernel in sorted(source_kernels(spec)))))


def _with_fitting_states(
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


@dataclass(frozen=True)
class Goal:
    """What decides among the schemes that fit: an objective of :data:`quant.defaults.OBJECTIVES`, the percent
    of expected loss that it may cost, and what it is for."""

    objective: str
    limit: float
    title: str = ""

    @classmethod
    def of(cls, objective: str | None, profile: Scenario | None) -> Goal:
        """The objective asked for, else the scenario's, else ``balanced``.

        Raises:
            UsageError: no such objective.
        """
        name = objective or (profile.objective if profile else "balanced")
        if name not in defaults.OBJECTIVES:
            raise one_of("--objective", name, list(defaults.OBJECTIVES))
        own = profile is not None and name == profile.objective
        limit = profile.max_loss_percent if profile and own else defaults.OBJECTIVES[name][1]
        return cls(name, limit, profile.title if profile else "")


def _choose(plans: Sequence[SchemePlan], goal: Goal) -> SchemePlan | None:
    """The plan to take, among those that keep the margin, else among those that surely hold what was asked.
    Where nothing is within the limit, ``balanced`` takes the most precise that fits."""
    sure = [p for p in plans if p.meets and p.plan and p.plan.sure and not p.condition]
    bound = defaults.OBJECTIVES[goal.objective][0]
    # a file that is quantized already is not made again for the sake of a margin
    for pool in ([p for p in sure if p.safe or p.ready], sure):
        if within := [p for p in pool if p.loss[1] <= goal.limit]:
            return _most_precise(within) if bound is None else _fastest(within, bound)
        if pool and goal.objective == "balanced":
            return _most_precise(pool)
    return None


def _fastest(pool: Sequence[SchemePlan], bound: str) -> SchemePlan:
    """The most precise of the fastest: of what this build makes, where it makes any of them."""
    made = [p for p in pool if p.makeable] or pool
    best = max(p.bound(bound) for p in made)
    equal = [p for p in made if p.bound(bound) >= best * (1 - _GAIN)]
    return min(equal, key=lambda p: (sum(p.loss), -p.bound(bound)))


def _most_precise(pool: Sequence[SchemePlan]) -> SchemePlan:
    """The least expected loss; ties by what this build makes, then by speed."""
    best = min(sum(p.loss) for p in pool)
    equal = [p for p in pool if sum(p.loss) == best]
    return max(equal, key=lambda p: (p.makeable, p.bound("decode_bound")))


def _reason(
    spec: ModelSpec,
    gpu: Gpu,
    plans: Sequence[SchemePlan],
    chosen: SchemePlan | None,
    request: EngineRequest,
    goal: Goal,
) -> str:
    asked = f"{request.concurrency} × {request.context:,} tokens"
    where = (
        f"{request.ranks * request.pipeline_parallel} × {gpu.name}"
        if request.ranks * request.pipeline_parallel > 1
        else gpu.name
    )
    if chosen is not None and chosen.plan is not None:
        margin = "" if chosen.safe else ", though without the safety margin"
        use = f" for {goal.title}" if goal.title else ""
        fits = [p for p in plans if p.meets and p.plan and p.plan.sure]
        slow = not chosen.bound("decode_bound")  # its speed is not known
        if defaults.OBJECTIVES[goal.objective][0] is None or chosen.loss[1] > goal.limit or slow:
            reason = "the most precise that holds what was asked"
        elif chosen is _most_precise([p for p in fits if p.loss[1] <= goal.limit] or fits):
            reason = (
                f"the most precise, and none within {goal.limit:g} % of expected loss is faster by a tenth"
            )
        else:
            reason = f"the fastest by its bounds{use} among those within {goal.limit:g} % of expected loss"
        opening = f"{chosen.label} holds what was asked" if len(plans) == 1 else f"{chosen.label} is {reason}"
        return (
            f"{opening}: {format_size(chosen.plan.weights_bytes)} of weights leave "
            f"{format_size(chosen.plan.kv_cache_bytes)} for "
            f"{chosen.plan.kv_tokens:,} tokens on {where} ({asked} asked{margin})"
        )
    running = [p for p in plans if p.fits and p.plan]
    if edge := next((p for p in running if p.meets and p.plan and p.plan.tight), None):
        assert edge.plan is not None
        return f"nothing surely fits {asked} on {where}: {edge.label} is tight, {edge.plan.tight}"
    if running:
        best = max(running, key=lambda p: p.plan.max_concurrency if p.plan else 0.0)
        assert best.plan is not None
        if looser := next((p.label for p in plans if p.meets), None):
            return (
                f"nothing fits {asked} on {where} within {goal.limit:g} % of expected "
                f"loss; without that limit {looser} would"
            )
        return (
            f"nothing holds {asked} on {where}: {best.label} starts and holds "
            f"{format_requests(best.plan.max_concurrency)} requests of "
            f"{request.context:,} tokens; "
            f"ask for --concurrency {max(1, int(best.plan.max_concurrency))}, or add GPUs"
        )
    planned = [p for p in plans if p.plan]
    if not planned:
        reasons: dict[str, list[str]] = {}
        for p in plans:
            reasons.setdefault(p.why, []).append(p.scheme)
        if len(reasons) == 1:
            return f"no scheme can run on {gpu.name}: {plans[0].why}"
        said = "; ".join(f"{', '.join(schemes)}: {why}" for why, schemes in reasons.items())
        return f"no scheme can run on {gpu.name}: {said}"
    longest = max(planned, key=lambda p: p.plan.sure_context if p.plan else 0)
    assert longest.plan is not None
    if longest.plan.sure_context:
        return (
            f"nothing fits {asked} on {where}; {longest.label} would with --context "
            f"{longest.plan.sure_context} --concurrency 1"
        )
    best = min(planned, key=lambda p: p.plan.weights_bytes if p.plan else 0)
    assert best.plan is not None
    needed = (
        best.plan.weights_bytes
        + best.plan.activation_bytes
        + best.plan.other_bytes
        + best.plan.cuda_graph_bytes
    )
    if group_problems(spec, best.stored, request.ranks, experts_whole=request.enable_expert_parallel):
        return f"nothing runs on {where}, and not for want of memory: {best.label}: {best.why}"
    return (
        f"nothing fits on {where}: the smallest, {best.label}, needs {format_size(needed)} before any KV "
        "cache; "
        f"{_what_would(spec, gpu, best, request)}"
    )


def _what_would(spec: ModelSpec, gpu: Gpu, best: SchemePlan, request: EngineRequest) -> str:
    """The smallest change that makes the smallest scheme start, found by planning it: no graphs, fewer
    sequences, more GPUs of a machine, more machines."""
    assert best.plan is not None
    if gpu.platform == "cpu":
        return "take a machine with more memory, a smaller model, or llama.cpp with a 4-bit GGUF"
    world = request.ranks * request.pipeline_parallel
    tries: list[tuple[str, int, EngineRequest]] = []
    if not request.enforce_eager:
        tries.append(("--enforce-eager", world, replace(request, enforce_eager=True)))
    small = max(request.concurrency, 8)
    if request.max_num_seqs is None and request.max_num_batched_tokens is None:
        words = f"--max-num-seqs {small} --max-num-batched-tokens 512"
        tries.append(
            (words, world, replace(request, max_num_seqs=small, max_num_batched_tokens=max(512, small)))
        )
    for ranks in (r for r in (2, 4, _MACHINE) if r > request.ranks and not parallel_problems(spec, r)):
        count = ranks * request.pipeline_parallel
        words = f"{count} of these GPUs (--gpu-count {count})"
        tries.append((words, count, replace(request, tensor_parallel=ranks)))
    if request.pipeline_parallel == 1 and not parallel_problems(spec, _MACHINE):
        for machines in (m for m in (2, 4) if m <= spec.layers):
            count = machines * _MACHINE
            words = (
                f"{machines} machines of {_MACHINE} of these GPUs each: --tensor-parallel {_MACHINE} "
                f"--pipeline-parallel {machines} (--gpu-count {count})"
            )
            changed = replace(request, tensor_parallel=_MACHINE, pipeline_parallel=machines)
            tries.append((words, count, changed))
    for words, count, changed in tries:
        if plan(spec, [gpu] * count, best.stored, changed).sure:
            return f"it would start with {words}"
    return (
        f"not even 4 machines of {_MACHINE} of these GPUs would do: take a smaller model, or llama.cpp with "
        "a 4-bit GGUF in host memory"
    )


def _commands(
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
    :data:`_OWNER` before it."""
    if isinstance(model, Path) and repository_of(model):
        return named(model)
    if spec.hub or not isinstance(model, (str, Path)):
        return spec.hub or spec.name
    return str(model) if Path(model).exists() else f"{_OWNER}/{str(model).strip()}"


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


def _engines(gpu: Gpu, plans: Sequence[SchemePlan], request: EngineRequest, goal: Goal) -> tuple[Engine, ...]:
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


def _thumb(spec: ModelSpec, gpus: Sequence[Gpu], request: EngineRequest) -> Recommendation:
    """The original design's rule, for one GPU."""
    gpu = gpus[0]
    here = gpu.sources.get("memory") == "nvml"  # of a part that is not here, all memory counts as free
    scheme, plans = rule_of_thumb(stored_bytes(spec), gpu.total_bytes, gpu.free_bytes if here else None)
    rows = []
    for p in plans:
        rows.append({**p.to_dict(), **{key: None for key in _PLAN_KEYS}, "weights_bytes": p.needed_bytes})
    chosen = next((p for p in plans if p.scheme == scheme), None)
    reason = (
        f"rule of thumb: {chosen.scheme}, {chosen.why}"
        if chosen
        else f"rule of thumb: nothing fits; the smallest {plans[-1].why}"
    )
    notes = (
        "the rule takes every checkpoint as 32-bit and counts no KV cache: see docs/planning.md for where "
        "it is wrong",
    )
    return Recommendation(
        model=spec, gpus=tuple(gpus), request=request, plans=(), recommended=scheme, method=None,
        reason=reason, commands=(),
        engines=(Engine("vLLM", True, "not judged by this rule"),), policy="rule-of-thumb", notes=notes,
        thumb=tuple(rows),
    )  # fmt: skip


# -- for programs that load models themselves ----------------------------------------------------------------


def get_optimized_config(
    model: str | Path | ModelSpec | Mapping[str, Any], scenario: str, gpus: str | Sequence[Gpu] | None = None
) -> dict[str, Any]:
    """vLLM's engine arguments for a model in a scenario, with the scheme to serve it in.

    The keys are those of ``vllm.LLM`` plus ``scheme``; ``gpus`` as in :func:`recommend`.

    Raises:
        NothingFits: no scheme holds what the scenario asks.

    >>> get_optimized_config("meta-llama/Llama-3.1-8B-Instruct", "chat", "L40S-48GB")["max_model_len"]
    8192
    """
    recommendation = recommend(model, gpus, scenario=scenario).check()
    chosen = recommendation.plan
    assert chosen is not None
    return {
        "scheme": recommendation.recommended, "max_model_len": chosen.context,
        "tensor_parallel_size": chosen.tensor_parallel,
        "pipeline_parallel_size": chosen.pipeline_parallel,
        "gpu_memory_utilization": chosen.gpu_memory_utilization,
        "kv_cache_dtype": chosen.kv_cache_dtype, "max_num_seqs": chosen.max_num_seqs,
        "max_num_batched_tokens": chosen.max_num_batched_tokens,
        "enforce_eager": recommendation.request.enforce_eager,
    }  # fmt: skip


def reload(
    model: str | Path | ModelSpec | Mapping[str, Any],
    release: Callable[[], None] | None = None,
    **options: Any,
) -> Recommendation:
    """Frees what this process caches, looks at the GPUs again and recommends again: for a program that has
    just dropped a model.

    Args:
        release: what frees the program's own memory; called first. torch's cache is emptied if torch is
            loaded here.
        options: as for :func:`recommend`.
    """
    import gc
    import sys

    if release is not None:
        release()
    gc.collect()
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        cuda.empty_cache()
    load_json.cache_clear()
    return recommend(model, **options)
