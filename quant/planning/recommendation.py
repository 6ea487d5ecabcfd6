"""Which scheme to take: every candidate gets a plan, an expected loss and bounds of speed; then one is
chosen, with its reason.

The choice, of what fits with the asked context and concurrency and keeps a margin of the free memory,
follows an objective: ``balanced`` (the fastest scheme within 1 % of expected loss, 16 bits where that
gains nothing), ``quality`` (the most precise), ``throughput`` and ``latency`` (the fastest within an accepted
loss).
What fits is vLLM's business (:mod:`quant.planning.start`); the margin affects only what is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.catalog import load_model, stored_bytes
from quant.checkpoint.gguf_path import gguf_file
from quant.data import load_json
from quant.errors import NothingFits, UsageError, one_of
from quant.hardware import UNNAMED, Gpu, cpu_device, resolve_gpus
from quant.models.spec import ModelSpec
from quant.models.support import DATA_FREE, makeable_methods, passed_over, scheme_problem
from quant.planning.choice import Goal, reason_of
from quant.planning.launch import OWNER, Engine, commands_for, engines_for
from quant.planning.memory import MemoryPlan
from quant.planning.request import EngineRequest
from quant.planning.request_defaults import completed
from quant.planning.rule_of_thumb import rule_of_thumb
from quant.planning.scenarios import Scenario, load_scenario
from quant.planning.scheme_plans import PLAN_KEYS, SchemePlan
from quant.planning.second_look import Question, answer
from quant.planning.storage import (
    is_quantized,
    source_kernels,
)
from quant.schemes import AS_IT_IS, SchemeRegistry, SchemeRow, candidates
from quant.units import format_size
from quant.vllm.architectures import own_code
from quant.vllm.config import source_method
from quant.vllm.kernels import (
    build_note,
    formats_of,
    gpu_dict,
)
from quant.vllm.layers import ONE_FORM

#: share of the free memory that the chosen plan leaves unused
MARGIN = 0.10
#: a first start's compilation is told of from so many bytes on
_COMPILE_SAID = 256 * 2**20
POLICIES = ("vllm", "rule-of-thumb")


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
        UsageError, Problems: the request is wrong or contradicts itself, or no GPU is here and none is named
            (exit status 2).
        QuantError: the checkpoint cannot be read.

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
    if Path(spec.source).exists() and (spec.quantization or gguf_file(Path(spec.source))):
        from quant.evaluation.verify import loading_problems  # which only such a checkpoint needs

        spec = replace(spec, unserved=next(iter(loading_problems(spec.source)), ""))
    devices = _gpus(gpus, gpu_count, gpu_memory)
    request = request or EngineRequest()
    if policy == "rule-of-thumb":
        asked = {"--scheme": scheme, "--scenario": scenario, "--objective": objective}
        return _thumb(spec, devices, request, asked)
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
    notes += [own] if (own := own_code(spec.config)) else []
    if gpu.kind == UNNAMED:
        notes.append(
            "memory alone is planned: name the GPU (--gpu) for its speed and what it computes; chosen among "
            "what every GPU from compute capability 7.5 on serves"
        )
    request = completed(spec, devices, gpu, request, profile, None if scheme is None else rows[0], notes)
    request.check(spec, devices)
    found = answer(Question(spec, devices, gpu, rows, request, goal, margin, own_context, own_ranks))
    request, plans, chosen = found.request, found.plans, found.chosen
    notes += [found.said] if found.said else []
    method: str | None = None
    commands: tuple[str, ...] = ()
    if chosen is not None:
        notes += _notes_on(spec, chosen, gpu)
        method, commands = _made_by(spec, model, chosen, request, output_path, notes)
    return Recommendation(
        model=spec, gpus=tuple(devices), request=request, plans=plans,
        recommended=chosen.scheme if chosen else None, method=method,
        reason=reason_of(spec, gpu, plans, chosen, request, goal), commands=commands,
        engines=engines_for(gpu, plans, request, goal, spec, chosen),
        scenario=profile.name if profile else None,
        notes=tuple(notes), group_size=chosen.group_size if chosen else None,
    )  # fmt: skip


def _made_by(
    spec: ModelSpec,
    model: str | Path | ModelSpec | Mapping[str, Any],
    chosen: SchemePlan,
    request: EngineRequest,
    output_path: str | None,
    notes: list[str],
) -> tuple[str | None, tuple[str, ...]]:
    """The method that makes what was chosen, and the commands that make and serve it; what they need to be
    run goes into ``notes``."""
    method = chosen.methods[0] if chosen.methods else None
    commands = commands_for(spec, model, chosen, method, request, output_path) if chosen.makeable else ()
    if any(f"{OWNER}/" in command for command in commands):
        notes.append(
            f"{OWNER} stands for who publishes {spec.name} on the Hub, which its name does not tell: "
            "give owner/name for commands that run as they are"
        )
    return method, tuple(commands)


def _candidates(spec: ModelSpec) -> list[SchemeRow]:
    """What is recommended unasked, and the one scheme of a family whose experts vLLM reads in no other."""
    rows = candidates()
    _, only = ONE_FORM.get(spec.model_type, ("", ""))
    return rows if not only or any(row.name == only for row in rows) else [*rows, SchemeRegistry.get(only)]


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
    notes = [note for note in (_route(spec, chosen, gpu), build_note(gpu)) if note]
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
            f"--method {method} instead of {preferred}: {passed_over(spec, chosen.stored, preferred)}{unlike}"
        )
    return notes


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


def _thumb(
    spec: ModelSpec, gpus: Sequence[Gpu], request: EngineRequest, asked: Mapping[str, object]
) -> Recommendation:
    """The original design's rule, for one GPU.

    Raises:
        UsageError: ``asked``, options by their values, names what the rule does not know.
    """
    if given := next((option for option, value in asked.items() if value is not None), None):
        raise UsageError(
            f"--policy rule-of-thumb contradicts {given}: the rule knows only its own four schemes; "
            "leave one of them out"
        )
    gpu = gpus[0]
    here = gpu.sources.get("memory") == "nvml"  # of a part that is not here, all memory counts as free
    scheme, plans = rule_of_thumb(stored_bytes(spec), gpu.total_bytes, gpu.free_bytes if here else None)
    rows = []
    for p in plans:
        rows.append({**p.to_dict(), **{key: None for key in PLAN_KEYS}, "weights_bytes": p.needed_bytes})
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
