"""Experts of a layer whose quantized tensors are stacked: what a format calls the parts of a linear ``P``,
with one more dimension in front.

Programs that hold the experts of a layer as one parameter ``Q`` [E, N, K] quantize it as such, and name the
parts ``Q_packed``, ``Q_scale``, ``Q_zero_point`` … (an underscore, because ``Q`` is a parameter), or
``Q.weight_packed``, ``Q.weight_scale`` … where ``Q`` is a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from quant.checkpoint.header import TensorInfo
from quant.errors import CheckpointError
from quant.formats.base import Format, Stack, StackPart
from quant.formats.scaled import ordinary_name
from quant.schemes import BLOCK
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    from quant.checkpoint.reader import Checkpoint

#: Header dtypes of codes.
_CODES = ("I32", "U8", "I8", "F8_E4M3")


def stacked_linears(
    form: Format,
    tensors: Mapping[str, TensorInfo],
    linear_of: Callable[[str, Mapping[str, TensorInfo]], Linear],
) -> dict[str, Stack]:
    """Stacks by the names that they have in an ordinary file.

    Args:
        linear_of: reads one expert's linear from the headers of its parts, which have the format's own names.

    Raises:
        CheckpointError: parts that contradict each other.
    """
    found: dict[str, Stack] = {}
    for name, info in tensors.items():
        if len(info.shape) != 3 or info.dtype not in _CODES:
            continue
        stem, parts = _parts(form, name, tensors)
        if stem is None:
            continue
        own = {f"{stem}.{last}": i for last, i in parts.items()}
        uneven = next((i for i in own.values() if i.shape[:1] not in ((info.shape[0],), (), (1,))), None)
        if uneven is not None:
            raise CheckpointError(
                f"{uneven.name} is {uneven.dtype} {uneven.shape} beside {name} {info.shape}: one for each of "
                f"{info.shape[0]} experts is needed"
            )
        each = {
            n: replace(i, name=n, shape=i.shape[1:])
            for n, i in own.items()
            if form.parts[_last(n)] != "shape"
        }
        linear = linear_of(stem, each)
        sides = _sides(linear)
        whole = ordinary_name(stem if name.startswith(f"{stem}_") or name == stem else f"{stem}.weight")
        found[whole] = Stack(
            whole,
            (info.shape[0], linear.n, linear.k),
            linear.weights,
            tuple(i.name for i in parts.values()),
            sides,
            partial(_expert, form, linear, {n: own[n].name for n in each}),
            linear.activations,
        )
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _parts(
    form: Format, name: str, tensors: Mapping[str, TensorInfo]
) -> tuple[str | None, dict[str, TensorInfo]]:
    """The stem of a stack's codes, and the tensors that it is made of by the last part of the format's names;
    no stem of other tensors."""
    for last in form.lasts("codes"):
        short = last.removeprefix("weight")  # _packed, or nothing where the codes are the weight itself
        for end, joint in ((f".{last}", "."), (short, "_")):
            if not name.endswith(end):
                continue
            stem = name.removesuffix(end) if end else name
            spelled = {
                p: f"{stem}.{p}"
                if joint == "."
                else f"{stem}{p.removeprefix('weight')}"
                if p.startswith("weight")
                else f"{stem}_{p}"
                for p in form.parts
            }
            parts = {p: tensors[n] for p, n in spelled.items() if n in tensors}
            if any(form.parts[p] == "scales" for p in parts):
                return stem, parts
    return None, {}


def _sides(linear: Linear) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    weights = linear.weights
    if weights.strategy == "tensor":
        return linear.n, linear.k
    if weights.strategy == "block":
        return BLOCK, BLOCK
    return 1, linear.k if weights.group_size == -1 else weights.group_size


def _expert(
    form: Format, linear: Linear, names: Mapping[str, str], checkpoint: Checkpoint, expert: int
) -> StackPart:
    """One expert of a stack, read as the format reads a linear."""
    tensors = {}
    for own, stored in names.items():
        several = checkpoint.info(stored).shape[:1] not in ((), (1,))
        tensors[own] = checkpoint.read_index(stored, expert) if several else checkpoint.read(stored)
    tensor = form.unpack(linear, tensors, {})
    if tensor.group_index is not None:
        raise CheckpointError(
            f"{linear.name}: groups in activation order are not read of experts in one tensor: start from "
            "the original"
        )
    numbers = tensor.inputs
    inputs = None
    if numbers is not None:
        inputs = numbers.global_scale if numbers.scale is None else numbers.scale
    return StackPart(tensor.codes, tensor.scales, _sides(linear), tensor.global_scale, inputs, tensor.zeros)
