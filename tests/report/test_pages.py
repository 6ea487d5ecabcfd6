"""What lies beside an output for people: the page of its job, its model card, several outputs on one page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from quant.pipeline.export import export
from quant.report.card import base_model, split_card
from quant.report.files import load_evaluation, save_evaluation
from tests.helpers import copy_model, quantize, short_text

VOID = {"meta", "circle", "line", "path", "rect"}


class _Closed(HTMLParser):
    """Fails where an element is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "img")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def whole(text: str) -> str:
    """A page that is one closed document, loads nothing, and whose pictures are XML."""
    parser = _Closed()
    parser.feed(text)
    assert parser.open == [] and "src=" not in text and "url(" not in text and "@import" not in text
    for picture in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(picture)
    return text


def front(path: Path) -> tuple[dict[str, Any], str]:
    text = (path / "README.md").read_text(encoding="utf-8")
    head, body = re.match(r"---\n(.*?)\n---\n(.*)", text, re.S).groups()  # type: ignore[union-attr]
    return yaml.safe_load(head), body


EVALUATION = {
    "text": "some/text.txt", "chunks": 3, "tokens": 99,
    "perplexity": {"mean": 9.0, "standard_error": 0.5},
    "source_perplexity": {"mean": 8.0, "standard_error": 0.5},
    "kl": {"mean": 0.0123, "standard_error": 0.0004}, "top1": {"mean": 0.9, "standard_error": 0.01},
}  # fmt: skip
JOB = {"method": "gptq", "group_size": 32, "samples": 4, "sequence_length": 32}


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output whose source has a card, and a name that looks like HTML."""
    folder = tmp_path_factory.mktemp("pages")
    source = copy_model(llama, folder / "source & <b>co</b>")
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [chat]\nbase_model: org/base\n---\n"
        "# About\nIts own words.\n"
    )
    quantize(source, folder / "out <i>", calibration_dataset=[short_text()], **JOB)
    return folder / "out <i>"


def test_the_page_shows_the_job_and_loads_nothing(made: Path) -> None:
    page = whole((made / "quant_report.html").read_text(encoding="utf-8"))
    report = json.loads((made / "quant_report.json").read_text())
    assert page.count("<circle") == len(report["layers"]) == 14  # a point for each layer
    assert all(f"<title>{x['name']}: {x['error']:.4g}</title>" in page for x in report["layers"])
    assert "<b>co</b>" not in page.replace("<b>4", "") and "&lt;b&gt;co" in page
    assert "not measured" in page and "--save" in page and "Nothing: no layer fell back" in page
    assert "H100" in page and "unpacks the weights" in page and "quant-deploy serve -m" in page
    # bytes by role are all of the file's
    rows = re.findall(r"<td class=n>([\d,]+)</td><td class=n>[\d.]+ [KM]?i?B</td>", page)
    weights = sum(int(x.replace(",", "")) for x in rows)
    assert weights == sum(
        int.__mul__(*shape) if len(shape := t) == 2 else shape[0]
        for t in _shapes(Path(report["source_path"]))
    )


def _shapes(folder: Path) -> list[list[int]]:
    from quant.checkpoint.reader import open_checkpoint

    return [list(t.shape) for t in open_checkpoint(folder).tensors.values()]


def test_the_card_has_what_the_hub_reads_and_a_kl_only_once_it_is_measured(made: Path) -> None:
    head, body = front(made)
    assert head["license"] == "apache-2.0" and head["language"] == ["en", "de"]
    assert {"quantized", "gptq", "w4a16", "4-bit", "compressed-tensors"} <= set(head["tags"])
    assert "base_model" not in head  # the source is no repository that is known
    assert "Its own words." in body and "vllm serve" in body and "KL" not in body
    assert load_evaluation(made) is None
    save_evaluation(made, EVALUATION)
    again, measured = front(made)
    assert again == head and "0.01230 ± 0.00040 nats per token (text.txt)" in measured
    assert measured.count("Its own words.") == 1 and measured.count("written by quant") == 1
    assert "0.01230 ± 0.00040" in whole((made / "quant_report.html").read_text(encoding="utf-8"))
    (made / "quant_evaluation.json").write_text('{"kl": {"mean": "much"}}')
    assert load_evaluation(made) is None  # a file that is none of ours
    # half of a character, which no file holds
    (made / "quant_evaluation.json").write_text(json.dumps({**EVALUATION, "text": "a\ud800b.txt"}))
    save_evaluation(made, load_evaluation(made) or {})
    assert "a?b.txt" in front(made)[1]


def test_the_base_model_is_what_the_source_was_fetched_as(tmp_path: Path) -> None:
    cached = tmp_path / "models--Qwen--Qwen3-8B--x" / "snapshots" / "abc"
    assert base_model(cached, {}, {}) == "Qwen/Qwen3-8B--x"
    assert base_model(tmp_path, {"_name_or_path": "org/name"}, {}) == "org/name"
    assert base_model(tmp_path, {"_name_or_path": "/data/name"}, {}) is None
    # the base of a fine-tune is not what was quantized, that of a quantized copy is
    assert base_model(tmp_path, {}, {"base_model": "a/b"}) is None
    assert base_model(tmp_path, {}, {"base_model": ["a/b"], "base_model_relation": "quantized"}) == "a/b"


@pytest.mark.parametrize("text", ["---\n: [\n---\nwords", "---\n- 1\n---\nwords", "words", "---\nwords", ""])
def test_any_text_is_a_card(text: str) -> None:
    metadata, body = split_card(text)
    assert metadata == {} and ("words" in body) == bool(text)


def test_an_export_has_a_card_and_page_of_its_own(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "gptq", "gptq")
    head, body = front(tmp_path / "gptq")
    assert "gptq" in head["tags"] and head["license"] == "apache-2.0"
    assert body.count("Its own words.") == 1 and body.count("written by quant") == 1
    whole((tmp_path / "gptq" / "quant_report.html").read_text(encoding="utf-8"))
    assert not (tmp_path / "gptq" / "quant_evaluation.json").exists()  # it was measured of the other


def test_several_outputs_on_one_page(
    made: Path, llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    other = tmp_path / "rounded"
    quantize(llama, other, method="minmax", group_size=32)
    save_evaluation(made, EVALUATION)
    save_evaluation(other, EVALUATION | {"kl": {"mean": 0.02, "standard_error": 0.001}})
    file = tmp_path / "all.html"
    shown = cli("report", made, other, "--output", file)
    assert shown.code == 0 and "0.02000 ± 0.00100" in shown.out and "different sources" in shown.err
    page = whole(file.read_text(encoding="utf-8"))
    assert (
        page.count('<circle class="point"') == page.count('class="error"') == 2 and "the source: KL 0" in page
    )
    value = json.loads(cli("report", made, other, "--json").out)
    assert [x["kl"]["mean"] for x in value["outputs"]] == [0.0123, 0.02] and value["page"] is None
    # one of its own; and what is no output, no page or named twice is refused
    assert cli("report", other).code == 0 and "0.02000" in (other / "quant_report.html").read_text()
    assert "no quant_report.json" in cli("report", made, llama).err
    (tmp_path / "precious.html").write_text("my notes")
    assert cli("report", made, other, "--output", tmp_path / "precious.html").code == 2
    assert (tmp_path / "precious.html").read_text() == "my notes"
    assert cli("report", made, made).code == 2


def test_evaluate_keeps_its_numbers_where_it_is_told_to(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    quantize(llama, tmp_path / "out", method="minmax", group_size=32)
    how = ["--against", llama, "--length", "32", "--chunks", "2"]
    measured = json.loads(cli("evaluate", tmp_path / "out", *how, "--json", "--save").out)
    assert load_evaluation(tmp_path / "out") == measured
    assert cli("verify", tmp_path / "out", "--source", llama).code == 0
    assert "no quant_report.json" not in cli("evaluate", llama, *how[2:]).err
    refused = cli("evaluate", llama, *how[2:], "--save")
    assert refused.code == 1 and "quant_report.json" in refused.err and refused.out == ""
