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


def cache_scale(name: str) -> str | None:
    """The name that a number of an engine's FP8 KV cache has in our files, from any of the names that vLLM knows
    (`weight_utils.py::maybe_remap_kv_scale_name`); None of other tensors.

    >>> cache_scale("model.layers.0.self_attn.k_proj.output_scale")
    'model.layers.0.self_attn.k_scale'
    """
    module, _, last = name.rpartition(".")
    layer, _, part = module.rpartition(".")
    if last == "output_scale" and part in ("k_proj", "v_proj"):
        return f"{layer}.{part[0]}_scale"
    if last not in CACHE_SCALES:
        return None
    inner = part in ("q_proj", "k_proj", "v_proj") or (part == "attn" and layer.endswith(("attn", "attention")))
    return ".".join(filter(None, (layer if inner else module, last)))


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
        if cache_scale(name) is not None:
            continue  # numbers of the engine's KV cache: no part of the model
        if module not in found.linears or last not in _SUFFIXES:
            tensors[name] = info
        elif f"{module}.weight" not in computed:
            linear = found.linears[module]
            tensors[f"{module}.weight"] = TensorInfo(f"{module}.weight", "F32", (linear.n, linear.k), info.file, 0, 4 * linear.n * linear.k)
            computed[f"{module}.weight"] = lambda module=module: read_linear(form, found, checkpoint, module).dequantize()
    return replace(checkpoint, config=config, tensors=tensors, computed=computed)
