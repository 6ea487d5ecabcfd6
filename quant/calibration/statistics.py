"""What a method may ask about a linear's input, gathered once for all linears that share it.

The Hessian of the layer's squared error is H = Σ x xᵀ over all calibration tokens, K × K. It is the largest single piece of arithmetic
after the forward passes, so how it is summed is decided by the hardware:

- CUDA: 16-bit products with fp32 results, from the tensor cores.
- A CPU with bf16 instructions (AVX512-BF16, AMX): the product of one batch of tokens runs in bf16. Each element is summed in fp32 inside
  the product, rounded once to bf16 when it leaves it (torch offers no other output), and added to the fp32 total. The rounding is unbiased
  and independent from batch to batch; ``benchmarks/hessian_precision.py`` shows that it does not move KL.
- Any other CPU: fp32.

Only the lower triangle is computed, in panels, and mirrored at the end: about half of the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

_PANEL = 512


@dataclass(frozen=True)
class Statistics:
    """Of one input of K features: what was asked for, and how many tokens it saw.

    Attributes:
        tokens: rows of x.
        hessian: fp32 [K, K], mean of x xᵀ; or None.
        abs_max: fp32 [K], largest |x|; or None.
    """

    tokens: int
    hessian: torch.Tensor | None = None
    abs_max: torch.Tensor | None = None


def bf16_products() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Accumulator:
    """Sums the statistics named in ``needs`` (``hessian``, ``abs_max``) batch by batch, on the device of the batches."""

    def __init__(self, features: int, device: torch.device, needs: Iterable[str]):
        needs = set(needs)
        if unknown := needs - {"hessian", "abs_max"}:
            raise ValueError(f"no such statistic: {', '.join(sorted(unknown))}")
        self.tokens = 0
        self._hessian = torch.zeros(features, features, device=device) if "hessian" in needs else None
        self._abs_max = torch.zeros(features, device=device) if "abs_max" in needs else None

    def add(self, inputs: torch.Tensor) -> None:
        """Adds a batch [..., K] of any floating dtype."""
        x = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(x)
        if self._abs_max is not None:
            self._abs_max = torch.maximum(self._abs_max, torch.maximum(x.amax(0), -x.amin(0)).float())
        if self._hessian is not None:
            add_gram(self._hessian, x)

    def finish(self) -> Statistics:
        """The statistics; the sums are handed over, not copied."""
        hessian, self._hessian = self._hessian, None
        if hessian is not None:
            hessian.mul_(1 / max(self.tokens, 1))
            for start in range(0, len(hessian), _PANEL):  # mirror by panels: a whole transposed copy would double the peak
                end = start + _PANEL
                hessian[:start, start:end] = hessian[start:end, :start].t()
                square = hessian[start:end, start:end]
                square.copy_(square.tril() + square.tril(-1).t())
        return Statistics(self.tokens, hessian, self._abs_max)


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """Adds the lower triangle of xᵀx to fp32 ``total`` [K, K]; x is [T, K]. Blocks on the diagonal are computed whole."""
    options: dict[str, Any] = {"out_dtype": torch.float32} if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else {}
    if not x.is_cuda and not (x.dtype == torch.bfloat16 and bf16_products()):
        x = x.float()
    for start, rows in _panels(total):
        rows += torch.mm(x[:, start : start + len(rows)].t(), x[:, : rows.shape[1]], **options)


def _panels(total: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
    for start in range(0, len(total), _PANEL):
        end = min(start + _PANEL, len(total))
        yield start, total[start:end, :end]
