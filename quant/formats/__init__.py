"""On-disk formats: what a quantized linear is called, how its integers are packed, what config.json says."""

from quant.formats import (  # noqa: F401  (each adds its row)
    awq,
    compressed_tensors,
    fbgemm,
    fp8,
    gguf,
    gptq,
    modelopt,
    mxfp4,
    plain,
)
from quant.formats.base import Contents, Format, FormatRegistry, QuantizedLayers, find_format

__all__ = ["Contents", "Format", "FormatRegistry", "QuantizedLayers", "find_format"]
