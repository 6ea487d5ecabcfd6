"""AWQ's scaling against a search written out in fp64 over real activations, and what it must never do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.calibration.statistics import Statistics
from quant.checkpoint.reader import open_checkpoint
from quant.errors import QuantError
from quant.evaluation.compare import compare
from quant.evaluation.quality import evaluate
from quant.evaluation.verify import verify
from quant.formats import FormatRegistry, find_format
from quant.formats.reading import read_linear
from quant.outlier_suppression import AWQScaling
from quant.outlier_suppression.base import Place, norm_factors
from quant.quantizers import MinMaxQuantizer
from quant.quantizers.nearest import round_to_nearest
from quant.quantizers.rounding import importance_of
from quant.schemes import PRESETS, UNQUANTIZED, resolve_scheme
from tests.helpers import copy_model, load_all, quantize, save_all, short_text

SCHEME = resolve_scheme("w4a16-asym", group_size=32)


def inputs(k: int = 64, outliers: float = 30.0, seed: int = 0) -> torch.Tensor:
    """Activations [tokens, K] of which a few features are far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, k, generator=generator) @ (
        torch.eye(k) + 0.1 * torch.randn(k, k, generator=generator)
    )
    x[:, ::17] *= outliers
    return x


def weights(n: int = 96, k: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def statistics(x: torch.Tensor) -> Statistics:
    return Statistics(len(x), x.t() @ x / len(x))


def output_error(weight: torch.Tensor, x: torch.Tensor, factors: torch.Tensor) -> float:
    """Mean square of what rounding W·diag(s) changes of the outputs, over the tokens themselves."""
    scaled = x / factors
    rounded = round_to_nearest(
        weight * factors,
        SCHEME.weights,
        torch.bfloat16,
        search=True,
        importance=importance_of(scaled.t() @ scaled / len(x), SCHEME.weights),
    ).dequantize()
    difference = x.double() @ (weight.double() - rounded.double() / factors.double()).t()
    return float(difference.square().sum(1).mean())


@pytest.mark.parametrize("place", [Place("norm"), Place("linear", True)], ids=["norm", "linear"])
@pytest.mark.parametrize("outliers", [1.0, 30.0])
def test_the_choice_is_the_best_of_the_papers_grid(place: Place, outliers: float) -> None:
    x, weight = inputs(outliers=outliers), weights()
    found = AWQScaling()(weight, statistics(x), SCHEME, torch.bfloat16, place).factors
    magnitude = x.square().mean(0).sqrt()
    groups = weight.view(96, 2, 32).abs()
    share = (groups / groups.amax(-1, keepdim=True)).mean(0).view(64)
    best = float("inf")
    for step in range(0, 21, 4 if place.exact else 1):
        alpha = step / 20
        for s in (magnitude**alpha, magnitude**alpha / share ** (1 - alpha)):
            best = min(best, output_error(weight, x, place.fit(s / (s.max() * s.min()).sqrt())))
    assert output_error(weight, x, found) == pytest.approx(best, rel=1e-3)
    assert output_error(weight, x, found) <= output_error(weight, x, torch.ones(64)) * (1 + 1e-6)


def test_outliers_are_worth_scaling() -> None:
    x, weight = inputs(), weights()
    factors = AWQScaling()(weight, statistics(x), SCHEME, torch.bfloat16, Place("norm")).factors
    assert output_error(weight, x, factors) < 0.7 * output_error(weight, x, torch.ones(64))


@pytest.mark.parametrize("name", ["w4a16", "w8a16", "w2a16", "nvfp4a16", "mxfp4a16", "w8a8-fp8"])
def test_every_scheme_is_scaled_within_bounds(name: str) -> None:
    k = 256
    found = AWQScaling()(weights(k=k), statistics(inputs(k)), PRESETS[name], torch.bfloat16, Place("norm"))
    assert torch.isfinite(found.factors).all() and (found.factors > 0).all() and found.notes


def test_inputs_that_are_always_zero_keep_their_scale() -> None:
    x = inputs()
    x[:, [3, 40]] = 0
    found = AWQScaling()(weights(), statistics(x), SCHEME, torch.bfloat16, Place("norm")).factors
    assert (found[[3, 40]] == 1).all() and torch.isfinite(found).all() and (found != 1).any()
    nothing = AWQScaling()(weights(), statistics(torch.zeros(8, 64)), SCHEME, torch.bfloat16, Place("norm"))
    assert (nothing.factors == 1).all() and "no calibration token" in nothing.notes[0]


def test_groups_of_zeros_make_no_nan() -> None:
    weight = weights()
    weight[:, :32] = 0
    weight[5] = 0
    found = AWQScaling()(weight, statistics(inputs()), SCHEME, torch.bfloat16, Place("norm")).factors
    assert torch.isfinite(found).all() and (found > 0).all()
    assert (
        AWQScaling()(torch.zeros(4, 64), statistics(inputs()), SCHEME, torch.bfloat16, Place("norm")).factors
        == 1
    ).all()


def test_heads_that_share_a_kv_head_get_one_factor_of_a_power_of_two() -> None:
    tied = torch.arange(64) // 32 * 16 + torch.arange(64) % 16
    found = AWQScaling()(
        weights(), statistics(inputs()), SCHEME, torch.bfloat16, Place("linear", True, tied)
    ).factors
    assert (found.log2() == found.log2().round()).all() and (found != 1).any()
    for output in range(int(tied.max()) + 1):
        assert len(found[tied == output].unique()) == 1


def test_the_weights_and_statistics_stay_as_they_are() -> None:
    weight, given = weights(), statistics(inputs())
    before = weight.clone(), given.copy()
    AWQScaling()(weight, given, SCHEME, torch.bfloat16, Place("norm"))
    assert (
        torch.equal(weight, before[0])
        and given.hessian is not None
        and torch.equal(given.hessian, before[1].hessian)
    )


def test_without_a_scheme_it_scales_for_four_bits() -> None:
    found = AWQScaling()(
        weights(), statistics(inputs()), UNQUANTIZED, torch.bfloat16, Place("norm", True)
    ).factors
    wanted = AWQScaling()(
        weights(),
        statistics(inputs()),
        resolve_scheme("w4a16-asym", group_size=-1),
        torch.bfloat16,
        Place("norm", True),
    )
    assert (
        torch.equal(found, wanted.factors)
        and (found != 1).any()
        and (found.log2() == found.log2().round()).all()
    )


JOB: dict[str, Any] = {"samples": 8, "sequence_length": 64, "calibration_dataset": [short_text()]}


@pytest.fixture
def outliers(checkpoints: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A model with a few channels that are far larger than the others behind every norm, so that scaling
    pays; the checkpoint of a family."""

    def get(kind: str = "llama", **settings: Any) -> Path:
        source = copy_model(checkpoints(kind, **settings), tmp_path / "source")
        tensors = load_all(source)
        for name, tensor in tensors.items():
            if ".layers." in name and name.endswith("layernorm.weight"):
                tensor[::13] *= 24
        save_all(source, tensors)
        return source

    return get


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_folds_alone_leave_every_product_as_it_is(
    kind: str, outliers: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing is rounded: what a norm loses its readers have, once; what one linear's rows lose the next
    one's columns have."""
    source = outliers(kind)
    report = quantize(
        source, tmp_path / "out", method="none", outlier_suppression="awq", format="plain", **JOB
    )
    assert report["function"]["kl"] < 1e-6 and report["function"]["preserved"]
    before, after = load_all(source), load_all(tmp_path / "out")
    assert before.keys() == after.keys()
    factors = factors_of(report, before, after)
    rows = {f["source"] for f in report["folds"].values() if f["kind"] == "linear"}
    columns = {n for f in report["folds"].values() if f["kind"] == "linear" for n in f["linears"]}
    scaled = 0
    for name in report["tensors"]["quantized"]:
        module = name.removesuffix(".weight")
        factor = factors.get(module, torch.ones(()))
        ratio = after[name].float() / before[name].float() / factor
        # v for o and up for down: a power of two for each output, and for the input of the other
        if module in rows:
            ratio = ratio / ratio[:, :1]
        elif module in columns:
            assert bool((ratio == ratio[:1]).all()) and bool((ratio.log2() == ratio.log2().round()).all()), (
                name
            )
            scaled += int((ratio[0] != 1).sum())
            continue
        assert bool((ratio == 1).all()), name
        scaled += int((factor != 1).sum())
    assert scaled > 20 and len(report["folds"]) == (4 if kind == "phi3" else 8)
    assert all(t.equal for t in compare(tmp_path / "out", source).tensors)


def factors_of(
    report: dict[str, Any], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Linear → what its input was divided by, fp32 [K], as the norm in front of it tells; of those behind a
    norm."""
    found = {}
    for fold in report["folds"].values():
        if fold["kind"] == "norm":
            name = f"{fold['source']}.weight"
            found |= dict.fromkeys(
                fold["linears"], norm_factors(before[name], after[name], fold["norm_offset"])
            )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_candidate_of_the_search_stays_in_the_weights(
    dtype: torch.dtype, outliers: Callable[..., Path], tmp_path: Path
) -> None:
    """AutoAWQ, on a CPU, scales its snapshot of the weights together with them, and so goes on from its first
    candidate. Here the codes are, bit for bit, those of the source's own weights times the factors that the
    norm lost. In fp32 every conversion is a view of the same memory."""
    source = outliers(dtype=dtype)
    scheme = resolve_scheme("w4a16-asym", group_size=32).weights
    report = quantize(source, tmp_path / "out", method="awq", group_size=32, clip_search=False, **JOB)
    before, checkpoint = load_all(source), open_checkpoint(tmp_path / "out")
    found = find_format(checkpoint.config, checkpoint.tensors)
    assert found is not None
    factors = factors_of(report, before, load_all(tmp_path / "out"))
    assert len(factors) == 2 * 5 and all(bool((f != 1).any()) for f in factors.values())
    for name, f in factors.items():
        wanted = MinMaxQuantizer()(before[f"{name}.weight"].float() * f, None, scheme, dtype).tensor
        made = read_linear(FormatRegistry.get(found.format), found, checkpoint, name)
        assert wanted.zeros is not None and made.zeros is not None
        assert torch.equal(made.codes, wanted.codes) and torch.equal(made.zeros, wanted.zeros), name
        ratio = made.scales.float() / wanted.scales.float()
        assert bool((ratio == ratio[:, :1]).all()) and bool((ratio.log2() == ratio.log2().round()).all()), (
            name
        )
        if not name.endswith(("v_proj", "up_proj")):
            assert torch.equal(made.scales, wanted.scales), name


def test_the_block_keeps_its_weights_while_candidates_are_tried(
    outliers: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Fp32, where the weights that the search is given could be the model's own."""
    source = outliers(dtype=torch.float32)
    before = load_all(source)
    given: list[torch.Tensor] = []
    search = AWQScaling.__call__

    def watched(self: AWQScaling, weight: torch.Tensor, *more: Any) -> Any:
        kept = weight.clone()
        found = search(self, weight, *more)
        assert torch.equal(weight, kept)
        given.append(kept)
        return found

    monkeypatch.setattr(AWQScaling, "__call__", watched)
    quantize(source, tmp_path / "out", method="awq", group_size=32, **JOB)
    assert len(given) == 8
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"] * 2
    for number, (weight, name) in enumerate(zip(given, names, strict=True)):
        wanted = before[f"model.layers.{number // 4}.{name}.weight"]
        assert torch.equal(weight[: len(wanted)], wanted), (number, name)


@pytest.mark.parametrize("scheme", ["w8a16-asym", "w8a8-int8", "w8a8-fp8"])
def test_eight_bits_behind_folds_are_the_function_of_the_source(
    scheme: str, outliers: Callable[..., Path], tmp_path: Path
) -> None:
    source = outliers()
    size = {"group_size": 32} if scheme == "w8a16-asym" else {}
    small: dict[str, Any] = {"length": 64, "chunks": 4}
    report = quantize(source, tmp_path / "awq", method="awq", scheme=scheme, format="plain", **size, **JOB)
    quantize(source, tmp_path / "minmax", method="minmax", scheme=scheme, format="plain", **size)
    assert len(report["folds"]) == 8
    scaled, rounded = (evaluate(tmp_path / n, against=source, **small).kl for n in ("awq", "minmax"))
    assert scaled is not None and rounded is not None
    # a factor that one side has twice, or not at all, costs ten times what rounding does, and more
    assert scaled.mean < 0.05 and scaled.mean < 1.5 * rounded.mean, (scaled, rounded)


def test_dead_channels_and_groups_of_zeros_go_through_a_whole_job(
    outliers: Callable[..., Path], tmp_path: Path
) -> None:
    source = outliers()
    tensors = load_all(source)
    tensors["model.layers.0.input_layernorm.weight"][[0, 7]] = 0  # inputs that are always zero
    tensors["model.layers.0.self_attn.q_proj.weight"][:, :32] = 0
    # outputs that are always zero, and with them inputs of down_proj
    tensors["model.layers.1.mlp.up_proj.weight"][5:40] = 0
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 0
    save_all(source, tensors)
    report = quantize(source, tmp_path / "out", method="awq", group_size=32, **JOB)
    assert report["verify"]["passed"] and verify(tmp_path / "out", source=source).passed
    assert all(bool(torch.isfinite(t.float()).all()) for t in load_all(tmp_path / "out").values())
    kl = evaluate(tmp_path / "out", against=source, length=32, chunks=2).kl
    assert kl is not None and 0 < kl.mean < 0.5
    assert load_all(tmp_path / "out")["model.layers.0.input_layernorm.weight"][[0, 7]].tolist() == [0, 0]


def test_it_asks_for_text() -> None:
    with pytest.raises(QuantError, match="calibration"):
        AWQScaling()(weights(), Statistics(0), SCHEME, torch.bfloat16, Place("norm"))
