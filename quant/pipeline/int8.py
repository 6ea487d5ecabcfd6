"""A quantized linear's pass over calibration tokens in products of 8-bit integers, on a CPU that makes them
twice as fast as 16-bit ones.

Tokens and outputs are rounded to steps of their own range, and the few features whose range is far beyond the
others' are multiplied in 16 bits, as in Dettmers et al. 2022 (LLM.int8(), arXiv:2208.07339). So are tokens
and outputs whose values are spread so far that 8 bits would not do. What is left is off by about 1 %, a tenth
of what rounding weights to 4 bits does. Only later layers' statistics see it: what is written is made from
the weights themselves. ``benchmarks/hessian_precision.py`` measures what it does to KL.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from quant.models.adapter import InputGroup

#: Largest magnitude, in root mean squares of the token or output that it is a part of, which is still
#: rounded: by 3.6 % of the whole then.
_REACH = 16.0
#: A feature whose largest magnitude is so many times the median one's is multiplied in 16 bits, the largest
#: 1/16 of all at the most.
_WIDE, _MOST = 4.0, 16
#: Share of the tokens that may be multiplied in 16 bits besides; if more would be, all are.
_FEW = 0.25
#: Elements that are turned into codes at a time, so that they stay in the cache.
_STRIP = 1 << 18


def int8_passes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of 8-bit integers are what makes passes in ``dtype`` fast: on a CPU with VNNI whose
    16-bit products are not AMX's."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_vnni_supported() and not torch.cpu._is_amx_tile_supported() and _exact()


@functools.cache
def _exact() -> bool:
    """Whether this torch has the product, which it calls an internal one, in the form that is used here, and
    the product is exact."""
    codes = (
        torch.arange(256, dtype=torch.int32)
        .repeat(8, 1)
        .add_(torch.arange(8, dtype=torch.int32)[:, None] * 37)
        .remainder_(256)
    )
    weight = (codes * 7 + 3).remainder_(255).sub_(127)
    steps = torch.full((8,), 0.5)
    try:
        found = _product(
            codes.to(torch.uint8),
            torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), None),
            steps,
            torch.zeros(8, dtype=torch.int32),
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, (((codes - 128).double() @ weight.double().t()) * 0.5).to(torch.bfloat16))


def _product(
    codes: torch.Tensor, packed: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """bf16 [T, N] of codes uint8 [T, K] around 128 and a packed weight of N outputs with fp32 steps [N]."""
    result: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 128, packed, steps, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )
    return result


@dataclass(frozen=True)
class Codes:
    """Inputs [T, K] as 8-bit numbers.

    Attributes:
        codes: uint8 [T, K], 128 for zero; wide features are zero.
        steps: bf16 [T, 1].
        wide: int64 [W], features that are multiplied in 16 bits.
        spread: int64 [R], tokens that are.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    wide: torch.Tensor
    spread: torch.Tensor


def encode(x: torch.Tensor) -> Codes:
    """Codes of inputs bf16 [T, K]; the step of a token that holds NaN or infinity does too."""
    tokens, features = x.shape
    rows = max(1, _STRIP // features)
    largest = torch.zeros(features, dtype=x.dtype)
    for part in x.split(rows):
        torch.maximum(largest, part.abs().amax(0), out=largest)
    wide = (largest > _WIDE * largest.median()).nonzero().squeeze(1)
    if len(wide) > features // _MOST:
        wide = largest.topk(features // _MOST).indices
    codes = torch.empty(tokens, features, dtype=torch.uint8)
    steps, far = torch.empty(tokens, 1, dtype=x.dtype), torch.empty(tokens, 1, dtype=torch.bool)
    for part, *out in zip(x.split(rows), codes.split(rows), steps.split(rows), far.split(rows), strict=True):
        values = part.to(torch.float32, copy=True)
        values[:, wide] = 0
        rounded, *found = out
        rounded.copy_(_in_steps(values, *found).add_(128.5))  # whose fraction is cut off
    return Codes(codes, steps, wide, far.squeeze(1).nonzero().squeeze(1))


def _in_steps(values: torch.Tensor, steps: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    """Divides each row of fp32 ``values`` [R, K], in place, by a step of its own that takes it from -127 to
    127; writes the steps to ``steps`` [R, 1], as numbers that its dtype has, and to ``far`` [R, 1] which rows
    reach too far for that."""
    top = values.abs().amax(1, keepdim=True)
    torch.gt(
        top,
        torch.linalg.vector_norm(values, dim=1, keepdim=True) * (_REACH / math.sqrt(values.shape[1])),
        out=far,
    )
    steps.copy_(top / 126)  # not 127: in 16 bits it may be rounded down
    return values.mul_(torch.where(steps > 0, 1 / steps.float(), 0))


class Int8Linear:
    """The forward of a linear; to be called with inputs bf16 [..., K]. The linear's weight must stay as it
    is."""

    def __init__(self, module: nn.Linear, shared: SharedCodes):
        weight = module.weight
        self._module, self._shared = module, shared
        n, k = weight.shape
        rows = max(1, _STRIP // k)
        codes = torch.empty(n, k, dtype=torch.int8)
        steps, far = torch.empty(n, 1), torch.empty(n, 1, dtype=torch.bool)
        for part, *out in zip(
            weight.split(rows), codes.split(rows), steps.split(rows), far.split(rows), strict=True
        ):
            rounded, *found = out
            rounded.copy_(_in_steps(part.to(torch.float32, copy=True), *found).round_())
        self._steps, self._zeros = steps.squeeze(1), torch.zeros(n, dtype=torch.int32)
        self._far = far.squeeze(1).nonzero().squeeze(1)
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        weight, bias = self._module.weight, self._module.bias
        x = inputs.reshape(-1, inputs.shape[-1])
        if (
            inputs.dtype != torch.bfloat16
            or len(self._far) > _FEW * len(weight)
            or len((of := self._shared(inputs)).spread) > _FEW * len(x)
        ):
            return nn.functional.linear(inputs, weight, bias)
        outputs = _product(of.codes, self._packed, self._steps, self._zeros)
        outputs *= of.steps
        if len(of.wide):
            outputs.addmm_(x[:, of.wide], weight[:, of.wide].t())
        if len(self._far):
            outputs[:, self._far] = x @ weight[self._far].t()
        if len(of.spread):
            outputs[of.spread] = x[of.spread] @ weight.t()
        if bias is not None:
            outputs += bias
        return outputs.view(*inputs.shape[:-1], -1)


class SharedCodes:
    """Codes of the inputs that were asked for last: linears that share their inputs ask for them one after
    the other."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[torch.Tensor], Codes] | None = None

    def __call__(self, inputs: torch.Tensor) -> Codes:
        if self._last is None or self._last[0]() is not inputs:
            self._last = weakref.ref(inputs), encode(inputs.reshape(-1, inputs.shape[-1]))
        return self._last[1]


def int8_linears(block: nn.Module, group: InputGroup) -> dict[str, Int8Linear]:
    """Forwards for the linears of a group as their weights are now, by name; none where :func:`int8_passes`
    says no."""
    shared = SharedCodes()
    modules = {name: block.get_submodule(name) for name in group.linears}
    return {
        name: Int8Linear(module, shared)
        for name, module in modules.items()
        if type(module) is nn.Linear and int8_passes(module.weight.device, module.weight.dtype)
    }


@contextmanager
def in_int8(block: nn.Module, groups: Sequence[InputGroup]) -> Iterator[None]:
    """While it lasts, the linears of these groups are computed as :class:`Int8Linear` does."""
    forwards = {name: forward for group in groups for name, forward in int8_linears(block, group).items()}
    before = {name: block.get_submodule(name).forward for name in forwards}
    for name, forward in forwards.items():
        block.get_submodule(name).forward = forward
    try:
        yield
    finally:
        for name, original in before.items():
            block.get_submodule(name).forward = original
