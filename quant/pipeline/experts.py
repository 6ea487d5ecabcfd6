"""What the experts of a mixture read during calibration: each sees the tokens that its router sends, and few
of them where it is chosen seldom.

How a mixture is calibrated (``--moe-calibration``):

``routed``  each expert sees the tokens that its router sends, and no others.
``all``     each sees all tokens of its layer, as llm-compressor's `moe_calibrate_all_experts` does.
``blend``   routed tokens, each weighted with the square of its gate, which is what its error is multiplied by
            in the layer's output; where they are fewer than the features of the input, tokens of the whole
            layer stand in for those that are missing, with a small weight: a direction that no routed token
            has is still not free.

All inputs of a layer are kept until every expert is solved, one after another, so that one Hessian is in
memory at a time; beyond :data:`RESIDENT` bytes they lie in a scratch file.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from quant.models.experts import Routed

Calibration = Literal["routed", "all", "blend"]
#: Bytes of an expert layer's inputs that stay in memory.
RESIDENT = 512 << 20
#: Weight of a token that stands in for one that the router did not send, beside 1 of a routed token on
#: average.
STAND_IN = 0.1


@dataclass
class ExpertInputs:
    """The inputs of all experts of a layer before one product, over all batches.

    ``scratch``: folder of the file that holds what is too much for memory; None: the system's folder for such
    files.
    """

    scratch: Path | None = None
    _rows: list[torch.Tensor] = field(default_factory=list)
    _routes: list[Routed] = field(default_factory=list)
    _maps: list[mmap.mmap] = field(default_factory=list)
    _file: Any = None
    _held: int = 0

    def add(self, routed: Routed) -> None:
        """Keeps a copy of a batch's inputs."""
        self._rows.append(self._keep(routed.rows))
        self._routes.append(Routed(torch.empty(0), routed.index, routed.counts, routed.gates))

    def _keep(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.is_cuda or not rows.numel() or self._held + rows.nbytes <= RESIDENT:
            self._held += rows.nbytes
            return rows.clone()
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.scratch)
        start = self._file.seek(0, os.SEEK_END)
        start += -start % mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(rows.contiguous().view(torch.uint8).numpy())
        self._file.flush()
        self._maps.append(mmap.mmap(self._file.fileno(), rows.nbytes, offset=start))
        return torch.frombuffer(self._maps[-1], dtype=rows.dtype).view(rows.shape)

    @property
    def features(self) -> int:
        return self._rows[0].shape[1]

    @property
    def counts(self) -> torch.Tensor:
        """int64 [E], tokens of each expert."""
        return torch.stack([r.counts for r in self._routes]).sum(0)

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What an expert reads, [n, K], and the gates, fp32 [n], in the order of the batches."""
        rows, gates = [], []
        for kept, route in zip(self._rows, self._routes, strict=True):
            start = int(route.counts[:expert].sum())
            pairs = slice(start, start + int(route.counts[expert]))
            rows.append(kept[route.index[pairs]])
            gates.append(route.gates[pairs])
        self._give_back()
        return torch.cat(rows), torch.cat(gates)

    def spread(self, most: int) -> torch.Tensor:
        """At most ``most`` rows [P, K] at even distances over all batches."""
        total = sum(len(r) for r in self._rows)
        stride = max(1, -(-total // max(most, 1)))
        parts, skip = [], 0
        for rows in self._rows:
            parts.append(rows[skip::stride].clone())
            skip = (skip - len(rows)) % stride
        self._give_back()
        return torch.cat(parts)

    def _give_back(self) -> None:
        """Pages of the scratch file that were read count as memory in use until they are given back."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._rows.clear()
        self._maps.clear()  # unmapped when the last tensor on it is gone
        if self._file is not None:
            self._file.close()


def weighted(rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Rows [n, K] times their gates, which are scaled to a mean square of 1: their Gram matrix is then that
    of the error in the layer's output."""
    if not len(rows):
        return rows
    scale = gates.square().mean().sqrt()
    return rows if not float(scale) > 0 else rows * (gates / scale).unsqueeze(-1).to(rows.dtype)


def coverage(counts: torch.Tensor, floor: int) -> dict[str, Any]:
    """How the tokens of a layer are spread over its experts; ``floor``: as many as the features of the
    input."""
    tokens = counts.tolist()
    return {
        "experts": len(tokens),
        "tokens": tokens,
        "minimum": min(tokens),
        "median": sorted(tokens)[len(tokens) // 2],
        "floor": floor,
        "below_floor": sum(t < floor for t in tokens),
    }
