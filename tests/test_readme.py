"""Every line of the README's `sh` blocks runs, in order, in a folder that has what a checkout has."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import deploy_vllm
import quantize

ROOT = Path(__file__).resolve().parent.parent
#: Served for real in tests/vllm; set-up commands are what CI itself runs.
ELSEWHERE = ("make ", "pip install", *(f"python deploy_vllm.py {c}" for c in ("serve", "bench", "check")))


def blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)


def lines() -> list[str]:
    found = []
    for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")):
        joined = block.replace("\\\n", " ")
        found += [
            line.split(" #")[0].strip()
            for line in joined.splitlines()
            if line.strip() and not line.startswith("#")
        ]
    return [line for line in found if not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "configs", "quantize.py", "deploy_vllm.py"):
        os.symlink(ROOT / name, folder / name)
    return folder


def test_the_readme_has_examples_of_every_command() -> None:
    shown = lines()
    served = [
        line
        for block in blocks((ROOT / "README.md").read_text(encoding="utf-8"))
        for line in block.splitlines()
    ]
    for command in quantize.SUBCOMMANDS:
        assert any(line.startswith(f"quant {command} ") or line == f"quant {command}" for line in shown), (
            command
        )
    for command in deploy_vllm.SUBCOMMANDS:
        assert any(line.startswith(f"python deploy_vllm.py {command} ") for line in served), command


def test_every_example_runs(checkout: Path) -> None:
    for line in lines():
        words = shlex.split(line)
        if words[0] == "quant":
            words[:1] = [sys.executable, "quantize.py"]
        elif words[0] == "python":
            words[0] = sys.executable
        else:
            pytest.fail(f"the README has a line that this test does not know how to run: {line}")
        done = subprocess.run(
            words, cwd=checkout, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def test_the_python_example_runs(checkout: Path) -> None:
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    ):
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"python block {number}\n{done.stderr[-2000:]}"
