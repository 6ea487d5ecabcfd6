"""A report is one value: what is written is what is read, a file that is none of ours never stops a reader,
and nothing that varies between runs decides a byte of the output."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import quant
from quant.evaluation.accounting import noted_tensors
from quant.evaluation.compare import compare
from quant.pipeline.export import export
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.plan import plan_job
from quant.recipe import make_recipe
from quant.report.evidence import evidence_of
from quant.report.value import REPORT, FoldResult, LayerResult, Provenance, Report, without_secrets

JOB = {"method": "gptq", "bits": 8, "group_size": 32, "samples": 4, "sequence_length": 32}


def run(source: Path, output: Path, **options: Any) -> Report:
    recipe = make_recipe({"model_path": source, "output_path": output, **JOB, **options})
    return QuantizationManager(plan_job(recipe), command=("quant", "quantize")).run()


@pytest.fixture(scope="module")
def scaled(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with scaling folded in."""
    output = tmp_path_factory.mktemp("report") / "out"
    run(checkpoints("llama"), output, outlier_suppression="smooth_quant")
    return output


def test_what_is_written_is_what_is_read(scaled: Path, tmp_path: Path) -> None:
    report = Report.load(scaled)
    assert report is not None and report.quantization is not None and report.conversion is None
    assert report.to_dict() == json.loads((scaled / REPORT).read_text())
    assert report.quantization.folds and report.quantization.layers[0].unit
    assert all(isinstance(f, FoldResult) for f in report.quantization.folds.values())
    converted = export(scaled, tmp_path / "out", "plain")
    assert converted.conversion is not None and converted.quantization is None
    assert Report.load(tmp_path / "out") == converted
    assert converted.to_dict() == json.loads((tmp_path / "out" / REPORT).read_text())


def test_a_report_says_what_made_it_when_and_where(scaled: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    report = Report.load(scaled)
    assert report is not None
    made = report.provenance
    assert (made.quant, made.torch) == (quant.__version__, torch.__version__)
    assert made.transformers == transformers.__version__ and made.command == ("quant", "quantize")
    age = datetime.now(timezone.utc) - datetime.fromisoformat(made.date)
    assert timedelta(0) <= age < timedelta(hours=2) and made.date.endswith("+00:00")
    assert re.fullmatch(r"\S.*, \d+ cores?", made.machine)
    assert Provenance.here(gpu="NVIDIA L4").machine == f"NVIDIA L4, {made.machine}"
    assert export(scaled, tmp_path / "out").provenance.command is None  # Python asked for it


def test_what_varies_between_runs_decides_nothing(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe({"model_path": checkpoints("llama"), "output_path": tmp_path / "out", **JOB})
    plan = plan_job(recipe)
    typed, called = QuantizationManager(plan, command=("quant", "--json")), QuantizationManager(plan)
    assert typed.fingerprint(None) == called.fingerprint(None)
    first = typed.run()
    monkeypatch.setattr("quant.report.value.machine", lambda: "another machine")
    recipe = recipe.model_copy(update={"output_path": tmp_path / "again"})
    second = QuantizationManager(plan_job(recipe)).run()
    assert second.provenance != first.provenance and second.output_hash == first.output_hash
    assert quant.verify(tmp_path / "again").content_hash == first.output_hash


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (("/opt/bin/quant", "quantize", "-m", "/a b"), ("quant", "quantize", "-m", "/a b")),
        (("q", "--api-key", "s", "--api-key=s"), ("q", "--api-key", "***", "--api-key=***")),
        (("q", "--hf-token", "s", "--token", "--token"), ("q", "--hf-token", "***", "--token", "***")),
        (("q", "--api-key-env", "NAME", "--tokens", "3"), ("q", "--api-key-env", "NAME", "--tokens", "3")),
        (("q", "https://me:s@host/x"), ("q", "https://***@host/x")),
        ((), ()),
    ],
)
def test_a_command_keeps_no_secrets(typed: tuple[str, ...], kept: tuple[str, ...]) -> None:
    assert without_secrets(typed) == kept


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from paths(part, (*path, key))


def shortened(value: Any) -> Any:
    """The same JSON value with one element of each list."""
    if isinstance(value, dict):
        return {k: shortened(v) for k, v in value.items()}
    return [shortened(v) for v in value[:1]] if isinstance(value, list) else value


WRONG = [None, True, 3, -1.5, math.nan, 10**400, "x", "\ud800", [], [3], [None], {}, {"x": 3}, [[{}]]]


def test_a_damaged_report_never_stops_a_reader(scaled: Path, tmp_path: Path) -> None:
    good = shortened(json.loads((scaled / REPORT).read_text()))
    keys = set()
    for path in list(paths(good))[1:]:
        for wrong in WRONG:
            value = copy.deepcopy(good)
            place = value
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            (tmp_path / REPORT).write_text(json.dumps(value))
            evidence_of(tmp_path)
            noted_tensors(tmp_path)
            report = Report.load(tmp_path)
            assert report is not None
            # what is read is whole: it can be written and printed
            assert Report.from_dict(json.loads(report.to_json())) == report
            report.to_json().encode()
            keys.add(path[0])
    assert keys == set(good)


@pytest.mark.parametrize("content", ["", "[]", "3", "nul", "[" * 100000, '{"layers": 3}', "\udcff", "{}"])
def test_a_file_that_is_no_report_tells_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_bytes(content.encode("utf-8", "surrogateescape"))
    report = Report.load(tmp_path)
    assert report is None or (report.output_hash, report.provenance) == ("", Provenance())
    assert evidence_of(tmp_path) is None and not noted_tensors(tmp_path).changed
    (tmp_path / REPORT).unlink()
    assert Report.load(tmp_path) is None


def test_scaling_that_cannot_have_been_is_passed_over(
    scaled: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """A report of another checkpoint, or one that was edited: names of tensors of other shapes, and of
    none."""
    source = checkpoints("llama")
    norm, linear, head = "model.layers.0.input_layernorm", "model.layers.0.mlp.down_proj", "lm_head"
    for kind in ("norm", "linear"):
        for at in (norm, linear, head, "no.such"):
            for reader in (norm, linear, "no.such"):
                fold = {"kind": kind, "source": at, "linears": [reader], "norm_offset": 0.0}
                (tmp_path / REPORT).write_text(json.dumps({"folds": {"x": fold}}))
                for file in scaled.iterdir():
                    if file.name != REPORT and not (tmp_path / file.name).exists():
                        (tmp_path / file.name).symlink_to(file)
                assert compare(tmp_path, source).tensors


def test_what_differs_in_its_numbers_alone_is_said_once(scaled: Path) -> None:
    said = {"a.0": "24 tokens: 1.5e-3 of 8", "a.1": "7 tokens: 2 of 8", "b": "NaN", "c": None}
    layers = tuple(LayerResult(n, fallback=f) for n, f in said.items())
    report = Report.load(scaled)
    assert report is not None and report.quantization is not None
    job = replace(report.quantization, layers=layers)
    assert job.kinds_of_fallbacks == [(["a.0", "a.1"], "24 tokens: 1.5e-3 of 8"), (["b"], "NaN")]
