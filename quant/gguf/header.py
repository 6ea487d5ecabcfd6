"""The header of a GGUF file, read with suspicion and without torch: keys and the list of tensors, of one file
or of all files of a split one.

A file starts with ``GGUF``, a version, the numbers of tensors and keys, then the keys (name, type, value),
then the tensors (name, sides, type, offset), padding to the alignment, and the data. Source: ggml's
``docs/gguf.md``. Every length is compared with what the file has left before a byte of it is used.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from quant.checkpoint.folders import not_itself
from quant.checkpoint.gguf_path import SPLIT
from quant.errors import CheckpointError, clipped
from quant.gguf.levels import package
from quant.remote import open_weights

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
#: ``enum gguf_type`` → struct's letter.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_SIDES = 4  # GGML_MAX_DIMS
#: Bytes of the smallest key and of the smallest tensor's entry: what bounds their numbers.
_LEAST_KEY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
_PIECE = 4 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: GGUF's.
        type: ggml's name; ``type N`` where the package has none.
        shape: outermost first, as torch has it.
        file, start: where its bytes are.
        nbytes: how many; 0 of a type that is not known.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Everything but the data.

    Attributes:
        files: of which the model is made, in order.
        fields: keys of the first file; arrays are lists.
        tensors: by GGUF's name, of all files.
    """

    files: tuple[Path, ...]
    fields: Mapping[str, Any]
    tensors: Mapping[str, Entry] = field(default_factory=dict)


def read_header(file: Path, any_type: bool = False) -> Header:
    """The header of a file, and of the others that it is split into.

    Args:
        any_type: take ggml's types that the ``gguf`` package does not know, or where it is not installed:
            for what is not computed here.

    Raises:
        CheckpointError: it cannot be read, is truncated, or breaks a rule of the format; the message names
            the file and the rule.
    """
    first = _read_one(file, any_type)
    count = first.fields.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return first
    parts = [first if p == file else _read_one(p, any_type) for p in _split_files(file, count)]
    tensors: dict[str, Entry] = {}
    for number, part in enumerate(parts):
        if part.fields.get("split.no") != number:
            raise CheckpointError(
                f"{part.files[0]}: split.no is {clipped(part.fields.get('split.no'))}, its name says "
                f"{number}: the files belong to different models, fetch them again"
            )
        for name, entry in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{entry.file}: tensor {clipped(name)} is also in {tensors[name].file.name}: the files "
                    "belong to different models, fetch them again"
                )
            tensors[name] = entry
    said = parts[0].fields.get("split.tensors.count", len(tensors))
    if said != len(tensors):
        raise CheckpointError(
            f"{parts[0].files[0]}: split.tensors.count is {clipped(said)}, the {count} files hold "
            f"{len(tensors)}: fetch them again"
        )
    return Header(tuple(p.files[0] for p in parts), parts[0].fields, tensors)


def _split_files(file: Path, count: int) -> list[Path]:
    """All files of a split one, by the name that llama.cpp gives them (``…-00001-of-00003.gguf``)."""
    named = SPLIT.fullmatch(file.name)
    if named is None or int(named[3]) != count or count > 99_999:
        raise CheckpointError(
            f"{file}: is one of {count} files of a split model, whose names must end in "
            f"-00001-of-{min(count, 99_999):05d}.gguf: give them their names back, or merge them with "
            "llama-gguf-split --merge"
        )
    files = [file.with_name(f"{named[1]}-{i:05d}-of-{named[3]}.gguf") for i in range(1, count + 1)]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(
            f"{file}: is one of {count} files of a split model, and {missing[0]}"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''} is not beside it: fetch it"
        )
    return files


class _Stream:
    """A file read from its beginning, no more of it than there is."""

    def __init__(self, file: Path, stream: IO[bytes], size: int):
        self.file, self.size, self.position = file, size, 0
        self._stream, self._data, self._offset = stream, b"", 0

    def refuse(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: not a valid GGUF file: {why}. Download or copy it again")

    def demand(self, count: int, what: str) -> None:
        """Refuses what claims more bytes than are left."""
        if count > self.size - self.position:
            raise self.refuse(f"{what} takes {count} bytes, {self.size - self.position} are left of the file")

    def take(self, count: int, what: str) -> bytes:
        self.demand(count, what)
        while len(self._data) - self._offset < count:
            missing = count - (len(self._data) - self._offset)
            piece = self._stream.read(max(_PIECE, missing))
            if not piece:
                raise self.refuse(f"it ends inside {what}")
            self._data, self._offset = self._data[self._offset :] + piece, 0
        start = self._offset
        self._offset, self.position = start + count, self.position + count
        return self._data[start : start + count]

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.refuse(f"{what} is no UTF-8 text") from error

    def value(self, kind: int, what: str) -> Any:
        """A key's value."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise self.refuse(f"{what} is of type {kind}, which no version of the format has")
        inner, count = self.number("I", what), self.number("Q", what)
        if inner in _NUMBERS:
            size = struct.calcsize(_NUMBERS[inner])
            return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", self.take(count * size, what)))
        if inner == _STRING:
            self.demand(8 * count, what)
            return [self.text(what) for _ in range(count)]
        raise self.refuse(f"{what} is an array of type {inner}: numbers and strings are read")


def _read_one(file: Path, any_type: bool) -> Header:
    try:
        found = file.stat()
        with open_weights(file) as stream:
            return _parsed(_Stream(file, stream, found.st_size), any_type)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


def _parsed(stream: _Stream, any_type: bool) -> Header:
    head = stream.take(min(8, stream.size), "the beginning")
    if head[:4] != _MAGIC or len(head) < 8:
        if what := not_itself(head):
            raise CheckpointError(f"{stream.file}: {what}")
        raise stream.refuse(f"it begins with {head[:4]!r}, not with {_MAGIC!r}")
    version = struct.unpack("<I", head[4:])[0]
    if struct.unpack(">I", head[4:])[0] in _VERSIONS:
        raise CheckpointError(
            f"{stream.file}: is a big-endian GGUF file: turn it with gguf-convert-endian (of the gguf "
            "package), or fetch the little-endian one"
        )
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{stream.file}: is GGUF of version {version}; read are {' and '.join(map(str, _VERSIONS))}: "
            "fetch a newer file of the model, or convert the original again"
        )
    tensors, keys = stream.number("Q", "the number of tensors"), stream.number("Q", "the number of keys")
    stream.demand(tensors * _LEAST_TENSOR, f"a list of {tensors} tensors")
    stream.demand(keys * _LEAST_KEY, f"a list of {keys} keys")
    fields: dict[str, Any] = {}
    for _ in range(keys):
        key = stream.text("a key")
        if key in fields:
            raise stream.refuse(f"key {clipped(key)} appears twice")
        fields[key] = stream.value(stream.number("I", f"key {clipped(key)}"), f"key {clipped(key)}")
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise stream.refuse(f"general.alignment is {clipped(alignment)}: a power of two from 8 is needed")
    entries = list(_entries(stream, tensors, any_type))
    data = -(-stream.position // alignment) * alignment
    return Header((stream.file,), fields, _placed(stream, entries, data, alignment))


def _entries(stream: _Stream, count: int, any_type: bool) -> Iterator[Entry]:
    """The tensors, their starts still counted from the beginning of the data."""
    gguf = None if any_type and importlib.util.find_spec("gguf") is None else package()
    types = {} if gguf is None else gguf.GGMLQuantizationType._value2member_map_
    for _ in range(count):
        name = stream.text("a tensor's name")
        shown = f"tensor {clipped(name)}"
        sides = stream.number("I", shown)
        if not 0 < sides <= _MOST_SIDES:
            raise stream.refuse(f"{shown} has {sides} sides: 1 to {_MOST_SIDES} are possible")
        shape = tuple(stream.number("Q", shown) for _ in range(sides))[::-1]
        kind, start = stream.number("I", shown), stream.number("Q", shown)
        if kind not in types and any_type and min(shape) > 0:
            yield Entry(name, f"type {kind}", shape, stream.file, start, 0)
            continue
        if kind not in types:
            raise CheckpointError(
                f"{stream.file}: {shown} is of ggml's type {kind}, which this gguf package does not know: an "
                "old type that llama.cpp has dropped (fetch a newer file), or a new one (pip install -U gguf)"
            )
        type_: Any = types[kind]
        block, size = package().GGML_QUANT_SIZES[type_]
        if min(shape) < 1 or max(shape) >= 2**48 or math.prod(shape) >= 2**48 or shape[-1] % block:
            raise stream.refuse(
                f"{shown} of {type_.name} is {clipped(list(shape))}: its rows are no whole blocks of {block}"
            )
        yield Entry(name, type_.name, shape, stream.file, start, math.prod(shape) // block * size)


def _placed(stream: _Stream, entries: list[Entry], data: int, alignment: int) -> dict[str, Entry]:
    """By name, with starts counted from the file's beginning.

    Raises:
        CheckpointError: a tensor lies outside of the file, or over another one, or has another's name.
    """
    placed: dict[str, Entry] = {}
    for entry in entries:
        shown, end = f"tensor {clipped(entry.name)}", data + entry.start + entry.nbytes
        if entry.name in placed:
            raise stream.refuse(f"{shown} appears twice")
        if entry.start % alignment:
            raise stream.refuse(f"{shown} starts at {entry.start}, which is no multiple of {alignment}")
        if end > stream.size:
            raise stream.refuse(f"{shown} ends at byte {end}, the file at {stream.size}: it is truncated")
        placed[entry.name] = Entry(
            entry.name, entry.type, entry.shape, entry.file, data + entry.start, entry.nbytes
        )
    position = 0
    for entry in sorted(placed.values(), key=lambda e: e.start):
        if entry.start < position:
            raise stream.refuse(f"tensor {clipped(entry.name)} lies over the one before it")
        position = entry.start + entry.nbytes
    return placed
