"""What is finished of a job, so that the same command goes on where it stopped.

The work folder stands beside the output directory. Its ``journal.jsonl`` starts with the job's fingerprint;
each further line is one finished unit (a decoder block, or what lies outside the blocks) with the files that
hold it and their hashes, appended and synced after those files were. On resume each file is read and compared
with its hash: a unit of which a byte has changed is done again. A lock on the folder keeps a second run out.
The folder is renamed to the output directory when everything in it has been verified.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint.writer import file_digest, sync_folder, write_text
from quant.documents import parse_json
from quant.errors import CheckpointError, InUse, QuantError, clipped

_JOURNAL, _LOCK = "journal.jsonl", "lock"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and requests to end wait: between the rename and the last clean-up a stop would leave the lock
    in the output."""
    if threading.current_thread() is not threading.main_thread():  # signals are not this thread's
        yield
        return
    seen: list[int] = []
    before = {
        s: signal.signal(s, lambda number, frame: seen.append(number))
        for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if seen:
        signal.raise_signal(seen[0])


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{prefix}{key}.") if isinstance(part, dict) else {prefix + key: part}
    return flat


#: Keys of a fingerprint that hold hashes or times, which say nothing to a reader → what has changed.
_UNSPOKEN = {
    "calibration": "the rows of calibration text are others",
    "source.files.": "{} of the source has changed",
    "text.": "{} of the calibration text has changed",
    "teacher.files.": "{} of the teacher has changed",
}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words: an option with both values first, then what has no
    value to read."""
    was, now = _flat(before), _flat(json.loads(json.dumps(now)))
    values, others = list[str](), list[str]()
    for key in sorted(k for k in {*was, *now} if was.get(k) != now.get(k)):
        start = next((s for s in _UNSPOKEN if key == s or (s.endswith(".") and key.startswith(s))), None)
        if start is not None:
            others.append(_UNSPOKEN[start].format(key.removeprefix(start)))
            continue
        setting = key.removeprefix("settings.")
        name = f"--{setting.replace('_', '-')}" if setting != key else key
        values.append(f"{name} was {_value(was.get(key))}, is {_value(now.get(key))}")
    return values + others


def _value(value: Any) -> str:
    """A setting as a person gave it."""
    if value is None:
        return "not given"
    if isinstance(value, str):
        value = re.sub(r"\b\w*Path\('([^']*)'\)", r"\1", value)
    return clipped(value)


def _is_unit(entry: object) -> bool:
    """Whether a journal's line, which somebody may have edited, has the shape that
    :meth:`WorkFolder.finish_unit` writes."""
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("unit"), str)
        or not isinstance(entry.get("files"), list)
    ):
        return False
    files = all(
        isinstance(f, dict) and isinstance(f.get("name"), str) and "bytes" in f for f in entry["files"]
    )
    return files and all(isinstance(v, dict) for k, v in entry.items() if k not in ("unit", "files"))


def in_use(output: Path, published: bool = False) -> bool:
    """Whether a run is at work on an output, as far as this machine can tell; ``published``: or about to
    leave it."""
    folder = output if published else work_path(output)
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:  # nothing is begun
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(lock)


def work_path(output: Path) -> Path:
    """Where the work folder of an output is."""
    return output.with_name(output.name + ".work")


def is_unpublished(output: Path) -> bool:
    """Whether an output is a work folder whose run was killed right after the rename, before the journal
    went: the same job takes it back and only finishes it."""
    if work_path(output).exists():
        return False
    try:
        with (output / _JOURNAL).open(encoding="utf-8", errors="replace") as stream:
            first = parse_json(stream.readline(1 << 20))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and isinstance(first.get("fingerprint"), dict)


class WorkFolder:
    """``<output>.work``: claimed, resumed or started afresh.

    Raises:
        InUse: another run holds it.
        QuantError: it belongs to a job with other settings and ``fresh`` is not
            asked.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], fresh: bool):
        self.output = output
        self.path = work_path(output)
        if is_unpublished(output) and not in_use(output, published=True):
            os.rename(output, self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise InUse(
                f"{self.path}: another run is working on this output: wait for it, or choose another "
                "--output-path"
            ) from error
        self.finished: dict[str, dict[str, Any]] = {}
        try:
            if not fresh and (self.path / _JOURNAL).exists():
                self._resume(fingerprint)
            if not self.finished:
                self._clear()
                self._append({"fingerprint": dict(fingerprint)})
        except BaseException:
            os.close(self._lock)
            raise

    def _clear(self, kept: Collection[str] = ()) -> None:
        """Removes everything that a finished unit does not claim: half a shard, activations of a killed run,
        side files."""
        for entry in self.path.iterdir():
            if entry.name != _LOCK and entry.name not in kept:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _resume(self, fingerprint: Mapping[str, Any]) -> None:
        lines, kept = [], ""
        text = (self.path / _JOURNAL).read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines(keepends=True):
            try:
                lines.append(parse_json(line))
            except ValueError:
                break  # the last line of a run that was killed while writing it
            kept += line
        if kept != text:
            write_text(self.path / _JOURNAL, kept)
        if not lines or not isinstance(lines[0], dict) or not isinstance(lines[0].get("fingerprint"), dict):
            return
        if changed := differences(lines[0]["fingerprint"], fingerprint):
            raise QuantError(
                f"{self.path}: holds unfinished work of another job ({', '.join(changed[:3])}): run that job "
                "again to finish it, or use --fresh to start over"
            )
        for entry in lines[1:]:
            if _is_unit(entry) and all(self._intact(f) for f in entry["files"]):
                self.finished[entry["unit"]] = entry
        self._clear({_JOURNAL, *(f["name"] for entry in self.finished.values() for f in entry["files"])})

    def _intact(self, file: Mapping[str, Any]) -> bool:
        path = self.path / file["name"]
        try:
            return path.stat().st_size == file["bytes"] and file_digest(path) == file.get("digest")
        except (CheckpointError, OSError):
            return False

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self.path / _JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def finish_unit(self, unit: str, files: Mapping[Path, str], facts: Mapping[str, Any]) -> None:
        """Records a unit whose files are written and synced; ``files`` has each one's digest."""
        sync_folder(self.path)
        entry = {
            "unit": unit,
            "files": [{"name": f.name, "bytes": f.stat().st_size, "digest": d} for f, d in files.items()],
            **facts,
        }
        # before the line: an interruption right after it would find nothing finished, and the folder would go
        self.finished[unit] = entry
        try:
            self._append(entry)
        except OSError:
            del self.finished[unit]
            raise

    def publish(self, scratch: Sequence[str] = ()) -> None:
        """Renames the folder to the output directory; the journal, the lock and files of the patterns
        ``scratch`` go. Until then they stay: what finished units were made of is needed to tell of them.

        Raises:
            QuantError: the output directory has filled up since the job was planned.
        """
        sync_folder(self.path)
        with _undisturbed():
            self._publish(scratch)

    def _publish(self, scratch: Sequence[str]) -> None:
        try:
            os.rename(self.path, self.output)  # takes the place of an empty directory, fails on any other
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise QuantError(
                f"{self.output}: is not empty any more: something was put there while the job ran. Move it "
                "away and run the same command again"
            ) from error
        (self.output / _LOCK).unlink()
        for file in (f for pattern in scratch for f in self.output.glob(pattern)):
            file.unlink()
        (self.output / _JOURNAL).unlink()  # last: what has one is taken back by the next run
        sync_folder(self.output)
        sync_folder(self.output.parent)
        self.release()

    def abandon(self) -> None:
        """Gives up what is finished: the folder goes when the lock does."""
        self.finished.clear()

    def release(self) -> None:
        """Lets go of the lock. Finished work stays; a folder in which nothing was finished goes."""
        if self._lock >= 0:
            if self.path.exists() and not self.finished:
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


@dataclass(frozen=True)
class FollowedFolder:
    """The work folder as a process sees it that works for the one which holds it: where it is, and what was
    finished when the work began."""

    path: Path
    finished: Mapping[str, dict[str, Any]]
