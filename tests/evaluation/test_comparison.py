"""Several checkpoints in one table: the same numbers as one by one, and the source runs once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.checkpoint.reader import open_checkpoint
from quant.errors import QuantError
from quant.evaluation.comparison import bits_per_weight, compare_outputs
from quant.evaluation.quality import Runner, evaluate
from quant.report import pictures
from tests.helpers import copy_model, load_all, save_all

SMALL = {"length": 32, "chunks": 3}


@pytest.fixture
def outputs(quantized: Callable[..., Path]) -> list[Path]:
    return [
        quantized(),
        quantized(bits=8, format="gptq"),
        quantized(layers="0"),
        quantized(bits=2, format="plain"),
    ]


def test_each_measures_as_it_does_alone_and_the_source_runs_once(
    llama: Path, outputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    phases, hidden = [], Runner.hidden
    monkeypatch.setattr(
        Runner, "hidden", lambda self, b, p, phase: phases.append(phase) or hidden(self, b, p, phase)
    )
    found = list(compare_outputs(outputs, against=llama, **SMALL))
    assert sorted(phases) == ["candidate"] * 4 + ["source"]
    for path, one in zip(outputs, found, strict=True):
        assert one.evaluation == evaluate(path, against=llama, **SMALL)
        assert one.to_dict()["total_bytes"] == sum(t.nbytes for t in load_all(path).values())
    assert [one.scheme.partition(" ")[0] for one in found] == ["w4a16", "w8a16", "w4a16", "none"]
    assert found[3].evaluation.kl.mean > found[0].evaluation.kl.mean > found[1].evaluation.kl.mean  # type: ignore[union-attr]


def test_bits_per_weight_count_all_that_is_stored_for_the_linears(llama: Path, outputs: list[Path]) -> None:
    weights = {n: t for n, t in load_all(llama).items() if t.ndim == 2 and ".layers." in n}
    for path in outputs:
        stored = sum(
            t.nbytes for n, t in load_all(path).items() if n.rpartition(".")[0] + ".weight" in weights
        )
        wanted = 8 * stored / sum(t.numel() for t in weights.values())
        assert bits_per_weight(open_checkpoint(path), open_checkpoint(llama)) == pytest.approx(wanted)
    assert bits_per_weight(open_checkpoint(outputs[0]), open_checkpoint(llama)) == pytest.approx(
        4 + 16 / 32, abs=0.1
    )
    assert (
        bits_per_weight(open_checkpoint(llama), open_checkpoint(llama))
        == bits_per_weight(open_checkpoint(outputs[3]), open_checkpoint(llama))
        == 16
    )


def test_linears_under_other_names_have_no_bits(llama: Path, checkpoints: Callable[..., Path]) -> None:
    assert bits_per_weight(open_checkpoint(llama), open_checkpoint(checkpoints("phi3"))) is None


def asked(*arguments: Any) -> list[Any]:
    return ["evaluate", *arguments, "--length", "32", "--chunks", "3"]


def test_json_is_one_object_a_path_and_text_one_table(
    llama: Path,
    outputs: list[Path],
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # for all columns beside long paths
    result = cli(
        *asked(*outputs[:2], "-m", outputs[2], "--against", llama, "--json", "--plot", tmp_path / "p.html")
    )
    assert result.code == 0
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [v["path"] for v in lines] == [str(p) for p in outputs[:3]]
    for value in lines:
        assert {
            "scheme",
            "bits_per_weight",
            "total_bytes",
            "perplexity",
            "kl",
            "top1",
            "perplexity_increase",
        } <= set(value)
    assert (
        "bits per weight against KL divergence of 3 checkpoints" in result.err
        and (tmp_path / "p.html").exists()
    )
    table = cli(*asked(*outputs[:2], "--against", llama, "-q")).out
    for heading in ("bits/weight", "perplexity", "KL, nats per token", "top-1", "source", "W4 g32 symmetric"):
        assert heading in table, table
    alone = cli(*asked(*outputs[:2], "--json"))
    assert [json.loads(line)["kl"] for line in alone.out.splitlines()] == [None, None]


def test_one_path_prints_what_it_always_did(
    llama: Path, outputs: list[Path], cli: Callable[..., Any]
) -> None:
    value = json.loads(cli(*asked(outputs[0], "--against", llama, "--json")).out)
    assert value == json.loads(json.dumps(evaluate(outputs[0], against=llama, **SMALL).to_dict()))
    assert "scheme" not in value


def test_every_checkpoint_beyond_the_limit_is_named_after_all_were_measured(
    llama: Path, outputs: list[Path], cli: Callable[..., Any]
) -> None:
    result = cli(*asked(*outputs[:3], "--against", llama, "--json", "--max-perplexity-increase", "-0.99"))
    assert result.code == 4 and len(result.out.splitlines()) == 3
    assert all(f"{p}: perplexity rose by" in result.err for p in outputs[:3])


def test_bad_requests_are_said_at_once_before_anything_runs(
    llama: Path, outputs: list[Path], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "hidden", lambda *a: pytest.fail("a model was run"))
    (tmp_path / "folder.html").mkdir()
    for arguments, code, said in (
        (
            [outputs[0], outputs[0], tmp_path / "none", "--against", llama],
            1,
            ["2 problems:", "is named twice", "there is no such directory"],
        ),
        ([*outputs[:2], "--plot", "x.html"], 2, ["--plot needs --against"]),
        (
            [*outputs[:2], "--against", llama, "--plot", "x.pdf"],
            2,
            ["--plot is 'x.pdf': pictures are made as .html or .png"],
        ),
        ([*outputs[:2], "--against", llama, "--plot", tmp_path / "no" / "x.html"], 2, ["there is no folder"]),
        (
            [*outputs[:2], "--against", llama, "--plot", tmp_path / "folder.html"],
            2,
            ["is a directory: name another file"],
        ),
        (
            [*outputs[:2], "--against", llama, "--max-perplexity-increase", "nan"],
            2,
            ["--max-perplexity-increase is nan"],
        ),
        (["--against", llama, "--plot", tmp_path / "x.html"], 2, ["give one checkpoint directory"]),
    ):
        result = cli(*asked(*arguments))
        assert result.code == code and all(s in result.err for s in said), result.err


def test_a_checkpoint_that_cannot_be_run_does_not_take_the_others_along(
    llama: Path,
    outputs: list[Path],
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # for all columns beside long paths
    broken = copy_model(outputs[3], tmp_path / "broken")
    tensors = load_all(broken)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    for file in (*broken.glob("*.safetensors"), broken / "model.safetensors.index.json"):
        file.unlink()
    save_all(broken, tensors)
    paths = [outputs[0], broken, outputs[1]]
    result = cli(*asked(*paths, "--against", llama, "--json", "--plot", tmp_path / "p.html"))
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 1 and [x["path"] for x in lines] == [str(p) for p in paths]
    assert "holds NaN or infinity" in lines[1]["error"] and lines[1]["exit_code"] == 1 and "kl" in lines[2]
    assert (tmp_path / "p.html").exists()
    result = cli(*asked(*paths, "--against", llama))
    assert result.code == 1 and str(broken) in result.err and "w4a16" in result.out and "w8a16" in result.out


def test_models_of_two_vocabularies_are_not_compared(llama: Path, checkpoints: Callable[..., Path]) -> None:
    with pytest.raises(QuantError, match="has a vocabulary of 4,096.*one of 5,000"):
        evaluate(llama, against=checkpoints("llama", vocab_size=5000), **SMALL)


def test_a_png_without_matplotlib_says_how_to_get_it(
    llama: Path, outputs: list[Path], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    result = cli(*asked(*outputs[:2], "--against", llama, "--plot", tmp_path / "x.png"))
    assert (
        result.code == 1
        and "a .png takes matplotlib: pip install 'quant[plots]', or name a .html file" in result.err
    )
