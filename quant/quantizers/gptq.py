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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from quant import defaults
from quant.accelerator import on_accelerator
from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers.base import Quantized, QuantizerRegistry
from quant.quantizers.columns import RUN, round_columns, run_of, stacked
from quant.quantizers.factors import Factor, factorize_all
from quant.quantizers.floats import encode, float_scales, nearest_float
from quant.quantizers.grids import Grid
from quant.quantizers.nearest import integers, round_to_nearest
from quant.quantizers.products import add_product
from quant.quantizers.refining import Solved, refine
from quant.quantizers.rounding import group_parameters, scale_dtype, weight_parameters
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor

#: Columns whose feedback on each other is applied one by one on a CPU; runs of them act on each other by
#: matrix products.
_PANEL = 32
#: Bits of codes that negative scales are searched for, at the most: of more the one code that the lower end
#: has besides is nothing.
SIGNED = 4
ONLY_SEARCHED = "signed is True: negative scales are a part of the search that clip_search makes"
#: Rows of a weight that are transposed at a time on a CPU.
_BAND = 256


@dataclass(frozen=True)
class GPTQQuantizer:
    """Settings of GPTQ.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of each element.
        act_order: ``static`` visits columns by falling importance (diagonal of H) with the groups of natural
            order, so the file needs no group index; ``none`` visits them in file order and takes each group's
            scale when it is reached, from the updated weights.
        clip_search: choose each group's range by least squared error weighted with what the loss counts it
            by (:meth:`Factor.importance`), instead of the whole range.
        sweeps: times that, after rounding, scales are fitted to the codes and all codes are gone through to
            change those that lower the loss (:mod:`quant.quantizers.refining`).
        signed: search among negative scales, too, of symmetric integers of up to :data:`SIGNED` bits: codes
            from -8 to 7 reach further down than up, and either end can be a group's positive one.
    """

    damping: float = defaults.DAMPING
    act_order: Literal["none", "static"] = defaults.ACT_ORDER
    clip_search: bool = defaults.CLIP_SEARCH["gptq"]
    sweeps: int = 1
    signed: bool = False

    name: ClassVar[str] = "gptq"
    suppressor: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(
                f"damping is {self.damping}: a share of the Hessian's diagonal, above 0 and at most 1"
            )
        if not 0 <= self.sweeps <= 100:
            raise ValueError(f"sweeps is {self.sweeps}: must be from 0 to 100")
        if self.signed and not self.clip_search:
            raise ValueError(ONLY_SEARCHED)

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
        return self._solved(weight.unsqueeze(0), [statistics], scheme, dtype, amax)[0]

    def many(
        self,
        weights: torch.Tensor,
        statistics: Sequence[Statistics | None],
        scheme: WeightScheme,
        dtype: torch.dtype,
    ) -> list[Quantized]:
        """:func:`~quant.quantizers.base.quantize_many`, by one column loop. Codes are those that each
        weight gets alone: on a CPU to the bit as far as its products of matrices do not depend on where their
        operands lie, on a GPU up to the rounding of batched products, which moves ties."""
        first = statistics[0]
        if len(weights) > 1 and all(s is first for s in statistics):  # of one input: more rows of one weight
            count, n, k = weights.shape
            # of a scheme with a number for the whole tensor each weight has its own
            if scheme.strategy in ("group", "channel"):
                whole = self(weights.view(count * n, k), first, scheme, dtype)
                return [
                    replace(whole, tensor=whole.tensor.rows(start, start + n))
                    for start in range(0, count * n, n)
                ]
            statistics = [s if s is None else s.copy() for s in statistics]
        return self._solved(weights, statistics, scheme, dtype, None)

    def slices(
        self,
        slices: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> list[Quantized]:
        """Slices [S, N, K] of the rows of one weight, by one factorization and one column loop; each gets the
        codes that it gets without the others, as far as :meth:`many` says that."""
        return self._solved(slices, [statistics], scheme, dtype, amax)

    def _solved(
        self,
        weights: torch.Tensor,
        statistics: Sequence[Statistics | None],
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None,
    ) -> list[Quantized]:
        """Weights [B, N, K], each with the statistics of its own input, or all with one."""
        hessians = [s.hessian for s in statistics if s is not None and s.hessian is not None]
        if len(hessians) < len(statistics):
            raise QuantError(
                "gptq needs calibration text: give --calibration-dataset, or use --method minmax"
            )
        diagonals = [h.diagonal().clone() for h in hessians]
        orders = [
            None if self.act_order == "none" else torch.argsort(d, descending=True, stable=True)
            for d in diagonals
        ]
        factors = factorize_all(hessians, self.damping, orders)
        if len(statistics) < len(weights):
            count = len(weights)
            diagonals, orders, factors = diagonals * count, orders * count, factors * count
        solved = [i for i, (factor, _) in enumerate(factors) if factor is not None]
        tensors: dict[int, QuantizedTensor] = {}
        for i in set(range(len(weights))) - set(solved):
            # errors are weighted alike: the diagonal may be what is wrong
            search = self.clip_search and scheme.type == "int"
            tensors[i] = round_to_nearest(weights[i].clone(), scheme, dtype, amax, search=search)
        if solved:
            chosen = weights if len(solved) == len(weights) else weights[solved]
            parts = [factor for factor, _ in factors if factor is not None]
            visits = [orders[i] for i in solved]
            given = [f.importance(o) for f, o in zip(parts, visits, strict=True)], visits
            if scheme.type == "float":
                made = self._floats(chosen, parts, *given, scheme, dtype, amax)
            else:
                made = self._integers(chosen, parts, *given, scheme, scale_dtype(scheme, dtype))
            tensors |= dict(zip(solved, made, strict=True))
        return [
            Quantized(
                tensors[i],
                self._fallbacks(*factors[i]),
                (*dead_notes(diagonals[i]), *negative_notes(tensors[i])),
            )
            for i in range(len(weights))
        ]

    def _fallbacks(self, factor: Factor | None, damping: float) -> tuple[str, ...]:
        if factor is None:
            return (
                f"the Hessian is not positive definite with damping up to {damping:g}: rounded to nearest "
                "instead",
            )
        if damping > self.damping:
            return (f"the Hessian needed damping {damping:g} instead of {self.damping:g}",)
        return ()

    def _floats(
        self,
        weights: torch.Tensor,
        factors: Sequence[Factor],
        importance: Sequence[torch.Tensor],
        orders: Sequence[torch.Tensor | None],
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None,
    ) -> list[QuantizedTensor]:
        # scales come first whatever the order: those of a group that is reached later are of no other kind
        scales = [
            float_scales(w, scheme, amax, d, self.clip_search)
            for w, d in zip(weights, importance, strict=True)
        ]
        natural = torch.arange(weights.shape[2], device=weights.device)
        visits = [natural if order is None else order for order in orders]
        wide = torch.stack([s.wide for s in scales])
        divisors = [s.global_scale for s in scales]
        divisor = torch.stack([d for d in divisors if d is not None]) if divisors[0] is not None else None
        values, fitted, _ = _solve(
            weights, factors, scheme, dtype, ((wide, None), visits), None, False, self.sweeps, divisor
        )
        return [
            QuantizedTensor(
                encode(v, scheme.bits), s.of(f), None, scheme,
                global_scale=s.global_scale,
            )
            for v, f, s in zip(values, fitted, scales, strict=True)
        ]  # fmt: skip

    def _integers(
        self,
        weights: torch.Tensor,
        factors: Sequence[Factor],
        importance: Sequence[torch.Tensor],
        orders: Sequence[torch.Tensor | None],
        scheme: WeightScheme,
        dtype: torch.dtype,
    ) -> list[QuantizedTensor]:
        visits = [order for order in orders if order is not None]
        signed = self.signed and scheme.bits <= SIGNED
        if not visits:
            codes, scales, zeros = _solve(
                weights,
                factors,
                scheme,
                dtype,
                None,
                importance if self.clip_search else None,
                self.clip_search,
                self.sweeps,
                signed=signed,
            )
        else:
            fixed = [
                weight_parameters(w, scheme, dtype, d, self.clip_search, signed)
                for w, d in zip(weights, importance, strict=True)
            ]
            shifts = [z for _, z in fixed if z is not None]
            numbers = torch.stack([s for s, _ in fixed]), torch.stack(shifts) if shifts else None
            codes, scales, zeros = _solve(
                weights, factors, scheme, dtype, (numbers, visits), None, False, self.sweeps
            )
        return [
            integers(codes[i], scales[i], None if zeros is None else zeros[i], scheme, dtype)
            for i in range(len(weights))
        ]


def dead_notes(diagonal: torch.Tensor) -> tuple[str, ...]:
    """What a Hessian's diagonal says of the input."""
    if not (count := int((diagonal == 0).sum())):
        return ()
    # an input that is always zero has no say in the error: its column is rounded to nearest, undisturbed by
    # the others
    return (
        f"{count} of {len(diagonal)} inputs are zero on all calibration tokens: their columns are rounded to "
        "nearest",
    )


def negative_notes(tensor: QuantizedTensor) -> tuple[str, ...]:
    """What is said of negative scales: vLLM's Marlin kernel reads them as they are, but not where it is made
    to round activations (vLLM issue 48905)."""
    if tensor.scheme.type == "float" or not (count := int((tensor.scales < 0).sum())):
        return ()
    return (f"{count} of {tensor.scales.numel()} scales are negative: not for VLLM_MARLIN_INPUT_DTYPE=int8",)


def solve_fixed(
    weight: torch.Tensor,
    factor: Factor,
    order: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    grid: Grid,
) -> torch.Tensor:
    """Codes fp32 [N, K] that GPTQ gives a weight fp32 [N, K], which is overwritten, with scales and zeros
    [N, G] that are fixed."""
    numbers = scales.unsqueeze(0), None if zeros is None else zeros.unsqueeze(0)
    codes, _, _ = _solve(
        weight.unsqueeze(0), [factor], grid.scheme, grid.dtype, (numbers, [order]), None, False
    )
    return codes[0].float()


def _solve(
    weights: torch.Tensor,
    factors: Sequence[Factor],
    scheme: WeightScheme,
    dtype: torch.dtype,
    fixed: tuple[tuple[torch.Tensor, torch.Tensor | None], Sequence[torch.Tensor]] | None,
    importance: Sequence[torch.Tensor] | None,
    search: bool,
    sweeps: int = 0,
    divisor: torch.Tensor | None = None,
    signed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The column loop, of a batch of weights at once: each has its own Hessian and order, and nothing of one
    enters another. The work on a column, which is short, is shared by the batch; the products of runs of
    columns are each weight's own on a CPU, so that its codes do not depend on the batch.

    Args:
        weights: fp32 [B, N, K]; overwritten.
        factors: of each, R of the columns in the order they are visited.
        fixed: scales and zeros [B, N, G] and each one's order of columns; None: file order, scales taken as
            groups are reached.
        importance: what the search for those weights errors with, [K] of each; or None.
        sweeps: times that scales are fitted and codes gone through again after all are rounded.
        divisor: of the scales of each weight, fp32 [B, 1], where they have one.
        signed: that search takes negative scales, too.

    Returns:
        int8 codes [B, N, K] (of floats their fp32 values), fp32 scales [B, N, G], fp32 zeros [B, N, G] or
        None.
    """
    count, n, k = weights.shape
    device, groups = weights.device, scheme.groups(k)
    g = scheme.group_size if scheme.group_size != -1 else k
    orders = [torch.arange(k, device=device)] * count if fixed is None else fixed[1]
    # [K, B, N]: starts as W, column k becomes W_k - Ŵ_k once it is rounded
    errors = torch.empty(k, count, n, device=device)
    for i, order in enumerate(orders):
        transpose(weights[i], order, errors[:, i])
    # [G, B, N]: a column's scales of all weights are one run
    if fixed is not None:
        scales_t, zeros_t = (None if x is None else x.permute(2, 0, 1).contiguous() for x in fixed[0])
        assert scales_t is not None
    else:
        scales_t = torch.empty(groups, count, n, device=device)
        zeros_t = None if scheme.symmetric else torch.empty(groups, count, n, device=device)
    groups_of = {id(order): order // g for order in orders}
    group_of = [groups_of[id(order)] for order in orders]
    kind = torch.float32 if scheme.type == "float" else torch.int8
    codes = torch.empty(k, count, n, dtype=kind, device=device)
    inverse = torch.stack([1.0 / f.diagonal() for f in factors], 1).unsqueeze(-1)  # [K, B, 1]
    # [K, B, N]: Σ_j (W_j - Ŵ_j) · R_jk over the columns j rounded so far, at row k; in the memory of the
    # weights, which errors hold from now on
    feedback = weights.reshape(k, count, n).zero_()

    walk = _Walk(errors, feedback, codes, inverse, scales_t, zeros_t, group_of, Grid(scheme, dtype, divisor))
    reached = None if fixed is not None else _Reached(factors, importance, search, g, signed)
    one = RUN if reached is None else run_of(g, groups)
    width = one if on_accelerator(weights) else _PANEL
    for number, start in enumerate(range(0, k, width)):
        panel = slice(start, min(start + width, k))
        if number:
            # as in a recursion by halves: the largest run that ends here and is a power of two of panels
            # feeds back on as many that follow
            run = (number & -number) * width
            _feed_back(
                feedback, errors, factors, slice(start - run, start), slice(start, min(start + run, k))
            )
        if on_accelerator(weights):
            walk.as_one(panel, factors, reached)
        else:
            walk.by_steps(panel, factors, reached)
    if sweeps:
        under_way = Solved(errors, codes, scales_t, zeros_t, group_of, walk.grid)
        del feedback, walk
        whole = {id(factor): factor.hessian() for factor in {id(f): f for f in factors}.values()}
        hessians = [whole[id(factor)] for factor in factors]
        for _ in range(sweeps):
            refine(under_way, hessians)
    return (
        torch.stack(
            [_in_file_order(codes[:, i], None if fixed is None else orders[i]) for i in range(count)]
        ),
        scales_t.permute(1, 2, 0).contiguous(),
        None if zeros_t is None else zeros_t.permute(1, 2, 0).contiguous(),
    )


@dataclass(frozen=True)
class _Reached:
    """How scales are taken when their group is reached: from weights as they are by then.

    Attributes:
        importance: what the search for those weights errors with, [K] of each weight; or None.
        size: columns of a group.
    """

    factors: Sequence[Factor]
    importance: Sequence[torch.Tensor] | None
    search: bool
    size: int
    signed: bool

    def take(self, walk: _Walk, column: int) -> None:
        """Puts the scales and zeros of the group that starts with a column where they belong."""
        now, group = slice(column, column + self.size), column // self.size
        for b, factor in enumerate(self.factors):
            weighted = None if self.importance is None else self.importance[b]
            s, z = _group_now(
                walk.errors[:, b], factor, now, walk.grid.scheme, walk.grid.dtype, weighted, self.search,
                self.signed,
            )  # fmt: skip
            walk.scales[group, b] = s
            if walk.zeros is not None and z is not None:
                walk.zeros[group, b] = z


@dataclass(frozen=True)
class _Walk:
    """A batch of weights under way through its columns, all tensors changed in place.

    Attributes:
        errors: fp32 [K, B, N], weights, or what rounding left of them.
        feedback: fp32 [K, B, N], Σ_j (W_j - Ŵ_j) · R_jk over the columns j rounded so far, at row k.
        codes: [K, B, N], int8 or, of floats, their fp32 values.
        inverse: 1 / R_kk, fp32 [K, B, 1].
        scales, zeros: fp32 [G, B, N].
        groups: int64 [K] of each weight, the group of each column.
    """

    errors: torch.Tensor
    feedback: torch.Tensor
    codes: torch.Tensor
    inverse: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    groups: Sequence[torch.Tensor]
    grid: Grid

    def as_one(self, panel: slice, factors: Sequence[Factor], reached: _Reached | None) -> None:
        """Rounds a panel's columns by one operation; no group starts within it when scales are taken as
        groups are reached."""
        if reached is not None and panel.start % reached.size == 0:
            reached.take(self, panel.start)
        round_columns(
            self.errors[panel], self.feedback[panel], self.codes[panel],
            stacked([f.block(panel, panel) for f in factors]), self.inverse[panel].squeeze(-1),
            self.scales, self.zeros, stacked([g[panel] for g in self.groups]), self.grid,
        )  # fmt: skip

    def by_steps(self, panel: slice, factors: Sequence[Factor], reached: _Reached | None) -> None:
        """Rounds a panel's columns by short steps, which a CPU's cache holds."""
        scheme, start, width = self.grid.scheme, panel.start, panel.stop - panel.start
        triangle = torch.stack([f.block(panel, panel) for f in factors], -1).unsqueeze(-1)  # [P, P, B, 1]
        scale = zero = None
        if reached is None:  # rows are taken all at once: each when it is needed costs as much as its use
            scale = _rows_of(self.scales, self.groups, panel)
            zero = None if self.zeros is None else _rows_of(self.zeros, self.groups, panel)
        inner = self.feedback[panel]
        rounded = torch.empty_like(inner)
        low, high = scheme.low, scheme.high
        columns = self.errors[panel].unbind(), inner.unbind(), rounded.unbind(), self.inverse[panel].unbind()
        for i, (error, pushed, code, factor) in enumerate(zip(*columns, strict=True)):
            if scale is not None:
                s, z = scale[i], None if zero is None else zero[i]
            elif reached is not None:
                if (start + i) % reached.size == 0:
                    reached.take(self, start + i)
                group = (start + i) // reached.size
                s, z = self.scales[group], None if self.zeros is None else self.zeros[group]
            torch.addcmul(error, pushed, factor, out=code).div_(s)
            if scheme.type == "float":
                code.copy_(nearest_float(code, scheme.bits))
                error.addcmul_(code, s, value=-1)
            elif z is None:
                error.addcmul_(code.round_().clamp_(low, high), s, value=-1)
            else:
                code.add_(z).round_().clamp_(low, high)
                error.addcmul_(code - z, s, value=-1)
            if i + 1 < width:
                inner[i + 1 :].addcmul_(triangle[i, i + 1 :], error)
        self.codes[panel] = rounded


def _feed_back(
    feedback: torch.Tensor, errors: torch.Tensor, factors: Sequence[Factor], done: slice, ahead: slice
) -> None:
    """Adds what the errors of columns ``done`` push onto the columns ``ahead``, both [K, B, N]."""
    if not on_accelerator(feedback) or len(factors) == 1:
        for i, factor in enumerate(factors):
            add_product(feedback[ahead, i], factor.block(done, ahead).t(), errors[done, i])
        return
    blocks = stacked([factor.block(done, ahead) for factor in factors])
    feedback[ahead].transpose(0, 1).baddbmm_(blocks.mT, errors[done].transpose(0, 1))


def _rows_of(numbers: torch.Tensor, group_of: Sequence[torch.Tensor], panel: slice) -> torch.Tensor:
    """[P, B, N]: of numbers [G, B, N] those of the group of each column of a panel."""
    return torch.stack([numbers[:, i].index_select(0, g[panel]) for i, g in enumerate(group_of)], 1)


def _in_file_order(codes: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """[N, K] of codes [K, N] whose columns were visited in ``order``."""
    natural = codes if order is None else codes.index_select(0, torch.argsort(order))
    return natural.t().contiguous()


def transpose(weight: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
    """Puts the columns of ``weight`` [N, K] in ``order``, one after another, into ``out`` [K, N]. By bands of
    rows, which a CPU's cache holds."""
    n = len(weight)
    band = n if on_accelerator(weight) else _BAND
    for start in range(0, n, band):
        # transposed first: then whole runs are put in order, not single numbers
        out[:, start : start + band] = weight[start : start + band].t().contiguous().index_select(0, order)


def _group_now(
    errors: torch.Tensor,
    factor: Factor,
    group: slice,
    scheme: WeightScheme,
    dtype: torch.dtype,
    importance: torch.Tensor | None,
    search: bool,
    signed: bool,
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
        signed,
    )
    return scales.squeeze(1), None if zeros is None else zeros.squeeze(1)


QuantizerRegistry.add(GPTQQuantizer.name, GPTQQuantizer)
