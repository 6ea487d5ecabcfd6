"""What a rounding method is: a pure function of (weight, statistics of its input, scheme)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn

from quant.calibration.statistics import STATISTICS, Statistics
from quant.registry import Registry, no_class
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor


@dataclass(frozen=True)
class Quantized:
    """A quantized weight and what the reader of a report must know: ``fallbacks`` are departures from what
    was asked, ``notes`` facts."""

    tensor: QuantizedTensor
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Quantizer(Protocol):
    """A method with its settings (a frozen dataclass).

    ``needs`` names the statistics it wants (see :mod:`quant.calibration.statistics`); empty means that no
    calibration text is needed. Rows of a weight are independent, so linears that share an input are handed
    over stacked along N and the result is cut apart.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    #: the suppressor that is part of the method (AWQ: its scaling); one named by the job takes its place.
    #: Empty: none.
    suppressor: ClassVar[str] = ""

    @staticmethod
    def refuse(scheme: WeightScheme) -> str | None:
        """Why the method cannot make this scheme, or None."""
        return None

    def __call__(
        self,
        weight: torch.Tensor,
        statistics: Statistics | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
        amax: torch.Tensor | None = None,
    ) -> Quantized:
        """Quantizes fp32 ``weight`` [N, K]; scales of kind ``model`` are stored in ``dtype``. ``weight`` may
        be overwritten.

        ``amax`` is given only with schemes that have a number for the whole tensor: the largest magnitude in
        the fused layer that the weight is a part of, so that all of its shards get one number; None: the
        weight's own.
        """
        ...


def quantize_many(
    quantizer: Quantizer,
    weights: torch.Tensor,
    statistics: Sequence[Statistics | None],
    scheme: WeightScheme,
    dtype: torch.dtype,
) -> list[Quantized]:
    """What a method makes of a batch of weights fp32 [B, N, K] (which may be overwritten), each with the
    statistics of its own input; the experts of a layer come so. Several may share one and the same
    :class:`Statistics`.

    A method that is quicker with many at once has them itself, ``many(weights, statistics, scheme, dtype)``;
    of others they are quantized one after another.
    """
    many = getattr(quantizer, "many", None)
    if many is not None:
        made: list[Quantized] = many(weights, statistics, scheme, dtype)
        return made
    shared = len({id(s) for s in statistics}) < len(statistics)
    return [
        quantizer(w, s.copy() if s is not None and shared else s, scheme, dtype)
        for w, s in zip(weights, statistics, strict=True)
    ]


def quantize_slices(
    quantizer: Quantizer,
    slices: torch.Tensor,
    statistics: Statistics | None,
    scheme: WeightScheme,
    dtype: torch.dtype,
    amax: torch.Tensor | None,
) -> list[Quantized]:
    """What a method makes of slices fp32 [S, N, K] of the rows of one weight (which may be overwritten), with
    the statistics of its input; ``amax``: the largest magnitude of the whole weight, for schemes that have a
    number for it. The method has ``slices`` with these arguments, where each slice gets the same numbers
    whichever others come with it."""
    made: list[Quantized] = quantizer.slices(slices, statistics, scheme, dtype, amax)  # type: ignore[attr-defined]
    return made


class BlockMethod(Protocol):
    """A method that works on a whole block at once, where a :class:`Quantizer` sees one weight: learned
    rounding, distillation.

    It changes the weights of ``linears`` in place so that the block makes ``targets`` of ``inputs``.
    """

    def __call__(
        self,
        block: nn.Module,
        inputs: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        linears: Mapping[str, WeightScheme],
    ) -> Mapping[str, Quantized]:
        """
        Args:
            block: filled, on its device; called with hidden states [B, T, H].
            inputs, targets: hidden states [B, T, H] before and behind the block, batch by batch.
            linears: module paths of the linears to quantize, and the scheme of each.

        Returns:
            what each of them became.
        """
        ...


QuantizerRegistry: Registry[type[Quantizer]] = Registry(
    "method",
    "quant.quantizers",
    lambda entry: no_class(entry, needs=STATISTICS),
    {"suppressor": Quantizer.suppressor, "refuse": staticmethod(Quantizer.refuse)},
    also=("fp8",),  # minmax with an FP8 scheme
)
