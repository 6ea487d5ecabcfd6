"""Lets the shared libraries of a folder load under a C library older than 2.38:   python older_libc.py FOLDER

llama-cpp-py-sync's wheels say manylinux2014, and are built where the compiler spells ``strtol``, ``strtoul``,
``strtoull`` and ``sscanf`` as C23 has them (``__isoc23_strtol``), which glibc has since 2.38. What differs is
the reading of "0b1": nothing here is written so. The symbols get their old names, and the demand for 2.38 is
made weak. A library that demands nothing of the kind is left alone.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

C23 = b"__isoc23_"
WEAK = 2  # VER_FLG_WEAK


def sections(data: bytes) -> dict[bytes, tuple[int, int]]:
    """Offset and size of each section of a 64-bit little-endian ELF file, by name."""
    start, size, count, names = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
    text = headers[names][4]
    return {bytes(data[text + h[0] : data.index(b"\0", text + h[0])]): (h[4], h[5]) for h in headers}


def loosened(data: bytearray) -> bool:
    """Whether a file had such symbols, which are renamed in place."""
    parts = sections(data)
    symbols, size = parts[b".dynsym"]
    strings, versions = parts[b".dynstr"][0], parts[b".gnu.version"][0]
    found = False
    for i in range(size // 24):
        (name,) = struct.unpack_from("<I", data, symbols + 24 * i)
        if data.startswith(C23, strings + name):
            struct.pack_into("<I", data, symbols + 24 * i, name + len(C23))
            struct.pack_into("<H", data, versions + 2 * i, 1)
            found = True
    place = parts[b".gnu.version_r"][0] if found else 0
    while place:
        count, _, first, following = struct.unpack_from("<2xHIII", data, place)
        entry = place + first
        for _ in range(count):
            _, flags, _, name, step = struct.unpack_from("<IHHII", data, entry)
            if data.startswith(b"GLIBC_2.38\0", strings + name):
                struct.pack_into("<H", data, entry + 4, flags | WEAK)
            entry += step
        place = place + following if following else 0
    return found


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).glob("*.so*")):
        content = bytearray(file.read_bytes())
        if loosened(content):
            file.write_bytes(content)
