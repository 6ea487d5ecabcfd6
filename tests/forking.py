"""Commands that each run in a process of their own, forked from one that has torch and transformers: to
import both takes several times as long as most commands.

Run as a program it is that process. It reads a JSON object a line (``program`` and ``arguments``, the folder
``cwd`` to run in, the files ``out`` and ``err`` of what the command prints) and answers with the command's
exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class Forks:
    """The process that is forked. Nothing of `quant` but its door to transformers is imported there."""

    def __init__(self, process: subprocess.Popen[str], folder: Path):
        self._process, self._folder = process, folder

    def run(self, program: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs a program as Python would."""
        assert self._process.stdin is not None and self._process.stdout is not None
        words = list(map(str, arguments))
        out, err = self._folder / "out", self._folder / "err"
        job = {"program": str(program), "arguments": words, "cwd": str(cwd), "out": str(out), "err": str(err)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read_text("utf-8"), err.read_text("utf-8"))


@contextmanager
def forks(folder: Path, environment: Mapping[str, str]) -> Iterator[Forks]:
    """Starts the process; leaving ends it.

    Args:
        folder: for what commands print.
    """
    with subprocess.Popen(
        [sys.executable, "-m", __name__], env=environment, cwd=Path(__file__).parents[1], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        yield Forks(process, folder)


def _main() -> None:
    from quant.offline import transformers

    transformers()
    importlib.import_module("transformers.models.llama.modeling_llama")
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(job["cwd"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.argv = [job["program"], *job["arguments"]]
            runpy.run_path(job["program"], run_name="__main__")
            sys.exit()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _main()
