"""Methods that need no data: one linear at a time, by pieces of its rows, so that any architecture goes
through in little memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from quant.accelerator import of_kind
from quant.checkpoint.dtypes import TORCH
from quant.errors import NotFinite
from quant.pipeline.plan import JobPlan
from quant.pipeline.records import Records
from quant.quantizers import Quantized, Quantizer
from quant.quantizers.minmax import MinMaxQuantizer
from quant.recipe import Assignment
from quant.schemes import BLOCK
from quant.tensors import QuantizedTensor, largest_magnitude, sum_of_squares
from quant.vllm.config import model_types
from quant.vllm.layers import sharing_layers

#: Elements of a weight that are worked on at a time: a CPU's temporaries stay in its cache, a GPU's still
#: fill it.
PIECE = {"cpu": 1 << 18, "accelerator": 1 << 24}
#: What becomes of a linear whose inputs a calibrated job does not see.
UNSEEN = "no calibration token is seen to reach it: rounded to the nearest number"


class Assembled:
    """A quantized weight of ``count`` rows put together from pieces of them, in order."""

    def __init__(self, count: int):
        self._count, self._filled = count, 0
        self._codes: torch.Tensor | None = None
        self._scales: list[torch.Tensor] = []
        self._zeros: list[torch.Tensor] = []
        self._fallbacks: dict[str, None] = {}
        self._notes: dict[str, None] = {}
        self._last: Quantized | None = None

    def add(self, piece: Quantized) -> None:
        tensor = piece.tensor
        if self._codes is None:
            self._codes = torch.empty(
                self._count, *tensor.codes.shape[1:], dtype=tensor.codes.dtype, device=tensor.codes.device
            )
        self._codes[self._filled : self._filled + len(tensor.codes)] = tensor.codes
        self._filled += len(tensor.codes)
        self._scales.append(tensor.scales)
        if tensor.zeros is not None:
            self._zeros.append(tensor.zeros)
        self._fallbacks |= dict.fromkeys(piece.fallbacks)
        self._notes |= dict.fromkeys(piece.notes)
        self._last = piece

    def finish(self) -> Quantized:
        assert self._last is not None and self._codes is not None and self._filled == self._count
        tensor = self._last.tensor
        scales = tensor.scales if tensor.scheme.strategy == "tensor" else torch.cat(self._scales)
        tensor = replace(
            tensor, codes=self._codes, scales=scales, zeros=torch.cat(self._zeros) if self._zeros else None
        )
        return Quantized(tensor, tuple(self._fallbacks), tuple(self._notes))


class PieceQuantizer:
    """Quantizes linears of a plan from their weights alone; several threads may do so at once."""

    def __init__(
        self,
        plan: JobPlan,
        quantizers: Mapping[Assignment, Quantizer],
        device: torch.device,
        records: Records,
    ):
        self.plan, self.quantizers, self.device, self.records = plan, quantizers, device, records
        self._amax: dict[str, torch.Tensor] = {}
        self._amax_lock = threading.Lock()

    def quantize(self, name: str) -> QuantizedTensor:
        """Quantizes one linear by pieces of its rows, which are independent; of the source no more than a
        piece is in memory. A method that asks for statistics gives way to rounding to the nearest.

        Raises:
            NotFinite: its weight holds NaN or infinity.
        """
        assignment = self.plan.assignments[name]
        weights = assignment.scheme.weights
        start = time.perf_counter()
        amax = self._fused_amax(name) if weights.strategy in ("tensor", "tensor_group") else None
        shared = {} if amax is None else {"amax": amax}
        quantizer = self.quantizers[assignment]
        fallbacks: tuple[str, ...] = ()
        if quantizer.needs:
            quantizer, fallbacks = MinMaxQuantizer(), (UNSEEN,)
        signal, noise = [], []
        whole = Assembled(self.plan.linears[name].n)
        for stored, weight, squares in self._pieces(name):
            result = quantizer(weight, None, weights, TORCH[self.plan.dtype], **shared)
            signal.append(squares)
            # a dtype holds the difference of two of its numbers exactly where neither is more than twice the
            # other, or one is 0
            noise.append(sum_of_squares(result.tensor.dequantize().to(stored.dtype).sub_(stored).float()))
            whole.add(result)
        quantized = whole.finish()
        quantized = replace(quantized, fallbacks=(*fallbacks, *quantized.fallbacks))
        self.records.add(name, quantized, _total(noise), _total(signal), None, 0, time.perf_counter() - start)
        return quantized.tensor

    def _pieces(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """A linear's weight by pieces of rows, whole blocks of them: as stored, and as fp32 of its own, both
        on the device; and the sum of its squares.

        Raises:
            NotFinite: it holds NaN or infinity.
        """
        size = of_kind(PIECE, self.device)
        block = BLOCK if self.plan.assignments[name].scheme.weights.strategy == "block" else 1
        rows = max(block, size // self.plan.linears[name].k // block * block)
        ref = self.plan.refs[name]
        for piece in ref.pieces(self.plan.checkpoint, rows):
            stored = piece.to(self.device)
            weight = stored.to(torch.float32, copy=True)
            squares = sum_of_squares(weight)
            # a sum of squares is finite only if every number is; those of large numbers may overflow
            if not bool(torch.isfinite(squares)) and not bool(torch.isfinite(weight).all()):
                raise NotFinite(self.plan.checkpoint.info(ref.tensor).file, ref.tensor)
            yield stored, weight, squares

    @cached_property
    def _shards(self) -> Mapping[str, Sequence[str]]:
        """By linear, all those that share one number with it, itself among them."""
        groups = sharing_layers(self.plan.linears, model_types(self.plan.checkpoint.config))
        return {name: names for names in groups for name in names}

    def _fused_amax(self, name: str) -> torch.Tensor:
        """Largest magnitude in the layer that vLLM fuses a linear into: its shards get one number for the
        whole tensor."""
        shards = self._shards[name]
        with self._amax_lock:
            if shards[0] not in self._amax:
                largest = [largest_magnitude(w) for n in shards for _, w, _ in self._pieces(n)]
                self._amax[shards[0]] = torch.stack(largest).amax()
            return self._amax[shards[0]]


def _total(parts: list[torch.Tensor]) -> float:
    return float(torch.stack(parts).double().sum())
