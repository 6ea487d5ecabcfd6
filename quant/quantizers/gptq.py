"""GPTQ (Frantar et al. 2022, arXiv:2210.17323), in the feedback form.

GPTQ rounds one input column of W after another and moves each column's error onto the columns not yet
rounded. With the Hessian factored as H = R·Rᵀ (R upper triangular), the value that column k is rounded from
can be written without the inverse of H: it is

    W_k + Σ_{j<k} (W_j - Ŵ_j) · R_jk / R_kk

where Ŵ is what has been rounded already. That this is the same method is Theorem 6 of Chee et al. 2023 (QuIP,
arXiv:2307.13304), there with the LDLᵀ factors. One Cholesky factorization replaces the usual
factor-invert-factor, nothing is written to columns ahead, and the loss is Σ_k R_kk² · |rounding error of
column k|².

Everything is kept transposed, [K, N], so that a column of W is one contiguous run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from quant import defaults
from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.floats import encode, float_scales, nearest_float
from quant.quantizers.nearest import integers, round_to_nearest
from quant.quantizers.rounding import group_parameters, scale_dtype, weight_parameters
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor

#: Columns whose feedback on each other is applied one by one; runs of them act on each other by matrix
#: products.
_PANEL = 32
#: Rows of the Hessian that are put in order at a time.
_ROWS = 128
#: Rows of a weight that are transposed at a time on a CPU.
_BAND = 32
#: Each rung multiplies the damping by ten; a Hessian that is not positive definite at the last one is not
#: usable.
_RUNGS = 4


@dataclass(frozen=True)
class GPTQQuantizer:
    """Settings of GPTQ.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of its mean.
        act_order: ``static`` visits columns by falling importance (diagonal of H) with the groups of natural
            order, so the file needs no group index; ``none`` visits them in file order and takes each group's
            scale when it is reached, from the updated weights.
        clip_search: choose each group's range by least squared error weighted with the diagonal of H, instead
            of the whole range.
    """

    damping: float = defaults.DAMPING
    act_order: Literal["none", "static"] = defaults.ACT_ORDER
    clip_search: bool = defaults.CLIP_SEARCH["gptq"]

    name: ClassVar[str] = "gptq"
    suppressor: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(
                f"damping is {self.damping}: a share of the Hessian's mean diagonal, above 0 and at most 1"
            )

    @staticmethod
    def refuse(scheme: WeightScheme) -> str | None:
        return None

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        if statistics is None or statistics.hessian is None:
            raise QuantError(
                "gptq needs calibration text: give --calibration-dataset, or use --method minmax"
            )
        diagonal = statistics.hessian.diagonal().clone()
        fallbacks, notes = [], []
        dead = diagonal == 0
        if count := int(dead.sum()):
            # an input that is always zero has no say in the error: its column is rounded to nearest,
            # undisturbed by the others
            notes.append(
                f"{count} of {len(dead)} inputs are zero on all calibration tokens: their columns are "
                "rounded to nearest"
            )
        order = None if self.act_order == "none" else torch.argsort(diagonal, descending=True, stable=True)
        factor, damping = factorize(statistics.hessian, self.damping, order)
        if factor is None:
            fallbacks.append(
                f"the Hessian is not positive definite with damping up to {damping:g}: rounded to nearest "
                "instead"
            )
            # errors are weighted alike: the diagonal may be what is wrong
            tensor = round_to_nearest(
                weight, scheme, dtype, amax, search=self.clip_search and scheme.type == "int"
            )
            return Quantized(tensor, tuple(fallbacks), tuple(notes))
        if damping > self.damping:
            fallbacks.append(f"the Hessian needed damping {damping:g} instead of {self.damping:g}")
        if scheme.type == "float":
            tensor = self._floats(weight, factor, diagonal, order, scheme, dtype, amax)
        else:
            tensor = self._integers(weight, factor, diagonal, order, scheme, scale_dtype(scheme, dtype))
        return Quantized(tensor, tuple(fallbacks), tuple(notes))

    def _floats(
        self,
        weight: torch.Tensor,
        factor: Factor,
        diagonal: torch.Tensor,
        order: torch.Tensor | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None,
    ) -> QuantizedTensor:
        # scales come first whatever the order: those of a group that is reached later are of no other kind
        scales = float_scales(weight, scheme, amax, diagonal, self.clip_search)
        visits = torch.arange(len(diagonal), device=weight.device) if order is None else order
        values, _, _ = _solve(
            weight, factor, scheme, dtype, ((scales.wide.contiguous(), None), visits), None, False
        )
        codes = encode(values, scheme.bits)
        return QuantizedTensor(codes, scales.stored, None, scheme, global_scale=scales.global_scale)

    def _integers(
        self,
        weight: torch.Tensor,
        factor: Factor,
        diagonal: torch.Tensor,
        order: torch.Tensor | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
    ) -> QuantizedTensor:
        if order is None:
            importance = diagonal if self.clip_search else None
            codes, scales, zeros = _solve(weight, factor, scheme, dtype, None, importance, self.clip_search)
        else:
            fixed = weight_parameters(weight, scheme, dtype, diagonal, self.clip_search)
            codes, scales, zeros = _solve(weight, factor, scheme, dtype, (fixed, order), None, False)
        return integers(codes, scales, zeros, scheme, dtype)


def factorize(
    hessian: torch.Tensor, damping: float, order: torch.Tensor | None
) -> tuple[Factor | None, float]:
    """R with R·Rᵀ = H + damping · mean(diag H) · I, rows and columns taken in ``order``. ``hessian`` is
    overwritten.

    Factored in fp32; where that fails, in fp64 with the same damping, and then with ten times more until the
    last rung.

    Returns:
        R and the damping that was needed, or None and the last damping tried.
    """
    k = len(hessian)
    reverse = torch.arange(k, device=hessian.device) if order is None else order
    reverse = reverse.flip(0)
    flipped = torch.empty_like(hessian)
    for start in range(0, k, _ROWS):  # by rows: indexing the whole matrix twice would hold a third copy
        rows = slice(start, start + _ROWS)
        torch.index_select(hessian[reverse[rows]], 1, reverse, out=flipped[rows])
    diagonal = flipped.diagonal()
    diagonal[diagonal == 0] = 1.0  # dead inputs: their off-diagonal elements are zero too
    mean = diagonal.mean()
    applied = 0.0
    for rung in range(_RUNGS):
        wanted = damping * 10**rung
        diagonal += (wanted - applied) * mean
        applied = wanted
        # the result goes where the Hessian was, seen as LAPACK's column-major matrix
        lower, failed = torch.linalg.cholesky_ex(
            flipped, out=(hessian.t(), torch.empty((), dtype=torch.int32, device=hessian.device))
        )
        if not failed and bool(lower.diagonal().isfinite().all()):
            return Factor(lower), applied
        precise, failed = torch.linalg.cholesky_ex(flipped.double())
        if not failed and bool(precise.diagonal().isfinite().all()):
            return Factor(precise.float()), applied
    return None, applied


@dataclass(frozen=True)
class Factor:
    """The upper triangular R of the H in question, kept as the lower Cholesky factor of H with rows and
    columns reversed: the one is the other read backwards."""

    reversed_lower: torch.Tensor

    def block(self, rows: slice, columns: slice) -> torch.Tensor:
        """R[rows, columns], copied; both slices have a start and a stop."""
        k = len(self.reversed_lower)
        return self.reversed_lower[k - rows.stop : k - rows.start, k - columns.stop : k - columns.start].flip(
            0, 1
        )

    def diagonal(self) -> torch.Tensor:
        return self.reversed_lower.diagonal().flip(0)


def _solve(
    weight: torch.Tensor,
    factor: Factor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    fixed: tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor] | None,
    importance: torch.Tensor | None,
    search: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The column loop.

    Args:
        weight: fp32 [N, K]; overwritten.
        factor: R of the columns in the order they are visited.
        fixed: scales and zeros [N, G] and the order of columns; None: file order, scales taken as groups are
            reached.

    Returns:
        int8 codes [N, K] (of floats their fp32 values), fp32 scales [N, G], fp32 zeros [N, G] or None.
    """
    n, k = weight.shape
    groups = scheme.groups(k)
    g = scheme.group_size if scheme.group_size != -1 else k
    order = torch.arange(k, device=weight.device) if fixed is None else fixed[1]
    errors = transposed(weight, order)  # starts as W, column k becomes W_k - Ŵ_k once it is rounded
    group_of = (order // g).tolist()
    if fixed is not None:
        scales, zeros = fixed[0]
    else:
        scales = torch.empty(n, groups, device=weight.device)
        zeros = None if scheme.symmetric else torch.empty(n, groups, device=weight.device)
    scales_t = scales.t().contiguous()
    zeros_t = None if zeros is None else zeros.t().contiguous()
    # rows of tensors are taken all at once: taking each when it is needed costs as much as working on it
    scale_of, zero_of = scales_t.unbind(), [None] * groups if zeros_t is None else zeros_t.unbind()
    floats = scheme.type == "float"
    codes = torch.empty(k, n, dtype=torch.float32 if floats else torch.int8, device=weight.device)
    inverse = (1.0 / factor.diagonal()).tolist()
    # [K, N]: Σ_j (W_j - Ŵ_j) · R_jk over the columns j rounded so far, at row k; in the memory of the weight,
    # which errors hold from now on
    feedback = weight.reshape(k, n).zero_()

    for number, start in enumerate(range(0, k, _PANEL)):
        end = min(start + _PANEL, k)
        if number:
            # as in a recursion by halves: the largest run that ends here and is a power of two of panels
            # feeds back on as many that follow
            run = (number & -number) * _PANEL
            done, ahead = slice(start - run, start), slice(start, min(start + run, k))
            feedback[ahead].addmm_(factor.block(done, ahead).t(), errors[done])
        triangle = factor.block(slice(start, end), slice(start, end))
        inner = feedback[start:end]
        rounded = torch.empty_like(inner)
        for i, (error, pushed, code) in enumerate(
            zip(errors[start:end].unbind(), inner.unbind(), rounded.unbind(), strict=True)
        ):
            c = start + i
            group = group_of[c]
            if fixed is None and c % g == 0:
                s, z = _group_now(errors, factor, slice(c, c + g), scheme, dtype, importance, search)
                scale_of[group].copy_(s)
                if zeros_t is not None and z is not None:
                    zeros_t[group] = z
            scale, zero = scale_of[group], zero_of[group]
            torch.add(error, pushed, alpha=inverse[c], out=code).div_(scale)
            if floats:
                code.copy_(nearest_float(code, scheme.bits))
                error.addcmul_(code, scale, value=-1)
            elif zero is None:
                error.addcmul_(code.round_().clamp_(scheme.low, scheme.high), scale, value=-1)
            else:
                code.add_(zero).round_().clamp_(scheme.low, scheme.high)
                error.addcmul_(code - zero, scale, value=-1)
            if c + 1 < end:
                inner[i + 1 :].addr_(triangle[i, i + 1 :], error)
        codes[start:end] = rounded
    if fixed is not None:
        natural = torch.empty_like(codes)
        natural[order] = codes
        codes = natural
    return (
        codes.t().contiguous(),
        scales_t.t().contiguous(),
        None if zeros_t is None else zeros_t.t().contiguous(),
    )


def transposed(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """fp32 [K, N]: the columns of ``weight`` [N, K] in ``order``, one after another. By bands of rows, which
    a CPU's cache holds."""
    n, k = weight.shape
    columns = torch.empty(k, n, dtype=weight.dtype, device=weight.device)
    band = n if weight.is_cuda else _BAND
    for start in range(0, n, band):
        columns[:, start : start + band] = weight[start : start + band].index_select(1, order).t()
    return columns


def _group_now(
    errors: torch.Tensor,
    factor: Factor,
    group: slice,
    scheme: WeightScheme,
    dtype: torch.dtype,
    importance: torch.Tensor | None,
    search: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zeros [N] of a group of columns, from its weights as GPTQ has updated them by the time it is
    reached.

    Given the errors E of all columns before, the update of group G is E·R_PG·R_GG⁻¹: the block of R above the
    group's own triangle, times the inverse of that triangle.
    """
    pushed = factor.block(slice(0, group.start), group).t() @ errors[: group.start]  # [g, N]
    update = torch.linalg.solve_triangular(factor.block(group, group).t(), pushed, upper=False)
    scales, zeros = group_parameters(
        (errors[group] + update).t().unsqueeze(1),
        scheme,
        dtype,
        None if importance is None else importance[None, group],
        search,
    )
    return scales.squeeze(1), None if zeros is None else zeros.squeeze(1)


QuantizerRegistry.add(GPTQQuantizer.name, GPTQQuantizer)
