#!/usr/bin/env python3
"""How long each long command leaves a person without a word: the longest time between two outputs, from the
start of the program to its end, in a terminal and in a pipe.

    python benchmarks/silence.py [--model DIR] [--work DIR] [--only NAME]… [--vllm-python PYTHON] [--limit S]

Every command is run as a user would run it, as a program of its own, once with both streams in a
pseudo-terminal and once in a pipe. What is drawn over itself on a terminal counts as output, for it moves.
What a command works on is made first by the commands it needs, which are measured too unless ``--only`` names
others. The exit status is 1 where a command did not end as it should, and with ``--limit`` where a gap is
longer. Commands that need vLLM run where ``--vllm-python`` is given. Uploads go to a Hub of the tests' own on
the loopback interface, which takes some seconds for every file of weights.
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
sys.path.insert(0, str(ROOT))

from tests import hub_server  # noqa: E402

#: seconds after which a command is ended, and the gap until then counts
MOST = 900.0
#: seconds that the tests' Hub takes for a file of weights: longer than a person shall wait for a word
HUB_SECONDS = 4.0


@dataclass(frozen=True)
class Run:
    """What one command printed: how long it took, the longest silence in seconds, and what was said last
    before it, and at the end."""

    seconds: float
    gap: float
    before: str
    status: int
    last: str


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
    gap, before, said, stopped, tail = 0.0, "", "(nothing yet)", False, ""
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
            tail = (tail + text)[-len(text) - len(stop_at) :]  # the words may come in two parts
            if stop_at and not stopped and stop_at in tail:
                os.killpg(process.pid, signal.SIGINT)
                stopped = True
        if now - start > MOST:
            os.killpg(process.pid, signal.SIGKILL)
            break
    status = process.wait()
    os.close(reader)
    return Run(time.monotonic() - start, gap, before, status, said)


@dataclass(frozen=True)
class Command:
    """What is measured.

    Attributes:
        words: of the command.
        needs: names of the commands whose output it works on.
        stop_at: what it says when it is to be interrupted; empty: it ends by itself.
        statuses: with which it may end.
        uploads: it is given the Hub of the tests.
    """

    words: list[str]
    needs: tuple[str, ...] = ()
    stop_at: str = ""
    statuses: tuple[int, ...] = (0,)
    uploads: bool = False


#: The job whose output most commands work on.
MADE = "quantize gptq"
JOBS = {
    "gptq": ["--method", "gptq"],
    "awq": ["--method", "awq"],
    "hqq": ["--method", "hqq"],
    "minmax": ["--method", "minmax", "--scheme", "w8a16"],
    "fp8": ["--method", "fp8"],
    "w8a8": ["--scheme", "w8a8-int8"],
    "kv": ["--method", "fp8", "--kv-cache-scheme", "fp8"],
}


def commands(model: str, work: Path, vllm_python: str | None) -> dict[str, Command]:
    """The long commands by name, each behind those that it needs."""
    quant, deploy = [sys.executable, "quantize.py"], [sys.executable, "deploy_vllm.py"]
    made, job = str(work / "gptq"), [*quant, "quantize", "-m", model]
    found = {
        f"quantize {name}": Command([*job, "-o", str(work / name), *extra]) for name, extra in JOBS.items()
    }

    def of_made(name: str, words: list[str], *others: str, statuses: tuple[int, ...] = (0,)) -> None:
        found[name] = Command(words, (MADE, *others), statuses=statuses)

    found["quantize --dry-run"] = Command([*job, "--method", "gptq", "--dry-run"])
    found["quantize --push-to-hub"] = Command(
        [*job, "-o", str(work / "uploaded"), "--method", "fp8", "--push-to-hub", f"lab/{work.name}"],
        uploads=True,
    )
    found["smooth"] = Command(
        [*quant, "smooth", "-m", model, "-o", str(work / "smooth"), "--method", "smooth_quant"]
    )
    few_rows = ["--search-samples", "8", "--search-blocks", "2"]
    found["search"] = Command(
        [*quant, "search", "-m", model, "-o", str(work / "searched"), "--target-bits", "5", *few_rows]
    )
    of_made("verify", [*quant, "verify", made, "--against", model])
    of_made("evaluate", [*quant, "evaluate", made, "--against", model, "--save"])
    of_made("inspect", [*quant, "inspect", made])
    exported = str(work / "exported")
    of_made("export-vllm", [*quant, "export-vllm", "-m", made, "-o", exported, "--format", "gptq"])
    compared = [made, str(work / "awq"), "--output", str(work / "page.html")]
    of_made("report", [*quant, "report", *compared], "quantize awq")
    found["doctor"] = Command([*quant, "doctor"])
    found["recommend"] = Command([*quant, "recommend", "-m", model, "--gpu", "L4"])
    of_made("deploy plan", [*deploy, "plan", "-m", made, "--gpu", "L4"])
    few = ["--tokens", "3", "--prompt-count", "4", "--new-tokens", "64"]
    of_made("deploy speculate", [*deploy, "speculate", made, *few])
    if vllm_python:
        engine = ["--vllm-python", vllm_python]
        eager = ["--", "--enforce-eager", "--max-model-len", "1024"]
        serve = [*deploy, "serve", "-m", made, *engine, "--port", "0", *eager]
        found["deploy serve"] = Command(serve, (MADE,), "Ctrl-C stops it")
        load = ["--concurrency", "1,4", "--requests", "16", "--output", str(work / "load")]
        of_made("deploy bench", [*deploy, "bench", "-m", made, *engine, *load, *eager])
        # a CPU may miss the latencies that a profile asks for, which is what its status 4 says
        of_made("deploy check", [*deploy, "check", "--checkpoint", made, *engine, *eager], statuses=(0, 4))
        of_made("verify --vllm", [*quant, "verify", made, "--against", model, "--vllm", vllm_python])
    return found


def wanted(measured: dict[str, Command], only: list[str]) -> list[tuple[str, bool]]:
    """The commands that are run, in order, and whether each is measured: those whose name has a part of
    ``only`` in it (all, where it is empty), behind those that they need."""
    asked = {name for name in measured if not only or any(part in name for part in only)}
    needed = {other for name in asked for other in measured[name].needs}
    return [(name, name in asked) for name in measured if name in asked | needed]


def measure(
    measured: dict[str, Command], only: list[str], terminal: bool, environment: dict[str, str], hub: str
) -> tuple[float, list[str]]:
    """Runs the commands and prints a line for each that is measured.

    Returns:
        the longest silence in seconds, and the commands that did not end as they should.
    """
    longest, failed = 0.0, []
    where = "terminal" if terminal else "pipe"
    uploading = {"HF_ENDPOINT": hub, "HF_TOKEN": "good", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    for name, counts in wanted(measured, only):
        command = measured[name]
        run = watch(
            command.words, terminal, environment | (uploading if command.uploads else {}), command.stop_at
        )
        if run.status not in command.statuses:
            failed.append(f"{name} ({where}): exit status {run.status}, after: {run.last[:200]}")
        if not counts:
            continue
        longest = max(longest, run.gap)
        print(
            f"{name:24} {where:9} {run.seconds:7.1f}s {run.gap:7.1f}s  {run.status:4}  {run.before[:60]}",
            flush=True,
        )
    return longest, failed


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
    longest, failed = 0.0, []
    print(f"{'command':24} {'where':9} {'took':>8} {'silence':>8}  exit  said before it")
    with hub_server.running() as hub:
        hub.seconds = HUB_SECONDS
        for terminal in (True, False):  # each makes its own, for no command writes over what is there
            folder = work / ("terminal" if terminal else "pipe")
            folder.mkdir(exist_ok=True)
            measured = commands(str(options.model), folder, options.vllm_python)
            if not wanted(measured, options.only):
                parser.error(f"--only {' '.join(options.only)}: no command has that in its name")
            gap, wrong = measure(measured, options.only, terminal, dict(os.environ), hub.url)
            longest, failed = max(longest, gap), failed + wrong
    if options.work is None:
        shutil.rmtree(work)
    print(f"longest silence: {longest:.1f} s")
    for line in failed:
        print(f"failed: {line}")
    if failed or (options.limit is not None and longest > options.limit):
        sys.exit(1)


if __name__ == "__main__":
    main()
