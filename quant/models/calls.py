"""What a model calls its blocks with, beside the hidden states.

Most of it is the same for every batch of one shape (rotary tables, masks) and is kept once. Some is not:
embeddings of each token for each block (Gemma 3n and 4), the embedded text itself (Zamba), mappings in which
a block leaves keys and values for later ones (Gemma 3n and 4). Those belong to one batch, and go with it from
block to block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quant.errors import SourceFault, first_line


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides the hidden states, in one batch.

    Attributes:
        own: tensors among the values that belong to this batch alone and may be set aside between blocks.
        state: mappings that belong to this batch alone and that blocks read and fill; one object may be in
            the calls of several blocks.
        runs: False of a block that the model passes by (Llama 3.2 Vision's cross-attention, where there is no
            image): its output is its input.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    own: tuple[torch.Tensor, ...] = ()
    state: tuple[MutableMapping[Any, Any], ...] = ()
    runs: bool = True

    def movable(self) -> Iterator[torch.Tensor]:
        """Tensors that belong to this batch alone, those that blocks have left in the state included."""
        yield from self.own
        for mapping in self.state:
            yield from _tensors(mapping.values())

    def storages(self) -> set[int]:
        """Identities of the storages of all tensors that the block is called with, and finds in the state."""
        return {t.untyped_storage()._cdata for t in _tensors([self.args, self.kwargs])}

    def trial(self) -> BlockCall:
        """The same call with a copy of its state: a block that is run on trial leaves nothing behind."""
        if not self.state:
            return self
        copies = {id(mapping): _copied(mapping) for mapping in self.state}
        return BlockCall(
            tuple(copies.get(id(x), x) for x in self.args),
            {k: copies.get(id(x), x) for k, x in self.kwargs.items()},
            self.own,
            tuple(copies.values()),
            self.runs,
        )


#: Of a block that the model passes by.
PASSED_BY = BlockCall(runs=False)


def call_block(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """The hidden states that a block makes of others.

    Raises:
        SourceFault: transformers' code of the block cannot compute with what config.json made it of.
    """
    if not call.runs:
        return hidden
    try:
        output = block(hidden, *call.args, **call.kwargs)
    except TypeError as error:
        raise SourceFault(
            f"{type(block).__name__}: transformers' code of the block stops ({first_line(error)}): a number "
            "of config.json is none that it computes with, or quant calls it as it is not meant to be; "
            "compare config.json with the published one"
        ) from error
    return output[0] if isinstance(output, tuple) else output


class CallSharing:
    """Makes calls of what the blocks were recorded to be called with, and keeps once what batches of one
    shape share."""

    def __init__(self) -> None:
        self._first: dict[torch.Size, list[BlockCall]] = {}

    def calls(
        self, hidden: torch.Tensor, recorded: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]] | None]
    ) -> list[BlockCall]:
        """The calls of all blocks in one batch whose embedded tokens are ``hidden``; ``recorded``: by block,
        positional and named values, or None of a block that was not called."""
        first = self._first.get(hidden.shape)
        batch = _Batch(hidden, first is not None)
        calls = [
            PASSED_BY if entry is None else batch.call(*entry, PASSED_BY if first is None else first[index])
            for index, entry in enumerate(recorded)
        ]
        self._first.setdefault(hidden.shape, calls)
        return calls


class _Batch:
    """The values of one batch; each object becomes one, however many blocks are given it.

    ``compared``: there was another batch of its shape. What the first one alone has is not told from what is
    shared, and stays where it is.
    """

    def __init__(self, hidden: torch.Tensor, compared: bool):
        self._hidden, self._compared = hidden.untyped_storage().data_ptr(), compared
        self._made: dict[tuple[int, int], tuple[Any, Any, Any]] = {}

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: BlockCall) -> BlockCall:
        own: dict[int, torch.Tensor] = {}
        state: dict[int, MutableMapping[Any, Any]] = {}
        before = known.args if len(known.args) == len(args) else (None,) * len(args)
        made = tuple(self._value(x, k, own, state) for x, k in zip(args, before, strict=True))
        named = {n: self._value(x, known.kwargs.get(n), own, state) for n, x in kwargs.items()}
        return BlockCall(made, named, tuple(own.values()), tuple(state.values()))

    def _value(
        self, value: Any, known: Any, own: dict[int, torch.Tensor], state: dict[int, MutableMapping[Any, Any]]
    ) -> Any:
        """``value``, or the equal ``known`` of another batch in its place; what belongs to this batch alone
        is noted in ``own`` and ``state``."""
        if isinstance(value, MutableMapping) and not value:
            state[id(value)] = value
            return value
        key = id(value), id(known)
        if key not in self._made:
            # kept together, so that no identity is used again
            self._made[key] = value, known, known if same(value, known) else self._apart(value)
        made = self._made[key][2]
        if self._compared and made is not known:
            own |= {id(t): t for t in _tensors([made])}
        return made

    def _apart(self, value: Any) -> Any:
        """The value with tensors in storages of their own, so that nothing else is set aside with them."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            shared = storage.nbytes() != value.nbytes and self._compared
            shared = shared or storage.data_ptr() == self._hidden
            return value.clone(memory_format=torch.contiguous_format) if shared else value
        if type(value) in (tuple, list):
            return type(value)(self._apart(x) for x in value)
        if type(value) is dict:
            return {k: self._apart(x) for k, x in value.items()}
        return value


def same(a: Any, b: Any) -> bool:
    """Whether two values that a block is called with are equal, tensors inside them by value."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


def _copied(mapping: MutableMapping[Any, Any]) -> MutableMapping[Any, Any]:
    copy = type(mapping)()
    copy.update(mapping)
    return copy
