"""Smaller models of a larger one: blocks, or parts of every block, that matter least are left out, and what
stays is an ordinary checkpoint. Weights are pruned one by one by methods of :mod:`quant.quantizers`."""

from quant.pruning.depth import Depth, drop_blocks
from quant.pruning.width import Width, narrow

__all__ = ["Depth", "Width", "drop_blocks", "narrow"]
