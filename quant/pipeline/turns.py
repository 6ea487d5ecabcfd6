"""Blocks that ranks solve by turns where nothing of a block depends on what others become.

With gradients of the full-precision model all sums of a block are there once its rows have gone back through
it, and the block before needs none of its results. So as many blocks as there are ranks are summed first,
each for the rank that will solve it, and then all solve at once. Which rank solves a block changes nothing of
what it becomes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from quant.calibration.statistics import Statistics
from quant.models.skeleton import Skeleton
from quant.pipeline.blocks import BlockQuantizer
from quant.pipeline.expert_gradients import handed_over
from quant.pipeline.gradients import Seen
from quant.pipeline.group_solves import BlockResult
from quant.pipeline.layout import Unit
from quant.pipeline.memory import give_back
from quant.pipeline.ranks import Ranks


@dataclass
class Solves:
    """The blocks of one turn, each of another rank."""

    blocks: BlockQuantizer
    skeleton: Skeleton
    ranks: Ranks
    _units: list[Unit] = field(default_factory=list)
    _own: tuple[Unit, Seen, dict[str, Statistics]] | None = None
    _loaded: bool = False

    def keep(self, unit: Unit, seen: Seen) -> bool:
        """Sums up what all ranks have seen of the next block of the turn, which is still loaded; returns
        whether it is to stay so, to be solved here."""
        owner = len(self._units)
        self._units.append(unit)
        statistics = self.blocks.shown(seen, owner)
        for path in sorted(seen.routed):
            seen.routed[path] = handed_over(seen.routed[path], self.ranks, owner)
        if owner == self.ranks.rank:
            self._own = unit, seen, statistics
        else:
            seen.release()
        # of the last of a turn nothing comes between
        self._loaded = owner == self.ranks.rank == self.ranks.size - 1
        return self._loaded

    def made(self) -> Iterator[tuple[Unit, BlockResult]]:
        """Solves this rank's block; at rank 0 what each block of the turn has become."""
        result = None
        if self._own is not None:
            result = self._solved(*self._own)
            if not self.ranks.first:
                facts = self.blocks.records.of(self._own[0].name, sorted(result.linears))
                self.ranks.send((result, facts), 0)
        if not self.ranks.first:
            return
        for owner, unit in enumerate(self._units):
            if owner:
                result, facts = self.ranks.receive(owner)
                self.blocks.records.restore(facts)
            assert result is not None
            yield unit, result

    def _solved(self, unit: Unit, seen: Seen, statistics: dict[str, Statistics]) -> BlockResult:
        index = unit.block
        assert index is not None
        block = self.skeleton.blocks[index] if self._loaded else self.skeleton.load_block(index)
        made = self.blocks.quantize_seen(self.skeleton, index, block, seen, statistics)
        self.skeleton.free_block(index)
        give_back()
        return made
