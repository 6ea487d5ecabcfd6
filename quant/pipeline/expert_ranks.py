"""The experts of a mixture over several ranks: every rank is told what all of them read, and solves some.

The tokens that an expert is sent are not cut into parts whose sums could be added: what an expert reads is
multiplied at once. So the rows are exchanged, not sums. They come in the order in which a single process has
them, because a rank has neighbouring rows of the text; all that is solved of them is then the same to the
bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from quant.pipeline.experts import ExpertInputs
from quant.pipeline.ranks import Ranks

T = TypeVar("T")


def gathered(inputs: ExpertInputs, ranks: Ranks) -> ExpertInputs:
    """What the experts read of the rows of all ranks, a batch after another; ``inputs``, those of this rank,
    are closed. Of a single process they are all there is."""
    if ranks.size == 1:
        return inputs
    everyone, places = ExpertInputs(inputs.scratch), []
    for number in range(max(ranks.exchange(len(inputs)))):
        for rank, routed in enumerate(ranks.exchange(inputs.batch(number) if number < len(inputs) else None)):
            if routed is not None:
                everyone.add(routed)
                places.append((rank, number))
    inputs.close()
    everyone.reorder(sorted(range(len(places)), key=places.__getitem__))
    return everyone


def in_rounds(found: Iterator[list[T]], own: Sequence[int], ranks: Ranks) -> Iterator[tuple[int, list[T]]]:
    """What all ranks find, with the rank that did: each exchanges a list at a time, as often as the one that
    has most.

    Args:
        own: how many lists each rank finds.
    """
    for _ in range(max(own)):
        yield from enumerate(ranks.exchange(next(found, [])))
