"""Files without a name, each of one tensor, in the folder of scratch files: for what memory is not meant for
and is read seldom, as what the experts of a mixture read. They count themselves, so that a job says what disk
it took."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import weakref
from pathlib import Path

import torch

from quant.errors import DiskFull
from quant.units import format_size


class ScratchFiles:
    """Holds tensors on files, whose pages are read when they are asked for.

    Args:
        folder: None: the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.held = self.most = 0  #: bytes that there are, and that there were at once at the most

    def hold(self, tensor: torch.Tensor) -> tuple[torch.Tensor, mmap.mmap]:
        """The same contiguous tensor of a CPU on a file, which goes when the tensor does; and its pages.

        Raises:
            DiskFull: there is no room.
        """
        try:
            # a file for each, gone with its map: nothing is left to close when the work ends early
            with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
                file.truncate(tensor.nbytes)
                view = memory_of(tensor)
                while view:
                    view = view[file.write(view) :]
                mapped = mmap.mmap(file.fileno(), tensor.nbytes)
        except OSError as error:
            raise DiskFull(
                f"{self.folder or tempfile.gettempdir()}: cannot hold {format_size(tensor.nbytes)} more of a "
                f"layer of experts ({error.strerror or error}): free some room, or use fewer --samples or a "
                "shorter --sequence-length"
            ) from error
        self._count(tensor.nbytes)
        weakref.finalize(mapped, self._count, -tensor.nbytes)
        return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape), mapped

    def _count(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, themselves: a numpy view would mark the storage as not
    resizable for good. The tensor must outlive the view."""
    return memory_at(tensor.data_ptr(), tensor.nbytes)


def memory_at(address: int, size: int) -> memoryview:
    """So many bytes of memory."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
