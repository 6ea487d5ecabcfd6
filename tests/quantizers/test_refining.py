"""Scales fitted and codes changed after rounding, against the same written as loops in fp64, and what they
promise."""

from __future__ import annotations

import pytest
import torch

from quant.quantizers import GPTQQuantizer, refining
from quant.quantizers.factors import factorize
from quant.quantizers.rounding import weight_parameters
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor, scale_values
from tests.quantizers.test_gptq import FP4, hessian_of, statistics, weight_of

SCHEMES = [
    WeightScheme(4, 32),
    WeightScheme(3, 16, False),
    WeightScheme(2, 48),
    WeightScheme(4, -1),
    WeightScheme(4, -1, False),
    WeightScheme(8, -1, scales="F32"),
    FP4,
    WeightScheme(4, 32, type="float", strategy="group", scales="U8"),
    WeightScheme(8, -1, type="float", scales="F32"),
    WeightScheme(8, -1, type="float", strategy="tensor", scales="F32"),
    WeightScheme(8, 128, type="float", strategy="block", scales="F32"),
]


def losses(weight: torch.Tensor, tensor: QuantizedTensor, hessian: torch.Tensor) -> torch.Tensor:
    """fp64 [N], of each output, under the damped Hessian."""
    errors = (weight - tensor.dequantize()).double()
    damped = hessian.double() + 0.01 * torch.diag(hessian.diagonal().double())
    return ((errors @ damped) * errors).sum(1)


@pytest.mark.parametrize("order", ["none", "static"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sweeps_lower_the_loss_and_raise_that_of_no_output(scheme: WeightScheme, order: str) -> None:
    weight, hessian = weight_of(48, 192), hessian_of(192)
    steps = []
    for sweeps in range(4):
        made = GPTQQuantizer(act_order=order, sweeps=sweeps)(  # type: ignore[arg-type]
            weight.clone(), statistics(hessian), scheme, torch.bfloat16
        ).tensor
        steps.append(losses(weight, made, hessian))
        assert bool((steps[-1] <= steps[max(sweeps - 1, 0)] * (1 + 1e-5)).all())
    assert float(steps[-1].sum()) < 0.99 * float(steps[0].sum())
    if scheme.scales == "model":
        assert made.scales.dtype == torch.bfloat16 and bool((made.scales > 0).all())
    if scheme.strategy in ("tensor", "block") or scheme.scales == "U8":
        plain = GPTQQuantizer(act_order=order, sweeps=0)(  # type: ignore[arg-type]
            weight.clone(), statistics(hessian), scheme, torch.bfloat16
        ).tensor
        assert torch.equal(made.scales, plain.scales)


def one_by_one(
    weight: torch.Tensor, start: QuantizedTensor, hessian: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Values fp64 [N, K]: group by group the scale of least loss, then code by code that of least loss."""
    scheme, (n, k) = start.scheme, weight.shape
    scales, group = scale_values(start.scales).double(), k // start.scales.shape[1]
    zeros = None if start.zeros is None else start.zeros.double()
    codes, wanted = start.codes.double(), weight.double()

    def values() -> torch.Tensor:
        shifted = codes if zeros is None else codes - zeros.repeat_interleave(group, 1)
        return shifted * scales.repeat_interleave(group, 1)

    def fit(a: int) -> None:
        own = slice(a * group, (a + 1) * group)
        for row in range(n):
            shifted = torch.zeros(k).double()
            shifted[own] = codes[row, own] - (0 if zeros is None else zeros[row, a])
            pushed = hessian @ (wanted - values())[row]
            curve = float(shifted @ hessian @ shifted)
            best = float(scales[row, a]) + float(shifted @ pushed) / curve
            best = float(torch.tensor(best).bfloat16())
            change = best - float(scales[row, a])
            if change * (change * curve - 2 * float(shifted @ pushed)) < 0:
                scales[row, a] = best

    def change(columns: list[int]) -> None:
        for c in columns:
            pushed = (wanted - values()) @ hessian[:, c]
            number = codes[:, c] + pushed / (hessian[c, c] * scales[:, c // group])
            codes[:, c] = number.round().clamp(scheme.low, scheme.high)

    groups = [[c for c in order.tolist() if c // group == a] for a in range(k // group)]
    if group > refining._PANEL:
        for a in range(k // group):
            fit(a)
        change(order.tolist())
    else:
        for a, columns in enumerate(groups):
            fit(a)
            change(columns)
    return values()


@pytest.mark.parametrize(
    ("scheme", "panel"),
    [
        (WeightScheme(4, 32), 128),
        (WeightScheme(4, 8, False), 32),
        (WeightScheme(3, 16), 16),
        (WeightScheme(4, -1, False), 40),
        (WeightScheme(3, 48), 32),
    ],
    ids=str,
)
def test_a_sweep_is_that_of_the_loops(
    scheme: WeightScheme, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 and fp64 may round a tie differently, and what follows it in the row."""
    monkeypatch.setattr(refining, "_PANEL", panel)
    monkeypatch.setattr(refining, "_RUN", 12)
    weight, hessian = weight_of(24, 96), hessian_of(96)
    start, made = (
        GPTQQuantizer(sweeps=s)(weight.clone(), statistics(hessian), scheme, torch.bfloat16).tensor
        for s in (0, 1)
    )
    damped = hessian.double() + 0.01 * torch.diag(hessian.diagonal().double())
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    wanted = one_by_one(weight, start, damped, order)
    assert not torch.equal(made.dequantize(), start.dequantize())
    differing = (made.dequantize() - wanted.float()).abs().amax(1) > 1e-5
    assert int(differing.sum()) <= 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_not_fitted_to_inputs_that_are_always_zero(symmetric: bool) -> None:
    """However small the others are."""
    weight, hessian, scheme = weight_of(16, 64), hessian_of(64) * 1e-9, WeightScheme(3, 32, symmetric)
    dead = [0, 5, 40]
    hessian[dead] = 0
    hessian[:, dead] = 0
    before, after = (
        GPTQQuantizer(sweeps=s)(weight.clone(), statistics(hessian), scheme, torch.float32).tensor
        for s in (0, 2)
    )
    lower = losses(weight, after, hessian) / losses(weight, before, hessian)
    assert bool((lower <= 1 + 1e-5).all()) and float(lower.mean()) < 0.95


@pytest.mark.parametrize("k", [40, 192, 450])
def test_a_factor_gives_its_hessian_back(k: int) -> None:
    hessian, order = hessian_of(k), torch.randperm(k, generator=torch.Generator().manual_seed(0))
    factor, _ = factorize(hessian.clone(), 0.01, order)
    assert factor is not None
    wanted = hessian[order][:, order]
    wanted += 0.01 * torch.diag(wanted.diagonal())
    torch.testing.assert_close(factor.hessian(), wanted)


def test_a_scale_that_would_vanish_stays() -> None:
    """All codes but one are zero, and that one's input has errors of the other sign pushed onto it."""
    hessian = torch.ones(8, 8) + 1e-3 * torch.eye(8)
    weight = torch.tensor([[1.0, -4.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
    scales, _ = weight_parameters(weight, WeightScheme(2, 8), torch.float32)
    made = GPTQQuantizer(sweeps=5)(weight, statistics(hessian), WeightScheme(2, 8), torch.float32).tensor
    assert bool((made.scales > 1e-3 * scales).all()) and bool(made.dequantize().isfinite().all())


def test_sweeps_are_counted() -> None:
    with pytest.raises(ValueError, match="sweeps is -1: must be from 0 to 100"):
        GPTQQuantizer(sweeps=-1)
