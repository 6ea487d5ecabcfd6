"""GPTQ against the textbook: columns left to right, the error pushed to the right through the Cholesky factor
of the inverse, in fp64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers import AWQQuantizer, GPTQQuantizer, MinMaxQuantizer, Quantizer, quantize_many
from quant.quantizers.factors import factorize, factorize_together
from quant.quantizers.rounding import group_parameters, weight_parameters
from quant.schemes import WeightScheme
from quant.tensors import QuantizedTensor

#: Inputs, outputs, group, symmetric, bits, order of columns.
CASES = [
    (256, 64, 128, True, 4, "static"),
    (256, 64, 32, False, 3, "none"),
    (384, 40, -1, True, 4, "none"),
    (320, 33, 64, False, 4, "static"),
    (200, 33, 40, True, 4, "none"),
    (136, 5, 8, False, 2, "static"),
    (72, 17, -1, False, 8, "none"),
]


#: NVFP4: floats in groups, with a number for the whole tensor.
FP4 = WeightScheme(4, 16, type="float", strategy="tensor_group", scales="F8_E4M3")


def hessian_of(k: int, tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    """Mean of x xᵀ of inputs that are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * 0.2 + torch.eye(k)
    x = torch.randn(tokens, k, generator=generator) @ mix * torch.rand(k, generator=generator).add(0.05)
    return x.t() @ x / tokens


def weight_of(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))


def statistics(hessian: torch.Tensor) -> Statistics:
    return Statistics(2000, hessian.clone())  # the solver may overwrite it


def textbook(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    order: str,
    search: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and how far each quotient was from the nearest tie. Frantar et al. 2022, algorithm 1
    without blocks."""
    w, h = weight.double().clone(), hessian.double().clone()
    n, k = w.shape
    g = k if scheme.group_size == -1 else scheme.group_size
    diagonal = hessian.diagonal().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h += 0.01 * torch.diag(h.diagonal())
    visit = torch.argsort(diagonal, descending=True, stable=True) if order == "static" else torch.arange(k)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[visit][:, visit]), upper=True)
    importance = torch.empty(k)
    importance[visit] = (1 / upper.diagonal().square()).float()  # what the loss counts a column's error by
    fixed = (
        weight_parameters(weight.clone(), scheme, dtype, importance, search) if order == "static" else None
    )
    codes, margin = torch.empty(n, k, dtype=torch.int8), torch.empty(n, k)
    scale, zero = torch.empty(0), None
    for i, c in enumerate(visit.tolist()):
        group = c // g
        if fixed is not None:
            scale, zero = (
                fixed[0][:, group].double(),
                None if fixed[1] is None else fixed[1][:, group].double(),
            )
        elif c % g == 0:
            now = w[:, c : c + g].float().unsqueeze(1)
            s, z = group_parameters(now, scheme, dtype, importance[None, c : c + g], search)
            scale, zero = s[:, 0].double(), None if z is None else z[:, 0].double()
        quotient = w[:, c] / scale + (0 if zero is None else zero)
        code = quotient.round().clamp(scheme.low, scheme.high)
        codes[:, c] = code.to(torch.int8)
        margin[:, c] = (quotient - quotient.floor() - 0.5).abs()
        error = (w[:, c] - (code - (0 if zero is None else zero)) * scale) / upper[i, i]
        w[:, visit[i + 1 :]] -= error[:, None] * upper[i, i + 1 :]
    return codes, margin


def loss(weight: torch.Tensor, tensor: QuantizedTensor, hessian: torch.Tensor) -> float:
    difference = (weight - tensor.dequantize()).double()
    return float(torch.einsum("nk,kj,nj->", difference, hessian.double(), difference))


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_equal_the_textbooks_until_a_quotient_falls_on_a_tie(
    case: tuple[int, int, int, bool, int, str], search: bool
) -> None:
    """fp32 and fp64 may round a tie differently; from there on that one output row goes its own way."""
    k, n, g, symmetric, bits, order = case
    scheme, weight, hessian = WeightScheme(bits, g, symmetric), weight_of(n, k), hessian_of(k)
    quantizer = GPTQQuantizer(act_order=order, clip_search=search, sweeps=0)  # type: ignore[arg-type]
    result = quantizer(weight.clone(), statistics(hessian), scheme, torch.bfloat16)
    wanted, margin = textbook(weight, hessian, scheme, torch.bfloat16, order, search)
    differing = (result.tensor.codes != wanted).any(1)
    assert int(differing.sum()) <= n * (0.1 if bits == 8 else 0.05) + 1
    assert bool((margin[differing].amin(1) < 1e-3).all())
    assert not result.fallbacks and not result.notes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_below_that_of_rounding_on_the_same_hessian(
    case: tuple[int, int, int, bool, int, str],
) -> None:
    k, n, g, symmetric, bits, order = case
    scheme, weight, hessian = WeightScheme(bits, g, symmetric), weight_of(n, k), hessian_of(k)
    rounded = MinMaxQuantizer()(weight.clone(), None, scheme, torch.bfloat16).tensor
    for search in (False, True):
        solved = GPTQQuantizer(act_order=order, clip_search=search)(
            weight.clone(), statistics(hessian), scheme, torch.bfloat16
        ).tensor  # type: ignore[arg-type]
        assert loss(weight, solved, hessian) < 0.9 * loss(weight, rounded, hessian)
        assert torch.equal(solved.scales, solved.scales.to(torch.bfloat16)) and solved.group_index is None


def test_with_an_identity_for_a_hessian_gptq_is_rounding() -> None:
    weight, scheme = weight_of(33, 96), WeightScheme(4, 32, False)
    rounded = MinMaxQuantizer()(weight.clone(), None, scheme, torch.float16).tensor
    for order in ("none", "static"):
        solved = GPTQQuantizer(act_order=order, clip_search=False, sweeps=0)(
            weight.clone(), Statistics(1, torch.eye(96)), scheme, torch.float16
        ).tensor  # type: ignore[arg-type]
        assert torch.equal(solved.codes, rounded.codes) and torch.equal(solved.scales, rounded.scales)


def test_outputs_are_independent_so_stacked_linears_equal_single_ones() -> None:
    weight, hessian, scheme = weight_of(48, 128), hessian_of(128), WeightScheme(4, 32)
    whole = GPTQQuantizer()(weight.clone(), statistics(hessian), scheme, torch.bfloat16).tensor
    for start, end in ((0, 16), (16, 48)):
        part = GPTQQuantizer()(weight[start:end].clone(), statistics(hessian), scheme, torch.bfloat16).tensor
        # other shapes, other order of sums
        assert float((part.codes != whole.codes[start:end]).float().mean()) < 0.002
        assert torch.equal(part.scales, whole.scales[start:end])


@pytest.mark.parametrize("order", ["none", "static"])
def test_dead_inputs_are_rounded_to_nearest_and_noted_and_do_not_disturb_the_others(order: str) -> None:
    weight, hessian, scheme = weight_of(16, 96), hessian_of(96), WeightScheme(4, 32)
    dead = [0, 5, 40, 41, 95]
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = GPTQQuantizer(act_order=order, clip_search=False, sweeps=0)(
        weight.clone(), statistics(hessian), scheme, torch.float32
    )  # type: ignore[arg-type]
    assert result.notes == (
        "5 of 96 inputs are zero on all calibration tokens: their columns are rounded to nearest",
    )
    scales = result.tensor.scales.float().repeat_interleave(32, 1)
    nearest = (weight / scales).round().clamp(-8, 7)
    assert torch.equal(result.tensor.codes[:, dead].float(), nearest[:, dead])
    wanted, _ = textbook(weight, hessian, scheme, torch.float32, order, False)
    assert float((result.tensor.codes != wanted).float().mean()) < 0.01


def test_an_input_that_was_zero_throughout_is_all_rounding() -> None:
    weight, scheme = weight_of(8, 64), WeightScheme(4, 32)
    result = GPTQQuantizer(clip_search=False, sweeps=0)(
        weight.clone(), Statistics(5, torch.zeros(64, 64)), scheme, torch.float16
    )
    assert torch.equal(
        result.tensor.codes, MinMaxQuantizer()(weight, None, scheme, torch.float16).tensor.codes
    )
    assert "64 of 64 inputs are zero" in result.notes[0]


def test_fewer_tokens_than_inputs_need_no_more_than_the_usual_damping() -> None:
    hessian = hessian_of(96, tokens=7)
    assert not GPTQQuantizer()(
        weight_of(8, 96), statistics(hessian), WeightScheme(4, 32), torch.float16
    ).fallbacks


def test_an_indefinite_hessian_climbs_the_damping_ladder_and_says_so() -> None:
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # smallest eigenvalue -0.05
    weight = weight_of(8, 64)
    result = GPTQQuantizer()(weight.clone(), statistics(hessian), WeightScheme(4, 32), torch.float16)
    assert result.fallbacks == ("the Hessian needed damping 0.1 instead of 0.01",)
    hessian[0, 1] = hessian[1, 0] = 3.0
    result = GPTQQuantizer()(weight.clone(), statistics(hessian), WeightScheme(4, 32), torch.float16)
    assert result.fallbacks == ("the Hessian needed damping 10 instead of 0.01",)
    assert bool(result.tensor.dequantize().isfinite().all())


@pytest.mark.parametrize("broken", ["indefinite", "NaN", "one NaN", "infinite"])
@pytest.mark.parametrize("order", ["none", "static"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_hessian_that_is_of_no_use_falls_back_to_rounding_by_name(
    broken: str, order: str, symmetric: bool
) -> None:
    hessian = hessian_of(64)
    if broken == "indefinite":
        hessian[0, 1] = hessian[1, 0] = 1000 * hessian.diagonal().max()
    elif broken == "NaN":
        hessian.fill_(torch.nan)
    elif broken == "one NaN":
        hessian[3, 7] = hessian[7, 3] = torch.nan
    else:
        hessian[3, 3] = torch.inf
    weight, scheme = weight_of(8, 64), WeightScheme(4, 32, symmetric)
    for search in (False, True):
        result = GPTQQuantizer(act_order=order, clip_search=search)(
            weight.clone(), statistics(hessian), scheme, torch.float16
        )  # type: ignore[arg-type]
        assert result.fallbacks == (
            "the Hessian is not positive definite with damping up to 10: rounded to nearest instead",
        )
        nearest = MinMaxQuantizer(clip_search=False)(weight.clone(), None, scheme, torch.float16).tensor
        assert bool(result.tensor.scales.isfinite().all()) and bool((result.tensor.scales > 0).all())
        error, wanted = ((weight - t.dequantize()).square().sum() for t in (result.tensor, nearest))
        assert float(error) <= float(wanted) * 1.5
        if not search:
            assert torch.equal(result.tensor.codes, nearest.codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zero_weights_gives_no_nan(symmetric: bool) -> None:
    weight = weight_of(8, 64)
    weight[:, :32] = 0
    weight[3] = 0
    for order in ("none", "static"):
        tensor = GPTQQuantizer(act_order=order)(
            weight.clone(), statistics(hessian_of(64)), WeightScheme(4, 32, symmetric), torch.bfloat16
        ).tensor  # type: ignore[arg-type]
        assert bool(tensor.dequantize().isfinite().all())
        assert torch.equal(tensor.dequantize()[3], torch.zeros(64))


def test_more_damping_moves_the_result_towards_rounding() -> None:
    weight, hessian, scheme = weight_of(32, 128), hessian_of(128), WeightScheme(3, 32)
    rounded = GPTQQuantizer(clip_search=False, damping=1.0)
    little, much = (
        loss(weight, q(weight.clone(), statistics(hessian), scheme, torch.float16).tensor, hessian)
        for q in (GPTQQuantizer(clip_search=False), rounded)
    )
    assert little < much


def test_without_statistics_gptq_says_what_it_needs() -> None:
    for missing in (None, Statistics(3)):
        with pytest.raises(
            QuantError,
            match="gptq needs calibration text: give --calibration-dataset, or use --method minmax",
        ):
            GPTQQuantizer()(torch.ones(2, 8), missing, WeightScheme(4, 8), torch.float16)


@pytest.mark.parametrize(
    "scheme", [WeightScheme(4, 32), WeightScheme(3, 64, False), WeightScheme(8, -1), FP4]
)
@pytest.mark.parametrize("order", ["none", "static"])
def test_weights_that_are_solved_together_get_the_codes_that_each_gets_alone(
    order: Literal["none", "static"], scheme: WeightScheme
) -> None:
    """Among them one with dead inputs and one whose Hessian is of no use, which must not touch the others."""
    quantizer, k = GPTQQuantizer(act_order=order), 192
    weights = torch.stack([weight_of(40, k) * (i + 1) for i in range(4)])
    hessians = [hessian_of(k, seed=i) for i in range(4)]
    hessians[1][:, 5] = hessians[1][5] = 0
    hessians[2].fill_(torch.nan)
    given = [statistics(h) for h in hessians]
    together = quantize_many(quantizer, weights.clone(), given, scheme, torch.bfloat16)
    for weight, hessian, made in zip(weights, hessians, together, strict=True):
        alone = quantizer(weight.clone(), statistics(hessian), scheme, torch.bfloat16)
        assert torch.equal(made.tensor.codes, alone.tensor.codes)
        assert torch.equal(made.tensor.scales.float(), alone.tensor.scales.float())
        assert (made.fallbacks, made.notes) == (alone.fallbacks, alone.notes)
    assert together[1].notes and together[2].fallbacks and not together[3].fallbacks


@pytest.mark.parametrize("quantizer", [GPTQQuantizer(), AWQQuantizer()], ids=str)
def test_several_weights_may_share_one_input(quantizer: Quantizer) -> None:
    weights, hessian = torch.stack([weight_of(24, 96), weight_of(24, 96) * 2]), hessian_of(96)
    for scheme in (WeightScheme(4, 32), FP4):
        together = quantize_many(
            quantizer, weights.clone(), [statistics(hessian)] * 2, scheme, torch.bfloat16
        )
        for weight, made in zip(weights, together, strict=True):
            alone = quantizer(weight.clone(), statistics(hessian), scheme, torch.bfloat16)
            assert torch.equal(made.tensor.codes, alone.tensor.codes)


def test_factors_made_together_are_those_made_one_by_one() -> None:
    hessians = [hessian_of(64, seed=i) for i in range(3)]
    hessians[1] -= 0.02 * hessians[1].diagonal().mean() * torch.eye(64)  # needs more damping
    hessians[2][:, 7] = hessians[2][7] = 0
    orders = [torch.argsort(h.diagonal(), descending=True) for h in hessians]
    together = factorize_together([h.clone() for h in hessians], 0.01, [*orders])
    for hessian, order, (factor, damping) in zip(hessians, orders, together, strict=True):
        alone, wanted = factorize(hessian.clone(), 0.01, order)
        assert factor is not None and alone is not None and damping == wanted
        torch.testing.assert_close(factor.upper.triu(), alone.upper.triu())
    assert together[1][1] > 0.01


@pytest.mark.parametrize("spoilt", [None, 3, 200, 440])
def test_a_factor_of_many_columns_multiplies_to_its_hessian(spoilt: int | None) -> None:
    hessian, order = hessian_of(450), torch.randperm(450, generator=torch.Generator().manual_seed(0))
    if spoilt is not None:  # whichever panel it is found in, the next rung starts from the Hessian itself
        hessian[spoilt, spoilt] = -0.02 * hessian.diagonal().mean()
    factor, damping = factorize(hessian.clone(), 0.01, order)
    assert factor is not None and (damping > 0.01) == (spoilt is not None)
    wanted = hessian[order][:, order].double()
    own, mean = wanted.diagonal().clone(), wanted.diagonal().mean()
    wanted += damping * torch.diag(own if spoilt is None else torch.maximum(own, mean))
    upper = factor.upper.triu().double()
    torch.testing.assert_close(upper @ upper.t(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.max()))


def test_codes_do_not_depend_on_the_units_of_the_inputs() -> None:
    """An input a thousand times as large, read by weights a thousand times as small, is the same linear;
    damping by the mean of the diagonal would let it take from the others what they have in common."""
    weight, hessian, scheme = weight_of(24, 96), hessian_of(96), WeightScheme(4, 8)
    factors = torch.ones(96)
    factors[40:48] = 1024.0  # a group: its scales take it up
    scaled = hessian * factors * factors[:, None]
    plain, other = (
        GPTQQuantizer(clip_search=False, act_order="none")(w, statistics(h), scheme, torch.float32).tensor
        for w, h in ((weight.clone(), hessian), (weight / factors, scaled))
    )
    assert torch.equal(plain.codes, other.codes)
