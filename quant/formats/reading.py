"""Quantized checkpoints back to values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import Checkpoint
from quant.formats import FormatRegistry
from quant.formats.base import Format, Found, find_format

if TYPE_CHECKING:
    from quant.tensors import QuantizedTensor

_SUFFIXES = (
    "weight_packed", "weight", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale", "qweight", "qzeros", "scales", "g_idx",
)  # fmt: skip

#: Last parts of the names of an FP8 KV cache's scales.
CACHE_SCALES = ("k_scale", "v_scale", "q_scale")


def read_linear(form: Format, found: Found, checkpoint: Checkpoint, name: str) -> QuantizedTensor:
    """One quantized linear of a checkpoint."""
    tensors = {f"{name}.{s}": checkpoint.read(f"{name}.{s}") for s in _SUFFIXES if f"{name}.{s}" in checkpoint.tensors}
    return form.unpack(found.linears[name], tensors, found.options)


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """A quantized checkpoint seen as an ordinary one: its linears have fp32 ``weight`` tensors, computed when read. Others are returned as they are."""
    found = find_format(checkpoint.config, checkpoint.tensors)
    if found is None:
        return checkpoint
    form = FormatRegistry.get(found.format)
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "compression_config")}
    tensors, computed = {}, {}
    for name, info in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        if last in CACHE_SCALES:
            continue  # numbers of the engine's KV cache: no part of the model
        if module not in found.linears or last not in _SUFFIXES:
            tensors[name] = info
        elif f"{module}.weight" not in computed:
            linear = found.linears[module]
            tensors[f"{module}.weight"] = TensorInfo(f"{module}.weight", "F32", (linear.n, linear.k), info.file, 0, 4 * linear.n * linear.k)
            computed[f"{module}.weight"] = lambda module=module: read_linear(form, found, checkpoint, module).dequantize()
    return replace(checkpoint, config=config, tensors=tensors, computed=computed)
