"""AWQ's scaling against a search written out in fp64 over real activations, and what it must never do."""

from __future__ import annotations

import pytest
import torch

from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.outlier_suppression import AWQScaling
from quant.outlier_suppression.base import Place
from quant.quantizers.awq import round_searched
from quant.schemes import PRESETS, resolve_scheme

SCHEME = resolve_scheme("w4a16-asym", group_size=32)


def inputs(k: int = 64, outliers: float = 30.0, seed: int = 0) -> torch.Tensor:
    """Activations [tokens, K] of which a few features are far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, k, generator=generator) @ (torch.eye(k) + 0.1 * torch.randn(k, k, generator=generator))
    x[:, ::17] *= outliers
    return x


def weights(n: int = 96, k: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def statistics(x: torch.Tensor) -> Statistics:
    return Statistics(len(x), x.t() @ x / len(x))


def output_error(weight: torch.Tensor, x: torch.Tensor, factors: torch.Tensor) -> float:
    """Mean square of what rounding W·diag(s) changes of the outputs, over the tokens themselves."""
    rounded = round_searched(weight * factors, x.square().mean(0) / factors.square(), SCHEME.weights, torch.bfloat16).dequantize()
    difference = x.double() @ (weight.double() - rounded.double() / factors.double()).t()
    return float(difference.square().sum(1).mean())


@pytest.mark.parametrize("place", [Place("norm"), Place("linear", True)], ids=["norm", "linear"])
@pytest.mark.parametrize("outliers", [1.0, 30.0])
def test_the_choice_is_the_best_of_the_papers_grid(place: Place, outliers: float) -> None:
    x, weight = inputs(outliers=outliers), weights()
    found = AWQScaling()(weight, statistics(x), SCHEME, torch.bfloat16, place).factors
    magnitude = x.square().mean(0).sqrt()
    best = float("inf")
    for step in range(21):
        s = magnitude ** (step / 20)
        s = place.fit(s / (s.max() * s.min()).sqrt())
        best = min(best, output_error(weight, x, s))
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
    assert (AWQScaling()(torch.zeros(4, 64), statistics(inputs()), SCHEME, torch.bfloat16, Place("norm")).factors == 1).all()


def test_heads_that_share_a_kv_head_get_one_factor_of_a_power_of_two() -> None:
    tied = torch.arange(64) // 32 * 16 + torch.arange(64) % 16
    found = AWQScaling()(weights(), statistics(inputs()), SCHEME, torch.bfloat16, Place("linear", True, tied)).factors
    assert (found.log2() == found.log2().round()).all() and (found != 1).any()
    for output in range(int(tied.max()) + 1):
        assert len(found[tied == output].unique()) == 1


def test_the_weights_and_statistics_stay_as_they_are() -> None:
    weight, given = weights(), statistics(inputs())
    before = weight.clone(), given.copy()
    AWQScaling()(weight, given, SCHEME, torch.bfloat16, Place("norm"))
    assert torch.equal(weight, before[0]) and given.hessian is not None and torch.equal(given.hessian, before[1].hessian)


def test_it_asks_for_text() -> None:
    with pytest.raises(QuantError, match="calibration"):
        AWQScaling()(weights(), Statistics(0), SCHEME, torch.bfloat16, Place("norm"))
