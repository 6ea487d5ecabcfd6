"""Methods that set weights to zero and leave the others in the model's own dtype: magnitude, Wanda (Sun et
al. 2023, arXiv:2306.11695) and SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774).

What goes is chosen within each output: the same share of every row of W [N, K], or, by an n:m pattern, all
but n of every m weights beside one another. They differ in what a weight counts for and in what becomes of
those that stay:

- magnitude: |W_nk|; the others stay as they are.
- wanda: |W_nk|·‖x_k‖, the input's size on calibration text; the others stay as they are.
- sparsegpt: what the output loses when the weights behind it make up for it as well as they can. With
  H = R·Rᵀ (R upper triangular, as in :mod:`quant.quantizers.gptq`) that is R_kk²·V_nk², where V_nk is the
  weight with the errors of all columns before fed back. When all is chosen, those that stay are fitted once
  more, all of a row at a time: they minimize tr(E·H·Eᵀ) under the mask by conjugate gradients (the least
  squares that Boža 2024, arXiv:2401.02938, solves by splitting).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.factors import factorize
from quant.quantizers.identity import as_they_are, refuse_scheme
from quant.schemes import WeightScheme

_PATTERN = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")
#: Columns among which SparseGPT chooses at once.
_BLOCK = 128
#: Share of the Hessian's diagonal that is added to it.
_DAMPING = 0.01


@dataclass(frozen=True)
class _Pruner:
    """Settings of all methods.

    Attributes:
        sparsity: share of each output's weights that become zero, above 0 and below 1.
        pattern: ``n:m`` instead: of every m weights beside one another n stay; empty: any may go.
    """

    sparsity: float = 0.5
    pattern: str = ""

    suppressor: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(
                f"sparsity is {self.sparsity}: the share of weights that go, above 0 and below 1"
            )
        if not self.pattern:
            return
        match = _PATTERN.fullmatch(self.pattern)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(
                f"pattern is {self.pattern!r}: N:M is needed, N weights that stay of every M, such as 2:4"
            )

    @staticmethod
    def refuse(scheme: WeightScheme) -> str | None:
        return refuse_scheme(scheme)

    @property
    def group(self) -> tuple[int, int] | None:
        """Weights that stay, of how many; None without a pattern."""
        if not self.pattern:
            return None
        stay, _, of = self.pattern.partition(":")
        return int(stay), int(of)

    def shape_problem(self, k: int) -> str | None:
        """Why weights of ``k`` inputs cannot be pruned so, or None."""
        if self.group is not None and k % self.group[1]:
            return f"{k} inputs do not divide into groups of {self.group[1]}, as pattern {self.pattern} needs"
        if self.group is None and not 0 < round(self.sparsity * k) < k:
            return f"sparsity {self.sparsity:g} of {k} inputs leaves all of them or none"
        return None


def chosen(saliency: torch.Tensor, sparsity: float, group: tuple[int, int] | None) -> torch.Tensor:
    """bool [N, K]: which weights become zero, those with the least ``saliency`` [N, K] of each row, or of
    each group of a row; of equals the first."""
    n, k = saliency.shape
    if group is not None:
        stay, of = group
        places = saliency.view(n, k // of, of).argsort(dim=2, stable=True)[..., : of - stay]
        return (
            torch.zeros(n, k // of, of, dtype=torch.bool, device=saliency.device)
            .scatter_(2, places, True)
            .view(n, k)
        )
    places = saliency.argsort(dim=1, stable=True)[:, : round(sparsity * k)]
    return torch.zeros(n, k, dtype=torch.bool, device=saliency.device).scatter_(1, places, True)


@dataclass(frozen=True)
class MagnitudePruner(_Pruner):
    """The smallest weights go."""

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        gone = chosen(weight.abs(), self.sparsity, self.group)
        return Quantized(as_they_are(weight.masked_fill(gone, 0.0), scheme))


@dataclass(frozen=True)
class WandaPruner(_Pruner):
    """The weights go that are smallest beside the size of their inputs."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({"power"})

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        if statistics is None or statistics.power is None:
            raise QuantError("wanda needs calibration text: give --calibration-dataset, or use magnitude")
        gone = chosen(weight.abs() * statistics.power.sqrt(), self.sparsity, self.group)
        return Quantized(as_they_are(weight.masked_fill(gone, 0.0), scheme))


@dataclass(frozen=True)
class SparseGPTPruner(_Pruner):
    """The weights go whose absence the others can make up for; those are fitted to it.

    Attributes:
        refit: steps of conjugate gradients by which the weights that stay are fitted; 0: they stay as the
            feedback of errors leaves them.
    """

    refit: int = 32

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.refit <= 1000:
            raise ValueError(f"refit is {self.refit}: steps, from 0 to 1000")

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        if statistics is None or statistics.hessian is None:
            raise QuantError("sparsegpt needs calibration text: give --calibration-dataset, or use magnitude")
        power = statistics.hessian.diagonal().clone()
        factor, damping = factorize(statistics.hessian, _DAMPING, None)
        if factor is None:
            gone = chosen(weight.abs() * power.sqrt(), self.sparsity, self.group)
            note = f"the Hessian is not positive definite with damping up to {damping:g}: as wanda has it"
            return Quantized(as_they_are(weight.masked_fill(gone, 0.0), scheme), (f"{note} instead",))
        values, gone = pruned_columns(weight, factor.upper, self.sparsity, self.group)
        if self.refit:
            values = refitted(weight, values, gone, factor.hessian(), self.refit)
        more = f"the Hessian needed damping {damping:g} instead of {_DAMPING:g}"
        return Quantized(as_they_are(values, scheme), (more,) if damping > _DAMPING else ())


def pruned_columns(
    weight: torch.Tensor, upper: torch.Tensor, sparsity: float, group: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT's choice, and the weights that its feedback of errors leaves.

    Args:
        weight: fp32 [N, K].
        upper: fp32 [K, K], R of the damped Hessian; what is below its diagonal is not read.

    Returns:
        fp32 [N, K], zero where the mask, bool [N, K], is set.
    """
    n, k = weight.shape
    wide = _BLOCK if group is None else max(_BLOCK // group[1], 1) * group[1]
    values, gone = torch.empty_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    errors = torch.zeros(k, n, device=weight.device)  # [K, N]: W - Ŵ
    due = 0
    for start in range(0, k, wide):
        stop = min(start + wide, k)
        here = slice(start, stop)
        triangle = upper[here, here].triu()
        own = weight[:, here].t().contiguous()  # [b, N]
        pushed = upper[:start, here].t() @ errors[:start]
        ahead = own + torch.linalg.solve_triangular(triangle.t(), pushed, upper=False)
        saliency = ahead.square() * triangle.diagonal().square().unsqueeze(1)
        # so many of each row that its share is met at the end of this block, whatever the blocks' sizes
        wanted = round(sparsity * stop) - due
        due += wanted
        mask = chosen(saliency.t(), wanted / (stop - start), group).t()
        for i in range(stop - start):
            value = own[i] + pushed[i] / triangle[i, i]
            value[mask[i]] = 0.0
            errors[start + i] = own[i] - value
            values[:, start + i] = value
            pushed[i + 1 :] += triangle[i, i + 1 :, None] * errors[start + i]
        gone[:, here] = mask.t()
    return values, gone


def refitted(
    weight: torch.Tensor, values: torch.Tensor, gone: torch.Tensor, hessian: torch.Tensor, steps: int
) -> torch.Tensor:
    """Of all values that are zero where ``gone`` is set, those that come nearest to ``weight`` in
    tr(E·H·Eᵀ), from ``values`` on: conjugate gradients, each row's own, preconditioned by H's diagonal. The
    loss of no row is raised.

    Args:
        weight, values: fp32 [N, K]; ``gone``: bool [N, K]; ``hessian``: fp32 [K, K], positive definite.
    """
    inverse = hessian.diagonal().reciprocal()
    best = values.clone()
    residual = ((weight - best) @ hessian).masked_fill_(gone, 0.0)
    scaled = residual * inverse
    direction, size = scaled.clone(), (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ hessian).masked_fill_(gone, 0.0)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
        best.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        scaled = residual * inverse
        grown = (residual * scaled).sum(1, keepdim=True)
        ratio = torch.where(size > 0, grown / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
        direction.mul_(ratio).add_(scaled)
        size = grown
    before, after = (((weight - v) @ hessian * (weight - v)).sum(1, keepdim=True) for v in (values, best))
    return torch.where(after <= before, best, values)


for _method in (MagnitudePruner, WandaPruner, SparseGPTPruner):
    QuantizerRegistry.add(_method.name, _method)
