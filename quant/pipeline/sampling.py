"""A survey of a few blocks, and a cheap guess for all others.

The pass through the model is that of :mod:`quant.pipeline.survey`. Candidates are made of the sampled blocks
alone, with the time that each takes. Of every block, rounding to nearest says what a scheme would lose under
the diagonals of both Hessians,

    Σ h_O[i] · E[i,j]² · h_I[j] / (2 · tr H_I),

which takes no more than looking at each weight once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from quant.calibration.statistics import Statistics
from quant.checkpoint.dtypes import TORCH
from quant.models.skeleton import Skeleton
from quant.pipeline.expert_survey import BOTH, ExpertSurvey, diagonal_loss
from quant.pipeline.gradients import Seen
from quant.pipeline.group_solves import demand_finite
from quant.pipeline.scratch import ScratchFiles
from quant.pipeline.survey import Halves, Losses, Survey, asked_of, tokens_of
from quant.schemes import WeightScheme


@dataclass(frozen=True)
class SampledSurvey(Survey):
    """Attributes:
    sampled: blocks of which candidates are made.
    """

    sampled: frozenset[int] = frozenset()

    def guesses(self) -> Losses:
        """What each linear of all finished blocks would lose, rounded to nearest, by candidate."""
        return {n: own for e in self.work.finished.values() for n, own in e.get("guesses", {}).items()}

    def seconds(self) -> list[float]:
        """Seconds that each candidate took, of all linears of the sampled blocks."""
        entries = [e["seconds"] for e in self.work.finished.values() if "losses" in e]
        return [sum(e[str(i)] for e in entries) for i in range(len(self.pool))]

    def _seen(self, skeleton: Skeleton, index: int, together: bool, files: ScratchFiles) -> Halves:
        # candidates are made by all rows: only sums over blocks are compared, in which what a method fits to
        # its own rows is the same share of each
        needs = frozenset().union(*(self._needs(c) for c in self.pool)) if index in self.sampled else BOTH
        names = self.linears(skeleton, index).values()
        return Halves(Seen({}), asked_of(skeleton, index, names, needs | BOTH, files), True)

    def _solve(self, skeleton: Skeleton, index: int, block: nn.Module, seen: Halves) -> Losses:
        statistics, made = seen.judged.finish(), Losses()
        facts: dict[str, Any] = {"guesses": self._guessed(skeleton, index, block, seen, statistics)}
        if index in self.sampled:
            made = self._candidates(skeleton, index, block, seen, dict(statistics), statistics, facts)
        else:
            self.work.finish_unit(f"block {index}", {}, facts)
        seen.release()
        return made

    def _guessed(
        self,
        skeleton: Skeleton,
        index: int,
        block: nn.Module,
        seen: Halves,
        statistics: Mapping[str, Statistics],
    ) -> Losses:
        places, names = skeleton.linears(index), self.linears(skeleton, index)
        wanted, dtype = self.wanted(skeleton, index), TORCH[self.plan.dtype]
        dense = {n: x for n, x in names.items() if x in statistics}
        largest = self._largest([*dense], lambda n: places[dense[n]].get(block))
        found: Losses = {}
        for name, local in dense.items():
            weight, both = places[local].get(block).float(), statistics[local]
            if both.gradients is None:
                continue
            demand_finite(both, name)
            known: dict[WeightScheme, float] = {}
            found[name] = [*([None] * (len(self.pool) - 1)), 0.0]
            for number in wanted(local):
                assignment = self.pool[number].assignment
                assert assignment is not None
                scheme = assignment.scheme.weights
                if scheme not in known:
                    shared = largest[name] if scheme.strategy in ("tensor", "tensor_group") else None
                    known[scheme] = diagonal_loss(weight, scheme, both, dtype, shared)
                found[name][number] = known[scheme]
        if not (routed := seen.judged.routed):
            return found
        experts, prefix = ExpertSurvey(self.manager, self.pool), skeleton.block_prefix(index)
        tokens = tokens_of(statistics, seen)
        for those, number, lost in experts.guesses(skeleton, index, block, routed, wanted, tokens):
            for place, local in enumerate(those):
                own = found.setdefault(prefix + local, [*([None] * (len(self.pool) - 1)), 0.0])
                own[number] = 0.0 if place else lost
        return found
