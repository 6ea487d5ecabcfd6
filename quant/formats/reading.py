"""Quantized checkpoints back to values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quant.checkpoint.reader import Checkpoint
from quant.formats.base import Format, Found

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor

_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "qweight", "qzeros", "scales", "g_idx")


def read_linear(form: Format, found: Found, checkpoint: Checkpoint, name: str) -> QuantizedTensor:
    """One quantized linear of a checkpoint."""
    tensors = {f"{name}.{s}": checkpoint.read(f"{name}.{s}") for s in _SUFFIXES if f"{name}.{s}" in checkpoint.tensors}
    return form.unpack(found.linears[name], tensors, found.options)


def weight_reader(checkpoint: Checkpoint, found: Found | None) -> Callable[[str], torch.Tensor]:
    """A function from ``<module>.weight`` to its value: stored, or dequantized to fp32 where the module is quantized."""
    from quant.formats import FormatRegistry

    def read(name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if found is not None and module in found.linears:
            return read_linear(FormatRegistry.get(found.format), found, checkpoint, module).dequantize()
        return checkpoint.read(name)

    return read
