"""What is measured by domain and by position: each part as it is measured by itself, and said honestly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.calibration.files import bundled
from quant.evaluation.quality import Evaluation, edges, evaluate
from quant.evaluation.texts import DOMAINS, Sample
from quant.report.files import load_evaluation
from quant.report.page import page
from quant.report.value import Report
from tests.helpers import TINYLM, make_checkpoint, quantize

ASKED: dict[str, Any] = {"length": 64, "chunks": 3}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains") / "out"
    quantize(TINYLM, folder, bits=4)
    return folder


@pytest.fixture(scope="module")
def found(output: Path) -> Evaluation:
    return evaluate(output, against=TINYLM, domains=True, **ASKED)


def test_each_domain_is_measured_as_its_text_alone(found: Evaluation, output: Path) -> None:
    assert [d.name for d in found.domains] == list(DOMAINS) and found.chunks == 3 * len(DOMAINS)
    for domain in (found.domains[1], found.domains[4]):  # code, and conversations
        alone = evaluate(output, against=TINYLM, text=bundled(DOMAINS[domain.name]), **ASKED)
        for key in ("perplexity", "source_perplexity", "kl", "top1", "top5", "kl_p99", "loss"):
            assert getattr(domain, key).mean == pytest.approx(getattr(alone, key).mean, rel=1e-3, abs=1e-6)
        assert domain.kl_max == pytest.approx(alone.kl_max, rel=1e-3)
        assert (domain.tokens, domain.chunks) == (alone.tokens, alone.chunks)
    assert alone.domains == () and alone.worst_domain is None
    kl = {d.name: d.kl.mean for d in found.domains if d.kl is not None}
    assert found.worst_domain == max(kl, key=lambda name: kl[name])
    assert found.kl is not None and found.kl.mean == pytest.approx(sum(kl.values()) / len(kl))


def test_the_table_names_the_worst_and_so_do_several(
    output: Path, cli: Callable[..., Any], found: Evaluation
) -> None:
    asked = ["--against", TINYLM, "--domains", "--length", "64", "--chunks", "3"]
    one = cli("evaluate", output, *asked, "-q")
    assert one.code == 0 and f"worst: {found.worst_domain}, KL 0." in one.out
    assert all(f"\n{name} " in one.out for name in DOMAINS)
    several = cli("evaluate", output, TINYLM, *asked, "--json")
    values = [json.loads(line) for line in several.out.splitlines()]
    assert [v["worst_domain"] for v in values] == [found.worst_domain, "prose"]  # the source: none is worse
    assert values[0]["domains"][1]["kl"]["mean"] == pytest.approx(found.domains[1].kl.mean, rel=1e-3)  # type: ignore[union-attr]
    both = cli("evaluate", output, "--domains", "--text", "x.txt")
    assert both.code == 2 and "--domains has texts of its own: leave --text x.txt out, or it" in both.err


def test_a_job_that_is_evaluated_keeps_the_numbers_and_names_the_worst(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    from quant import defaults

    monkeypatch.setattr(defaults, "DOMAIN_CHUNKS", 2)
    monkeypatch.setattr(defaults, "EVALUATION_LENGTH", 32)
    job = ["quantize", "-m", llama, "--method", "minmax", "--group-size", "32"]
    made = cli(*job, "-o", tmp_path / "out", "--evaluate")
    kept = load_evaluation(tmp_path / "out")
    assert made.code == 0 and kept is not None and f"worst: {kept['worst_domain']}, KL " in made.out
    assert "measure it:" not in made.out and made.out.splitlines()[-1].startswith("serve it: ")
    said = json.loads(cli(*job, "-o", tmp_path / "more", "--evaluate", "--json").out)
    assert said["evaluation"]["domains"] == kept["domains"] and said["output_hash"]
    report = Report.load(tmp_path / "out")
    assert report is not None
    html = (tmp_path / "out" / "quant_report.html").read_text()
    assert f"{kept['worst_domain']}, the worst" in html
    # what was kept before there were domains is still shown, and what is damaged is not taken
    from quant.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(tmp_path / "out")
    old = {k: v for k, v in kept.items() if k not in ("domains", "positions", "top5", "kl_p99", "loss")}
    assert "same most likely token" in page(report, checkpoint, old)
    file = tmp_path / "out" / "quant_evaluation.json"
    file.write_text(json.dumps(kept | {"domains": [{"name": "code"}]}))
    assert load_evaluation(tmp_path / "out") is None
    dry = cli(*job, "--dry-run", "--evaluate")
    assert dry.code == 2 and "--evaluate measures what was made" in dry.err


def test_an_output_that_cannot_be_measured_is_there_all_the_same(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    from quant.evaluation import texts

    short = tmp_path / "short.txt"
    short.write_text("too short")
    monkeypatch.setattr(texts, "bundled", lambda name: short)
    made = cli("quantize", "-m", llama, "-o", tmp_path / "out", "--method", "minmax", "--group-size", "32",
               "--evaluate", "--json")  # fmt: skip
    assert made.code == 1 and json.loads(made.out)["evaluation"] is None
    assert f"{tmp_path / 'out'} is made; it was not measured: " in made.err and "short.txt: has " in made.err
    assert Report.load(tmp_path / "out") is not None and load_evaluation(tmp_path / "out") is None


def test_positions_add_up_and_one_is_measured_as_a_shorter_chunk(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoints("llama", max_position_embeddings=8192)
    quantize(source, tmp_path / "out", bits=4, group_size=32)
    whole = evaluate(tmp_path / "out", against=source, length=1400, chunks=2)
    assert [(p.first, p.last) for p in whole.positions] == [(1, 512), (513, 1024), (1025, 1399)]
    assert whole.kl is not None and sum(p.tokens for p in whole.positions) == whole.tokens
    mean = sum(p.kl.mean * p.tokens for p in whole.positions if p.kl is not None) / whole.tokens
    assert mean == pytest.approx(whole.kl.mean, rel=1e-6)
    # the first 512 predicted tokens of a chunk see nothing of what comes behind them
    from quant.calibration.text import evaluation_rows
    from quant.offline import load_tokenizer

    rows = evaluation_rows(load_tokenizer(source), bundled("wikitext-2-test"), 1400, 2)
    from quant.checkpoint.reader import open_checkpoint
    from quant.evaluation.quality import Runner, run_both
    from quant.progress import silent

    device = torch.device("cpu")
    runner = Runner(open_checkpoint(tmp_path / "out"), device)
    short = run_both(runner, None, rows[:, :513], device, silent)
    first = whole.positions[0].perplexity.mean
    assert float(short.nll.mean().exp()) == pytest.approx(first, rel=1e-4)
    assert edges(512) == [(1, 512)] and edges(8191)[-1] == (4097, 8191)


def test_a_long_context_is_reached_or_it_is_said_that_there_is_none(
    checkpoints: Callable[..., Path], cli: Callable[..., Any], llama: Path
) -> None:
    source = checkpoints("llama", max_position_embeddings=8192, num_hidden_layers=1)
    long = cli("evaluate", source, "--against", source, "--long-context", "--chunks", "2", "--length", "4120",
               "--json")  # fmt: skip
    value = json.loads(long.out)
    assert [(p["first"], p["last"]) for p in value["positions"]][-1] == (4097, 4119)
    assert value["positions"][-1]["tokens"] == 2 * 23 and value["notes"] == []
    assert Sample(long_context=True).resolved() == 8192 and Sample(long_context=True).most == 8
    short = cli("evaluate", llama, "--long-context", "--chunks", "2")
    said = "chunks have 256 tokens, which is all of its context: no position beyond 4,096 is measured"
    assert short.code == 0 and said in short.err
    wrong = cli("evaluate", llama, "--long-context", "--length", "64")
    assert wrong.code == 2 and "--length is 64: --long-context is for positions beyond 4,096" in wrong.err


def test_text_that_a_tokenizer_does_not_know_is_said(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    file = source / "tokenizer_config.json"
    config = json.loads(file.read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    token = next(t for t, i in tokenizer["model"]["vocab"].items() if i == 300)
    file.write_text(json.dumps(config | {"unk_token": token}))
    text = tmp_path / "text.txt"
    text.write_text(token.replace("Ġ", " ") * 200)
    found = evaluate(source, text=text, length=32, chunks=2)
    assert len(found.notes) == 1 and "of its tokens are unknown to the tokenizer" in found.notes[0]


@pytest.mark.parametrize("name", DOMAINS)
def test_every_bundled_text_fills_its_chunks_and_names_its_licence(name: str) -> None:
    from quant.calibration.text import evaluation_rows
    from quant.offline import load_tokenizer

    file = bundled(DOMAINS[name])
    assert len(evaluation_rows(load_tokenizer(TINYLM), file, 512, 100)) >= 9
    source = (file.parent / "SOURCE.md").read_text(encoding="utf-8")
    row = next(line for line in source.splitlines() if f"`{file.name}`" in line)
    assert "Apache-2.0" in row or "CC BY-SA" in row


def test_conversations_have_turns_that_every_template_takes() -> None:
    """Some refuse a system's turn (Gemma's), or two of one side in a row."""
    lines = bundled(DOMAINS["chat"]).read_text(encoding="utf-8").splitlines()
    for line in lines:
        roles = [m["role"] for m in json.loads(line)["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert len(lines) == 30
