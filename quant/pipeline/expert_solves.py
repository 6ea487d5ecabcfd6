"""The experts of a mixture, quantized: those of equal shape a few at a time, on every core."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import nn

from quant.calibration.statistics import Statistics
from quant.models.adapter import InputGroup
from quant.models.experts import Experts, find_experts
from quant.models.sources import expert_source
from quant.outlier_suppression.base import Place
from quant.pipeline.expert_ranks import gathered, in_rounds
from quant.pipeline.experts import (
    MOST_PRIOR,
    Aside,
    Calibration,
    ExpertInputs,
    at_a_time,
    coverage,
    expert_statistics,
    in_chunks,
    layer_statistics,
    workers_for,
)
from quant.pipeline.folding import Fold, can_take_rows
from quant.pipeline.group_solves import (
    SPREAD,
    BlockUnderWay,
    GroupSolver,
    Kin,
    demand_finite,
    spread,
    stacked_weights,
)
from quant.pipeline.memory import give_back
from quant.pipeline.ranks import ALONE, replace_rank
from quant.pipeline.records import Clock
from quant.quantizers import GPTQQuantizer, Quantized, Quantizer
from quant.recipe import Assignment
from quant.report.value import NOT_HELD_OUT, NOT_ROUTED, FoldResult
from quant.tensors import QuantizedTensor
from quant.threads import side_by_side

#: Tokens of the held-out row that a layer's error is measured on; and an expert's, of which there are many.
ERROR_TOKENS, EXPERT_ERROR_TOKENS = 256, 128
#: Sets of experts that are solved before the heap's free parts are given back. Small things that outlive a
#: set lie among its buffers, and the heap grows for the next one's.
GIVEN_BACK = 16
#: What is done at once: experts, and the names of the linears of each that read the same.
Some = dict[int, list[str]]
#: What is known of a whole layer's tokens: their statistics before its first product, or the tokens.
Prior = Statistics | ExpertInputs | None


@dataclass(frozen=True)
class _Solved:
    """What became of an expert's linear: its name in the block, the evidence of
    :meth:`GroupSolver.going_on`, what its input was divided by, fp32 [K], or None, and the seconds that it
    took; and where that was its own, what its first product has become, by name, and how."""

    name: str
    expert: int
    result: Quantized
    evidence: tuple[float, float, float | None]
    factor: torch.Tensor | None
    seconds: float = 0.0
    first: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    folds: Mapping[str, FoldResult] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """The experts of a layer before one product.

    Attributes:
        work: the block they are in.
        group: the linears that are to be quantized.
        module, experts: what holds them.
        routed: what each expert reads; ``held_out``: of the row that errors are measured on, or None.
        first: what is known of the whole layer's tokens before its first product, or None.
        factors, said: what every expert's input is divided by before the first product, fp32 [K], or None;
            and what to say of it.
    """

    work: BlockUnderWay
    group: InputGroup
    module: nn.Module
    experts: Experts
    routed: ExpertInputs
    held_out: ExpertInputs | None
    first: ExpertInputs | None
    factors: torch.Tensor | None = None
    said: tuple[str, ...] = ()

    def by_expert(self) -> Some:
        """The linears of each expert."""
        found: Some = {}
        for name in self.group.linears:
            place = self.work.linears[name].place
            assert place is not None and place.expert is not None
            found.setdefault(place.expert, []).append(name)
        return found

    def sample(self, expert: int) -> torch.Tensor | None:
        """[≤ 128, K], what an expert reads of the held-out row, or None."""
        held = None if self.held_out is None else self.held_out.of(expert)[0][-EXPERT_ERROR_TOKENS:]
        return held if held is not None and len(held) else None


@dataclass(frozen=True)
class ExpertSolver:
    """Quantizes the experts of a block's layers; ``priors``: by experts module, what the first product read,
    while the second has a use for it."""

    solver: GroupSolver
    clock: Clock
    priors: dict[str, ExpertInputs] = field(default_factory=dict)

    @property
    def how(self) -> Calibration:
        return self.solver.plan.recipe.moe_calibration

    def solve(
        self,
        work: BlockUnderWay,
        group: InputGroup,
        kin: Kin,
        routed: ExpertInputs,
        held_out: ExpertInputs | None,
    ) -> None:
        """Quantizes the experts of a layer for one product, as many at a time as memory is set aside for;
        what they read is closed."""
        give_back()  # what the passes have freed lies beside what a layer of experts takes
        routed = gathered(routed, self.solver.ranks)
        module = work.block.get_submodule(group.experts)
        experts = next(e for e in find_experts(work.block) if e.path == group.experts)
        if group.stage == "up":
            self.solver.records.experts[work.prefix + group.experts] = coverage(
                routed.counts, routed.features
            )
            if self.how != "routed":
                self.priors[group.experts] = routed if self.how == "all" else routed.reduced(MOST_PRIOR)
        layer = Layer(work, group, module, experts, routed, held_out, self.priors.get(group.experts))
        factors, said = self._layer_factors(layer, kin)
        layer, aside = replace(layer, factors=factors, said=said), Aside(routed.scratch)
        plan = self.solver.plan
        alike = groupby(
            layer.by_expert().items(),
            lambda x: (plan.assignments[work.prefix + x[1][0]], [work.linears[n].ref.n for n in x[1]]),
        )
        for (assignment, sizes), members in alike:
            self._solve_alike(layer, assignment, sum(sizes), members, aside)
        for inputs in (routed, held_out, layer.first):
            if inputs is not None and (group.stage == "down" or inputs is not layer.first):
                inputs.close()
        give_back()  # and what this has freed, beside what the passes take

    def _solve_alike(
        self,
        layer: Layer,
        assignment: Assignment,
        outputs: int,
        members: Iterator[tuple[int, list[str]]],
        aside: Aside,
    ) -> None:
        """Quantizes experts of equal shape ([outputs, K] each) and assignment, of which each rank solves
        neighbours; all are told of all."""
        start, device, ranks = time.perf_counter(), layer.routed.device, self.solver.ranks
        prior = self.prior(layer, assignment)
        spent = {"statistics": time.perf_counter() - start, "solve": 0.0}
        counts, prefix = layer.routed.counts, layer.work.prefix
        missing = NOT_HELD_OUT if layer.held_out is None else NOT_ROUTED

        def solve(some: Some) -> tuple[list[_Solved], dict[str, float]]:
            with torch.no_grad():
                return self._solve_some(layer, assignment, some, prior)

        def solved(outcomes: Iterator[tuple[list[_Solved], dict[str, float]]]) -> Iterator[list[_Solved]]:
            for number, (done, seconds) in enumerate(outcomes, 1):
                if not number % GIVEN_BACK:
                    give_back()
                for phase, value in seconds.items():
                    spent[phase] += value
                yield done

        twice = "gradients" in self.solver.needs(assignment)
        workers = workers_for(outputs, layer.routed.features, device, twice)
        everyone, found = [*members], list[_Solved]()
        own = [replace_rank(ranks, r).own(len(everyone)) for r in range(ranks.size)]
        with side_by_side(workers) as several:
            size = at_a_time(outputs, layer.routed.features, device, workers, twice)
            mine = everyone[own[ranks.rank].start : own[ranks.rank].stop]
            lists = solved(several(solve, (dict(chunk) for chunk in in_chunks(mine, size))))
            for rank, done in in_rounds(lists, [-(-len(o) // size) for o in own], ranks):
                for x in done:
                    if rank != ranks.rank:
                        self._put(layer, x)
                    kept = aside.keep_weight(x.result.tensor)
                    # of this rank's own it has been kept
                    others = x.first.items() if rank != ranks.rank else ()
                    first = {n: aside.keep_weight(t) for n, t in others}
                    found.append(replace(x, result=replace(x.result, tensor=kept), first=first))
        for x in sorted(found, key=lambda x: x.expert):  # a rank's experts come in between those of others
            layer.work.made.linears |= {prefix + x.name: x.result.tensor, **x.first}
            for key, fold in x.folds.items():  # in the order of the experts
                self.solver.records.folds.pop(key, None)
                self.solver.records.folds[key] = fold
            tokens = int(counts[x.expert])
            self.solver.records.add(prefix + x.name, x.result, *x.evidence, tokens, x.seconds, missing)
        # the workers' seconds are more than have gone by
        share = (time.perf_counter() - start) / max(sum(spent.values()), 1e-9)
        for phase, value in spent.items():
            self.clock.seconds[phase] += value * share

    def _put(self, layer: Layer, solved: _Solved) -> None:
        """Has the batches under way go on with what another rank has solved."""
        linear, block = layer.work.linears[solved.name], layer.work.block
        value, _ = self.solver.going_on(solved.result.tensor, linear.get(block), solved.factor, None)
        linear.set(block, value)

    def prior(self, layer: Layer, assignment: Assignment) -> Prior:
        """What the statistics of a layer's experts are blended with, or made of."""
        if layer.first is None or layer.group.stage != "up":
            return layer.first
        return layer_statistics(layer.routed, self.solver.needs(assignment))

    def _solve_some(
        self,
        layer: Layer,
        assignment: Assignment,
        some: Some,
        prior: Prior,
    ) -> tuple[list[_Solved], dict[str, float]]:
        """Quantizes some experts at once, and puts their new weights in place; seconds by phase."""
        clock, work = Clock(), layer.work
        with clock.phase("statistics"):
            statistics, notes = self.statistics(layer, assignment, some, prior)
        weights = [work.weights(names) for names in some.values()]
        done = []
        with clock.phase("solve"):
            for seen, names in zip(statistics, some.values(), strict=True):
                demand_finite(seen, work.prefix + names[0])
            factors = self._factors(layer, [*some.values()], weights, statistics)
            stacked, statistics = _divided(stacked_weights(weights), statistics, factors)
            method = unrefined(self.solver.quantizers[assignment], assignment)
            alone = replace(self.solver, ranks=ALONE)  # slices of an expert are all this rank's
            results = alone.rounded(assignment, weights, statistics, stacked, layer.said, method=method)
            for (expert, names), mine, solved, told, factor in zip(
                some.items(), weights, results, notes, factors, strict=True
            ):
                sample, changed = layer.sample(expert), self._changed(work, names, factor)
                for name, weight, result in zip(names, mine, solved, strict=True):
                    value, evidence = self.solver.going_on(result.tensor, weight, factor, sample)
                    work.linears[name].set(work.block, value)
                    noted = replace(result, notes=(*result.notes, *told))
                    done.append(_Solved(name, expert, noted, evidence, factor, 0.0, *changed))
        each = sum(clock.seconds.values()) / len(done)
        return [replace(x, seconds=each) for x in done], clock.seconds

    def statistics(
        self,
        layer: Layer,
        assignment: Assignment,
        some: Some,
        prior: Prior,
    ) -> tuple[list[Statistics], list[tuple[str, ...]]]:
        """Of what each of some experts reads, and what to say of them."""
        if isinstance(prior, Statistics) and self.how == "all":
            return [prior.copy()] * len(some), [()] * len(some)  # of one input, and overwritten
        needs = self.solver.needs(assignment)
        gathered = [
            expert_statistics(layer.module, layer.experts, expert, layer.routed, prior, self.how, needs)
            for expert in some
        ]
        return [seen for seen, _ in gathered], [notes for _, notes in gathered]

    def _layer_factors(self, layer: Layer, kin: Kin) -> tuple[torch.Tensor | None, tuple[str, ...]]:
        """Factors for what all experts of a layer read before the first product, whoever it is sent to; and
        what to say of them."""
        solver, work, group = self.solver, layer.work, layer.group
        assignment = solver.assignment(work.prefix, group)
        suppressor = solver.suppressors[assignment]
        if suppressor is None or group.stage != "up":
            return None, ()
        with self.clock.phase("statistics"):
            statistics = layer_statistics(layer.routed, solver.needs(assignment))
        weights = stacked_weights([work.weights(spread(group.linears, SPREAD))])[0]
        with self.clock.phase("solve"):
            return solver.suppress(
                suppressor, group, kin, work.prefix, weights, statistics, assignment.scheme, work.made
            )

    def _factors(
        self,
        layer: Layer,
        experts: Sequence[Sequence[str]],
        weights: Sequence[Sequence[torch.Tensor]],
        statistics: Sequence[Statistics],
    ) -> list[torch.Tensor | None]:
        """For each of some experts, given by their linears, the factors of its input, fp32 [K]: those of the
        whole layer before the first product; before the second its own, folded into the rows of its up
        projection."""
        if layer.group.stage == "up" or not layer.group.source:
            return [layer.factors] * len(experts)
        return [
            self._own_factors(layer.work, name, mine, seen)
            for (name, *_), mine, seen in zip(experts, weights, statistics, strict=True)
        ]

    def _changed(
        self, work: BlockUnderWay, names: Sequence[str], factor: torch.Tensor | None
    ) -> tuple[Mapping[str, QuantizedTensor], Mapping[str, FoldResult]]:
        """What dividing the input of an expert's second product by factors of its own has made of its first,
        and how."""
        key = work.prefix + names[0]
        source = expert_source(names[0], work.linears)
        if factor is None or source is None or key not in self.solver.records.folds:
            return {}, {}
        up = work.prefix + source
        return {up: work.made.linears[up]}, {key: self.solver.records.folds[key]}

    def _own_factors(
        self, work: BlockUnderWay, name: str, weights: Sequence[torch.Tensor], seen: Statistics
    ) -> torch.Tensor | None:
        solver = self.solver
        assignment, source = solver.plan.assignments[work.prefix + name], expert_source(name, work.linears)
        suppressor, up = solver.suppressors[assignment], work.made.linears.get(f"{work.prefix}{source}")
        if suppressor is None or source is None or "linear" not in suppressor.sources:
            return None
        if up is None or not can_take_rows(up) or not seen.tokens:
            return None
        fold = Fold(InputGroup((name,), source), work.prefix, Place("linear", True), 0.0)
        stacked = stacked_weights([weights])[0]
        return solver.folded(suppressor, fold, False, stacked, seen, assignment.scheme, work.made)[0]


def unrefined(quantizer: Quantizer, assignment: Assignment) -> Quantizer:
    """GPTQ without its sweeps, unless they are asked for: experts see few tokens each, and it would take as
    long again as solving them."""
    if isinstance(quantizer, GPTQQuantizer) and "sweeps" not in dict(assignment.options):
        return replace(quantizer, sweeps=0)
    return quantizer


def _divided(
    stacked: torch.Tensor, statistics: Sequence[Statistics], factors: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, list[Statistics]]:
    """Weights fp32 [B, N, K], times the factors of each, and the statistics of inputs that are divided by
    them; in place. Several may share theirs."""
    divided: dict[int, Statistics] = {}
    made = list(statistics)
    for index, factor in enumerate(factors):
        if factor is not None:
            stacked[index] *= factor
            key = id(statistics[index])
            if key not in divided:
                divided[key] = statistics[index].divided(factor)
            made[index] = divided[key]
    return stacked, made
