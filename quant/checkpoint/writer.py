"""Writes safetensors files whose every tensor is known beforehand: the header goes first, the data follows as
it is made.

Because the plan fixes names, dtypes and shapes, the size of the output is exact before any work, the disk's
room is claimed at once, and no more than one tensor is held in memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from quant.checkpoint.header import DTYPE_BYTES, read_header
from quant.errors import DiskFull
from quant.units import format_size

if TYPE_CHECKING:
    import torch


#: Pieces from this size up are hashed by a thread: below, handing them over costs as much. Bytes read at a
#: time.
_LARGE, _READ = 1 << 18, 8 << 20


@dataclass(frozen=True)
class TensorSpec:
    """Name, header dtype and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def header_bytes(specs: Sequence[TensorSpec]) -> bytes:
    """The header of a file with these tensors in this order, padded to 8 bytes so that data is aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_bytes(specs: Sequence[TensorSpec]) -> int:
    """Size of the file that :class:`ShardWriter` makes of these tensors."""
    return len(header_bytes(specs)) + sum(s.nbytes for s in specs)


class ShardWriter:
    """One safetensors file in the making. Tensors come in any order; ``close`` demands all of them and syncs,
    and leaves in ``digest`` what :func:`file_digest` will find as long as the file stays as it was written.

    The hash is made of the bytes in memory, so that it also tells what the disk did to them. A thread makes
    it of each piece while the piece is being written: SHA-256 runs at over a GB/s beside the write, where a
    hash after the fact would read everything again.

    Raises:
        DiskFull: no room for the whole file (claimed when the file is opened) or for a write.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]):
        self.path = path
        self.digest = ""
        header = header_bytes(specs)
        self._header = header
        self._hashes: dict[str, bytes] = {}
        self._hasher = ThreadPoolExecutor(1)
        position = len(header)
        self._specs: dict[str, tuple[TensorSpec, int]] = {}
        for spec in specs:
            self._specs[spec.name] = (spec, position)
            position += spec.nbytes
        self._missing = set(self._specs)
        self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        try:
            try:
                os.posix_fallocate(self._file, 0, position)
            except OSError as error:
                # some file systems cannot reserve; they fail at the write instead
                if error.errno != errno.EOPNOTSUPP:
                    raise
            self._write(header, 0)
        except OSError as error:
            self._abandon()
            raise self._explain(error, position) from error

    def _explain(self, error: OSError, needed: int) -> OSError | DiskFull:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = os.statvfs(self.path.parent)
            return DiskFull(
                f"{self.path}: the disk is full: {format_size(needed)} are needed, "
                f"{format_size(free.f_bavail * free.f_frsize)} are free. "
                "Free some room and run the same command again: finished work is kept"
            )
        # a write's own error names no file
        return OSError(error.errno, error.strerror, str(self.path)) if error.errno else error

    def _write(self, data: bytes | bytearray | memoryview, position: int) -> None:
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        while view:
            count = os.pwrite(self._file, view, position)
            position, view = position + count, view[count:]

    def write_pieces(self, name: str, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        """Writes a tensor from raw bytes."""
        spec, start = self._specs[name]
        position = start
        digest = hashlib.sha256()
        try:
            for piece in pieces:
                if len(piece) < _LARGE:
                    digest.update(piece)
                    self._write(piece, position)
                else:
                    hashed = self._hasher.submit(digest.update, piece)
                    self._write(piece, position)
                    hashed.result()  # the next piece may take this one's place in memory
                position += len(piece)
        except OSError as error:
            raise self._explain(error, spec.nbytes) from error
        if position != start + spec.nbytes:
            raise AssertionError(f"{name}: {position - start} bytes written, {spec.nbytes} planned")
        self._hashes[name] = digest.digest()
        self._missing.discard(name)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor from any device. Its dtype and shape must be the planned ones."""
        import torch

        from quant.checkpoint.dtypes import HEADER

        spec, _ = self._specs[name]
        if (HEADER[tensor.dtype], tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise AssertionError(
                f"{name}: made as {tensor.dtype} {tuple(tensor.shape)}, planned as {spec.dtype} {spec.shape}"
            )
        flat = tensor.detach().cpu().contiguous().view(-1)
        self.write_pieces(name, [memoryview(flat.view(torch.uint8).numpy().data)] if spec.nbytes else [])

    def close(self) -> None:
        """Syncs and closes the file; every planned tensor must have been written."""
        if self._missing:
            raise AssertionError(f"{self.path}: never written: {sorted(self._missing)[:3]}")
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._explain(error, 0) from error
        finally:
            self._hasher.shutdown()
            os.close(self._file)
            self._file = -1
        self.digest = _digest(self._header, (self._hashes[name] for name in self._specs))

    def _abandon(self) -> None:
        self._hasher.shutdown()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()


def _digest(header: bytes, tensors: Iterable[bytes]) -> str:
    """Of a header and the SHA-256 of each tensor's bytes in file order."""
    return hashlib.sha256(header + b"".join(tensors)).hexdigest()


def file_digest(path: Path) -> str:
    """The ``digest`` that :class:`ShardWriter` gives a file, from reading it.

    Raises:
        CheckpointError: it is no safetensors file.
        OSError: it cannot be read.
    """
    tensors = sorted(read_header(path)[0].values(), key=lambda t: (t.start, t.end))
    hashes = []
    buffer = memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as stream:
        header = stream.read(8)
        header += stream.read(int.from_bytes(header, "little"))
        for tensor in tensors:
            digest, left = hashlib.sha256(), tensor.nbytes
            stream.seek(tensor.start)
            while left and (count := stream.readinto(buffer[: min(left, _READ)])):
                digest.update(buffer[:count])
                left -= count
            hashes.append(digest.digest())
    return _digest(header, hashes)


def write_text(path: Path, text: str) -> None:
    """Writes a small file and syncs it, so that a rename after it never shows an empty one."""
    try:
        with path.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"{path}: the disk is full. Free some room and run the same command again: finished work is "
                "kept"
            ) from error
        raise


def sync_folder(path: Path) -> None:
    """Makes names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
