"""Statistics of calibration rows, summed over fixed parts of the rows and then pairwise, so that the sums do
not depend on who has summed which part.

fp32 sums depend on their order. Rows are therefore cut into at most :data:`PARTS` runs, whatever the number
of processes; each part is summed from its first row to its last, and parts are added as the nodes of one
binary tree: parts 0 and 1, parts 2 and 3, then these two sums, and so on. A process that has parts 0 to 3
holds the tree's left half when it is done, and no other order of additions is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from quant.calibration.statistics import Accumulator, GradientAccumulator, Statistics

#: Parts that rows are cut into, at the most: as many processes can share a job's rows.
PARTS = 8

T = TypeVar("T")
A = TypeVar("A", Accumulator, GradientAccumulator)


def part_sizes(rows: int) -> list[int]:
    """Rows of each part, in order.

    >>> part_sizes(128), part_sizes(11), part_sizes(3)
    ([16, 16, 16, 16, 16, 16, 16, 16], [1, 1, 2, 1, 1, 2, 1, 2], [1, 1, 1])
    """
    count = min(PARTS, rows)
    return [(i + 1) * rows // count - i * rows // count for i in range(count)]


def own_parts(parts: int, rank: int, ranks: int) -> range:
    """Of so many things in a row those of one rank: neighbours, and as many as any other has, or one less."""
    return range(rank * parts // ranks, (rank + 1) * parts // ranks)


def share_of_most(rows: int, ranks: int) -> int:
    """Rows of the rank that has the most.

    >>> share_of_most(128, 1), share_of_most(128, 3), share_of_most(11, 2)
    (128, 48, 6)
    """
    sizes = part_sizes(rows)
    return max(sum(sizes[i] for i in own_parts(len(sizes), rank, ranks)) for rank in range(ranks))


@dataclass
class Node(Generic[T]):
    """A node of the tree: what the parts from ``start`` on, ``size`` of them, sum up to."""

    start: int
    size: int
    value: T


class Tree(Generic[T]):
    """Adds nodes as they come, from left to right: two are added where they are the halves of one node of the
    tree. ``add``: called with both halves' nodes; the value of the whole."""

    def __init__(self, add: Callable[[Node[T], Node[T]], T]):
        self._add = add
        self.nodes: list[Node[T]] = []

    def push(self, node: Node[T]) -> None:
        self.nodes.append(node)
        while len(self.nodes) > 1:
            left, right = self.nodes[-2:]
            if left.size != right.size or left.start % (2 * left.size):
                return
            self._join()

    def whole(self) -> T:
        """The sum of all; where the parts are no power of two, what is left on the right is added first."""
        while len(self.nodes) > 1:
            self._join()
        return self.nodes[0].value

    def _join(self) -> None:
        left, right = self.nodes[-2:]
        value = self._add(left, right)
        self.nodes[-2:] = [Node(left.start, left.size + right.size, value)]


def tree_nodes(parts: Iterable[int]) -> list[tuple[int, int]]:
    """Starts and sizes of the nodes that some neighbouring parts add up to.

    >>> tree_nodes(range(3, 8))
    [(3, 1), (4, 4)]
    """
    tree: Tree[None] = Tree(lambda left, right: None)
    for part in parts:
        tree.push(Node(part, 1, None))
    return [(node.start, node.size) for node in tree.nodes]


class PartSums(Generic[A]):
    """Sums over parts, which come in order.

    Args:
        empty: makes the sums of nothing; of a sample they take as many tokens of each part.
        aside: takes a tensor's memory while nothing reads it, and returns what brings it back; sums of parts
            that wait for their neighbours are put there.
    """

    def __init__(
        self,
        empty: Callable[[], A],
        aside: Callable[[torch.Tensor], Callable[[], None]] | None = None,
    ):
        self.empty: Callable[[], A] = empty
        self._aside = aside
        self._part = -1
        self._open: A | None = None
        self._back: dict[int, list[Callable[[], None]]] = {}
        self._tree: Tree[A] = Tree(self._joined)

    def add(self, part: int, *given: Any) -> None:
        """Adds what a batch of a part gives, which is that of the batch before or a later one; ``given``: as
        the sums take it."""
        if part != self._part or self._open is None:
            self._close()
            self._wait()
            self._part, self._open = part, self.empty()
        self._open.add(*given)

    def nodes(self) -> Sequence[Node[A]]:
        """What all that was added sums up to, from left to right; handed over."""
        self._close()
        for node in self._tree.nodes:
            self._bring(node)
        return self._tree.nodes

    def finish(self) -> Statistics:
        """The statistics of all parts."""
        self._close()
        whole = self._tree.whole()
        self._bring(self._tree.nodes[0])
        return whole.finish()

    def _close(self) -> None:
        if self._open is None:
            return
        self._open.settle()
        node = Node(self._part, 1, self._open)
        self._open = None
        self._tree.push(node)

    def _wait(self) -> None:
        """Sets the latest sum aside, until its neighbour is there."""
        for node in self._tree.nodes[-1:]:
            if self._aside is not None and node.start not in self._back:
                self._back[node.start] = [self._aside(tensor) for tensor in node.value.large]

    def _bring(self, node: Node[A]) -> None:
        for back in self._back.pop(node.start, []):
            back()

    def _joined(self, left: Node[A], right: Node[A]) -> A:
        self._bring(left)
        self._bring(right)
        left.value.merge(right.value)
        return left.value
