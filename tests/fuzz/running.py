"""Runs a command on hostile files in this process, and says what it may not do.

A command ends with one of the exit statuses of the contract and a message, within :data:`SECONDS` of this
process' time and :data:`MEMORY`, and writes nowhere but into its output: writes are seen by an audit hook, so
that one outside is noticed wherever it goes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.commands.terminal import UNFORESEEN
from tests.fuzz import mutations
from tests.fuzz.targets import WARM, Command, Target, seed_file

#: What a run may take: processor seconds, bytes of resident memory, characters of its message.
SECONDS, MEMORY, WORDS = 5.0, 1 << 30, 20_000
#: Processor seconds, and wall-clock ones on a machine that does other work, after which a run is ended.
_ENDED = (15.0, 120.0)
_STATUSES = {0, 1, 2, 3, 4}
#: Where commands write beside the folder of the example: their own work, and what libraries keep.
_OWN = {"half.work", "ledger"}
_OUTPUTS = ("out", "half", "small", "ledger")
#: Audit events of writes → how many of their arguments are paths. What is relative to an open folder, as
#: ``shutil.rmtree`` goes through one, has more arguments, of which one says so.
_WRITES = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2,
           "os.truncate": 1, "shutil.rmtree": 1}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What a command did that it may not; ``signature`` is the same for the same cause."""

    signature: str
    details: str


class _TooLong(BaseException):
    pass


class _Watch:
    """Paths that this process writes to while ``on``."""

    def __init__(self) -> None:
        self.on, self.paths = False, set[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, (str, bytes)) and int(flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.paths.add(os.path.abspath(os.fsdecode(path)))
        elif event in _WRITES:
            count = _WRITES[event]
            if any(isinstance(a, int) and a > 2 for a in arguments[count + (event == "os.mkdir") :]):
                return
            for path in arguments[:count]:
                if isinstance(path, (str, bytes)):
                    self.paths.add(os.path.abspath(os.fsdecode(path)))


class Runner:
    """Runs examples in a folder of its own: hard links to the seeds but for the file that is changed."""

    def __init__(self, seeds: Path, root: Path):
        self.seeds, self.box = seeds.resolve(), (root / "box").resolve()
        self.temporary = (root / "temporary").resolve()
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.box.mkdir(parents=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
        # torch names a folder here for its compiler, and a process that has may have started this one
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.temporary / "inductor")
        self.watch = _Watch()
        self.names = {f.name for f in self.seeds.iterdir()}
        for name in self.names:
            self.lay_out(name)
        self.warm()

    def lay_out(self, name: str) -> None:
        """Puts a file or folder of the seeds into the box anew; what commands append to is copied."""
        source, made = self.seeds / name, self.box / name
        _remove(made)
        if source.is_file():
            os.link(source, made)
            return
        for folder, _, names in os.walk(source):
            here = made / os.path.relpath(folder, source)
            here.mkdir(parents=True)
            for inside in names:
                if name in _OWN:
                    shutil.copy2(os.path.join(folder, inside), here / inside)
                else:
                    os.link(os.path.join(folder, inside), here / inside)

    def run(self, target: Target, content: bytes | str, command: Command) -> Fault | None:
        """What a command did wrong on the seeds with the file of a target replaced; the box is as before
        afterwards."""
        file = seed_file(self.seeds, target).relative_to(self.seeds)
        _remove(self.box / file)
        if isinstance(content, str):
            mutations.put_odd(self.box / file, content)
        else:
            (self.box / file).write_bytes(content)
        try:
            with _inside(self.box):
                return self._run(command)
        finally:
            touched = {os.path.relpath(p, self.box).split(os.sep)[0] for p in self.watch.paths}
            for name in {*os.listdir(self.box)} - self.names:
                _remove(self.box / name)
            for name in (touched & self.names) | ({file.parts[0]} & _OWN):
                self.lay_out(name)
            if file.parts[0] not in _OWN:
                _remove(self.box / file)
                os.link(self.seeds / file, self.box / file)

    def warm(self) -> None:
        """Runs what every process does once, such as importing torch, so that it counts for no example."""
        for words in WARM:
            with _inside(self.box):
                fault = self._run(words, (600.0, 3600.0))
            if fault is not None and not fault.signature.startswith(("memory", f"{SECONDS:g} s")):
                raise RuntimeError(fault.details)
        for name in {*os.listdir(self.box)} - self.names:
            _remove(self.box / name)

    def _run(self, command: Command, patience: tuple[float, float] | None = None) -> Fault | None:
        out, err = io.StringIO(), io.StringIO()
        status: int | None = None
        failure: BaseException | None = None
        _forget_peak()
        base = _peak()
        self.watch.paths.clear()
        began, self.watch.on = time.process_time(), True
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _ended_after(*(patience or _ENDED)),
        ):
            try:
                _call(command)
                status = 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
            except BaseException as error:
                failure = error
        self.watch.on = False
        seconds, memory = time.process_time() - began, _peak()
        said = err.getvalue()

        def fault(kind: str, details: str = "") -> Fault:
            head = f"{' '.join(command)}\nstatus {status}, {seconds:.1f} s"
            return Fault(kind, f"{head}\n{details}\n{said[-3000:]}")

        if isinstance(failure, _TooLong):
            return fault(f"waits: {_place(failure)}", _trace(failure))
        if failure is not None:
            return fault(f"{type(failure).__name__}: {_place(failure)}", _trace(failure))
        if status not in _STATUSES:
            return fault(f"status {status}")
        if UNFORESEEN in said:
            where = re.search(r"\((\w+): .*; ([^;]*)\): a fault", said, re.S)
            with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.suppress(SystemExit):
                _call((*command, "-v"))
            return fault(": ".join(where.groups()) if where else UNFORESEEN, err.getvalue()[-4000:])
        if "Traceback (most recent" in said:
            return fault(f"traceback of a thread: {' '.join(command[:2])}")
        if status in (1, 2, 3) and not re.search(r"(?i)error|fits|problem|can run", said):
            return fault(f"status {status} without a word: {' '.join(command[:2])}")
        if len(said) > WORDS:
            return fault(f"{len(said) // 1000} thousand characters of message: {' '.join(command[:2])}")
        if "out of memory" in said:
            return fault(f"out of memory: {' '.join(command[:2])}")
        if seconds > SECONDS:
            return fault(f"{SECONDS:g} s: {' '.join(command[:2])}")
        if memory > max(MEMORY, base + MEMORY // 2):
            return fault(f"memory: {' '.join(command[:2])}", f"{memory >> 20} MiB")
        outside = sorted(p for p in self.watch.paths if not self._allowed(p))
        if outside:
            return fault(f"writes outside: {' '.join(command[:2])}", "\n".join(outside[:10]))
        return None

    def _allowed(self, path: str) -> bool:
        if path == os.devnull or path.startswith(str(self.temporary)) or path.endswith(".pyc"):
            return True
        if "__pycache__" in path:
            return True
        first = os.path.relpath(path, self.box).split(os.sep)[0]
        return any(first == name or first.startswith(f"{name}.") for name in _OUTPUTS)


def _call(command: Command) -> None:
    """The words of a command as its program takes them; ``manifest`` is the reading that ``batch`` begins
    with, without the dry runs in processes of their own."""
    if command[0] == "manifest":
        _survey(Path(command[1]), Path(command[2]))
    elif command[0] == "deploy":
        import deploy_vllm

        deploy_vllm.main(list(command[1:]))
    else:
        import quantize

        quantize.main(list(command))


def _survey(manifest: Path, ledger: Path) -> None:
    from quant.batch.attempt import write_recipe
    from quant.batch.ledger import Ledger
    from quant.batch.manifest import read_manifest
    from quant.batch.run import survey
    from quant.errors import QuantError

    try:
        jobs = read_manifest(manifest)
        with Ledger(ledger) as book:
            survey(jobs, book)
        for job in jobs[:20]:
            write_recipe(job, ledger)
    except QuantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _ended_after(used: float, passed: float) -> Iterator[None]:
    """Ends what takes so many seconds of the processor, or waits for so long."""

    def end(number: int, frame: object) -> None:
        raise _TooLong

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, used), signal.SIGALRM: (signal.ITIMER_REAL, passed)}
    before = {number: signal.signal(number, end) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for number, (timer, _) in timers.items():
                signal.setitimer(timer, 0)
                signal.signal(number, before[number])


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Largest resident memory, in bytes, since :func:`_forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _place(error: BaseException) -> str:
    """The innermost line of the project that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}quant{os.sep}" in f.filename and "site-packages" not in f.filename]
    chosen = (ours or frames)[-1]
    return f"{Path(chosen.filename).parent.name}/{Path(chosen.filename).name}:{chosen.name}"


def _trace(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error))
    return lines[-4000:]


def threads_left() -> list[str]:
    """Threads that a run has left behind."""
    return [t.name for t in threading.enumerate() if t is not threading.main_thread()]
