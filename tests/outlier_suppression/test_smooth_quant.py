"""SmoothQuant: its factors, the function it must not change, and the statistics that methods get after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from quant.calibration.statistics import Accumulator, Statistics
from quant.errors import UsageError, VerificationFailed
from quant.evaluation.preservation import Preservation
from quant.outlier_suppression import OutlierSuppressionRegistry, SmoothQuant
from quant.outlier_suppression.base import Place
from quant.pipeline import group_solves, units
from quant.quantizers import IdentityQuantizer, Quantized, QuantizerRegistry
from quant.schemes import PRESETS
from tests.helpers import load_all, quantize, short_text

W8A8 = PRESETS["w8a8-int8"]
TEXT: dict[str, Any] = {"samples": 4, "sequence_length": 64, "calibration_dataset": [short_text()]}


def smoothed(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return quantize(
        source,
        output,
        **({"method": "none", "format": "plain", "outlier_suppression": "smooth_quant"} | TEXT | options),
    )


def outliers(k: int = 64, n: int = 48, tokens: int = 300) -> tuple[torch.Tensor, Statistics]:
    """A weight and the statistics of inputs among which four are a hundred times larger than the rest; the
    last is always zero."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, k, generator=generator)
    x[:, :4] *= 100
    x[:, -1] = 0
    accumulator = Accumulator(k, torch.device("cpu"), {"range", "sample"})
    accumulator.add(x)
    return torch.randn(n, k, generator=generator), accumulator.finish()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_are_the_paper_s_but_for_one_common_number(alpha: float) -> None:
    weight, statistics = outliers()
    factors = SmoothQuant(alpha)(weight, statistics, W8A8, torch.bfloat16, Place("norm")).factors
    paper = statistics.abs_max[:-1] ** alpha / weight.abs().amax(0)[:-1] ** (1 - alpha)
    ratio = factors[:-1] / paper
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-5)
    assert factors[-1] == 1 and float(factors[:-1].log().mean()) == pytest.approx(0, abs=1e-5)


def test_inputs_and_columns_that_are_zero_are_not_scaled_and_are_reported() -> None:
    weight, statistics = outliers()
    weight[:, 7] = 0
    found = SmoothQuant()(weight, statistics, W8A8, torch.bfloat16, Place("norm"))
    assert found.factors[7] == 1 and found.factors[-1] == 1
    assert found.notes == ("1 of 64 inputs are zero on all calibration tokens: they are not scaled",)


def test_exact_places_get_powers_of_two() -> None:
    weight, statistics = outliers()
    logs = SmoothQuant()(weight, statistics, W8A8, torch.bfloat16, Place("norm", exact=True)).factors.log2()
    assert torch.equal(logs, logs.round()) and float(logs.max()) > 2


def test_auto_is_no_worse_than_any_alpha_nor_than_none() -> None:
    from quant.outlier_suppression.smooth_quant import _error, smoothing_factors

    weight, statistics = outliers()

    def error(factors: torch.Tensor) -> float:
        return _error(weight, statistics, W8A8, torch.bfloat16, factors)

    found = SmoothQuant("auto")(weight, statistics, W8A8, torch.bfloat16, Place("norm"))
    fixed = [error(smoothing_factors(statistics.abs_max, weight.abs().amax(0), a)) for a in (0.1, 0.5, 0.9)]
    assert error(found.factors) <= min(fixed) < error(torch.ones(64)) / 5
    assert found.notes[0].startswith("alpha 0.")


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), "half"])
def test_an_alpha_that_is_none_is_refused(alpha: Any) -> None:
    with pytest.raises(ValueError, match="from 0 to 1, or auto"):
        SmoothQuant(alpha)


def test_only_auto_needs_a_sample() -> None:
    assert SmoothQuant(0.5).needs == {"range"} and SmoothQuant("auto").needs == {"range", "sample"}
    assert OutlierSuppressionRegistry.get("smooth_quant") is SmoothQuant


def test_fp32_is_smoothed_too(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    assert smoothed(checkpoints("llama", dtype=torch.float32), tmp_path / "out")["function"]["kl"] < 1e-12


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_smoothing_alone_leaves_the_function_as_it_is(
    kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoints(kind)
    report = smoothed(source, tmp_path / "out", alpha=0.8)
    same = report["function"]
    # Gemma adds 1 to what is stored, which no power of two survives exactly: its weights are rounded once
    assert same["preserved"] and same["kl"] < (1e-4 if kind.startswith("gemma") else 1e-12)
    assert len(report["tensors"]["folded"]) >= 4
    before, after = load_all(source), load_all(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert any("norm" in n for n in changed) and any("_proj" in n for n in changed)
    assert not any(n.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")) for n in changed)


def test_a_result_that_is_another_function_is_not_published(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = group_solves.fold_norm

    def broken(*args: Any) -> Any:
        factors, changed = fold(*args)
        return factors, {n: t * 2 for n, t in changed.items()}

    monkeypatch.setattr(group_solves, "fold_norm", broken)
    with pytest.raises(VerificationFailed, match="another function than the source"):
        smoothed(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_preserved_means_a_small_and_finite_difference() -> None:
    assert Preservation(1e-6, 0.01, 10).preserved
    assert (
        not Preservation(1e-3, 0.01, 10).preserved
        and not Preservation(float("nan"), float("nan"), 10).preserved
    )


@dataclass(frozen=True)
class Recording(IdentityQuantizer):
    """Notes the statistics that a method is given."""

    seen: ClassVar[list[Statistics]] = []
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "range"})

    def __call__(
        self, weight: torch.Tensor, statistics: Statistics | None, *args: Any, **more: Any
    ) -> Quantized:
        assert statistics is not None
        self.seen.append(statistics)
        return super().__call__(weight, statistics, *args, **more)


def test_a_method_sees_the_statistics_of_the_smoothed_model(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    source = checkpoints("llama", dtype=torch.float32)
    monkeypatch.setitem(QuantizerRegistry._entries, "none", Recording)

    def recorded(path: Path, name: str, suppressor: str) -> list[Statistics]:
        Recording.seen.clear()
        # random weights and inputs are even: a middle alpha would leave them so
        alpha = {} if suppressor == "none" else {"alpha": 1.0}
        smoothed(path, tmp_path / name, outlier_suppression=suppressor, **alpha)
        return list(Recording.seen)

    during = recorded(source, "smoothed", "smooth_quant")
    after = recorded(tmp_path / "smoothed", "again", "none")
    before = recorded(source, "plain", "none")
    assert len(during) == len(after) == len(before) == 8
    for i, (mine, true, old) in enumerate(zip(during, after, before, strict=True)):
        assert torch.allclose(mine.hessian, true.hessian, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]
        assert torch.allclose(mine.abs_max, true.abs_max, rtol=1e-5)
        if i % 4 in (0, 2):  # q/k/v and gate/up, which norms precede
            assert not torch.allclose(old.hessian, true.hessian, rtol=0.05)  # type: ignore[arg-type]
            assert not torch.allclose(old.abs_max, true.abs_max, rtol=0.05)


@pytest.mark.parametrize("method", ["minmax", "gptq"])
def test_quantizing_after_smoothing_keeps_the_function_near(method: str, llama: Path, tmp_path: Path) -> None:
    from quant.evaluation.quality import evaluate

    report = quantize(
        llama,
        tmp_path / "out",
        method=method,
        scheme="w8a8-int8",
        format="plain",
        outlier_suppression="smooth_quant",
        alpha="auto",
        **TEXT,
    )
    assert report["verify"]["passed"] and len(report["folds"]) == 4
    result = evaluate(tmp_path / "out", against=llama, text=short_text(), length=64, chunks=4)
    assert result.kl is not None and 0 < result.kl.mean < 1e-3


def test_an_interrupted_job_goes_on_to_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "method": "gptq",
        "scheme": "w8a8-int8",
        "format": "plain",
        "outlier_suppression": "smooth_quant",
    }
    whole = quantize(llama, tmp_path / "whole", **options, **TEXT)
    write = units.write_unit

    def failing(unit: Any, *args: Any, **more: Any) -> Any:
        if unit.block == 1:
            raise KeyboardInterrupt
        return write(unit, *args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(units, "write_unit", failing)
        quantize(llama, tmp_path / "out", **options, **TEXT)
    report = quantize(llama, tmp_path / "out", **options, **TEXT)
    assert report["output_hash"] == whole["output_hash"] and report["folds"].keys() == whole["folds"].keys()


def test_the_command(llama: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    fast = ["--samples", 4, "--sequence-length", 64, "--calibration-dataset", short_text()]
    made = cli("smooth", "-m", llama, "-o", tmp_path / "out", "--alpha", "auto", *fast, "--json")
    report = json.loads(made.out)
    assert made.code == 0 and report["function"]["preserved"] and report["settings"]["alpha"] == "auto"
    assert "KL to source" in cli("smooth", "-m", llama, "-o", tmp_path / "shown", *fast).out
    assert cli("verify", tmp_path / "out").code == 0
    for wrong in (["--alpha", "2"], ["--alpha", "x"], ["--method", "gptq"]):
        refused = cli("smooth", "-m", llama, "-o", tmp_path / "no", *wrong, *fast)
        assert refused.code == 2 and "Traceback" not in refused.err
    assert not (tmp_path / "no").exists()


def test_method_none_has_no_scheme_and_one_format(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leaves weights in the model's own dtype: leave --bits out"):
        smoothed(llama, tmp_path / "out", bits=4)
    with pytest.raises(Exception, match="use --format plain"):
        smoothed(llama, tmp_path / "out", format="compressed-tensors")
