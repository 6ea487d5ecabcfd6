"""Methods that need calibration: one decoder block at a time, its linears quantized as the calibration tokens
go through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby

import torch
from torch import nn

from quant.calibration.statistics import Accumulator, Statistics
from quant.checkpoint.dtypes import TORCH
from quant.errors import QuantError, SourceFault
from quant.models.adapter import InputGroup
from quant.models.attention import observed_attention
from quant.models.binding import BlockLinear
from quant.models.experts import Routed, find_experts
from quant.models.skeleton import Skeleton
from quant.models.sources import expert_source
from quant.outlier_suppression import Suppressor
from quant.outlier_suppression.base import Place
from quant.pipeline.activation_store import ActivationStore, Batches, Calls
from quant.pipeline.experts import (
    MOST_PRIOR,
    Aside,
    ExpertInputs,
    at_a_time,
    coverage,
    expert_statistics,
    in_chunks,
    layer_statistics,
    side_by_side,
)
from quant.pipeline.folding import Fold, can_take_rows, find_fold, fold_linear, fold_norm
from quant.pipeline.memory import MAPPED, give_back
from quant.pipeline.pieces import PIECE
from quant.pipeline.plan import JobPlan
from quant.pipeline.records import Clock, Records
from quant.pipeline.staged import StagedForward, computed, run_block
from quant.quantizers import Quantized, Quantizer, quantize_many
from quant.quantizers.activations import input_parameters
from quant.recipe import Assignment
from quant.report.value import FoldResult
from quant.schemes import BLOCK, Scheme
from quant.tensors import QuantizedTensor, sum_of_squares
from quant.vllm.config import head_size

#: An input feature this many times as large as the median one is an outlier: its weights may be small and
#: still matter, and few bits round them away.
OUTLIERS = 32.0
#: Linears of a group whose weights are looked at where factors are chosen for several groups at once.
_SPREAD = 32
#: Tokens of the held-out row that a layer's error is measured on.
ERROR_TOKENS = 256


@dataclass
class BlockResult:
    """What a block's quantization makes: linears by file name, source tensors with new values, factors by the
    norm that several groups of linears read, scales of the KV cache."""

    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    folded: dict[str, torch.Tensor] = field(default_factory=dict)
    _cache: torch.Tensor | None = None

    def observe_cache(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Notes the largest magnitudes of K and V, as they go into the cache."""
        largest = torch.stack([key.abs().amax(), value.abs().amax()]).float()
        self._cache = largest if self._cache is None else torch.maximum(self._cache, largest)
        return key, value

    def finish_cache(self, names: Sequence[str]) -> None:
        """Makes the block's cache scales, fp32 [1] each: what maps the largest magnitude seen to the largest
        E4M3 number.

        Raises:
            QuantError: the block has names for them, but no attention that could be observed.
            SourceFault: keys or values hold NaN or infinity.
        """
        for name in names:
            if self._cache is None:
                raise QuantError(
                    f"{name}: the block's attention does not go through transformers' attention functions: "
                    "leave --kv-cache-scheme out"
                )
            largest = self._cache[0 if name.endswith("k_scale") else 1]
            if not bool(torch.isfinite(largest)):
                raise SourceFault(
                    f"{name}: the cache's values hold NaN or infinity on calibration tokens: run quant "
                    "evaluate on the source"
                )
            self.changed[name] = (torch.where(largest == 0, 1.0, largest) / 448.0).reshape(1).cpu()


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

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that anything in the job asks for; empty where no calibration is needed."""
        return frozenset().union(*(self._needs(a) for a in self.quantizers)) | (
            {"range"} if self.plan.recipe.kv_cache_scheme else frozenset()
        )

    def _needs(self, assignment: Assignment) -> frozenset[str]:
        suppressor, activations = self.suppressors[assignment], assignment.scheme.activations
        wanted = self.quantizers[assignment].needs | (suppressor.needs if suppressor else frozenset())
        return wanted | {"range"} if activations is not None and activations.calibrated else wanted

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
    ) -> BlockResult:
        """Quantizes the chosen linears of one block and leaves its outputs in ``batches``."""
        prefix, linears = skeleton.block_prefix(index), skeleton.linears(index)
        scaling = any(self.suppressors.values())
        every = skeleton.sourced_groups(index) if scaling else skeleton.groups(index)
        chosen = self._chosen_groups(every, prefix)
        groups = list(chosen)
        sums: dict[InputGroup, Accumulator] = {}
        samples: dict[InputGroup, torch.Tensor] = {}
        routed: dict[InputGroup, ExpertInputs] = {}
        routed_samples: dict[InputGroup, ExpertInputs] = {}

        def observe(group: InputGroup, batch: int, inputs: torch.Tensor | Routed) -> None:
            with self.clock.phase("statistics"):
                if isinstance(inputs, Routed):
                    kept = routed_samples if batch == held_out else routed
                    kept.setdefault(group, ExpertInputs(store.folder)).add(inputs)
                    return
                if batch == held_out:
                    samples[group] = inputs.reshape(-1, inputs.shape[-1])[-ERROR_TOKENS:].clone()
                    return
                if group not in sums:
                    sums[group] = Accumulator(
                        inputs.shape[-1], inputs.device, self._needs(self._assignment(prefix, group))
                    )
                sums[group].add(inputs)

        made = BlockResult()
        seen = {name for group in groups for name in group.linears}
        for name, linear in linears.items():
            if prefix + name in self.plan.linears and name not in seen:
                made.linears[prefix + name] = self.rounded(prefix + name)
                linear.set(block, made.linears[prefix + name].dequantize().to(linear.get(block).dtype))
        cache = [spec.name for unit in self.plan.units if unit.block == index for spec in unit.made]
        observed = observed_attention(block, made.observe_cache) if cache else nullcontext()
        if not groups:
            with computed(block), observed:
                run_block(block, index, batches, calls)
            made.finish_cache(cache)
            return made

        modules = {name: linear.module for name, linear in linears.items() if not linear.shared}
        staged = StagedForward(block, index, groups, batches, calls, store, observe, need_outputs, modules)
        clock = self.clock.seconds
        before, other = time.perf_counter(), clock["statistics"] + clock["solve"]
        # not observed: the K and V of weights that are not quantized yet are none of the cache's
        with computed(block):
            staged.look_ahead()
        priors: dict[str, ExpertInputs] = {}
        with computed(block), observed:
            for key in staged.stages():
                group = key
                if group.experts:
                    self._solve_experts(
                        block,
                        linears,
                        group,
                        self._kin(chosen[group], every, linears, block),
                        prefix,
                        routed.pop(group),
                        routed_samples.pop(group, None),
                        priors,
                        made,
                    )
                    continue
                start = time.perf_counter()
                weights = [linears[name].get(block) for name in group.linears]
                with self.clock.phase("statistics"):
                    statistics = sums.pop(group).finish()
                with self.clock.phase("solve"):
                    if statistics.hessian is not None and statistics.hessian.nbytes > MAPPED:
                        # the solve's buffers are not cut from the heap, whose free parts would lie beside
                        # them
                        give_back()
                    _demand_finite(statistics, prefix + group.linears[0])
                    if group.norm_offset is None:
                        group = replace(group, norm_offset=skeleton.norm_offset)
                    kin = self._kin(chosen[key], every, linears, block)
                    results, factors = self._solve_group(group, kin, prefix, weights, statistics, made)
                for name, weight, result in zip(group.linears, weights, results, strict=True):
                    with self.clock.phase("solve"):
                        value, evidence = self._going_on(result.tensor, weight, factors, samples.get(key))
                    self.records.add(
                        prefix + name, result, *evidence, statistics.tokens, time.perf_counter() - start
                    )
                    linears[name].set(block, value)
        made.finish_cache(cache)
        clock["forward"] += time.perf_counter() - before - (clock["statistics"] + clock["solve"] - other)
        return made

    def _solve_experts(
        self,
        block: nn.Module,
        linears: Mapping[str, BlockLinear],
        group: InputGroup,
        kin: _Kin,
        prefix: str,
        routed: ExpertInputs,
        held_out: ExpertInputs | None,
        priors: dict[str, ExpertInputs],
        made: BlockResult,
    ) -> None:
        """Quantizes the experts of a layer for one product, as many at a time as memory is set aside for.

        ``priors``: by experts module, what the first product read, while the second has a use for it.
        """
        give_back()  # what the passes have freed lies beside what a layer of experts takes
        module = block.get_submodule(group.experts)
        experts = next(e for e in find_experts(block) if e.path == group.experts)
        how, counts = self.plan.recipe.moe_calibration, routed.counts
        if group.stage == "up":
            self.records.experts[prefix + group.experts] = coverage(counts, routed.features)
            if how != "routed":
                priors[group.experts] = routed if how == "all" else routed.reduced(MOST_PRIOR)
        first, aside = priors.get(group.experts), Aside(routed.scratch)
        common, said = self._layer_factors(block, linears, group, kin, prefix, routed, made)
        by_expert: dict[int, list[str]] = {}
        for name in group.linears:
            place = linears[name].place
            assert place is not None and place.expert is not None
            by_expert.setdefault(place.expert, []).append(name)
        alike = groupby(
            by_expert.items(),
            lambda x: (self.plan.assignments[prefix + x[1][0]], [linears[n].ref.n for n in x[1]]),
        )
        for (assignment, sizes), members in alike:
            needs = self._needs(assignment)
            prior: Statistics | ExpertInputs | None = first
            start = time.perf_counter()
            if first is not None and group.stage == "up":
                prior = layer_statistics(routed, needs)
            spent = {"statistics": time.perf_counter() - start, "solve": 0.0}

            def solve(
                some: dict[int, list[str]],
                assignment: Assignment = assignment,
                prior: Statistics | ExpertInputs | None = prior,
                needs: frozenset[str] = needs,
            ) -> tuple[list[_Solved], dict[str, float]]:
                clock = Clock()
                with torch.no_grad():
                    with clock.phase("statistics"):
                        gathered = [
                            expert_statistics(module, experts, expert, routed, prior, how, needs)
                            for expert in some
                        ]
                        if isinstance(prior, Statistics) and how == "all":
                            gathered = [(prior.copy(), ())] * len(some)  # of one input, and overwritten
                    weights = [[linears[n].get(block) for n in names] for names in some.values()]
                    with clock.phase("solve"):
                        for (statistics, _), names in zip(gathered, some.values(), strict=True):
                            _demand_finite(statistics, prefix + names[0])
                        scaled = [s for s, _ in gathered]
                        factors = self._expert_factors(
                            group, common, [*some.values()], linears, prefix, weights, scaled, made
                        )
                        stacked = _stacked(weights)
                        divided: dict[int, Statistics] = {}  # several experts may share theirs
                        for index, factor in enumerate(factors):
                            if factor is not None:
                                stacked[index] *= factor
                                key = id(scaled[index])
                                if key not in divided:
                                    divided[key] = scaled[index].divided(factor)
                                scaled[index] = divided[key]
                        results = self._rounded(assignment, weights, scaled, stacked, said)
                        done = []
                        for (expert, names), mine, solved, (_, notes), factor in zip(
                            some.items(), weights, results, gathered, factors, strict=True
                        ):
                            held = None if held_out is None else held_out.of(expert)[0][-ERROR_TOKENS:]
                            sample = held if held is not None and len(held) else None
                            for name, weight, result in zip(names, mine, solved, strict=True):
                                value, evidence = self._going_on(result.tensor, weight, factor, sample)
                                linears[name].set(block, value)
                                noted = replace(result, notes=(*result.notes, *notes))
                                done.append(_Solved(name, expert, noted, evidence))
                return done, clock.seconds

            with side_by_side(routed.device) as (several, workers):
                chunks = in_chunks(members, at_a_time(sum(sizes), routed.features, routed.device, workers))
                outcomes: Iterator[tuple[list[_Solved], dict[str, float]]]
                outcomes = several(solve, (dict(chunk) for chunk in chunks))
                for done, seconds in outcomes:
                    each = sum(seconds.values()) / len(done)
                    for x in done:
                        codes = aside.keep(x.result.tensor.codes)
                        made.linears[prefix + x.name] = replace(x.result.tensor, codes=codes)
                        tokens = int(counts[x.expert])
                        self.records.add(prefix + x.name, x.result, *x.evidence, tokens, each)
                    for phase, value in seconds.items():
                        spent[phase] += value
            # the workers' seconds are more than have gone by
            share = (time.perf_counter() - start) / max(sum(spent.values()), 1e-9)
            for phase, value in spent.items():
                self.clock.seconds[phase] += value * share
        for inputs in (routed, held_out, first):
            if inputs is not None and (group.stage == "down" or inputs is not first):
                inputs.close()

    def _layer_factors(
        self,
        block: nn.Module,
        linears: Mapping[str, BlockLinear],
        group: InputGroup,
        kin: _Kin,
        prefix: str,
        routed: ExpertInputs,
        made: BlockResult,
    ) -> tuple[torch.Tensor | None, tuple[str, ...]]:
        """Factors for what all experts of a layer read before the first product, whoever it is sent to; and
        what to say of them."""
        assignment = self._assignment(prefix, group)
        suppressor = self.suppressors[assignment]
        if suppressor is None or group.stage != "up":
            return None, ()
        with self.clock.phase("statistics"):
            statistics = layer_statistics(routed, self._needs(assignment))
        weights = [linears[n].get(block) for n in _spread(group.linears, _SPREAD)]
        with self.clock.phase("solve"):
            return self._suppress(
                suppressor, group, kin, prefix, _stacked([weights])[0], statistics, assignment.scheme, made
            )

    def _expert_factors(
        self,
        group: InputGroup,
        common: torch.Tensor | None,
        experts: Sequence[Sequence[str]],
        linears: Mapping[str, BlockLinear],
        prefix: str,
        weights: Sequence[Sequence[torch.Tensor]],
        statistics: Sequence[Statistics],
        made: BlockResult,
    ) -> list[torch.Tensor | None]:
        """For each of some experts, given by their linears, the factors of its input, fp32 [K]: those of the
        whole layer before the first product; before the second its own, folded into the rows of its up
        projection."""
        if group.stage == "up" or not group.source:
            return [common] * len(experts)
        factors: list[torch.Tensor | None] = []
        for (name, *_), mine, seen in zip(experts, weights, statistics, strict=True):
            assignment, source = self.plan.assignments[prefix + name], expert_source(name, linears)
            suppressor, up = self.suppressors[assignment], made.linears.get(f"{prefix}{source}")
            known = suppressor is not None and "linear" in suppressor.sources and source is not None
            if not known or up is None or not can_take_rows(up) or not seen.tokens:
                factors.append(None)
                continue
            assert suppressor is not None and source is not None
            fold = Fold(InputGroup((name,), source), prefix, Place("linear", True), 0.0)
            stacked = _stacked([mine])[0]
            factors.append(self._folded(suppressor, fold, False, stacked, seen, assignment.scheme, made)[0])
        return factors

    def _solve_group(
        self,
        group: InputGroup,
        kin: _Kin,
        prefix: str,
        weights: Sequence[torch.Tensor],
        statistics: Statistics,
        made: BlockResult,
    ) -> tuple[list[Quantized], torch.Tensor | None]:
        """Suppresses and quantizes linears that share an input; what they become goes into ``made``.

        Returns:
            each linear's result, and the factors fp32 [K] that its input will have been divided by, or None.
        """
        assignment = self._assignment(prefix, group)
        scheme, suppressor = assignment.scheme, self.suppressors[assignment]
        stacked = _stacked([weights])
        notes: tuple[str, ...] = ()
        factors = None
        if suppressor is not None:
            factors, notes = self._suppress(
                suppressor, group, kin, prefix, stacked[0], statistics, scheme, made
            )
        if factors is not None:
            stacked *= factors
            statistics = statistics.divided(factors)
        (results,) = self._rounded(assignment, [weights], [statistics], stacked, notes)
        made.linears.update({prefix + n: r.tensor for n, r in zip(group.linears, results, strict=True)})
        return results, factors

    def _rounded(
        self,
        assignment: Assignment,
        weights: Sequence[Sequence[torch.Tensor]],
        statistics: Sequence[Statistics],
        stacked: torch.Tensor | None = None,
        notes: tuple[str, ...] = (),
    ) -> list[list[Quantized]]:
        """Quantizes sets of linears, of which those of a set share an input and all sets have the same
        shapes.

        Args:
            weights: [N, K] of each linear of each set.
            statistics: of the input of each set.
            stacked: fp32 [sets, ΣN, K], where they are not simply the weights; overwritten.
        """
        scheme, dtype = assignment.scheme, TORCH[self.plan.dtype]
        quantizer, suppressor = self.quantizers[assignment], self.suppressors[assignment]
        if stacked is None:
            stacked = _stacked(weights)
        said = [
            (*notes, *(_outlier_notes(s) if suppressor is None and scheme.weights.bits <= 4 else ()))
            for s in statistics
        ]
        inputs = [input_parameters(s, scheme.activations) for s in statistics]
        sizes = [len(w) for w in weights[0]]
        # blocks do not straddle linears
        if scheme.weights.strategy == "block" and any(n % BLOCK for n in sizes[:-1]):
            parts = [
                quantize_many(quantizer, part.clone(), [s.copy() for s in statistics], scheme.weights, dtype)
                for part in stacked.split(sizes, 1)
            ]
            results = [list(one) for one in zip(*parts, strict=True)]
        else:
            whole = quantize_many(quantizer, stacked, statistics, scheme.weights, dtype)
            spans = list(zip(accumulate(sizes, initial=0), accumulate(sizes), strict=False))
            results = [[replace(r, tensor=r.tensor.rows(*span)) for span in spans] for r in whole]
        return [
            [replace(r, tensor=replace(r.tensor, inputs=i), notes=(*told, *r.notes)) for r in one]
            for one, i, told in zip(results, inputs, said, strict=True)
        ]

    def _suppress(
        self,
        suppressor: Suppressor,
        group: InputGroup,
        kin: _Kin,
        prefix: str,
        stacked: torch.Tensor,
        statistics: Statistics,
        scheme: Scheme,
        made: BlockResult,
    ) -> tuple[torch.Tensor | None, tuple[str, ...]]:
        """The factors that a suppressor proposes, folded; or None and why not. Groups that read the output of
        one norm get what the first of them was given."""
        if (known := made.folded.get(group.source)) is not None:
            return known, (f"scaled with the others that read {group.source}",)
        if kin.several:
            group = replace(group, linears=tuple(n for n in kin.whole.linears if self._scaled(prefix + n)))
            stacked = torch.cat([stacked, *kin.rows()])
        fold = find_fold(
            group,
            kin.whole,
            prefix,
            self.plan.checkpoint,
            group.norm_offset or 0.0,
            head_size(self.plan.checkpoint.config) or 1,
            self.plan.recipe.exact_folds,
            stacked.device,
        )
        if isinstance(fold, str):
            return None, (f"not scaled by {suppressor.name}: {fold}",)
        if fold.place.source not in suppressor.sources:
            return None, ()
        if fold.place.source == "linear" and not can_take_rows(made.linears.get(fold.source)):
            return None, (f"not scaled by {suppressor.name}: {group.source} has no scale for each output",)
        return self._folded(suppressor, fold, kin.several, stacked, statistics, scheme, made)

    def _scaled(self, linear: str) -> bool:
        """Whether a linear is quantized, and has a suppressor."""
        assignment = self.plan.assignments.get(linear)
        return assignment is not None and self.suppressors[assignment] is not None

    def _folded(
        self,
        suppressor: Suppressor,
        fold: Fold,
        several: bool,
        stacked: torch.Tensor,
        statistics: Statistics,
        scheme: Scheme,
        made: BlockResult,
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        """What a suppressor proposes, folded; ``several``: other groups will be scaled likewise."""
        group = fold.group
        proposed = suppressor(stacked, statistics, scheme, TORCH[self.plan.dtype], fold.place)
        make = fold_norm if fold.place.source == "norm" else partial(fold_linear, done=made.linears)
        factors, changed = make(fold, proposed.factors, self.plan.checkpoint)
        made.changed.update(changed)
        if several:
            made.folded[group.source] = factors
        self.records.folds[fold.prefix + (group.source if several else "+".join(group.linears))] = FoldResult(
            suppressor=suppressor.name,
            kind=fold.place.source,
            source=fold.source,
            linears=tuple(fold.prefix + n for n in (*group.linears, *group.readers)),
            norm_offset=fold.norm_offset,
            changed=tuple(sorted(changed)),
            factors=(float(factors.min()), float(factors.max())),
            notes=tuple(proposed.notes),
        )
        return factors, proposed.notes

    def _kin(
        self,
        group: InputGroup,
        every: Sequence[InputGroup],
        linears: Mapping[str, BlockLinear],
        block: nn.Module,
    ) -> _Kin:
        """All that reads what a group reads."""
        others = [g for g in every if g != group and g.source == group.source and g.stage != "down"]
        if not group.source or group.stage == "down" or not others:
            return _Kin(group, False, lambda: [])

        def rows() -> list[torch.Tensor]:
            names = [n for other in others for n in _spread(other.linears, _SPREAD)]
            return [linears[n].get(block).float() for n in names]

        names = dict.fromkeys(n for g in (group, *others) for n in g.linears)
        return _Kin(replace(group, linears=tuple(names)), True, rows)

    def _assignment(self, prefix: str, group: InputGroup) -> Assignment:
        return self.plan.assignments[prefix + group.linears[0]]

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

    def _going_on(
        self,
        tensor: QuantizedTensor,
        weight: torch.Tensor,
        factors: torch.Tensor | None,
        sample: torch.Tensor | None,
    ) -> tuple[torch.Tensor, tuple[float, float, float | None]]:
        """The values that the batches under way go on with, in the dtype of ``weight`` [N, K], and the
        evidence for the linear.

        By pieces of rows, which stay in the cache of a CPU: whole weights in fp32 would be written and read
        again a dozen times.

        Returns:
            values; energy of what rounding changed, energy of the weight, and relative output error on
            ``sample`` [T, K], or None without one.
        """
        n, k = weight.shape
        size = 4 * PIECE.get(weight.device.type, PIECE["cuda"])
        rows = max(BLOCK, size // k // BLOCK * BLOCK)
        values = torch.empty_like(weight)
        sums = torch.zeros(4, dtype=torch.float64, device=weight.device)
        for start in range(0, n, rows):
            end = min(start + rows, n)
            piece, exact, kept = tensor.rows(start, end).dequantize(), weight[start:end], values[start:end]
            if self.plan.format.quant_method is None:
                # plain files hold values, rounded once: go on with those
                piece = piece.to(TORCH[self.plan.dtype]).float()
            if factors is not None:
                piece = piece / factors  # the batches under way carry the input as it was before the fold
            kept.copy_(piece)
            wide = exact.float()
            difference = wide - kept
            missed = wanted = torch.zeros((), device=weight.device)
            if sample is not None:
                wanted = sum_of_squares((sample @ exact.to(sample.dtype).t()).float())
                missed = sum_of_squares((sample @ difference.to(sample.dtype).t()).float())
            sums += torch.stack([sum_of_squares(difference), sum_of_squares(wide), missed, wanted])
        noise, signal, lost, whole = sums.tolist()
        return values, (noise, signal, lost / max(whole, 1e-30) if sample is not None else None)


@dataclass(frozen=True)
class _Solved:
    """What became of an expert's linear: its name in the block, and the evidence of ``_going_on``."""

    name: str
    expert: int
    result: Quantized
    evidence: tuple[float, float, float | None]


@dataclass(frozen=True)
class _Kin:
    """All linears that read one input (``whole``), in several groups or in one; ``rows``: weights [N, K] of a
    part of the other groups'."""

    whole: InputGroup
    several: bool
    rows: Callable[[], list[torch.Tensor]]


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, at even distances."""
    return list(names[:: max(1, -(-len(names) // most))])


def _stacked(weights: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """fp32 [sets, ΣN, K] of the weights [N, K] of each set."""
    sizes, first = [len(w) for w in weights[0]], weights[0][0]
    stacked = torch.empty(len(weights), sum(sizes), first.shape[1], device=first.device)
    for rows, parts in zip(stacked, weights, strict=True):
        for target, weight in zip(rows.split(sizes), parts, strict=True):
            target.copy_(weight)
    return stacked


def _outlier_notes(statistics: Statistics) -> tuple[str, ...]:
    if (spread := statistics.outlier_ratio) <= OUTLIERS:
        return ()
    return (
        f"a feature of its input is {spread:.0f} times the median one: --outlier-suppression awq "
        "keeps what small weights make of it",
    )


def _demand_finite(statistics: Statistics, linear: str) -> None:
    """
    Raises:
        SourceFault: an input that holds NaN or infinity.
    """
    if not statistics.finite:
        raise SourceFault(
            f"{linear}: its inputs hold NaN or infinity on calibration tokens: the model overflows or its "
            "weights or config.json are damaged: run quant evaluate on the source; --method minmax "
            "--scheme w4a16 needs no inputs"
        )
