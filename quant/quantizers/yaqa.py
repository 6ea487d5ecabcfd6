"""YAQA (Tseng et al. 2025, arXiv:2505.22988): rounding to the least KL divergence of the whole model, instead
of to the least error of each layer's output.

The second derivatives of the KL divergence by a weight are taken as H_O ⊗ H_I (the paper's sketch A, one step
from the identity): H_I is the mean of ‖g‖² x xᵀ over tokens and H_O that of ‖x‖² g gᵀ, where g is the
gradient at the linear's outputs of a draw at the logits whose covariance is the Hessian of KL there. Rounding
feeds errors back along inputs and outputs; then scales are refitted to the codes, and single codes are
changed (:mod:`quant.quantizers.two_sided`). Where few tokens were seen, both are brought nearer to their
diagonals (as Ledoit and Wolf 2004 shrink a covariance, with a fixed weight). The loss divided by twice the
trace of either Hessian is what the model's KL rises by, in nats per token, as far as this approximation goes;
each layer's notes have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from quant import defaults
from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.columns import stacked
from quant.quantizers.factors import Factor, damp, factorize, smallest_last
from quant.quantizers.floats import FloatScales, encode, float_scales
from quant.quantizers.gptq import (
    ONLY_SEARCHED,
    SIGNED,
    GPTQQuantizer,
    dead_notes,
    negative_notes,
    solve_fixed,
)
from quant.quantizers.grids import Grid
from quant.quantizers.nearest import integers, round_to_nearest
from quant.quantizers.rounding import scale_dtype, weight_parameters
from quant.quantizers.two_sided import MOST_OUTPUTS, OUTPUTS, Codes, descend, feed_back, loss, refit
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor

#: Tokens for each row of H_I and of a block of H_O that its elements off the diagonal are weighed against:
#: they are sums of products of four factors, which few tokens make large by chance. On tinylm-11m with 512
#: tokens KL is 0.0086 without, 0.0057 with that of H_O alone, 0.0033 with both; of experts of its mixture
#: with 2000 tokens each the loss on other text is 8 % (first product) and 22 % (second) lower with both.
INPUT_TOKENS, OUTPUT_TOKENS = 1.0, 4.0
#: Bits of an integer up to which ranges are searched by the error to expect after feedback.
FED = 4
#: Rows of a factor that are looked at a time.
_ROWS = 1024
#: Tokens for each output of a block of H_O below which that is said.
FEW = 4
#: What is said of a weight whose outputs have no gradients, as those have that only choose among tokens.
_ONE_SIDED = "no gradient reaches its outputs: rounded as gptq does"
#: What is said of a weight for which there is nothing to go by.
_SILENT = (
    "its inputs, or the gradients at its outputs, are zero on all calibration tokens: rounded to nearest "
    "instead"
)
#: Elements of a weight that are worked on at once, whole blocks of outputs: a dozen tensors of that size are
#: made.
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class YAQAQuantizer:
    """Settings of YAQA.

    Attributes:
        damping: added to the diagonals of both Hessians, as a share of each element.
        clip_search: choose each group's range by least squared error weighted with what the loss counts it
            by after feedback along inputs, instead of the whole range.
        sweeps: times that all codes are gone through after scales were refitted, to change those that lower
            the loss.
        rounds: times that both are done.
        outputs: outputs of a block of H_O, at the most: twice as many take twice its memory and steps. Of
            experts it is
            :data:`~quant.quantizers.two_sided.OUTPUTS`, because each sees fewer tokens.
        signed: search among negative scales, too, of symmetric integers of up to :data:`SIGNED` bits: codes
            from -8 to 7 reach further down than up, and either end can be a group's positive one.
        draws: gradients drawn at the logits for each row: the more there are, the less is by chance. Experts
            take the first.
    """

    damping: float = defaults.DAMPING
    clip_search: bool = defaults.CLIP_SEARCH["yaqa"]
    sweeps: int = 1
    rounds: int = 1
    outputs: int = OUTPUTS
    signed: bool = False
    draws: int = 1

    name: ClassVar[str] = "yaqa"
    suppressor: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "gradients"})

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(
                f"damping is {self.damping}: a share of the Hessians' diagonals, above 0 and at most 1"
            )
        if not 0 <= self.sweeps <= 100:
            raise ValueError(f"sweeps is {self.sweeps}: must be from 0 to 100")
        if not 1 <= self.rounds <= 100:
            raise ValueError(f"rounds is {self.rounds}: must be from 1 to 100")
        if not 1 <= self.draws <= 100:
            raise ValueError(f"draws is {self.draws}: must be from 1 to 100")
        if not 1 <= self.outputs <= MOST_OUTPUTS:
            raise ValueError(f"outputs is {self.outputs}: must be from 1 to {MOST_OUTPUTS}")
        if self.signed and not self.clip_search:
            raise ValueError(ONLY_SEARCHED)

    @property
    def products(self) -> int:
        """Products of the weight with H_I that a solve takes, as many as its estimate counts: of feedback, of
        the loss of rounding to nearest, and in each round three of the refit, one of each sweep."""
        return 2 + self.rounds * (3 + self.sweeps) if self.sweeps else 3

    @staticmethod
    def refuse(scheme: WeightScheme) -> str | None:
        if scheme.strategy != "block":
            return None
        return f"it takes scales of rows of a weight, not {scheme}'s of blocks: use --method fp8 or gptq"

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        return self._many(weight.unsqueeze(0), [statistics], scheme, dtype, amax)[0]

    def many(
        self,
        weights: torch.Tensor,
        statistics: Sequence[Statistics | None],
        scheme: WeightScheme,
        dtype: torch.dtype,
    ) -> list[Quantized]:
        """:func:`~quant.quantizers.base.quantize_many`: the steps of several weights are made at once."""
        return self._many(weights, statistics, scheme, dtype, None)

    def _many(
        self,
        weights: torch.Tensor,
        statistics: Sequence[Statistics | None],
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None,
    ) -> list[Quantized]:
        if scheme.type != "float":
            dtype = scale_dtype(scheme, dtype)
        made: dict[int, Quantized] = {}
        ready: list[_Ready] = []
        for i, (weight, seen) in enumerate(zip(weights, statistics, strict=True)):
            if seen is None or seen.hessian is None:
                raise QuantError(
                    "yaqa needs calibration text and the gradients that a pass over it gives: give "
                    "--calibration-dataset, or use --method minmax"
                )
            if seen.gradients is None:
                gptq = GPTQQuantizer(
                    self.damping, clip_search=self.clip_search, sweeps=self.sweeps, signed=self.signed
                )
                done = gptq(weight, seen, scheme, dtype, amax)
                made[i] = replace(done, fallbacks=(_ONE_SIDED, *done.fallbacks))
                continue
            diagonal = seen.hessian.diagonal().clone()
            if not bool(diagonal.any()):
                tensor = round_to_nearest(weight, scheme, dtype, amax, search=self.clip_search)
                made[i] = Quantized(tensor, (_SILENT,), ())
                continue
            shrink(seen.hessian, seen.tokens, INPUT_TOKENS)
            rows, columns = _sizes(weight, scheme)
            outputs = _Outputs.of(seen.gradients, self.damping, seen.tokens, rows)
            # each output of the only one on its own: what is left is GPTQ, with its order
            inputs = _Inputs.of(seen.hessian, self.damping, columns if outputs.coupled else None)
            if isinstance(inputs, str):
                tensor = round_to_nearest(weight, scheme, dtype, amax, search=self.clip_search)
                made[i] = Quantized(tensor, (inputs,), dead_notes(diagonal))
                continue
            floats, zeros = None, None
            importance = Factor(inputs.factor).importance(inputs.order)
            if scheme.type == "float":
                floats = float_scales(weight, scheme, amax, importance, self.clip_search)
                scales = floats.wide
            else:
                signed = self.signed and scheme.bits <= SIGNED
                fed = outputs.coupled and scheme.bits <= FED
                if fed:
                    importance *= _reached(weight, inputs, 2 * columns / (scheme.high - scheme.low))
                scales, zeros = weight_parameters(
                    weight, scheme, dtype, importance, self.clip_search, signed, fed
                )
            ready.append(_Ready(i, weight, inputs, outputs, scales, zeros, floats))
        several = max(1, _AT_ONCE // weights[0].numel())
        coupled = [r for r in ready if r.outputs.coupled]
        alone = [[r] for r in ready if not r.outputs.coupled]
        for some in [*(coupled[i : i + several] for i in range(0, len(coupled), several)), *alone]:
            for one, done in zip(some, self._refined(some, scheme, dtype), strict=True):
                made[one.place] = done
        return [made[i] for i in range(len(weights))]

    def _refined(self, some: Sequence[_Ready], scheme: WeightScheme, dtype: torch.dtype) -> list[Quantized]:
        """Some weights at once, of a large one whole blocks of its outputs at a time."""
        blocks, size = some[0].outputs.rows.shape
        each = max(1, _AT_ONCE // (len(some) * size * some[0].weight.shape[1]))
        inputs = _Inputs.stacked([one.inputs for one in some])
        grid = Grid(scheme, dtype, _divisor([one.floats for one in some if one.floats is not None]))
        parts, losses = [], torch.zeros(len(some), 3, dtype=torch.float64)
        for block in range(0, blocks, each):
            rows = slice(block * size, (block + each) * size)
            outputs = _Outputs.stacked([one.outputs.blocks(slice(block, block + each)) for one in some])
            given = [
                stacked([x[rows] for x in t]) for t in zip(*(one.tensors() for one in some), strict=True)
            ]
            part, sums = self._rounded(
                given[0], given[1], given[2] if given[2:] else None, inputs, outputs, grid
            )
            parts.append(part)
            losses += sums
        codes = torch.cat([p.codes for p in parts], 1)
        fitted = torch.cat([p.scales for p in parts], 1)
        results = []
        for i, one in enumerate(some):
            trace, mean = float(one.inputs.diagonal.sum()), float(one.outputs.mean)
            nats = losses[i] * mean / (2 * trace or 1.0)
            notes = (_losses(nats.tolist()), *dead_notes(one.inputs.diagonal))
            if blocks > 1:
                notes += (f"its outputs feed back among {size} at a time",)
            if one.floats is None:
                tensor = integers(codes[i].to(torch.int8), fitted[i], one.zeros, scheme, dtype)
            else:
                held, whole = one.floats.of(fitted[i]), one.floats.global_scale
                tensor = QuantizedTensor(
                    encode(codes[i], scheme.bits), held, None, scheme, global_scale=whole
                )
            notes += negative_notes(tensor)
            results.append(Quantized(tensor, (*one.inputs.fallbacks, *one.outputs.fallbacks), notes))
        return results

    def _rounded(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        inputs: _Inputs,
        outputs: _Outputs,
        grid: Grid,
    ) -> tuple[Codes, torch.Tensor]:
        """Codes of some rows of weights [S, N, K]; and the losses of rounding to nearest, of feedback, and in
        the end, fp64 [S, 3]."""
        hessians = inputs.hessian, outputs.hessians
        nearest = grid.rounded(weight, scales, zeros)
        if outputs.coupled:
            codes = feed_back(
                weight, scales, zeros, inputs.factor, inputs.order, outputs.factors, outputs.rows, grid
            )
        else:  # each output of the only one on its own: what is left is GPTQ
            codes = solve_fixed(
                weight[0].clone(), Factor(inputs.factor[0]), inputs.order[0], scales[0],
                None if zeros is None else zeros[0], grid,
            )[None]  # fmt: skip
        plain = Codes(nearest, scales, zeros, grid)
        first, made = loss(plain.errors(weight), *hessians), replace(plain, codes=codes)
        rounds, fitted = self.rounds if self.sweeps else 0, grid.fitted
        if not (rounds and fitted):
            begun = last = loss(made.errors(weight), *hessians)
        for number in range(rounds):
            if fitted:
                made, before, last = refit(weight, made, *hessians)
                begun = begun if number else before
            made, gained = descend(weight, made, *hessians, self.sweeps)
            last = last - gained
        return made, torch.stack([x.sum(-1) for x in (first, begun, last)], -1).double().cpu()


@dataclass(frozen=True)
class _Inputs:
    """H_I damped and R of it in an order of its columns; of one weight, or [S, …] of several.

    Attributes:
        hessian, factor: [K, K].
        order: [K].
        diagonal: of H_I before it was damped, [K].
        fallbacks: departures from what was asked.
    """

    hessian: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor
    diagonal: torch.Tensor
    fallbacks: tuple[str, ...] = ()

    @classmethod
    def of(cls, hessian: torch.Tensor, damping: float, steps: torch.Tensor | None) -> _Inputs | str:
        """Of a Hessian, which is overwritten, in the order that suits the sizes of each column's steps [K],
        or in GPTQ's; or what to say of one that is of no use."""
        diagonal, damped = hessian.diagonal().clone(), hessian.clone()
        if steps is None:
            order = torch.argsort(diagonal, descending=True, stable=True)
        else:
            order = _order(hessian.unsqueeze(0), damping, steps.unsqueeze(0))[0]
        factor, needed = factorize(hessian, damping, order)
        if factor is None:
            return (
                f"the Hessian of its inputs is not positive definite with damping up to {needed:g}: rounded "
                "to nearest instead"
            )
        damp(damped.diagonal(), needed, needed > damping)
        said = () if needed == damping else (_damped("inputs", needed, damping),)
        return cls(damped, factor.upper, order, diagonal, said)

    @classmethod
    def stacked(cls, several: Sequence[_Inputs]) -> _Inputs:
        return cls(
            stacked([one.hessian for one in several]),
            stacked([one.factor for one in several]),
            stacked([one.order for one in several]),
            stacked([one.diagonal for one in several]),
        )


@dataclass(frozen=True)
class _Outputs:
    """H_O divided by its mean diagonal and damped; of one weight, or [S, …] of several.

    Attributes:
        hessians: its blocks, [B, b, b].
        factors: R of each, in the order of its ``rows`` [B, b].
        mean: what it was divided by, fp32 [].
        fallbacks: departures from what was asked.
    """

    hessians: torch.Tensor
    factors: torch.Tensor
    rows: torch.Tensor
    mean: torch.Tensor
    fallbacks: tuple[str, ...] = ()

    @classmethod
    def of(cls, gradients: torch.Tensor, damping: float, tokens: int, steps: torch.Tensor) -> _Outputs:
        """Of the mean over so many tokens, and the sizes of each row's steps [N]."""
        size = gradients.shape[1]
        diagonals = gradients.diagonal(dim1=1, dim2=2)
        mean = diagonals.sum() / (diagonals > 0).sum().clamp_min(1)
        mean = torch.where(mean > 0, mean, 1.0)
        hessians = gradients / mean
        factors, fallbacks = torch.empty_like(hessians), []
        kept = shrink(hessians, tokens, OUTPUT_TOKENS)
        padded = torch.ones(hessians.shape[:2], device=steps.device)
        padded.view(-1)[: len(steps)] = steps
        rows = _order(hessians, damping, padded)
        if tokens < FEW * size:
            fallbacks.append(
                f"{tokens} tokens show how {size} of its outputs depend on each other, which is less than "
                f"{FEW} for each: what they say counts {kept:.0%}"
            )
        for i, block in enumerate(hessians):
            factor, needed = factorize(block.clone(), damping, rows[i])
            if factor is not None:
                factors[i] = factor.upper
                fallbacks += [_damped("outputs", needed, damping)] if needed > damping else []
            else:
                needed = damping
                block.copy_(torch.diag(block.diagonal().nan_to_num(1.0, 1.0, 1.0).clamp_min(0)))
                factors[i] = torch.eye(len(block), device=block.device)
                fallbacks.append(
                    "the Hessian of some of its outputs is not positive definite: those do not feed back on "
                    "each other"
                )
            damp(block.diagonal(), needed, needed > damping)
        return cls(hessians, factors, rows, mean, tuple(dict.fromkeys(fallbacks)))

    def blocks(self, some: slice) -> _Outputs:
        """The same of some blocks."""
        return replace(self, hessians=self.hessians[some], factors=self.factors[some], rows=self.rows[some])

    @classmethod
    def stacked(cls, several: Sequence[_Outputs]) -> _Outputs:
        return cls(
            stacked([one.hessians for one in several]),
            stacked([one.factors for one in several]),
            stacked([one.rows for one in several]),
            stacked([one.mean for one in several]),
        )

    @property
    def coupled(self) -> bool:
        """Whether any output feeds back on another."""
        return bool(torch.triu(self.factors, 1).any())


@dataclass(frozen=True)
class _Ready:
    """A weight that is to be rounded: its place among others, its Hessians, scales and zeros [N, G]; and of
    floats the scales as they are stored."""

    place: int
    weight: torch.Tensor
    inputs: _Inputs
    outputs: _Outputs
    scales: torch.Tensor
    zeros: torch.Tensor | None
    floats: FloatScales | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Those that have a row for each output."""
        return [x for x in (self.weight, self.scales, self.zeros) if x is not None]


def shrink(hessian: torch.Tensor, tokens: int, each: float) -> float:
    """Brings a mean over so many tokens [..., K, K] nearer to its diagonal, in place, as if ``each`` · K more
    tokens had shown no row to depend on another; returns what the tokens count."""
    kept = tokens / (tokens + each * hessian.shape[-1])
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clone()
    hessian.mul_(kept).diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return kept


def _sizes(weight: torch.Tensor, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """How large the steps of each row [N] and of each column [K] of a weight are: the root mean squares of
    the largest magnitudes of its groups; all alike where scales reach over rows."""
    n, k = weight.shape
    if scheme.strategy not in ("group", "channel", "tensor_group"):
        return weight.new_ones(n), weight.new_ones(k)
    squares = weight.view(n, scheme.groups(k), -1).abs().amax(-1).square()
    columns = squares.mean(0).sqrt()
    return squares.mean(1).sqrt(), columns.repeat_interleave(k // len(columns))


def _reached(weight: torch.Tensor, inputs: _Inputs, steps: torch.Tensor) -> torch.Tensor:
    """How far the error to expect of each column of a weight [N, K] grows with the square of a step, fp32 [K]
    from 0 to 1, once earlier columns' errors have been moved onto it; ``steps`` [K]: the sizes of theirs.

    It is 1 but where all weights of a column are far smaller than a step, as those that read an outlier are.
    They become zero, which costs their own squares, whatever the step, and so do the errors that others move
    onto them. Were such a column counted by its step, its great importance would cut the ranges of all others
    short: on a model with outliers, yaqa lost twice as much as GPTQ then."""
    own = (12 * weight.square().mean(0) / steps.square().clamp_min(1e-38)).clamp_(max=1.0)
    if bool((own == 1).all()):
        return own
    upper, errors = inputs.factor, own[inputs.order]
    moved = torch.zeros_like(own)
    for start in range(0, len(upper), _ROWS):
        rows = torch.triu(upper[start : start + _ROWS], start + 1).square_()
        moved += errors[start : start + _ROWS] @ rows
    moved.div_(upper.diagonal().square())
    # the square: of a column's own error the step decides less, the smaller its weights are beside it
    return own.index_copy_(0, inputs.order, moved.add_(errors.square()).clamp_(max=1.0))


def _order(hessians: torch.Tensor, damping: float, steps: torch.Tensor) -> torch.Tensor:
    """The order [B, K] in which the rows of Hessians [B, K, K] are rounded, whose steps have the sizes
    ``steps`` [B, K]: :func:`~quant.quantizers.factors.smallest_last` of what an error of one step costs."""
    steps = steps / steps.mean().clamp_min(1e-38)
    steps = torch.where(steps > 0, steps.clamp(min=1e-3), 1.0)
    costs = hessians * steps.unsqueeze(2)
    costs.mul_(steps.unsqueeze(1))
    damp(costs.diagonal(dim1=1, dim2=2), damping)
    return smallest_last(costs)


def _divisor(floats: Sequence[FloatScales]) -> torch.Tensor | None:
    """[S, 1, 1]: what the scales of several weights are divided by where a file holds them; None where by
    nothing."""
    whole = [x.global_scale for x in floats if x.global_scale is not None]
    return torch.stack([x.reshape(1, 1) for x in whole]) if whole else None


def _damped(what: str, needed: float, asked: float) -> str:
    return f"the Hessian of its {what} needed damping {needed:g} instead of {asked:g}"


def _losses(nats: list[float]) -> str:
    """What to say of the losses of rounding to nearest, of feedback, and in the end."""
    nearest, begun, ended = nats
    return (
        f"adds about {ended:.2g} nats per token to the model's KL divergence: {nearest:.2g} rounded to "
        f"nearest, {begun:.2g} before scales and codes were refined"
    )


QuantizerRegistry.add(YAQAQuantizer.name, YAQAQuantizer)
