#!/usr/bin/env python3
"""Kills a job at random moments, again and again, and compares what it makes in the end with what an
undisturbed run makes, byte by byte.

    python benchmarks/kills.py MODEL [--method yaqa] [--kills 20] [--damage] [--seed 0] [OPTION …]

Options that are not its own go to the command. Moments are drawn evenly over the time that the undisturbed
run took, counted from each start of the command; so they fall into reading, forward and backward passes,
rounding, writing and verification. A job goes on where it was, so after many kills it ends before the next
one: then it starts anew in another folder until so many kills have hit. ``--damage`` also does to what a
killed job leaves what a power loss does: a file of the work folder is cut, or filled with zeros, from a
random place on, the scratch file of activations and the shards among them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import ROOT, machine, quantize_command


def files(folder: Path) -> dict[str, bytes]:
    """What a job makes, less the files that say when and where."""
    said = {"report.json", "quantization_report.json"}
    return {
        f.relative_to(folder).as_posix(): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.suffix == ".safetensors" or f.name in ("config.json", "model.safetensors.index.json")
        if f.name not in said
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


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=lambda p: Path(p).resolve())
    p.add_argument("--method", default="yaqa")
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--damage", action="store_true")
    p.add_argument("--samples", type=int, default=16)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--seed", type=int, default=0)
    a, options = p.parse_known_args()
    print(machine(), flush=True)
    chance, hit, ended = random.Random(a.seed), 0, 0
    phases: Counter[str] = Counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def start(output: Path, log: Path) -> subprocess.Popen[bytes]:
            command = quantize_command(
                a.model, output, "--method", a.method, "--samples", str(a.samples),
                "--sequence-length", str(a.length), "--target", "other", *options,
            )  # fmt: skip
            with log.open("wb") as stream:
                return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)

        def checked(process: subprocess.Popen[bytes], output: Path, log: Path) -> None:
            if process.returncode:
                raise SystemExit(f"failed ({process.returncode}): {log.read_text()[-2000:]}")
            if files(output) != wanted:
                raise SystemExit(f"{output}: other bytes than the undisturbed run's")

        began, log = time.perf_counter(), work / "log"
        process = start(work / "undisturbed", log)
        process.wait()
        wanted = files(work / "undisturbed") if not process.returncode else {}
        if not wanted:
            raise SystemExit(f"failed ({process.returncode}): {log.read_text()[-2000:]}")
        whole = time.perf_counter() - began
        print(f"undisturbed: {whole:.1f} s, {len(wanted)} files", flush=True)
        while hit < a.kills:
            output = work / f"out{ended}"
            process = start(output, log)
            try:
                process.wait(chance.random() * whole)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                hit += 1
                lines = [x for x in log.read_text(errors="replace").splitlines() if x.startswith("quantize")]
                said = (
                    lines[-1].split(" · ")[2].split()[0] if lines and lines[-1].count(" · ") > 1 else "start"
                )
                phases[said.rpartition(".")[2]] += 1
                left = output.with_name(output.name + ".work")
                if a.damage and left.exists():
                    print(f"  {hit}: {damage(left, chance)}", flush=True)
                continue
            checked(process, output, log)
            ended += 1
        process = start(output, log)
        process.wait()
        checked(process, output, log)
        ended += 1
    print(json.dumps({"kills": hit, "finished": ended, "identical": ended, "where": dict(phases)}))


if __name__ == "__main__":
    sys.exit(main())
