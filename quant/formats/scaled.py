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
from math import ceil, gcd
from typing import TYPE_CHECKING

from quant.checkpoint.header import TensorInfo
from quant.errors import CheckpointError
from quant.formats.base import IncompleteCheckpoint, Stack, StackPart, suffixed
from quant.schemes import BLOCK, PRESETS, ActivationScheme, WeightScheme

if TYPE_CHECKING:
    import torch

    from quant.checkpoint.reader import Checkpoint

#: Last parts of a multiplier's name, and of the number of a static activation's.
SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale")
INPUT_SCALES = ("input_scale", "activation_scale")
#: What follows the name of a tensor of all experts, after ``_`` (after a point, where that is called weight).
_SPELLINGS = ("scale_inv", "weight_scale_inv", "scale", "weight_scale")
#: Header dtypes of a multiplier; each widens to fp32 exactly.
MULTIPLIERS = ("F32", "BF16", "F16", "F8_E8M0")

TENSOR, BLOCKS = PRESETS["w8a8-fp8-tensor"].weights, PRESETS["fp8-block"].weights
CHANNEL, MX = PRESETS["w8a8-fp8"].weights, PRESETS["mxfp8"].weights
#: Inputs that are divided by one number of the file.
STATIC = ActivationScheme(8, "float", "tensor", dynamic=False)
#: How inputs are rounded where the file says nothing of them.
_DYNAMIC = {
    PRESETS[name].weights: PRESETS[name].activations for name in ("w8a8-fp8-tensor", "fp8-block", "w8a8-fp8")
}


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
    coded = [
        n
        for n in suffixed(tensors, ".weight")
        if tensors[f"{n}.weight"].dtype == "F8_E4M3" and len(tensors[f"{n}.weight"].shape) != 3
    ]
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
        return BLOCKS if block == (BLOCK, BLOCK) else grouped(k, block[1], scale.name)
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


def grouped(k: int, inputs: int, scale: str) -> WeightScheme:
    """The numbers of a weight of ``k`` inputs of which blocks of ``inputs`` share a multiplier, the last of
    them maybe fewer: in groups of a size that divides both.

    Raises:
        CheckpointError: there is none.
    """
    size = gcd(k, inputs)
    if size % 8:
        raise CheckpointError(
            f"{scale}: blocks of {inputs} inputs do not share {k} inputs out by eights, which is not read "
            "here: start from the original"
        )
    return WeightScheme(8, size, True, "float", "group", "F32")


def multipliers(
    stored: torch.Tensor, scheme: WeightScheme, n: int, k: int, sides: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """Multipliers as :class:`quant.tensors.QuantizedTensor` has them, from those of a file.

    Args:
        stored: in any of the shapes that :func:`weights_of` takes.
        sides: rows and columns that share one, of blocks of another size than 128 × 128.
    """
    import torch

    if scheme == MX:
        return stored.reshape(n, k // 32).view(torch.uint8)
    values = stored.float()
    if scheme.strategy == "group":  # blocks of another size: each row and group gets its own multipliers
        rows, columns = sides
        spread = values.reshape(ceil(n / rows), -1).repeat_interleave(rows, 0)[:n]
        each = columns // scheme.group_size
        return spread.repeat_interleave(each, 1)[:, : k // scheme.group_size].contiguous()
    return values.reshape(scheme.scale_shape(n, k))


def stacks(tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None = None) -> dict[str, Stack]:
    """Experts that are stored as one FP8 tensor [E, rows, columns], as the family's ordinary files have them;
    ``block`` as in :func:`scaled_matrices`.

    Raises:
        CheckpointError: multipliers that fit no way of sharing them.
    """
    stacked = {}
    for name, info in tensors.items():
        if info.dtype != "F8_E4M3" or len(info.shape) != 3 or name.endswith("_scale"):
            continue  # NVFP4's multipliers are E4M3, too
        stem = name.removesuffix(".weight")
        joint = f"{stem}_" if stem == name else f"{stem}."
        spellings, numbers = ([joint + x for x in lasts] for lasts in (_SPELLINGS, INPUT_SCALES))
        scale = next((tensors[x] for x in spellings if x in tensors), None)
        if scale is None:
            raise CheckpointError(
                f"{name} is {info.dtype} {info.shape}, and none of its multipliers "
                f"({', '.join(spellings)}) is there: the checkpoint is incomplete, fetch its files again"
            )
        experts, rows, columns = info.shape
        sides = (_sides(scale.shape, info.shape, block)) if scale.dtype in MULTIPLIERS else None
        if sides is None:
            raise CheckpointError(
                f"{scale.name} is {scale.dtype} {scale.shape}: for {name} {info.shape} it is one of "
                f"{' or '.join(MULTIPLIERS)} an expert, an output or a block"
            )
        weights = TENSOR if sides == (rows, columns) else BLOCKS if min(sides) > 1 else CHANNEL
        number = next((x for x in numbers if x in tensors), None)
        own = [x for x in (*spellings, *numbers) if x in tensors]
        whole = ordinary_name(name)
        stacked[whole] = Stack(
            whole,
            (experts, rows, columns),
            weights,
            (name, *own),
            sides,
            partial(_expert, name, scale.name, sides, number),
            STATIC if number is not None else _DYNAMIC[weights],
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
    name: str, scale: str, sides: tuple[int, int], number: str | None, checkpoint: Checkpoint, expert: int
) -> StackPart:
    """One expert [rows, columns] of a stack; ``number``: the tensor of its static activations' scale."""
    codes = checkpoint.read_index(name, expert)
    shared = checkpoint.read_index(scale, expert).float().reshape(ceil(codes.shape[0] / sides[0]), -1)
    inputs = None if number is None else number_of(checkpoint, number, expert)
    return StackPart(codes, shared, sides, inputs=inputs)


def ordinary_name(name: str) -> str:
    """What an ordinary checkpoint calls a tensor of all experts, from the name of its codes: parameters of
    modules that are no linears have no ``.weight``, but Granite's have."""
    stem = name.removesuffix(".weight")
    return name if stem.endswith("_linear") else stem


def number_of(checkpoint: Checkpoint, name: str, expert: int) -> torch.Tensor:
    """fp32 [1]: of a tensor of one number for each expert, or for all, that of one; of an expert's several
    the largest, which holds for all of its inputs."""
    shape = checkpoint.info(name).shape
    each = len(shape) > 0 and shape[0] > 1
    value = checkpoint.read_index(name, expert) if each else checkpoint.read(name)
    return value.float().reshape(-1).amax().reshape(1)
