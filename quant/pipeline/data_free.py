"""The loop of jobs that need no data: tensor by tensor through the files."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch

from quant.pipeline.division import shared_out
from quant.pipeline.group_solves import BlockResult
from quant.pipeline.layout import Unit
from quant.pipeline.units import UnitWriter, Work

#: Units at once, of which one may be waiting for the disk.
UNITS_UNDER_WAY = 2


def quantize_tensors(writer: UnitWriter, work: Work, several: int) -> None:
    """Quantizes and writes all units of the writer's plan that are not finished, ``several`` tensors at a
    time. No module is built, so any architecture goes through.

    Each worker quantizes, hashes and writes one tensor at a time on one thread, whose pieces stay in the
    cache of its core; threads that shared a piece would wait for each other, for long where others use
    the cores too. The workers go on with the next unit while one is synced.
    """
    ranks, threads = writer.ranks, torch.get_num_threads()
    torch.set_num_threads(1)
    under_way_at_once = UNITS_UNDER_WAY if several > 1 else 1
    workers, writers = ThreadPoolExecutor(several), ThreadPoolExecutor(under_way_at_once)
    units = [u for u in writer.plan.units if u.name not in work.finished]
    owner = dict(zip((u.name for u in units), shared_out(units, ranks.size), strict=True))

    def start(unit: Unit) -> Future[dict[Path, str]]:
        """Starts a unit once its room on the disk is claimed: what a full disk leaves finished are then
        the first units."""
        claimed = threading.Event()
        files = writers.submit(writer.files, unit, work, BlockResult(), workers, claimed.set)
        files.add_done_callback(lambda _: claimed.set())  # or it has failed
        claimed.wait()
        return files

    try:
        ahead = (start(u) for u in units if owner[u.name] == ranks.rank)
        under_way = deque(islice(ahead, 1))
        for unit in writer.under_way(work, writer.plan.units):
            if unit.name not in owner:
                continue
            with writer.clock.phase("write"):
                if owner[unit.name] == ranks.rank:
                    under_way.extend(islice(ahead, 1))
                    files = under_way.popleft().result()
                    made = files, writer.facts_of(unit)
                elif ranks.first:
                    made = ranks.receive(owner[unit.name])
                else:
                    continue
                writer.hand_in(unit, work, *made)
    finally:
        # after an error or an interrupt: ends the units under way
        workers.shutdown(wait=False, cancel_futures=True)
        writers.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
