"""Code that runs on a GPU, on a device without one: of memory of its own, where tensors of two never meet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, make_checkpoint, short_text, weight_files

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here to build a device with"),
    pytest.mark.skipif(shutil.which("ninja") is None, reason="no ninja here to build a device with"),
]
TEXT = ["--calibration-dataset", str(short_text()), "--samples", "8", "--sequence-length", "32"]
#: Jobs whose arithmetic is the same on both devices, number for number, and others.
EXACT = {
    "minmax": ["--method", "minmax", "--group-size", "32"],
    "minmax-nvfp4": ["--method", "minmax", "--scheme", "nvfp4a16"],
    "minmax-mxfp8": ["--method", "minmax", "--scheme", "mxfp8"],
    "fp8": ["--method", "fp8"],
    "hqq": ["--method", "hqq", "--scheme", "w4a16-asym", "--group-size", "32"],
}
CALIBRATED = {
    "gptq": ["--method", "gptq", "--group-size", "32"],
    "gptq-int8": ["--method", "gptq", "--scheme", "w8a8-int8", "--outlier-suppression", "smooth_quant"],
    "gptq-nvfp4": ["--method", "gptq", "--scheme", "nvfp4"],
    "awq": ["--method", "awq", "--group-size", "32"],
    "yaqa": ["--method", "yaqa", "--group-size", "32"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "mixtral", "mixtral")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the built extension; of its own, since a build that was killed leaves its lock behind."""
    return tmp_path_factory.mktemp("extension")


def _run(
    built: Path, *commands: list[str], limit: int | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Commands in one process that has the second device."""
    words = [w for command in commands for w in ("--then", *command)][1:]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(built), "OMP_NUM_THREADS": "1", "MAX_JOBS": "1"}
    if limit is not None:
        environment["SECOND_LIMIT"] = str(limit)
    done = subprocess.run(
        [sys.executable, "-m", "tests.device.run", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done


def _job(model: Path, output: Path, device: str, options: list[str]) -> list[str]:
    return ["quantize", "-q", "-m", str(model), "-o", str(output), "--device", device, *options]


@pytest.fixture(scope="module")
def made(
    built: Path, model: Path, mixture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    """Every job on both devices, in one process, each into a folder ``NAME-DEVICE``; and what the commands
    after them print."""
    folder = tmp_path_factory.mktemp("made")
    jobs = {
        **{name: (model, options) for name, options in EXACT.items()},
        **{name: (model, [*options, *TEXT]) for name, options in CALIBRATED.items()},
        "experts": (mixture, [*CALIBRATED["gptq"], *TEXT]),
    }
    commands = [
        _job(source, folder / f"{name}-{device}", device, options)
        for name, (source, options) in jobs.items()
        for device in ("cpu", "second")
    ]
    short = ["--chunks", "4", "--length", "32", "--text", str(short_text()), "--json", "-q"]
    for device in ("cpu", "second"):
        commands.append(
            ["evaluate", str(folder / "gptq-cpu"), "--against", str(model), "--device", device, *short]
        )
    for options in (CALIBRATED["gptq"], CALIBRATED["yaqa"], EXACT["minmax"]):
        text = TEXT if options[1] in ("gptq", "yaqa") else []
        commands.append(
            ["quantize", "-q", "-m", str(model), "--dry-run", "--json", "--device", "second", *options, *text]
        )
    yield folder, _run(built, *commands)
    shutil.rmtree(folder)


def _report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "quant_report.json").read_text()))


@pytest.mark.parametrize("name", EXACT)
def test_what_needs_no_products_is_the_same_number_for_number(name: str, made: tuple[Path, Any]) -> None:
    assert weight_files(made[0] / f"{name}-second") == weight_files(made[0] / f"{name}-cpu")


@pytest.mark.parametrize("name", [*CALIBRATED, "experts"])
def test_every_calibrated_method_loses_on_it_what_it_loses_on_a_cpu(
    name: str, made: tuple[Path, Any]
) -> None:
    here, there = (_report(made[0] / f"{name}-{device}") for device in ("cpu", "second"))
    assert there["verify"]["passed"] and there["fallbacks"] == here["fallbacks"]
    assert "second device of the tests" in str(there["provenance"]) and there["peak_gpu_bytes"] > 0
    assert [x["name"] for x in there["layers"]] == [x["name"] for x in here["layers"]]
    errors = [sum(x["error"] or 0.0 for x in report["layers"]) for report in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_a_model_is_judged_and_a_job_is_planned_on_it(made: tuple[Path, Any]) -> None:
    decoder, text, values = json.JSONDecoder(), made[1].stdout, list[dict[str, Any]]()
    while (start := text.find("{")) >= 0:
        value, end = decoder.raw_decode(text[start:])
        values.append(value)
        text = text[start + end :]
    on_cpu, on_second, *planned = values
    assert on_second["kl"]["mean"] == pytest.approx(on_cpu["kl"]["mean"], rel=0.02)
    assert len(planned) == 3 and all(p["peak_gpu_bytes"] > 0 for p in planned)


def test_two_of_them_make_the_files_of_one(built: Path, model: Path, mixture: Path, tmp_path: Path) -> None:
    jobs = {"gptq": model, "gptq of a mixture": mixture, "yaqa of a mixture": mixture}
    commands = []
    for name, source in jobs.items():
        options = [*CALIBRATED[name.split()[0]], *TEXT]
        commands.append(_job(source, tmp_path / f"{name}, one", "second:1", options))
        commands.append(_job(source, tmp_path / f"{name}, two", "second:0,second:1", options))
        commands[-1][commands[-1].index("--device")] = "--devices"
    _run(built, *commands)
    for name in jobs:
        assert weight_files(tmp_path / f"{name}, two") == weight_files(tmp_path / f"{name}, one")


def test_a_batch_that_memory_does_not_hold_is_tried_again_smaller(
    built: Path, model: Path, tmp_path: Path
) -> None:
    options = [*CALIBRATED["gptq"], *TEXT[:2], "--samples", "64", "--sequence-length", "64"]
    job = _job(model, tmp_path / "small", "second", options)
    done = _run(built, [w for w in job if w != "-q"], limit=3_000_000)
    report = _report(tmp_path / "small")
    assert report["verify"]["passed"] and report["peak_gpu_bytes"] <= 3_000_000
    assert any("ran out of memory" in note for note in report["calibration"]["notes"])
    assert "resuming" in done.stderr
    # with less than a block takes: one line, and what is finished is kept
    refused = _run(built, _job(model, tmp_path / "none", "second", options), limit=1_000_000, code=1)
    assert "Traceback" not in refused.stderr
    assert "second: out of memory" in refused.stderr and "--device cpu" in refused.stderr


def test_a_budget_of_its_memory_is_kept_or_refused_before_the_start(
    built: Path, model: Path, tmp_path: Path
) -> None:
    options = [*CALIBRATED["gptq"], *TEXT[:2], "--samples", "64", "--sequence-length", "64"]
    whole, tight, refused = (
        _job(model, tmp_path / name, "second", [*options, *budget])
        for name, budget in (
            ("whole", []),
            ("tight", ["--max-gpu-memory", "3MB", "--scratch-dir", str(tmp_path / "scratch")]),
            ("refused", ["--max-gpu-memory", "100KB"]),
        )
    )
    _run(built, whole, tight)
    report = _report(tmp_path / "tight")
    assert report["verify"]["passed"] and report["peak_gpu_bytes"] <= 3_000_000
    assert _report(tmp_path / "whole")["peak_gpu_bytes"] > 3_000_000
    said = _run(built, refused, code=1).stderr
    assert "--max-gpu-memory is 97.7 KiB" in said and "give --max-gpu-memory" in said
    assert not (tmp_path / "refused.work").exists()
