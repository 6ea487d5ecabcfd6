"""What a job will make and take, before it starts: bytes exactly, memory and time from a trial of a few of
its tokens and tensors.

The trial runs the job's own code: no formula knows what a method costs on a machine, and least of all one
that another package brings. It takes seconds: where one block alone would take longer, as those of large
models on a CPU do, its work is counted (:mod:`quant.pipeline.counted`) and the answer says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from quant.accelerator import memory_of, peak_bytes, synchronize
from quant.calibration.parts import part_sizes
from quant.calibration.text import Rows
from quant.checkpoint.dtypes import TORCH
from quant.errors import QuantError
from quant.evaluation.preservation import ROWS, TOKENS
from quant.models.calls import BlockCall
from quant.models.skeleton import Skeleton
from quant.pipeline.activation_store import ActivationStore, Batches, Calls
from quant.pipeline.budget import Placement, place_tensors, scratch_folder
from quant.pipeline.checks import check_disk, check_scratch
from quant.pipeline.counted import BlockWork, Counter
from quant.pipeline.division import waiting_sums
from quant.pipeline.footprint import expert_file_bytes, waiting_bytes
from quant.pipeline.gradients import GradientStream
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.memory import freed_memory_kept, peak_rss
from quant.pipeline.pieces import PieceQuantizer
from quant.pipeline.plan import JobPlan
from quant.pipeline.retry import in_smaller_batches, memory_exhausted
from quant.pipeline.rows import tell_notes
from quant.pipeline.staged import computed, run_block
from quant.progress import Event, Progress, silent
from quant.units import format_size
from quant.vllm.config import text_config

#: Batches of calibration rows that a trial takes through a block: on a CPU as many tokens as the sums of
#: 8-bit products are made of at a time.
_BATCHES = 4
#: Bytes of a trial's activations that stay in memory; what is more goes to a temporary file.
_RESIDENT = 1 << 30
#: Seconds that trying blocks may take, by the count of their work, which blocks of few weights do not need;
#: and weights of one assignment that are tried where nothing needs calibration: more of them take no longer
#: by the weight.
TRIAL_SECONDS, _FEW, _TRIED = 10.0, 1 << 22, 1 << 25
#: Tensors of fp32 logits that comparing two models has at once.
_LOGITS = 6
#: Times that tensors are quantized at the most, and seconds after which it is enough: a tensor takes some
#: hundredths of a second, which a machine's other work may double.
_ROUNDS, _TIMED = 7, 0.5
#: What reading and writing take where nothing else does.
_BUFFERS = 32 << 20
#: Bytes in a second that are read from a disk, and that are hashed, written and read again for verification.
READ, WRITTEN = 1e9, 5e8


@dataclass(frozen=True)
class Cost:
    """What a job takes: ``seconds``, largest resident memory and scratch file in bytes, largest memory on the
    GPU in bytes (0 without one); ``tried``: not counted alone."""

    seconds: float
    peak_rss: int
    scratch: int = 0
    peak_gpu: int = 0
    tried: bool = True


def estimate(plan: JobPlan, progress: Progress = silent) -> dict[str, Any]:
    """The plan as a dict with ``output_bytes`` (exact), and ``scratch_bytes``, ``peak_rss_bytes``,
    ``peak_gpu_bytes``, ``seconds`` and ``tried``.

    Everything that :meth:`QuantizationManager.run` checks before it starts is checked here: the model is
    built without weights and the text is read. One block of each kind (shapes, and what is done to them) is
    quantized with a few batches of tokens, or a few tensors where nothing needs calibration; the results are
    thrown away.

    Raises:
        QuantError: what would stop the job.
    """
    import psutil

    def work(manager: QuantizationManager) -> tuple[int, float, Cost, Placement | None]:
        with memory_exhausted(manager.device):
            return (*_tried(manager, progress), manager.workspace.placement)

    tokens, prepared, cost, placement = in_smaller_batches(
        lambda several: QuantizationManager(plan, batch_tokens=several), work
    )
    value, memory = plan.to_dict(), psutil.virtual_memory()
    read = plan.checkpoint.nbytes / READ
    # without data some tensors are read while others are quantized
    worked = cost.seconds + read if tokens else max(cost.seconds, read)
    seconds = prepared + worked + plan.output_bytes / WRITTEN
    if plan.methods == ["none"]:  # both models are read and run once more, to see that they compute the same
        seconds += 2 * plan.checkpoint.nbytes / READ
        logits = 4 * ROWS * TOKENS * int(text_config(plan.checkpoint.config).get("vocab_size") or 0)
        cost = replace(cost, peak_rss=cost.peak_rss + _LOGITS * logits)
    _check_memory(cost.peak_rss, memory.total)
    if plan.recipe.scratch_dir is None:
        check_disk(plan.recipe.output_path, plan.disk_bytes, cost.scratch)
    else:
        check_disk(plan.recipe.output_path, plan.disk_bytes)
        check_scratch(plan.recipe.scratch_dir, cost.scratch)
    value.update(
        scratch_bytes=cost.scratch, peak_rss_bytes=cost.peak_rss, peak_gpu_bytes=cost.peak_gpu,
        available_bytes=memory.available,
        seconds=round(seconds, 1), tried=cost.tried, calibration_tokens=tokens,
        placement=None if placement is None else placement.to_dict(),
    )  # fmt: skip
    return value


def _tried(manager: QuantizationManager, progress: Progress) -> tuple[int, float, Cost]:
    """Calibration tokens, the seconds until they and the model were there, and what a trial says of the
    work."""
    if not manager.needs:
        manager.workspace.place(place_tensors(manager, manager.workspace.workers))
        with freed_memory_kept():
            return 0, 0.0, _try_linears(manager, progress)
    import psutil

    start = time.perf_counter()
    rows, skeleton = manager.prepare()
    prepared = time.perf_counter() - start
    tell_notes(rows, progress)
    on_cpu = manager.device.type == "cpu"
    there = psutil.virtual_memory().total if on_cpu else memory_of(manager.device)[1]
    _check_memory(_least(manager.plan, skeleton), there)
    by = _of_gradients if manager.plan.gradients else _of_blocks
    # not while rows are read: the job keeps nothing of what that frees, and what it has then decides a budget
    with freed_memory_kept():
        return rows.tokens.numel(), prepared, by(manager, rows, skeleton, progress)


def _check_memory(needed: int, total: int) -> None:
    if needed > total:
        raise QuantError(
            f"the job needs about {format_size(needed)} of memory, the machine has {format_size(total)}: "
            "use fewer --samples or a shorter --sequence-length"
        )


def _least(plan: JobPlan, skeleton: Skeleton) -> int:
    """Bytes that the largest group of linears takes while it is solved, at the least: so much that even the
    trial of a block would fail without."""
    largest = 0
    for block in range(skeleton.block_count):
        for group in skeleton.groups(block):
            if group.experts:  # solved one by one
                group = replace(group, linears=group.linears[:2])
            members = [x for n in group.linears if (x := plan.linears.get(skeleton.block_prefix(block) + n))]
            if members:
                n, k = sum(x.n for x in members), members[0].k
                # fp32 weights, their errors and codes; the Hessian's factor
                largest = max(largest, 9 * n * k + 4 * k * k)
    return largest


def _of_blocks(manager: QuantizationManager, rows: Rows, skeleton: Skeleton, progress: Progress) -> Cost:
    """By a trial of a block of each kind, or by the count of their work where that would take too long."""
    counter, kinds = Counter(manager, skeleton), _kinds(manager.plan, skeleton)
    tried = sum(t.numel() for t in _trial_rows(manager, rows))
    sizes = [sum(p.numel() for p in skeleton.blocks[index].parameters()) for index, _ in kinds]
    if sum(sizes) <= _FEW or sum(counter.block(index, tried).seconds for index, _ in kinds) <= TRIAL_SECONDS:
        return _try_blocks(manager, rows, skeleton, progress)
    tokens = rows.tokens.numel() + (0 if rows.held_out is None else rows.held_out.numel())
    works = [(counter.block(index, tokens), count) for index, count in kinds]
    return _counted(manager, skeleton, tokens, works, len(rows.tokens))


def _counted(
    manager: QuantizationManager,
    skeleton: Skeleton,
    tokens: int,
    works: list[tuple[BlockWork, int]],
    rows: int,
) -> Cost:
    waiting = waiting_bytes(manager, skeleton, tokens, rows)
    resident = min(waiting, manager.workspace.resident_bytes())
    seconds, memory = sum(w.seconds * count for w, count in works), max(w.memory for w, _ in works)
    filed = expert_file_bytes(manager, skeleton, tokens)
    if manager.device.type != "cpu":
        return Cost(seconds, peak_rss() + waiting - resident, 0, memory + resident, tried=False)
    return Cost(seconds, peak_rss() + memory + resident, waiting - resident + filed, tried=False)


def _of_gradients(manager: QuantizationManager, rows: Rows, skeleton: Skeleton, progress: Progress) -> Cost:
    """Of a job that takes gradients: the inputs of all blocks wait at once."""
    plan = manager.plan
    total = rows.tokens.numel() + (0 if rows.held_out is None else rows.held_out.numel())
    trial = _trial_rows(manager, rows)
    tried = sum(t.numel() for t in trial)
    counter, kinds = Counter(manager, skeleton), _kinds(plan, skeleton)
    few = sum(p.numel() for index, _ in kinds for p in skeleton.blocks[index].parameters()) <= _FEW
    there = few or sum(counter.block(index, tried).seconds for index, _ in kinds) <= TRIAL_SECONDS
    store, seconds, most = _trial_store(manager), 0.0, 0
    try:
        stream = GradientStream(skeleton, trial, None, store, plan.recipe.seed, manager.draws)
        start = time.perf_counter()
        with skeleton.outside():
            read = time.perf_counter() - start
            seen = stream.time_logits()
        seconds += read + seen * total
        if there:
            for number, (index, several) in enumerate(kinds):
                progress(Event("trial", number, len(kinds)))
                passed, solved = _try_gradients(manager, skeleton, stream, index)
                seconds += several * (passed * total / tried + solved)
        else:
            found = [(counter.block(index, total), several) for index, several in kinds]
            seconds += sum(work.seconds * several for work, several in found)
            most = max(work.memory for work, _ in found)
        width = stream.width
    finally:
        store.close()
    waiting = waiting_bytes(manager, skeleton, total, len(rows.tokens), width)
    resident = min(waiting, manager.workspace.resident_bytes())
    if manager.device.type != "cpu":
        peak = peak_bytes(manager.device) if there else most
        return Cost(seconds, peak_rss() + waiting - resident, 0, peak + resident, there)
    filed = expert_file_bytes(manager, skeleton, total)
    peak = peak_rss() + most + max(resident - store.most, 0)
    return Cost(seconds, peak, waiting - resident + filed, tried=there)


def _try_gradients(
    manager: QuantizationManager, skeleton: Skeleton, stream: GradientStream, index: int
) -> tuple[float, float]:
    """Seconds of the passes of the trial's tokens through one block, and of reading and quantizing it."""
    plan = manager.plan
    start = time.perf_counter()
    block = skeleton.load_block(index)
    loaded = time.perf_counter() - start
    seen = manager.blocks.to_be_seen(skeleton, index)
    start = time.perf_counter()
    stream.forward(index, block)
    stream.drop_outputs()
    stream.backward(index, block, seen)
    passed = time.perf_counter() - start
    before, start = manager.clock.seconds["statistics"], time.perf_counter()
    made = manager.blocks.quantize_seen(skeleton, index, block, seen, manager.blocks.shown(seen))
    # experts' tokens go through them here
    summed = manager.clock.seconds["statistics"] - before
    for name, tensor in made.linears.items():
        plan.format.pack(plan.linears[name], tensor, TORCH[plan.dtype])
    solved = time.perf_counter() - start
    skeleton.free_block(index)
    return passed + summed, 2 * loaded + solved - summed


def _trial_store(manager: QuantizationManager) -> ActivationStore:
    """Where a trial's activations wait, in a job with a budget within that."""
    folder = scratch_folder(manager.plan.recipe.scratch_dir)
    room = manager.workspace
    resident = _RESIDENT if room.placement is None else min(_RESIDENT, room.resident_bytes())
    return ActivationStore(resident, None, folder)


def _trial_rows(manager: QuantizationManager, rows: Rows) -> list[torch.Tensor]:
    """The batches that a trial takes through a block: the first of the job's own, which are small where a
    part of the rows is."""
    batches, held_out, _ = manager.workspace.share(rows)
    each = manager.workspace.batch_rows(rows.tokens.shape[1])
    before = accumulate(map(len, batches), initial=0)
    return [b for b, n in zip(batches[:held_out], before, strict=False) if n < _BATCHES * each]


def _try_blocks(manager: QuantizationManager, rows: Rows, skeleton: Skeleton, progress: Progress) -> Cost:
    """Quantizes one block of each kind with a few batches of rows.

    Passes and statistics take time by the token, solves by the block. Each block starts from the embedded
    tokens, whatever its place.
    """
    plan, device, clock = manager.plan, manager.device, manager.clock
    length = rows.tokens.shape[1]
    trial = _trial_rows(manager, rows)
    held_out = None if rows.held_out is None else len(trial)
    tried, tokens = sum(t.numel() for t in trial), rows.tokens.numel()
    extra = length if rows.held_out is not None else 0
    ahead = extra or min(len(t) for t in trial) * length  # a batch of the fewest rows
    share = (tokens + extra + ahead) / (tried + extra + ahead)
    kinds = _kinds(plan, skeleton)
    seconds, most, kept = 0.0, 0, 0
    calls: list[list[BlockCall]] = []
    start = time.perf_counter()
    texts = [*trial, *([rows.held_out] if rows.held_out is not None else [])]
    embedding = skeleton.embedded(texts, calls.append)
    embedded = [next(embedding)]  # reads embeddings and head, once in a job
    first = time.perf_counter() - start
    start = time.perf_counter()
    embedded += embedding
    others = tried + extra - trial[0].numel()
    seconds += first + (
        (time.perf_counter() - start) * (tokens + extra - trial[0].numel()) / others if others else 0.0
    )
    for number, (index, count) in enumerate(kinds):
        progress(Event("trial", number, len(kinds)))
        store = _trial_store(manager)
        try:
            skeleton.give_state(index, embedded, calls)
            batches = Batches(store, (h.clone() for h in embedded))
            block_calls = Calls(store, calls)
            start = time.perf_counter()
            block = skeleton.load_block(index)
            loaded = time.perf_counter() - start
            with computed(block):
                # kernels are loaded and memory is claimed, once in a job
                run_block(block, index, batches, block_calls)
            synchronize(device)
            clock.seconds.clear()
            start = time.perf_counter()
            made = manager.blocks.quantize(
                skeleton, index, block, batches, block_calls, store, held_out, need_outputs=True
            )
            solved = clock.seconds["solve"]
            passed = time.perf_counter() - start - solved
            start = time.perf_counter()
            for name, tensor in made.linears.items():
                plan.format.pack(plan.linears[name], tensor, TORCH[plan.dtype])
            packed = time.perf_counter() - start
            seconds += count * (loaded + passed * share + solved + packed)
            most, kept = max(most, store.most), store.resident
            skeleton.free_block(index)
            del made, block, batches
        finally:
            store.close()
    waiting = int(most * (tokens + extra) / (tried + extra)) + waiting_sums(
        plan, len(part_sizes(len(rows.tokens)))
    )
    resident = min(waiting, manager.workspace.resident_bytes())
    if device.type != "cpu":
        return Cost(
            seconds,
            peak_rss() + waiting - resident,
            0,
            peak_bytes(device) + max(resident - most, 0),
        )
    filed = expert_file_bytes(manager, skeleton, tokens + extra)
    return Cost(seconds, peak_rss() + resident - min(most, kept), waiting - resident + filed)


def _kinds(plan: JobPlan, skeleton: Skeleton) -> list[tuple[int, int]]:
    """The first block of each kind, and how many there are of it: blocks of the same shapes to whose linears
    the same is done."""
    alike: dict[Hashable, list[int]] = {}
    for index in range(skeleton.block_count):
        prefix = skeleton.block_prefix(index)
        shapes = tuple((n, p.shape) for n, p in skeleton.blocks[index].named_parameters())
        done = tuple(plan.assignments.get(prefix + n.removesuffix(".weight")) for n, _ in shapes)
        alike.setdefault((shapes, done), []).append(index)
    return [(blocks[0], len(blocks)) for blocks in alike.values()]


def _try_linears(manager: QuantizationManager, progress: Progress) -> Cost:
    """Quantizes some linears of each assignment, as many at once as the job does; the others take as long by
    the weight, and as much memory."""
    plan, seconds, most = manager.plan, 0.0, 0
    threads = torch.get_num_threads()
    workers = manager.workspace.workers
    members: dict[Hashable, list[str]] = {}
    for name in plan.linears:
        members.setdefault(plan.assignments[name], []).append(name)

    def weights(name: str) -> int:
        return plan.linears[name].n * plan.linears[name].k

    def make(pieces: PieceQuantizer, name: str) -> int:
        """Bytes that a linear holds in the end, as codes and as packed tensors."""
        made = pieces.quantize(name)
        packed = plan.format.pack(plan.linears[name], made, TORCH[plan.dtype])
        return made.codes.nbytes + sum(t.nbytes for t in packed.values())

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for number, names in enumerate(members.values()):
                progress(Event("trial", number, len(members)))
                chosen = _some(names, weights, workers)
                # kernels are loaded and memory is claimed, once in a job
                held = [*pool.map(partial(make, manager.pieces), chosen)]
                rounds = list[float]()
                while len(rounds) < _ROUNDS and sum(rounds) < _TIMED:
                    fresh = PieceQuantizer(plan, manager.quantizers, manager.device, manager.records)
                    start = time.perf_counter()
                    list(pool.map(partial(make, fresh), chosen))
                    rounds.append(time.perf_counter() - start)
                tried = sum(map(weights, chosen))
                seconds += median(rounds) * sum(map(weights, names)) / tried
                largest = sum(sorted(map(weights, names))[-workers:])
                most = max(most, sum(held) * (largest - tried) // tried)
    finally:
        torch.set_num_threads(threads)
    on_gpu = manager.device.type != "cpu"
    gpu = peak_bytes(manager.device) + max(most, 0) if on_gpu else 0
    return Cost(seconds, peak_rss() + _BUFFERS + max(most, 0), 0, gpu)


def _some(names: list[str], weights: Callable[[str], int], workers: int) -> list[str]:
    """The largest linears that are tried in seconds, one for each worker; the smallest where all are
    larger."""
    sizes = sorted(names, key=weights)
    small = [n for n in sizes if weights(n) * workers <= _TRIED]
    return small[-workers:] or sizes[:1]
