"""JSON that others wrote, read with suspicion: Python's own reader takes numbers of any length, which nothing
behind it can compute with, and lists nested until whatever walks them breaks."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

#: Bytes of the longest file that is read whole, values inside one another, and bits of a whole number.
LARGEST, DEEPEST, BITS = 1 << 28, 100, 64
#: Bytes of the longest file that a person writes.
LONGEST_WRITTEN = 1 << 22

#: What PyYAML raises beside its own errors where a value is not what its tag says (``!!bool x``).
YAML_FAULTS = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


def parse_json(text: str, bounded: bool = True) -> Any:
    """What a JSON text stands for.

    Args:
        bounded: whether a whole number of more than :data:`BITS` bits is refused.

    Raises:
        ValueError: it is no JSON, is nested deeper than :data:`DEEPEST`, or holds such a number.

    >>> parse_json('{"a": [1e5]}')
    {'a': [100000.0]}
    """
    try:
        value = json.loads(text, parse_int=_whole if bounded else None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level, depth = [value], 0
    while level := [
        part
        for one in level
        if isinstance(one, (dict, list))
        for part in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
    return value


def _whole(digits: str) -> int:
    value = int(digits) if len(digits) < 40 else None
    if value is None or value.bit_length() > BITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return value


def read_document(file: Path, bounded: bool = True) -> Any:
    """What a UTF-8 file of JSON stands for; ``bounded``: see :func:`parse_json`.

    Raises:
        OSError: it cannot be read, is a pipe or a device, which may never end, or is larger than any such
            file (:data:`LARGEST`).
        ValueError: see :func:`parse_json`; or it is no UTF-8.
    """
    kind = os.stat(file).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise OSError(errno.EINVAL, "a pipe or a device, no file", str(file))
    return parse_json(read_text(file), bounded)


def whole_characters(value: Any) -> Any:
    """A value of JSON in which halves of surrogate pairs, which JSON can hold and no file or terminal, are
    question marks.

    >>> whole_characters({"a": ["\\ud800b"]})
    {'a': ['?b']}
    """
    return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def read_text(file: Path, most: int = LARGEST) -> str:
    """A UTF-8 file or pipe, of so many bytes at the most.

    Raises:
        OSError: it cannot be read, or is larger.
        UnicodeDecodeError: it is no UTF-8.
    """
    with file.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"larger than the {most >> 20} MiB that such a file may have", str(file))
    return data.decode()
