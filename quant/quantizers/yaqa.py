"""YAQA (Tseng et al. 2025, arXiv:2505.22988): rounding to the least KL divergence of the whole model, instead
of to the least error of each layer's output.

The second derivatives of the KL divergence by a weight are taken as H_O ⊗ H_I (the paper's sketch A, one step
from the identity): H_I is the mean of ‖g‖² x xᵀ over tokens and H_O that of ‖x‖² g gᵀ, where g is the
gradient at the linear's outputs of a draw at the logits whose covariance is the Hessian of KL there. Rounding
feeds errors back along inputs and outputs; then scales are refitted to the codes, and single codes are
changed (:mod:`quant.quantizers.two_sided`). The loss divided by twice the trace of either Hessian is what the
model's KL rises by, in nats per token, as far as this approximation goes; each layer's notes have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from quant import defaults
from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.floats import encode, float_scales
from quant.quantizers.gptq import Factor, damp, dead_notes, factorize, solve_fixed
from quant.quantizers.grids import Grid
from quant.quantizers.nearest import integers, round_to_nearest
from quant.quantizers.rounding import scale_dtype, weight_parameters
from quant.quantizers.two_sided import Codes, descend, feed_back, loss, refit
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor

#: Elements of a weight that are worked on at once, whole blocks of outputs: a dozen tensors of that size are
#: made.
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class YAQAQuantizer:
    """Settings of YAQA.

    Attributes:
        damping: added to the diagonals of both Hessians, as a share of each element.
        clip_search: choose each group's range by least squared error weighted with the diagonal of H_I,
            instead of the whole range.
        sweeps: times that all codes are gone through after rounding, to change those that lower the loss.
    """

    damping: float = defaults.DAMPING
    clip_search: bool = defaults.CLIP_SEARCH["yaqa"]
    sweeps: int = 2

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

    @property
    def products(self) -> int:
        """Products of the weight with H_I that a solve takes, as many as its estimate counts: of feedback, of
        the loss of rounding to nearest, four of the refit, one of each sweep."""
        return 6 + self.sweeps if self.sweeps else 3

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
        if statistics is None or statistics.hessian is None or statistics.gradients is None:
            raise QuantError(
                "yaqa needs calibration text and the gradients that a pass over it gives: give "
                "--calibration-dataset, or use --method minmax"
            )
        diagonal = statistics.hessian.diagonal().clone()
        order = torch.argsort(diagonal, descending=True, stable=True)
        hessian = statistics.hessian.clone()
        factor, needed = factorize(statistics.hessian, self.damping, order)
        if factor is None:
            tensor = round_to_nearest(weight, scheme, dtype, amax, search=self.clip_search)
            reason = (
                f"the Hessian of its inputs is not positive definite with damping up to {needed:g}: rounded "
                "to nearest instead"
            )
            return Quantized(tensor, (reason,), dead_notes(diagonal))
        damp(hessian.diagonal(), needed, needed > self.damping)
        inputs, outputs = _Inputs(hessian, factor, order), _Outputs.of(statistics.gradients, self.damping)
        floats = None
        if scheme.type == "float":
            floats = float_scales(weight, scheme, amax, diagonal, self.clip_search)
            scales, zeros, grid = floats.wide, None, Grid(scheme, dtype, floats.global_scale)
        else:
            grid = Grid(scheme, scale_dtype(scheme, dtype))
            scales, zeros = weight_parameters(weight, scheme, grid.dtype, diagonal, self.clip_search)
        size = outputs.hessians.shape[1]
        several = max(1, _AT_ONCE // (size * weight.shape[1]))
        parts, losses = [], torch.zeros(3, dtype=torch.float64)
        for block in range(0, len(outputs.hessians), several):
            some = slice(block * size, (block + several) * size)
            numbers = scales[some], None if zeros is None else zeros[some]
            made, sums = self._rounded(
                weight[some], *numbers, inputs, outputs.blocks(slice(block, block + several)), grid
            )
            parts.append(made)
            losses += torch.tensor(sums, dtype=torch.float64)
        codes = torch.cat([p.codes for p in parts])
        fitted = torch.cat([p.scales for p in parts])
        more = () if needed == self.damping else (_damped("inputs", needed, self.damping),)
        nats = losses * float(outputs.mean) / (2 * float(diagonal.sum()) or 1.0)
        notes = (_losses(nats.tolist()), *dead_notes(diagonal))
        if len(outputs.hessians) > 1:
            notes += (f"its outputs feed back among {size} at a time",)
        if floats is None:
            tensor = integers(codes.to(torch.int8), fitted, zeros, scheme, grid.dtype)
        else:
            tensor = QuantizedTensor(
                encode(codes, scheme.bits), floats.of(fitted), None, scheme, global_scale=floats.global_scale
            )
        return Quantized(tensor, (*more, *outputs.fallbacks), notes)

    def _rounded(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        inputs: _Inputs,
        outputs: _Outputs,
        grid: Grid,
    ) -> tuple[Codes, tuple[float, float, float]]:
        """Codes of some rows of a weight; and the losses of rounding to nearest, of feedback, and in the
        end."""
        hessians = inputs.hessian, outputs.hessians
        nearest = grid.rounded(weight, scales, zeros)
        if outputs.coupled:
            codes = feed_back(
                weight, scales, zeros, inputs.factor.upper, inputs.order, outputs.factors, outputs.rows, grid
            )  # fmt: skip
        else:  # each output on its own: what is left is GPTQ
            codes = solve_fixed(weight.clone(), inputs.factor, inputs.order, scales, zeros, grid)
        plain = Codes(nearest, scales, zeros, grid)
        first, made = loss(plain.errors(weight), *hessians), replace(plain, codes=codes)
        if self.sweeps:
            if grid.fitted:
                made, begun, fitted = refit(weight, made, *hessians)
            else:
                begun = fitted = loss(made.errors(weight), *hessians)
            made, gained = descend(weight, made, *hessians, self.sweeps)
            last = fitted - gained
        else:
            begun = last = loss(made.errors(weight), *hessians)
        return made, (float(first.sum()), float(begun.sum()), float(last.sum()))


@dataclass(frozen=True)
class _Inputs:
    """H_I damped, [K, K], and R of it in an order of its columns."""

    hessian: torch.Tensor
    factor: Factor
    order: torch.Tensor


@dataclass(frozen=True)
class _Outputs:
    """H_O divided by its mean diagonal and damped.

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
    def of(cls, gradients: torch.Tensor, damping: float) -> _Outputs:
        diagonals = gradients.diagonal(dim1=1, dim2=2)
        rows = torch.argsort(diagonals, dim=1, descending=True, stable=True)
        mean = diagonals.sum() / (diagonals > 0).sum().clamp_min(1)
        mean = torch.where(mean > 0, mean, 1.0)
        hessians = gradients / mean
        factors, fallbacks = torch.empty_like(hessians), []
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

    @property
    def coupled(self) -> bool:
        """Whether any output feeds back on another."""
        return bool(torch.triu(self.factors, 1).any())


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
