#!/usr/bin/env python3
"""Gives hostile files to the commands, for as long as it is let.

    python -m tests.fuzz --examples 100000 [--processes 2] [--target NAME …] [--seed 0] [--keep FOLDER]

Each process takes rounds of examples of one kind of file. What a command may not do is listed by its cause,
with the number of examples that met it; ``--keep`` leaves one of each, with its command. Exit status 1 where
there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.running import Fault, Runner

ROOT = Path(__file__).resolve().parents[2]
#: Examples that one process takes: it starts in the time of some hundred.
_ROUND = 1000


def one_round(names: list[str], examples: int, seed: int, seeds: Path, keep: Path | None) -> None:
    """Gives examples of each target to its commands in this process, and prints a line of JSON a target."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.fuzz.running import Runner
    from tests.fuzz.targets import TARGETS

    total = sum(TARGETS[n].weight for n in names)
    first = seed % len(names)
    with tempfile.TemporaryDirectory(prefix="quant-fuzz-") as folder:
        runner = Runner(seeds, Path(folder))
        for name in names[first:] + names[:first]:
            count = max(1, round(examples * TARGETS[name].weight / total))
            print(json.dumps(one_target(runner, name, count, seed, keep)), flush=True)


def one_target(runner: Runner, name: str, count: int, seed: int, keep: Path | None) -> dict[str, Any]:
    """What became of so many examples of a target: ``found`` has, by cause, how many, and the first."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from tests.fuzz.targets import TARGETS, examples, seed_file

    target, found, times = TARGETS[name], dict[str, list[Any]](), [0.0]

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples(target, seed_file(runner.seeds, target).read_bytes()))
    def run(example: tuple[bytes | str, tuple[str, ...]]) -> None:
        began = time.process_time()
        fault = runner.run(target, *example)
        times.append(time.process_time() - began)
        if fault is None:
            return
        entry = found.setdefault(fault.signature, [0, fault.details])
        entry[0] += 1
        if keep is not None and entry[0] == 1:
            keep_example(keep, name, fault, example[0])

    run()
    return {
        "name": name,
        "examples": len(times) - 1,
        "slowest": max(times),
        "found": found,
    }


def keep_example(keep: Path, name: str, fault: Fault, content: bytes | str) -> None:
    keep.mkdir(parents=True, exist_ok=True)
    file = keep / "".join(c if c.isalnum() else "-" for c in f"{fault.signature} {name}")[:120]
    file.with_suffix(".txt").write_text(f"{name}\n{fault.details}", errors="backslashreplace")
    file.with_suffix(".bin").write_bytes(content.encode() if isinstance(content, str) else content)


class Tally:
    """What all rounds have found; a cause is printed when it is met first."""

    def __init__(self) -> None:
        self.by_file: Counter[str] = Counter()
        self.found: dict[str, list[Any]] = {}
        self.slowest, self._lock = 0.0, threading.Lock()

    @property
    def examples(self) -> int:
        return sum(self.by_file.values())

    def add(self, line: dict[str, Any]) -> None:
        with self._lock:
            self.by_file[line["name"]] += line["examples"]
            self.slowest = max(self.slowest, line["slowest"])
            for signature, (count, details) in line["found"].items():
                if signature not in self.found:
                    print(f"--- {signature} ({line['name']})\n{details}", flush=True)
                    self.found[signature] = [0, line["name"]]
                self.found[signature][0] += count

    def to_dict(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "slowest": round(self.slowest, 2),
            "by file": dict(self.by_file),
            "faults": self.found,
        }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--examples", type=int, default=20_000)
    p.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    p.add_argument("--target", action="append", default=[])
    p.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    p.add_argument("--keep", type=Path)
    p.add_argument("--seeds", type=Path, help="Folder of the seeds, made where it is not there.")
    p.add_argument("--round", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    from tests.fuzz.targets import TARGETS

    names = a.target or list(TARGETS)
    if a.round is not None:
        one_round(names, a.examples, a.round, a.seeds, a.keep)
        return 0
    with tempfile.TemporaryDirectory(prefix="quant-fuzz-seeds-") as folder:
        seeds = a.seeds or Path(folder) / "seeds"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if not seeds.exists():
            words = [sys.executable, "-m", "tests.fuzz.seeds", str(seeds)]
            made = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
            if made.returncode:
                sys.exit(made.stderr)
        rounds = max(1, round(a.examples / _ROUND))
        tally, began = Tally(), time.perf_counter()

        def work(number: int) -> None:
            words = [sys.executable, "-m", "tests.fuzz", "--round", str(a.seed + number)]
            words += ["--seeds", str(seeds), "--examples", str(-(-a.examples // rounds))]
            words += ["--keep", str(a.keep)] if a.keep else []
            words += [word for name in a.target for word in ("--target", name)]
            with tempfile.TemporaryFile("w+") as said, subprocess.Popen(
                words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True
            ) as process:  # fmt: skip
                assert process.stdout is not None
                for line in process.stdout:
                    tally.add(json.loads(line))
                if process.wait():
                    said.seek(0)
                    found = {f"the process ended with {process.returncode}": [1, said.read()[-3000:]]}
                    tally.add({"name": "", "examples": 0, "slowest": 0.0, "found": found})
            print(f"{tally.examples} examples, {time.perf_counter() - began:.0f} s", flush=True)

        with ThreadPoolExecutor(a.processes) as pool:
            list(pool.map(work, range(rounds)))
    value = {"seed": a.seed, "seconds": round(time.perf_counter() - began), **tally.to_dict()}
    print(json.dumps(value, indent=1))
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
