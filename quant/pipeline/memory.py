"""What memory this process takes."""

from __future__ import annotations

import ctypes
import resource
import sys


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_free_memory() -> None:
    """Gives the free parts of the C library's heap back to the system.

    glibc leaves holes where aligned buffers were, too small for the next one of the same size by a few bytes: a block's worth of batches that come
    and go leaves hundreds of MiB of them. Where the C library has no such call, nothing happens.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
