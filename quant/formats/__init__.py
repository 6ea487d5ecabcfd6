"""On-disk formats: what a quantized linear is called, how its integers are packed, what config.json says."""

from quant.formats import awq, compressed_tensors, fp8, gptq, plain  # noqa: F401  (each adds its row)
from quant.formats.base import Contents, Format, FormatRegistry, QuantizedLayers, find_format

__all__ = ["Contents", "Format", "FormatRegistry", "QuantizedLayers", "find_format"]
