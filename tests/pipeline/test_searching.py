"""What a search foretells from a few blocks, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quant
from quant import jobs
from quant.errors import NothingFits, QuantError, UsageError
from quant.pipeline import survey
from quant.pipeline.sampling import SampledSurvey
from quant.pipeline.searching import Searched, search
from quant.planning.prediction import ALONE, extrapolate, front, spread
from tests.helpers import recipe, save_model, short_text
from tests.models.built import built_model

ROWS = 8


def searched(model: Path, output: Path, blocks: int = 2, **options: Any) -> Searched:
    values = {"target_bits": 5.0, "calibration_dataset": [short_text()], "sequence_length": 64, **options}
    return search(recipe(model, output, **values), blocks=blocks, rows=ROWS)


@pytest.fixture(scope="module")
def found(tinylm: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """Blocks 0 and 3 of four, each scheme rounded to nearest; w4a16 by gptq and yaqa, too."""
    folder = tmp_path_factory.mktemp("search")
    made = searched(tinylm, folder / "o")
    assert list(folder.iterdir()) == []
    return made


def entry(found: Searched, scheme: str, method: str = "minmax") -> dict[str, Any]:
    own = [dict(e) for e in found.entries if (e["scheme"], e["method"]) == (scheme, method)]
    assert len(own) == 1
    return own[0]


def test_the_front_has_what_no_other_beats_and_the_best_that_fits_is_chosen(found: Searched) -> None:
    told = found.to_dict()
    assert told["sampled_blocks"] == [0, 3] and told["blocks"] == 4
    for one in told["candidates"]:
        beaten = any(
            e["output_bytes"] <= one["output_bytes"] and e["kl"] < one["kl"] for e in told["candidates"]
        )
        assert one["front"] is not beaten, one
        assert one["fits"] is (one["output_bytes"] <= told["budget_bytes"])
        assert 0 < one["standard_error"] and 0 < one["measured_share"] <= 1 and one["seconds"] >= 0
    best = min((e for e in told["candidates"] if e["fits"]), key=lambda e: e["kl"])
    assert told["chosen"] == best and best["scheme"] == "mixed"
    assert entry(found, "w4a16 by groups of 128", "yaqa")["kl"] < entry(found, "w4a16 by groups of 128")["kl"]
    assert entry(found, "w8a16 by channel")["fits"] is False


@pytest.mark.parametrize("scheme", ["w4a16 by groups of 128", "w4a16-asym by groups of 32", "mixed"])
def test_what_is_foretold_is_what_the_checkpoint_loses(
    scheme: str, found: Searched, tinylm: Path, tmp_path: Path
) -> None:
    """On another text, and to the byte."""
    told = entry(found, scheme)
    words = told["options"].split()
    values = {k.removeprefix("--").replace("-", "_"): v for k, v in zip(words[::2], words[1::2], strict=True)}
    text = {"calibration_dataset": [short_text()], "samples": 16, "sequence_length": 64}
    given = text if scheme == "mixed" else {}
    numbers = {k: int(v) if k == "group_size" else v for k, v in values.items()}
    report = quant.quantize(recipe(tinylm, tmp_path / "o", **given, **numbers))
    if scheme == "mixed":  # which chooses by all blocks
        assert report.output_bytes == pytest.approx(told["output_bytes"], rel=0.01)
    else:
        assert report.output_bytes == told["output_bytes"]
    measured = quant.evaluate(tmp_path / "o", against=tinylm, length=64, chunks=40).kl
    assert measured is not None and told["kl"] == pytest.approx(measured.mean, rel=0.35)


def test_a_search_that_stopped_goes_on_and_finds_the_same(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoints("llama", num_hidden_layers=4)
    found = searched(model, tmp_path / "undisturbed", target_bits=6.0)
    visited: list[int] = []
    real, measure = SampledSurvey._solve, survey.Judge.measure

    def stops(self: Any, skeleton: Any, index: int, *rest: Any) -> Any:
        if len(visited) == 2:
            raise KeyboardInterrupt
        visited.append(index)
        return real(self, skeleton, index, *rest)

    def counts(self: Any, skeleton: Any, index: int, *rest: Any) -> Any:
        visited.append(index)
        return real(self, skeleton, index, *rest)

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(SampledSurvey, "_solve", stops)
    with pytest.raises(KeyboardInterrupt):
        searched(model, tmp_path / "o", target_bits=6.0)
    monkeypatch.setattr(SampledSurvey, "_solve", counts)
    monkeypatch.setattr(survey.Judge, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        searched(model, tmp_path / "o", target_bits=6.0)
    assert visited == [3, 2, 1, 0]
    monkeypatch.setattr(SampledSurvey, "_solve", stopped)
    monkeypatch.setattr(survey.Judge, "measure", measure)
    again = searched(model, tmp_path / "o", target_bits=6.0)
    keys = ("scheme", "method", "kl", "standard_error", "output_bytes", "front")
    assert [[e[k] for k in keys] for e in again.entries] == [[e[k] for k in keys] for e in found.entries]
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_table_and_makes_the_best(
    cli: Callable[..., Any], checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = checkpoints("llama")
    asked = [
        "search", "-m", model, "--target-bits", 5.5, "--search-samples", ROWS, "--samples", ROWS,
        "--sequence-length", 32, "--calibration-dataset", short_text(),
    ]  # fmt: skip
    dry = cli(*asked, "-o", "out", "--dry-run", "--json")
    assert dry.code == 0 and not any("kl" in e for e in json.loads(dry.out)["candidates"])
    assert list(tmp_path.iterdir()) == []
    table = cli(*asked)
    assert table.code == 0 and "→ quant quantize -m " in table.out and " --method " in table.out
    assert list(tmp_path.iterdir()) == []
    made = cli(*asked, "-o", "out", "--json")
    assert made.code == 0
    value = json.loads(made.out)
    assert value["report"]["output_path"] == "out" and (tmp_path / "out" / "config.json").exists()
    assert value["report"]["bits_per_weight"] <= 5.5
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_searched_is_told_before_anything_is_kept(
    cli: Callable[..., Any], tinylm: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"give --target-size, --target-bits or .*--gpu L40S-48GB"):
        jobs.search({"model_path": tinylm, "output_path": tmp_path / "o"})
    with pytest.raises(NothingFits, match="--target-size 1000: out of reach"):
        jobs.search({"model_path": tinylm, "output_path": tmp_path / "o", "target_size": 1000})
    shared = save_model(built_model("gemma3n").bfloat16(), tmp_path / "shared")
    with pytest.raises(QuantError, match="earlier blocks leave.*use quant quantize"):
        searched(shared, tmp_path / "o", target_bits=6.0)
    result = cli("search", "-m", tinylm, "--fit", "--target-bits", 5)
    assert result.code == 2 and "--target-bits and --fit are both sizes" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["shared"]


def test_a_ratio_is_exact_where_guesses_are_and_its_error_covers_where_they_are_not() -> None:
    exact = extrapolate([1.0, 1.0], [(2.0, 2.0), (1.0, 1.0)], [3.0, 1.5])
    assert exact.kl == pytest.approx(2.5) and exact.error == 0 and exact.share == pytest.approx(0.4)
    off = extrapolate([1.0, 1.0], [(2.0, 1.0), (1.0, 2.0)], [3.0, 1.5])
    assert off.kl == exact.kl and off.error > 0.3
    alone = extrapolate([1.0, 1.0], [(2.0, 0.0)], [2.0])
    assert alone.error == pytest.approx(2**0.5 * ALONE)
    nothing = extrapolate([0.0, 0.0], [(0.0, 0.0), (0.0, 0.0)], [2.0])
    assert (nothing.kl, nothing.error) == (2.0, 2.0)
    assert front([(1.0, 3.0), (1.0, 2.0), (2.0, 2.0), (3.0, 1.0)]) == [1, 3]
    assert spread(12, 4, "a" * 12) == [0, 4, 7, 11] and spread(2, 4, "aa") == [0, 1]
    assert spread(8, 2, "aabaaaba") == [0, 2, 7] and spread(5, 1, "aaaaa") == [2]
