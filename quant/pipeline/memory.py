"""What memory this process takes, and how much of what it has freed it keeps."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: glibc's ``mallopt`` parameters (malloc.h). Unless told, it maps large blocks on their own, and gives them back when they are freed.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
#: How many blocks it may map on their own, as it is when a program starts.
_MAPPED = 65536
#: Bytes of a free end of the heap that are kept; and what glibc keeps at most by itself.
_KEPT, _KEPT_UNASKED = 512 << 20, 64 << 20


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While it lasts, what is freed is used again instead of given back to the system, which clears each page again before it is used.

    Batches of activations come and go by the hundred; without this, clearing their pages takes as long as half of the work on them. Afterwards the
    heap's free parts are given back. Where the C library is not glibc, nothing happens.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    assert library is not None
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _MAPPED)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_UNASKED)
        library.malloc_trim(0)
