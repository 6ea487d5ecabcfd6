"""Scaling folded into norms and linears: the function stays, whatever the family, and a stopped job goes on
to the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.calibration.statistics import Statistics
from quant.evaluation.compare import compare
from quant.evaluation.verify import verify
from quant.outlier_suppression.base import Place, Suppression
from quant.pipeline import methods
from quant.pipeline import units as module
from quant.schemes import Scheme
from tests.helpers import load_all, quantize, save_all, short_text, weight_files

JOB: dict[str, Any] = {
    "method": "awq", "group_size": 32, "samples": 8, "sequence_length": 64,
    "calibration_dataset": [short_text()],
}  # fmt: skip


class Strong:
    """Factors far from one, that differ from input to input: what a wrong fold cannot hide behind."""

    name = "strong"
    needs = frozenset({"hessian"})
    sources = frozenset({"norm", "linear"})

    def __call__(
        self, weight: torch.Tensor, statistics: Statistics, scheme: Scheme, dtype: torch.dtype, place: Place
    ) -> Suppression:
        k = weight.shape[1]
        return Suppression(
            place.fit(torch.exp2(4 * torch.rand(k, generator=torch.Generator().manual_seed(k)) - 2)),
            ("scaled",),
        )


@pytest.fixture
def strong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "make_suppressor", lambda name, alpha: Strong())


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(
            input_ids=torch.randint(2, 4096, (4, 64), generator=torch.Generator().manual_seed(1))
        ).logits.log_softmax(-1)


def divergence(source: Path, other: Path) -> float:
    p, q = logits(source), logits(other)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_strong_factors_leave_the_function_as_it_is(
    kind: str, checkpoints: Callable[..., Path], tmp_path: Path, strong: None
) -> None:
    source = checkpoints(kind)
    report = quantize(source, tmp_path / "folded", **JOB, bits=8, format="plain")
    quantize(
        source, tmp_path / "rounded", method="minmax", bits=8, symmetric=False, group_size=32, format="plain"
    )
    folded, rounded = divergence(source, tmp_path / "folded"), divergence(source, tmp_path / "rounded")
    # within a group of 32, factors from 1/4 to 4 coarsen the rounding itself: about 46 times its power where
    # all weights are alike
    assert folded < 46 * rounded and rounded < 1e-3
    blocks = 3 if kind.startswith("gemma") else 2
    assert len(report["folds"]) == (2 if kind == "phi3" else 4) * blocks
    changed = load_all(tmp_path / "folded")
    assert all(
        not torch.equal(changed[n], load_all(source)[n])
        for n in report["tensors"]["folded"]
        if n.endswith("norm.weight")
    )
    if kind == "phi3":
        notes = {n for x in report["layers"] for n in x["notes"]}
        assert any("qkv_proj makes 128 outputs for 64 inputs in a way that is not known" in n for n in notes)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("bits", [3, 8])
def test_compare_and_verify_know_folds(
    kind: str, bits: int, checkpoints: Callable[..., Path], tmp_path: Path, strong: None
) -> None:
    """What took factors alone, norms and biases, is the source's; what was rounded too is as far from it as
    rounding is."""
    source = checkpoints(kind)
    form = {"target": "other", "format": "gptq"} if bits == 3 else {}
    report = quantize(source, tmp_path / "out", **JOB, bits=bits, symmetric=False, **form)
    assert verify(tmp_path / "out", source=source, target="other").passed
    found = compare(tmp_path / "out", source)
    different = {t.name: t for t in found.tensors if not t.equal}
    assert set(different) == set(report["tensors"]["quantized"])
    for t in different.values():
        assert (t.snr_db or 0) > (30 if bits == 8 else 0), t
    scaled = {t.name for t in found.tensors if t.scaled}
    assert scaled >= {
        *report["tensors"]["folded"],
        *(f"{n}.weight" for f in report["folds"].values() for n in f["linears"]),
    }
    assert found.to_dict()["scaled"] == sorted(scaled) and found.to_dict()["equal"] == len(
        found.tensors
    ) - len(different)
    assert all(not t.scaled for t in compare(source, source).tensors)
    (tmp_path / "out" / "quant_report.json").write_text(json.dumps({}))
    bare = [t for t in compare(tmp_path / "out", source).tensors if not t.equal]
    assert {t.name for t in bare} >= {*different, *report["tensors"]["folded"]} and min(
        t.snr_db or 0 for t in bare
    ) < 10


def test_the_command_says_how_many_tensors_were_compared_without_their_folds(
    llama: Path, tmp_path: Path, strong: None, cli: Callable[..., Any]
) -> None:
    quantize(llama, tmp_path / "out", **JOB, bits=8)
    result = cli("verify", tmp_path / "out", "--against", llama)
    assert result.code == 0, result.err
    assert re.search(
        r"7 tensors equal, 14 differ \([\d.]+ to [\d.]+ dB\), the scaling folded into 18 taken out",
        " ".join(result.out.split()),
    )


@pytest.mark.parametrize("damage", [4.0, -1.0, 0.0, float("nan")])
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_damaged_norm_is_not_taken_for_a_scaled_one(
    norm: str, damage: float, llama: Path, tmp_path: Path, strong: None
) -> None:
    """Its own values say by what it was divided; that its readers were multiplied by the same is what makes
    it right."""
    quantize(llama, tmp_path / "out", **JOB, bits=8)
    name = f"model.layers.1.{norm}.weight"
    (file,) = [f for f in (tmp_path / "out").glob("*.safetensors") if name in load_file(f)]
    tensors = load_file(file)
    tensors[name][5] *= damage
    save_file(tensors, file, metadata={"format": "pt"})
    source = load_all(llama)[name].float()
    found = {t.name: t for t in compare(tmp_path / "out", llama).tensors}
    assert not found[name].equal and found[name].scaled
    if damage == 4:
        assert found[name].largest == pytest.approx(3 * abs(float(source[5])), rel=0.1)
    others = [t for n, t in found.items() if "norm" in n and n != name]
    assert len(others) == 4 and all(t.equal for t in others)


def test_a_linear_that_was_only_scaled_is_the_source_s_with_its_bias(
    checkpoints: Callable[..., Path], tmp_path: Path, strong: None
) -> None:
    """o_proj alone is quantized: v_proj keeps its dtype and gives its rows, and their biases, to it."""
    source = checkpoints("qwen2")
    report = quantize(source, tmp_path / "out", **JOB, bits=8, layers="*.o_proj", target="other")
    assert {n.rpartition("v_proj.")[2] for n in report["tensors"]["folded"]} == {"weight", "bias"}
    found = compare(tmp_path / "out", source)
    assert {t.name for t in found.tensors if not t.equal} == set(report["tensors"]["quantized"])
    assert {t.name for t in found.tensors if t.scaled} >= set(report["tensors"]["folded"])
    name = "model.layers.0.self_attn.v_proj.bias"
    (file,) = [f for f in (tmp_path / "out").glob("*.safetensors") if name in load_file(f)]
    tensors = load_file(file)
    tensors[name][3] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    assert name in {t.name for t in compare(tmp_path / "out", source).tensors if not t.equal}


def test_the_bias_of_a_norm_is_compared_as_it_was_rounded(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gain, bias = (
        torch.randn(*s, generator=generator).to(torch.bfloat16) for s in ((24, 16), (16,), (16,))
    )
    factors = torch.rand(16, generator=generator) * 3 + 0.2
    new = (gain.float() / factors).to(torch.bfloat16)
    exact = gain.float() / new.float()
    fold = {"kind": "norm", "source": "m.norm", "linears": ["m.proj"], "norm_offset": 0.0}
    for name, tensors in {
        "source": {"m.norm.weight": gain, "m.norm.bias": bias, "m.proj.weight": weight},
        "out": {
            "m.norm.weight": new,
            "m.norm.bias": (bias.float() / exact).to(torch.bfloat16),
            "m.proj.weight": weight.float() * exact,
        },
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_all(tmp_path / name, tensors)
    (tmp_path / "out" / "quant_report.json").write_text(json.dumps({"folds": {"m.proj": fold}}))
    found = {t.name: t for t in compare(tmp_path / "out", tmp_path / "source").tensors}
    assert (
        found["m.norm.weight"].equal and found["m.norm.bias"].equal and all(t.scaled for t in found.values())
    )
    assert (found["m.proj.weight"].snr_db or 200) > 100
    tensors = load_all(tmp_path / "out")
    tensors["m.norm.bias"][2] = 7
    save_all(tmp_path / "out", tensors)
    (damaged,) = [
        t for t in compare(tmp_path / "out", tmp_path / "source").tensors if t.name == "m.norm.bias"
    ]
    assert not damaged.equal and damaged.largest == pytest.approx(
        abs(7 * float(exact[2]) - float(bias[2])), rel=1e-4
    )


def test_a_selection_that_leaves_a_consumer_out_is_not_scaled(
    llama: Path, tmp_path: Path, strong: None
) -> None:
    report = quantize(llama, tmp_path / "out", **JOB, layers="*.q_proj", target="other", format="plain")
    assert not report["folds"] and not report["tensors"]["folded"]
    assert any(
        "reads the same input and is not scaled with it" in n for x in report["layers"] for n in x["notes"]
    )
    assert torch.equal(
        load_all(tmp_path / "out")["model.layers.0.input_layernorm.weight"],
        load_all(llama)["model.layers.0.input_layernorm.weight"],
    )


class Stopped(Exception):
    """What a job is stopped with."""


@pytest.mark.parametrize("form", ["compressed-tensors", "plain"])
@pytest.mark.parametrize("layers", [None, "*.o_proj"])
def test_a_stopped_job_goes_on_to_the_same_bytes(
    form: str,
    layers: str | None,
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strong: None,
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
