"""Suffix decoding (Oliaro et al. 2024, arXiv 2411.04975): what most often followed the end of the text, in it
and in the answers before it.

vLLM takes it from the package arctic-inference, whose choices these are (0.3: ``csrc/suffix_decoding``): of
each length of the end, the path of the most frequent tokens, cut where it is less likely than a tenth; of
those the one that promises most tokens; at most as many as the end is long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from quant.speculation.proposers import Proposer

#: vLLM's defaults: longest end that is looked up, and least probability of a token by the counts.
_DEPTH, _LEAST = 24, 0.1


@dataclass
class _Node:
    """A run of tokens: how often it stood there, and what followed, the most frequent first."""

    count: int = 0
    after: dict[int, _Node] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def step(self, token: int) -> _Node:
        """What follows by that token, counted once more. Of tokens that are as frequent a new one comes last,
        and one that was seen again first."""
        node = self.after.get(token)
        if node is None:
            node = self.after[token] = _Node(1)
            self.order.append(token)
            return node
        node.count += 1
        at = self.order.index(token)
        if at and (before := self.after[self.order[at - 1]].count) <= node.count:
            self.order.pop(at)
            while at and self.after[self.order[at - 1]].count == before:
                at -= 1
            self.order.insert(at, token)
        return node


class _Tree:
    """Every run of some texts, of at most :data:`_DEPTH` tokens."""

    def __init__(self) -> None:
        self._root = _Node()
        self._ends: list[_Node] = []

    def begin(self) -> None:
        """Another text."""
        self._ends = []

    def add(self, tokens: Sequence[int]) -> None:
        """What the text goes on with."""
        for token in tokens:
            first = self._root.after.setdefault(token, _Node())  # whose order nobody asks for
            first.count += 1
            self._ends = [first, *(node.step(token) for node in self._ends[: _DEPTH - 1])]

    def guess(self, end: Sequence[int], most: int) -> tuple[list[int], float]:
        """The best continuation, and how many tokens of it are right by the counts."""
        best, promised = list[int](), 0.0
        for length in range(1, len(end)):
            node: _Node | None = self._root
            for token in end[-length:]:
                node = node.after.get(token) if node is not None else None
            if node is None:
                break
            path, probability, score = list[int](), 1.0, 0.0
            while len(path) < min(most, length) and node.order:
                following = node.after[node.order[0]]
                probability *= following.count / node.count
                if probability < _LEAST:
                    break
                path.append(node.order[0])
                score += probability
                node = following
            if score >= promised:
                best, promised = path, score
        return best, promised


class Suffix(Proposer):
    """Proposes by the text so far and by the answers to all requests so far."""

    def __init__(self) -> None:
        self._answers, self._text = _Tree(), _Tree()
        self._tokens: list[int] = []

    def propose(self, tokens: list[int], k: int) -> tuple[list[int], None]:
        """Of a new request the last token is the first of its answer."""
        known = len(self._tokens)
        if not 0 < known < len(tokens) or tokens[:known] != self._tokens:
            self._text, self._tokens = _Tree(), tokens[:-1]
            self._text.add(self._tokens)
            self._answers.begin()
        self._read(tokens)
        end = tokens[-_DEPTH:]
        own, promised = self._text.guess(end, k)
        others, more = self._answers.guess(end, k)
        return own if promised >= more else others, None

    def ended(self, tokens: list[int]) -> None:
        self._read(tokens)
        self._tokens = []

    def _read(self, tokens: list[int]) -> None:
        new = tokens[len(self._tokens) :]
        self._text.add(new)
        self._answers.add(new)
        self._tokens = list(tokens)
