"""Calibration activations that are set aside while nothing reads them: a bounded part in memory (on the
device), the rest in a scratch file (for a GPU: in host memory)."""

from __future__ import annotations

import mmap
import os
import tempfile
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from quant.accelerator import on_accelerator
from quant.errors import DiskFull, QuantError
from quant.models.calls import BlockCall
from quant.pipeline.scratch import ScratchFiles, memory_at
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
        scratch: file for the rest of a CPU's tensors; None: one without a name, in ``folder``.
        folder: of such a file; None: the system's folder for temporary files.
        host: bytes of a GPU's tensors that may lie in host memory, the rest goes to the file; None: all.
    """

    def __init__(
        self,
        resident: int,
        scratch: Path | None,
        folder: Path | None = None,
        host: int | None = None,
    ):
        self.resident, self.scratch, self.host = resident, scratch, host
        self._folder = folder if scratch is None else scratch.parent
        self.files = ScratchFiles(self._folder)  #: for what is kept beside, as experts' inputs
        self.most = 0  #: bytes that were aside at once, at the most
        self._aside = self._used = self._hosted = 0
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
            self._put_on_device(tensor.device, storage)
            if on_accelerator(tensor)
            else self._put_in_memory(storage)
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
        filed = self.host is not None and self._hosted + size > self.host
        copy = torch.empty(size, dtype=torch.uint8, pin_memory=not filed)
        copy.copy_(_bytes_of(storage, device))
        storage.resize_(0)
        if filed and size:
            read = self._put_in_file(copy.untyped_storage())
        else:
            self._hosted += size

            def read() -> None:
                self._hosted -= size

        def restore() -> None:
            read()
            storage.resize_(size)
            _bytes_of(storage, device).copy_(copy)
            if filed:
                copy.untyped_storage().resize_(0)

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
        with tempfile.TemporaryFile(dir=self._folder) as file:
            return os.dup(file.fileno())

    @property
    def _place(self) -> Path:
        return self.scratch or self._folder or Path(tempfile.gettempdir())

    def _check_whole(self) -> None:
        if os.fstat(self._file).st_size < self._written:
            raise QuantError(
                f"{self._place}: the scratch file ended early: another process changed it; run the same "
                "command again"
            )

    @property
    def spilled_bytes(self) -> int:
        """Largest size that the scratch file had, and the files beside it together."""
        return self._outside.end + self.files.most

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
    """The bytes of a whole storage on the CPU, which must outlive the view."""
    return memory_at(storage.data_ptr(), storage.nbytes())


class Batches:
    """Hidden states of all batches between blocks, set aside while nothing reads them."""

    def __init__(self, store: ActivationStore, hidden: Iterable[torch.Tensor]):
        self._store = store
        self._entries: list[tuple[torch.Tensor, Callable[[], None]] | None] = [
            (h, store.put(h)) for h in hidden
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def smallest(self) -> tuple[int, torch.Tensor]:
        """The number of a batch of the fewest rows, and a copy of it."""
        sizes = [entry[0].numel() for entry in self._entries if entry is not None]
        index = sizes.index(min(sizes))
        return index, self.copy(index)

    def copy(self, index: int) -> torch.Tensor:
        """A copy of a batch, which stays here."""
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


class Calls:
    """What each batch calls a block with; tensors that belong to one batch alone are set aside while nothing
    reads them."""

    def __init__(self, store: ActivationStore, batches: Iterable[Sequence[BlockCall]] = ()):
        self._store = store
        self._calls: list[Sequence[BlockCall]] = []
        self._aside: list[dict[int, tuple[torch.Tensor, Callable[[], None]]]] = []
        for calls in batches:
            self.append(calls)

    def append(self, calls: Sequence[BlockCall]) -> None:
        """Takes over the calls of all blocks in the next batch."""
        self._calls.append(calls)
        self._aside.append({})
        for block in range(len(calls)):
            self.put(len(self._calls) - 1, block)

    def take(self, batch: int, block: int) -> BlockCall:
        """The call of a block, ready to be made."""
        call, aside = self._calls[batch][block], self._aside[batch]
        for tensor in call.movable():
            if (entry := aside.pop(tensor.untyped_storage()._cdata, None)) is not None:
                entry[1]()
        return call

    def put(self, batch: int, block: int) -> None:
        """Sets aside what belongs to the batch alone."""
        aside = self._aside[batch]
        for tensor in self._calls[batch][block].movable():
            key = tensor.untyped_storage()._cdata
            if key not in aside:
                aside[key] = tensor, self._store.put(tensor)
