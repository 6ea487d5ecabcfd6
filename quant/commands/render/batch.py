"""A batch while it runs, and what it left."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quant.batch.attempt import last_line
from quant.batch.run import State
from quant.batch.session import Batch
from quant.commands.render import prose
from quant.commands.render.tables import Column, draw
from quant.commands.terminal import Output
from quant.units import format_seconds, format_size

if TYPE_CHECKING:
    from rich.console import Console, Group

#: Seconds between two drawings of the live table, and two plain lines of how far it is; rows of the table.
_REDRAWN, _SILENT, _ROWS = 1.0, 30.0, 20
#: Columns of a job's name, and of how long it has run.
_NAME, _TIME = 60, 10
#: Jobs that a summary lists one by one; of more, those that failed.
_LISTED = 100


class Board:
    """What is shown on stderr while a batch runs: a live table on a terminal, a plain line for each change
    where it is piped, nothing when quiet."""

    def __init__(self, out: Output):
        self.out, self.states = out, tuple[State, ...]()
        self.began = self.spoken = time.monotonic()
        self.live: Any = None
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="board", daemon=True)

    def watch(self, states: Sequence[State]) -> None:
        """Receives all jobs before the first is looked at."""
        self.states = tuple(states)

    def __enter__(self) -> Board:
        if not self.out.quiet:
            if sys.stderr.isatty():
                from rich.console import Console
                from rich.live import Live

                self.live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
                self.live.start()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.live is not None:
            self.live.stop()

    def told(self, kind: str, state: State) -> None:
        """A change of one job."""
        with self._lock:
            text = _line(kind, state)
            quiet = kind in ("skipped", "planned")  # what a dry run refuses is told as failed next
            if quiet and not self.out.verbose:
                return
            if kind in ("failed", "retry"):
                self._say(text, warn=True)
            else:
                self._say(text)

    def _say(self, text: str, warn: bool = False) -> None:
        self.spoken = time.monotonic()
        if self.live is not None:
            from rich.text import Text

            self.live.console.print(Text(f"warning: {text}" if warn else text, "yellow" if warn else ""))
        elif warn:
            self.out.warn(text)
        else:
            self.out.note(text)

    def _watch(self) -> None:
        while not self._stop.wait(_REDRAWN):
            if self.live is not None:
                self.live.update(self._table(), refresh=True)
            elif time.monotonic() - self.spoken > _SILENT:
                with self._lock:
                    self._say(self._counts())

    def _counts(self) -> str:
        counts = Counter(s.status for s in self.states)
        parts = [f"{counts['done']} of {len(self.states)} done"]
        if counts["waiting"] and not counts["running"] and not any(s.attempts for s in self.states):
            looked = sum(s.forecast != State(s.job).forecast for s in self.states if s.status == "waiting")
            parts.append(f"dry runs: {looked} of {counts['waiting']}")
        parts += [f"{counts[k]} {k}" for k in ("running", "elsewhere", "waiting", "failed") if counts[k]]
        return " · ".join([*parts, format_seconds(time.monotonic() - self.began)])

    def _table(self) -> Group:
        """The rest in one line, and a row for each job that runs."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False, expand=True)
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=_NAME)
        table.add_column(no_wrap=True, justify="right", min_width=_TIME)
        table.add_column(no_wrap=True, overflow="ellipsis", style="dim", ratio=1)
        shown = [s for s in self.states if s.status in ("running", "elsewhere")]
        for state in shown[:_ROWS]:
            if state.status == "running":
                took = format_seconds(time.monotonic() - state.began)
                table.add_row(Text(state.job.name), took, Text(last_line(state.log)))
            else:
                table.add_row(Text(state.job.name), "", Text(f"on {state.where}"))
        if len(shown) > _ROWS:
            table.add_row(f"and {len(shown) - _ROWS} more", "", "")
        return Group(Text(self._counts(), "bold", no_wrap=True, overflow="ellipsis"), table)


def _line(kind: str, state: State) -> str:
    name = state.job.name
    if kind == "finished":
        return f"{name}: done{_made(state)}"
    if kind == "planned":
        return f"{name}: {_needs(state)}"
    if kind == "skipped":
        return f"{name}: done before{_made(state)}"
    if kind == "elsewhere":
        return f"{name}: {state.where} has it"
    if kind == "retry":
        wait = max(state.not_before - time.monotonic(), 0)
        return f"{name}: attempt {state.attempts} failed: {state.message}; again in {format_seconds(wait)}"
    if kind in ("failed", "interrupted", "submitted"):
        return f"{name}: {kind}{f': {state.message}' if state.message else ''}"
    return f"{name}: {kind}"


def _made(state: State) -> str:
    facts = state.facts
    if facts.get("unneeded"):
        return ": fits as it is, nothing to make"
    parts = []
    if facts.get("seconds") is not None:
        parts.append(f" in {format_seconds(facts['seconds'])}")
    parts.append(f": {format_size(facts.get('output_bytes') or 0)}")
    if facts.get("bits_per_weight"):
        parts.append(f", {facts['bits_per_weight']:.3f} bits a weight")
    if facts.get("kl") is not None:
        parts.append(f", KL {facts['kl']:.5f} nats")
    return "".join(parts)


def _needs(state: State) -> str:
    f = state.forecast
    if f.problem:
        return f"its dry run fails: {f.problem}"
    if f.unneeded:
        return "fits as it is, nothing to make"
    if not f.known:
        return "memory and time are not predicted"
    gpu = f", {format_size(f.gpu_bytes)} on the GPU" if f.gpu_bytes else ""
    return f"{format_size(f.memory_bytes)} of memory{gpu}, about {format_seconds(f.seconds)}"


def summary(console: Console, batch: Batch, dry_run: bool) -> None:
    """The last lines: a row for each job, then what failed and why."""
    states = batch.states if len(batch.states) <= _LISTED else batch.of("failed")
    if states:
        (_planned if dry_run else _results)(console, states)
    for state in batch.of("failed"):
        log = f"; its log: {state.log}" if state.log is not None else ""
        prose(console, f"✗ {state.job.name}: {state.message}{log}")
    counts = Counter(s.status for s in batch.states)
    words = [f"{n} {'to run' if k == 'waiting' else k}" for k, n in sorted(counts.items())]
    jobs = "1 job" if len(batch.states) == 1 else f"{len(batch.states)} jobs"
    prose(console, f"{jobs}: {', '.join(words)}")
    if batch.page is not None:
        prose(console, f"{batch.page}: all outputs beside one another, open it in a browser")


def _status(state: State) -> str:
    return "done before" if state.before else state.status


def _planned(console: Console, states: Sequence[State]) -> None:
    draw(
        console,
        [
            Column("job", [s.job.name for s in states]),
            Column("", ["to run" if s.status == "waiting" else _status(s) for s in states]),
            Column("scheme", [s.forecast.scheme or str(s.facts.get("scheme") or "-") for s in states], 1),
            Column("method", [s.forecast.method or str(s.facts.get("method") or "-") for s in states], 2),
            Column("output", [_size(s.forecast.output_bytes) for s in states], 0, True),
            Column("memory", [_size(s.forecast.memory_bytes) for s in states], 0, True),
            Column("GPU", [_size(s.forecast.gpu_bytes) for s in states], 1, True),
            Column("scratch", [_size(s.forecast.scratch_bytes) for s in states], 3, True),
            Column("time", [_time(s.forecast.seconds) for s in states], 0, True),
        ],
    )


def _results(console: Console, states: Sequence[State]) -> None:
    facts = [s.facts for s in states]
    draw(
        console,
        [
            Column("job", [s.job.name for s in states]),
            Column("", [_status(s) for s in states]),
            Column("scheme", [str(f.get("scheme") or "-") for f in facts], 1),
            Column("method", [str(f.get("method") or "-") for f in facts], 2),
            Column("bits", [f"{b:.3f}" if (b := f.get("bits_per_weight")) else "-" for f in facts], 0, True),
            Column("size", [_size(f.get("output_bytes")) for f in facts], 0, True),
            Column("KL, nats", ["-" if (k := f.get("kl")) is None else f"{k:.5f}" for f in facts], 0, True),
            Column("memory", [_size(f.get("peak_rss_bytes")) for f in facts], 3, True),
            Column("took", [_time(f.get("seconds")) for f in facts], 0, True),
        ],
    )


def _size(count: Any) -> str:
    return format_size(count) if count else "-"


def _time(seconds: Any) -> str:
    return "-" if seconds is None else format_seconds(seconds)
