"""What a backward pass shows of a mixture's experts, and their statistics from it.

Of each layer of experts are kept what it reads, where its router sends it, and the gradient at its outputs: a
token's gradient at the output of one of its experts is that one times the gate. The rest is made expert by
expert when it is solved: its tokens go through it once more, with what autograd needs, and show the inputs of
each product and the gradients at its outputs. So nothing that is kept grows with the number of experts that a
token is sent to, and as few Hessians are in memory at once as experts are solved together.

How a mixture is calibrated (``--moe-calibration``) is as in :mod:`quant.pipeline.experts`, for both Hessians
of an expert:

``routed``  of the tokens that its router sends.
``all``     of all tokens of its layer, as if its router sent it each of them with a gate of 1.
``blend``   of routed tokens, and of tokens of the whole layer, which count as
            :data:`~quant.pipeline.experts.PRIOR` tokens for each feature of a Hessian. Both are brought to
            one trace before, because gates and gradients of the one are none of the other's.

What gradients of all tokens are is the gradient at the layer's outputs: that of a token which an expert is
not sent is zero in the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from quant.calibration.statistics import Accumulator, GradientAccumulator, Statistics
from quant.models.experts import Experts, Routed, expert_inner, find_experts, gated, normed, product
from quant.models.linears import Slice
from quant.pipeline.expert_solves import ExpertSolver, Layer, Prior, Some
from quant.pipeline.experts import PRIOR, ExpertInputs, expert_statistics
from quant.pipeline.ranks import Ranks
from quant.quantizers.two_sided import blocks_of
from quant.recipe import Assignment

#: Tokens that go through an expert at once.
_STRIP = 1 << 11


@dataclass
class ExpertGradients(ExpertInputs):
    """What a layer of experts reads, and the gradients at its outputs; of a held-out row there are none."""

    _gradients: list[torch.Tensor] = field(default_factory=list)

    def add_both(self, routed: Routed, gradients: torch.Tensor) -> None:
        """Keeps copies of a batch's inputs and of the gradients [R, H] at the outputs for them."""
        if len(routed.index) < len(routed.rows):  # rows that no expert is sent
            gradients = gradients[routed.index]
            rows, index = routed.rows[routed.index], torch.arange(len(routed.index))
            routed = replace(routed, rows=rows, index=index.to(routed.index.device))
        self.add(routed)
        assert self._aside is not None
        self._gradients.append(self._aside.keep(gradients))

    def pairs(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token that an expert is sent what it reads [n, K] and the gradient at its output [n, H], in
        the order of the batches."""
        rows, gates = self.of(expert)
        given = []
        for kept, route in zip(self._gradients, self._routes, strict=True):
            start = int(route.counts[:expert].sum())
            given.append(kept[route.index[start : start + int(route.counts[expert])]])
        gradients = torch.cat(given)
        self._give_back()
        return rows, gradients.mul_(gates.unsqueeze(-1).to(gradients.dtype))

    def both_of(self, number: int) -> tuple[Routed, torch.Tensor]:
        """A batch as it was added."""
        return self.batch(number), self._gradients[number]

    def tokens(self, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [R, K] and gradients [R, H] of at most so many tokens of the layer."""
        kept = self.reduced(most)
        return kept._rows[0], kept._gradients[0]

    def both(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and gradients of the layer, batch by batch."""
        yield from zip(self._rows, self._gradients, strict=True)
        self._give_back()

    def reduced(self, most: int) -> ExpertGradients:
        total = sum(map(len, self._rows))
        stride = max(1, -(-total // max(most, 1)))
        parts, skip = [], 0
        for rows, gradients in self.both():
            parts.append((rows[skip::stride].clone(), gradients[skip::stride].clone()))
            skip = (skip - len(rows)) % stride
        rows, gradients = (torch.cat(part) for part in zip(*parts, strict=True))
        nobody = Routed(torch.empty(0), torch.arange(len(rows)), self._routes[0].counts * 0, torch.empty(0))
        return ExpertGradients(_rows=[rows], _routes=[nobody], _gradients=[gradients])

    def close(self) -> None:
        """Nothing: the second product is of the same tokens."""

    def release(self) -> None:
        """Frees what is kept."""
        self._gradients.clear()
        super().close()


def handed_over(inputs: ExpertGradients, ranks: Ranks, to: int) -> ExpertGradients:
    """What the experts read of the rows of all ranks and the gradients at their outputs, at the one that
    solves them; ``inputs``, those of this rank, are released, and of the others nothing is left."""
    if ranks.size == 1:
        return inputs
    everyone = ExpertGradients(inputs.scratch)
    for rank in range(ranks.size):  # in the order in which a single process has them
        if ranks.rank == to:
            count = len(inputs) if rank == to else ranks.receive(rank)
            for number in range(count):
                everyone.add_both(*(inputs.both_of(number) if rank == to else ranks.receive(rank)))
        elif ranks.rank == rank:
            ranks.send(len(inputs), to)
            for number in range(len(inputs)):
                ranks.send(inputs.both_of(number), to)
    inputs.release()
    return everyone


@dataclass
class InnerGradients(ExpertInputs):
    """What the second product of a layer's experts reads, made of what the first one does when it is asked
    for."""

    first: ExpertGradients = field(default_factory=ExpertGradients)
    module: nn.Module = field(default_factory=nn.Identity)
    experts: Experts | None = None

    @classmethod
    def of_layer(cls, first: ExpertGradients, block: nn.Module, path: str) -> InnerGradients:
        """Of the experts module at a path inside a block."""
        experts = next(e for e in find_experts(block) if e.path == path)
        return cls(first.scratch, first=first, module=block.get_submodule(path), experts=experts)

    @property
    def features(self) -> int:
        assert self.experts is not None
        down = self.module.get_parameter("down_proj")
        return down.shape[1 if self.experts.transposed else 2]

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def counts(self) -> torch.Tensor:
        return self.first.counts

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, gates = self.first.of(expert)
        assert self.experts is not None
        return expert_inner(self.module, self.experts, expert, rows), gates

    def close(self) -> None:
        """Nothing is kept here."""


class GradientExpertSolver(ExpertSolver):
    """Quantizes the experts of a block's layers by what a backward pass has shown of them."""

    def prior(self, layer: Layer, assignment: Assignment) -> Prior:
        needs = self.solver.needs(assignment)
        if "gradients" not in needs or layer.first is None or layer.group.stage != "up":
            return super().prior(layer, assignment)
        assert isinstance(layer.routed, ExpertGradients)
        return _layer_statistics(layer.routed, needs)

    def statistics(
        self, layer: Layer, assignment: Assignment, some: Some, prior: Prior
    ) -> tuple[list[Statistics], list[tuple[str, ...]]]:
        needs = self.solver.needs(assignment)
        if "gradients" not in needs:
            return super().statistics(layer, assignment, some, prior)
        made = [self.of_expert(layer, expert, names, prior, needs) for expert, names in some.items()]
        return [seen for seen, _ in made], [notes for _, notes in made]

    def of_expert(
        self, layer: Layer, expert: int, names: Sequence[str], prior: Prior, needs: frozenset[str]
    ) -> tuple[Statistics, tuple[str, ...]]:
        """The statistics of what an expert reads and of the gradients at the outputs of its linears
        ``names``, one after another; and what to say of them."""
        routed = layer.routed.first if isinstance(layer.routed, InnerGradients) else layer.routed
        assert isinstance(routed, ExpertGradients)
        places = [place for n in names if (place := layer.work.linears[n].place) is not None]
        sizes = layer.routed.features, sum(layer.work.linears[n].ref.n for n in names)

        def summed(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Statistics:
            sums = GradientAccumulator(
                *sizes, blocks_of(sizes[1]), layer.routed.device, needs & {"hessian", "gradients"}
            )
            for rows, gradients in parts:
                for x, g in zip(rows.split(_STRIP), gradients.split(_STRIP), strict=True):
                    if len(x):
                        sums.add(*_at_product(layer, expert, places, x, g))
            return sums.finish()

        first = layer.first
        if self.how == "all" and isinstance(first, ExpertGradients):
            made = summed(first.both())
            return self._with_range(made, layer, expert, prior, needs), ()
        own = summed([routed.pairs(expert)])
        count, block = own.tokens, blocks_of(sizes[1])[1]
        if self.how == "blend" and isinstance(first, ExpertGradients):
            features = block if layer.group.stage == "up" else max(block, sizes[0])
            everyone = summed([first.tokens(PRIOR * features)])
            # what all read before the first product is the same for all
            whole = prior if isinstance(prior, Statistics) else everyone
            own = replace(
                own,
                tokens=count + min(PRIOR * block, everyone.tokens),
                hessian=_mixed(own.hessian, count, whole.hessian, whole.tokens),
                gradients=_mixed(own.gradients, count, everyone.gradients, everyone.tokens),
            )
        few = count < max(sizes[0], block)
        notes = (
            f"its router sends it {count} calibration tokens, its input has {sizes[0]} features and "
            f"{block} outputs feed back on each other",
        )
        return self._with_range(own, layer, expert, prior, needs), notes if few else ()

    def _with_range(
        self, made: Statistics, layer: Layer, expert: int, prior: Prior, needs: frozenset[str]
    ) -> Statistics:
        """The same with what else is asked for."""
        rest = needs - {"hessian", "gradients"}
        if not rest:
            return made
        seen, _ = expert_statistics(
            layer.module, layer.experts, expert, layer.routed, prior, self.how, rest | {"range"}
        )
        return replace(seen, tokens=made.tokens, hessian=made.hessian, gradients=made.gradients)


def _at_product(
    layer: Layer, expert: int, places: Sequence[Slice], rows: torch.Tensor, gradients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer's product reads [n, K] where its expert reads ``rows``, and the gradients [n, N] at the
    outputs of the linears in ``places`` where ``gradients`` [n, H] are those at the expert's."""
    module, experts = layer.module, layer.experts
    counts = torch.zeros(experts.count, dtype=torch.int64)
    counts[expert] = len(rows)
    name = experts.parameter(experts.projections[-1]).rpartition(".")[2]

    def times(parameter: str, x: torch.Tensor) -> torch.Tensor:
        index, gates = torch.arange(len(x), device=x.device), torch.ones(len(x))
        return product(module, parameter, experts, Routed(x, index, counts, gates))

    with torch.no_grad():
        first = times(name, rows)
    first.requires_grad_()
    with torch.enable_grad():
        inner = gated(module, first)
        last = times("down_proj", inner)
        output = normed(module, last)
        wanted = first if layer.group.stage == "up" else last
        made = gradients if output is wanted else torch.autograd.grad(output, wanted, gradients)[0]
    if layer.group.stage != "up":
        return inner.detach(), made
    parts = [made[:, p.first : p.first + p.step * p.count : p.step] if p.count else made for p in places]
    return rows, torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _layer_statistics(inputs: ExpertGradients, needs: frozenset[str]) -> Statistics:
    """The statistics of what a whole layer reads before the first product of its experts, each token weighted
    with its gradient at the layer's outputs in the Hessian."""
    weighted = Accumulator(inputs.features, inputs.device, needs & {"hessian"})
    plain = Accumulator(inputs.features, inputs.device, needs - {"hessian", "gradients"} | {"range"})
    for rows, gradients in inputs.both():
        plain.add(rows)
        wide = torch.float32 if rows.dtype == torch.float16 else rows.dtype
        size = torch.linalg.vector_norm(gradients, dim=1, keepdim=True, dtype=torch.float32)
        weighted.add(rows.to(wide) * size.to(wide))
    return replace(plain.finish(), hessian=weighted.finish().hessian)


def _mixed(own: Any, count: int, prior: Any, tokens: int) -> Any:
    """Of a Hessian [..., K, K] of ``count`` tokens and one of ``tokens`` of the whole layer what an expert is
    solved with, in the memory of ``own``."""
    counts = min(PRIOR * own.shape[-1], tokens)
    mine, theirs = (float(x.diagonal(dim1=-2, dim2=-1).sum()) for x in (own, prior))
    if not counts or not theirs > 0:
        return own
    if not count or not mine > 0:
        return own.copy_(prior)
    share = counts / (counts + count)
    return own.mul_(1 - share).add_(prior, alpha=share * mine / theirs)
