"""A whole batch, from its manifest to its last job: what ``quant batch`` does."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.batch.forecast import Forecast, forecasts
from quant.batch.ledger import Ledger
from quant.batch.local import LocalExecutor, Slots, default_jobs, devices_of
from quant.batch.manifest import Job, read_manifest
from quant.batch.run import ENDED, Executor, State, Told, conduct, survey
from quant.batch.submit import Submission, check_scheduler, hand_over
from quant.errors import QuantError, one_of
from quant.hardware import detect

#: Executors, and what they do.
EXECUTORS = ("local", "ray", "slurm", "kubernetes")
PAGE = "report.html"


@dataclass(frozen=True)
class Batch:
    """What a run of a batch left.

    Attributes:
        states: of each job.
        ledger: its folder.
        page: the report page over all outputs; None where there is none to show.
    """

    states: tuple[State, ...]
    ledger: Path
    page: Path | None = None

    def of(self, status: str) -> list[State]:
        return [s for s in self.states if s.status == status]

    def to_dict(self) -> dict[str, Any]:
        statuses = ("done", "failed", "interrupted", "submitted", "elsewhere", "waiting")
        return {
            **{status: len(self.of(status)) for status in statuses},
            "ledger": str(self.ledger),
            "page": None if self.page is None else str(self.page),
            "failures": [
                {"name": s.job.name, "message": s.message, "log": None if s.log is None else str(s.log)}
                for s in self.of("failed")
            ],
        }


def ledger_of(manifest: Path) -> Path:
    """The folder of a manifest's ledger where none is named.

    >>> ledger_of(Path("configs/nightly.yaml")).name
    'nightly.batch'
    """
    return Path(os.path.abspath(manifest)).with_suffix(".batch")


def chosen(jobs: Sequence[Job], only: Sequence[str]) -> tuple[Job, ...]:
    """Those of the named jobs; all where none is named.

    Raises:
        UsageError: a name that no job has.
    """
    known = [job.name for job in jobs]
    for name in only:
        if name not in known:
            raise one_of("--job", name, known[:50])
    return tuple(job for job in jobs if not only or job.name in only)


def run_manifest(
    manifest: Path,
    *,
    executor: str = "local",
    address: str | None = None,
    extra: Sequence[str] = (),
    image: str = "",
    claim: str = "",
    jobs: int | None = None,
    max_memory: int | None = None,
    ledger: Path | None = None,
    only: Sequence[str] = (),
    dry_run: bool = False,
    stop: threading.Event | None = None,
    told: Told = lambda kind, state: None,
    watched: Callable[[Sequence[State]], None] = lambda states: None,
) -> Batch:
    """Runs the jobs of a manifest that are not done, or forecasts them.

    Args:
        executor: one of :data:`EXECUTORS`.
        address: of a Ray cluster, see :class:`quant.batch.cluster.RayExecutor`.
        extra: further arguments of ``sbatch`` or ``kubectl``.
        image, claim: of Kubernetes, see :class:`quant.batch.submit.Submission`.
        jobs: most at once; None: see :func:`quant.batch.local.default_jobs`.
        max_memory: bytes that jobs of this machine may take together; None: what is available now.
        ledger: its folder; None: beside the manifest.
        only: names of the jobs to run, all where there are none.
        dry_run: forecasts alone; nothing is written beside what a ledger that is there learns by it.
        stop: ends the batch when it is set; its jobs keep their finished work.
        told: see :func:`quant.batch.run.conduct`; also hears ``planned`` of each forecast, in any thread.
        watched: receives the states that will change.

    Raises:
        QuantError, UsageError, Problems: the manifest, the ledger's folder, or the executor.
    """
    stop = stop or threading.Event()
    found = chosen(read_manifest(manifest), only)
    folder = ledger_of(manifest) if ledger is None else Path(os.path.abspath(ledger))
    detection = detect(path=manifest.absolute().parent)
    memory = detection.host.ram_available_bytes if max_memory is None else max_memory
    devices = devices_of(detection.gpus)
    threads = max((job.threads or 0 for job in found), default=0) or None
    most = jobs or default_jobs(threads, len(devices))
    with ExitStack() as stack:
        if dry_run and not folder.exists():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quant-batch-")))
        book = stack.enter_context(Ledger(folder))
        states = survey(found, book)
        watched(states)
        for state in states:
            if state.status in ENDED:
                told("skipped" if state.status == "done" else "failed", state)
        waiting = {s.job.slug: s for s in states if s.status == "waiting"}
        slots = Slots(memory, devices, most)
        runner: Executor | None = None
        if waiting and not dry_run:  # before the dry runs: what is not there is said at once
            runner = _runner(executor, book, slots, stop, address, jobs)

        def planned(job: Job, forecast: Forecast) -> None:
            waiting[job.slug].forecast = forecast
            told("planned", waiting[job.slug])

        at_once = 1 if devices else min(most, default_jobs(threads, 0))
        made, new = ([s.job for s in waiting.values() if s.made is made] for made in (True, False))
        try:
            forecasts(
                new, made, book, "gpu" if devices else "cpu", at_once, memory, stop.is_set, planned
            )  # fmt: skip
            if dry_run:
                for state in waiting.values():
                    state.message = state.forecast.problem or slots.never(state.job, state.forecast)
                    state.status = "failed" if state.message else "waiting"
                return Batch(tuple(states), folder)
            if runner is not None:
                conduct(states, book, runner, stop, told)
            elif waiting:
                submission = _submission(manifest, folder, found, jobs, tuple(extra), image, claim)
                hand_over(states, submission, book, executor, told)
        finally:
            stop.set()
            if runner is not None:
                runner.close()
        return Batch(tuple(states), folder, write_batch_page(states, folder))


def _runner(
    executor: str, book: Ledger, slots: Slots, stop: threading.Event, address: str | None, most: int | None
) -> Executor | None:
    """Where attempts run; None of a scheduler with a queue of its own, whose command is there.

    Raises:
        QuantError: what the executor needs is not there.
    """
    if executor == "local":
        return LocalExecutor(book, slots, stop)
    if executor == "ray":
        from quant.batch.cluster import RayExecutor

        return RayExecutor(book, stop, address, most)
    check_scheduler(executor)
    return None


def _submission(
    manifest: Path,
    folder: Path,
    jobs: Sequence[Job],
    most: int | None,
    extra: tuple[str, ...],
    image: str,
    claim: str,
) -> Submission:
    """What tasks share; ``root`` is the folder that all paths have in common."""
    file = Path(os.path.abspath(manifest))
    paths = [file.parent, folder, *(job.output for job in jobs), *(p for job in jobs if (p := job.source))]
    root = Path(os.path.commonpath(paths))
    return Submission(file, folder, most=most, extra=extra, image=image, claim=claim, root=root)


def write_batch_page(states: Sequence[State], folder: Path) -> Path | None:
    """The report page over the outputs that are there; None where there are none."""
    from quant.report.compare import summaries
    from quant.report.files import write_page
    from quant.report.value import Report

    outputs = [s.job.output for s in states if s.status == "done" and Report.load(s.job.output) is not None]
    if not outputs:
        return None
    try:
        return write_page(outputs, summaries(outputs), folder / PAGE)
    except QuantError:  # an output went while the page was made; the jobs are none the worse
        return None
