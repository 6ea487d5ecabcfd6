"""A scheme: eight bits with one scale an output, which no group size has to divide."""

from quant.schemes import Scheme, SchemeRow, WeightScheme

channel = SchemeRow(
    Scheme("w8a16-channel", WeightScheme(8, -1)),
    methods=("minmax", "gptq"),
    title="8-bit weights, one scale an output",
)
