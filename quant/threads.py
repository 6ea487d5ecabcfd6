"""Work that is too short to share, done on several cores at once: a thread for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def side_by_side(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """While it lasts: a ``map`` that calls a function for several things at once, in their order, in as many
    threads, which share those of torch's: one has all of them, and as many as there are work on their own
    with one each, because a step of a solver is too short to share."""
    if workers == 1:
        yield map
        return
    threads = torch.get_num_threads()
    each = max(1, threads // workers)
    torch.set_num_threads(each)
    # a new thread whose first operation is a product would make it by as many as the environment says
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,))

    def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield ahead
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
