"""What an outlier suppressor is: a pure function that proposes a factor for each input of a group of linears.

The input is divided by the factors and the weights are multiplied by them, so the layer's function stays as
it is. The pipeline folds the division into the module that makes the input: a norm's gain, or the rows of a
linear. Other packages add suppressors through entry points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from quant.calibration.statistics import STATISTICS, Statistics
from quant.registry import Registry, no_class
from quant.schemes import Scheme

#: Kinds of modules that factors are folded into.
SOURCES = frozenset({"norm", "linear"})


@dataclass(frozen=True)
class Suppression:
    """Factors fp32 [K], finite and positive, 1 where nothing is to be moved; and what a report says of
    them."""

    factors: torch.Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where factors will be folded, and what that asks of them.

    Attributes:
        source: ``norm`` or ``linear``.
        exact: factors must be powers of two, so that folding changes no value by rounding.
        tied: int64 [K], the output of the source that each input is (several heads read one KV head): inputs
            of one output need one factor. None: each its own.
    """

    source: str
    exact: bool = False
    tied: torch.Tensor | None = None

    def fit(self, factors: torch.Tensor) -> torch.Tensor:
        """The nearest factors that the place allows: tied ones become their geometric mean, exact ones the
        nearest power of two."""
        logs = factors.float().log2()
        if self.tied is not None:
            size = int(self.tied.max()) + 1
            sums = torch.zeros(size, device=logs.device).index_add_(0, self.tied, logs)
            counts = torch.zeros(size, device=logs.device).index_add_(0, self.tied, torch.ones_like(logs))
            logs = (sums / counts.clamp_min(1))[self.tied]
        return torch.exp2(logs.round() if self.exact else logs)


class Suppressor(Protocol):
    """A suppressor with its settings (a frozen dataclass)."""

    name: ClassVar[str]
    #: kinds of source it folds into
    sources: ClassVar[frozenset[str]]

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that these settings want."""
        ...

    def __call__(
        self, weight: torch.Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype, place: Place
    ) -> Suppression:
        """Factors for the stacked fp32 weights [N, K] (not to be changed) of linears that share an input;
        ``scheme`` is what they will become, ``dtype`` the dtype of scales."""
        ...


OutlierSuppressionRegistry: Registry[type[Suppressor]] = Registry(
    "outlier suppressor",
    "quant.outlier_suppression",
    lambda entry: no_class(entry, needs=STATISTICS, sources=SOURCES),
)


def norm_factors(old: torch.Tensor, new: torch.Tensor, offset: float) -> torch.Tensor:
    """fp32 [K]: what inputs were divided by when a norm's stored weight went from ``old`` to ``new``; 1 where
    it did not change."""
    return torch.where(old == new, 1.0, (old.float() + offset) / (new.float() + offset))
