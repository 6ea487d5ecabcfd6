"""Which scheme is chosen, and for which request: where nothing fits as it was asked, less is asked for, of
what was left open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from quant.hardware import UNNAMED, Gpu
from quant.models.spec import ModelSpec
from quant.planning.choice import Goal, choose, is_faster
from quant.planning.cuts import parallel_problems
from quant.planning.request import EngineRequest
from quant.planning.scheme_plans import SchemePlan, plan_scheme
from quant.schemes import SchemeRow
from quant.vllm.kernels import has_fp8_cache

#: sequences planned for where nothing fits with vLLM's own number of them: fewer graphs, a smaller sampler
_FEW = 16
#: contexts planned for where none is asked and the usual one does not fit
_SHORTER = (4096, 2048)


@dataclass(frozen=True)
class Question:
    """A model on GPUs, and what is to be chosen among.

    Attributes:
        gpu: of ``devices`` the smallest.
        margin: share of the free memory to leave unused.
        own_context, own_ranks: whether nobody has asked for a context, for a number of ranks.
    """

    spec: ModelSpec
    devices: Sequence[Gpu]
    gpu: Gpu
    rows: Sequence[SchemeRow]
    request: EngineRequest
    goal: Goal
    margin: float
    own_context: bool
    own_ranks: bool

    def planned(self, row: SchemeRow, request: EngineRequest) -> SchemePlan:
        return plan_scheme(self.spec, self.devices, self.gpu, row, request, self.margin)


@dataclass(frozen=True)
class Answer:
    """What is chosen, of the plans of all schemes for a request; ``said``: how that differs from what was
    asked."""

    request: EngineRequest
    plans: tuple[SchemePlan, ...]
    chosen: SchemePlan | None
    said: str = ""


def answer(asked: Question) -> Answer:
    """The scheme to take; ``chosen`` is None where none fits, whatever is left out."""
    spec, goal = asked.spec, asked.goal
    plans = tuple(asked.planned(row, asked.request) for row in asked.rows)
    chosen = choose(plans, goal)
    for_speed = chosen is not None and not spec.quantization and goal.objective == "throughput"
    hopeful = _hopeful(spec, plans, chosen, goal, for_speed)
    for smaller, said in _others(asked, chosen, for_speed) if hopeful else ():
        again = tuple(asked.planned(p.row, smaller) for p in hopeful)
        other = choose(again, goal)
        if other is not None and (chosen is None or _better(other, chosen, goal, for_speed)):
            replanned = {p.scheme: p for p in again}
            plans = tuple(replanned.get(row.name) or asked.planned(row, smaller) for row in asked.rows)
            return Answer(smaller, plans, other, said)
    return Answer(asked.request, plans, chosen)


def _others(
    asked: Question, chosen: SchemePlan | None, for_speed: bool
) -> Iterator[tuple[EngineRequest, str]]:
    """Requests to try instead, each with what to say of it."""
    spec, request, gpu = asked.spec, asked.request, asked.gpu
    within = "nothing as fast" if for_speed else f"nothing within {asked.goal.limit:g} % of expected loss"
    what = within if chosen else "nothing"
    others = _smaller(request, gpu, asked.own_context and chosen is None, what)
    if for_speed:
        others = ((r, said) for r, said in others if r.max_num_seqs == request.max_num_seqs)
    # a file that is quantized already may be cut by fewer ranks only; that is no reason to make it anew
    if asked.own_ranks and (chosen is None or (spec.quantization and not chosen.ready)):
        others = chain(others, _stages(spec, request, what))
    if chosen is None:
        others = chain(others, _eager(request, gpu, asked.own_context))
    return others


def _better(other: SchemePlan, chosen: SchemePlan, goal: Goal, for_speed: bool) -> bool:
    """Whether what a smaller request holds is taken instead of what the whole one does."""
    if for_speed and not is_faster(other, chosen, goal):
        return False
    return other.ready or other.safe >= chosen.safe


def _hopeful(
    spec: ModelSpec, plans: Sequence[SchemePlan], chosen: SchemePlan | None, goal: Goal, for_speed: bool
) -> list[SchemePlan]:
    """The schemes worth a second look under a smaller request. One whose weights alone are too large needs
    none; what is within the limit gets one before another is made at a loss, of a file that is quantized
    already that file; where speed decides, what does not hold what was asked may be faster than what does."""
    hopeful = [p for p in plans if p.plan and p.plan.weights_bytes < p.plan.requested_bytes]
    if chosen is None:
        return hopeful
    if for_speed:
        return [p for p in hopeful if not p.meets and p.loss[1] <= goal.limit and not p.condition]
    lossy = chosen.loss[1] > goal.limit and (spec.quantization or goal.objective == "balanced")
    return [
        p
        for p in hopeful
        if lossy and (p.ready if spec.quantization else p.loss[1] <= goal.limit and not p.condition)
    ]


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


def _eager(request: EngineRequest, gpu: Gpu, own_context: bool) -> Iterator[tuple[EngineRequest, str]]:
    """The least that a start takes, without CUDA graphs and compilation, where nothing else fits: a small GPU
    with a model that just fits is served that way, slower."""
    if request.enforce_eager or gpu.platform == "cpu":
        return
    *_, least = [request, *(smaller for smaller, _ in _smaller(request, gpu, own_context=False))]
    for context in (request.context or 0, *(_SHORTER if own_context else ())):
        if context <= (request.context or 0):
            shorter = f" for {context:,} tokens" if context != request.context else ""
            yield (
                replace(least, context=context, enforce_eager=True),
                f"planned with --enforce-eager{shorter}: with CUDA graphs, which decode faster, and the "
                "first start's compilation nothing surely fits",
            )


def _stages(spec: ModelSpec, request: EngineRequest, what: str) -> Iterator[tuple[EngineRequest, str]]:
    """The same GPUs in stages of fewer ranks, which cut groups that all of them would not divide. ``what`` is
    said not to fit otherwise."""
    if request.pipeline_parallel > 1:
        return
    for ranks in (t for t in range(request.ranks - 1, 0, -1) if request.ranks % t == 0):
        stages = request.ranks // ranks
        if stages <= spec.layers and not parallel_problems(spec, ranks):
            changed = replace(request, tensor_parallel=ranks, pipeline_parallel=stages)
            yield (
                changed,
                f"planned as {stages} stages of {ranks} GPU{'s' if ranks > 1 else ''}: over {request.ranks} "
                f"that share every layer {what} surely fits",
            )
