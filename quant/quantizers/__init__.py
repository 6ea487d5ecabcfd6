"""Rounding methods: pure functions of a weight, the statistics of its input and a scheme."""

from quant.quantizers.awq import AWQQuantizer
from quant.quantizers.base import Quantized, Quantizer, QuantizerRegistry, quantize_many, quantize_slices
from quant.quantizers.gptq import GPTQQuantizer
from quant.quantizers.hqq import HQQQuantizer
from quant.quantizers.identity import IdentityQuantizer
from quant.quantizers.minmax import MinMaxQuantizer
from quant.quantizers.pruning import MagnitudePruner, SparseGPTPruner, WandaPruner
from quant.quantizers.yaqa import YAQAQuantizer

__all__ = [
    "AWQQuantizer", "GPTQQuantizer", "HQQQuantizer", "IdentityQuantizer", "MagnitudePruner",
    "MinMaxQuantizer", "Quantized", "Quantizer", "QuantizerRegistry", "SparseGPTPruner", "WandaPruner",
    "YAQAQuantizer", "quantize_many", "quantize_slices",
]  # fmt: skip
