"""Who works on which job, and what became of each, in a folder that processes on several machines share.

Nothing here needs a lock of the file system, which network file systems have or lack as they are set up. Two
operations suffice: a hard link to a name that must be free, which NFS makes at most once, and appending to a
file that has one writer.

*Events* are JSON lines. Each process appends to a file of its own in ``events/``; what the ledger says is all
of them together. Of one job they are ordered by the claim under which they were written, so that clocks that
differ do not matter.

*Claims* are numbered per job: ``claims/JOB/1``, ``2``, … The highest is the one that holds, unless
``N.released`` stands beside it. Taking a job is linking the next number, which only one process can. No claim
is ever removed or renamed, so that a late look can be out of date but not wrong. Its holder touches the file
every few seconds. It is stale when its process is gone, as a process of the same machine can tell, or when it
was not touched for a while by the observer's own clock. A holder that cannot touch it for half as long, or
finds a higher number, has lost it and stops its work.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from quant.documents import parse_json, read_document
from quant.errors import QuantError

#: Seconds between two touches of a claim, and without one until it is stale. A network file system may show
#: attributes that are some seconds old.
BEAT, STALE = 5.0, 60.0
_RELEASED = ".released"
#: Files of events that are opened each time, which asks a network's server for the newest; of more, as many
#: tasks of a cluster leave, those that have grown.
_OPENED = 100


@dataclass(frozen=True)
class Place:
    """Where a process runs: it can be looked for by its number from a place that is equal, and by no other,
    since containers of one machine have numbers of their own."""

    host: str
    boot: str
    namespace: str

    @classmethod
    def here(cls) -> Place:
        def read(path: str, link: bool = False) -> str:
            try:
                return os.readlink(path) if link else Path(path).read_text().strip()
            except OSError:
                return ""

        boot = read("/proc/sys/kernel/random/boot_id") or f"{psutil.boot_time():.0f}"
        return cls(socket.gethostname(), boot, read("/proc/self/ns/pid", link=True))


@dataclass
class Claim:
    """A job that this process holds; ``number`` orders its events among those of other claims."""

    slug: str
    number: int
    path: Path
    lost: threading.Event = field(default_factory=threading.Event)
    touched: float = 0.0


class Ledger:
    """A ledger's folder, made where it is not there. Its methods may be called from several threads.

    Args:
        folder: of a manifest; shared by all that work on it.
        beat, stale: seconds, see :data:`BEAT`.

    Raises:
        QuantError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, beat: float = BEAT, stale: float = STALE):
        self.folder, self.beat, self.stale = folder, beat, stale
        self.place = Place.here()
        self._lock = threading.RLock()
        self._events: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}
        self._forecasts: dict[str, dict[str, Any]] = {}
        self._submitted: dict[str, dict[str, Any]] = {}
        self._offsets: dict[str, int] = {}
        self._seen: dict[Path, tuple[int, float]] = {}
        self._held: dict[str, Claim] = {}
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._count = 0
        self._own = folder / "events" / f"{self.place.host}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._stream: Any = None
        try:
            for name in ("events", "claims", "jobs"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QuantError(
                f"{folder}: the batch's ledger cannot be made there ({error.strerror}): use --ledger to name "
                "a folder that can be written to"
            ) from error
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._touch_all, name="ledger", daemon=True)
        self._heart.start()

    def close(self) -> None:
        """Releases what is held and stops touching."""
        for claim in list(self._held.values()):
            self.release(claim)
        self._closing.set()
        self._heart.join()
        with self._lock:
            if self._stream is not None:
                self._stream.close()
                self._stream = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- events ---------------------------------------------------------------------------------------------

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Calls ``listener`` with each event that this process records, in the thread that does."""
        self._listeners.append(listener)

    def record(self, kind: str, job: str, claim: Claim | None = None, **facts: Any) -> dict[str, Any]:
        """Appends one event and has it on the disk.

        Args:
            kind: ``planned``, ``started``, ``finished``, ``failed``, ``interrupted`` or ``submitted``.
            job: the job's slug.
            claim: under which it happened.
            facts: what else is known, as JSON has it.
        """
        event = {
            "event": kind,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "host": self.place.host,
            "pid": os.getpid(),
            "job": job,
            **({} if claim is None else {"claim": claim.number}),
            **facts,
        }
        with self._lock:
            if self._stream is None:
                self._stream = self._own.open("a", encoding="utf-8")
            self._stream.write(json.dumps(event) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        for listener in self._listeners:
            listener(event)
        return event

    def refresh(self) -> None:
        """Reads what was appended since the last time, by any process."""
        with self._lock:
            files = sorted((self.folder / "events").glob("*.jsonl"))
            for file in files:
                offset = self._offsets.get(file.name, 0)
                try:
                    if len(files) > _OPENED and file.stat().st_size == offset:
                        continue
                    with file.open("rb") as stream:
                        stream.seek(offset)
                        new = stream.read()
                except OSError:  # it will be there the next time
                    continue
                whole = new[: new.rfind(b"\n") + 1]  # the last line may still be written
                self._offsets[file.name] = offset + len(whole)
                for line in whole.splitlines():
                    self._take(line)

    def _take(self, line: bytes) -> None:
        """One line of a file; what a crash has torn or filled with zeros is no event."""
        try:
            event = parse_json(line.decode())
            kind, job = event["event"], event["job"]
        except (ValueError, KeyError, TypeError):
            return
        if not isinstance(kind, str) or not isinstance(job, str):
            return
        self._count += 1
        if kind == "planned" and isinstance(event.get("digest"), str):
            self._forecasts[event["digest"]] = event
        elif kind == "submitted" and isinstance(event.get("number"), int):
            if event["number"] >= self._submitted.get(job, event)["number"]:
                self._submitted[job] = event
        elif isinstance(claim := event.get("claim"), int):
            order = (claim, self._count)
            if job not in self._events or self._events[job][0] < order:
                self._events[job] = (order, event)

    def latest(self, job: str) -> dict[str, Any] | None:
        """The last event of a job's last claim; None before the first."""
        with self._lock:
            return self._events[job][1] if job in self._events else None

    def forecast(self, digest: str) -> dict[str, Any] | None:
        """What a dry run said of jobs with these settings."""
        with self._lock:
            return self._forecasts.get(digest)

    def submitted(self, job: str) -> dict[str, Any] | None:
        """What was last handed to a scheduler's queue for a job, by its ``number``; None before that."""
        with self._lock:
            return self._submitted.get(job)

    # --- claims ---------------------------------------------------------------------------------------------

    def claim(self, slug: str) -> Claim | None:
        """Takes a job, where nobody holds it.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder = self.folder / "claims" / slug
        folder.mkdir(exist_ok=True)
        number = self._highest(folder)
        if number and not self._free(folder / str(number)):
            return None
        path = folder / str(number + 1)
        holder = {**vars(self.place), "pid": os.getpid(), "started": psutil.Process().create_time()}
        if not _link(path, json.dumps(holder)):
            return None
        claim = Claim(slug, number + 1, path, touched=time.monotonic())
        with self._lock:
            self._held[slug] = claim
        return claim

    def release(self, claim: Claim) -> None:
        """Lets go of a job. Its events must have been recorded before."""
        with self._lock:
            self._held.pop(claim.slug, None)
        if not claim.lost.is_set():
            claim.path.with_name(claim.path.name + _RELEASED).touch()

    def holder(self, slug: str) -> str | None:
        """Who holds a job now, in words; None where nobody does."""
        folder = self.folder / "claims" / slug
        number = self._highest(folder)
        if not number or self._free(folder / str(number)):
            return None
        holder = _read(folder / str(number))
        return f"{holder.get('host', 'another host')}, process {holder.get('pid', 'unknown')}"

    @staticmethod
    def _highest(folder: Path) -> int:
        try:
            return max((int(n) for n in os.listdir(folder) if n.isdigit()), default=0)
        except OSError:
            return 0

    def _free(self, path: Path) -> bool:
        """Whether a claim holds no more: released, its process gone, or untouched for too long."""
        if path.with_name(path.name + _RELEASED).exists():
            return True
        holder = _read(path)
        if holder and Place(*(str(holder.get(k)) for k in ("host", "boot", "namespace"))) == self.place:
            return not _alive(holder)
        try:
            with path.open("rb") as stream:  # opening asks the server, where a mere look may be answered here
                touched = os.fstat(stream.fileno()).st_mtime_ns
        except OSError:
            return False
        now = time.monotonic()
        with self._lock:
            before, since = self._seen.get(path, (None, now))
            if before != touched:
                self._seen[path] = (touched, now)
                return False
            return now - since >= self.stale

    def _touch_all(self) -> None:
        while not self._closing.wait(self.beat):
            with self._lock:
                held = list(self._held.values())
            for claim in held:
                if self._highest(claim.path.parent) > claim.number:
                    claim.lost.set()
                    continue
                try:
                    os.utime(claim.path)
                    claim.touched = time.monotonic()
                except OSError:
                    if time.monotonic() - claim.touched > self.stale / 2:
                        claim.lost.set()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_document(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _alive(holder: Mapping[str, Any]) -> bool:
    """Whether the process that made a claim on this machine runs; its number may be another one's now."""
    try:
        process = psutil.Process(int(holder["pid"]))
        same = abs(process.create_time() - float(holder["started"])) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _link(path: Path, text: str) -> bool:
    """Makes a file with its content, or says that the name is taken."""
    made = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    made.write_text(text, encoding="utf-8")
    try:
        os.link(made, path)
        return True
    except FileExistsError:
        # an answer that a network lost: the link was made, and making it again finds it
        return made.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        made.unlink()
    try:  # a file system without hard links; a reader may see the file before its content
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
        return True
    except FileExistsError:
        return False
