"""Weights stored as FP8 codes beside multipliers, in every spelling: what the multipliers of one are called,
how they lie, and how codes and multipliers make values.

A matrix ``P`` [N, K] is ``P.weight`` with one multiplier a tensor, an output, a block, or 32 inputs. Names
and dtypes differ by who wrote the file: ``weight_scale_inv`` (DeepSeek, Qwen; a multiplier in spite of its
name), ``weight_scale`` (AutoFP8, ModelOpt, FBGEMM, compressed-tensors), ``scale`` (DeepSeek's own files);
fp32, bf16, or powers of two as E8M0. Experts of a layer that are stored as one tensor ``Q`` [E, …] have
theirs as ``Q_scale_inv``, ``Q_scale`` or ``Q_weight_scale`` (transformers 5
`integrations/finegrained_fp8.py`, `fbgemm_fp8.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from quant.checkpoint.header import TensorInfo
from quant.errors import CheckpointError
from quant.formats.base import IncompleteCheckpoint, Stack, suffixed
from quant.schemes import BLOCK, PRESETS, ActivationScheme, WeightScheme

if TYPE_CHECKING:
    import torch

    from quant.checkpoint.reader import Checkpoint

#: Last parts of a multiplier's name, and of the number of a static activation's.
SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale")
INPUT_SCALES = ("input_scale", "activation_scale")
#: What follows the name of a tensor of all experts.
_STACK_SCALES = ("_scale_inv", "_weight_scale_inv", "_scale", "_weight_scale")
#: Header dtypes of a multiplier; each widens to fp32 exactly.
MULTIPLIERS = ("F32", "BF16", "F16", "F8_E8M0")

TENSOR, BLOCKS = PRESETS["w8a8-fp8-tensor"].weights, PRESETS["fp8-block"].weights
CHANNEL, MX = PRESETS["w8a8-fp8"].weights, PRESETS["mxfp8"].weights
#: Inputs that are divided by one number of the file.
STATIC = ActivationScheme(8, "float", "tensor", dynamic=False)


@dataclass(frozen=True)
class Scaled:
    """An FP8 matrix of a file: its numbers, and what its multiplier is called there."""

    name: str
    n: int
    k: int
    weights: WeightScheme
    scale: str


def spelled(tensors: Collection[str], name: str, lasts: Iterable[str]) -> str | None:
    """The tensor ``<name>.<last>`` that is there, of several spellings; None where none is."""
    return next((f"{name}.{last}" for last in lasts if f"{name}.{last}" in tensors), None)


def scaled_matrices(
    tensors: Mapping[str, TensorInfo], wanted: str, block: tuple[int, int] | None = None
) -> list[Scaled]:
    """The FP8 matrices of a file, by name.

    Args:
        wanted: last part of the multiplier's name in the format's own words, for the message where none is.
        block: rows and columns that share a multiplier where the config states them; None: shapes tell.

    Raises:
        IncompleteCheckpoint: one has no multiplier.
        CheckpointError: a multiplier of another shape or dtype than the weight's.
    """
    coded = [n for n in suffixed(tensors, ".weight") if tensors[f"{n}.weight"].dtype == "F8_E4M3"]
    missing = [(n, wanted) for n in coded if spelled(tensors, n, SCALES) is None]
    if missing:
        raise IncompleteCheckpoint(missing)
    matrices = []
    for name in coded:
        weight = tensors[f"{name}.weight"]
        if len(weight.shape) != 2:
            raise CheckpointError(f"{name}: weight is {weight.shape}: read are [N, K]")
        n, k = weight.shape
        scale = tensors[spelled(tensors, name, SCALES) or ""]
        matrices.append(Scaled(name, n, k, weights_of(scale, n, k, block), scale.name))
    return matrices


def weights_of(scale: TensorInfo, n: int, k: int, block: tuple[int, int] | None) -> WeightScheme:
    """The numbers of an FP8 weight [N, K], told from its multiplier's header.

    Raises:
        CheckpointError: it fits no way of sharing multipliers.
    """
    shape = tuple(scale.shape)
    if len(shape) == 4 and shape[1] == shape[3] == 1:  # ModelOpt keeps the sides of its blocks
        shape = (shape[0], shape[2])
    if block is not None:
        fits = shape == (ceil(n / block[0]), ceil(k / block[1])) and scale.dtype in MULTIPLIERS
        if not fits:
            raise _unfitting(scale, n, k, (ceil(n / block[0]), ceil(k / block[1])))
        return BLOCKS if block == (BLOCK, BLOCK) else WeightScheme(8, block[1], True, "float", "group", "F32")
    if scale.dtype in ("U8", "F8_E8M0") and shape == (n, ceil(k / 32)) and k % 32 == 0:
        return MX
    if scale.dtype in MULTIPLIERS:
        if shape in ((), (1,), (1, 1)):
            return TENSOR
        if shape in ((n,), (n, 1)):
            return CHANNEL
        if len(scale.shape) == 4 and shape == BLOCKS.scale_shape(n, k):
            return BLOCKS
    raise _unfitting(scale, n, k, (1,))


def _unfitting(scale: TensorInfo, n: int, k: int, wanted: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{scale.name} is {scale.dtype} {scale.shape}, the contract for a weight {(n, k)} "
        f"is {' or '.join(MULTIPLIERS)} {wanted}"
    )


def multipliers(
    stored: torch.Tensor, scheme: WeightScheme, n: int, k: int, rows: int = BLOCK
) -> torch.Tensor:
    """Multipliers as :class:`quant.tensors.QuantizedTensor` has them, from those of a file.

    Args:
        stored: in any of the shapes that :func:`weights_of` takes.
        rows: that share one, of blocks of another size than 128 × 128.
    """
    import torch

    if scheme == MX:
        return stored.reshape(n, k // 32).view(torch.uint8)
    values = stored.float()
    if scheme.strategy == "group":  # blocks of another size: each row gets its own multipliers
        return values.reshape(ceil(n / rows), -1).repeat_interleave(rows, 0)[:n].contiguous()
    return values.reshape(scheme.scale_shape(n, k))


def stacks(tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None = None) -> dict[str, Stack]:
    """Experts that are stored as one FP8 tensor [E, rows, columns], as the family's ordinary files have them;
    ``block`` as in :func:`scaled_matrices`.

    Raises:
        CheckpointError: multipliers that fit no way of sharing them.
    """
    stacked = {}
    for name, info in tensors.items():
        if info.dtype != "F8_E4M3" or len(info.shape) != 3:
            continue
        scale = next((tensors[name + end] for end in _STACK_SCALES if name + end in tensors), None)
        if scale is None:
            raise CheckpointError(
                f"{name} is {info.dtype} {info.shape}, and none of its multipliers "
                f"({', '.join(name + end for end in _STACK_SCALES)}) is there: the checkpoint is incomplete, "
                "fetch its files again"
            )
        experts, rows, columns = info.shape
        sides = (_sides(scale.shape, info.shape, block)) if scale.dtype in MULTIPLIERS else None
        if sides is None:
            raise CheckpointError(
                f"{scale.name} is {scale.dtype} {scale.shape}: for {name} {info.shape} it is one of "
                f"{' or '.join(MULTIPLIERS)} an expert, an output or a block"
            )
        weights = TENSOR if sides == (rows, columns) else BLOCKS if min(sides) > 1 else CHANNEL
        own = [
            name + end
            for end in (*_STACK_SCALES, "_activation_scale", "_input_scale")
            if name + end in tensors
        ]
        stacked[name] = Stack(
            name,
            (experts, rows, columns),
            weights,
            (name, *own),
            partial(_expert, name, scale.name, sides),
        )
    return stacked


def _sides(
    scale: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of an expert that share a multiplier; None where the shapes do not fit."""
    experts, rows, columns = weight
    if scale in ((experts,), (experts, 1), (experts, 1, 1)):
        return rows, columns
    if scale == (experts, 1, columns):
        return rows, 1
    if scale in ((experts, rows, 1), (experts, rows)):
        return 1, columns
    sides = block or (BLOCK, BLOCK)
    return sides if scale == (experts, ceil(rows / sides[0]), ceil(columns / sides[1])) else None


def _expert(
    name: str, scale: str, sides: tuple[int, int], checkpoint: Checkpoint, expert: int
) -> torch.Tensor:
    """Values fp32 [rows, columns] of one expert of a stack."""
    from quant.tensors import code_values

    values = code_values(checkpoint.read_index(name, expert))
    rows, columns = values.shape
    shared = checkpoint.read_index(scale, expert).float().reshape(ceil(rows / sides[0]), -1)
    spread = shared.repeat_interleave(sides[0], 0)[:rows].repeat_interleave(sides[1], 1)[:, :columns]
    return values.mul_(spread)
