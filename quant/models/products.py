"""Products with bf16 matrices, on any CPU.

torch hands bf16 products to oneDNN where that has instructions for them (AVX-512, AMX, those of ARM). Where
it has not, as on a CPU of AVX2 alone, its own loop takes some six times as long as fp32 products do with all
that it costs to make the operands fp32 ones. There they are widened, which is exact, a piece at a time;
sums are of fp32 and rounded to bf16 once, as every library rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

#: Rows from which on widening a matrix pays.
_LEAST = 8
#: Elements of what is widened at a time: small enough for a heap's pages to be used again.
_PIECE = 1 << 21
#: Inputs of a product from which on it is summed a piece of them at a time: more than any linear of a block
#: has, but what comes back through a head has as many as there are tokens in its vocabulary.
_WIDE = 1 << 16


@cache
def bf16_is_slow() -> bool:
    """Whether this machine's CPU multiplies fp32 matrices much faster than bf16 ones: part of what decides a
    job's bytes."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and not supported()


def is_widened(x: torch.Tensor) -> bool:
    """Whether products with ``x`` are made in fp32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and bf16_is_slow()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[…, N] of x […, K] and a weight [N, K], with a bias [N] where there is one: what
    ``torch.nn.functional.linear`` returns, and as autograd follows it."""
    rows = x.numel() // max(x.shape[-1], 1)
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    # few rows, too, take torch's own loop a hundred times as long on the way back
    if not is_widened(x) or weight.dtype != x.dtype or (rows < _LEAST and not recorded):
        return nn.functional.linear(x, weight, bias)
    if recorded:
        made = _Widened.apply(x, weight)
        return made if bias is None else made + bias
    return _widened(x, weight, bias)


def _widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """bf16 […, N] of x […, K] and a weight [N, K], whichever way they lie in memory."""
    if x.shape[-1] > _WIDE:
        made = _summed(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
        return (made if bias is None else made + bias.float()).to(x.dtype)
    # no view, or autograd would lose what is known of it once it is changed in place
    result = x.new_empty(*x.shape[:-1], len(weight))
    flat, made = x.reshape(-1, x.shape[-1]), result.view(-1, len(weight))
    height = max(1, _PIECE // max(x.shape[-1], 1))
    width = max(1, _PIECE // max(x.shape[-1], min(height, len(weight)), 1))
    for start in range(0, len(weight), height):
        outputs = slice(start, start + height)
        part = weight[outputs].float()
        added = None if bias is None else bias[outputs].float()
        for first in range(0, len(flat), width):
            rows = slice(first, first + width)
            made[rows, outputs] = nn.functional.linear(flat[rows].float(), part, added)
    return result


def _summed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """fp32 [R, N] of bf16 x [R, K] and a weight [N, K] of many inputs."""
    made = torch.zeros(len(x), len(weight), device=x.device)
    several = max(1, _PIECE // max(len(x), len(weight)))
    for first in range(0, x.shape[-1], several):
        columns = slice(first, first + several)
        made.addmm_(x[:, columns].float(), weight[:, columns].float().t())
    return made


class _Widened(torch.autograd.Function):
    """:func:`_widened`, which keeps its operands as they are for the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _widened(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (x, weight), gradient = ctx.saved_tensors, gradients[0]
        wanted, trained = ctx.needs_input_grad
        return (
            _widened(gradient, weight.t()) if wanted else None,
            _widened(gradient.flatten(0, -2).t(), x.flatten(0, -2).t()) if trained else None,
        )


@contextmanager
def linears_widened(block: nn.Module) -> Iterator[None]:
    """While it lasts, the plain linears of a block multiply through :func:`linear`. Where bf16 is as fast as
    fp32, nothing happens."""
    restore: list[Callable[[], None]] = []
    try:
        if bf16_is_slow():
            for module in block.modules():
                if type(module) is nn.Linear and "forward" not in module.__dict__:
                    module.forward = partial(_forward, module)  # type: ignore[method-assign]
                    restore.append(partial(module.__dict__.pop, "forward", None))
        yield
    finally:
        for back in restore:
            back()


def _forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)
