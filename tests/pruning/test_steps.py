"""Recipes that prune first: what is wrong is told before any work, and a killed run goes on with what it
has."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from quant import steps
from quant.evaluation.verify import verify
from tests.helpers import TINYLM, copy_model, files_of

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
        ({"drop_blocks": "many"}, {}, "prune.drop_blocks is 'many': input should be a valid integer"),
        ({"drop_blocks": True}, {}, "prune.drop_blocks is True"),
        ({"drop_blocks": 0}, {}, "prune.drop_blocks is 0: .* greater than or equal to 1"),
        ({"blocks": "1-x"}, {}, "prune.blocks is '1-x': '1-x' is no number"),
        ({"blocks": [-1]}, {}, r"prune.blocks.0 is -1: "),
        ({"intermediate_size": 640, "multiple_of": 0}, {}, "prune.multiple_of is 0: "),
        ({"intermediate_size": 640, "multiple_of": -128}, {}, "prune.multiple_of is -128: "),
        ({"intermediate_size": 640, "multiple_of": 1.5}, {}, "prune.multiple_of is 1.5: "),
        ({"intermediate_size": 0}, {}, "prune.intermediate_size is 0: "),
        ({"kv_heads": 10**30}, {}, "prune.kv_heads is 1"),
        ({"drop_blocks": 1, "samples": 0}, {}, "prune.samples is 0: "),
        ({"drop_blocks": 1, "sequence_length": -5}, {}, "prune.sequence_length is -5: "),
        ({"drop_blocks": 1}, {"seed": -1}, "seed is -1"),
        ({"drop_blocks": 1}, {"tensor_parallel": 0}, "tensor.parallel is 0"),
        ({"drop_blocks": 1}, {"methd": "gptq", "method": None}, "methd"),
        ({}, {}, "names nothing to prune"),
        (3, {}, "a mapping of keys such as drop_blocks: 4"),
        ({"drop_blocks": 1, "importance": "size"}, {}, "prune.importance is 'size': kl or angle"),
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
    done = cli("quantize", "--config", recipe(prune, **changes), "-m", TINYLM, "-o", tmp_path / "out")
    assert done.code == 2 and re.search(message, done.err.replace("\n", " ")), done.err
    assert "Traceback" not in done.err and sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_what_an_earlier_run_made_otherwise_is_not_taken(
    recipe: Callable[..., Path], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the pruned model, nor what was made of it."""
    model, output = copy_model(TINYLM, tmp_path / "model"), tmp_path / "out"

    def run(prune: Any, *more: str, **changes: Any) -> Any:
        return cli("quantize", "--config", recipe(prune, **changes), "-m", model, "-o", output, *more)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run({"blocks": [2]}).code != 0
    made = files_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        done = run({"blocks": [2]}, "--device", "cpu")  # compared elsewhere: nothing is made anew
    assert done.code != 0 and "another recipe" not in done.err
    (tmp_path / "recipe.yaml").unlink()
    file = next(model.glob("*.safetensors"))
    times = file.stat()

    def touched() -> Any:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
        try:
            return run({"blocks": [2]})
        finally:
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    for refused, said in (
        (lambda: run({"blocks": [1]}), r"out.blocks: .*prune.blocks was \[2\], is \[1\]"),
        (lambda: run({"blocks": [2], "kv_heads": 1}), "prune.kv_heads was not given, is 1"),
        (lambda: run({"blocks": [2]}, seed=3), "--seed was not given, is 3"),
        (touched, f"{file.name} of the source has changed"),
        (lambda: run({"blocks": [2]}, scheme="w8a8-int8"), "by another recipe .*--scheme was 'w8a16'"),
    ):
        done = refused()
        assert done.code == 1 and re.search(said, done.err.replace("\n", " ")), done.err
        (tmp_path / "recipe.yaml").unlink()
        assert files_of(tmp_path) == {n: d for n, d in made.items() if n != "recipe.yaml"}
    done = run({"blocks": [1]}, "--fresh", "--json", scheme="w8a8-int8")
    assert done.code == 0, done.err
    assert json.loads(done.out)["pruning"]["dropped"] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "recipe.yaml"]
    shutil.copytree(output, tmp_path / "other.blocks")  # somebody's
    there = files_of(tmp_path)
    output = tmp_path / "other"
    done = run({"blocks": [1]}, "--fresh", scheme="w8a8-int8")
    assert done.code == 1 and "other.blocks: is there, and other.steps.json" in done.err.replace("\n", " ")
    assert files_of(tmp_path) == there


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
