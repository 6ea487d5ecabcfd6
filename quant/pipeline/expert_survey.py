"""What routed experts would lose in every scheme that they may take.

An expert's candidates are made by the statistics that a job would make it by, with ``--moe-calibration`` as
it is (:class:`~quant.pipeline.expert_gradients.GradientExpertSolver`). What one costs is by the tokens that
its router sends it alone, whatever it was made by: their loss under both Hessians
(:mod:`quant.pipeline.survey`), times their share of all tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from quant.calibration.statistics import Statistics
from quant.checkpoint.dtypes import TORCH
from quant.models.adapter import InputGroup
from quant.models.experts import find_experts
from quant.models.skeleton import Skeleton
from quant.pipeline.blocks import before
from quant.pipeline.candidates import Candidate
from quant.pipeline.expert_gradients import ExpertGradients, GradientExpertSolver
from quant.pipeline.expert_solves import Layer, Prior, Some, unrefined
from quant.pipeline.experts import MOST_PRIOR, at_a_time, in_chunks
from quant.pipeline.group_solves import (
    BlockResult,
    BlockUnderWay,
    GroupSolver,
    demand_finite,
    stacked_weights,
)
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.methods import make_quantizer
from quant.quantizers.nearest import round_to_nearest
from quant.quantizers.two_sided import loss
from quant.recipe import Assignment
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor

#: What the two Hessians are asked for by.
BOTH = frozenset({"hessian", "gradients"})


@dataclass(frozen=True)
class Made:
    """Linears of one expert that read the same, in one candidate, and the nats that all of them cost."""

    names: Sequence[str]
    number: int
    tensors: Sequence[QuantizedTensor]
    lost: float
    seconds: float


class ExpertSurvey:
    """Surveys the experts of a job's blocks in the candidates of a pool."""

    def __init__(self, manager: QuantizationManager, pool: Sequence[Candidate]):
        plan, self._pool = manager.plan, pool
        made = {c.assignment: make_quantizer(c.assignment) for c in pool if c.assignment is not None}
        nothing = dict.fromkeys(made)
        routed = plan.recipe.model_copy(update={"moe_calibration": "routed"})
        self._solver = GradientExpertSolver(GroupSolver(plan, made, nothing, manager.records), manager.clock)
        self._judge = GradientExpertSolver(
            GroupSolver(replace(plan, recipe=routed), made, nothing, manager.records), manager.clock
        )

    def candidates(
        self,
        skeleton: Skeleton,
        index: int,
        block: nn.Module,
        seen: tuple[Mapping[str, ExpertGradients], Mapping[str, ExpertGradients]],
        wanted: Callable[[str], Sequence[int]],
        tokens: int,
    ) -> Iterator[Made]:
        """Every candidate of a block's experts.

        Args:
            seen: by module what candidates are made by, and what they are judged by.
            wanted: numbers of the candidates of a linear, by its name inside the block; none: it is no
                item's.
            tokens: that went through the block where they are judged.
        """
        work = _under_way(skeleton, index, block)
        self._solver.priors.clear()
        for group in _groups(work, seen[1], wanted):
            yield from self._of_group(work, group, seen, wanted, tokens)

    def guesses(
        self,
        skeleton: Skeleton,
        index: int,
        block: nn.Module,
        judged: Mapping[str, ExpertGradients],
        wanted: Callable[[str], Sequence[int]],
        tokens: int,
    ) -> Iterator[tuple[Sequence[str], int, float]]:
        """Of linears of an expert that read the same, in each candidate's scheme, what rounding to nearest
        would lose under the diagonals of both Hessians; arguments are as for :meth:`candidates`."""
        work = _under_way(skeleton, index, block)
        dtype = TORCH[self._solver.solver.plan.dtype]
        for group in _groups(work, judged, wanted):
            inputs = before(block, group, judged)
            assert inputs is not None
            module = block.get_submodule(group.experts)
            experts = next(e for e in find_experts(block) if e.path == group.experts)
            layer = Layer(work, group, module, experts, inputs, None, None)
            for expert, names in layer.by_expert().items():
                both = self._judge.of_expert(layer, expert, names, None, BOTH)[0]
                demand_finite(both, work.prefix + names[0])
                weight = stacked_weights([work.weights(names)])[0]
                schemes = {}
                for number in wanted(names[0]):
                    assignment = self._pool[number].assignment
                    assert assignment is not None
                    schemes[number] = assignment.scheme.weights
                lost = {s: diagonal_loss(weight, s, both, dtype) for s in dict.fromkeys(schemes.values())}
                for number, scheme in schemes.items():
                    yield names, number, lost[scheme] * both.tokens / max(tokens, 1)

    def _of_group(
        self,
        work: BlockUnderWay,
        group: InputGroup,
        seen: tuple[Mapping[str, ExpertGradients], Mapping[str, ExpertGradients]],
        wanted: Callable[[str], Sequence[int]],
        tokens: int,
    ) -> Iterator[Made]:
        solver, module = self._solver, work.block.get_submodule(group.experts)
        experts = next(e for e in find_experts(work.block) if e.path == group.experts)
        own, judged = (before(work.block, group, kept) for kept in seen)
        assert own is not None and judged is not None
        if group.stage == "up" and solver.how != "routed":
            solver.priors[group.experts] = own if solver.how == "all" else own.reduced(MOST_PRIOR)
        first = solver.priors.get(group.experts)
        layer = Layer(work, group, module, experts, own, None, first)
        judging = Layer(work, group, module, experts, judged, None, None)
        priors: dict[frozenset[str], Prior] = {}
        widest = max(sum(work.linears[n].ref.n for n in names) for names in layer.by_expert().values())
        size = at_a_time(widest, own.features, own.device, 1, True)
        for chunk in in_chunks(layer.by_expert().items(), size):
            yield from self._of_some(layer, judging, dict(chunk), priors, wanted, tokens)

    def _of_some(
        self,
        layer: Layer,
        judging: Layer,
        some: Some,
        priors: dict[frozenset[str], Prior],
        wanted: Callable[[str], Sequence[int]],
        tokens: int,
    ) -> Iterator[Made]:
        solver, work = self._solver.solver, layer.work
        both = [self._judge.of_expert(judging, e, names, None, BOTH)[0] for e, names in some.items()]
        for seen, names in zip(both, some.values(), strict=True):
            demand_finite(seen, work.prefix + names[0])
        weights = [work.weights(names) for names in some.values()]
        statistics: dict[frozenset[str], list[Statistics]] = {frozenset(): both}
        for number in wanted(next(iter(some.values()))[0]):
            assignment = self._pool[number].assignment
            assert assignment is not None
            needs = solver.needs(assignment)
            if needs not in statistics:
                statistics[needs] = self._statistics(layer, assignment, some, priors)
            start = time.perf_counter()
            results = solver.rounded(
                assignment,
                weights,
                [s.copy() for s in statistics[needs]],
                stacked_weights(weights),
                method=unrefined(solver.quantizers[assignment], assignment),
            )
            each = (time.perf_counter() - start) / len(some)
            for names, mine, solved, seen in zip(some.values(), weights, results, both, strict=True):
                tensors = [r.tensor for r in solved]
                lost = _lost(mine, tensors, seen) * seen.tokens / max(tokens, 1)
                yield Made(names, number, tensors, lost, each)

    def _statistics(
        self, layer: Layer, assignment: Assignment, some: Some, priors: dict[frozenset[str], Prior]
    ) -> list[Statistics]:
        needs = self._solver.solver.needs(assignment)
        if needs not in priors:
            priors[needs] = self._solver.prior(layer, assignment)
        return self._solver.statistics(layer, assignment, some, priors[needs])[0]


def _under_way(skeleton: Skeleton, index: int, block: nn.Module) -> BlockUnderWay:
    return BlockUnderWay(
        block, skeleton.linears(index), skeleton.block_prefix(index), skeleton.groups(index),
        skeleton.norm_offset, BlockResult(),
    )  # fmt: skip


def _groups(
    work: BlockUnderWay, seen: Mapping[str, ExpertGradients], wanted: Callable[[str], Sequence[int]]
) -> Iterator[InputGroup]:
    """The experts' linears that are surveyed, by what reads the same."""
    for group in work.groups:
        names = tuple(n for n in group.linears if wanted(n)) if group.experts in seen else ()
        if names:
            yield replace(group, linears=names)


def diagonal_loss(
    weight: torch.Tensor,
    scheme: WeightScheme,
    both: Statistics,
    dtype: torch.dtype,
    largest: torch.Tensor | None = None,
) -> float:
    """Nats that rounding a weight fp32 [N, K] to nearest loses, as far as the diagonals of both Hessians
    tell; ``largest``: as for :func:`~quant.quantizers.nearest.round_to_nearest`."""
    assert both.hessian is not None and both.gradients is not None
    inputs = both.hessian.diagonal()
    outputs = both.gradients.diagonal(dim1=-2, dim2=-1).flatten()[: len(weight)]
    trace = float(inputs.sum())
    if not trace > 0:
        return 0.0
    errors = weight - round_to_nearest(weight, scheme, dtype, largest).dequantize()
    return float(outputs @ (errors.square_() @ inputs)) / (2 * trace)


def _lost(weights: Sequence[torch.Tensor], made: Sequence[QuantizedTensor], both: Statistics) -> float:
    """Nats for each token that an expert is sent."""
    assert both.hessian is not None and both.gradients is not None
    trace = float(both.hessian.diagonal().sum())
    if not both.tokens or not trace > 0:
        return 0.0
    errors = torch.cat([w.float() - t.dequantize() for w, t in zip(weights, made, strict=True)])
    return max(float(loss(errors, both.hessian, both.gradients).double().sum()) / (2 * trace), 0.0)
