"""Every recipe in configs/ says how to launch it, and does what it says on the bundled model."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from quantize import cli

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(
    p
    for p in (ROOT / "configs").rglob("*.yaml")
    if "method" in (yaml.safe_load(p.read_text(encoding="utf-8")) or {})
)


def test_the_original_names_are_there() -> None:
    originals = {f"{n}_config.yaml" for n in ("gptq", "yaqa", "awq", "minmax", "smooth_quant", "hqq")}
    assert originals | {"fp8.yaml", "w8a8.yaml", "nvfp4.yaml", "mixed.yaml"} <= {p.name for p in RECIPES}


def test_every_file_is_a_recipe_a_scenario_or_a_table() -> None:
    every = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*") if p.is_file()}
    # planned one by one in tests/planning/test_recommendation.py
    scenarios = set((ROOT / "configs/scenarios").glob("*.yaml"))
    names = ("block_names", "engines", "gpus", "models", "planner_errors", "quality", "throughput")
    tables = {Path(f"{n}.json") for n in names}
    manifests = {Path("batch.yaml")}  # run in tests/batch/test_kills.py
    # read one by one in tests/serving/test_check.py
    checks = set((ROOT / "configs/checks").glob("*.yaml"))
    assert every == tables | manifests | {
        p.relative_to(ROOT / "configs") for p in {*RECIPES, *scenarios, *checks}
    }
    for path in scenarios | checks:
        first = path.read_text(encoding="utf-8")
        assert re.match(r"# .*(quant recommend|quant-deploy check|vllm serve) ", first), path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_a_recipe_runs_as_its_first_line_says(recipe: Path, tmp_path: Path) -> None:
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    launch = (
        f"# quant quantize --config {recipe.relative_to(ROOT).as_posix()} --model-path MODEL "
        "--output-path OUT"
    )
    assert first == launch
    output = tmp_path / "out"
    arguments = [
        "quantize",
        "--config",
        str(recipe),
        "--model-path",
        str(ROOT / "examples/tinylm-4m"),
        "--output-path",
        str(output),
        "--json",
    ]
    wanted = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    small = ["--samples", "4", "--sequence-length", "128"] if "samples" in wanted else []
    result = CliRunner().invoke(cli, [*arguments, *small])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["method"] == wanted["method"] and report["verify"]["passed"]
    schemes = {wanted["scheme"], *(r["scheme"] for r in wanted.get("rules", []) if "scheme" in r)}
    made = report["scheme"]
    assert {s["name"] for s in made.get("parts", [made])} == schemes
    assert (output / "config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    if "prune" in wanted:
        pruning = report["pruning"]
        assert [c["step"] for c in pruning["costs"]] == ["prune, blocks", "prune, widths", "quantize"]
        assert all(0 < c["kl"] < 1 and c["standard_error"] > 0 for c in pruning["costs"])
        config = json.loads((output / "config.json").read_text())
        assert (config["num_hidden_layers"], config["intermediate_size"]) == (3, 640)
