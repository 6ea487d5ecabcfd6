"""One attempt at a job: its claim, its processes, and what became of it.

The work is done by the commands that a person would type, each in a process of its own: ``quant quantize``
with the job's recipe, then the gates. A process that ends with status 75, or is killed, has kept what it
finished, and the next attempt goes on there. When this process is killed itself, a watcher
(:mod:`quant.serving.watcher`) asks the job's to end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

import quant
from quant.batch.ledger import Claim, Ledger
from quant.batch.manifest import Job, plain
from quant.batch.outputs import facts_of, gates_of, judged, measured, standing
from quant.checkpoint.journal import in_use
from quant.serving import watcher

#: Exit status that asks for another run of the same command.
RUN_AGAIN = 75
#: Seconds that a job's process has to end by itself before it is killed; and between two looks at it.
GRACE, _LOOK = 30.0, 0.1
#: Characters of an error that are kept.
_MOST = 2000


@dataclass(frozen=True)
class Outcome:
    """``done``; ``failed``; ``interrupted``: we were asked to stop; ``held``: another process has the job;
    ``lost``: another process has taken it from us.

    Attributes:
        retryable: whether the same attempt may succeed later.
        log: what the processes wrote to stderr.
        facts: of the event that was recorded.
    """

    status: Literal["done", "failed", "interrupted", "held", "lost"]
    message: str = ""
    retryable: bool = False
    log: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (negative: the signal that killed it; None: we stopped it), what it
    said of an error, and its result."""

    status: int | None
    message: str = ""
    retryable: bool = False
    result: Mapping[str, Any] = field(default_factory=dict)


def command(*words: str) -> list[str]:
    """A ``quant`` command line for this interpreter."""
    return [sys.executable, "-m", "quant", *words]


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Of a job's process: ours, with this very installation of quant first."""
    root = str(Path(quant.__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH", "")
    path = root if not known else known if root in known.split(os.pathsep) else root + os.pathsep + known
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **changes}


def run(
    words: Sequence[str],
    folder: Path,
    log: Path,
    changes: Mapping[str, str],
    stopped: Callable[[], bool],
    grace: float = GRACE,
) -> Ended:
    """Runs a command with ``--json`` to its end, or until we are to stop.

    Args:
        folder: where it runs.
        log: what its stderr is appended to.
        changes: environment variables on top of ours.
        stopped: asked every tenth of a second whether to end it, first by SIGTERM, then by SIGKILL.
    """
    # no file of the ledger: another process may run the same words for the same job, such as a dry run
    results = tempfile.TemporaryFile()
    with log.open("ab") as errors:
        errors.write(f"$ {' '.join(words[2:])}\n".encode())
        errors.flush()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=results,
            stderr=errors,
            cwd=folder,
            env=environment(changes),
            start_new_session=True,  # Ctrl-C at the batch reaches the batch alone
        )
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(watcher.__file__), str(process.pid), str(grace)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as guard:
        try:
            asked = _wait(process, stopped, grace)
        finally:
            if process.poll() is None:
                _signal(process, signal.SIGKILL)
                process.wait()
            assert guard.stdin is not None
            try:
                guard.stdin.write(b".")  # ended in order
                guard.stdin.close()
            except BrokenPipeError:  # somebody has killed it
                pass
    with results:
        results.seek(0)
        said = _last_object(results.read())
    if asked and process.returncode != 0:
        return Ended(None)
    return _ended(process.returncode, said, log)


def _wait(process: subprocess.Popen[bytes], stopped: Callable[[], bool], grace: float) -> bool:
    """Waits for a process; returns whether we asked it to end."""
    deadline: float | None = None
    while process.poll() is None:
        if deadline is None and stopped():
            deadline = time.monotonic() + grace
            _signal(process, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            _signal(process, signal.SIGKILL)
        time.sleep(_LOOK)
    return deadline is not None


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _last_object(answer: bytes) -> dict[str, Any]:
    """The JSON object of a command's last line on stdout."""
    try:
        value = json.loads(answer.splitlines()[-1])
    except (ValueError, IndexError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _ended(status: int, said: Mapping[str, Any], log: Path) -> Ended:
    if status == 0:
        return Ended(0, result=said)
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        hint = ": the system kills so where memory is short" if -status == signal.SIGKILL else ""
        return Ended(status, f"ended by {name}{hint}", True)
    last = _last_line(log).removeprefix("error: ")
    message = str(said.get("error") or last or f"ended with status {status}")
    return Ended(status, message[:_MOST], bool(said.get("retryable")) or status == RUN_AGAIN, said)


def _last_line(log: Path) -> str:
    """What a process said last; its log may be long."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(log.stat().st_size - 4096, 0))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def last_line(log: Path | None) -> str:
    """Where a running job is, as its log says."""
    return "" if log is None else _last_line(log)


def write_recipe(job: Job, folder: Path) -> Path:
    """The job's recipe as a file that ``--config`` takes."""
    file = folder / "recipe.yaml"
    text = yaml.safe_dump(plain(job.values), sort_keys=True)
    temporary = folder / f".recipe-{uuid.uuid4().hex}.yaml"
    temporary.write_text(f"# quant quantize --config {file}\n{text}", encoding="utf-8")
    temporary.replace(file)
    return file


def variables(job: Job, changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables of a job's process: its threads, and the device that it was given."""
    threads = {} if job.threads is None else {"OMP_NUM_THREADS": str(job.threads)}
    return {**threads, **(changes or {})}


def work(
    job: Job,
    ledger: Ledger,
    attempt: int,
    changes: Mapping[str, str],
    stop: Callable[[], bool],
    retries: int = 0,
    grace: float = GRACE,
) -> Outcome:
    """One attempt at a job, recorded in the ledger.

    Args:
        attempt: which one of this run of the batch, from 1.
        changes: environment variables, such as the device that the job was given.
        stop: whether to stop, asked all the time.
        retries: how many attempts will follow where this one fails retryably; for the event.
    """
    claim = ledger.claim(job.slug)
    if claim is None:
        return Outcome("held")
    folder = ledger.folder / "jobs" / job.slug
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{claim.number}.log"
    try:
        return _held(job, ledger, claim, attempt, folder, log, variables(job, changes), stop, retries, grace)
    except OSError as error:
        message = f"{error.filename or ledger.folder}: {error.strerror or error}"
        return Outcome("failed", message, True, log)
    finally:
        try:
            ledger.release(claim)
        except OSError:  # it will be stale soon
            pass


def _held(
    job: Job,
    ledger: Ledger,
    claim: Claim,
    attempt: int,
    folder: Path,
    log: Path,
    changes: Mapping[str, str],
    stop: Callable[[], bool],
    retries: int,
    grace: float,
) -> Outcome:
    def stopped() -> bool:
        return claim.lost.is_set() or stop()

    begun = time.monotonic()
    # the process of a batch that was killed may still be ending, or somebody makes the same output by hand
    while in_use(job.output) and not stopped():
        time.sleep(_LOOK)
    ledger.refresh()
    latest = ledger.latest(job.slug)  # another process may have finished it meanwhile
    found = standing(job, latest)
    if found.status == "done" and latest is not None and latest["event"] == "finished":
        return Outcome("done", facts=latest)
    ledger.record("started", job.slug, claim, name=job.name, attempt=attempt, log=str(log))
    ended = Ended(0)
    gates: dict[str, Any] = {}
    if found.status == "refused":
        ended = Ended(2, found.message)
    elif found.status == "todo":
        recipe = write_recipe(job, folder)
        ended = run(
            command("quantize", "--config", str(recipe), "--json"), folder, log, changes, stopped, grace
        )
    facts = (facts_of(job) if found.status != "refused" and job.output.is_dir() else None) or {}
    if ended.status == 0 and not facts:
        # the unquantized model fits as asked
        facts = {"digest": job.digest, "unneeded": True, "output_path": None}
    elif ended.status == 0:
        ended, gates = _gates(job, folder, log, changes, stopped, grace, latest)
        facts |= {"kl": gates.pop("kl", None)}
    facts |= {"gates": gates, "seconds": round(time.monotonic() - begun, 3), "log": str(log)}
    facts |= {"name": job.name, "attempt": attempt}
    if claim.lost.is_set():
        return Outcome("lost", "another process has taken the job over", True, log)
    if ended.status is None:
        ledger.record("interrupted", job.slug, claim, **facts)
        return Outcome("interrupted", "interrupted: finished work is kept", True, log, facts)
    if ended.status == 0:
        return Outcome("done", "", False, log, ledger.record("finished", job.slug, claim, **facts))
    retryable = ended.retryable and retries > 0
    event = ledger.record(
        "failed", job.slug, claim, message=ended.message, status=ended.status, retry=retryable, **facts
    )
    return Outcome("failed", ended.message, ended.retryable, log, event)


def _gates(
    job: Job,
    folder: Path,
    log: Path,
    changes: Mapping[str, str],
    stopped: Callable[[], bool],
    grace: float,
    latest: Mapping[str, Any] | None,
) -> tuple[Ended, dict[str, Any]]:
    """The gates of a finished output; what they asked is returned as far as they were passed or measured."""
    asked = gates_of(job)
    said: dict[str, Any] = {}
    if job.verify is not None:
        words = ["verify", str(job.output), "--tensor-parallel", str(job.verify.tensor_parallel), "--json"]
        words += [] if job.source is None else ["--source", str(job.source)]
        words += [] if job.verify.vllm is None else ["--vllm", str(job.verify.vllm)]
        ended = run(command(*words), folder, log, changes, stopped, grace)
        if ended.status != 0:
            first = next((c for c in ended.result.get("checks", []) if not c.get("passed")), None)
            what = f"{first['name']}: {first['detail']}" if first else ended.message
            message = f"verify: {what}"
            return Ended(ended.status, message, ended.retryable), said
        said["verify"] = asked["verify"]
    if job.evaluate is not None:
        gate, value = job.evaluate, measured(job, latest)
        if value is None:
            words = ["evaluate", str(job.output), "--against", str(job.source), "--save", "--json"]
            words += ["--chunks", str(gate.chunks)]
            words += [] if gate.length is None else ["--length", str(gate.length)]
            words += [] if gate.text is None else ["--text", str(gate.text)]
            words += ["--device", job.values["device"]] if job.values.get("device") else []
            ended = run(command(*words), folder, log, changes, stopped, grace)
            if ended.status != 0:
                message = f"evaluate: {ended.message}"
                return Ended(ended.status, message, ended.retryable), said
            value = dict(ended.result)
        said |= {"evaluate": asked["evaluate"], "kl": value["kl"]["mean"]}
        if failure := judged(gate, value):
            return Ended(4, f"evaluate: {failure}"), said
    return Ended(0), said
