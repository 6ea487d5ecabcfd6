#!/usr/bin/env python3
"""How long each long command leaves a person without a word: the longest time between two outputs, from the
start of the program to its end, in a terminal and in a pipe.

    python benchmarks/silence.py [--model DIR] [--work DIR] [--only NAME …] [--vllm-python PYTHON] [--limit S]

Every command is run as a user would run it, as a program of its own, once with both streams in a
pseudo-terminal and once in a pipe. What is drawn over itself on a terminal counts as output, for it moves.
With ``--limit`` the exit status is 1 where a gap is longer. Commands that need vLLM run where
``--vllm-python`` is given.
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: seconds after which a command is ended, and the gap until then counts
MOST = 900.0


@dataclass(frozen=True)
class Run:
    """What one command printed: how long it took, the longest silence in seconds, and what was said last
    before it."""

    seconds: float
    gap: float
    before: str
    status: int


def watch(command: list[str], terminal: bool, environment: dict[str, str], stop_at: str = "") -> Run:
    """Runs a command and times its output.

    Args:
        terminal: whether stdout and stderr are a pseudo-terminal of 100 columns, or one pipe.
        stop_at: words after which it is interrupted, as a server is.
    """
    if terminal:
        reader, writer = pty.openpty()
        environment = environment | {"COLUMNS": "100", "TERM": "xterm"}
    else:
        reader, writer = os.pipe()
    start = last = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=environment, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    os.close(writer)
    gap, before, said, stopped = 0.0, "", "(nothing yet)", False
    while True:
        ready, _, _ = select.select([reader], [], [], 0.1)
        now = time.monotonic()
        if now - last > gap:
            gap, before = now - last, said
        if ready:
            try:
                text = os.read(reader, 1 << 16).decode(errors="replace")
            except OSError:  # the other end of a terminal is closed
                text = ""
            if not text:
                break
            last, lines = (
                now,
                [line for line in text.replace("\r", "\n").split("\n") if line.strip("\033[2K ")],
            )
            said = lines[-1].replace("\033[2K", "").strip() if lines else said
            if stop_at and not stopped and stop_at in text:
                os.killpg(process.pid, signal.SIGINT)
                stopped = True
        if now - start > MOST:
            os.killpg(process.pid, signal.SIGKILL)
            break
    status = process.wait()
    os.close(reader)
    return Run(time.monotonic() - start, gap, before, status)


def commands(model: str, work: Path, vllm_python: str | None) -> dict[str, tuple[list[str], str]]:
    """The long commands by name: their words, and what ends one that does not end by itself."""
    quant, deploy = [sys.executable, "quantize.py"], [sys.executable, "deploy_vllm.py"]
    made = str(work / "gptq")
    found: dict[str, tuple[list[str], str]] = {}
    for name, extra in {
        "gptq": ["--method", "gptq"],
        "awq": ["--method", "awq"],
        "hqq": ["--method", "hqq"],
        "minmax": ["--method", "minmax", "--scheme", "w8a16"],
        "fp8": ["--method", "fp8"],
        "w8a8": ["--scheme", "w8a8-int8"],
        "kv": ["--method", "fp8", "--kv-cache-scheme", "fp8"],
    }.items():
        words = [*quant, "quantize", "-m", model, "-o", str(work / name), *extra]
        found[f"quantize {name}"] = (words, "")
    found["quantize --dry-run"] = ([*quant, "quantize", "-m", model, "--method", "gptq", "--dry-run"], "")
    found["smooth"] = (
        [*quant, "smooth", "-m", model, "-o", str(work / "smooth"), "--method", "smooth_quant"],
        "",
    )
    found["verify"] = ([*quant, "verify", made, "--against", model], "")
    found["evaluate"] = ([*quant, "evaluate", made, "--against", model, "--save"], "")
    found["inspect"] = ([*quant, "inspect", made], "")
    found["export-vllm"] = (
        [*quant, "export-vllm", "-m", made, "-o", str(work / "exported"), "--format", "gptq"],
        "",
    )
    found["report"] = ([*quant, "report", made, str(work / "awq"), "--output", str(work / "page.html")], "")
    found["doctor"] = ([*quant, "doctor"], "")
    found["recommend"] = ([*quant, "recommend", "-m", model, "--gpu", "L4"], "")
    found["deploy plan"] = ([*deploy, "plan", "-m", made, "--gpu", "L4"], "")
    found["deploy speculate"] = (
        [*deploy, "speculate", made, "--tokens", "3", "--prompt-count", "4", "--new-tokens", "64"],
        "",
    )
    if vllm_python:
        engine = ["--vllm-python", vllm_python]
        eager = ["--", "--enforce-eager", "--max-model-len", "1024"]
        found["deploy serve"] = ([*deploy, "serve", "-m", made, *engine, *eager], "Ctrl-C stops it")
        found["deploy bench"] = (
            [*deploy, "bench", "-m", made, *engine, "--concurrency", "1,4", "--requests", "16", "--output",
             str(work / "load"), *eager],
            "",
        )  # fmt: skip
        found["deploy check"] = ([*deploy, "check", "--checkpoint", made, *engine, *eager], "")
        found["verify --vllm"] = ([*quant, "verify", made, "--against", model, "--vllm", vllm_python], "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tinylm-4m")
    parser.add_argument("--work", type=Path, help="a folder for what is made; a temporary one unless given")
    parser.add_argument("--only", action="append", default=[], help="commands whose name has this in it")
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM")
    parser.add_argument("--limit", type=float, help="exit with 1 where a silence is longer, in seconds")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="silence-"))
    work.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    longest = 0.0
    print(f"{'command':24} {'where':9} {'took':>8} {'silence':>8}  exit  said before it")
    for terminal in (True, False):  # each makes its own, for no command writes over what is there
        where = "terminal" if terminal else "pipe"
        folder = work / where
        folder.mkdir(exist_ok=True)
        for name, (words, stop_at) in commands(str(options.model), folder, options.vllm_python).items():
            if options.only and not any(part in name for part in options.only):
                continue
            run = watch(words, terminal, environment, stop_at)
            longest = max(longest, run.gap)
            print(
                f"{name:24} {where:9} {run.seconds:7.1f}s {run.gap:7.1f}s  {run.status:4}  {run.before[:60]}",
                flush=True,
            )
    if options.work is None:
        shutil.rmtree(work)
    print(f"longest silence: {longest:.1f} s")
    if options.limit is not None and longest > options.limit:
        sys.exit(1)


if __name__ == "__main__":
    main()
