"""Real llama.cpp, in an environment of its own that QUANT_LLAMA_PYTHON names; without it the tests that need
it are skipped by name."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LLAMA_VARIABLE = "QUANT_LLAMA_PYTHON"
HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own, in which what is read of GGUF files stands."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def llama_cpp() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Answers the requests of run_llama.py."""
    python = os.environ.get(LLAMA_VARIABLE)
    if not python or not (Path(python).parent.parent / "quant-llama-environment").is_file():
        pytest.skip(f"{LLAMA_VARIABLE} names no Python with llama.cpp: make test builds one where it can")

    def ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        done = subprocess.run(
            [python, str(HERE / "run_llama.py")],
            input=json.dumps(requests), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers: list[dict[str, Any]] = json.loads(done.stdout)
        assert not [a["error"] for a in answers if "error" in a]
        return answers

    return ask
