"""One forward pass through a block in which every linear is quantized at the moment its input is known.

The usual way runs a block twice over the calibration rows: once to gather statistics, once more with
quantized weights for the next block's inputs. Here each batch runs in a coroutine (a greenlet, so that the
model's own code needs no change) that is suspended when it reaches a linear still to be quantized. When all
batches wait at the same linears, their statistics are complete: the linears are quantized and the batches go
on through the new weights. Every linear runs once, and each one's statistics are of what it will really see,
quantized layers of its own block included (the "true sequential" order of GPTQ).

Suspended batches hold activations, which an :class:`ActivationStore` sets aside. What the model's code still
names but reads no more, as attention's queries while its output is multiplied, is not kept: one batch that
goes ahead without stopping shows what is read after each stop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from quant.errors import QuantError
from quant.models.adapter import InputGroup
from quant.models.attention import attention_through, staircase_attention
from quant.models.calls import BlockCall, call_block
from quant.models.experts import Routed, Stage, experts_through
from quant.models.products import linears_widened
from quant.pipeline.activation_store import ActivationStore, Batches, Calls

#: What tensors of the same place in the block's code have in common, whatever the batch.
_Kind = tuple[torch.Size, torch.dtype]


#: Pairs of a token and an expert that a look ahead computes.
_FEW = 8


def _kind(tensor: torch.Tensor) -> _Kind:
    return tensor.shape[1:], tensor.dtype


class _Batch(greenlet):
    """A batch on its way through the block. ``seen`` are tensors that belong to it alone and that the model's
    code may hold while it waits: what the block's linears, norms and attention are given."""

    seen: list[weakref.ref[torch.Tensor]]
    call: BlockCall

    def held(self, others: Collection[int]) -> list[torch.Tensor]:
        """Those of ``seen`` that are alive, in their order; two views of one storage are one. Storages in
        ``others`` are not the batch's to set aside."""
        alive = [t for r in self.seen if (t := r()) is not None and t.untyped_storage()._cdata not in others]
        held = list({t.untyped_storage().data_ptr(): t for t in alive}.values())
        self.seen = [weakref.ref(t) for t in held]
        return held


class _Reads(TorchDispatchMode):
    """While it is active, notes for each stop which of the storages held there are read after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: dict[InputGroup, list[tuple[torch.UntypedStorage, _Kind]]] = {}
        self._after: dict[InputGroup, set[int]] = {}

    def stop(self, group: InputGroup, held: Sequence[torch.Tensor]) -> None:
        # storages, which keep their identity from being used again; not tensors, which would be held at later
        # stops because of it
        self.stops[group] = [(t.untyped_storage(), _kind(t)) for t in held]
        self._after[group] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for after in self._after.values():
            after |= read
        return function(*args, **(kwargs or {}))

    def unread(self) -> dict[InputGroup, list[tuple[_Kind, bool]]]:
        """For each stop and each tensor held there: what kind it is, and whether nothing has read it
        since."""
        return {
            g: [(kind, s._cdata not in self._after[g]) for s, kind in stop] for g, stop in self.stops.items()
        }


def _see(*tensors: object) -> None:
    batch = getcurrent()
    if isinstance(batch, _Batch):  # modules of the block are also called while it is solved
        batch.seen += [weakref.ref(t) for t in tensors if isinstance(t, torch.Tensor)]


def _see_first(module: nn.Module, args: tuple[object, ...]) -> None:
    """Hook of a module without parts: its first argument is what flows through the block; others may be
    shared by all batches."""
    _see(*args[:1])


def _see_attention(
    inner: Callable[..., Any],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    _see(query, key, value)
    output, _ = inner(module, query, key, value, *args, **kwargs)
    # not the weights, tokens by tokens for each head: the batch would hold them while it waits
    return output, None


@dataclass
class _Waiting:
    """A suspended batch: where it waits, and what brings back the tensors that were put aside."""

    batch: _Batch
    group: InputGroup
    restore: list[Callable[[], None]]


@contextmanager
def computed(block: nn.Module) -> Iterator[None]:
    """While it lasts, the block's attention, experts and linears are computed in the ways that every pass of
    a job shares."""
    with (
        linears_widened(block),
        staircase_attention(block),
        experts_through(block, lambda path, stage, routed: None),
    ):
        yield


def run_block(block: nn.Module, index: int, batches: Batches, calls: Calls) -> None:
    """Replaces every batch by the output of block ``index``."""
    with torch.no_grad():
        for batch in range(len(batches)):
            batches.put(batch, call_block(block, batches.take(batch), calls.take(batch, index)))
            calls.put(batch, index)


class StagedForward:
    """The pass. Iterate over :meth:`stages`; when it ends, ``batches`` holds the block's outputs.

    Args:
        block: filled, on its device; ``index`` is its number.
        groups: the groups of linears to stop at; of experts one for each of a module's two products.
        batches: inputs of the block, replaced by its outputs.
        calls: what the blocks are called with.
        observe: called with (group, batch index, inputs [B, T, K]) as each batch arrives at a group.
        need_outputs: False for the last block, whose last linear nobody reads: its batches are dropped there.
        modules: by the names of plain linears in ``groups``, their modules' paths inside the block, where
            they differ.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        groups: Sequence[InputGroup],
        batches: Batches,
        calls: Calls,
        store: ActivationStore,
        observe: Callable[[InputGroup, int, torch.Tensor | Routed], None],
        need_outputs: bool = True,
        modules: Mapping[str, str] | None = None,
    ):
        self._block, self._index, self._batches, self._calls = block, index, batches, calls
        self._store, self._observe = store, observe
        self._groups = {n: group for group in groups for n in group.linears if not group.experts}
        self._experts = {(group.experts, group.stage): group for group in groups if group.experts}
        self._modules = {name: (modules or {}).get(name, name) for name in self._groups}
        self._finished: set[InputGroup] = set()
        self._count, self._need_outputs = len(groups), need_outputs
        self._reads: _Reads | None = None
        self._unread: dict[InputGroup, list[tuple[_Kind, bool]]] = {}

    def look_ahead(self) -> None:
        """Runs a copy of the smallest batch through the block, to learn what batches that wait need not keep.
        Nothing is observed or replaced. It is of no account what the batch is then, only what is read when:
        the linears are computed for its first token, and experts for the first pairs."""
        with torch.no_grad(), self._stops(), _Reads() as self._reads:
            number, hidden = self._batches.smallest()
            self._batch(self._calls.take(number, self._index).trial(), hidden).switch(hidden)
            self._calls.put(number, self._index)
        self._unread, self._reads = self._reads.unread(), None

    def stages(self) -> Generator[InputGroup, None, None]:
        """Yields each group when all batches wait at it; the caller must put the new weights in place before
        going on.

        Raises:
            QuantError: batches reach the linears in different orders, or never reach some.
        """
        waiting: list[_Waiting] = []
        with torch.no_grad(), self._stops():
            try:
                waiting = [w for i in range(len(self._batches)) if (w := self._start(i))]
                while waiting:
                    arrived = {w.group for w in waiting}
                    if len(arrived) > 1 or len(waiting) != len(self._batches):
                        raise QuantError(
                            "batches reach the block's linears in different orders: the block chooses its "
                            "path by content"
                        )
                    group = arrived.pop()
                    yield group
                    self._finished.add(group)
                    if len(self._finished) == self._count and not self._need_outputs:
                        break
                    waiting = [r for i, w in enumerate(waiting) if (r := self._resume(i, w))]
            finally:
                for entry in waiting:
                    entry.batch.throw()  # ends it where it waits
        every = {**self._groups, **{g.linears[0]: g for g in self._experts.values()}}
        missing = [n for n, g in every.items() if g not in self._finished]
        if missing:
            raise QuantError(
                f"the block's forward pass never used {', '.join(missing[:4])}: the model's adapter names "
                "linears that do not run"
            )

    @contextmanager
    def _stops(self) -> Iterator[None]:
        """While it lasts, batches stop at the linears, and what they hold is seen."""
        originals = {}
        hooks = [
            m.register_forward_pre_hook(_see_first) for m in self._block.modules() if not any(m.children())
        ]
        for name in self._groups:
            module = self._block.get_submodule(self._modules[name])
            originals[name] = module.forward
            # others that are called linears need not go token by token: DeepSeek-V4's reshapes by groups
            by_token = type(module) is nn.Linear
            module.forward = _Stop(self, name, module.forward, by_token)
        try:
            routed = experts_through(self._block, self._stop_experts) if self._experts else nullcontext()
            with attention_through(self._block, "quant_watched", _see_attention), routed:
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, forward in originals.items():
                self._block.get_submodule(self._modules[name]).forward = forward

    def _stop_experts(self, path: str, stage: Stage, routed: Routed) -> Routed | None:
        """Waits before a product of routed experts, as :class:`_Stop` does before a linear."""
        group, batch = self._experts.get((path, stage)), getcurrent()
        assert isinstance(batch, _Batch)
        _see(routed.rows)
        if group is None:
            return None
        if self._reads is not None:
            if group not in self._reads.stops:
                self._reads.stop(group, batch.held(batch.call.storages()))
            return _first_pairs(routed)
        if group not in self._finished:
            assert batch.parent is not None
            batch.parent.switch((group, routed))
        return None

    def _start(self, index: int) -> _Waiting | None:
        hidden = self._batches.take(index)
        batch = self._batch(self._calls.take(index, self._index), hidden)
        return self._arrived(index, batch, batch.switch(hidden))

    def _batch(self, call: BlockCall, hidden: torch.Tensor) -> _Batch:
        batch = _Batch(lambda h: call_block(self._block, h, call))
        batch.call, batch.seen = call, [weakref.ref(hidden)]
        return batch

    def _resume(self, index: int, waiting: _Waiting) -> _Waiting | None:
        self._calls.take(index, self._index)
        # not kept: each holds the storage that it fills, which the block is about to be done with
        while waiting.restore:
            waiting.restore.pop()()
        return self._arrived(index, waiting.batch, waiting.batch.switch())

    def _arrived(self, index: int, batch: _Batch, message: Any) -> _Waiting | None:
        if batch.dead:
            self._batches.put(index, message)
            self._calls.put(index, self._index)
            return None
        group, inputs = message
        self._observe(group, index, inputs)
        held = batch.held(batch.call.storages())
        self._calls.put(index, self._index)
        return _Waiting(batch, group, self._put_aside(group, held))

    def _put_aside(self, group: InputGroup, held: Sequence[torch.Tensor]) -> list[Callable[[], None]]:
        if not self._need_outputs and len(self._finished) == self._count - 1:
            return [self._store.drop(t) for t in held]  # the last stop, which no batch goes on from
        known = self._unread.get(group, [])
        if [kind for kind, _ in known] != [_kind(t) for t in held]:
            return [self._store.put(t) for t in held]
        return [
            self._store.drop(t) if unread else self._store.put(t)
            for t, (_, unread) in zip(held, known, strict=True)
        ]


class _Stop:
    """The forward of a linear that waits for its quantization."""

    def __init__(
        self,
        staged: StagedForward,
        name: str,
        forward: Callable[[torch.Tensor], torch.Tensor],
        by_token: bool,
    ):
        self._staged, self._name, self._forward, self._by_token = staged, name, forward, by_token

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        staged = self._staged
        group, batch = staged._groups[self._name], getcurrent()
        assert isinstance(batch, _Batch)
        if staged._reads is not None:
            if group not in staged._reads.stops:
                staged._reads.stop(group, batch.held(batch.call.storages()))
            if not self._by_token:
                return self._forward(inputs)
            first = self._forward(inputs[..., :1, :])
            return first.expand(*inputs.shape[:-1], first.shape[-1]).clone()
        if group not in staged._finished:
            assert batch.parent is not None
            batch.parent.switch((group, inputs))
        return self._forward(inputs)


def _first_pairs(routed: Routed) -> Routed:
    """The first pairs of all."""
    ends = routed.counts.cumsum(0).clamp(max=_FEW)
    counts = ends.diff(prepend=ends.new_zeros(1))
    return Routed(routed.rows, routed.index[:_FEW], counts, routed.gates[:_FEW])
