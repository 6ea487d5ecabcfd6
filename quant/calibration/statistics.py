"""What a method may ask about a linear's input, gathered once for all linears that share it.

The Hessian of the layer's squared error is H = Σ x xᵀ over all calibration tokens, K × K. It is the largest
single piece of arithmetic after the forward passes, so how it is summed is decided by the hardware:

- CUDA: 16-bit products with fp32 results, from the tensor cores.
- A CPU that multiplies 8-bit integers (AVX512-VNNI, AMX): int8 products with int32 results, which are twice
  as fast as bf16 ones and exact, where torch's fast products of bf16 numbers would round each result to bf16
  (an error as large as the damping). Each feature is rounded to steps of its own range over some thousand
  tokens, so H is the exact Gram matrix of inputs that are 8-bit numbers; a feature whose range is much wider
  than its usual values gets a second column of eight bits for what the first one leaves.
- Any other CPU: fp32.

Rounding to a step d adds about d²/12 to a feature's own power, so it acts as a little more damping, in
proportion to the feature: at most 0.2 %, where the damping is 1 %.
``benchmarks/hessian_precision.py`` measures it, and that it does not move KL. Only the lower triangle is
computed, in panels, and mirrored at the end: about half of the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quant.accelerator import fp32_products
from quant.tensors import largest_magnitude

#: What may be asked for.
STATISTICS = frozenset({"hessian", "power", "range", "sample", "gradients"})
#: Rows and columns of a block of the triangle, large enough for full speed; and of those along its diagonal,
#: half of which are of no use.
_PANEL, _SMALL = 2048, 512
#: Rows and columns of what is mirrored at a time.
_SQUARE = 256
#: Most tokens of a sample.
_SAMPLE = 512
#: Code of a feature's largest magnitude: the bf16 rounding of step and quotient must not push it beyond 127.
_TOP = 126.0
#: A feature whose codes have less than this root mean square, so that rounding them is more than 0.2 % of its
#: power, gets a second column.
_LEAST = 7.0
#: Tokens whose int8 products are summed in int32, where 127² times as many stay below 2³¹; and of those that
#: are turned into codes at a time.
_RUN, _STRIP = 1 << 13, 1 << 8


@dataclass(frozen=True)
class Statistics:
    """Of one input of K features: what was asked for, and how many tokens it saw.

    Attributes:
        tokens: rows of x.
        hessian: fp32 [K, K], mean of x xᵀ; with ``gradients`` of ‖g‖² x xᵀ; or None.
        power: fp32 [K], mean square of each feature; or None.
        minimum, maximum: fp32 [K], the range of each feature; or None.
        sample: fp32 [≤ 512, K], inputs of tokens at even distances; or None.
        gradients: fp32 [B, b, b], mean of ‖x‖² g gᵀ, where g is the gradient at the outputs of the one linear
            that these statistics are of: blocks along its diagonal, the last one zero behind the last output;
            or None.
    """

    tokens: int
    hessian: torch.Tensor | None = None
    power: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    maximum: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    gradients: torch.Tensor | None = None

    @property
    def abs_max(self) -> torch.Tensor:
        """fp32 [K], largest |x|; the range must have been asked for."""
        assert self.minimum is not None and self.maximum is not None
        return torch.maximum(-self.minimum, self.maximum)

    @property
    def outlier_ratio(self) -> float:
        """Root mean square of the largest feature over that of the median one; 1 where it is not known or
        most are zero."""
        if self.hessian is None:
            return 1.0
        power = self.hessian.diagonal()
        median = float(power.median())
        return math.sqrt(float(power.max()) / median) if median > 0 else 1.0

    @property
    def finite(self) -> bool:
        """Whether no token's input held NaN or infinity: any of them stays in every sum and range (a sample
        may have passed it by)."""
        given = [
            None if self.hessian is None else self.hessian.diagonal(),
            self.power,
            self.minimum,
            self.maximum,
            self.sample,
            None if self.gradients is None else self.gradients.diagonal(dim1=1, dim2=2),
        ]
        return all(bool(torch.isfinite(x).all()) for x in given if x is not None)

    def copy(self) -> Statistics:
        """With a Hessian of its own: methods overwrite theirs."""
        return replace(self, hessian=None if self.hessian is None else self.hessian.clone())

    def divided(self, factors: torch.Tensor) -> Statistics:
        """The statistics that x / factors has: what a method must see after scaling was moved into the
        weights.

        ``factors``: fp32 [K], positive. The Hessian is divided in place.
        """
        if self.hessian is not None:
            self.hessian.div_(factors).div_(factors.unsqueeze(-1))
        low, high, sample = (
            None if x is None else x / factors for x in (self.minimum, self.maximum, self.sample)
        )
        power = None if self.power is None else self.power / factors.square()
        return replace(self, power=power, minimum=low, maximum=high, sample=sample)


class Accumulator:
    """Sums the statistics named in ``needs`` (``hessian``, ``power``, ``range``, ``sample``) batch by batch,
    on the device of the batches; for ``gradients`` see :class:`GradientAccumulator`. ``parts``: of one of so
    many that will be merged, and that share the tokens of a sample."""

    def __init__(self, features: int, device: torch.device, needs: Iterable[str], parts: int = 1):
        needs = set(needs)
        if unknown := needs - STATISTICS:
            raise ValueError(f"no such statistic: {', '.join(sorted(unknown))}")
        self.tokens = 0
        self._gram = gram_for(features, device) if "hessian" in needs else None
        self._power = torch.zeros(features, device=device) if "power" in needs else None
        self._range = (
            (torch.zeros(features, device=device), torch.zeros(features, device=device))
            if "range" in needs
            else None
        )
        self._sample = torch.zeros(0, features, device=device) if "sample" in needs else None
        self._stride, self._most = 1, _SAMPLE // parts

    def add(self, inputs: torch.Tensor, whole: bool = False) -> None:
        """Adds a batch [..., K] of any floating dtype; a ``whole`` one is not kept to be summed with the
        next, which takes less memory and more time."""
        self._add(inputs.reshape(-1, inputs.shape[-1]), whole)

    def _add(self, x: torch.Tensor, whole: bool) -> None:
        if self._sample is not None:
            self._sample = torch.cat([self._sample, x[-self.tokens % self._stride :: self._stride].float()])
            # rows are stride tokens apart, from the first on: every other one stays
            while len(self._sample) > self._most:
                self._sample, self._stride = self._sample[::2].clone(), self._stride * 2
        self.tokens += len(x)
        if self._power is not None:
            self._power += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
        if self._range is not None:
            low, high = self._range
            self._range = (torch.minimum(low, x.amin(0).float()), torch.maximum(high, x.amax(0).float()))
        if self._gram is not None:
            (self._gram.add_whole if whole else self._gram.add)(x)

    @classmethod
    def of(cls, inputs: torch.Tensor, needs: Iterable[str]) -> Statistics:
        """The statistics of one batch [T, K] alone, which is not copied."""
        sums = cls(inputs.shape[1], inputs.device, needs)
        if len(inputs):
            sums._add(inputs, whole=True)
        return sums.finish()

    @property
    def sums(self) -> torch.Tensor | None:
        """fp32 [K, K], of which the lower triangle counts, what Σ x xᵀ is so far; or None."""
        return None if self._gram is None else self._gram.total

    @property
    def large(self) -> list[torch.Tensor]:
        """Of what was summed so far that which takes memory."""
        return [] if self._gram is None else [self._gram.total]

    @property
    def counts(self) -> tuple[int, ...]:
        """How much was summed so far, for :meth:`restore`."""
        return (self.tokens,)

    def settle(self) -> None:
        """Sums up what waits for more and lets go of what adding takes, until more is added."""
        if self._gram is not None:
            self._gram.settle()

    def merge(self, later: Accumulator) -> None:
        """Adds the sums of the tokens behind these; both are settled."""
        self.tokens += later.tokens
        if self._gram is not None and later._gram is not None:
            self._gram.total += later._gram.total
        if self._power is not None and later._power is not None:
            self._power += later._power
        if self._range is not None and later._range is not None:
            low, high = self._range
            self._range = torch.minimum(low, later._range[0]), torch.maximum(high, later._range[1])
        if self._sample is not None and later._sample is not None:
            self._sample = torch.cat([self._sample, later._sample])

    def state(self) -> dict[str, torch.Tensor]:
        """What was summed so far, as it is held, but for the number of tokens; of one that is settled."""
        low, high = self._range or (None, None)
        held = {"sums": self.sums, "power": self._power, "low": low, "high": high, "sample": self._sample}
        return {name: value for name, value in held.items() if value is not None}

    def restore(self, counts: Sequence[int], state: Mapping[str, torch.Tensor]) -> None:
        """Takes over what :attr:`counts` and :meth:`state` gave, in another process maybe."""
        (self.tokens,) = counts
        if self._gram is not None:
            self._gram.total = state["sums"]
        if self._power is not None:
            self._power = state["power"]
        if self._range is not None:
            self._range = state["low"], state["high"]
        if self._sample is not None:
            self._sample = state["sample"]

    def finish(self) -> Statistics:
        """The statistics; the sums are handed over, not copied."""
        gram, self._gram = self._gram, None
        hessian = None if gram is None else gram.finish().mul_(1 / max(self.tokens, 1))
        power = None if self._power is None else self._power / max(self.tokens, 1)
        low, high = self._range or (None, None)
        return Statistics(self.tokens, hessian, power, low, high, self._sample)


class GradientAccumulator:
    """Sums the statistics named in ``needs`` of one linear, ``gradients`` among them, from its inputs and
    from the gradients at its outputs.

    Args:
        blocks: number and size of the blocks of ``gradients``.
        parts: of how many that will be merged this is one.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        blocks: tuple[int, int],
        device: torch.device,
        needs: Iterable[str],
        parts: int = 1,
    ):
        needs = set(needs)
        self._outputs, (count, self._size) = outputs, blocks
        self._weighted = Accumulator(features, device, needs & {"hessian"})
        self._plain = Accumulator(features, device, needs - {"hessian", "gradients"}, parts)
        sizes = [min(self._size, outputs - i * self._size) for i in range(count)]
        self._grams = [gram_for(size, device) for size in sizes]
        self._pairs = 0

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor, first: bool = True) -> None:
        """Adds a batch: inputs [..., K] and gradients [..., N], of any floating dtypes; ``first``: or another
        draw of gradients for the inputs of the call before, whose tokens count once."""
        x, g = inputs.reshape(-1, inputs.shape[-1]), gradients.reshape(-1, gradients.shape[-1])
        self._pairs += len(x)
        if first:
            self._plain.add(x)
        # 8 bits of a weight are enough; fp16 has no room for the smallest
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype
        sizes = [
            torch.linalg.vector_norm(t, dim=1, keepdim=True, dtype=torch.float32).to(wide) for t in (x, g)
        ]
        self._weighted.add(x.to(wide) * sizes[1], whole=True)
        g = g.to(wide) * sizes[0]
        for gram, part in zip(self._grams, g.split(self._size, 1), strict=True):
            gram.add_whole(part.contiguous())

    @property
    def large(self) -> list[torch.Tensor]:
        """As :attr:`Accumulator.large`."""
        return [*self._weighted.large, *(gram.total for gram in self._grams)]

    @property
    def counts(self) -> tuple[int, ...]:
        """As :attr:`Accumulator.counts`."""
        return (self._pairs, *self._weighted.counts, *self._plain.counts)

    def settle(self) -> None:
        """As :meth:`Accumulator.settle`."""
        self._weighted.settle()
        self._plain.settle()
        for gram in self._grams:
            gram.settle()

    def merge(self, later: GradientAccumulator) -> None:
        """As :meth:`Accumulator.merge`."""
        self._pairs += later._pairs
        self._weighted.merge(later._weighted)
        self._plain.merge(later._plain)
        for gram, more in zip(self._grams, later._grams, strict=True):
            gram.total += more.total

    def state(self) -> dict[str, torch.Tensor]:
        """As :meth:`Accumulator.state`."""
        held = {f"{kind} {n}": t for kind, x in self._both for n, t in x.state().items()}
        return held | {f"block {i}": gram.total for i, gram in enumerate(self._grams)}

    def restore(self, counts: Sequence[int], state: Mapping[str, torch.Tensor]) -> None:
        """As :meth:`Accumulator.restore`."""
        self._pairs = counts[0]
        for (kind, sums), count in zip(self._both, counts[1:], strict=True):
            named = {n.removeprefix(f"{kind} "): t for n, t in state.items() if n.startswith(f"{kind} ")}
            sums.restore([count], named)
        for i, gram in enumerate(self._grams):
            gram.total = state[f"block {i}"]

    @property
    def _both(self) -> tuple[tuple[str, Accumulator], ...]:
        return ("weighted", self._weighted), ("plain", self._plain)

    def finish(self) -> Statistics:
        """The statistics; the sums are handed over, not copied."""
        device = self._grams[0].total.device
        gradients = torch.zeros(len(self._grams), self._size, self._size, device=device)
        for target, gram in zip(gradients, self._grams, strict=True):
            size = len(gram.total)
            target[:size, :size] = gram.finish().mul_(1 / max(self._pairs, 1))
        self._grams.clear()
        made = self._plain.finish()
        return replace(made, hessian=self._weighted.finish().hessian, gradients=gradients)


class Gram:
    """The sum of xᵀx over batches [T, K], products as the device makes them with fp32 results."""

    def __init__(self, features: int, device: torch.device):
        self.total = torch.zeros(features, features, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Adds the lower triangle of xᵀx; blocks on the diagonal are computed whole."""
        if not fp32_products(x):
            x = x.float()
            for rows, columns in _lower(x.shape[1]):
                self.total[rows, columns].addmm_(x[:, rows].t(), x[:, columns])
            return
        for rows, columns in _lower(x.shape[1]):
            self.total[rows, columns] += torch.mm(x[:, rows].t(), x[:, columns], out_dtype=torch.float32)

    def add_whole(self, x: torch.Tensor) -> None:
        """:meth:`add` of all that there is: nothing needs to wait for more."""
        self.add(x)

    def settle(self) -> None:
        """Sums up what waits for more and lets go of what adding takes."""

    def finish(self) -> torch.Tensor:
        """fp32 [K, K], whole and symmetric; the sum is handed over."""
        total = self.total
        del self.total
        position = torch.arange(min(_SQUARE, len(total)), device=total.device)
        lower = position[:, None] >= position
        # mirrored by squares, which a cache holds: a whole transposed copy would double the peak
        for start in range(0, len(total), _SQUARE):
            rows = slice(start, start + _SQUARE)
            for left in range(0, start, _SQUARE):
                columns = slice(left, left + _SQUARE)
                total[columns, rows] = total[rows, columns].contiguous().t().contiguous()
            square = total[rows, rows]
            size = len(square)
            square.copy_(torch.where(lower[:size, :size], square, square.t()))
        return total


class Int8Gram(Gram):
    """Where 8-bit integers multiply fastest: inputs are rounded to int8 codes, whose products are summed
    exactly (see the head of this module)."""

    def __init__(self, features: int, device: torch.device):
        super().__init__(features, device)
        # made once, because fresh memory costs more than what is done in it: inputs that wait for a run to be
        # full, their codes, products of one block
        self._inputs: torch.Tensor | None = None
        self._codes: torch.Tensor | None = None
        self._filled = 0
        self._products: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, x: torch.Tensor) -> None:
        if self._inputs is None:
            self._inputs = torch.empty(_RUN, x.shape[1], dtype=x.dtype, device=x.device)
            self._largest = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
        while len(x):
            part = x[: _RUN - self._filled]
            for kept, strip in zip(
                self._inputs[self._filled :].split(_STRIP), part.split(_STRIP), strict=False
            ):
                kept[: len(strip)] = strip
                torch.maximum(self._largest, strip.abs().amax(0), out=self._largest)
            self._filled, x = self._filled + len(part), x[len(part) :]
            if self._filled == _RUN:
                self._flush()

    def add_whole(self, x: torch.Tensor) -> None:
        for run in x.split(_RUN):
            largest = run.new_zeros(run.shape[1])
            for strip in run.split(_STRIP):  # whose magnitudes stay in the cache
                torch.maximum(largest, strip.abs().amax(0), out=largest)
            self._add_run(run, largest)

    def _flush(self) -> None:
        if self._inputs is not None and self._filled:
            self._add_run(self._inputs[: self._filled], self._largest)
            self._filled = 0
            self._largest.zero_()

    def settle(self) -> None:
        self._flush()
        self._inputs = self._codes = self._products = None

    def finish(self) -> torch.Tensor:
        self.settle()
        return super().finish()

    def _add_run(self, x: torch.Tensor, largest: torch.Tensor) -> None:
        if self._codes is None or len(self._codes) < len(x):
            self._codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        codes, steps = int8_codes(x, largest, self._codes[: len(x)])
        power = torch.empty_like(steps)
        if self._products is None:
            most = max((r.stop - r.start) * (c.stop - c.start) for r, c in _lower(x.shape[1]))
            integers = torch.empty(most, dtype=torch.int32, device=x.device)
            self._products = integers, torch.empty(most, device=x.device)
        for rows, columns in _lower(x.shape[1]):
            block = self.total[rows, columns]
            sums, scaled = (buffer[: block.numel()].view(block.shape) for buffer in self._products)
            int8_products(codes[:, rows], codes[:, columns], out=sums)
            block.addcmul_(scaled.copy_(sums).mul_(steps[columns]), steps[rows, None])
            if rows.stop == columns.stop:
                power[rows] = sums.diagonal(rows.start - columns.start)
        wide = ((power > 0) & (power < _LEAST**2 * len(x))).nonzero().squeeze(1)
        if len(wide):
            left = x[:, wide].float() - codes[:, wide] * steps[wide]
            rest, small = int8_codes(left, largest_magnitude(left, 0))
            across = int8_products(rest, codes).float().mul_(steps).mul_(small[:, None])  # [wide, K]
            among = int8_products(rest, rest).float().mul_(small).mul_(small[:, None])
            self.total[wide] += across  # what lands above the diagonal is of no account
            self.total[:, wide] += across.t()
            self.total[wide[:, None], wide] += among


def int8_products(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``leftᵀ @ right`` of int8 [T, M] and [T, N], exact: int32 [M, N], put into ``out`` where it is
    given."""
    if left.shape[1] == 1:  # torch 2.13 returns what was in the memory before for a product of one row
        row = torch._int_mm(left.repeat(1, 2).t(), right)[:1]
        return row if out is None else out.copy_(row)
    return torch._int_mm(left.t(), right) if out is None else torch._int_mm(left.t(), right, out=out)


def int8_codes(
    x: torch.Tensor, largest: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [T, K], of any floating dtype, in whole steps of each feature's own: int8 codes [T, K] from -127
    to 127 (``out``, where it is given), and the steps, fp32 [K]: 0 of a feature that is always zero, NaN or
    infinite of one that ever is. ``largest`` [K]: each feature's largest magnitude."""
    if x.dtype == torch.float16:
        x = x.float()  # whose exponents do not reach far enough for small steps
    largest = largest.float()
    inverse = (_TOP / largest).clamp_(max=torch.finfo(x.dtype).max).to(x.dtype)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device) if out is None else out
    for part, rounded in zip(x.split(_STRIP), codes.split(_STRIP), strict=True):
        rounded.copy_((part * inverse).round_())
    return codes, torch.where(largest > 0, 1 / inverse.float(), largest)


def gram_for(features: int, device: torch.device) -> Gram:
    """The way to sum xᵀx on a device."""
    if device.type == "cpu" and torch.cpu._is_vnni_supported():
        return Int8Gram(features, device)
    return Gram(features, device)


def _lower(size: int) -> Iterable[tuple[slice, slice]]:
    """Rows and columns of blocks that cover the lower triangle of a square matrix, and little above it."""
    for top in range(0, size, _PANEL):
        bottom = min(top + _PANEL, size)
        for left in range(0, top, _PANEL):
            yield slice(top, bottom), slice(left, left + _PANEL)
        for start in range(top, bottom, _SMALL):
            end = min(start + _SMALL, bottom)
            middle = min(start + _SMALL // 2, end)
            if start > top:
                yield slice(start, end), slice(top, start)
            yield slice(start, middle), slice(start, middle)
            if middle < end:
                yield slice(middle, end), slice(start, end)
