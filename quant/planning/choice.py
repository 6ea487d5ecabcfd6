"""What decides among the schemes that were planned: the objective, and the reason in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quant import defaults
from quant.errors import one_of
from quant.hardware import Gpu
from quant.models.spec import ModelSpec
from quant.planning.cuts import group_problems, parallel_problems
from quant.planning.gguf import advised
from quant.planning.memory import plan
from quant.planning.request import EngineRequest
from quant.planning.scenarios import Scenario
from quant.planning.scheme_plans import SchemePlan
from quant.units import format_requests, format_size

#: GPUs of a machine; more are stages on further machines
MACHINE = 8
#: a faster scheme is taken for a more precise one where it is faster by more than this share
_GAIN = 0.1


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


def choose(plans: Sequence[SchemePlan], goal: Goal) -> SchemePlan | None:
    """The plan to take, among those that keep the margin, else among those that surely hold what was asked.
    Where nothing is within the limit, ``balanced`` takes the most precise that fits."""
    sure = [p for p in plans if p.meets and p.plan and p.plan.sure and not p.condition]
    bound = defaults.OBJECTIVES[goal.objective][0]
    # a file that is quantized already is not made again for the sake of a margin
    for pool in ([p for p in sure if p.safe or p.ready], sure):
        if within := [p for p in pool if p.loss[1] <= goal.limit]:
            return most_precise(within) if bound is None else _fastest(within, bound)
        if pool and goal.objective == "balanced":
            return most_precise(pool)
    return None


def is_faster(one: SchemePlan, other: SchemePlan, goal: Goal) -> bool:
    """Whether a plan is faster than another by more than a tenth, by the bound of the objective."""
    bound = defaults.OBJECTIVES[goal.objective][0]
    return bound is not None and one.bound(bound) > other.bound(bound) * (1 + _GAIN)


def _fastest(pool: Sequence[SchemePlan], bound: str) -> SchemePlan:
    """The most precise of the fastest: of what this build makes, where it makes any of them."""
    made = [p for p in pool if p.makeable] or pool
    best = max(p.bound(bound) for p in made)
    equal = [p for p in made if p.bound(bound) >= best * (1 - _GAIN)]
    return min(equal, key=lambda p: (sum(p.loss), -p.bound(bound)))


def most_precise(pool: Sequence[SchemePlan]) -> SchemePlan:
    """The least expected loss; ties by what this build makes, then by speed."""
    best = min(sum(p.loss) for p in pool)
    equal = [p for p in pool if sum(p.loss) == best]
    return max(equal, key=lambda p: (p.makeable, p.bound("decode_bound")))


def reason_of(
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
        elif chosen is most_precise([p for p in fits if p.loss[1] <= goal.limit] or fits):
            reason = (
                f"the most precise, and none within {goal.limit:g} % of expected loss is faster by a tenth"
            )
        else:
            reason = f"the fastest by its bounds{use} among those within {goal.limit:g} % of expected loss"
        alone = sum(p.plan is not None for p in plans) == 1  # there was nothing to choose
        opening = f"{chosen.label} holds what was asked" if alone else f"{chosen.label} is {reason}"
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
        f"{what_would(spec, gpu, best, request)}"
    )


def what_would(spec: ModelSpec, gpu: Gpu, best: SchemePlan, request: EngineRequest) -> str:
    """The smallest change that makes the smallest scheme start, found by planning it: no graphs, fewer
    sequences, more GPUs of a machine, more machines."""
    assert best.plan is not None
    if gpu.platform == "cpu":
        return (
            "take a machine with more memory, a smaller model, or llama.cpp with "
            f"{advised(spec, gpu, request.context or spec.max_context)}"
        )
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
    for ranks in (r for r in (2, 4, MACHINE) if r > request.ranks and not parallel_problems(spec, r)):
        count = ranks * request.pipeline_parallel
        words = f"{count} of these GPUs (--gpu-count {count})"
        tries.append((words, count, replace(request, tensor_parallel=ranks)))
    if request.pipeline_parallel == 1 and not parallel_problems(spec, MACHINE):
        for machines in (m for m in (2, 4) if m <= spec.layers):
            count = machines * MACHINE
            words = (
                f"{machines} machines of {MACHINE} of these GPUs each: --tensor-parallel {MACHINE} "
                f"--pipeline-parallel {machines} (--gpu-count {count})"
            )
            changed = replace(request, tensor_parallel=MACHINE, pipeline_parallel=machines)
            tries.append((words, count, changed))
    for words, count, changed in tries:
        if plan(spec, [gpu] * count, best.stored, changed).sure:
            return f"it would start with {words}"
    return (
        f"not even 4 machines of {MACHINE} of these GPUs would do: take a smaller model, or llama.cpp in "
        f"host memory with {advised(spec, gpu, request.context or spec.max_context)}"
    )
