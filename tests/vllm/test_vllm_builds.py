"""vLLM's own model classes as the judge of names: each is built by a checkpoint's config and loaded from it,
and no parameter may stay unfilled. One process for all families."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quant.vllm.architectures import architecture_problem
from tests.helpers import ROOT, add_tokenizer, change_config, quantize, randomize, read_config, save_model
from tests.models.built import ASKED, BUILT, DROPPED, UNSERVED, built_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def unfilled(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By family, what vLLM's model lacks of our checkpoint, or what stopped the load; of those that it does
    not serve, of the source."""
    folder = tmp_path_factory.mktemp("built")
    paths = []
    for family in (*BUILT, *UNSERVED):
        model = built_model(family)
        randomize(model)
        source = save_model(model, folder / f"{family}.source")
        add_tokenizer(source)
        change_config(source, **DROPPED.get(family, {}))
        served = architecture_problem(read_config(source)) is None
        assert served == (family in BUILT)
        if served:
            quantize(source, folder / family, **ASKED.get(family, {"group_size": 32}))
        else:
            source.rename(folder / family)
        paths.append(str(folder / family))
    done = subprocess.run(
        [vllm_python, str(HERE / "built.py"), *paths], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {Path(path).name: left for path, left in found.items()}


@pytest.mark.parametrize("family", BUILT)
def test_vllm_finds_all_that_it_looks_for(family: str, unfilled: dict[str, Any]) -> None:
    assert unfilled[family] == []


@pytest.mark.parametrize("family", UNSERVED)
def test_vllm_does_not_serve_what_is_refused_for_it(family: str, unfilled: dict[str, Any]) -> None:
    stopped = ("is not supported anymore", "no other way to handle it", "KeyError: 'blocks.0.ffn.experts.w13")
    assert any(words in unfilled[family] for words in stopped), unfilled[family]


def test_the_table_of_classes_is_what_vllm_says(vllm_python: str) -> None:
    program = ROOT / "docs/make_architectures.py"
    done = subprocess.run([vllm_python, str(program), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
