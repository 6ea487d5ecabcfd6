#!/usr/bin/env python3
"""What half of the memory costs: a job with all of its activations in memory, then with `--max-memory` at
half of what that took at the most, and whether both make the same files.

python benchmarks/budget.py [--methods gptq yaqa] [--shape 512 4096 3] [--rows 64 1024] [--threads 2]

The model has random weights; each job is a process of its own. Four runs of a method: with as much memory as
the machine has (all activations stay), without the option (256 MiB of them stay on a CPU), with half of the
first run's peak, and with half of the second's, which is less than a block and the program itself may take:
then the command's refusal is printed, and the job is run with the least that it names. Rows of fewer than
2048 tokens go through a block several at a time; where a budget makes that fewer, files may differ, which the
row says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import psutil
from common import ROOT, last_json, machine, quantize_command
from kills import files
from projections import Run, make


@dataclass(frozen=True)
class Made:
    """A finished run: largest resident memory and scratch file in MiB, seconds of the whole job and those
    that the process had of all cores, its files, and whether the budget let fewer rows through a block."""

    name: str
    peak: float
    seconds: float
    cpu: float
    scratch: float
    files: dict[str, bytes]
    fewer: bool

    def line(self, whole: Made) -> str:
        """Beside the run with all in memory."""
        same = "identical" if self.files == whole.files else "other"
        times = f"{self.seconds:9.1f}{self.seconds / whole.seconds:6.2f}x"
        times += f"{self.cpu:9.1f}{self.cpu / whole.cpu:6.2f}x"
        numbers = f"{self.peak:10.0f}{times}{self.scratch:13.0f}"
        return f"{self.name:44}{numbers}  {same}{' (fewer rows at a time)' * self.fewer}"

    def numbers(self) -> dict[str, object]:
        return {k: v for k, v in vars(self).items() if k != "files"}


def quantize(name: str, model: Path, options: list[str], threads: int, budget: int | None) -> Made | str:
    """A run with a budget in MiB, or what the command says where it refuses it."""
    output = model.with_name("out")
    given = [] if budget is None else ["--max-memory", f"{budget}MiB"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    words = [str(word) for word in quantize_command(model, output, *options, *given)]
    before = getrusage(RUSAGE_CHILDREN)
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    after = getrusage(RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    report = last_json(done.stdout)
    if done.returncode:
        return report["error"]
    made = files(output)
    shutil.rmtree(output)
    peak, scratch = (report[k] / 2**20 for k in ("peak_rss_bytes", "scratch_bytes"))
    fewer = "rows through a block together" in done.stderr
    return Made(name, peak, report["seconds"]["total"], cpu, scratch, made, fewer)


def compare(model: Path, method: str, rows: list[int], threads: int) -> list[Made]:
    """The four runs of a method; each is printed as it is made."""
    options = ["--method", method, "--samples", str(rows[0]), "--sequence-length", str(rows[1])]
    made: list[Made] = []

    def go(name: str, budget: int | None) -> Made:
        done = quantize(f"{method}, {name}", model, options, threads, budget)
        if isinstance(done, str):
            print(f"{method}, {name}: refused: {done}", flush=True)
            if (least := re.search(r"give --max-memory (\d+)MiB", done)) is None:
                raise SystemExit(1)
            return go(f"the least, {least[1]} MiB", int(least[1]))
        made.append(done)
        print(done.line(made[0]), flush=True)
        return done

    whole = go("all in memory", psutil.virtual_memory().total >> 20)
    usual = go("no --max-memory", None)
    for peak, which in ((whole.peak, "first"), (usual.peak, "second")):
        go(f"half of the {which} peak, {int(peak / 2)} MiB", int(peak / 2))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=["gptq"])
    parser.add_argument("--shape", nargs=3, type=int, default=[512, 4096, 3], metavar=("H", "I", "BLOCKS"))
    parser.add_argument("--rows", nargs=2, type=int, default=[64, 1024], metavar=("ROWS", "TOKENS"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    a = parser.parse_args()
    print(machine(), f"{a.threads} threads, blocks {a.shape}, rows {a.rows}", sep=", ", flush=True)
    print(
        f"{'run':44}{'peak MiB':>10}{'seconds':>9}{'':>7}{'cpu':>9}{'':>7}{'scratch MiB':>13}  files",
        flush=True,
    )
    found: list[Made] = []
    with tempfile.TemporaryDirectory() as folder:
        hidden, inner, blocks = a.shape
        model = make(Run("budget", (hidden, inner, blocks), ()), Path(folder))
        for method in a.methods:
            found += compare(model, method, a.rows, a.threads)
    if a.json:
        a.json.write_text(json.dumps([m.numbers() for m in found], indent=1))


if __name__ == "__main__":
    main()
