"""Memory: what a job will take, what it took, and a C library that does not hand big buffers back to the kernel at every free."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed buffers of up to 32 MiB instead of unmapping them.

    By default every activation buffer is mapped, zeroed page by page on first touch, and unmapped: half of a forward pass can go into page
    faults. 32 MiB is the largest threshold that glibc accepts; larger buffers (Hessians, weights) are few and are still given back.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 512 << 20)
        libc.mallopt(_M_TOP_PAD, 64 << 20)
    except (OSError, AttributeError):
        return  # another C library: nothing to tune


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
