"""One forward pass through a block in which every linear is quantized at the moment its input is known.

The usual way runs a block twice over the calibration rows: once to gather statistics, once more with
quantized weights for the next block's inputs. Here each batch runs in a coroutine (a greenlet, so that the
model's own code needs no change) that is suspended when it reaches a linear still to be quantized. When all
batches wait at the same linears, their statistics are complete: the linears are quantized and the batches go
on through the new weights. Every linear runs once, and each one's statistics are of what it will really see,
quantized layers of its own block included (the "true sequential" order of GPTQ).

Suspended batches hold activations. :class:`ActivationStore` keeps a bounded part of them in memory (on the
device) and the rest in a scratch file (for a GPU: in host memory). What the model's code still names but
reads no more, as attention's queries while its output is multiplied, is not kept: one batch that goes ahead
without stopping shows what is read after each stop.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from bisect import bisect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from quant.errors import DiskFull, QuantError
from quant.models.adapter import InputGroup
from quant.models.attention import attention_through
from quant.models.skeleton import BlockCall
from quant.units import format_size

#: Bytes that are written to the scratch file at a time. Of larger writes Linux keeps the page cache in larger
#: pages, which a virtual machine whose host takes free memory back is slow to find: 2.4 s for a GiB against
#: 0.3 s.
_WRITTEN = 1 << 16


class Space:
    """Places in a row of bytes. The first that is large enough is taken; neighbours that are given back
    become one.

    Args:
        limit: bytes there are; None: as many as are asked for.
    """

    def __init__(self, limit: int | None = None):
        self._limit = limit
        self._free: list[tuple[int, int]] = []  # (start, end), sorted, no two of which touch
        self.end = 0  #: where the bytes that were ever taken end

    def take(self, size: int) -> int | None:
        """Where ``size`` bytes may go, or None where there is no room."""
        for i, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[i : i + 1] = [(start + size, end)] if end - start > size else []
                return start
        if self._limit is not None and self.end + size > self._limit:
            return None
        start, self.end = self.end, self.end + size
        return start

    def give(self, start: int, size: int) -> None:
        """Gives a place back."""
        end = start + size
        i = bisect(self._free, (start, end))
        if i < len(self._free) and self._free[i][0] == end:
            end = self._free.pop(i)[1]
        if i and self._free[i - 1][1] == start:
            start = self._free.pop(i - 1)[0]
            i -= 1
        self._free.insert(i, (start, end))


class ActivationStore:
    """Puts tensors aside and brings them back, in place: the storage is emptied and refilled, so every view
    of it stays valid.

    A CPU's tensors go to one region of memory, which is made once: left where they are, among buffers that
    come and go, they would keep the heap from ever shrinking. What the region has no room for goes to the
    scratch file. A GPU's tensors stay where they are, and the rest goes to host memory.

    Args:
        resident: bytes that may stay in memory (on a GPU: where they are).
        scratch: file for the rest of a CPU's tensors; None: one without a name, in the system's folder for
            temporary files.
    """

    def __init__(self, resident: int, scratch: Path | None):
        self.resident, self.scratch = resident, scratch
        self.most = 0  #: bytes that were aside at once, at the most
        self._aside = self._used = 0
        self._region: torch.Tensor | None = None
        self._inside, self._outside = Space(resident), Space()
        self._file, self._written = -1, 0

    def put(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Sets a tensor aside; the returned function brings it back."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._aside += size
        self.most = max(self.most, self._aside)
        restore = (
            self._put_on_device(tensor.device, storage) if tensor.is_cuda else self._put_in_memory(storage)
        )

        def back() -> None:
            self._aside -= size
            restore()

        return back

    def drop(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Frees a tensor that nobody is going to read; the returned function makes it again, of NaN, so that
        whoever does is found out."""
        storage, device = tensor.untyped_storage(), tensor.device
        size = storage.nbytes()
        storage.resize_(0)

        def remake() -> None:
            storage.resize_(size)
            _bytes_of(storage, device).fill_(0xFF)  # NaN in every floating dtype

        return remake

    def _put_on_device(self, device: torch.device, storage: torch.UntypedStorage) -> Callable[[], None]:
        size = storage.nbytes()
        if self._used + size <= self.resident:
            self._used += size

            def release() -> None:
                self._used -= size

            return release
        copy = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        copy.copy_(_bytes_of(storage, device))
        storage.resize_(0)

        def restore() -> None:
            storage.resize_(size)
            _bytes_of(storage, device).copy_(copy)

        return restore

    def _put_in_memory(self, storage: torch.UntypedStorage) -> Callable[[], None]:
        size = storage.nbytes()
        if not size:
            return lambda: None
        start = self._inside.take(size)
        if start is None:
            return self._put_in_file(storage)
        if self._region is None:
            # pages are claimed as they are first written
            self._region = torch.frombuffer(mmap.mmap(-1, self.resident), dtype=torch.uint8)
        place = self._region[start : start + size]
        place.copy_(_bytes_of(storage))
        storage.resize_(0)

        def restore() -> None:
            storage.resize_(size)
            _bytes_of(storage).copy_(place)
            self._inside.give(start, size)

        return restore

    def _put_in_file(self, storage: torch.UntypedStorage) -> Callable[[], None]:
        size = storage.nbytes()
        offset = self._write(storage)
        storage.resize_(0)

        def read() -> None:
            storage.resize_(size)
            view, position = _view_of(storage), offset
            self._check_whole()
            while view:
                count = os.preadv(self._file, [view], position)
                if not count:
                    self._check_whole()
                position, view = position + count, view[count:]
            self._outside.give(offset, size)

        return read

    def _write(self, storage: torch.UntypedStorage) -> int:
        if self._file < 0:
            self._file = self._open()
        offset = self._outside.take(storage.nbytes())
        assert offset is not None
        view, position = _view_of(storage), offset
        self._check_whole()  # before the file grows again, with a hole that would be read as zeros
        try:
            while view:
                count = os.pwrite(self._file, view[:_WRITTEN], position)
                position, view = position + count, view[count:]
            self._written = max(self._written, position)
        except OSError as error:
            raise DiskFull(
                f"{self._place}: cannot hold {format_size(self._outside.end)} of calibration activations "
                f"({error.strerror}): free some room, "
                "or use fewer --samples or a shorter --sequence-length"
            ) from error
        return offset

    def _open(self) -> int:
        if self.scratch is not None:
            return os.open(self.scratch, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())

    @property
    def _place(self) -> Path:
        return self.scratch or Path(tempfile.gettempdir())

    def _check_whole(self) -> None:
        if os.fstat(self._file).st_size < self._written:
            raise QuantError(
                f"{self._place}: the scratch file ended early: another process changed it; run the same "
                "command again"
            )

    @property
    def spilled_bytes(self) -> int:
        """Largest size that the scratch file had."""
        return self._outside.end

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if self.scratch is not None:
                self.scratch.unlink(missing_ok=True)


def _bytes_of(storage: torch.UntypedStorage, device: torch.device | None = None) -> torch.Tensor:
    """A storage as uint8 [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _view_of(storage: torch.UntypedStorage) -> memoryview:
    """The bytes themselves: a numpy view would mark the storage as not resizable for good."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


class Batches:
    """Hidden states of all batches between blocks, set aside while nothing reads them."""

    def __init__(self, store: ActivationStore, hidden: Iterable[torch.Tensor]):
        self._store = store
        self._entries: list[tuple[torch.Tensor, Callable[[], None]] | None] = [
            (h, store.put(h)) for h in hidden
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def smallest(self) -> torch.Tensor:
        """A copy of a batch of the fewest rows."""
        rows = [len(entry[0]) for entry in self._entries if entry is not None]
        index = rows.index(min(rows))
        hidden = self.take(index)
        copy = hidden.clone()
        self.put(index, hidden)
        return copy

    def take(self, index: int) -> torch.Tensor:
        """Hands a batch over: it is no longer held here."""
        entry = self._entries[index]
        assert entry is not None
        self._entries[index] = None
        entry[1]()
        return entry[0]

    def put(self, index: int, hidden: torch.Tensor) -> None:
        self._entries[index] = (hidden, self._store.put(hidden))


#: What tensors of the same place in the block's code have in common, whatever the batch.
_Kind = tuple[torch.Size, torch.dtype]


def _kind(tensor: torch.Tensor) -> _Kind:
    return tensor.shape[1:], tensor.dtype


class _Batch(greenlet):
    """A batch on its way through the block. ``seen`` are tensors that belong to it alone and that the model's
    code may hold while it waits: what the block's linears, norms and attention are given."""

    seen: list[weakref.ref[torch.Tensor]]

    def held(self) -> list[torch.Tensor]:
        """Those of ``seen`` that are alive, in their order; two views of one storage are one."""
        alive = [t for r in self.seen if (t := r()) is not None]
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
        """For each stop and each tensor held there: what kind it is, and whether nothing has read it since."""
        return {
            g: [(kind, s._cdata not in self._after[g]) for s, kind in stop] for g, stop in self.stops.items()
        }


def _see(*tensors: object) -> None:
    batch = getcurrent()
    assert isinstance(batch, _Batch)
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
        self._block, self._batches, self._calls = block, batches, calls
        self._store, self._observe = store, observe
        self._groups = {linear: group for group in groups for linear in group.linears}
        self._finished: set[InputGroup] = set()
        self._count, self._need_outputs = len(groups), need_outputs
        self._reads: _Reads | None = None
        self._unread: dict[InputGroup, list[tuple[_Kind, bool]]] = {}

    def look_ahead(self) -> None:
        """Runs a copy of the smallest batch through the block as it is, to learn what batches that wait need
        not keep. Nothing is observed or replaced."""
        with torch.no_grad(), self._stops(), _Reads() as self._reads:
            batch = _Batch(lambda h: _call(self._block, h, self._calls))
            hidden = self._batches.smallest()
            batch.seen = [weakref.ref(hidden)]
            batch.switch(hidden)
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
        missing = [n for n, g in self._groups.items() if g not in self._finished]
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
            module = self._block.get_submodule(name)
            originals[name] = module.forward
            module.forward = _Stop(self, name, module.forward)
        try:
            with attention_through(self._block, "quant_watched", _see_attention):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, forward in originals.items():
                self._block.get_submodule(name).forward = forward

    def _start(self, index: int) -> _Waiting | None:
        hidden = self._batches.take(index)
        batch = _Batch(lambda h: _call(self._block, h, self._calls))
        batch.seen = [weakref.ref(hidden)]
        return self._arrived(index, batch, batch.switch(hidden))

    def _resume(self, index: int, waiting: _Waiting) -> _Waiting | None:
        # not kept: each holds the storage that it fills, which the block is about to be done with
        while waiting.restore:
            waiting.restore.pop()()
        return self._arrived(index, waiting.batch, waiting.batch.switch())

    def _arrived(self, index: int, batch: _Batch, message: Any) -> _Waiting | None:
        if batch.dead:
            self._batches.put(index, message)
            return None
        group, inputs = message
        self._observe(group, index, inputs)
        return _Waiting(batch, group, self._put_aside(group, batch.held()))

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

    def __init__(self, staged: StagedForward, name: str, forward: Callable[[torch.Tensor], torch.Tensor]):
        self._staged, self._name, self._forward = staged, name, forward

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        staged = self._staged
        group, batch = staged._groups[self._name], getcurrent()
        assert isinstance(batch, _Batch)
        if staged._reads is not None:
            if group not in staged._reads.stops:
                staged._reads.stop(group, batch.held())
        elif group not in staged._finished:
            assert batch.parent is not None
            batch.parent.switch((group, inputs))
        return self._forward(inputs)
