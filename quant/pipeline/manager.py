"""The one loop: read a block, run it, quantize its linears, write it, free it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from quant import defaults
from quant.accelerator import (
    device_name,
    forget_peak,
    limit_memory,
    memory_of,
    of_kind,
    peak_bytes,
)
from quant.calibration.parts import part_sizes
from quant.calibration.statistics import gram_for
from quant.calibration.text import Rows
from quant.checkpoint.dtypes import TORCH
from quant.checkpoint.header import read_header
from quant.checkpoint.journal import FollowedFolder, WorkFolder, work_path
from quant.checkpoint.reader import Checkpoint
from quant.errors import (
    DeviceMemoryExhausted,
    NoGradients,
    QuantError,
    SourceFault,
    UsageError,
    VerificationFailed,
)
from quant.evaluation.preservation import preservation
from quant.evaluation.verify import verify
from quant.formats import Contents
from quant.formats.reading import read_linear, read_stack, read_weight
from quant.models.account import LARGEST_REST
from quant.models.attention import observed_attention
from quant.models.ignored_keys import ignored_note
from quant.models.products import bf16_is_slow
from quant.models.skeleton import Skeleton
from quant.pipeline.activation_store import ActivationStore, Batches, Calls
from quant.pipeline.blocks import BlockQuantizer
from quant.pipeline.budget import Placement, place_blocks, place_tensors, scratch_folder
from quant.pipeline.division import ranks_problem, share, shared_out
from quant.pipeline.folding import unfolded
from quant.pipeline.gradients import GradientStream, gradient_problem
from quant.pipeline.group_solves import BlockResult
from quant.pipeline.layout import Unit
from quant.pipeline.memory import freed_memory_kept, give_back, peak_rss
from quant.pipeline.methods import make_quantizer, suppressor_of
from quant.pipeline.pieces import PieceQuantizer
from quant.pipeline.plan import JobPlan
from quant.pipeline.ranks import ALONE, Ranks, devices_of, ranks_beside
from quant.pipeline.records import Clock, Records
from quant.pipeline.rows import job_rows, tell_notes
from quant.pipeline.source import carried
from quant.pipeline.staged import computed, run_block
from quant.pipeline.writing import write_rest, write_unit
from quant.progress import Event, Progress, silent
from quant.quantizers.products import onednn_is_faster
from quant.report.files import write_report
from quant.report.value import Provenance, Quantization, Report, TensorsAccount
from quant.tensors import QuantizedTensor
from quant.units import format_seconds, format_share, format_size
from quant.vllm.arguments import engine_arguments, vllm_config
from quant.vllm.cache import KV_CACHE
from quant.vllm.config import model_types, text_config, without_quantization

#: Tokens of one batch: large enough for full speed of the matrix products, small enough that a batch's
#: activations are few.
BATCH_TOKENS = {"cpu": 2048, "accelerator": 16384}
#: Bytes of calibration activations that a CPU run keeps in memory. The rest goes to a scratch file, which the
#: page cache holds where there is room.
RESIDENT_CPU = 256 << 20
#: Tensors that a job without data works on at once, and so has in memory, on as many cores; and units, of
#: which one may be waiting for the disk.
MOST_WORKERS, UNITS_UNDER_WAY = 4, 2
#: Keys of a recipe that say which text is read.
CALIBRATION = frozenset(
    {
        "calibration_dataset",
        "samples",
        "gradient_samples",
        "sequence_length",
        "shuffle",
        "chat_template",
        "seed",
    }
)


#: The work folder, of whoever holds it or works for that process.
Work = WorkFolder | FollowedFolder


class QuantizationManager:
    """Runs one planned job.

    >>> manager = QuantizationManager(plan_job(recipe))  # doctest: +SKIP
    >>> report = manager.run()  # doctest: +SKIP

    The block loop is :meth:`_calibrated` for methods that need statistics, and what it does with a block is
    :class:`BlockQuantizer`; the loop of those that need none is :meth:`_data_free`, and what it does with a
    tensor :class:`PieceQuantizer`.

    Args:
        command: the words that were typed, for the report.
        batch_tokens: calibration tokens that go through a block together; None: as many as suit the device.
        ranks: which process this is of those that share the job.
    """

    def __init__(
        self,
        plan: JobPlan,
        progress: Progress = silent,
        command: Sequence[str] | None = None,
        batch_tokens: int | None = None,
        ranks: Ranks = ALONE,
    ):
        self.ranks = ranks
        self.plan, self.progress, self.command = plan, progress, command
        recipe = plan.recipe
        if recipe.backend != defaults.ENGINE:
            raise UsageError(
                f"--backend is {recipe.backend!r}: this is the native one, quant.quantize runs the others"
            )
        self.quantizers = {a: make_quantizer(a) for a in dict.fromkeys(plan.assignments.values())}
        self.suppressors = {a: suppressor_of(a, recipe.alpha) for a in self.quantizers}
        self.device = ranks.device or devices_of(recipe)[0]
        self.batch_tokens = batch_tokens or of_kind(BATCH_TOKENS, self.device)
        self.clock, self.records = Clock(), Records(plan, progress)
        self.pieces = PieceQuantizer(plan, self.quantizers, self.device, self.records)
        self.blocks = BlockQuantizer(
            plan, self.quantizers, self.suppressors, self.pieces.quantize, self.records, self.clock, ranks
        )
        self.scratch_bytes = 0
        self.placement: Placement | None = None  # of a budget, once it is decided
        self._scratch = scratch_folder(recipe.scratch_dir)
        limit_memory(self.device, recipe.max_gpu_memory)
        self._calibration = (0, 0)  # rows, and tokens of each

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that anything in the job asks for; empty where no calibration is needed."""
        return self.blocks.needs

    @property
    def draws(self) -> int:
        """Gradients that are drawn at the logits for each row: as many as any method asks for."""
        return max((getattr(q, "draws", 1) for q in self.quantizers.values()), default=1)

    def run(self) -> Report:
        """Quantizes, writes, verifies, publishes; returns the report.

        Raises:
            QuantError: with finished work kept for the next run of the same command, unless the fault is
                the source's.
        """
        start = time.perf_counter()
        forget_peak(self.device)
        for note in self.plan.notes:
            self.progress(Event("plan", message=note, warning=True))
        rows, skeleton = self._prepared()
        if rows is None and (unused := sorted(CALIBRATION & self.plan.recipe.model_fields_set)):
            named = ", ".join(f"--{k.replace('_', '-')}" for k in unused)
            self.progress(
                Event(
                    "text",
                    message=f"{named}: not used, nothing in this job needs calibration text",
                    warning=True,
                )
            )
        for reason in dict.fromkeys(self.plan.left.values()):
            names = [n for n, r in self.plan.left.items() if r == reason]
            message = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
            self.progress(Event("quantize", message=f"left in 16 bits: {message}: {reason}", warning=True))
        work = WorkFolder(
            self.plan.recipe.output_path.absolute(), self.fingerprint(rows), self.plan.recipe.fresh
        )
        try:
            self.ranks.agree(self._facts(rows))
            self.ranks.told(work.finished)
            for entry in work.finished.values():
                self.records.restore(entry)
            if work.finished:
                self.progress(
                    Event(
                        "quantize",
                        message=f"resuming: {len(work.finished)} of {len(self.plan.units)} units are "
                        "finished",
                    )
                )
            kept = "; finished blocks are kept, but other settings start over"
            with self.clock.phase("quantize"), freed_memory_kept(), memory_exhausted(self.device, kept):
                self._work(rows, skeleton, work)
            report = self._finish(work, rows, start)
            work.publish()
            self._tell_excess(report)
        except SourceFault:
            work.abandon()
            raise
        finally:
            work.release()
        return report

    def _tell_excess(self, report: Report) -> None:
        """Says where the process took more than it was meant to."""
        most, ranks = self.plan.recipe.max_memory, ranks_beside(self.plan.recipe)
        if most is not None and report.peak_rss_bytes > most / ranks:
            message = (
                f"the process took {format_size(report.peak_rss_bytes)}, --max-memory is {format_size(most)}"
                f"{f' for {ranks} ranks' * (ranks > 1)}"
            )
            self.progress(Event("quantize", message=message, warning=True))

    def follow(self) -> None:
        """This process's part of a job whose rank 0 is in :meth:`run`, which writes all that is made.

        Raises:
            QuantError: with finished work kept by rank 0.
        """
        rows, skeleton = self._prepared()
        self.ranks.agree(self._facts(rows))
        output = self.plan.recipe.output_path.absolute()
        work = FollowedFolder(work_path(output), self.ranks.told({}))
        for entry in work.finished.values():
            self.records.restore(entry)
        with freed_memory_kept(), memory_exhausted(self.device):
            self._work(rows, skeleton, work)

    def _work(self, rows: Rows | None, skeleton: Skeleton | None, work: Work) -> None:
        """All that is left to do between the first unit and the last."""
        if rows is not None and skeleton is not None:
            (self._by_gradients if self.plan.gradients else self._calibrated)(skeleton, rows, work)
        else:
            self._data_free(work)

    def _facts(self, rows: Rows | None) -> dict[str, Any]:
        """What decides the output's bytes and must be alike for all ranks: the source is read by each."""
        facts = self.fingerprint(rows)
        return {k: facts[k] for k in ("calibration", "torch", "device", "threads", "instructions")}

    def _prepared(self) -> tuple[Rows, Skeleton] | tuple[None, None]:
        """What :meth:`prepare` gives where anything needs calibration; how a budget is kept where nothing
        does."""
        if self.needs:
            return self.prepare()
        self.placement = place_tensors(self, worker_count(torch.get_num_threads()))
        return None, None

    def prepare(self) -> tuple[Rows, Skeleton]:
        """Calibration rows and the model without weights.

        Raises:
            QuantError: too little text, a model that cannot be run block by block, or linears that no group
                of the model's adapter has.
        """
        self.progress(Event("text"))
        with self.clock.phase("text"):
            rows = job_rows(self.plan)
        if self.smaller:
            several = self.batch_rows(rows.tokens.shape[1])
            note = f"{self.device} ran out of memory: rows go through blocks by {several}"
            rows = replace(rows, notes=(*rows.notes, note))
        self._calibration = (len(rows.tokens), rows.tokens.shape[1])
        skeleton = Skeleton(self.plan.checkpoint, self.device)
        if problem := ranks_problem(self.plan, skeleton, len(rows.tokens)):
            raise UsageError(problem)
        if ignored := ignored_note(text_config(self.plan.checkpoint.config), skeleton.config):
            rows = replace(rows, notes=(*rows.notes, ignored))
        tell_notes(rows, self.progress)
        known = {
            skeleton.block_prefix(b) + n
            for b in range(skeleton.block_count)
            for group in skeleton.groups(b)
            for n in group.linears
        }
        if any(self.suppressors.values()):
            for index in range(skeleton.block_count):
                skeleton.sourced_groups(index)
        if problem := unseen_problem(self.plan, skeleton, known):
            raise QuantError(problem)
        if self.plan.gradients:
            self.progress(Event("text", detail="gradients through a block of each kind"))
            with memory_exhausted(self.device):
                problem = gradient_problem(skeleton, lambda i: self.blocks.to_be_seen(skeleton, i))
            if problem:
                asking = [a.method for a, q in self.quantizers.items() if "gradients" in q.needs]
                raise NoGradients(problem, asking[0])
        self.placement = place_blocks(self, rows, skeleton)
        if self.placement is not None and self.placement.batch_rows < self.placement.usual_rows:
            few, many = self.placement.batch_rows, self.placement.usual_rows
            self.batch_tokens = few * rows.tokens.shape[1]
            note = f"the budget of memory lets {few} rows through a block together instead of {many}"
            rows = replace(rows, notes=(*rows.notes, note))
            self.progress(Event("text", message=note, warning=True))
        return rows, skeleton

    def fingerprint(self, rows: Rows | None) -> dict[str, Any]:
        """What decides the output's bytes."""
        source = {
            f.name: [f.stat().st_size, f.stat().st_mtime_ns]
            for f in [*self.plan.checkpoint.weight_files, self.plan.checkpoint.path / "config.json"]
        }
        return {
            "source": {"path": str(self.plan.checkpoint.path.absolute()), "files": source},
            "settings": {k: v for k, v in self.plan.recipe.settings().items() if k != "device"},
            "calibration": rows.digest if rows else None,
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "instructions": f"{torch.backends.cpu.get_cpu_capability()}, "
            f"{gram_for(1, self.device).__class__.__name__}{', oneDNN' if onednn_is_faster() else ''}"
            f"{', bf16 by fp32' if bf16_is_slow() else ''}"
            if self.device.type == "cpu"
            else device_name(self.device),
        }

    # --- methods that need statistics -----------------------------------------------------------------------

    def _calibrated(self, skeleton: Skeleton, rows: Rows, work: Work) -> None:
        """The block loop. On screen as a whole on purpose: every calibrated method goes through these
        lines."""
        store = self.store(work.path)
        try:
            self.progress(Event("quantize", detail="embedding"))
            with self.clock.phase("embed"):
                each = self.batch_rows(rows.tokens.shape[1])
                tokens, held_out, parts = share(rows, each, self.ranks)
                calls = Calls(store)
                batches = Batches(store, skeleton.embedded(tokens, calls.append))
            for unit in self._units(work, self.plan.units):
                if unit.block is None or unit.block >= skeleton.block_count:
                    if unit.name not in work.finished:
                        self._write(unit, work, BlockResult())
                    continue
                last = unit.block == skeleton.block_count - 1
                if unit.name in work.finished:
                    if not last:
                        with self.clock.phase("replay"):
                            block = skeleton.load_block(unit.block, self._finished_weights(unit, work))
                            with computed(block):
                                run_block(block, unit.block, batches, calls)
                else:
                    with self.clock.phase("load"):
                        block = skeleton.load_block(unit.block)
                    made = self.blocks.quantize(
                        skeleton,
                        unit.block,
                        block,
                        batches,
                        calls,
                        store,
                        held_out,
                        need_outputs=not last,
                        parts=parts,
                    )
                    self._write(unit, work, made)
                skeleton.free_block(unit.block)
                give_back()  # what the pass has freed, beside what the next block takes
        finally:
            self.scratch_bytes = store.spilled_bytes
            store.close()

    def _by_gradients(self, skeleton: Skeleton, rows: Rows, work: Work) -> None:
        """The loop of methods that need gradients of the whole model: forward through the blocks, then back,
        each quantized as the gradients come through it. See :mod:`quant.pipeline.gradients`."""
        store = self.store(work.path)
        blocks = {u.block: u for u in self.plan.units if u.block is not None}
        count = skeleton.block_count
        try:
            self.progress(Event("quantize", detail="embedding"))
            tokens, held_out = self.batches(rows)
            with self.clock.phase("embed"):
                seed, draws = self.plan.recipe.seed, self.draws
                stream = GradientStream(skeleton, tokens, held_out, store, seed, draws)
            # nothing is to be learned of blocks before the first that is left to do
            todo = [i for i in range(count) if i not in blocks or blocks[i].name not in work.finished]
            caches = {}
            for index in range(count) if todo else ():
                self.progress(Event("quantize", index, 2 * count, detail=f"forward through block {index}"))
                with self.clock.phase("forward"):
                    block, made = skeleton.load_block(index), BlockResult()
                    wanted = [spec.name for spec in blocks[index].made] if index in blocks else []
                    observing = observed_attention(block, made.observe_cache) if wanted else None
                    stream.forward(index, block, observing)
                    made.finish_cache(wanted)
                    caches[index] = made.changed
                    skeleton.free_block(index)
                give_back()
            if todo:
                self.progress(Event("quantize", count, 2 * count, detail="gradients at the logits"))
                with self.clock.phase("logits"):
                    stream.at_logits()
            backwards = sorted(self.plan.units, key=lambda u: _place_from_the_end(u.block, count))
            for unit in self._units(work, backwards):
                if unit.block is None or unit.block >= count:
                    if unit.name not in work.finished:
                        self._write(unit, work, BlockResult())
                    continue
                index = unit.block
                if not todo or index < todo[0]:
                    continue
                block, finished = skeleton.load_block(index), unit.name in work.finished
                seen = None if finished else self.blocks.to_be_seen(skeleton, index, store.folder)
                with self.clock.phase("backward"):
                    stream.backward(index, block, seen)
                if seen is not None:
                    made = self.blocks.quantize_seen(skeleton, index, block, seen)
                    made.changed |= caches.pop(index)
                    self._write(unit, work, made)
                skeleton.free_block(index)
                give_back()
        finally:
            self.scratch_bytes = store.spilled_bytes
            store.close()

    def batches(self, rows: Rows) -> tuple[list[torch.Tensor], int | None]:
        """The batches that go through the blocks, and which of them is the held-out row."""
        tokens = [*rows.tokens.split(self.batch_rows(rows.tokens.shape[1]))]
        held_out = None if rows.held_out is None else len(tokens)
        return [*tokens, *([rows.held_out] if rows.held_out is not None else [])], held_out

    def smaller_batch(self) -> int | None:
        """Tokens of half a batch; None where a batch is a single row, or there are none."""
        rows, length = self._calibration
        most = rows if self.plan.gradients else max(part_sizes(rows), default=0)
        several = min(self.batch_rows(length), most) if rows else 0
        return several // 2 * length if several > 1 else None

    @property
    def smaller(self) -> bool:
        """Whether batches are smaller than suits the device, because its memory has run out."""
        return self.batch_tokens < of_kind(BATCH_TOKENS, self.device)

    def batch_rows(self, length: int) -> int:
        """Calibration rows of so many tokens that go through a block together."""
        return max(1, self.batch_tokens // length)

    def _finished_weights(self, unit: Unit, work: Work) -> dict[str, torch.Tensor]:
        """Dequantized weights of a finished block, read back from its shards."""
        headers = {
            name: info
            for shard in unit.shards
            for name, info in read_header(work.path / shard.file)[0].items()
        }
        written = Checkpoint(work.path, {}, headers)
        config = output_config(self.plan, self._method_settings()).get("quantization_config")
        if config is None:
            weights = {
                t.spec.name: written.read(t.spec.name)
                for s in unit.shards
                for t in s.tensors
                if t.linear is not None or t.linears
            }
        else:
            layers = self.plan.format.find(config, headers)
            weights = {
                f"{name}.weight": read_weight(self.plan.format, layers, written, name)
                for name in layers.linears
            }
            weights |= {name: read_stack(stack, written) for name, stack in layers.stacks.items()}
        names = {n for s in unit.shards for t in s.tensors for n in (t.linear, *t.linears) if n}
        unfolded(
            weights,
            [fold for fold in self.records.folds.values() if names & set(fold.linears)],
            self.plan.checkpoint,
            written,
            self.plan.refs,
        )
        return weights

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

    # --- methods that need no data --------------------------------------------------------------------------

    def _data_free(self, work: Work) -> None:
        """Tensor by tensor through the files; no module is built, so any architecture goes through.

        Each worker quantizes, hashes and writes one tensor at a time on one thread, whose pieces stay in the
        cache of its core; threads that shared a piece would wait for each other, for long where others use
        the cores too. The workers go on with the next unit while one is synced.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        several = worker_count(threads) if self.placement is None else self.placement.workers
        under_way_at_once = UNITS_UNDER_WAY if several > 1 else 1
        workers, writers = ThreadPoolExecutor(several), ThreadPoolExecutor(under_way_at_once)
        units = [u for u in self.plan.units if u.name not in work.finished]
        owner = dict(zip((u.name for u in units), shared_out(units, self.ranks.size), strict=True))

        def start(unit: Unit) -> Future[dict[Path, str]]:
            """Starts a unit once its room on the disk is claimed: what a full disk leaves finished are then
            the first units."""
            claimed = threading.Event()
            files = writers.submit(self._files, unit, work, BlockResult(), workers, claimed.set)
            files.add_done_callback(lambda _: claimed.set())  # or it has failed
            claimed.wait()
            return files

        try:
            ahead = (start(u) for u in units if owner[u.name] == self.ranks.rank)
            under_way = deque(islice(ahead, 1))
            for unit in self._units(work, self.plan.units):
                if unit.name not in owner:
                    continue
                with self.clock.phase("write"):
                    if owner[unit.name] == self.ranks.rank:
                        under_way.extend(islice(ahead, 1))
                        files = under_way.popleft().result()
                        made = files, self._facts_of(unit)
                    elif self.ranks.first:
                        made = self.ranks.receive(owner[unit.name])
                    else:
                        continue
                    self._hand_in(unit, work, *made)
        finally:
            # after an error or an interrupt: ends the units under way
            workers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    # --- shared ---------------------------------------------------------------------------------------------

    def _units(self, work: Work, units: Sequence[Unit]) -> Iterator[Unit]:
        for number, unit in enumerate(units):
            start, before = time.perf_counter(), unit.name in work.finished
            self.progress(Event("quantize", number, len(units), detail=_shown(unit)))
            yield unit
            errors = [
                layer.error
                for layer in self.records.layers.values()
                if layer.unit == unit.name and layer.error is not None
            ]
            error = f", relative error {format_share(max(errors))} at most" if errors else ""
            self.progress(
                Event(
                    "quantize",
                    number + 1,
                    len(units),
                    message=f"{_shown(unit)} {'replayed' if before else 'written'} in "
                    f"{format_seconds(time.perf_counter() - start)}{error}",
                )
            )

    def _write(self, unit: Unit, work: Work, made: BlockResult) -> None:
        """Writes a unit and notes that it is finished; rank 0 does."""
        if not isinstance(work, WorkFolder):
            return
        with self.clock.phase("write"):
            files = self._files(unit, work, made)
            self._hand_in(unit, work, files, self._facts_of(unit))

    def _files(
        self,
        unit: Unit,
        work: Work,
        made: BlockResult,
        workers: Executor | None = None,
        claimed: Callable[[], object] = lambda: None,
    ) -> dict[Path, str]:
        """Writes a unit's files, and returns each one's digest; linears that are not in ``made`` are
        quantized now."""

        def produce(name: str) -> QuantizedTensor:
            if (source := plan.source) is not None and name in plan.kept:
                stored = read_linear(source.layers.form, source.layers, source.checkpoint, name)
                return carried(stored, plan.kept[name], TORCH[plan.dtype])[0]
            return made.linears.pop(name) if name in made.linears else self.pieces.quantize(name)

        plan = self.plan
        return write_unit(
            unit,
            work.path,
            plan.checkpoint,
            plan.format,
            plan.written,
            plan.refs,
            plan.dtype,
            produce,
            made.changed,
            workers,
            claimed,
        )

    def _facts_of(self, unit: Unit) -> dict[str, Any]:
        """What the journal says of a unit beside its files."""
        written = {n for s in unit.shards for t in s.tensors for n in (t.linear, *t.linears) if n}
        return self.records.of(unit.name, sorted(written & set(self.plan.linears)))

    def _hand_in(self, unit: Unit, work: Work, files: Mapping[Path, str], facts: Mapping[str, Any]) -> None:
        """Puts a unit whose files are written and synced into the journal, which rank 0 has."""
        if isinstance(work, WorkFolder):
            self.records.restore(facts)
            work.finish_unit(unit.name, files, facts)
        else:
            self.ranks.send((files, facts), 0)

    def _finish(self, work: WorkFolder, rows: Rows | None, start: float) -> Report:
        """Side files, index, config, static verification, report."""
        plan, checkpoint = self.plan, self.plan.checkpoint
        with self.clock.phase("finish"):
            config = output_config(plan, self._method_settings())
            arguments = engine_arguments(config, tensor_parallel=plan.recipe.tensor_parallel)
            dropped = write_rest(work.path, checkpoint, plan.units, plan.format, config, arguments)
        self.progress(Event("verify"))
        with self.clock.phase("verify"):
            changed = sorted({n for f in self.records.folds.values() for n in f.changed})
            made = sorted({t.name for u in plan.units for t in u.made})
            verification = verify(
                work.path,
                tensor_parallel=plan.recipe.tensor_parallel,
                source=checkpoint.path,
                target=plan.recipe.target,
                vllm_version=plan.recipe.vllm_version,
                served=plan.format.quant_method is not None,
                changed=changed,
                made=made,
            )
            if verification.failed:
                raise VerificationFailed(
                    f"{work.path}: the output failed its own verification: "
                    f"{'; '.join(verification.failed[:5])}. It was not published; --fresh makes it anew"
                )
            preserved = (
                preservation(checkpoint.path, work.path, self.device) if plan.methods == ["none"] else None
            )
            if preserved is not None and not preserved.preserved:
                raise VerificationFailed(
                    f"{work.path}: the output is another function than the source: KL {preserved.kl:.2g} "
                    f"nats per token, logits differ by {preserved.difference:.2%} at most. It was not "
                    "published"
                )
        report = Report(
            output_path=str(plan.recipe.output_path),
            source_path=str(checkpoint.path),
            format=plan.format.name,
            source_bytes=checkpoint.nbytes,
            output_bytes=plan.output_bytes,
            seconds={k: round(v, 3) for k, v in self.clock.seconds.items()}
            | {"total": round(time.perf_counter() - start, 3)},
            peak_rss_bytes=peak_rss(),
            side_files_dropped=tuple(dropped),
            vllm=vllm_config(arguments),
            # where it is published
            verify=verification.to_dict() | {"path": str(plan.recipe.output_path)},
            output_hash=verification.content_hash,
            quantization=Quantization(
                method=plan.recipe.method,
                methods=tuple(plan.methods),
                scheme=plan.scheme_dict(),
                target=plan.recipe.target,
                settings=plan.recipe.settings(),
                bits_per_weight=plan.bits_per_weight,
                calibration=None if rows is None else rows.to_dict(),
                layers=tuple(self.records.layers[name] for name in plan.linears),
                tensors=TensorsAccount(
                    quantized=tuple(f"{n}.weight" for n in plan.linears),
                    copied=tuple(n for n in plan.copied if n not in set(changed)),
                    folded=tuple(changed),
                    added=tuple(made),
                    kept=tuple(f"{n}.weight" for n in plan.kept),
                    dropped=tuple(plan.source.dropped) if plan.source else (),
                ),
                source=plan.source_summary,
                folds=self.records.folds,
                experts=self.records.experts,
                unquantized_linears=tuple(plan.unquantized),
                plain_in_vllm=plan.plain,
                left=plan.left,
                function=None if preserved is None else preserved.to_dict(),
                allocation=plan.allocation,
                scratch_bytes=self.scratch_bytes,
                peak_gpu_bytes=peak_bytes(self.device),
            ),
            provenance=Provenance.here(self.command, device_name(self.device)),
        )
        chosen = plan.recipe.plain() if plan.allocation is not None else None
        write_report(work.path, report, checkpoint, recipe=chosen)
        return report

    def _method_settings(self) -> dict[str, str]:
        """Settings of the methods that a format may have a word for."""
        orders = (str(getattr(q, "act_order", "none")) for q in self.quantizers.values())
        return {"act_order": next((order for order in orders if order != "none"), "none")}


def _place_from_the_end(block: int | None, count: int) -> int:
    """The place of a unit among all where the last of ``count`` blocks comes first, and what lies outside
    them at the end."""
    return count if block is None or block >= count else count - 1 - block


def _shown(unit: Unit) -> str:
    """A unit as progress names it."""
    return unit.name if unit.block is not None else "embedding, head"


def unseen_problem(plan: JobPlan, skeleton: Skeleton, known: Collection[str]) -> str | None:
    """Why a job cannot be run of whose linears a pass shows only the inputs of ``known``, or None.

    The others are rounded from their weights alone. Of those that the model reads they must be a small part;
    of no account are linears that it does not read at all, and blocks that it passes by.
    """
    unseen = [n for n in plan.linears if n not in known]
    calibrated = [n for n in unseen if (a := plan.linears[n].activations) is not None and a.calibrated]
    read = {
        skeleton.block_prefix(b) + n
        for b in range(skeleton.block_count)
        if skeleton.groups(b)
        for n in skeleton.linears(b)
    }
    stray = calibrated or [n for n in unseen if n in read]
    total = sum(w.elements for w in plan.weights)
    if not calibrated and sum(plan.linears[n].n * plan.linears[n].k for n in stray) <= LARGEST_REST * total:
        return None
    return (
        f"{', '.join(stray[:3])}{f' and {len(stray) - 3} more' if len(stray) > 3 else ''} "
        f"{'is' if len(stray) == 1 else 'are'} not among the linears that a block is seen to run, so there "
        "is no calibration for it: leave it with --ignore, or use --method minmax"
    )


@contextmanager
def memory_exhausted(device: torch.device, more: str = "") -> Iterator[None]:
    """Turns a GPU's lack of memory into a :class:`DeviceMemoryExhausted` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryExhausted(
            f"{device}: out of memory ({str(error).splitlines()[0][:160]}): use fewer --samples, a shorter "
            f"--sequence-length, or --device cpu{more}"
        ) from error


def worker_count(threads: int) -> int:
    """Tensors that a job without data works on at once where torch may use so many threads."""
    return min(threads, MOST_WORKERS)


def output_config(plan: JobPlan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config.json with the format's ``quantization_config``; ``settings``: the methods'."""
    config = without_quantization(plan.checkpoint.config)
    cache = KV_CACHE if plan.recipe.kv_cache_scheme else None
    quantization = plan.format.config(
        Contents(
            list(plan.written.values()),
            plan.unquantized,
            cache,
            settings,
            model_types(plan.checkpoint.config),
        )
    )
    if quantization is not None:
        if plan.recipe.target == "other" and any(plan.format.refuse(s, "vllm") for s in plan.schemes):
            quantization["meta"] = {
                **quantization.get("meta", {}),
                "target": "other engines: vLLM refuses this file",
            }
        config["quantization_config"] = quantization
    return config
