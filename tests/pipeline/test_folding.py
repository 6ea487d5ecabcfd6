"""Scaling folded into norms and linears: the function stays, whatever the family, and a stopped job goes on to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.calibration.statistics import Statistics
from quant.evaluation.compare import compare
from quant.evaluation.verify import verify
from quant.outlier_suppression.base import Place, Suppression
from quant.pipeline import manager as module
from quant.schemes import Scheme
from tests.helpers import load_all, quantize, short_text, weight_files

JOB: dict[str, Any] = {
    "method": "awq", "group_size": 32, "samples": 8, "sequence_length": 64, "calibration_dataset": [short_text()],
}  # fmt: skip


class Strong:
    """Factors far from one, that differ from input to input: what a wrong fold cannot hide behind."""

    name = "strong"
    needs = frozenset({"hessian"})
    sources = frozenset({"norm", "linear"})

    def __call__(self, weight: torch.Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype, place: Place) -> Suppression:
        k = weight.shape[1]
        return Suppression(place.fit(torch.exp2(4 * torch.rand(k, generator=torch.Generator().manual_seed(k)) - 2)), ("scaled",))


@pytest.fixture
def strong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_suppressor", lambda name, alpha: Strong())


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.randint(2, 4096, (4, 64), generator=torch.Generator().manual_seed(1))).logits.log_softmax(-1)


def divergence(source: Path, other: Path) -> float:
    p, q = logits(source), logits(other)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_strong_factors_leave_the_function_as_it_is(kind: str, checkpoints: Callable[..., Path], tmp_path: Path, strong: None) -> None:
    source = checkpoints(kind)
    report = quantize(source, tmp_path / "folded", **JOB, bits=8, format="plain")
    quantize(source, tmp_path / "rounded", method="minmax", bits=8, symmetric=False, group_size=32, format="plain")
    folded, rounded = divergence(source, tmp_path / "folded"), divergence(source, tmp_path / "rounded")
    # within a group of 32, factors from 1/4 to 4 coarsen the rounding itself: about 46 times its power where all weights are alike
    assert folded < 46 * rounded and rounded < 1e-3
    blocks = 3 if kind.startswith("gemma") else 2
    assert len(report["folds"]) == (2 if kind == "phi3" else 4) * blocks
    changed = load_all(tmp_path / "folded")
    assert all(not torch.equal(changed[n], load_all(source)[n]) for n in report["tensors"]["folded"] if n.endswith("norm.weight"))
    if kind == "phi3":
        notes = {n for x in report["layers"] for n in x["notes"]}
        assert any("qkv_proj makes 128 outputs for 64 inputs in a way that is not known" in n for n in notes)


def test_compare_and_verify_know_folds(llama: Path, tmp_path: Path, strong: None) -> None:
    report = quantize(llama, tmp_path / "out", **JOB, bits=8)
    assert verify(tmp_path / "out", source=llama).passed
    different = {t.name: t for t in compare(tmp_path / "out", llama).tensors if not t.equal}
    for name in report["tensors"]["quantized"]:
        assert (different[name].snr_db or 0) > 30, name
    assert {n for n in different if n not in report["tensors"]["quantized"]} == set(report["tensors"]["folded"])
    (tmp_path / "out" / "quant_report.json").write_text(json.dumps({}))
    assert min(t.snr_db or 0 for t in compare(tmp_path / "out", llama).tensors if not t.equal) < 10


def test_a_selection_that_leaves_a_consumer_out_is_not_scaled(llama: Path, tmp_path: Path, strong: None) -> None:
    report = quantize(llama, tmp_path / "out", **JOB, layers="*.q_proj", target="other", format="plain")
    assert not report["folds"] and not report["tensors"]["folded"]
    assert any("reads the same input and is not scaled with it" in n for x in report["layers"] for n in x["notes"])
    assert torch.equal(
        load_all(tmp_path / "out")["model.layers.0.input_layernorm.weight"], load_all(llama)["model.layers.0.input_layernorm.weight"]
    )


class Stopped(Exception):
    """What a job is stopped with."""


@pytest.mark.parametrize("form", ["compressed-tensors", "plain"])
@pytest.mark.parametrize("layers", [None, "*.o_proj"])
def test_a_stopped_job_goes_on_to_the_same_bytes(
    form: str, layers: str | None, checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strong: None
) -> None:
    source = checkpoints("llama", num_hidden_layers=3)
    job = JOB | {"format": form, "layers": layers}
    wanted = quantize(source, tmp_path / "undisturbed", **job)
    assert wanted["folds"]
    write = module.write_unit
    for units in (1, 2):
        done: list[int] = []

        def stopping(*args: Any, done: list[int] = done, units: int = units) -> Any:
            if len(done) == units:
                raise Stopped
            done.append(1)
            return write(*args)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(module, "write_unit", stopping)
            quantize(source, tmp_path / f"stopped{units}", **job)
        found = quantize(source, tmp_path / f"stopped{units}", **job)
        assert found["output_hash"] == wanted["output_hash"] and found["folds"] == wanted["folds"]
        assert weight_files(tmp_path / f"stopped{units}") == weight_files(tmp_path / "undisturbed")
