"""The one loop: read a block, run it, quantize its linears, write it, free it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from quant import defaults
from quant.accelerator import (
    forget_peak,
)
from quant.calibration.text import Rows
from quant.checkpoint.journal import FollowedFolder, WorkFolder, work_path
from quant.errors import (
    NoGradients,
    QuantError,
    SourceFault,
    UsageError,
)
from quant.models.attention import observed_attention
from quant.models.ignored_keys import ignored_note
from quant.models.skeleton import Skeleton
from quant.pipeline.activation_store import Batches, Calls
from quant.pipeline.blocks import BlockQuantizer
from quant.pipeline.budget import excess, place_blocks, place_tensors
from quant.pipeline.checks import unseen_problem
from quant.pipeline.data_free import quantize_tensors
from quant.pipeline.division import ranks_problem, rows_before
from quant.pipeline.fingerprint import fingerprint
from quant.pipeline.finishing import finish
from quant.pipeline.gradients import GradientStream, gradient_problem
from quant.pipeline.group_solves import BlockResult
from quant.pipeline.memory import freed_memory_kept, give_back
from quant.pipeline.methods import make_quantizer, suppressor_of
from quant.pipeline.pieces import PieceQuantizer
from quant.pipeline.plan import JobPlan
from quant.pipeline.ranks import ALONE, Ranks, devices_of
from quant.pipeline.records import Clock, Records
from quant.pipeline.retry import memory_exhausted
from quant.pipeline.rows import job_rows, tell_notes
from quant.pipeline.staged import computed, run_block
from quant.pipeline.turns import Solves
from quant.pipeline.units import UnitWriter, Work
from quant.pipeline.workspace import Workspace
from quant.progress import Event, Progress, silent
from quant.report.value import Report
from quant.vllm.config import text_config

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


class QuantizationManager:
    """Runs one planned job.

    >>> manager = QuantizationManager(plan_job(recipe))  # doctest: +SKIP
    >>> report = manager.run()  # doctest: +SKIP

    The block loop is :meth:`_calibrated` for methods that need statistics, and what it does with a block is
    :class:`BlockQuantizer`; the loop of those that need none is :func:`quantize_tensors`, and what it does
    with a tensor :class:`PieceQuantizer`. How much of the text is worked on at once is the
    :class:`Workspace`'s, and files are the :class:`UnitWriter`'s.

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
        self.workspace = Workspace(plan, self.device, ranks, batch_tokens)
        self.clock, self.records = Clock(), Records(plan, progress)
        self.pieces = PieceQuantizer(plan, self.quantizers, self.device, self.records)
        self.blocks = BlockQuantizer(
            plan, self.quantizers, self.suppressors, self.pieces.quantize, self.records, self.clock, ranks
        )
        self.writer = UnitWriter(plan, self.pieces, self.records, self.clock, ranks)
        self.scratch_bytes = 0

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
            report = finish(self, work, rows, start)
            work.publish()
            if told := excess(self.plan.recipe, report.peak_rss_bytes):
                self.progress(Event("quantize", message=told, warning=True))
        except SourceFault:
            work.abandon()
            raise
        finally:
            work.release()
        return report

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
            quantize_tensors(self.writer, work, self.workspace.workers)
        self.scratch_bytes = sum(self.ranks.exchange(self.scratch_bytes))

    def _facts(self, rows: Rows | None) -> dict[str, Any]:
        """What decides the output's bytes and must be alike for all ranks: the source is read by each."""
        facts = self.fingerprint(rows)
        return {k: facts[k] for k in ("calibration", "torch", "device", "threads", "instructions")}

    def _prepared(self) -> tuple[Rows, Skeleton] | tuple[None, None]:
        """What :meth:`prepare` gives where anything needs calibration; how a budget is kept where nothing
        does."""
        if self.needs:
            return self.prepare()
        self.workspace.place(place_tensors(self, self.workspace.workers))
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
        if note := self.workspace.take(rows):
            rows = replace(rows, notes=(*rows.notes, note))
        skeleton = Skeleton(self.plan.checkpoint, self.device)
        if problem := ranks_problem(self.plan, len(rows.tokens)):
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
        if note := self.workspace.place(place_blocks(self, rows, skeleton)):
            rows = replace(rows, notes=(*rows.notes, note))
            self.progress(Event("text", message=note, warning=True))
        return rows, skeleton

    def fingerprint(self, rows: Rows | None) -> dict[str, Any]:
        """What decides the output's bytes."""
        settings = {k: v for k, v in self.plan.recipe.settings().items() if k != "device"}
        return fingerprint(self.plan.checkpoint, settings, rows, self.device)

    # --- methods that need statistics -----------------------------------------------------------------------

    def _calibrated(self, skeleton: Skeleton, rows: Rows, work: Work) -> None:
        """The block loop. On screen as a whole on purpose: every calibrated method goes through these
        lines."""
        store = self.workspace.store(work.path)
        try:
            self.progress(Event("quantize", detail="embedding"))
            with self.clock.phase("embed"):
                tokens, held_out, parts = self.workspace.share(rows)
                calls = Calls(store)
                batches = Batches(store, skeleton.embedded(tokens, calls.append))
            for unit in self.writer.under_way(work, self.plan.units):
                if unit.block is None or unit.block >= skeleton.block_count:
                    if unit.name not in work.finished:
                        self.writer.write(unit, work, BlockResult())
                    continue
                last = unit.block == skeleton.block_count - 1
                if unit.name in work.finished:
                    if not last:
                        with self.clock.phase("replay"):
                            block = skeleton.load_block(unit.block, self.writer.read_back(unit, work))
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
                    self.writer.write(unit, work, made)
                skeleton.free_block(unit.block)
                give_back()  # what the pass has freed, beside what the next block takes
        finally:
            self.scratch_bytes = store.spilled_bytes
            store.close()

    def _by_gradients(self, skeleton: Skeleton, rows: Rows, work: Work) -> None:
        """The loop of methods that need gradients of the whole model: forward through the blocks, then back,
        each quantized as the gradients come through it. See :mod:`quant.pipeline.gradients`."""
        store = self.workspace.store(work.path)
        blocks = {u.block: u for u in self.plan.units if u.block is not None}
        count = skeleton.block_count
        try:
            self.progress(Event("quantize", detail="embedding"))
            tokens, held_out, (of, parts) = self.workspace.share(rows)
            with self.clock.phase("embed"):
                seed, draws = self.plan.recipe.seed, self.draws
                before = rows_before(rows, self.ranks)
                stream = GradientStream(skeleton, tokens, held_out, store, seed, draws, of, before)
            # nothing is to be learned of blocks before the first that is left to do
            todo = [i for i in range(count) if i not in blocks or blocks[i].name not in work.finished]
            caches: dict[int | None, dict[str, torch.Tensor]] = {}
            for index in range(count) if todo else ():
                self.progress(Event("quantize", index, 2 * count, detail=f"forward through block {index}"))
                with self.clock.phase("forward"):
                    block, made = skeleton.load_block(index), BlockResult()
                    wanted = [spec.name for spec in blocks[index].made] if index in blocks else []
                    observing = observed_attention(block, made.observe_cache) if wanted else None
                    stream.forward(index, block, observing)
                    made.finish_cache(wanted, self.ranks)
                    caches[index] = made.changed
                    skeleton.free_block(index)
                give_back()
            if todo:
                self.progress(Event("quantize", count, 2 * count, detail="gradients at the logits"))
                with self.clock.phase("logits"):
                    stream.at_logits()
            backwards = sorted(self.plan.units, key=lambda u: _place_from_the_end(u.block, count))
            for turn in self.writer.in_turns(work, backwards, self.ranks.size):
                solves = Solves(self.blocks, skeleton, self.ranks)
                for unit in turn:
                    if unit.block is None or unit.block >= count:
                        if unit.name not in work.finished:
                            self.writer.write(unit, work, BlockResult())
                        continue
                    index = unit.block
                    if not todo or index < todo[0]:
                        continue
                    block, finished = skeleton.load_block(index), unit.name in work.finished
                    seen = None if finished else self.blocks.to_be_seen(skeleton, index, store, parts)
                    with self.clock.phase("backward"):
                        stream.backward(index, block, seen)
                    if seen is None or not solves.keep(unit, seen):
                        skeleton.free_block(index)
                        give_back()
                for unit, made in solves.made():
                    made.changed |= caches.pop(unit.block)
                    self.writer.write(unit, work, made)
        finally:
            self.scratch_bytes = store.spilled_bytes
            store.close()


def _place_from_the_end(block: int | None, count: int) -> int:
    """The place of a unit among all where the last of ``count`` blocks comes first, and what lies outside
    them at the end."""
    return count if block is None or block >= count else count - 1 - block
