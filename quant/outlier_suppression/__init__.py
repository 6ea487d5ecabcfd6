"""Outlier suppressors: methods that move activation outliers into weights before rounding. Other packages add theirs through entry points."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quant.calibration.statistics import Statistics
from quant.registry import Registry

#: A suppressor proposes a factor [K] for each input of a group: the input is divided and the weights are multiplied by it.
Suppressor = Callable[[list[torch.Tensor], Statistics], torch.Tensor]

OutlierSuppressionRegistry: Registry[Suppressor] = Registry("outlier suppressor", "quant.outlier_suppression")
