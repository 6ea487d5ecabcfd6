"""Writes a GGUF file whose every tensor is known beforehand: keys and the list of tensors first, then the
data as it is made, no more than a piece of one tensor in memory. No torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from quant.errors import DiskFull
from quant.gguf.levels import package, row_bytes
from quant.units import format_size

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written.

    Attributes:
        name: GGUF's.
        shape: outermost first, as torch has it.
        type: ggml's name.
        rows: makes its rows in order, uint8 [any number, bytes of a row].
        sources: names of the checkpoint's tensors that it is made of.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    rows: Callable[[], Iterable[np.ndarray]]
    sources: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


def write_tensors(file: Path, writer: GGUFWriter, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Writes the whole file and syncs it; yields each tensor once it is written.

    Args:
        writer: with all keys.

    Raises:
        DiskFull: there is no room for it.
    """
    import numpy as np

    gguf = package()
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.nbytes,
            gguf.GGMLQuantizationType[tensor.type],
        )
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        stream.flush()
        _claim(stream.fileno(), stream.tell() + sum(_padded(t.nbytes, writer) for t in tensors))
        for tensor in tensors:
            written = 0
            for rows in tensor.rows():
                written += stream.write(np.ascontiguousarray(rows).data)
            assert written == tensor.nbytes, f"{tensor.name}: {written} bytes made, {tensor.nbytes} planned"
            writer.write_padding(stream, written)
            yield tensor
        stream.flush()
        os.fsync(stream.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(t.nbytes for t in tensors)
            raise DiskFull(
                f"{file}: the disk is full: {format_size(needed)} are needed. Free some room and run the "
                "same command again"
            ) from error
        raise
    finally:
        for stream in writer.fout or ():
            try:
                stream.close()
            except OSError:  # of a full disk, said above; what is left is not the file yet
                pass


def _padded(nbytes: int, writer: GGUFWriter) -> int:
    return int(writer.ggml_pad(nbytes, writer.data_alignment))


def _claim(file: int, size: int) -> None:
    """Claims the disk's room at once, where the file system can."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
