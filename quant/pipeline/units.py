"""One unit of the output at a time: written and synced, noted in the journal, read back by a later run.

Rank 0 alone has the journal; what another rank has written it hands to that one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.dtypes import TORCH
from quant.checkpoint.header import read_header
from quant.checkpoint.journal import FollowedFolder, WorkFolder
from quant.checkpoint.reader import Checkpoint
from quant.formats.reading import read_linear, read_stack, read_weight
from quant.pipeline.folding import unfolded
from quant.pipeline.group_solves import BlockResult
from quant.pipeline.layout import Unit
from quant.pipeline.pieces import PieceQuantizer
from quant.pipeline.plan import JobPlan
from quant.pipeline.ranks import Ranks
from quant.pipeline.records import Clock, Records
from quant.pipeline.source import carried
from quant.pipeline.writing import method_settings, output_config, write_unit
from quant.progress import Event
from quant.tensors import QuantizedTensor
from quant.units import format_seconds, format_share

#: The work folder, of whoever holds it or works for that process.
Work = WorkFolder | FollowedFolder


class UnitWriter:
    """Writes the units of a plan, and reads back those that an earlier run has written.

    Args:
        pieces: makes the linears that nothing else has made.
    """

    def __init__(self, plan: JobPlan, pieces: PieceQuantizer, records: Records, clock: Clock, ranks: Ranks):
        self.plan, self.pieces, self.records, self.clock, self.ranks = plan, pieces, records, clock, ranks

    def under_way(self, work: Work, units: Sequence[Unit]) -> Iterator[Unit]:
        """Each unit for the work on it, before and after which progress says what there is to say."""
        return (unit for (unit,) in self._told(work, [[unit] for unit in units]))

    def in_turns(self, work: Work, units: Sequence[Unit], several: int) -> Iterator[list[Unit]]:
        """:meth:`under_way` with so many blocks at a time that are left to do."""
        turns: list[list[Unit]] = []
        left = 0
        for unit in units:
            todo = unit.block is not None and unit.name not in work.finished
            if todo and 0 < left < several:
                turns[-1].append(unit)
            else:
                turns.append([unit])
                left = 0
            left = left + 1 if todo else 0
        return self._told(work, turns)

    def _told(self, work: Work, turns: Sequence[list[Unit]]) -> Iterator[list[Unit]]:
        number, total = 0, sum(map(len, turns))
        for turn in turns:
            start, before = time.perf_counter(), {unit.name for unit in turn} & set(work.finished)
            shown = ", ".join(_shown(unit) for unit in turn)
            self.records.progress(Event("quantize", number, total, detail=shown))
            yield turn
            number += len(turn)
            names = {unit.name for unit in turn}
            layers = [layer for layer in self.records.layers.values() if layer.unit in names]
            errors = [layer.error for layer in layers if layer.error is not None]
            error = f", relative error {format_share(max(errors))} at most" if errors else ""
            seconds = format_seconds(time.perf_counter() - start)
            message = f"{shown} {'replayed' if before else 'written'} in {seconds}{error}"
            self.records.progress(Event("quantize", number, total, message=message))

    def write(self, unit: Unit, work: Work, made: BlockResult) -> None:
        """Writes a unit and notes that it is finished; rank 0 does."""
        if not isinstance(work, WorkFolder):
            return
        with self.clock.phase("write"):
            files = self.files(unit, work, made)
            self.hand_in(unit, work, files, self.facts_of(unit))

    def files(
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

    def facts_of(self, unit: Unit) -> dict[str, Any]:
        """What the journal says of a unit beside its files."""
        written = {n for s in unit.shards for t in s.tensors for n in (t.linear, *t.linears) if n}
        return self.records.of(unit.name, sorted(written & set(self.plan.linears)))

    def hand_in(self, unit: Unit, work: Work, files: Mapping[Path, str], facts: Mapping[str, Any]) -> None:
        """Puts a unit whose files are written and synced into the journal, which rank 0 has."""
        if isinstance(work, WorkFolder):
            self.records.restore(facts)
            work.finish_unit(unit.name, files, facts)
        else:
            self.ranks.send((files, facts), 0)

    def read_back(self, unit: Unit, work: Work) -> dict[str, torch.Tensor]:
        """Dequantized weights of a finished block, read back from its shards."""
        headers = {
            name: info
            for shard in unit.shards
            for name, info in read_header(work.path / shard.file)[0].items()
        }
        written = Checkpoint(work.path, {}, headers)
        config = output_config(self.plan, method_settings(self.pieces.quantizers)).get("quantization_config")
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


def _shown(unit: Unit) -> str:
    """A unit as progress names it."""
    return unit.name if unit.block is not None else "embedding, head"
