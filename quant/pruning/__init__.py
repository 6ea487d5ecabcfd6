"""Smaller models of a larger one: blocks that matter least are left out, and what stays is an ordinary
checkpoint. Weights are pruned one by one by methods of :mod:`quant.quantizers`."""

from quant.pruning.depth import Depth, drop_blocks

__all__ = ["Depth", "drop_blocks"]
