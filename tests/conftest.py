"""Fixtures of the whole suite: checkpoints made once a session, and the commands run in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# vLLM binds every engine to the same cores: of several at a time one core computes while others stand idle
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.pop("COLUMNS", None)  # xdist gives its workers a terminal's width, and output is wrapped to it
# a program that a test starts would else compile all that it imports, every time
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402

from tests import helpers  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-screens",
        action="store_true",
        help="Write tests/commands/screens.txt anew from what the commands print now.",
    )


#: The files that take longest, in that order: a worker that meets one of them last keeps all others waiting.
LONGEST = (
    "vllm/test_vllm_commands.py", "vllm/test_vllm_values.py", "vllm/test_vllm_speculation.py",
    "test_extension.py", "test_readme.py", "planning/test_agreement.py", "vllm/test_vllm_families.py",
    "planning/test_vllm_cpu.py",
    "backends/test_backends.py", "device/test_second_device.py", "pipeline/test_gradients.py",
    "vllm/test_vllm_builds.py", "distillation/test_distill.py", "pipeline/test_ranks.py",
    "pipeline/test_mixing.py", "pipeline/test_resume.py", "pipeline/test_searching.py", "test_configs.py",
    "models/test_support.py", "pipeline/test_output.py", "batch/test_kills.py", "evaluation/test_quality.py",
    "pipeline/test_kills.py", "fuzz/test_fuzz.py", "outlier_suppression/test_smooth_quant.py",
    "pruning/test_width.py",
    "pipeline/test_expert_survey.py", "planning/test_storage.py", "serving/test_check.py",
    "vllm/test_vllm_context.py", "vllm/test_vllm_bench.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and the other tests of servers behind them."""
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> tuple[int, bool]:
        return places.get(item.path, len(places)), item.get_closest_marker("vllm") is None

    items.sort(key=place)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny checkpoints by family and settings, each made once. Tests must not change them: copy first."""
    made: dict[str, Path] = {}

    def get(kind: str = "llama", **settings: Any) -> Path:
        key = f"{kind} {sorted((k, str(v)) for k, v in settings.items())}"
        if key not in made:
            made[key] = helpers.make_checkpoint(tmp_path_factory.mktemp(kind) / "model", kind, **settings)
        return made[key]

    return get


@pytest.fixture(scope="session")
def llama(checkpoints: Callable[..., Path]) -> Path:
    """Two blocks of a Llama in bf16 with a head of its own."""
    return checkpoints("llama")


@pytest.fixture(scope="session")
def tinylm() -> Path:
    """The trained model that ships with the project."""
    return helpers.TINYLM


@pytest.fixture(scope="session")
def quantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The tiny Llama, quantized; each set of options is run once. Tests must not change the result: copy
    first."""
    made: dict[str, Path] = {}

    def get(**options: Any) -> Path:
        options = {"group_size": 32} | options
        key = str(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "output"
            helpers.quantize(llama, made[key], **options)
        return made[key]

    return get


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status and both streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs ``quant`` in this process, as its entry point does."""
    import quantize

    def call(*arguments: Any) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            quantize.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return Result(int(stop.value.code or 0), out, err)

    return call
