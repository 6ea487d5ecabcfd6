"""Recipes that prune first: what is wrong is told before any work, and a killed run goes on with what it
has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from quant import steps
from quant.evaluation.verify import verify
from tests.helpers import TINYLM

JOB: dict[str, Any] = {"method": "minmax", "scheme": "w8a16", "samples": 2, "sequence_length": 32}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    def write(prune: Any, **changes: Any) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**JOB, "prune": prune, **changes}))
        return file

    return write


@pytest.mark.parametrize(
    ("prune", "changes", "message"),
    [
        ({"drop_block": 1}, {}, "prune.drop_block: .* known are drop_blocks, "),
        ({"drop_blocks": "many"}, {}, "prune.drop_blocks"),
        ({}, {}, "names nothing to prune"),
        (3, {}, "a mapping of keys such as drop_blocks: 4"),
        ({"drop_blocks": 1, "importance": "size"}, {}, "kl or angle"),
        ({"drop_blocks": 4}, {}, "4 of 4 blocks cannot go"),
        ({"intermediate_size": 700}, {}, "no multiple of 128"),
        ({"drop_blocks": 1}, {"method": "wanda", "scheme": None}, "a method that quantizes"),
    ],
)
def test_what_is_wrong_is_told(
    prune: Any,
    changes: dict[str, Any],
    message: str,
    recipe: Callable[..., Path],
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    import re

    done = cli("quantize", "--config", recipe(prune, **changes), "-m", TINYLM, "-o", tmp_path / "out")
    assert done.code == 2 and re.search(message, done.err.replace("\n", " ")), done.err
    assert "Traceback" not in done.err and sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_a_killed_run_goes_on_with_what_it_has(
    recipe: Callable[..., Path], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("quantize", "--config", recipe({"blocks": [2]}), "-m", TINYLM, "-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(steps, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*given).code != 0
    assert (tmp_path / "out.blocks" / "config.json").exists() and (tmp_path / "out").exists()
    monkeypatch.setattr(steps, "drop_blocks", None)  # whoever prunes again fails
    done = cli(*given, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["seconds"]["total"] > report["seconds"]["pruning"] > 0
    assert [d["file"] for d in report["side_files_dropped"]] == []
    assert report["pruning"]["dropped"] == [2] and len(report["pruning"]["costs"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    assert verify(tmp_path / "out", source=TINYLM).passed
    again = cli(*given)
    assert again.code == 1 and "is not empty" in again.err
