"""What memory this process takes, and how much of what it has freed it keeps."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: glibc's ``mallopt`` parameters (malloc.h).
_MXFAST, _TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = 1, -1, -3, -8
#: While :func:`freed_memory_kept` lasts, smaller blocks are cut from the heap; larger ones are mapped on
#: their own and given back when they are freed. As high as glibc lets it be.
MAPPED = 32 << 20
#: Bytes of a free end of the heap that are kept; and what glibc comes to by itself once large blocks have
#: been freed.
_KEPT, _KEPT_UNASKED = 512 << 20, 64 << 20
#: Largest blocks that glibc unasked leaves apart from their free neighbours, for speed.
_FAST_UNASKED = 16 * ctypes.sizeof(ctypes.c_size_t)
#: Linux' ``prctl`` calls (sys/prctl.h).
_SET_THP_DISABLE, _GET_THP_DISABLE = 41, 42
#: How often a waiting thread looks again before it sleeps; read by libgomp when it is loaded, as torch is.
_SPINS = "GOMP_SPINCOUNT"
#: What is read once: by torch at its first tensor, by its OpenMP library when that is loaded.
_AT_LOAD = {"THP_MEM_ALLOC_ENABLE": "1", _SPINS: "1000"}


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare_torch() -> None:
    """Loads torch with what it and its OpenMP library read from the environment only then: the first step of
    a job (:mod:`quant.jobs`). To be called before anything has loaded torch, or it does nothing; what the
    environment has already stays as it is.

    Every large tensor (2 MiB or more) begins at a page. Else glibc trims a few dozen bytes off each tensor's
    place to begin it at 64 bytes. Small objects settle in the trimmings and outlive the tensor, whose place
    is then too small for another of its size: while batches of activations wait, the heap grows by one tensor
    for each.

    Threads that wait for each other give up their core soon. As libgomp has it they turn for milliseconds,
    and where another program has a core, so long as the one that they wait for does not run: a job of two
    threads took two and a half times as long beside a busy program, and now 1.7 times.

    Threads have one heap, and that before the first of them is given its own: each would keep what it has
    freed to itself, and the largest memory of a job would vary by a quarter.
    """
    if "torch" in sys.modules:
        return
    if (library := _glibc()) is not None:
        library.mallopt(_ARENA_MAX, 1)
    with at_load():
        import torch

        torch.empty(1)


@contextmanager
def at_load() -> Iterator[None]:
    """While it lasts, the environment is as :func:`prepare_torch` has it: for torch that is loaded meanwhile,
    or by a process that is started meanwhile."""
    asked = {name: value for name, value in _AT_LOAD.items() if name not in os.environ}
    if "OMP_WAIT_POLICY" in os.environ:
        asked.pop(_SPINS, None)
    os.environ.update(asked)
    try:
        yield
    finally:
        for name in asked:
            del os.environ[name]  # it is not for every process that this one starts


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While it lasts, what is freed is used again instead of given back to the system, which clears each page
    again before it is used.

    Batches of activations come and go by the hundred; without this, clearing their pages takes as long as
    half of the work on them. Afterwards the heap's free parts are given back. Meanwhile there are no huge
    pages, which torch asks for where tensors begin at pages: a virtual machine whose host takes free memory
    back takes five times as long to find 2 MiB as to find as much in pages. Where the C library is not glibc,
    nothing happens.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, MAPPED)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    library.mallopt(_MXFAST, 0)  # small blocks that are freed join their neighbours at once
    library.mallopt(_ARENA_MAX, 1)  # threads share one heap: each would keep what it has freed to itself
    before = library.prctl(_GET_THP_DISABLE, 0, 0, 0, 0)
    library.prctl(_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        library.prctl(_SET_THP_DISABLE, max(before, 0), 0, 0, 0)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_UNASKED)
        library.mallopt(_MXFAST, _FAST_UNASKED)
        give_back()


def give_back() -> None:
    """Gives the free parts of the heap back to the system, wherever they lie. Where the C library is not
    glibc, nothing happens."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
