"""Linears that share an input, suppressed and quantized: what a block's plain linears and its experts have in
common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from quant.accelerator import of_kind, on_accelerator
from quant.calibration.statistics import Statistics
from quant.checkpoint.dtypes import TORCH
from quant.errors import QuantError, SourceFault
from quant.models.adapter import InputGroup
from quant.models.binding import BlockLinear
from quant.models.products import is_widened
from quant.outlier_suppression import Suppressor
from quant.pipeline.folding import Fold, can_take_rows, find_fold, fold_linear, fold_norm
from quant.pipeline.pieces import PIECE, Assembled
from quant.pipeline.plan import JobPlan
from quant.pipeline.ranks import ALONE, Ranks
from quant.pipeline.records import Records
from quant.quantizers import Quantized, Quantizer, quantize_many, quantize_slices
from quant.quantizers.activations import input_parameters
from quant.quantizers.two_sided import OUTPUTS
from quant.recipe import Assignment
from quant.report.value import FoldResult
from quant.schemes import BLOCK, Scheme, WeightScheme
from quant.tensors import QuantizedTensor, largest_magnitude, sum_of_squares
from quant.vllm.config import head_size

#: An input feature this many times as large as the median one is an outlier: its weights may be small and
#: still matter, and few bits round them away.
OUTLIERS = 32.0
#: Linears of a group whose weights are looked at where factors are chosen for several groups at once.
SPREAD = 32
#: Rows that a slice of a weight has a multiple of.
_SLICE = 16


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

    def finish_cache(self, names: Sequence[str], ranks: Ranks = ALONE) -> None:
        """Makes the block's cache scales, fp32 [1] each: what maps the largest magnitude seen, by any of the
        ranks, to the largest E4M3 number.

        Raises:
            QuantError: the block has names for them, but no attention that could be observed.
            SourceFault: keys or values hold NaN or infinity.
        """
        if names:
            self._cache = ranks.largest(self._cache)
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
class BlockUnderWay:
    """A block whose linears are being quantized.

    Attributes:
        block: filled, on its device.
        linears: by their names inside the block as the file has them; ``prefix`` comes before those.
        groups: all that share an input.
        norm_offset: of the model's norms, for groups that do not say it.
        made: where results go.
    """

    block: nn.Module
    linears: Mapping[str, BlockLinear]
    prefix: str
    groups: Sequence[InputGroup]
    norm_offset: float
    made: BlockResult

    def weights(self, names: Sequence[str]) -> list[torch.Tensor]:
        """[N, K] of each, as views."""
        return [self.linears[name].get(self.block) for name in names]


@dataclass(frozen=True)
class Kin:
    """All linears that read one input (``whole``), in several groups or in one; ``rows``: weights [N, K] of a
    part of the other groups'."""

    whole: InputGroup
    several: bool
    rows: Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class GroupSolver:
    """Quantizes linears that share an input, each with the quantizer and the suppressor of its assignment."""

    plan: JobPlan
    quantizers: Mapping[Assignment, Quantizer]
    suppressors: Mapping[Assignment, Suppressor | None]
    records: Records
    ranks: Ranks = ALONE

    def needs(self, assignment: Assignment) -> frozenset[str]:
        suppressor, activations = self.suppressors[assignment], assignment.scheme.activations
        wanted = self.quantizers[assignment].needs | (suppressor.needs if suppressor else frozenset())
        return wanted | {"range"} if activations is not None and activations.calibrated else wanted

    def outputs(self, assignment: Assignment) -> int:
        """Outputs of a block that gradients are summed in, at the most; not of experts, which see fewer
        tokens."""
        return int(getattr(self.quantizers[assignment], "outputs", OUTPUTS))

    def assignment(self, prefix: str, group: InputGroup) -> Assignment:
        return self.plan.assignments[prefix + group.linears[0]]

    def solve(
        self,
        group: InputGroup,
        kin: Kin,
        prefix: str,
        weights: Sequence[torch.Tensor],
        statistics: Statistics,
        made: BlockResult,
        others: Sequence[torch.Tensor] = (),
    ) -> tuple[list[Quantized], torch.Tensor | None]:
        """Suppresses and quantizes linears that share an input; what they become goes into ``made``.

        Args:
            others: weights [N, K] of linears that share the input too and are quantized alike, but on their
                own: a number for the whole tensor is one for all, because they may be fused.

        Returns:
            each linear's result, and the factors fp32 [K] that its input will have been divided by, or None.
        """
        assignment = self.assignment(prefix, group)
        scheme, suppressor = assignment.scheme, self.suppressors[assignment]
        stacked = stacked_weights([weights])
        notes: tuple[str, ...] = ()
        factors = None
        if suppressor is not None:
            factors, notes = self.suppress(
                suppressor, group, kin, prefix, stacked[0], statistics, scheme, made
            )
        if factors is not None:
            stacked *= factors
            statistics = statistics.divided(factors)
        amax = None
        if others and scheme.weights.strategy in ("tensor", "tensor_group"):
            several = (w.float() if factors is None else w.float() * factors for w in others)
            amax = torch.stack([largest_magnitude(w) for w in (stacked, *several)]).amax()
        (results,) = self.rounded(assignment, [weights], [statistics], stacked, notes, amax)
        made.linears.update({prefix + n: r.tensor for n, r in zip(group.linears, results, strict=True)})
        return results, factors

    def rounded(
        self,
        assignment: Assignment,
        weights: Sequence[Sequence[torch.Tensor]],
        statistics: Sequence[Statistics],
        stacked: torch.Tensor,
        notes: tuple[str, ...] = (),
        amax: torch.Tensor | None = None,
        method: Quantizer | None = None,
    ) -> list[list[Quantized]]:
        """Quantizes sets of linears, of which those of a set share an input and all sets have the same
        shapes.

        Args:
            weights: [N, K] of each linear of each set.
            statistics: of the input of each set.
            stacked: all of them as they are to be quantized, fp32 [sets, ΣN, K]; overwritten.
            amax: of one set, the largest magnitude that its number for the whole tensor is for; None: its
                own.
            method: instead of the assignment's.
        """
        scheme, dtype = assignment.scheme, TORCH[self.plan.dtype]
        quantizer, suppressor = method or self.quantizers[assignment], self.suppressors[assignment]
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
            if len(stacked) == 1 and (count := slice_count(quantizer, stacked[0], scheme.weights)) > 1:
                whole = [self._by_slices(quantizer, stacked[0], count, statistics[0], scheme, amax)]
            elif amax is None:
                whole = quantize_many(quantizer, stacked, statistics, scheme.weights, dtype)
            else:
                whole = [quantizer(stacked[0], statistics[0], scheme.weights, dtype, amax)]
            spans = list(zip(accumulate(sizes, initial=0), accumulate(sizes), strict=False))
            results = [[replace(r, tensor=r.tensor.rows(*span)) for span in spans] for r in whole]
        return [
            [replace(r, tensor=replace(r.tensor, inputs=i), notes=(*told, *r.notes)) for r in one]
            for one, i, told in zip(results, inputs, said, strict=True)
        ]

    def _by_slices(
        self,
        quantizer: Quantizer,
        weight: torch.Tensor,
        count: int,
        statistics: Statistics,
        scheme: Scheme,
        amax: torch.Tensor | None,
    ) -> Quantized:
        """A weight fp32 [N, K], overwritten, quantized by ``count`` slices of its rows, which the ranks
        divide. A single process takes the same slices: products of matrices round otherwise where they have
        other shapes."""
        if amax is None and scheme.weights.strategy in ("tensor", "tensor_group"):
            amax = largest_magnitude(weight)
        mine, dtype = self.ranks.own(count), TORCH[self.plan.dtype]
        slices = weight.view(count, -1, weight.shape[1])[mine.start : mine.stop]
        solved = quantize_slices(quantizer, slices, statistics, scheme.weights, dtype, amax) if mine else []
        whole = Assembled(len(weight))
        for several in self.ranks.exchange(solved):
            for one in several:
                whole.add(one)
        return whole.finish()

    def suppress(
        self,
        suppressor: Suppressor,
        group: InputGroup,
        kin: Kin,
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
        return self.folded(suppressor, fold, kin.several, stacked, statistics, scheme, made)

    def _scaled(self, linear: str) -> bool:
        """Whether a linear is quantized, and has a suppressor."""
        assignment = self.plan.assignments.get(linear)
        return assignment is not None and self.suppressors[assignment] is not None

    def folded(
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

    def kin(self, work: BlockUnderWay, group: InputGroup) -> Kin:
        """All that reads what a group reads."""
        others = [g for g in work.groups if g != group and g.source == group.source and g.stage != "down"]
        if not group.source or group.stage == "down" or not others:
            return Kin(group, False, lambda: [])

        def rows() -> list[torch.Tensor]:
            names = [n for other in others for n in spread(other.linears, SPREAD)]
            return [weight.float() for weight in work.weights(names)]

        names = dict.fromkeys(n for g in (group, *others) for n in g.linears)
        return Kin(replace(group, linears=tuple(names)), True, rows)

    def going_on(
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
        size = 4 * of_kind(PIECE, weight.device)
        rows = max(BLOCK, size // k // BLOCK * BLOCK)
        values = torch.empty_like(weight)
        sums = torch.zeros(4, dtype=torch.float64, device=weight.device)
        if sample is not None and is_widened(sample):
            sample = sample.float()
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
                wanted = sum_of_squares((sample @ wide.to(sample.dtype).t()).float())
                missed = sum_of_squares((sample @ difference.to(sample.dtype).t()).float())
            sums += torch.stack([sum_of_squares(difference), sum_of_squares(wide), missed, wanted])
        noise, signal, lost, whole = sums.tolist()
        return values, (noise, signal, lost / max(whole, 1e-30) if sample is not None else None)


def slice_count(quantizer: Quantizer, weight: torch.Tensor, scheme: WeightScheme) -> int:
    """Slices of equal size that a weight's rows are solved by, whatever the number of ranks; 1 of a method
    that does not say it can, and on a GPU, whose time goes by the operations and not by the rows."""
    if on_accelerator(weight) or not hasattr(quantizer, "slices"):
        return 1
    least = BLOCK if scheme.strategy == "block" else _SLICE
    fits = (c for c in (8, 4, 2) if not len(weight) % c and not len(weight) // c % least)
    return next(fits, 1)


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, at even distances."""
    return list(names[:: max(1, -(-len(names) // most))])


def stacked_weights(weights: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
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


def demand_finite(statistics: Statistics, linear: str) -> None:
    """
    Raises:
        SourceFault: an input that holds NaN or infinity.
        QuantError: that, or such a gradient, where there are gradients.
    """
    if statistics.finite:
        return
    if statistics.gradients is not None:
        raise QuantError(
            f"{linear}: its inputs or the gradients at its outputs hold NaN or infinity on calibration "
            "tokens, or numbers whose products overflow: the model overflows or its weights are damaged: run "
            "quant evaluate on the source; --method gptq needs no gradients"
        )
    raise SourceFault(
        f"{linear}: its inputs hold NaN or infinity on calibration tokens: the model overflows or its "
        "weights or config.json are damaged: run quant evaluate on the source; --method minmax "
        "--scheme w4a16 needs no inputs"
    )
