"""One forward pass through a block in which every linear is quantized at the moment its input is known.

The usual way runs a block twice over the calibration rows: once to gather statistics, once more with quantized weights for the next block's
inputs. Here each batch runs in a coroutine (a greenlet, so that the model's own code needs no change) that is suspended when it reaches a
linear still to be quantized. When all batches wait at the same linears, their statistics are complete: the linears are quantized and the
batches go on through the new weights. Every linear runs once, and each one's statistics are of what it will really see, quantized layers of
its own block included (the "true sequential" order of GPTQ).

Suspended batches hold activations. :class:`ActivationStore` keeps a bounded part of them in memory (on the device) and the rest in a scratch
file (for a GPU: in host memory).
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from quant.errors import DiskFull, QuantError
from quant.models.adapter import InputGroup
from quant.models.skeleton import BlockCall
from quant.units import format_size


class ActivationStore:
    """Puts tensors aside and brings them back, in place: the storage is emptied and refilled, so every view of it stays valid.

    Args:
        resident: bytes that may stay where they are.
        scratch: file for the rest of a CPU's tensors; a GPU's go to host memory.
    """

    def __init__(self, resident: int, scratch: Path):
        self.resident, self.scratch = resident, scratch
        self._used = 0
        self._file = -1
        self._free: dict[int, list[int]] = {}
        self._end = 0
        self.spilled_peak = 0

    def put(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Sets a tensor aside; the returned function brings it back."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if self._used + size <= self.resident:
            self._used += size

            def release() -> None:
                self._used -= size

            return release
        if tensor.is_cuda:
            copy = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            device_view = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            copy.copy_(device_view)
            storage.resize_(0)

            def restore() -> None:
                storage.resize_(size)
                torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage).copy_(copy)

            return restore
        offset = self._write(storage, size)
        storage.resize_(0)

        def read() -> None:
            storage.resize_(size)
            view, position = _bytes_of(storage), offset
            while view:
                count = os.preadv(self._file, [view], position)
                if not count:
                    raise QuantError(
                        f"{self.scratch}: the scratch file ended early: another process changed it; run the same command again"
                    )
                position, view = position + count, view[count:]
            self._free.setdefault(size, []).append(offset)

        return read

    def _write(self, storage: torch.UntypedStorage, size: int) -> int:
        if self._file < 0:
            self._file = os.open(self.scratch, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
        slots = self._free.get(size)
        if slots:
            offset = slots.pop()
        else:
            offset, self._end = self._end, self._end + size
            self.spilled_peak = self._end
        view, position = _bytes_of(storage), offset
        try:
            while view:
                count = os.pwrite(self._file, view, position)
                position, view = position + count, view[count:]
        except OSError as error:
            raise DiskFull(
                f"{self.scratch}: cannot hold {format_size(self._end)} of calibration activations ({error.strerror}): free some room, "
                "or use fewer --samples or a shorter --sequence-length"
            ) from error
        return offset

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.scratch.unlink(missing_ok=True)


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    """The bytes themselves: a numpy view would mark the storage as not resizable for good."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


class Batches:
    """Hidden states of all batches between blocks, set aside while nothing reads them."""

    def __init__(self, store: ActivationStore, hidden: Sequence[torch.Tensor]):
        self._store = store
        self._entries: list[tuple[torch.Tensor, Callable[[], None]] | None] = [(h, store.put(h)) for h in hidden]

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, index: int) -> torch.Tensor:
        """Hands a batch over: it is no longer held here."""
        entry = self._entries[index]
        assert entry is not None
        self._entries[index] = None
        entry[1]()
        return entry[0]

    def put(self, index: int, hidden: torch.Tensor) -> None:
        self._entries[index] = (hidden, self._store.put(hidden))


@dataclass
class _Waiting:
    """A suspended batch: where it waits, the tensors of ours that it may keep alive, and what brings those back."""

    coroutine: greenlet
    group: InputGroup
    seen: list[weakref.ref[torch.Tensor]]
    restore: list[Callable[[], None]]


def run_block(block: nn.Module, batches: Batches, calls: Mapping[int, BlockCall]) -> None:
    """Replaces every batch by the block's output."""
    with torch.no_grad():
        for index in range(len(batches)):
            batches.put(index, _call(block, batches.take(index), calls))


def _call(block: nn.Module, hidden: torch.Tensor, calls: Mapping[int, BlockCall]) -> torch.Tensor:
    call = calls[len(hidden)]
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


class StagedForward:
    """The pass. Iterate over :meth:`stages`; when it ends, ``batches`` holds the block's outputs.

    Args:
        block: filled, on its device.
        groups: the groups of linears to stop at.
        batches: inputs of the block, replaced by its outputs.
        calls: by batch size, what the block is called with.
        observe: called with (group, batch index, inputs [B, T, K]) as each batch arrives at a group.
        need_outputs: False for the last block, whose last linear nobody reads: its batches are dropped there.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[InputGroup],
        batches: Batches,
        calls: Mapping[int, BlockCall],
        store: ActivationStore,
        observe: Callable[[InputGroup, int, torch.Tensor], None],
        need_outputs: bool = True,
    ):
        self._block, self._batches, self._calls, self._store, self._observe = block, batches, calls, store, observe
        self._groups = {linear: group for group in groups for linear in group.linears}
        self._finished: set[InputGroup] = set()
        self._count, self._need_outputs = len(groups), need_outputs

    def stages(self) -> Generator[InputGroup, None, None]:
        """Yields each group when all batches wait at it; the caller must put the new weights in place before going on.

        Raises:
            QuantError: batches reach the linears in different orders, or never reach some.
        """
        originals = {}
        for name in self._groups:
            module = self._block.get_submodule(name)
            originals[name] = module.forward
            module.forward = _Stop(self, name, module.forward)
        waiting: list[_Waiting] = []
        try:
            with torch.no_grad():
                waiting = [w for i in range(len(self._batches)) if (w := self._start(i))]
                while waiting:
                    arrived = {w.group for w in waiting}
                    if len(arrived) > 1 or len(waiting) != len(self._batches):
                        raise QuantError("batches reach the block's linears in different orders: the block chooses its path by content")
                    group = arrived.pop()
                    yield group
                    self._finished.add(group)
                    if len(self._finished) == self._count and not self._need_outputs:
                        break
                    waiting = [r for i, w in enumerate(waiting) if (r := self._resume(i, w))]
        finally:
            for name, forward in originals.items():
                self._block.get_submodule(name).forward = forward
            for entry in waiting:
                entry.coroutine.throw()  # ends it where it waits
        missing = [n for n, g in self._groups.items() if g not in self._finished]
        if missing:
            raise QuantError(
                f"the block's forward pass never used {', '.join(missing[:4])}: the model's adapter names linears that do not run"
            )

    def _start(self, index: int) -> _Waiting | None:
        hidden = self._batches.take(index)
        coroutine = greenlet(lambda h: _call(self._block, h, self._calls))
        return self._arrived(index, coroutine, [weakref.ref(hidden)], coroutine.switch(hidden))

    def _resume(self, index: int, waiting: _Waiting) -> _Waiting | None:
        for restore in waiting.restore:
            restore()
        waiting.restore = []
        return self._arrived(index, waiting.coroutine, waiting.seen, waiting.coroutine.switch())

    def _arrived(self, index: int, coroutine: greenlet, seen: list[weakref.ref[torch.Tensor]], message: Any) -> _Waiting | None:
        if coroutine.dead:
            self._batches.put(index, message)
            return None
        group, inputs = message
        self._observe(group, index, inputs)
        alive = [t for r in [*seen, weakref.ref(inputs)] if (t := r()) is not None]
        held = {t.untyped_storage().data_ptr(): t for t in alive}.values()  # two views of one storage are one tensor to put aside
        return _Waiting(coroutine, group, [weakref.ref(t) for t in held], [self._store.put(t) for t in held])


class _Stop:
    """The forward of a linear that waits for its quantization."""

    def __init__(self, staged: StagedForward, name: str, forward: Callable[[torch.Tensor], torch.Tensor]):
        self._staged, self._name, self._forward = staged, name, forward

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        group = self._staged._groups[self._name]
        if group not in self._staged._finished:
            parent = getcurrent().parent
            assert parent is not None
            parent.switch((group, inputs))
        return self._forward(inputs)
