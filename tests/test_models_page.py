"""docs/models.md: what was measured is what is said, and holds when it is measured again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs/make_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(program: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(program.DATA.read_text(encoding="utf-8"))
    return found


def test_the_page_says_what_was_measured(program: ModuleType, data: dict[str, Any]) -> None:
    assert program.PAGE.read_text(encoding="utf-8") == program.page(data)
    assert set(data) == set(program.FAMILIES)
    assert all(set(found["methods"]) == set(program.METHODS) for found in data.values())


def test_nine_families_of_ten_take_every_method(data: dict[str, Any]) -> None:
    taken = [n for n, f in data.items() if all("bits" in m for m in f["methods"].values())]
    assert len(taken) >= 0.9 * len(data) >= 78


def test_bits_per_weight_are_those_of_the_files(data: dict[str, Any]) -> None:
    made = [m for f in data.values() for m in f["methods"].values() if "bits" in m]
    wrong = [m for m in made if abs(m["bits"] - m["stored_bits"]) > 0.01 * m["stored_bits"]]
    assert made and not wrong


def test_values_of_eight_bits_are_the_source_but_for_rounding(
    program: ModuleType, data: dict[str, Any]
) -> None:
    """A matrix that was lost, permuted, transposed or given to another expert would make other logits."""
    for name, found in data.items():
        if "logits" in found:
            assert found["missing"] == 0, name
            limit = program.ROUTED_NOISE if found["routed"] else program.NOISE
            assert found["logits"] < limit, name


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_a_family_that_is_measured_again_gives_the_same(
    name: str, program: ModuleType, data: dict[str, Any], tmp_path: Path
) -> None:
    again = program.measured(name, tmp_path, ["gptq"])
    assert again["methods"]["gptq"] == data[name]["methods"]["gptq"]
    assert again["architecture"] == data[name]["architecture"]
