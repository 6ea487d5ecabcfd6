"""How a job keeps within what it may take (``--max-memory``, ``--max-gpu-memory``), decided before it starts:
what waits in memory, what goes to scratch, and how many rows or tensors are worked on at once.

First less stays in memory, which changes nothing of the result, nor does the number of tensors that are
worked on at once. Only where a block has no room beside that, fewer rows go through it together: sums over
other batches may end in other bits, so the plan says it. A budget that holds not even one row is refused with
the least that would do.

Ranks on one machine share its budget of memory in equal parts, and each has a GPU of its own. They decide by
what the one among them that has the least would, so that all decide alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from quant.accelerator import memory_of
from quant.calibration.parts import share_of_most
from quant.calibration.text import Rows
from quant.errors import QuantError
from quant.models.skeleton import Skeleton
from quant.pipeline.checks import existing_folder
from quant.pipeline.footprint import largest_block, outside_bytes, tensor_bytes, waiting_bytes
from quant.pipeline.memory import give_back
from quant.pipeline.ranks import asked_ranks, ranks_beside
from quant.recipe import Recipe
from quant.units import MIB, format_size

if TYPE_CHECKING:
    from quant.pipeline.manager import QuantizationManager

#: Share of a budget that the plan fills: what is counted is not what will be taken to the last page.
_FILLED = 0.95
#: What reading, writing, verification and the report take beside the work itself.
_BUFFERS = 32 * MIB
#: The share of its memory by which a process may have more than another that does the same: 1 / 128.
_APART = 128


@dataclass(frozen=True)
class Placement:
    """Where things are while a job runs.

    Attributes:
        batch_rows: calibration rows that go through a block together; 0 where none do.
        usual_rows: as many as do without a budget.
        workers: tensors that are worked on at once where nothing is calibrated; 0 elsewhere.
        resident_bytes: activations that may stay in memory (of the device that computes).
        waiting_bytes: activations and sums that wait at once, wherever.
        spilled_bytes: of them those on the scratch file.
        host_bytes: of a GPU's activations those that may lie in the host's memory; None: all that do not
            stay.
        memory_bytes: what the plan takes of the host's memory, counted.
        gpu_bytes: and of the GPU's.
    """

    batch_rows: int = 0
    usual_rows: int = 0
    workers: int = 0
    resident_bytes: int = 0
    waiting_bytes: int = 0
    spilled_bytes: int = 0
    host_bytes: int | None = None
    memory_bytes: int = 0
    gpu_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def in_use() -> int:
    """Bytes of memory that this process has now, less what it has freed."""
    give_back()
    return int(psutil.Process().memory_info().rss)


def place_blocks(manager: QuantizationManager, rows: Rows, skeleton: Skeleton) -> Placement | None:
    """How a job with calibration keeps within its budget; None where it has none.

    Raises:
        QuantError: less than the least that would do.
    """
    recipe, ranks = manager.plan.recipe, manager.ranks
    if recipe.max_memory is None and recipe.max_gpu_memory is None:
        return None
    held_out = 0 if rows.held_out is None else rows.held_out.numel()
    own, length = share_of_most(len(rows.tokens), asked_ranks(recipe)), rows.tokens.shape[1]
    waiting = waiting_bytes(manager, skeleton, own * length + held_out, len(rows.tokens))
    usual = min(manager.workspace.batch_rows(length), own)
    blocks = range(skeleton.block_count)
    outside = outside_bytes(skeleton)

    def work(several: int) -> int:
        """Bytes of the device that computes, while so many rows go through a block or the embedding."""
        return max(largest_block(manager, skeleton, several * length, blocks), outside)

    host = None if recipe.max_memory is None else int(recipe.max_memory / ranks_beside(recipe) * _FILLED)
    begun = max(ranks.exchange(in_use())) + _BUFFERS
    if manager.device.type == "cpu":
        assert host is not None
        several, needed = _rows(usual, work, host - begun)
        if needed > host - begun:
            raise _too_small("--max-memory", recipe, begun + needed, "memory")
        resident = min(waiting, host - begun - needed)
        return Placement(
            several, usual, 0, resident, waiting, waiting - resident, None, begun + needed + resident
        )
    free = min(ranks.exchange(memory_of(manager.device)[0]))
    most = int(min(free, recipe.max_gpu_memory or free) * _FILLED)
    several, needed = _rows(usual, work, most)
    if needed > most and recipe.max_gpu_memory is not None:
        raise _too_small("--max-gpu-memory", recipe, needed, "the GPU's memory")
    # what a method takes beyond the count is left as much room as the activations get
    resident = min(waiting, max(most - needed, 0) // 2)
    if host is not None and begun > host:
        raise _too_small("--max-memory", recipe, begun, "memory")
    away = waiting - resident
    hosted = None if host is None else min(host - begun, away)
    kept = away if hosted is None else hosted
    return Placement(
        several, usual, 0, resident, waiting, away - kept, hosted, begun + kept, needed + resident
    )


def place_tensors(manager: QuantizationManager, workers: int) -> Placement | None:
    """How a job that needs no data keeps within its budget; None where it has none.

    Args:
        workers: tensors that are worked on at once without a budget.

    Raises:
        QuantError: less than the least that would do.
    """
    recipe = manager.plan.recipe
    if recipe.max_memory is None:
        return None
    sizes = [x.n * x.k for x in manager.plan.linears.values()]
    most = int(recipe.max_memory / ranks_beside(recipe) * _FILLED)
    begun = max(manager.ranks.exchange(in_use())) + _BUFFERS

    def needed(several: int) -> int:
        return begun + tensor_bytes(sizes, several)

    several, least = _rows(workers, needed, most)
    if least > most:
        raise _too_small("--max-memory", recipe, least, "memory")
    return Placement(workers=several, memory_bytes=least)


def _rows(usual: int, bytes_of: Callable[[int], int], most: int) -> tuple[int, int]:
    """The largest of a number, its half and so on whose bytes are no more than ``most``, or one; and its
    bytes."""
    several = max(usual, 1)
    while (needed := bytes_of(several)) > most and several > 1:
        several //= 2
    return several, needed


def _too_small(option: str, recipe: Recipe, needed: int, what: str) -> QuantError:
    given = recipe.max_memory if option == "--max-memory" else recipe.max_gpu_memory
    count = ranks_beside(recipe) if option == "--max-memory" else 1
    # it must do when it is given, to a process that has some pages more
    least = -(-int((needed + needed // _APART) * count / _FILLED + count) // MIB)
    what += f" in {count} ranks" * (count > 1)
    return QuantError(
        f"{option} is {format_size(given or 0)}: with one row or tensor at a time and no activations kept in "
        f"memory the job takes about {format_size(least * MIB)} of {what}: give {option} {least}MiB, use a "
        "shorter --sequence-length, or leave it out"
    )


def scratch_folder(folder: Path | None) -> Path | None:
    """The folder of ``--scratch-dir``, made where it is not there yet.

    Raises:
        QuantError: it cannot be written to.
    """
    if folder is None:
        return None
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = existing_folder(folder)
        raise QuantError(
            f"--scratch-dir {folder}: {where} cannot be written to ({error.strerror}): give another folder"
        ) from error
    return folder


def excess(recipe: Recipe, taken: int) -> str | None:
    """What to say of a process that took more bytes of memory than it was meant to, or None."""
    most, ranks = recipe.max_memory, ranks_beside(recipe)
    if most is None or taken <= most / ranks:
        return None
    return (
        f"the process took {format_size(taken)}, --max-memory is {format_size(most)}"
        f"{f' for {ranks} ranks' * (ranks > 1)}"
    )
