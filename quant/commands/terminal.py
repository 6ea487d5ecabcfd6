"""What all commands share: common options, error rendering, progress, JSON. Only click is imported until
something is drawn."""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from quant.errors import QuantError, first_line
from quant.progress import Event
from quant.units import format_seconds, format_size

if TYPE_CHECKING:
    from rich.console import Console


#: The interpreter looks through all that torch and transformers made for cycles before it ends, which takes
#: seconds in which a command that has said everything seems to hang; the system takes the memory back anyway.
atexit.register(gc.freeze)

#: Exit status of a job that was asked to end: the same command goes on (``EX_TEMPFAIL`` of sysexits.h).
RUN_AGAIN = 75
#: How the message of an error begins that no part of the program has a message for.
UNFORESEEN = "what was not foreseen"
#: Errors of the system that may pass by themselves.
_PASSING = {
    errno.EAGAIN, errno.EBUSY, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.ESTALE,
    errno.ETIMEDOUT,
}  # fmt: skip


class Terminated(BaseException):
    """SIGTERM arrived at a job whose finished work is kept. Exit status 75. No KeyboardInterrupt, of which
    click would leave nothing but that the command was aborted."""


@contextmanager
def resumable() -> Iterator[None]:
    """While it lasts, SIGTERM ends the job as Ctrl-C does, and the exit status says that the same command
    goes on: what a batch or a cluster's scheduler sends before it kills."""
    if threading.current_thread() is not threading.main_thread():  # signals are not this thread's
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


#: Seconds below which a phase is not listed.
_WORTH_SAYING = 0.05


@dataclass
class Outcome:
    """A run of a program: the words that were typed, and whether it has printed its result, for a failure
    after it must not add a second JSON object."""

    command: tuple[str, ...] | None = None
    printed: bool = False


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Output:
    """Where a command's words go: the result to stdout (JSON or text), everything else to stderr."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    #: seconds by phase of the work; where a command does not set them, those between its progress events
    seconds: dict[str, float] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)

    def result(self, value: dict[str, Any] | list[Any], text: Callable[[Console], None]) -> None:
        """Prints ``value`` as one JSON object, or lets ``text`` draw it on a console."""
        self.outcome.printed = True
        if self.json:
            click.echo(json.dumps(_finite(value), allow_nan=False))
        else:
            text(console())

    def note(self, text: str) -> None:
        if not self.quiet:
            click.echo(text, err=True)

    def details(self, lines: Iterable[str]) -> None:
        """Lines that only ``--verbose`` shows, such as where a fact comes from."""
        if self.verbose:
            for line in lines:
                click.echo(line, err=True)

    def warn(self, text: str) -> None:
        click.echo(
            click.style("warning: ", fg="yellow") + text,
            err=True,
            color=None if _colour(sys.stderr) else False,
        )

    @contextmanager
    def progress(self, phase: str = "starting") -> Iterator[Callable[[Event], None]]:
        """A listener for the library's events: a live bar on a terminal, plain lines when piped, nothing when
        quiet. What is done inside before its first event counts as ``phase``."""
        listener = _Progress(self, phase)
        try:
            yield listener
        finally:
            listener.close()


def _colour(stream: Any) -> bool:
    return bool(stream.isatty()) and "NO_COLOR" not in os.environ


#: Columns of what goes into a file or a pipe that no terminal is at either end of.
_UNSEEN = 140


class _Trimmed:
    """A stream whose lines end without blanks: what pads a column is of use on a screen alone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write("\n".join(line.rstrip(" ") for line in text.split("\n")))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _columns() -> int | None:
    """The width of the terminal that what is printed is read on; None where there is none. What is piped is
    read on that of the other streams, such as in a pager."""
    stated = os.environ.get("COLUMNS", "")
    if stated.isdigit() and int(stated) > 0:
        return int(stated)
    if sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    for stream in (sys.stderr, sys.stdin):
        try:
            if stream.isatty() and (width := os.get_terminal_size(stream.fileno()).columns):
                return width
        except (OSError, ValueError, AttributeError):
            continue
    return None


def unseen() -> bool:
    """Whether what is printed goes where no width is known, to be searched rather than read."""
    return _columns() is None


def console() -> Console:
    """A rich console on stdout, as wide as where it is read; without colour when piped or when NO_COLOR is
    set, and then without blanks at the ends of lines."""
    from rich.console import Console

    piped = not sys.stdout.isatty()
    return Console(
        file=cast(TextIO, _Trimmed(sys.stdout)) if piped else None,
        no_color=not _colour(sys.stdout),
        highlight=False,
        width=_columns() or _UNSEEN,
    )


#: Seconds between two drawings of the live line; and of silence after which a pipe gets a line.
_REDRAWN, _SILENT = 0.5, 1.5


class _Progress:
    """One line a finished message; between them where the work is: on a terminal a line drawn over itself, in
    a pipe a plain line whenever nothing was said for a while. A thread draws, so that a long step of the
    library is no silence."""

    def __init__(self, output: Output, phase: str):
        self.output, self.start, self.began = output, time.monotonic(), time.monotonic()
        self.event, self.phase = Event(phase), phase
        self.live = sys.stderr.isatty() and not output.quiet
        self.spoken = time.monotonic() - _SILENT / 2  # the program's own start was silent already
        #: when how much of the phase was done: at its first count, which may be of another kind of work (the
        #: embedding before the blocks), and at the latest
        self._first: tuple[float, float] | None = None
        self._latest = (0.0, 0.0)
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        if not output.quiet:
            self._thread.start()

    def __call__(self, event: Event) -> None:
        with self._lock:
            if event.phase != self.phase:
                self._end_phase()
                self.phase, self.start = event.phase, time.monotonic()
                self.event, self._first = Event(event.phase), None
            if event.total and event.done and (self._first is None or event.done > self._latest[1]):
                self._latest = (time.monotonic(), event.done)
                self._first = self._first or self._latest
            if not event.warning:
                # a message may come without a count, and a count without what is worked on
                known = event if event.total else self.event
                self.event = Event(event.phase, known.done, known.total, detail=event.detail)
            if event.warning:
                self._clear()
                self.output.warn(event.message)
            elif event.message:
                self._clear()
                self.output.note(event.message + self._left(event))
            if event.message:
                self.spoken = time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(_REDRAWN):
            with self._lock:
                if self._stop.is_set():
                    return
                if self.live:
                    width = shutil.get_terminal_size().columns
                    click.echo(f"\r\033[2K{self._line(True)[: width - 1]}", nl=False, err=True)
                elif time.monotonic() - self.spoken >= _SILENT:
                    click.echo(self._line(False), err=True)
                    self.spoken = time.monotonic()

    def _line(self, bar: bool) -> str:
        """Where the work is: the phase, how much of it is done, what is worked on, time and memory."""
        event = self.event
        parts = [self.phase]
        if event.total:
            share = min(event.done / event.total, 1)
            drawn = "█" * round(20 * share)
            parts.append(
                f"{drawn.ljust(20, '░')} {share:.0%}" if bar else f"{event.done:g} of {event.total:g}"
            )
        parts += [event.detail] if event.detail else []
        parts.append(format_seconds(time.monotonic() - self.began))
        if memory := _memory():
            parts.append(f"{format_size(memory)} of memory")
        return " · ".join(parts) + self._left(event)

    def _left(self, event: Event) -> str:
        """The time left, from what a unit took since the phase's first; the one that is worked on may take
        longer, but not be done before it is."""
        if self._first is None or not event.total or event.done >= event.total:
            return ""
        (began, first), (latest, done) = self._first, self._latest
        if done <= first:
            return ""
        unit = (latest - began) / (done - first)
        left = unit * (event.total - done) - (time.monotonic() - latest)
        left = max(left, unit * (event.total - done - 1))
        return f" · {format_seconds(left)} left" if left >= 1 else ""

    def _clear(self) -> None:
        if self.live:
            click.echo("\r\033[2K", nl=False, err=True)

    def _end_phase(self) -> None:
        spent = self.output.seconds.get(self.phase, 0.0) + time.monotonic() - self.start
        self.output.seconds[self.phase] = spent

    def close(self) -> None:
        self._stop.set()
        with self._lock:
            self._end_phase()
            self._clear()
        if self._thread.is_alive():
            self._thread.join()


def _memory() -> int:
    """Bytes in memory of this process and of those that it started, such as a server; 0 where that cannot be
    told. Linux alone tells children without a look at all processes."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        process = f"/proc/{waiting.pop()}"
        try:
            with open(f"{process}/statm") as file:
                total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            tasks = os.listdir(f"{process}/task")
        except (AttributeError, OSError, ValueError, IndexError):  # ended meanwhile, or not told here
            continue
        for task in tasks:
            try:
                with open(f"{process}/task/{task}/children") as file:
                    waiting += map(int, file.read().split())
            except OSError:  # the thread has ended meanwhile
                continue
    return total


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``, ``-q`` and ``-v``; the command receives them as one :class:`Output` in ``out``."""

    @click.option(
        "--json", "json_", is_flag=True, help="One JSON object on stdout, everything else on stderr."
    )
    @click.option("-q", "--quiet", is_flag=True, help="No progress.")
    @click.option(
        "-v", "--verbose", is_flag=True, help="Where facts come from, and what took how long, on stderr."
    )
    @functools.wraps(command)
    def wrapped(*args: Any, json_: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        outcome = click.get_current_context().obj or Outcome()
        out, start = Output(json_, quiet, verbose, outcome=outcome), time.monotonic()
        try:
            return command(*args, out=out, **kwargs)
        finally:
            phases = [
                f"{name} {format_seconds(spent)}"
                for name, spent in out.seconds.items()
                if name != "total" and spent >= _WORTH_SAYING
            ]
            out.details([", ".join([f"time: {format_seconds(time.monotonic() - start)}", *phases])])

    return wrapped


def run(group: click.Command, prog_name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a click program with the exit statuses of the contract: 0 done, 1 failed, 2 usage, 3 nothing fits,
    4 verification failed, 75 a job that ends on SIGTERM, 130 interrupted. With ``--json`` a failure is also
    one JSON object on stdout, with ``retryable`` where the same command may succeed later."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    outcome = Outcome((prog_name, *arguments))

    def failed(message: str, code: int, retryable: bool = False) -> int:
        if "--json" in arguments and not outcome.printed:
            value = {"error": message, "exit_code": code} | ({"retryable": True} if retryable else {})
            click.echo(json.dumps(value))
        return code

    try:
        status = group.main(arguments, prog_name=prog_name, standalone_mode=False, obj=outcome)
        code = status if isinstance(status, int) else 0
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = failed(error.format_message(), error.exit_code)
    except QuantError as error:
        click.echo(
            click.style("error: ", fg="red") + str(error),
            err=True,
            color=None if _colour(sys.stderr) else False,
        )
        code = failed(str(error), error.exit_code, error.retryable)
    except Terminated:
        message = "asked to end: finished work is kept, the same command goes on from there"
        click.echo(message, err=True)
        code = failed(message, RUN_AGAIN, True)
    except (click.Abort, KeyboardInterrupt):
        kept = (
            "nothing was written"
            if "--dry-run" in arguments
            else "finished work is kept, the same command goes on from there"
        )
        click.echo(f"interrupted: {kept}", err=True)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}: check the path, its permissions and the disk"
        click.echo(f"error: {message}", err=True)
        code = failed(message, 1, error.errno in _PASSING)
    except MemoryError:
        message = (
            "out of memory: use fewer or shorter calibration rows (--samples, --sequence-length) or a "
            "machine with more memory"
        )
        click.echo(f"error: {message}", err=True)
        code = failed(message, 1, True)
    except Exception as error:  # a fault of ours, which tells nothing to whoever reads a log
        message = _unforeseen(error)
        if any(_asks_for_details(word) for word in arguments):
            traceback.print_exception(error)
        click.echo(f"error: {message}", err=True)
        code = failed(message, 1)
    sys.exit(code)


def _asks_for_details(word: str) -> bool:
    return word == "--verbose" or bool(re.fullmatch(r"-[a-z]*v[a-z]*", word))


def _unforeseen(error: Exception) -> str:
    """What is said of an error that no part of the program has a message for: where it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}quant{os.sep}" in f.filename]
    parts = frames[-1].filename.split(f"{os.sep}quant{os.sep}") if frames else ["the program"]
    where = f"{parts[-1]}, line {frames[-1].lineno}" if frames else parts[-1]
    return (
        f"{UNFORESEEN} ({type(error).__name__}: {first_line(error, 200)}; {where}): a fault of quant's, or a "
        "file that is not what it claims to be. quant verify checks a checkpoint; the same command with -v "
        "shows where it failed, for a report"
    )
