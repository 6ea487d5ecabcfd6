"""vLLM's own model classes as the judge of names: each is built by a checkpoint's config and loaded from it,
and no parameter may stay unfilled. One process for all families."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import add_tokenizer, change_config, quantize, randomize, save_model
from tests.models.built import BUILT, DROPPED, built_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def unfilled(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By family, what vLLM's model lacks of our w4a16 checkpoint, or what stopped the load."""
    folder = tmp_path_factory.mktemp("built")
    for family in BUILT:
        model = built_model(family)
        randomize(model)
        source = save_model(model, folder / f"{family}.source")
        add_tokenizer(source)
        change_config(source, **DROPPED.get(family, {}))
        quantize(source, folder / family, group_size=32)
    paths = [str(folder / family) for family in BUILT]
    done = subprocess.run(
        [vllm_python, str(HERE / "built.py"), *paths], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {Path(path).name: left for path, left in found.items()}


@pytest.mark.parametrize("family", BUILT)
def test_vllm_finds_all_that_it_looks_for(family: str, unfilled: dict[str, Any]) -> None:
    assert unfilled[family] == []
