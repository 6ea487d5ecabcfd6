"""What a method may ask about a linear's input, gathered once for all linears that share it.

The Hessian of the layer's squared error is H = Σ x xᵀ over all calibration tokens, K × K. It is the largest single piece of arithmetic
after the forward passes, so how it is summed is decided by the hardware:

- CUDA: 16-bit products with fp32 results, from the tensor cores.
- A CPU with AMX: bf16 products with fp32 results (oneDNN's bf16 mode of fp32 products; inputs are bf16 numbers, so nothing is lost).
- A CPU with AVX512-BF16 alone: there torch's only fast product of bf16 numbers rounds each result to bf16. Rounding H itself would be as large
  as the damping: activations have a few directions a hundred times stronger than the rest, and every element carries a share of them. So
  those directions are split off first, x = V z + y with V and z of bf16 numbers too: whatever z is, y takes the rest. zᵀz is summed in fp32
  (cheap: V has few columns), and only zᵀy and yᵀy, whose elements are small, go through bf16 products, in short runs of tokens whose independent
  roundings are added up in fp32.
- Any other CPU: fp32.

``benchmarks/hessian_precision.py`` compares each way's error with the damping, and their KL. Only the lower triangle is
computed, in panels, and mirrored at the end: about half of the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

#: What may be asked for.
STATISTICS = frozenset({"hessian", "range", "sample"})
_PANEL = 512
#: Most tokens of a sample.
_SAMPLE = 512
#: Directions that :class:`SplitGram` splits off, and tokens of one bf16 product of the rest with itself and with them.
_DIRECTIONS, _RUN, _CROSS_RUN = 32, 1024, 256


@dataclass(frozen=True)
class Statistics:
    """Of one input of K features: what was asked for, and how many tokens it saw.

    Attributes:
        tokens: rows of x.
        hessian: fp32 [K, K], mean of x xᵀ; or None.
        minimum, maximum: fp32 [K], the range of each feature; or None.
        sample: fp32 [≤ 512, K], inputs of tokens at even distances; or None.
    """

    tokens: int
    hessian: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    maximum: torch.Tensor | None = None
    sample: torch.Tensor | None = None

    @property
    def abs_max(self) -> torch.Tensor:
        """fp32 [K], largest |x|; the range must have been asked for."""
        assert self.minimum is not None and self.maximum is not None
        return torch.maximum(-self.minimum, self.maximum)

    @property
    def spread(self) -> float:
        """Root mean square of the largest feature over that of the median one; 1 where it is not known or most are zero."""
        if self.hessian is None:
            return 1.0
        power = self.hessian.diagonal()
        median = float(power.median())
        return math.sqrt(float(power.max()) / median) if median > 0 else 1.0

    @property
    def finite(self) -> bool:
        """Whether no token's input held NaN or infinity: any of them stays in every sum and range (a sample may have passed it by)."""
        given = [None if self.hessian is None else self.hessian.diagonal(), self.minimum, self.maximum, self.sample]
        return all(bool(torch.isfinite(x).all()) for x in given if x is not None)

    def copy(self) -> Statistics:
        """With a Hessian of its own: methods overwrite theirs."""
        return replace(self, hessian=None if self.hessian is None else self.hessian.clone())

    def divided(self, factors: torch.Tensor) -> Statistics:
        """The statistics that x / factors has: what a method must see after scaling was moved into the weights.

        ``factors``: fp32 [K], positive. The Hessian is divided in place.
        """
        if self.hessian is not None:
            self.hessian.div_(factors).div_(factors.unsqueeze(-1))
        low, high, sample = (None if x is None else x / factors for x in (self.minimum, self.maximum, self.sample))
        return replace(self, minimum=low, maximum=high, sample=sample)


class Accumulator:
    """Sums the statistics named in ``needs`` (``hessian``, ``range``, ``sample``) batch by batch, on the device of the batches."""

    def __init__(self, features: int, device: torch.device, needs: Iterable[str]):
        needs = set(needs)
        if unknown := needs - STATISTICS:
            raise ValueError(f"no such statistic: {', '.join(sorted(unknown))}")
        self.tokens = 0
        self._gram = gram_for(features, device) if "hessian" in needs else None
        self._range = (torch.zeros(features, device=device), torch.zeros(features, device=device)) if "range" in needs else None
        self._sample = torch.zeros(0, features, device=device) if "sample" in needs else None
        self._stride = 1

    def add(self, inputs: torch.Tensor) -> None:
        """Adds a batch [..., K] of any floating dtype."""
        x = inputs.reshape(-1, inputs.shape[-1])
        if self._sample is not None:
            self._sample = torch.cat([self._sample, x[-self.tokens % self._stride :: self._stride].float()])
            while len(self._sample) > _SAMPLE:  # rows are stride tokens apart, from the first on: every other one stays
                self._sample, self._stride = self._sample[::2].clone(), self._stride * 2
        self.tokens += len(x)
        if self._range is not None:
            low, high = self._range
            self._range = (torch.minimum(low, x.amin(0).float()), torch.maximum(high, x.amax(0).float()))
        if self._gram is not None:
            self._gram.add(x)

    def finish(self) -> Statistics:
        """The statistics; the sums are handed over, not copied."""
        gram, self._gram = self._gram, None
        hessian = None if gram is None else gram.finish().mul_(1 / max(self.tokens, 1))
        low, high = self._range or (None, None)
        return Statistics(self.tokens, hessian, low, high, self._sample)


class Gram:
    """The sum of xᵀx over batches [T, K], products as the device makes them with fp32 results."""

    def __init__(self, features: int, device: torch.device):
        self.total = torch.zeros(features, features, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Adds the lower triangle of xᵀx; blocks on the diagonal are computed whole."""
        options: dict[str, Any] = {"out_dtype": torch.float32} if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else {}
        if not options:
            x = x.float()
        for start, rows in _panels(self.total):
            rows += torch.mm(x[:, start : start + len(rows)].t(), x[:, : rows.shape[1]], **options)

    def finish(self) -> torch.Tensor:
        """fp32 [K, K], whole and symmetric; the sum is handed over."""
        total = self.total
        del self.total
        for start in range(0, len(total), _PANEL):  # mirror by panels: a whole transposed copy would double the peak
            end = start + _PANEL
            total[:start, start:end] = total[start:end, :start].t()
            square = total[start:end, start:end]
            square.copy_(square.tril() + square.tril(-1).t())
        return total


class AmxGram(Gram):
    """On AMX: the same, with oneDNN told that fp32 factors may be read as bf16, which bf16 inputs are already."""

    def add(self, x: torch.Tensor) -> None:
        if x.dtype != torch.bfloat16:
            super().add(x)
            return
        setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = setting.fp32_precision
        setting.fp32_precision = "bf16"
        try:
            super().add(x)
        finally:
            setting.fp32_precision = before


class SplitGram(Gram):
    """Where bf16 products come back rounded to bf16: strong directions in fp32, the rest in bf16 (see the head of this module)."""

    def __init__(self, features: int, device: torch.device):
        super().__init__(features, device)
        self.directions: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        if x.dtype != torch.bfloat16:
            super().add(x)
            return
        if self.directions is None:
            self.directions = strong_directions(x, min(_DIRECTIONS, x.shape[1] // 4)).bfloat16()
            count = self.directions.shape[1]
            self.strong, self.cross = torch.zeros(count, count), torch.zeros(count, x.shape[1])
        for run in x.split(_RUN):
            z = run @ self.directions
            weak = torch.addmm(run, z, self.directions.t(), alpha=-1)  # summed in fp32, rounded once
            self.strong += z.float().t() @ z.float()
            for part, rest in zip(z.split(_CROSS_RUN), weak.split(_CROSS_RUN), strict=True):
                self.cross += part.t() @ rest
            for start, rows in _panels(self.total):
                rows += weak[:, start : start + len(rows)].t() @ weak[:, : rows.shape[1]]

    def finish(self) -> torch.Tensor:
        if self.directions is not None:  # before the mirroring, so that the sum is symmetric to the bit
            v, cross = self.directions.float(), self.cross
            self.total.addmm_(v, cross + self.strong @ (v.t() / 2)).addmm_((cross + self.strong @ (v.t() / 2)).t(), v.t())
        return super().finish()


def strong_directions(x: torch.Tensor, count: int) -> torch.Tensor:
    """fp32 [K, count], orthonormal: the leading right singular directions of x [T, K], roughly (subspace iteration, own generator)."""
    wide = x.float()
    guess = torch.randn(x.shape[1], count, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        guess = torch.linalg.qr(wide.t() @ (wide @ guess)).Q
    return guess


def gram_for(features: int, device: torch.device) -> Gram:
    """The way to sum xᵀx on a device."""
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return AmxGram(features, device)
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() and features >= 4 * _DIRECTIONS:
        return SplitGram(features, device)
    return Gram(features, device)


def _panels(total: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
    for start in range(0, len(total), _PANEL):
        end = min(start + _PANEL, len(total))
        yield start, total[start:end, :end]
