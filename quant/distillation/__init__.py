"""A student taught by its source: a pruned model's weights, or a quantized one's scales and norms, trained so
that it says of the next token what the source says."""

from quant.distillation.run import Distillation, distill

__all__ = ["Distillation", "distill"]
