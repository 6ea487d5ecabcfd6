"""How much of a job is worked on at once, and where the rest of it waits: batches, what of them is this
rank's, tensors, what stays in memory, and the scratch file.

What suits a device is set here; a budget (:mod:`quant.pipeline.budget`) and a device whose memory ended
(:mod:`quant.pipeline.retry`) make it less.
"""

from __future__ import annotations

from pathlib import Path

import torch

from quant.accelerator import limit_memory, memory_of, of_kind
from quant.calibration.parts import part_sizes
from quant.calibration.text import Rows
from quant.pipeline.activation_store import ActivationStore
from quant.pipeline.budget import Placement, scratch_folder
from quant.pipeline.division import Parts, share
from quant.pipeline.plan import JobPlan
from quant.pipeline.ranks import Ranks

#: Tokens of one batch: large enough for full speed of the matrix products, small enough that a batch's
#: activations are few.
BATCH_TOKENS = {"cpu": 2048, "accelerator": 16384}
#: Bytes of calibration activations that a CPU run keeps in memory. The rest goes to a scratch file, which the
#: page cache holds where there is room.
RESIDENT_CPU = 256 << 20
#: Tensors that a job without data works on at once, and so has in memory, on as many cores.
MOST_WORKERS = 4


class Workspace:
    """The batches of one job and the room that its activations have.

    Args:
        batch_tokens: calibration tokens that go through a block together; None: as many as suit the device.

    Attributes:
        placement: what a budget lets the job have, once it is decided.

    Raises:
        QuantError: a scratch folder that cannot be written to.
    """

    def __init__(self, plan: JobPlan, device: torch.device, ranks: Ranks, batch_tokens: int | None = None):
        self.plan, self.device, self.ranks = plan, device, ranks
        self.batch_tokens = batch_tokens or of_kind(BATCH_TOKENS, device)
        self.placement: Placement | None = None
        self._scratch = scratch_folder(plan.recipe.scratch_dir)
        limit_memory(device, plan.recipe.max_gpu_memory)
        self._calibration = (0, 0)  # rows, and tokens of each

    # --- batches --------------------------------------------------------------------------------------------

    def take(self, rows: Rows) -> str | None:
        """Notes which rows there are; returns what to say where memory that ended has made batches
        smaller."""
        self._calibration = (len(rows.tokens), rows.tokens.shape[1])
        if not self.smaller:
            return None
        several = self.batch_rows(rows.tokens.shape[1])
        return f"{self.device} ran out of memory: rows go through blocks by {several}"

    def place(self, placement: Placement | None) -> str | None:
        """Keeps within a budget from now on; returns what to say where it makes batches smaller."""
        self.placement = placement
        if placement is None or placement.batch_rows >= placement.usual_rows:
            return None
        self.batch_tokens = placement.batch_rows * self._calibration[1]
        return (
            f"the budget of memory lets {placement.batch_rows} rows through a block together instead of "
            f"{placement.usual_rows}"
        )

    def batch_rows(self, length: int) -> int:
        """Calibration rows of so many tokens that go through a block together."""
        return max(1, self.batch_tokens // length)

    def batches(self, rows: Rows) -> tuple[list[torch.Tensor], int | None]:
        """The batches [rows, tokens] of all rows, and which of them is the held-out row."""
        tokens = [*rows.tokens.split(self.batch_rows(rows.tokens.shape[1]))]
        held_out = None if rows.held_out is None else len(tokens)
        return [*tokens, *([rows.held_out] if rows.held_out is not None else [])], held_out

    def share(self, rows: Rows) -> tuple[list[torch.Tensor], int | None, Parts]:
        """The batches of this rank, which of them is the held-out row, and which parts they are of."""
        return share(rows, self.batch_rows(rows.tokens.shape[1]), self.ranks)

    @property
    def smaller(self) -> bool:
        """Whether batches are smaller than suits the device."""
        return self.batch_tokens < of_kind(BATCH_TOKENS, self.device)

    def smaller_batch(self) -> int | None:
        """Tokens of half a batch; None where a batch is a single row, or there are none."""
        rows, length = self._calibration
        several = min(self.batch_rows(length), max(part_sizes(rows), default=0)) if rows else 0
        return several // 2 * length if several > 1 else None

    @property
    def workers(self) -> int:
        """Tensors that a job without data works on at once, as many threads as torch may use here."""
        if self.placement is not None:
            return self.placement.workers
        return min(torch.get_num_threads(), MOST_WORKERS)

    # --- what waits -----------------------------------------------------------------------------------------

    def resident_bytes(self) -> int:
        """Bytes of calibration activations that stay in the device's memory."""
        if self.placement is not None:
            return self.placement.resident_bytes
        return RESIDENT_CPU if self.device.type == "cpu" else memory_of(self.device)[0] // 2

    def store(self, folder: Path) -> ActivationStore:
        """Where activations wait; ``folder``: of the scratch file, where no other is asked for."""
        # of several processes each has one of its own, without a name
        alone = self._scratch is None and self.ranks.size == 1
        named = folder / "activations.bin" if alone else None
        host = None if self.placement is None else self.placement.host_bytes
        return ActivationStore(self.resident_bytes(), named, self._scratch or folder, host)
