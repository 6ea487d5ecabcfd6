#!/usr/bin/env python3
"""Disturbs a job again and again, and compares what it makes in the end with what an undisturbed run makes,
byte by byte.

    python benchmarks/kills.py MODEL [--method yaqa] [--kills 20] [--damage] [--seed 0] [OPTION …]
    python benchmarks/kills.py MODEL --disk-full 20 [OPTION …]
    python benchmarks/kills.py MODEL --batch [--kills 20] [OPTION …]

Options that are not its own go to the command. Each attempt is a process forked from this one, which has
done the job once, so that most of an attempt's time is work. It is killed (SIGKILL) at moments drawn
evenly, every other one over the time that the undisturbed run took, the others over what came of it from the
first unit written on; so they fall into reading, forward and backward passes, rounding, writing and
verification. Of a job of several ranks (``--devices cpu,cpu``) one of them is killed by chance, which the
others must notice. A job goes on where it was, so after many kills it ends before the next one: then it
starts anew in another folder until so many kills have hit.

``--damage`` also does to what a killed job leaves what a power loss does: a file of the work folder is cut,
or filled with zeros, from a random place on, the scratch file of activations and the shards among them.

``--disk-full`` gives the job a file system of its own (a tmpfs, in a mount namespace) with room for
a random share of what it writes. It must say so, and go on to the same bytes once there is room.

``--batch`` runs three such jobs as a batch and kills, in turn by chance, the batch's process or a job's.

Nothing may start over: without damage each attempt finds all units that the ones before had finished and does
none of them again, so that a kill costs the block that was under way and a pass forward over finished ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, machine

_MOUNTED = "QUANT_KILLS_MOUNTED"
_AGAIN = 75  # the exit status that says: run me again
ROOM = 32 << 10  # bytes that a full disk leaves at the least: a folder and a lock


def files(folder: Path) -> dict[str, bytes]:
    """What a job makes, less the files that say when and where."""
    return {
        f.relative_to(folder).as_posix(): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.suffix == ".safetensors" or f.name in ("config.json", "model.safetensors.index.json")
    }


def damage(work: Path, chance: random.Random) -> str:
    """Damages a file of a work folder, and says how."""
    several = [f for f in sorted(work.rglob("*")) if f.is_file() and f.name != "lock" and f.stat().st_size]
    if not several:
        return "nothing there"
    file = chance.choice(several)
    size = file.stat().st_size
    start = chance.randrange(size)
    cut = chance.random() < 0.5
    with file.open("r+b") as stream:
        if cut:
            stream.truncate(start)
        else:
            stream.seek(start)
            stream.write(b"\0" * (size - start))
    return f"{file.name} {'cut' if cut else 'zero'} from {start} of {size}"


def started(words: Sequence[object], log: Path) -> int:
    """Starts ``quant`` in a forked process; returns its number."""
    number = os.fork()
    if number:
        return number
    try:
        os.setsid()
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        import quantize

        quantize.main([str(w) for w in words])
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(int(stop.code or 0))
    finally:
        os._exit(70)  # what is no exit of the command is a traceback


def ended(number: int, seconds: float | None = None) -> int | None:
    """The exit status of a process; None where it still runs after so many seconds."""
    deadline = None if seconds is None else time.perf_counter() + seconds
    while True:
        found, status = os.waitpid(number, 0 if deadline is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.perf_counter() >= deadline:
            return None
        time.sleep(0.001)


def finished(work: Path) -> set[str]:
    """Names of the units that a work folder's journal has."""
    try:
        lines = (work / "journal.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    found = set()
    for line in lines:
        try:
            found.add(json.loads(line)["unit"])
        except (ValueError, KeyError):
            continue
    return found


class Study:
    """Attempts at one job, and what they did."""

    def __init__(self, a: argparse.Namespace, options: Sequence[str], work: Path):
        self.work, self.log = work, work / "log"
        self.words = [
            "quantize",
            "--json",
            "-m",
            a.model,
            "--method",
            a.method,
            "--target",
            "other",
            *options,
        ]
        if a.method not in ("minmax", "hqq"):
            self.words += ["--samples", a.samples, "--sequence-length", a.length]
        self.chance = random.Random(a.seed)
        self.phases: Counter[str] = Counter()
        self.warm()
        began, number = time.perf_counter(), self.start(work / "undisturbed")
        self.first = 0.0
        while not self.first and (status := ended(number, 0.01)) is None:
            if " written in " in self.said():
                self.first = time.perf_counter() - began
        self.complete(number, status)
        self.whole = time.perf_counter() - began
        self.wanted = files(work / "undisturbed")
        size = sum(map(len, self.wanted.values()))
        print(f"undisturbed: {self.whole:.1f} s, {len(self.wanted)} files, {size:,} bytes", flush=True)

    def warm(self) -> None:
        """Does the job once in this process, which then has everything imported that an attempt needs."""
        import quantize

        with self.log.open("w") as stream, redirect_stdout(stream), redirect_stderr(stream):
            try:
                quantize.main([*map(str, self.words), "-o", str(self.work / "warm")])
            except SystemExit as stop:
                status = stop.code
        if status:
            raise SystemExit(f"failed ({status}): {self.said()[-3000:]}")

    def start(self, output: Path) -> int:
        self.log.unlink(missing_ok=True)  # an attempt that says nothing must not leave the last one's words
        return started([*self.words, "-o", output], self.log)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def complete(self, number: int, status: int | None = None) -> None:
        if ended(number) if status is None else status:
            raise SystemExit(f"failed: {self.said()[-3000:]}")

    def moment(self, number: int) -> float:
        """Seconds after which the attempt that is to be hit as the ``number``-th is killed."""
        begin = self.first if number % 2 else 0.0
        return begin + self.chance.random() * (self.whole - begin)

    def kill(self, number: int) -> tuple[bool, int]:
        """Kills one of an attempt's ranks by chance, and waits for its end: whether it was not the first, and
        the exit status: 0 where that had all that it needed from the other."""
        inside = [c for c in psutil.Process(number).children() if "spawn_main" in " ".join(c.cmdline())]
        victim = self.chance.randrange(1 + len(inside))
        if not victim:
            os.kill(number, signal.SIGKILL)
        else:
            inside[victim - 1].kill()
        status = ended(number) or 0
        if victim and status not in (_AGAIN, 0):
            raise SystemExit(f"a rank was killed, and the first ended with {status}:\n{self.said()[-3000:]}")
        return victim > 0, status

    def check(self, output: Path) -> None:
        if files(output) != self.wanted:
            raise SystemExit(f"{output}: other bytes than the undisturbed run's")
        if output.with_name(output.name + ".work").exists():
            raise SystemExit(f"{output}: the work folder was left behind")

    def went_on(self, before: set[str]) -> bool:
        """Whether an attempt got as far as to find what was finished ``before``; ends the study where it did
        not find all of it, or did any of it again."""
        said = self.said()
        again = before & set(re.findall(r"^(.*?) written in ", said, re.M))
        found = re.search(r"resuming: (\d+)", said)
        if again or (found is None and " written in " in said and before):
            raise SystemExit(f"{sorted(before)} were finished, and it started over:\n{said[-2000:]}")
        if found is not None and int(found[1]) != len(before):
            raise SystemExit(f"{sorted(before)} were finished, it found {found[1]}:\n{said[-2000:]}")
        return found is not None


def kills(a: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Kills attempts at one job after the other."""
    hit = done = resumed = helpers = 0
    before: set[str] = set()
    output = study.work / "out0"
    while hit < a.kills or before:
        left = output.with_name(output.name + ".work")
        number = study.start(output)
        status = ended(number, study.moment(hit) if hit < a.kills else None)
        killed = status is None
        if killed:
            phase = _phase(study.said())
            helper, status = study.kill(number)
            helpers += helper
            killed = status != 0
            hit += 1
            study.phases[phase] += 1
        elif status:
            raise SystemExit(f"failed ({status}): {study.said()[-3000:]}")
        if not a.damage:
            resumed += study.went_on(before)
        journal = output / "journal.jsonl"
        if killed and (left.exists() or not output.exists() or journal.exists()):
            if a.damage and left.exists():
                print(f"  {hit}: {damage(left, study.chance)}", flush=True)
            before = finished(output if journal.exists() else left)
            continue
        study.check(output)
        done, before = done + 1, set()
        output = study.work / f"out{done}"
    return {
        "kills": hit, "of helpers": helpers, "finished": done, "identical": done, "resumed": resumed,
        "where": dict(study.phases),
    }  # fmt: skip


def _phase(said: str) -> str:
    """What a killed attempt was at, as its last line of progress has it."""
    lines = [x for x in said.splitlines() if x]
    return re.split(r" · | written in | replayed in |:", lines[-1])[0][:30] if lines else "start"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disks(a: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Attempts on disks with too little room, each followed by one on the same disk with enough."""
    taken = 0
    with small_disk(study.work / "disk", 64 << 20) as disk:
        number = study.start(disk / "out")
        while ended(number, 0.002) is None:
            taken = max(taken, _used(disk))
        study.check(disk / "out")
        print(f"takes {taken:,} bytes of disk", flush=True)
    full = kept = tries = 0
    size = taken + (4 << 20)
    while full < a.disk_full:
        tries += 1
        with small_disk(study.work / f"disk{tries}", size) as disk:
            ballast, output = disk / "ballast", disk / "out"
            room = ROOM + study.chance.randrange(taken)
            with ballast.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, max(1, size - _used(disk) - room))
            status, said = ended(study.start(output)), study.said()
            ballast.unlink()
            if status:
                if status != 1 or "Traceback" in said or not re.search(r"full|[Nn]o space|room", said):
                    raise SystemExit(f"exit status {status} with {room} bytes of room:\n{said[-3000:]}")
                full += 1
                study.phases[_phase(said)] += 1
                before = finished(output.with_name("out.work"))
                kept += bool(before)
                study.complete(study.start(output))
                if before:
                    study.went_on(before)
            study.check(output)
    return {"full disks": full, "said": full, "resumed": kept, "identical": full}


def _used(disk: Path) -> int:
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def batches(a: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Batches of three such jobs, of which the batch's process or a job's is killed."""
    import yaml

    hit: Counter[str] = Counter()
    done = 0
    overrides = {
        str(k)[2:].replace("-", "_"): yaml.safe_load(str(v))
        for k, v in zip(study.words[4::2], study.words[5::2], strict=True)
    }
    if "calibration_dataset" in overrides:
        overrides["calibration_dataset"] = [overrides["calibration_dataset"]]
    while sum(hit.values()) < a.kills:
        folder = study.work / f"batch{done}"
        folder.mkdir()
        jobs = [{"model": str(a.model), "output": f"out{i}", "overrides": overrides} for i in range(3)]
        defaults = {"threads": 1, "retries": a.kills, "retry_delay": 0.0}
        (folder / "m.yaml").write_text(yaml.safe_dump({"defaults": defaults, "jobs": jobs}))
        while True:
            number = started(["batch", folder / "m.yaml", "--jobs", "2", "--json"], study.log)
            status = None
            while status is None:
                wait = study.chance.random() * 2 * (study.whole + 5) if sum(hit.values()) < a.kills else None
                if (status := ended(number, wait)) is None:
                    inside = [c for c in psutil.Process(number).children(True) if "quantize" in c.cmdline()]
                    if inside and study.chance.random() < 0.7:
                        study.chance.choice(inside).kill()
                        hit["a job"] += 1
                    else:
                        os.kill(number, signal.SIGKILL)
                        hit["the batch"] += 1
                        status = ended(number)
            if status == 0:
                break
            if status not in (_AGAIN, -signal.SIGKILL):
                raise SystemExit(f"failed ({status}): {study.said()[-3000:]}")
        for i in range(3):
            study.check(folder / f"out{i}")
        done += 1
    return {"kills": sum(hit.values()), "of": dict(hit), "batches": done, "identical": 3 * done}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=lambda p: Path(p).resolve())
    p.add_argument("--method", default="yaqa")
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--damage", action="store_true")
    p.add_argument("--disk-full", type=int, default=0, metavar="TIMES")
    p.add_argument("--batch", action="store_true")
    p.add_argument("--samples", type=int, default=16)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--seed", type=int, default=0)
    a, options = p.parse_known_args()
    if a.disk_full and _MOUNTED not in os.environ:  # mounts that nothing outside sees, gone with this process
        os.environ[_MOUNTED] = "1"
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv])
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(a, options, Path(folder))
        of = full_disks if a.disk_full else batches if a.batch else kills
        print(json.dumps(of(a, study)))


if __name__ == "__main__":
    sys.exit(main())
