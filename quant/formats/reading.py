"""Quantized checkpoints back to values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from quant.formats import FormatRegistry
from quant.formats.base import Format, QuantizedLayers, find_format
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

    linear = layers.linears[name]
    held = (f"{name}.{last}" for last in form.parts)
    tensors = {t: checkpoint.read(t) for t in held if t in checkpoint.tensors}
    try:
        tensor = form.unpack(linear, tensors, layers.options)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise _unfitting(checkpoint, linear, tensors) from error
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
        raise _unfitting(checkpoint, linear, tensors)
    return tensor


def _unfitting(
    checkpoint: Checkpoint, linear: Linear, tensors: Mapping[str, torch.Tensor]
) -> CheckpointError:
    held = ", ".join(
        f"{n.rpartition('.')[2]} {checkpoint.info(n).dtype} {list(t.shape)}" for n, t in tensors.items()
    )
    return CheckpointError(
        f"{checkpoint.path}: {linear.name}: its tensors do not make a [{linear.n}, {linear.k}] weight of "
        f"{linear.weights} ({held}): "
        "config.json and files belong to different checkpoints, or are damaged: fetch them again"
    )


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """A quantized checkpoint seen as an ordinary one: its linears have fp32 ``weight`` tensors, computed when
    read. Others are returned as they are."""
    layers = find_format(checkpoint.config, checkpoint.tensors)
    if layers is None:
        return checkpoint
    form = FormatRegistry.get(layers.format)
    config = without_quantization(checkpoint.config)
    tensors, computed = {}, {}
    for name, info in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        if cache_scale(name) is not None:
            continue  # numbers of the engine's KV cache: no part of the model
        if module not in layers.linears or (last not in form.parts and last != "weight"):
            tensors[name] = info
        elif f"{module}.weight" not in computed:
            linear = layers.linears[module]
            tensors[f"{module}.weight"] = TensorInfo(
                f"{module}.weight", "F32", (linear.n, linear.k), info.file, 0, 4 * linear.n * linear.k
            )
            computed[f"{module}.weight"] = lambda module=module: read_linear(
                form, layers, checkpoint, module
            ).dequantize()
    return replace(checkpoint, config=config, tensors=tensors, computed=computed)
