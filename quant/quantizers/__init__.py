"""Rounding methods: pure functions of a weight, the statistics of its input and a scheme."""

from quant.quantizers.base import Quantized, Quantizer, QuantizerRegistry
from quant.quantizers.gptq import GPTQQuantizer
from quant.quantizers.hqq import HQQQuantizer
from quant.quantizers.minmax import MinMaxQuantizer

__all__ = ["GPTQQuantizer", "HQQQuantizer", "MinMaxQuantizer", "Quantized", "Quantizer", "QuantizerRegistry"]
