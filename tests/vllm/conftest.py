"""The ring that starts real vLLM servers. Its interpreter is named by QUANT_VLLM_PYTHON; without it every
test here is skipped by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quant.hardware import cpu_instructions
from quant.serving.installation import PYTHON_VARIABLE
from quant.vllm.kernels import CPU_FORMATS, cpu_has

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
LARGER = ROOT.parent / "shared" / "data" / "models" / "tinylm-11m"


_INSTRUCTIONS = cpu_instructions()
#: Whether this CPU has what vLLM's kernels of 4-bit weights are made of; and what its int8 products need.
AVX512 = cpu_has(_INSTRUCTIONS, *CPU_FORMATS["int4-weights"].needs)
EXACT_INT8 = cpu_has(_INSTRUCTIONS, *CPU_FORMATS["int8"].needs)


def demand_4_bit_kernels() -> None:
    """Skips a test by name on a machine whose vLLM has no kernel for packed 4-bit weights."""
    if not AVX512:
        pytest.skip("no AVX512 (avx512f in /proc/cpuinfo), of which vLLM's 4-bit kernels are made")


def demand_8_bit_products() -> None:
    """Skips a test by name on a CPU where vLLM's products of int8 numbers overflow."""
    if not EXACT_INT8:
        pytest.skip("no AVX512-VNNI, without which the int8 products of vLLM's kernel overflow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason=f"{PYTHON_VARIABLE} names no Python with vLLM: make test builds one")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if not os.environ.get(PYTHON_VARIABLE):
                item.add_marker(skip)


def in_vllm(program: str, python: str, jobs: list[dict[str, Any]], root: Path) -> dict[str, dict[str, Any]]:
    """Answers of a program of vLLM's interpreter by the jobs' names, each with its log."""
    jobs = [job | {"log": str(root / f"{job['name']}.log")} for job in jobs]
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [python, str(HERE / program), str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    lines = [x.removeprefix("RESULT ") for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert len(lines) == len(jobs), done.stderr[-2000:]
    return {
        j["name"]: json.loads(x) | {"log": Path(j["log"]).read_text()}
        for j, x in zip(jobs, lines, strict=True)
    }


@pytest.fixture(scope="session")
def vllm_python() -> str:
    return os.environ[PYTHON_VARIABLE]


@pytest.fixture(scope="session")
def source() -> Path:
    """The model to quantize: every group size divides its inputs."""
    return LARGER if LARGER.is_dir() else ROOT / "examples" / "tinylm-4m"


@pytest.fixture(scope="session")
def make(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Quantizes the source through the command; the same options give the same directory."""
    from quantize import cli

    made: dict[tuple[str, ...], Path] = {}

    def quantized(*options: str) -> Path:
        if options not in made:
            output = tmp_path_factory.mktemp("model") / "-".join(Path(o).name.strip("-") for o in options)
            words = ["quantize", "-q", "-m", str(source), "-o", str(output), *options]
            done = CliRunner().invoke(cli, [*words, "--samples", "16", "--sequence-length", "256"])
            assert done.exit_code == 0, done.output
            made[options] = output
        return made[options]

    return quantized


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint to damage; the next copy of the same one replaces it."""

    def copied(path: Path) -> Path:
        shutil.rmtree(tmp_path / path.name, ignore_errors=True)
        return Path(shutil.copytree(path, tmp_path / path.name))

    return copied
