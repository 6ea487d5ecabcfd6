"""What the benchmarks share: running a program, timing it as a whole, and describing the machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks run from a checkout, installed or not


@dataclass(frozen=True)
class Finished:
    """A finished process: its output, wall seconds, largest resident memory (of it or any of its children) in
    bytes, and the seconds that it had of all cores together."""

    output: str
    seconds: float
    peak_rss_bytes: int
    cpu_seconds: float


def run(command: list[str | Path], threads: int | None = None, result: str = "") -> Finished:
    """Runs a program to its end, in the folder for temporary files (GPTQModel writes logs where it runs); a
    failing one ends the benchmark with the last lines it printed, unless a line starts with ``result``:
    vLLM's CPU build may abort while it shuts down, after all is said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    program, *arguments = map(str, command)
    if os.sep in program:
        # it runs in another folder; not resolved, or a venv's Python would be the one it links to
        program = os.path.abspath(program)
    start = time.perf_counter()
    process = subprocess.Popen(
        [program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        errors="replace",
        cwd=tempfile.gettempdir(),
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = bool(result) and any(line.startswith(result) for line in re.split(r"[\r\n]", output))
    if process.returncode and not said:
        raise SystemExit(f"failed ({process.returncode}): {' '.join(map(str, command))}\n{output[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Finished(output, time.perf_counter() - start, usage.ru_maxrss * 1024, cpu)


def result_line(output: str) -> str:
    """The last line that starts with RESULT."""
    return [line for line in re.split(r"[\r\n]", output) if line.startswith("RESULT")][-1]


def last_json(output: str) -> dict:
    """The last line that is a JSON object."""
    return json.loads([line for line in re.split(r"[\r\n]", output) if line.startswith("{")][-1])


def machine() -> str:
    """Cores and the instructions that decide how fast bf16 is."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{os.cpu_count()} cores"
    flags = sorted(set(re.findall(r"\b(?:avx512_bf16|amx_\w+|avx512f|avx2)\b", text)))
    model = re.search(r"model name\s*:\s*(.*)", text)
    return f"{os.cpu_count()} cores, {model[1] if model else 'unknown CPU'}, {' '.join(flags)}"


def quantize_command(source: Path, output: Path, *options: str) -> list[str | Path]:
    """The command of this checkout that quantizes ``source``."""
    return [sys.executable, ROOT / "quantize.py", "quantize", "-m", source, "-o", output, "--json", *options]
