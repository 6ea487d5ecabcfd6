"""Quantized checkpoints back to values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from quant.formats.base import Format, QuantizedLayers, Stack, find_format
from quant.formats.legacy import repaired
from quant.vllm.cache import cache_scale
from quant.vllm.config import without_quantization
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor


def read_linear(form: Format, layers: QuantizedLayers, checkpoint: Checkpoint, name: str) -> QuantizedTensor:
    """One quantized linear of a checkpoint.

    Raises:
        CheckpointError: its tensors have other shapes or dtypes than its scheme.
    """
    import torch

    if (place := layers.slices.get(name)) is not None:
        return place.read(checkpoint)
    linear = layers.linears[name]
    held = (f"{name}.{last}" for last in form.parts)
    tensors = {t: checkpoint.read(layers.tensor(t)) for t in held if layers.tensor(t) in checkpoint.tensors}
    try:
        tensor = form.unpack(linear, tensors, layers.options)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise _unfitting(checkpoint, layers, linear, tensors) from error
    scheme, scales, order = tensor.scheme, tensor.scales, tensor.group_index
    kinds = {"U8": (torch.uint8,), "F8_E4M3": (torch.float8_e4m3fn,)}.get(
        scheme.scales, (torch.bfloat16, torch.float16, torch.float32)
    )
    fits = tuple(tensor.codes.shape) == (linear.n, linear.k) and scales.dtype in kinds
    fits = fits and tuple(scales.shape) == scheme.scale_shape(linear.n, linear.k)
    fits = fits and (tensor.zeros is None or tensor.zeros.shape == scales.shape)
    fits = fits and (
        order is None
        or (
            tuple(order.shape) == (linear.k,) and int(order.min()) >= 0 and int(order.max()) < scales.shape[1]
        )
    )
    if not fits:
        raise _unfitting(checkpoint, layers, linear, tensors)
    return tensor


def _unfitting(
    checkpoint: Checkpoint, layers: QuantizedLayers, linear: Linear, tensors: Mapping[str, torch.Tensor]
) -> CheckpointError:
    held = ", ".join(
        f"{n.rpartition('.')[2]} {checkpoint.info(layers.tensor(n)).dtype} {list(t.shape)}"
        for n, t in tensors.items()
    )
    return CheckpointError(
        f"{checkpoint.path}: {linear.name}: its tensors do not make a [{linear.n}, {linear.k}] weight of "
        f"{linear.weights} ({held}): config.json and files belong to different checkpoints, or are damaged: "
        "fetch them again"
    )


def read_weight(form: Format, layers: QuantizedLayers, checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A linear's weight, fp32, laid out as the family's files have it."""
    value = read_linear(form, layers, checkpoint, name).dequantize()
    return value.t().contiguous() if layers.linears[name].transposed else value


def quantized_tensors(checkpoint: Checkpoint, layers: QuantizedLayers) -> dict[str, str]:
    """The tensors of a file that belong to a quantized matrix, and the tensor of an ordinary checkpoint that
    each is a part of."""
    owners = {name: f"{own.rpartition('.')[0]}.weight" for own, name in layers.stored.items()}
    owners |= {name: stack.name for stack in layers.stacks.values() for name in stack.tensors}
    for name in checkpoint.tensors:
        module, _, last = name.rpartition(".")
        if module in layers.linears and (last in layers.form.parts or last == "weight"):
            owners[name] = f"{module}.weight"
    return owners


def dequantized(checkpoint: Checkpoint, layers: QuantizedLayers | None = None) -> Checkpoint:
    """A quantized checkpoint seen as an ordinary one: its matrices are fp32 tensors of the names that they
    have there, computed when they are read, experts one at a time. Others are returned as they are.

    Args:
        layers: what :func:`quant.formats.find_format` says of it; None: it is asked.

    Raises:
        CheckpointError: quantized in a way that is not read here.
    """
    if layers is None:
        checkpoint, _ = repaired(checkpoint)  # an older program's config may stand in a file of its own
        layers = find_format(checkpoint.config, checkpoint.tensors)
    if layers is None:
        return checkpoint
    form, read = layers.form, layers
    tensors: dict[str, TensorInfo] = {}
    computed: dict[str, Callable[[], torch.Tensor]] = {}
    parts: dict[str, Callable[[int], torch.Tensor]] = {}
    owners = quantized_tensors(checkpoint, layers)
    taken = {name for place in layers.slices.values() for name in place.stack.tensors}
    for module, place in layers.slices.items():
        part, file = f"{module}.weight", checkpoint.info(place.stack.tensors[0]).file
        tensors[part] = TensorInfo(part, "F32", (place.n, place.k), file, 0, 4 * place.n * place.k)
        computed[part] = partial(read_weight, form, read, checkpoint, module)
    for name, info in checkpoint.tensors.items():
        if name in taken or cache_scale(name) is not None:
            continue  # parts of the linears above; numbers of the engine's KV cache: no part of the model
        whole = owners.get(name)
        if whole is None:
            tensors[name] = info
            if name in checkpoint.computed:
                computed[name] = checkpoint.computed[name]
        elif whole not in computed:
            if (stack := layers.stacks.get(whole)) is not None:
                shape: tuple[int, ...] = stack.shape
                parts[whole] = partial(stack.read, checkpoint)
                computed[whole] = partial(read_stack, stack, checkpoint)
            else:
                linear = layers.linears[whole.removesuffix(".weight")]
                shape = linear.stored_shape
                computed[whole] = partial(read_weight, form, read, checkpoint, linear.name)
            tensors[whole] = TensorInfo(whole, "F32", shape, info.file, 0, 4 * prod(shape))
    return replace(
        checkpoint,
        config=without_quantization(checkpoint.config),
        tensors=tensors,
        computed=computed,
        computed_parts=parts,
        origin=checkpoint,
    )


def read_stack(stack: Stack, checkpoint: Checkpoint) -> torch.Tensor:
    """The values of all experts of a stack, fp32, as the tensor of an ordinary checkpoint of the family."""
    import torch

    return torch.stack([stack.read(checkpoint, e) for e in range(stack.shape[0])])
