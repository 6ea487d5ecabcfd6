"""Pruning against the textbook: one weight after another goes, and the inverse Hessian of those behind it
says what they make up for, in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from quant.calibration.statistics import Accumulator, Statistics
from quant.errors import QuantError
from quant.quantizers import MagnitudePruner, SparseGPTPruner, WandaPruner
from quant.quantizers.factors import factorize
from quant.quantizers.pruning import chosen, pruned_columns, refitted
from quant.schemes import PRESETS, UNQUANTIZED

PRUNERS = (MagnitudePruner, WandaPruner, SparseGPTPruner)


def inputs(k: int, tokens: int = 3000) -> torch.Tensor:
    """Correlated, and of very different size."""
    generator = torch.Generator().manual_seed(k)
    mix = torch.randn(k, k, generator=generator) * 0.2 + torch.eye(k)
    return torch.randn(tokens, k, generator=generator) @ mix * torch.rand(k, generator=generator).add(0.05)


def weight_of(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))


def pruned(method: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    statistics = Accumulator.of(x, method.needs)
    made = method(weight.clone(), statistics, UNQUANTIZED.weights, torch.bfloat16)
    assert not made.fallbacks
    return made.tensor.dequantize()


def lost(weight: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> float:
    return float(((weight - values) @ x.t()).double().square().sum())


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize(("k", "sparsity"), [(96, 0.5), (200, 0.3), (320, 0.75)])
def test_every_output_loses_the_share_asked_for(kind: Any, k: int, sparsity: float) -> None:
    values = pruned(kind(sparsity=sparsity), weight_of(24, k), inputs(k))
    zeros = (values == 0).sum(1)
    assert set(zeros.tolist()) == {round(sparsity * k)}


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize(("k", "pattern"), [(96, "2:4"), (320, "4:8"), (300, "1:3")])
def test_of_a_pattern_every_group_keeps_so_many(kind: Any, k: int, pattern: str) -> None:
    stay, of = map(int, pattern.split(":"))
    values = pruned(kind(pattern=pattern), weight_of(24, k), inputs(k))
    assert ((values != 0).view(24, -1, of).sum(2) == stay).all()


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, group: tuple[int, int] | None, block: int
) -> torch.Tensor:
    """SparseGPT by inverses of what is left of H, column by column."""
    w, h = weight.double().clone(), hessian.double()
    n, k = w.shape
    gone = torch.zeros(n, k, dtype=torch.bool)
    due = 0
    for c in range(k):
        inverse = torch.linalg.inv(h[c:, c:])
        if c % block == 0:
            stop = min(c + block, k)
            wanted = round(sparsity * stop) - due
            due += wanted
            counts = torch.stack(
                [w[:, j].square() / torch.linalg.inv(h[j:, j:])[0, 0] for j in range(c, stop)], 1
            )
            gone[:, c:stop] = chosen(counts, wanted / (stop - c), group)
        error = torch.where(gone[:, c], w[:, c], 0.0) / inverse[0, 0]
        w[:, c:] -= error[:, None] * inverse[0]
        w[gone[:, c], c] = 0.0
    return w


@pytest.mark.parametrize(
    ("k", "sparsity", "group"), [(96, 0.5, None), (200, 0.6, None), (160, 0.5, (2, 4)), (144, 0.5, (1, 3))]
)
def test_sparsegpt_is_the_textbook(k: int, sparsity: float, group: tuple[int, int] | None) -> None:
    x, weight = inputs(k), weight_of(16, k)
    hessian = x.t() @ x / len(x)
    factor, _ = factorize(hessian.clone(), 0.01, None)
    assert factor is not None
    values, gone = pruned_columns(weight, factor.upper, sparsity, group)
    damped = hessian + torch.diag(0.01 * hessian.diagonal())
    block = 128 if group is None else 128 // group[1] * group[1]
    wanted = textbook(weight, damped, sparsity, group, block)
    assert torch.equal(gone, wanted == 0)
    torch.testing.assert_close(values, wanted.float(), rtol=1e-3, atol=1e-3)


def test_fitted_weights_are_the_least_squares_of_each_row() -> None:
    k = 64
    x, weight = inputs(k), weight_of(8, k)
    hessian = x.t() @ x / len(x) + 0.01 * torch.eye(k)
    gone = chosen(weight.abs(), 0.5, None)
    values = refitted(weight, weight.masked_fill(gone, 0.0), gone, hessian, 300)
    for row in range(8):
        stay = ~gone[row]
        target = (hessian.double() @ weight[row].double())[stay]
        wanted = torch.linalg.solve(hessian.double()[stay][:, stay], target)
        torch.testing.assert_close(values[row][stay].double(), wanted, rtol=1e-3, atol=1e-4)
        assert not values[row][gone[row]].any()


@pytest.mark.parametrize("steps", [1, 3, 32])
def test_fitting_raises_no_rows_loss(steps: int) -> None:
    k = 200
    x, weight = inputs(k, 150), weight_of(32, k)  # fewer tokens than inputs
    hessian = x.t() @ x / len(x)
    hessian += torch.diag(1e-4 * hessian.diagonal())
    gone = chosen(weight.abs(), 0.7, None)
    before = weight.masked_fill(gone, 0.0)
    after = refitted(weight, before, gone, hessian, steps)

    def losses(values: torch.Tensor) -> torch.Tensor:
        error = (weight - values).double()
        return ((error @ hessian.double()) * error).sum(1)

    assert bool((losses(after) <= losses(before) * (1 + 1e-5)).all())
    assert float(losses(after).sum()) < float(losses(before).sum())


@pytest.mark.parametrize("setting", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_each_method_loses_less_than_the_one_before(setting: Mapping[str, Any]) -> None:
    x, weight = inputs(256), weight_of(64, 256)
    losses = [lost(weight, pruned(kind(**setting), weight, x), x) for kind in PRUNERS]
    fed_back = lost(weight, pruned(SparseGPTPruner(**setting, refit=0), weight, x), x)
    assert losses[0] > losses[1] > fed_back > losses[2]


def test_a_hessian_that_cannot_be_factored_is_said() -> None:
    hessian = torch.full((32, 32), 100.0).fill_diagonal_(1.0)
    made = SparseGPTPruner()(weight_of(4, 32), Statistics(9, hessian), UNQUANTIZED.weights, torch.float16)
    assert "not positive definite" in made.fallbacks[0]
    assert ((made.tensor.dequantize() == 0).sum(1) == 16).all()


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.0}, "above 0 and below 1"),
        ({"sparsity": 1.0}, "above 0 and below 1"),
        ({"sparsity": float("nan")}, "above 0 and below 1"),
        ({"pattern": "4:2"}, "weights that stay of every M"),
        ({"pattern": "2:2"}, "weights that stay of every M"),
        ({"pattern": "half"}, "weights that stay of every M"),
    ],
)
def test_wrong_settings_are_refused(kind: Any, settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize("kind", PRUNERS)
def test_what_does_not_divide_and_what_rounds_are_refused(kind: Any) -> None:
    assert "30 inputs do not divide into groups of 4" in str(kind(pattern="2:4").shape_problem(30))
    assert kind(pattern="2:4").shape_problem(32) is None
    assert "leaves all of them" in str(kind(sparsity=0.001).shape_problem(64))
    assert kind.refuse(UNQUANTIZED.weights) is None
    assert "leave the scheme out" in str(kind.refuse(PRESETS["w4a16"].weights))


def test_methods_that_read_text_say_so_without() -> None:
    for method in (WandaPruner(), SparseGPTPruner()):
        for missing in (None, Statistics(0)):
            with pytest.raises(QuantError, match="needs calibration text"):
                method(weight_of(4, 32), missing, UNQUANTIZED.weights, torch.float16)
