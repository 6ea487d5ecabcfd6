"""Fixtures of the whole suite: checkpoints made once a session, and the commands run in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # xdist gives its workers a terminal's width, and output is wrapped to it

import pytest  # noqa: E402

from tests import helpers  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-screens",
        action="store_true",
        help="Write tests/commands/screens.txt anew from what the commands print now.",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that start servers, the longest, first."""
    items.sort(key=lambda item: item.get_closest_marker("vllm") is None)


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
