"""The loop of a batch: which job comes next, what becomes of each, until all have ended or we are to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from quant.batch.attempt import RUN_AGAIN, Outcome
from quant.batch.forecast import Forecast
from quant.batch.ledger import Ledger
from quant.batch.manifest import Job
from quant.batch.outputs import standing

#: Seconds between two looks at what ended here, and at what others did.
_LOOK, _OTHERS = 0.1, 2.0
#: Most seconds between two attempts; and what is set aside for a job that memory was too short for.
_LONGEST, _MORE = 600.0, 1.5
#: Statuses that nothing follows.
ENDED = ("done", "failed")


@dataclass
class State:
    """Where a job is.

    Attributes:
        status: ``waiting``, ``running``, ``elsewhere`` (another process has it), ``done``, ``failed``,
            ``interrupted``, or ``submitted`` to a cluster's queue.
        message: why it failed or waits.
        before: whether it was done before this run began.
        made: whether its output was, so that gates alone are left.
        attempts: of this run.
        facts: of the last event.
        where: who has it.
    """

    job: Job
    status: str = "waiting"
    message: str = ""
    forecast: Forecast = field(default_factory=lambda: Forecast(known=False))
    before: bool = False
    made: bool = False
    attempts: int = 0
    not_before: float = 0.0
    looked: float = 0.0
    share: float = 1.0
    log: Path | None = None
    began: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    claim: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For programs: what is known of the job, sizes in bytes."""
        facts = {
            k: self.facts.get(k)
            for k in (
                "output_hash", "output_bytes", "bits_per_weight", "kl", "seconds", "peak_rss_bytes",
                "peak_gpu_bytes",
            )
        }  # fmt: skip
        return {
            "name": self.job.name,
            "status": self.status,
            "message": self.message or None,
            "model": self.job.model,
            "output_path": None if self.facts.get("unneeded") else str(self.job.output),
            "method": self.facts.get("method") or self.forecast.method,
            "scheme": self.facts.get("scheme") or self.forecast.scheme,
            "before": self.before,
            "attempts": self.attempts,
            "log": None if self.log is None else str(self.log),
            **facts,
            "predicted": self.forecast.to_dict(),
        }


class Executor(Protocol):
    """Where attempts run."""

    name: str

    def never(self, job: Job, forecast: Forecast) -> str:
        """Why a job has no room there at all; empty where it has."""

    def start(self, job: Job, forecast: Forecast, attempt: int, retries: int, share: float) -> bool:
        """Starts an attempt; False where there is no room now."""

    def ended(self) -> list[tuple[str, Outcome]]:
        """Slugs and outcomes of attempts that have ended since the last time."""

    def close(self) -> None:
        """Lets go of what it holds, once nothing runs or after ``stop``."""


Told = Callable[[str, State], None]


def survey(jobs: Iterable[Job], ledger: Ledger) -> list[State]:
    """Where each job stands before anything runs: done, refused, or waiting."""
    ledger.refresh()
    states = []
    for job in jobs:
        latest = ledger.latest(job.slug)
        found = standing(job, latest)
        state = State(job, claim=_ended_claim(latest))
        state.made = found.status == "made"
        if found.status == "done":
            state.status, state.before, state.facts = "done", True, found.facts
        elif found.status == "refused":
            state.status, state.message = "failed", found.message
        states.append(state)
    return states


def _ended_claim(latest: Mapping[str, Any] | None) -> int:
    """The last claim of a job under which nothing more will happen."""
    if latest is None:
        return 0
    return int(latest.get("claim", 0)) - (latest["event"] == "started")


def conduct(
    states: Sequence[State], ledger: Ledger, executor: Executor, stop: threading.Event, told: Told
) -> None:
    """Runs what waits, until every job has ended or ``stop`` is set; then waits for what runs to end.

    Among jobs that wait, those of the highest priority come first, and of these the longest by forecast: so
    the last ones to end are short. One that has no room holds back those of lower priority, not its equals.

    Args:
        states: of :func:`survey`, with forecasts; they are changed.
        told: hears of each change: ``started``, ``finished``, ``failed``, ``retry``, ``interrupted``,
            ``elsewhere``.
    """
    by_slug = {s.job.slug: s for s in states}
    for state in states:
        if state.status != "waiting":
            continue
        reason = state.forecast.problem or executor.never(state.job, state.forecast)
        if reason:
            _fail(state, reason, told)
    waiting = sorted(
        (s for s in states if s.status == "waiting"),
        key=lambda s: (-s.job.priority, -s.forecast.seconds, s.job.index),
    )
    running, looked = 0, 0.0
    while running or (any(s.status not in ENDED for s in waiting) and not stop.is_set()):
        for slug, outcome in executor.ended():
            running -= 1
            _take(by_slug[slug], outcome, told)
        if time.monotonic() - looked > _OTHERS:
            looked = time.monotonic()
            _look_at_others(waiting, ledger, told)
        waiting = [s for s in waiting if s.status not in ENDED]
        held: int | None = None
        for state in waiting:
            if stop.is_set() or (held is not None and state.job.priority < held):
                break
            if state.status != "waiting" or state.not_before > time.monotonic():
                continue
            if _held_by_others(state, ledger, told):
                continue
            retries = state.job.retries - state.attempts
            number = state.attempts + 1
            if executor.start(state.job, state.forecast, number, retries, state.share):
                running, state.looked = running + 1, 0.0
                state.status, state.attempts = "running", number
                state.began, state.message = time.monotonic(), ""
                told("started", state)
            else:
                held = state.job.priority
        time.sleep(_LOOK)
    for state in waiting:
        if state.status not in ENDED:
            state.status = "interrupted"


def _fail(state: State, message: str, told: Told) -> None:
    state.status, state.message = "failed", message
    told("failed", state)


def _take(state: State, outcome: Outcome, told: Told) -> None:
    """What an attempt's outcome makes of its job."""
    state.log, state.facts = outcome.log or state.log, outcome.facts or state.facts
    if outcome.status == "done":
        state.status, state.message = "done", ""
        told("finished", state)
    elif outcome.status in ("held", "lost"):
        # it was no attempt of ours
        state.status, state.attempts = "elsewhere", state.attempts - 1
    elif outcome.status == "interrupted":
        state.status, state.message = "interrupted", outcome.message
        told("interrupted", state)
    elif outcome.retryable and state.attempts <= state.job.retries:
        state.status, state.message = "waiting", outcome.message
        status = outcome.facts.get("status")
        delay = 0.0 if status == RUN_AGAIN else state.job.retry_delay * 2 ** (state.attempts - 1)
        state.not_before = time.monotonic() + min(delay, _LONGEST)
        if status == -9:
            state.share *= _MORE
        told("retry", state)
    else:
        _fail(state, outcome.message, told)


def _look_at_others(waiting: Sequence[State], ledger: Ledger, told: Told) -> None:
    """What other processes did with jobs that wait here."""
    ledger.refresh()
    for state in waiting:
        if state.status == "running" and (now := ledger.latest(state.job.slug)) and now.get("log"):
            state.log = Path(str(now["log"]))
        if state.status not in ("waiting", "elsewhere"):
            continue
        latest = ledger.latest(state.job.slug)
        new = latest is not None and int(latest.get("claim", 0)) > state.claim and state.attempts == 0
        if latest is not None and new and latest["event"] == "finished":
            found = standing(state.job, latest)
            if found.status == "done":
                state.status, state.facts = "done", found.facts
                told("finished", state)
                continue
        if latest is not None and new and latest["event"] == "failed" and not latest.get("retry"):
            state.facts, state.log = latest, Path(str(latest.get("log")))
            _fail(state, str(latest.get("message", "failed")), told)
            continue
        if state.status == "elsewhere" and ledger.holder(state.job.slug) is None:
            state.status, state.where = "waiting", ""


def _held_by_others(state: State, ledger: Ledger, told: Told) -> bool:
    """Whether another process has a job that is about to start; asked every few seconds, because it is a
    look into a folder that may be on a network."""
    now = time.monotonic()
    if now - state.looked < _OTHERS:
        return False
    state.looked = now
    holder = ledger.holder(state.job.slug)
    if holder is not None:
        state.status, state.where = "elsewhere", holder
        told("elsewhere", state)
    return holder is not None
