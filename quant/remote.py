"""Checkpoints on object storage, read range by range through fsspec: ``s3://bucket/model``, ``gs://…``,
``file://…``, whatever fsspec has a file system for. ``hf://org/name`` is the Hub's own cache.

Such a checkpoint gets a folder in the cache here that looks like it: config, index, tokenizer and all other
small files are copied, a weight file is an empty one of the same size, which is no safetensors file to
anybody who reads it as one. :func:`open_weights` reads the bytes of those where they are, and keeps as many
as one decoder block has on a file without a name: what a job reads twice it fetches once.

Source: fsspec's AbstractFileSystem (``ls``, ``info``, ``cat_file``, ``get_file``).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from quant.errors import CheckpointError

#: The file that says of a folder which checkpoint it stands for; headers of its weight files lie beside it.
MARK = ".quant-remote.json"
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.+", re.IGNORECASE)
#: The package that fsspec needs for a kind of storage.
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
    "abfss": "adlfs", "http": "aiohttp", "https": "aiohttp", "oci": "ocifs", "oss": "ossfs",
    "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "hdfs": "pyarrow",
}  # fmt: skip
#: Bytes that are fetched at a time; the most of a file that is copied whole; the most of a header.
_CHUNK, _SMALL, _HEADER = 8 << 20, 256 << 20, 100_000_000
#: What file systems call what changes with a file.
_VERSIONS = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "md5Hash", "created")
#: Seconds before a request that failed is made again, once for each.
_PAUSES = (0.5, 2.0, 8.0)
#: Files that no command reads.
_NOT_READ = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".ckpt", ".npz", ".tflite")


def is_remote(text: str) -> bool:
    """Whether a model is named by an address of storage.

    >>> is_remote("s3://bucket/model"), is_remote("models/s3"), is_remote("org/name")
    (True, False, False)
    """
    return _URL.fullmatch(text) is not None


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it.

    Raises:
        CheckpointError: a package is missing, or there is no such kind of storage.
    """
    kind = url.partition("://")[0].lower()
    try:
        import fsspec
    except ImportError as error:
        raise CheckpointError(f"{url}: reading it needs fsspec: pip install 'quant[remote]'") from error
    try:
        system, path = fsspec.core.url_to_fs(url)
        return system, str(path).rstrip("/")
    except ImportError as error:
        package = _PACKAGES.get(kind)
        how = f"{package}: pip install {package}" if package else f"a package that is missing: {error}"
        raise CheckpointError(f"{url}: reading {kind}:// needs {how}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{url}: fsspec knows no storage of the kind {kind}:// ({error}): copy the checkpoint here, or "
            "name it by s3://, gs://, file:// or another that is known"
        ) from error


def mirrored(url: str) -> Path:
    """The folder in the cache that stands for a checkpoint; small files that have changed are fetched again.

    Raises:
        CheckpointError: storage that cannot be read, or no checkpoint there.
    """
    system, root = _file_system(url)
    entries = _asked(url, lambda: system.ls(root, detail=True))
    files = {
        name: entry
        for entry in entries
        if entry.get("type") == "file" and (name := str(entry["name"]).rpartition("/")[2])
    }
    if "config.json" not in files:
        raise CheckpointError(f"{url}: has no config.json: give the folder of a checkpoint")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quant" / "remote"
    name = root.rpartition("/")[2] or "model"
    folder = base / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16] / name
    known = _marked(folder)
    stated = {} if known is None else known["files"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made: dict[str, dict[str, Any]] = {}
        for name, entry in sorted(files.items()):
            if name.startswith(".") or name.endswith(_NOT_READ):
                continue
            size, key = int(entry["size"]), _version(system, entry)
            weights = name.endswith(".safetensors")
            if not weights and size > _SMALL:
                continue
            made[name] = {"size": size, "version": key, "weights": weights}
            if stated.get(name) == made[name] and (folder / name).is_file():
                continue
            if weights:
                _stand_in(url, system, str(entry["name"]), folder / name, size, key)
            else:
                _asked(url, lambda entry=entry, name=name: _copy(system, entry["name"], folder / name))
        for gone in set(stated) - set(made):
            (folder / gone).unlink(missing_ok=True)
        temporary = folder / f"{MARK}.{os.getpid()}"
        temporary.write_text(json.dumps({"url": url, "files": made}, indent=1), encoding="utf-8")
        temporary.replace(folder / MARK)
        _storage.cache_clear()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def _copy(system: Any, path: str, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_bytes(system.cat_file(path))
    temporary.replace(target)


def _version(system: Any, entry: dict[str, Any]) -> str:
    """What changes when a file does."""
    stated = {k: str(entry[k]) for k in _VERSIONS if k in entry}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]


def _stand_in(url: str, system: Any, path: str, target: Path, size: int, version: str) -> None:
    """An empty file of the same size; its header beside it."""
    head = _asked(url, lambda: system.cat_file(path, start=0, end=min(size, 64)))
    (length,) = struct.unpack("<Q", head[:8]) if len(head) >= 8 else (0,)
    end = min(8 + length, size) if length <= _HEADER else min(size, 64)
    header = head[:end]
    if end > len(head):
        header += _asked(url, lambda: system.cat_file(path, start=len(head), end=end))
    target.with_name(f".{target.name}.header").write_bytes(header)
    with target.open("wb") as stream:
        stream.truncate(size)
    # a job that goes on looks at size and time to see whether its source is the same
    stamp = int(version, 16) % 10**18
    os.utime(target, ns=(stamp, stamp))


def _asked(url: str, request: Any) -> Any:
    """What storage answers, asked again after a while where it does not.

    Raises:
        CheckpointError: nothing is there, or it does not answer.
    """
    for pause in (*_PAUSES, None):
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{url}: there is no such folder: check the address") from error
        except PermissionError as error:
            raise CheckpointError(f"{url}: access is denied ({error}): check the credentials") from error
        except Exception as error:  # what storage and networks do is of many kinds
            if pause is None:
                raise CheckpointError(
                    f"{url}: cannot be read ({type(error).__name__}: {str(error)[:160]}): check network and "
                    "credentials, then run the same command again"
                ) from error
        time.sleep(pause)
    raise AssertionError


def _marked(folder: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("files"), dict) else None


def url_of(folder: Path) -> str | None:
    """The address that a folder of the cache stands for; None of any other."""
    found = _marked(folder)
    return None if found is None else str(found["url"])


def open_weights(file: Path) -> IO[bytes]:
    """A weight file, unbuffered: of a folder that stands for storage what is there.

    Raises:
        OSError: it cannot be read.
    """
    if (storage := _storage(str(file.parent))) is not None and file.name in storage.sizes:
        return _Remote(storage, file.name)  # type: ignore[return-value]
    return file.open("rb", buffering=0)


@lru_cache(maxsize=64)
def _storage(folder: str) -> _Storage | None:
    found = _marked(Path(folder))
    if found is None:
        return None
    sizes = {name: int(f["size"]) for name, f in found["files"].items() if f["weights"]}
    return _Storage(Path(folder), str(found["url"]), sizes)


@dataclass(eq=False)
class _Storage:
    """The weight files of one checkpoint, and the bytes of them that are kept here."""

    folder: Path
    url: str
    sizes: dict[str, int]
    _slots: OrderedDict[tuple[str, int], int] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _file: int = -1
    _most: int = 0
    fetched: int = 0  #: bytes, of data

    def header(self, name: str) -> bytes:
        return (self.folder / f".{name}.header").read_bytes()

    def chunk(self, name: str, number: int) -> bytes:
        """Bytes of a file from ``number`` · :data:`_CHUNK` on, as many as that or the rest."""
        start = number * _CHUNK
        end = min(start + _CHUNK, self.sizes[name])
        with self._lock:
            if self._file < 0:
                with tempfile.TemporaryFile(dir=self.folder) as file:
                    self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
                self._most = -(-self._largest_block() // _CHUNK) + 2
            if (slot := self._slots.get((name, number))) is not None:
                self._slots.move_to_end((name, number))
                return os.pread(self._file, end - start, slot * _CHUNK)
            system, root = _file_system(self.url)
            data: bytes = _asked(self.url, lambda: system.cat_file(f"{root}/{name}", start=start, end=end))
            if len(data) != end - start:
                raise CheckpointError(
                    f"{self.url}/{name}: gives {len(data)} bytes of {end - start} asked for"
                )
            self.fetched += len(data)
            full = len(self._slots) >= self._most
            slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
            self._slots[name, number] = slot
            os.pwrite(self._file, data, slot * _CHUNK)
            return data

    def _largest_block(self) -> int:
        """Bytes of the decoder block that has most: tensors whose names have the same first number."""
        sums: dict[str, int] = {}
        for name in self.sizes:
            try:
                header = json.loads(self.header(name)[8:])
                for tensor, entry in header.items():
                    if (number := re.search(r"\.(\d+)\.", tensor)) is not None:
                        start, end = entry["data_offsets"]
                        key = tensor[: number.end()]
                        sums[key] = sums.get(key, 0) + end - start
            except (ValueError, KeyError, TypeError, AttributeError):  # the reader says what is wrong with it
                continue
        return max(sums.values(), default=0)


class _Remote(io.RawIOBase):
    """A weight file of storage as a stream."""

    def __init__(self, storage: _Storage, name: str):
        self._storage, self._name, self._position = storage, name, 0
        self._header = storage.header(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._storage.sizes[self._name]}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, but at the file's end: who compares two files does so piece by piece."""
        view, size = memoryview(buffer).cast("B"), self._storage.sizes[self._name]
        filled = 0
        while filled < len(view) and self._position < size:
            data = self._from(self._position)[: len(view) - filled]
            view[filled : filled + len(data)] = data
            filled, self._position = filled + len(data), self._position + len(data)
        return filled

    def _from(self, start: int) -> memoryview:
        """Some bytes of the file from there on."""
        if start < len(self._header):
            return memoryview(self._header)[start:]
        number, inside = divmod(start, _CHUNK)
        return memoryview(self._storage.chunk(self._name, number))[inside:]
