"""Methods that need calibration: one decoder block at a time, its linears quantized as the calibration tokens
go through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import nn

from quant.calibration.parts import PartSums
from quant.calibration.statistics import Accumulator, Statistics
from quant.models.adapter import InputGroup
from quant.models.attention import observed_attention
from quant.models.experts import Routed
from quant.models.skeleton import Skeleton
from quant.outlier_suppression import Suppressor
from quant.pipeline.activation_store import ActivationStore, Batches, Calls
from quant.pipeline.division import Parts
from quant.pipeline.expert_gradients import ExpertGradients, GradientExpertSolver, InnerGradients
from quant.pipeline.expert_solves import ERROR_TOKENS, ExpertSolver
from quant.pipeline.experts import ExpertInputs
from quant.pipeline.gradients import Seen
from quant.pipeline.group_solves import BlockResult, BlockUnderWay, GroupSolver, Kin, demand_finite
from quant.pipeline.memory import MAPPED, give_back
from quant.pipeline.plan import JobPlan
from quant.pipeline.ranks import ALONE, Ranks
from quant.pipeline.records import Clock, Records
from quant.pipeline.scratch import ScratchFiles
from quant.pipeline.staged import StagedForward, computed, run_block
from quant.quantizers import Quantizer
from quant.recipe import Assignment
from quant.tensors import QuantizedTensor


@dataclass
class _Observed:
    """What the batches show of the inputs of a block's groups.

    Attributes:
        held_out: the batch that errors are measured on; its inputs are ``samples``, [≤ 256, K].
        parts: which part of all rows each batch is of, and how many parts there are.
        store: takes what waits.
        needs: the statistics that a group asks for.
        routed, routed_samples: what experts read, and of it the held-out batch's.
    """

    held_out: int | None
    parts: Parts
    store: ActivationStore
    needs: Callable[[InputGroup], frozenset[str]]
    sums: dict[InputGroup, PartSums[Accumulator]] = field(default_factory=dict)
    samples: dict[InputGroup, torch.Tensor] = field(default_factory=dict)
    routed: dict[InputGroup, ExpertInputs] = field(default_factory=dict)
    routed_samples: dict[InputGroup, ExpertInputs] = field(default_factory=dict)

    def add(self, group: InputGroup, batch: int, inputs: torch.Tensor | Routed) -> None:
        """Takes what a batch shows: inputs [B, T, K]."""
        if isinstance(inputs, Routed):
            kept = self.routed_samples if batch == self.held_out else self.routed
            kept.setdefault(group, ExpertInputs(self.store.files)).add(inputs)
        elif batch == self.held_out:
            self.samples[group] = inputs.reshape(-1, inputs.shape[-1])[-ERROR_TOKENS:].clone()
        else:
            of, count = self.parts
            if group not in self.sums:
                needs, put = self.needs(group), self.store.put
                empty = partial(Accumulator, inputs.shape[-1], inputs.device, needs, count)
                self.sums[group] = PartSums(empty, put)
            self.sums[group].add(of[batch], inputs)


def before(
    block: nn.Module, group: InputGroup, kept: Mapping[str, ExpertGradients]
) -> ExpertGradients | InnerGradients | None:
    """What the experts of a group read before its product, of what is kept by module; None of a row that is
    not."""
    first = kept.get(group.experts)
    if first is None or group.stage == "up":
        return first
    return InnerGradients.of_layer(first, block, group.experts)


@dataclass(frozen=True)
class BlockQuantizer:
    """Quantizes the linears of one block after another, each with the quantizer and the suppressor of its
    assignment; those whose inputs no pass shows by ``rounded``, from their weights alone."""

    plan: JobPlan
    quantizers: Mapping[Assignment, Quantizer]
    suppressors: Mapping[Assignment, Suppressor | None]
    rounded: Callable[[str], QuantizedTensor]
    records: Records
    clock: Clock
    ranks: Ranks = ALONE

    @cached_property
    def solver(self) -> GroupSolver:
        return GroupSolver(self.plan, self.quantizers, self.suppressors, self.records, self.ranks)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that anything in the job asks for; empty where no calibration is needed."""
        return frozenset().union(*(self.solver.needs(a) for a in self.quantizers)) | (
            {"range"} if self.plan.recipe.kv_cache_scheme else frozenset()
        )

    def quantize(
        self,
        skeleton: Skeleton,
        index: int,
        block: nn.Module,
        batches: Batches,
        calls: Calls,
        store: ActivationStore,
        held_out: int | None,
        need_outputs: bool,
        parts: Parts | None = None,
    ) -> BlockResult:
        """Quantizes the chosen linears of one block and leaves its outputs in ``batches``.

        ``parts``: which part of all rows each batch is of, and how many parts there are; None: all of one.
        """
        prefix, linears, made = skeleton.block_prefix(index), skeleton.linears(index), BlockResult()
        every = skeleton.sourced_groups(index) if any(self.suppressors.values()) else skeleton.groups(index)
        work = BlockUnderWay(block, linears, prefix, every, skeleton.norm_offset, made)
        chosen = self._chosen_groups(every, prefix)
        self._round_unseen(work, chosen)
        cache = [spec.name for unit in self.plan.units if unit.block == index for spec in unit.made]
        observing = observed_attention(block, made.observe_cache) if cache else nullcontext()
        if not chosen:
            with computed(block), observing:
                run_block(block, index, batches, calls)
            made.finish_cache(cache, self.ranks)
            return made

        solver, of = self.solver, parts or ([0] * len(batches), 1)
        seen = _Observed(held_out, of, store, lambda g: solver.needs(solver.assignment(prefix, g)))

        def observe(group: InputGroup, batch: int, inputs: torch.Tensor | Routed) -> None:
            with self.clock.phase("statistics"):
                seen.add(group, batch, inputs)

        modules = {name: linear.module for name, linear in linears.items() if not linear.shared}
        staged = StagedForward(
            block, index, list(chosen), batches, calls, store, observe, need_outputs, modules
        )
        clock = self.clock.seconds
        before, other = time.perf_counter(), clock["statistics"] + clock["solve"]
        # not observed: the K and V of weights that are not quantized yet are none of the cache's
        with computed(block):
            staged.look_ahead()
        experts = ExpertSolver(solver, self.clock)
        with computed(block), observing:
            for group in staged.stages():
                if group.experts:
                    routed, aside = seen.routed.pop(group), seen.routed_samples.pop(group, None)
                    experts.solve(work, group, solver.kin(work, chosen[group]), routed, aside)
                else:
                    self._solve_plain(work, group, chosen[group], seen)
        made.finish_cache(cache, self.ranks)
        clock["forward"] += time.perf_counter() - before - (clock["statistics"] + clock["solve"] - other)
        return made

    def quantize_seen(
        self, skeleton: Skeleton, index: int, block: nn.Module, seen: Seen, statistics: dict[str, Statistics]
    ) -> BlockResult:
        """Quantizes the chosen linears of one block, each by what a pass through the full-precision model has
        shown of it; its ``statistics`` are those of :meth:`shown`."""
        prefix, linears, made = skeleton.block_prefix(index), skeleton.linears(index), BlockResult()
        every = skeleton.sourced_groups(index) if any(self.suppressors.values()) else skeleton.groups(index)
        work = BlockUnderWay(block, linears, prefix, every, skeleton.norm_offset, made)
        chosen = self._seen_groups(every, prefix)
        self._round_unseen(work, chosen)
        solver = replace(self.solver, ranks=ALONE)  # the others are at other blocks
        experts = GradientExpertSolver(solver, self.clock)
        for key, whole in chosen.items():
            if key.experts:
                inputs = (before(block, key, kept) for kept in (seen.routed, seen.held_out))
                routed, held_out = inputs
                assert routed is not None
                experts.solve(work, key, solver.kin(work, whole), routed, held_out)
                continue
            group = key if key.norm_offset is not None else replace(key, norm_offset=work.norm_offset)
            for name in group.linears:
                start = time.perf_counter()
                weight, own = work.weights([name])[0], statistics.pop(name)
                with self.clock.phase("solve"), torch.no_grad():
                    give_back()
                    demand_finite(own, prefix + name)
                    alone, kin = replace(group, linears=(name,)), self._kin_of(work, whole, name)
                    alike = group.linears
                    others = work.weights([n for n in alike if n != name])
                    (result,), factors = solver.solve(alone, kin, prefix, [weight], own, made, others)
                    sample = seen.samples.pop(name, None)
                    _, evidence = solver.going_on(result.tensor, weight, factors, sample)
                seconds = time.perf_counter() - start
                self.records.add(prefix + name, result, *evidence, own.tokens, seconds)
        seen.release()
        return made

    def shown(self, seen: Seen, rank: int = 0) -> dict[str, Statistics]:
        """The statistics of each linear that a pass of all ranks has shown, for the rank that solves the
        block; for others nothing. The sums are handed over."""
        with self.clock.phase("statistics"):
            found = {n: self.ranks.total_for(rank, seen.sums.pop(n), seen.parts) for n in [*seen.sums]}
        return {name: own for name, own in found.items() if own is not None}

    def to_be_seen(
        self, skeleton: Skeleton, index: int, store: ActivationStore | None = None, parts: int = 1
    ) -> Seen:
        """What a pass has to show of a block.

        Args:
            store: takes what waits.
            parts: how many parts all rows make.
        """
        prefix, linears = skeleton.block_prefix(index), skeleton.linears(index)
        groups = self._seen_groups(skeleton.groups(index), prefix)
        plain = {
            name: self.plan.assignments[prefix + name]
            for group in groups
            if not group.experts
            for name in group.linears
        }
        return Seen(
            {name: (linears[name], self.solver.needs(assignment)) for name, assignment in plain.items()},
            frozenset(group.experts for group in groups if group.experts),
            ScratchFiles() if store is None else store.files,
            {name: self.solver.outputs(assignment) for name, assignment in plain.items()},
            parts,
            None if store is None else store.put,
        )

    def _seen_groups(self, groups: Sequence[InputGroup], prefix: str) -> dict[InputGroup, InputGroup]:
        """:meth:`_chosen_groups` less the experts of which nothing is asked."""
        return {
            key: whole
            for key, whole in self._chosen_groups(groups, prefix).items()
            if not key.experts or self.solver.needs(self.solver.assignment(prefix, key))
        }

    def _kin_of(self, work: BlockUnderWay, whole: InputGroup, name: str) -> Kin:
        """All that reads what one linear of a group reads."""
        kin = self.solver.kin(work, whole)
        others = [n for n in whole.linears if n != name]
        if not others:
            return kin

        def rows() -> list[torch.Tensor]:
            return [w.float() for w in work.weights(others)] + kin.rows()

        return Kin(kin.whole, True, rows)

    def _round_unseen(self, work: BlockUnderWay, groups: Collection[InputGroup]) -> None:
        """Linears whose inputs no pass shows."""
        seen = {name for group in groups for name in group.linears}
        for name, linear in work.linears.items():
            if work.prefix + name in self.plan.linears and name not in seen:
                tensor = work.made.linears[work.prefix + name] = self.rounded(work.prefix + name)
                linear.set(work.block, tensor.dequantize().to(linear.get(work.block).dtype))

    def _solve_plain(self, work: BlockUnderWay, key: InputGroup, whole: InputGroup, seen: _Observed) -> None:
        """Quantizes linears that share an input (``key``), of which ``whole`` are all that do, and puts their
        new weights in place."""
        start = time.perf_counter()
        solver, weights = self.solver, work.weights(key.linears)
        with self.clock.phase("statistics"):
            statistics = self.ranks.total(seen.sums.pop(key), seen.parts[1])
        with self.clock.phase("solve"):
            if statistics.hessian is not None and statistics.hessian.nbytes > MAPPED:
                # the solve's buffers are not cut from the heap, whose free parts would lie beside them
                give_back()
            demand_finite(statistics, work.prefix + key.linears[0])
            group = key if key.norm_offset is not None else replace(key, norm_offset=work.norm_offset)
            kin = solver.kin(work, whole)
            results, factors = solver.solve(group, kin, work.prefix, weights, statistics, work.made)
        for name, weight, result in zip(group.linears, weights, results, strict=True):
            with self.clock.phase("solve"):
                value, evidence = solver.going_on(result.tensor, weight, factors, seen.samples.get(key))
            seconds = time.perf_counter() - start
            self.records.add(work.prefix + name, result, *evidence, statistics.tokens, seconds)
            work.linears[name].set(work.block, value)

    def _chosen_groups(self, groups: Sequence[InputGroup], prefix: str) -> dict[InputGroup, InputGroup]:
        """The linears to quantize that share an input and are quantized alike → all that share the input."""
        chosen: dict[InputGroup, InputGroup] = {}
        for group in groups:
            if group.experts:  # each is solved on its own
                names = tuple(n for n in group.linears if prefix + n in self.plan.linears)
                chosen |= {replace(group, linears=names): group} if names else {}
                continue
            alike: dict[Assignment, list[str]] = {}
            for name in group.linears:
                if prefix + name in self.plan.linears:
                    alike.setdefault(self.plan.assignments[prefix + name], []).append(name)
            chosen |= {replace(group, linears=tuple(names)): group for names in alike.values()}
        return chosen
