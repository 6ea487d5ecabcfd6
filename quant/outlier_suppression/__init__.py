"""Outlier suppressors: methods that move the range of an input into the weights that read it, before
rounding."""

from quant.outlier_suppression.awq import AWQScaling
from quant.outlier_suppression.base import OutlierSuppressionRegistry, Suppression, Suppressor
from quant.outlier_suppression.smooth_quant import SmoothQuant

__all__ = ["AWQScaling", "OutlierSuppressionRegistry", "SmoothQuant", "Suppression", "Suppressor"]
