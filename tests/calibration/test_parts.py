"""Sums over fixed parts are the same bits, whoever has summed which part."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import pytest
import torch

from quant.calibration.parts import PARTS, Node, PartSums, Tree, part_sizes, tree_nodes
from quant.calibration.statistics import Accumulator, GradientAccumulator, Statistics
from quant.pipeline.ranks import Ranks

CPU = torch.device("cpu")
NEEDS = {"hessian", "power", "range", "sample"}


def summed(pieces: list[torch.Tensor], parts: Iterable[int]) -> PartSums:
    sums = PartSums(lambda: Accumulator(pieces[0].shape[1], CPU, NEEDS, len(pieces)))
    for part in parts:
        for batch in pieces[part].split(7):
            sums.add(part, batch)
    return sums


def together(pieces: list[torch.Tensor], ranks: int) -> Statistics:
    """What several ranks' nodes add up to."""

    def add(left: Node[Accumulator], right: Node[Accumulator]) -> Accumulator:
        left.value.merge(right.value)
        return left.value

    tree: Tree[Accumulator] = Tree(add)
    for rank in range(ranks):
        own = Ranks(rank, ranks).own(len(pieces))
        nodes = summed(pieces, own).nodes()
        assert [(n.start, n.size) for n in nodes] == tree_nodes(own)
        for node in nodes:
            tree.push(node)
    return tree.whole().finish()


@pytest.mark.parametrize("rows", [2, 5, 7, 64])
def test_any_number_of_ranks_sums_up_to_the_same_bits(rows: int) -> None:
    inputs = torch.randn(rows, 20, 24, generator=torch.Generator().manual_seed(rows)) * 3
    pieces = [p.reshape(-1, 24) for p in inputs.split(part_sizes(rows))]
    wanted = summed(pieces, range(len(pieces))).finish()
    exact = inputs.reshape(-1, 24).double()
    assert wanted.hessian is not None and wanted.tokens == len(exact)
    gram = exact.t() @ exact / len(exact)
    # of 8-bit numbers on some CPUs: what two features lose is a share of their sizes, not of their product
    near = 5e-3 * torch.outer(gram.diagonal(), gram.diagonal()).sqrt()
    assert ((wanted.hessian - gram).abs() <= near).all()
    assert torch.equal(wanted.abs_max, inputs.reshape(-1, 24).abs().amax(0))
    chained = [summed(pieces, [p]).finish() for p in range(len(pieces))]
    for ranks in range(2, len(pieces) + 1):
        found = together(pieces, ranks)
        assert found.tokens == wanted.tokens
        for name in ("hessian", "power", "minimum", "maximum", "sample"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), (ranks, name)
    if len(pieces) == PARTS:  # another order of sums gives other bits, or this would show nothing
        naive = torch.stack([s.hessian * s.tokens for s in chained if s.hessian is not None]).sum(0)
        assert not torch.equal(naive / wanted.tokens, wanted.hessian)


def test_ranks_sum_gradients_up_to_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    pieces = [torch.randn(9, 20 + 40, generator=generator).split([20, 40], 1) for _ in range(5)]

    def sums(parts: Iterable[int]) -> PartSums[GradientAccumulator]:
        empty = partial(GradientAccumulator, 20, 40, (3, 16), CPU, NEEDS | {"gradients"}, len(pieces))
        made = PartSums(empty)
        for part in parts:
            for x, g in zip(*(t.split(4) for t in pieces[part]), strict=True):
                made.add(part, x, g)
                made.add(part, x, g.flip(0), False)
        return made

    def sent(left: Node[GradientAccumulator], right: Node[GradientAccumulator]) -> GradientAccumulator:
        other = sums([]).empty()
        other.restore(right.value.counts, {n: t.clone() for n, t in right.value.state().items()})
        left.value.merge(other)
        return left.value

    wanted, tree = sums(range(5)).finish(), Tree(sent)
    for rank in range(2):
        for node in sums(Ranks(rank, 2).own(5)).nodes():
            tree.push(node)
    found = tree.whole().finish()
    assert found.tokens == wanted.tokens == 45
    for name in ("hessian", "gradients", "power", "minimum", "maximum", "sample"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    x, g = (torch.cat([p[i] for p in pieces]).double() for i in (0, 1))
    halves = [torch.cat([p.flip(0) for piece in pieces for p in piece[1].split(4)]).double(), g]
    exact = sum((x * d.square().sum(1, keepdim=True)).t() @ x for d in halves) / (2 * len(x))
    assert wanted.hessian is not None
    torch.testing.assert_close(wanted.hessian.double(), exact, rtol=2e-2, atol=2e-2 * float(exact.max()))


def test_sums_that_wait_are_set_aside_and_come_back() -> None:
    inputs = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    pieces = list(inputs.split(8))
    aside: list[torch.Tensor] = []

    def put(tensor: torch.Tensor) -> object:
        storage = tensor.untyped_storage()
        kept, size = tensor.clone(), storage.nbytes()
        storage.resize_(0)
        aside.append(tensor)

        def back() -> None:
            storage.resize_(size)
            tensor.copy_(kept)

        return back

    sums = PartSums(lambda: Accumulator(24, CPU, NEEDS, 8), put)  # type: ignore[arg-type]
    for part, piece in enumerate(pieces):
        for batch in piece.split(7):
            sums.add(part, batch)
        waiting = sum(not t.untyped_storage().nbytes() for t in {id(t): t for t in aside}.values())
        assert waiting <= 3  # of eight parts no more than three sums wait, and one is open
    found, wanted = sums.finish(), summed(pieces, range(8)).finish()
    assert aside and found.hessian is not None and wanted.hessian is not None
    assert torch.equal(found.hessian, wanted.hessian)
