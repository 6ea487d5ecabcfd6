"""The report says of every layer how much it lost, or why that is not known, and which are the worst by both
measures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quant
from quant.report.evidence import evidence_of, worst
from quant.report.value import NOT_CALIBRATED, LayerResult
from tests.helpers import copy_model, quantize


def layer(name: str, error: float | None, snr: float | None, missing: str | None = None) -> LayerResult:
    return LayerResult(name, "m", "s", error, missing, snr)


def test_the_worst_come_first_by_each_measure() -> None:
    layers = [
        layer("a", 0.1, 30.0),
        layer("b", 0.3, 20.0),
        layer("c", 0.2, 10),
        layer("d", None, None),
        layer("e", math.nan, math.inf),
    ]
    found = worst(layers, 2)
    assert [x["name"] for x in found["by_error"]] == ["b", "c"] and [x["name"] for x in found["by_snr"]] == [
        "c",
        "b",
    ]
    assert found["error_missing"] is None
    assert worst([layer("a", None, 3.0, "why")]) == {
        "by_error": [],
        "by_snr": [{"name": "a", "method": "m", "scheme": "s", "error": None, "snr_db": 3.0}],
        "error_missing": "why",
    }


def test_a_job_without_calibration_says_why_it_has_no_errors(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    text = cli("quantize", "-m", llama, "-o", tmp_path / "out", "--method", "hqq", "--group-size", "32")
    assert text.code == 0 and f"not measured: {NOT_CALIBRATED}" in text.out and "lowest SNR" in text.out
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert all(
        x["error"] is None and x["error_missing"] == NOT_CALIBRATED and x["snr_db"] > 10
        for x in report["layers"]
    )
    shown = cli("inspect", tmp_path / "out")
    lowest = min(report["layers"], key=lambda x: x["snr_db"])
    assert (
        f"not measured: {NOT_CALIBRATED}" in shown.out
        and f"{lowest['name']}: {lowest['snr_db']:.2f} dB" in shown.out
    )


def test_a_calibrated_job_has_both_measures_also_for_methods_without_data(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    rules = [{"layers": "0", "method": "hqq"}]
    report = quantize(llama, tmp_path / "out", method="gptq", group_size=32, rules=rules)
    assert all(x["error"] > 0 and x["error_missing"] is None for x in report["layers"])
    found = quant.inspect(tmp_path / "out")["worst_layers"]
    assert [x["name"] for x in found["by_error"]] == [
        x["name"] for x in sorted(report["layers"], key=lambda x: -x["error"])[:5]
    ]
    assert [x["name"] for x in found["by_snr"]] == [
        x["name"] for x in sorted(report["layers"], key=lambda x: x["snr_db"])[:5]
    ]
    shown = cli("inspect", tmp_path / "out").out
    assert (
        "relative output error on held-out calibration rows" in shown
        and f"{found['by_error'][0]['error']:.2%}" in shown
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"layers": 3}',
        '{"layers": [3]}',
        '{"layers": [{"name": 3}]}',
        '{"layers": []}',
        "\udcff",
    ],
)
def test_a_report_that_cannot_be_read_is_no_evidence_and_no_error(
    content: str, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_model(quantized(), tmp_path / "m")
    (folder / "quant_report.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    found = evidence_of(folder)
    assert found is None or (found["by_error"], found["by_snr"]) == ([], [])
    assert quant.inspect(folder)["format"] == "compressed-tensors"


def test_a_checkpoint_without_a_report_shows_none(llama: Path, cli: Callable[..., Any]) -> None:
    assert quant.inspect(llama)["worst_layers"] is None
    assert "SNR" not in cli("inspect", llama).out
