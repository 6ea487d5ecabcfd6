"""Loading an endpoint: a fixed number of requests at a time, or requests at a rate that does not wait for
answers; and knowing when it is the client that is slow.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quant.serving.client import Endpoint, Prompt, Trace, ask
from quant.serving.measures import Summary

if TYPE_CHECKING:
    import httpx2 as httpx

#: Seconds between two looks at whether this program's own loop runs in time; its delay beyond which figures
#: are the client's, not the server's; and its share of a core beyond which it is near that.
_TICK, LATE, BUSY = 0.01, 0.005, 0.9


@dataclass(frozen=True)
class Level:
    """One load: ``concurrency`` requests at a time (closed loop), or ``rate`` a second whatever is answered
    (open loop) with at most ``concurrency`` under way where it is given too.

    Attributes:
        poisson: whether the gaps of an open loop are exponential, as of many independent users, or equal.
    """

    concurrency: int | None = None
    rate: float | None = None
    poisson: bool = True

    def __str__(self) -> str:
        if self.rate is None:
            return f"{self.concurrency} at a time"
        return f"{self.rate:g} a second" + (f", at most {self.concurrency}" if self.concurrency else "")


@dataclass
class ClientHealth:
    """How late this program itself was: seconds of each look at its loop, and its share of a core."""

    late: list[float] = field(default_factory=list)
    cpu_share: float = 0.0

    @property
    def p99(self) -> float:
        return float(np.percentile(self.late, 99)) if self.late else 0.0

    @property
    def saturated(self) -> bool:
        return self.p99 > LATE or self.cpu_share > BUSY

    def to_dict(self) -> dict[str, Any]:
        return {
            "p99_delay_ms": 1000 * self.p99,
            "cpu_share": round(self.cpu_share, 3),
            "saturated": self.saturated,
        }


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Python's collector looks at what is there now no more, and seldom at what comes: its pauses are
    delays of every stream."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@asynccontextmanager
async def watched() -> AsyncIterator[ClientHealth]:
    """Looks at this program's own loop while the body runs."""
    health = ClientHealth()

    async def look() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_TICK)
            health.late.append(max(time.perf_counter() - before - _TICK, 0.0))

    begun, used = time.perf_counter(), time.process_time()
    task = asyncio.create_task(look())
    with _rare_collections():
        try:
            yield health
        finally:
            task.cancel()
            spent = time.perf_counter() - begun
            health.cpu_share = (time.process_time() - used) / spent if spent > 0 else 0.0


def arrivals(level: Level, count: int, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests of an open loop are sent."""
    assert level.rate is not None
    generator, at = random.Random(seed), 0.0
    for _ in range(count):
        yield at
        at += generator.expovariate(level.rate) if level.poisson else 1 / level.rate


@dataclass(frozen=True)
class Run:
    """One level's traces, and how the client itself was."""

    level: Level
    summary: Summary
    client: ClientHealth


async def run_level(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    level: Level,
    *,
    sampling: Mapping[str, Any] | None = None,
    limits: Mapping[str, float] | None = None,
    seed: int = 0,
    seconds: float | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Run:
    """Sends every prompt once under a load and waits for all answers.

    Args:
        seconds: for which requests are sent at most by a closed loop, and that each answer may take: the load
            ends after twice as long whatever the server does.
        done: told how many have ended, each time one does.
    """
    traces: list[Trace] = []

    async def one(prompt: Prompt, scheduled: float | None) -> None:
        traces.append(
            await ask(client, endpoint, prompt, scheduled=scheduled, sampling=sampling, limit=seconds)
        )
        done(len(traces))

    async with watched() as health:
        if level.rate is None:
            assert level.concurrency is not None
            waiting, begun = iter(prompts), time.perf_counter()

            async def worker() -> None:
                for prompt in waiting:
                    if seconds is not None and time.perf_counter() - begun > seconds:
                        return
                    await one(prompt, None)

            await asyncio.gather(*(worker() for _ in range(min(level.concurrency, len(prompts)))))
        else:
            await _open_loop(prompts, level, seed, one)
    return Run(level, Summary.of(traces, limits), health)


async def _open_loop(
    prompts: Sequence[Prompt],
    level: Level,
    seed: int,
    one: Callable[[Prompt, float | None], Any],
) -> None:
    gate = asyncio.Semaphore(level.concurrency or len(prompts))

    async def send(prompt: Prompt, scheduled: float) -> None:
        async with gate:  # waiting here counts: the latency is from the scheduled moment
            await one(prompt, scheduled)

    begun, tasks = time.perf_counter(), []
    try:
        for prompt, offset in zip(prompts, arrivals(level, len(prompts), seed), strict=True):
            wait = begun + offset - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(send(prompt, begun + offset)))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
