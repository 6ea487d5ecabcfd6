"""Rounding under two Hessians against the same written as loops in fp64, and what refits and sweeps
promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers import GPTQQuantizer, Quantized, YAQAQuantizer, two_sided
from quant.quantizers.factors import Factor, factorize, smallest_last
from quant.quantizers.grids import Grid
from quant.quantizers.rounding import weight_parameters
from quant.quantizers.two_sided import Codes, blocks_of, descend, feed_back, loss, refit
from quant.schemes import WeightScheme
from tests.quantizers.test_gptq import hessian_of, weight_of
from tests.quantizers.test_refining import SCHEMES

#: Outputs, inputs, group, symmetric, bits, outputs of a block.
CASES = [
    (40, 64, 16, True, 4, 40),
    (24, 96, 32, False, 3, 8),
    (33, 40, -1, True, 3, 12),
    (17, 72, 72, False, 4, 9),
    (6, 32, 8, True, 2, 1),
]
#: Tokens that leave nothing to doubt.
MANY = 1 << 40
Case = tuple[int, int, int, bool, int, int]


def outputs_of(n: int, most: int) -> torch.Tensor:
    """H_O of so many outputs, zero behind the last one."""
    count, size = blocks_of(n, most)
    made = torch.zeros(count, size, size)
    for i, block in enumerate(made):
        used = min(size, n - i * size)
        block[:used, :used] = hessian_of(used, seed=7 + i)
    return made


def factors_of(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R of each block, in the order of its rows, and that order."""
    rows = torch.argsort(outputs.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    made = [factorize(block.clone(), 0.01, order)[0] for block, order in zip(outputs, rows, strict=True)]
    return torch.stack([x.upper for x in made if x is not None]), rows


def unit(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """fp64 U, upper triangular with ones, of H = U D Uᵀ with 1 % more on its diagonal, in an order."""
    damped = hessian.double().clone()
    dead = damped.diagonal() == 0
    damped[dead, dead] = 1
    damped += 0.01 * torch.diag(damped.diagonal())
    upper = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
    return upper / upper.diagonal()


def one_by_one(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    scheme: WeightScheme,
) -> torch.Tensor:
    """Codes [N, K]: every weight in its turn, with every sum written out."""
    n, k = weight.shape
    size, group = outputs.shape[1], k // scales.shape[1]
    codes = torch.zeros(n, k)
    across = unit(inputs, columns)
    for block in range(len(outputs)):
        order = [block * size + int(r) for r in rows[block]]
        along = unit(outputs[block], rows[block])
        errors, moved = torch.zeros(size, k).double(), torch.zeros(size, k).double()
        for a, column in enumerate(columns.tolist()):
            for b, row in enumerate(order):
                if row >= n:
                    continue
                fed = sum(float(errors[b, c] * across[c, a]) for c in range(a))
                value = float(weight[row, column]) + fed
                value += sum(float(moved[j, a] * along[j, b]) for j in range(b))
                scale = float(scales[row, column // group])
                zero = 0.0 if zeros is None else float(zeros[row, column // group])
                code = min(max(round(value / scale + zero), scheme.low), scheme.high)
                codes[row, column] = code
                errors[b, a] = float(weight[row, column]) - (code - zero) * scale
                moved[b, a] = errors[b, a] + fed
    return codes


def problem(case: Case) -> tuple[torch.Tensor, Codes, torch.Tensor, torch.Tensor]:
    """A weight, its codes after feedback, and both Hessians as they were damped."""
    n, k, group, symmetric, bits, most = case
    weight, scheme = weight_of(n, k), WeightScheme(bits, group, symmetric)
    inputs, outputs = hessian_of(k), outputs_of(n, most)
    scales, zeros = weight_parameters(weight, scheme, torch.bfloat16, inputs.diagonal(), True)
    columns = torch.argsort(inputs.diagonal(), descending=True, stable=True)
    factor, _ = factorize(inputs.clone(), 0.01, columns)
    assert factor is not None
    factors, rows = factors_of(outputs)
    grid = Grid(scheme, torch.bfloat16)
    codes = feed_back(weight, scales, zeros, factor.upper, columns, factors, rows, grid)
    return weight, Codes(codes, scales, zeros, grid), inputs, outputs


@pytest.mark.parametrize("tile", [5, 16, 128])
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_codes_are_those_of_the_loops(case: Case, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 and fp64 may round a tie differently, and what follows it in the block."""
    monkeypatch.setattr(two_sided, "_TILE", tile)
    weight, made, inputs, outputs = problem(case)
    columns = torch.argsort(inputs.diagonal(), descending=True, stable=True)
    rows = factors_of(outputs)[1]
    scheme = WeightScheme(case[4], case[2], case[3])
    wanted = one_by_one(weight, made.scales, made.zeros, inputs, outputs, columns, rows, scheme)
    assert float((made.codes != wanted).float().mean()) < 0.002


@pytest.mark.parametrize("case", CASES, ids=str)
def test_feedback_along_both_sides_lowers_the_loss_and_refits_and_sweeps_never_raise_it(case: Case) -> None:
    weight, made, inputs, outputs = problem(case)
    plain = replace(made, codes=made.grid.rounded(weight, made.scales, made.zeros))
    losses = [loss(x.errors(weight), inputs, outputs) for x in (plain, made)]
    assert float(losses[1].sum()) < 0.9 * float(losses[0].sum())
    for _ in range(3):
        made, before, after = refit(weight, made, inputs, outputs)
        torch.testing.assert_close(before, losses[-1], rtol=1e-3, atol=1e-5)
        assert torch.equal(made.scales, made.scales.bfloat16().float()) and bool((made.scales > 0).all())
        losses.append(loss(made.errors(weight), inputs, outputs))
        torch.testing.assert_close(after, losses[-1], rtol=1e-3, atol=1e-5)
        made, gained = descend(weight, made, inputs, outputs)
        assert torch.equal(made.codes, made.grid.nearest(made.codes.clone()))
        losses.append(loss(made.errors(weight), inputs, outputs))
        torch.testing.assert_close(losses[-2] - gained, losses[-1], rtol=1e-3, atol=1e-4)
    for before, after in zip(losses[1:], losses[2:], strict=False):  # of every block
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(losses[-1].sum()) < 0.95 * float(losses[1].sum())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_the_trace(case: Case) -> None:
    weight, made, inputs, outputs = problem(case)
    errors = made.errors(weight).double()
    whole = torch.block_diag(*outputs.double())[: len(errors), : len(errors)]
    wanted = torch.trace(whole @ errors @ inputs.double() @ errors.t())
    assert float(loss(errors.float(), inputs, outputs).sum()) == pytest.approx(float(wanted), rel=1e-4)


def test_a_refit_finds_the_scales_that_codes_were_made_with() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (24, 64), generator=generator).float()
    scales = torch.rand(24, 4, generator=generator).add(0.5).bfloat16().float()
    grid = Grid(WeightScheme(4, 16), torch.bfloat16)
    made = Codes(codes, scales, None, grid)
    weight = -made.errors(torch.zeros(24, 64))
    start = Codes(codes, (scales * 1.1).bfloat16().float(), None, grid)
    found, _, _ = refit(weight, start, hessian_of(64), outputs_of(24, 24), steps=60)
    assert torch.equal(found.scales, scales)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
def test_with_an_identity_of_the_outputs_codes_are_gptqs_to_the_bit(symmetric: bool, group: int) -> None:
    weight, hessian, scheme = weight_of(48, 96), hessian_of(96), WeightScheme(4, group, symmetric)
    one_sided = GPTQQuantizer(sweeps=0)(
        weight.clone(), Statistics(MANY, hessian.clone()), scheme, torch.bfloat16
    )
    both = YAQAQuantizer(sweeps=0)(
        weight.clone(),
        Statistics(MANY, hessian.clone(), gradients=3.0 * torch.eye(24).expand(2, 24, 24)),
        scheme,
        torch.bfloat16,
    )
    assert torch.equal(one_sided.tensor.codes, both.tensor.codes)
    assert torch.equal(one_sided.tensor.scales, both.tensor.scales)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pieces_of_a_weight_make_the_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, group, symmetric, bits, most = case
    scheme = WeightScheme(bits, group, symmetric)

    def made() -> torch.Tensor:
        statistics = Statistics(MANY, hessian_of(k), gradients=outputs_of(n, most))
        return YAQAQuantizer()(weight_of(n, k), statistics, scheme, torch.float16).tensor.dequantize()

    whole = made()
    monkeypatch.setattr("quant.quantizers.yaqa._AT_ONCE", 1)
    assert float((made() - whole).norm() / whole.norm()) < 0.05  # sums of other shapes may turn ties


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_each_round_of_refits_and_sweeps_lowers_the_loss_of_the_one_before(case: Case) -> None:
    n, k, group, symmetric, bits, most = case
    weight, hessian, outputs = weight_of(n, k), hessian_of(k), outputs_of(n, most)
    damped = hessian + 0.01 * torch.diag(hessian.diagonal())
    both = outputs + 0.01 * torch.diag_embed(outputs.diagonal(dim1=1, dim2=2))

    def lost(rounds: int) -> float:
        statistics = Statistics(MANY, hessian.clone(), gradients=outputs.clone())
        scheme = WeightScheme(bits, group, symmetric)
        made = YAQAQuantizer(rounds=rounds)(weight.clone(), statistics, scheme, torch.float32)
        assert f"adds about {lost_of(made):.2g} nats" in made.notes[0]
        return lost_of(made)

    def lost_of(made: Quantized) -> float:
        errors = weight - made.tensor.dequantize()
        return float(loss(errors, damped, both).sum() / (2 * hessian.diagonal().sum()))

    one, two, many = lost(1), lost(2), lost(6)
    assert many <= two < one


@pytest.mark.parametrize("method", [YAQAQuantizer, GPTQQuantizer])
@pytest.mark.parametrize(("bits", "sweeps"), [(2, 0), (3, 1), (4, 1)])
def test_negative_scales_lower_the_loss_and_reach_the_file(
    bits: int, sweeps: int, method: type[YAQAQuantizer] | type[GPTQQuantizer]
) -> None:
    weight, hessian, outputs = weight_of(48, 192), hessian_of(192), outputs_of(48, 24)

    def made(symmetric: bool, signed: bool) -> Quantized:
        statistics = Statistics(MANY, hessian.clone(), gradients=outputs.clone())
        quantizer = method(sweeps=sweeps, signed=signed)
        return quantizer(weight.clone(), statistics, WeightScheme(bits, 32, symmetric), torch.bfloat16)

    def lost(result: Quantized) -> float:
        of = outputs if method is YAQAQuantizer else torch.eye(24).expand(2, 24, 24)
        return float(loss(weight - result.tensor.dequantize(), hessian, of).sum())

    plain, signed = made(True, False), made(True, True)
    negative = int((signed.tensor.scales < 0).sum())
    assert 0.2 < negative / signed.tensor.scales.numel() < 0.8
    assert f"{negative} of 288 scales are negative: not for VLLM_MARLIN_INPUT_DTYPE=int8" in signed.notes
    assert bool((plain.tensor.scales > 0).all()) and lost(signed) < 0.97 * lost(plain)
    # zero points do the same
    assert torch.equal(made(False, True).tensor.scales, made(False, False).tensor.scales)


def pivots_of(hessian: torch.Tensor) -> torch.Tensor:
    """The order in which the smallest element left is taken from the end, by fp64 rank-one updates."""
    left, remaining, chosen = hessian.double().clone(), list(range(len(hessian))), []
    while remaining:
        least = min(remaining, key=lambda i: float(left[i, i]))
        chosen.append(least)
        remaining.remove(least)
        left -= torch.outer(left[:, least], left[least]) / left[least, least]
    return torch.tensor(chosen[::-1])


@pytest.mark.parametrize("k", [1, 7, 64, 129, 300])
def test_columns_are_ordered_from_the_smallest_that_is_left(k: int) -> None:
    hessians = torch.stack([hessian_of(k, seed=s) + 0.01 * torch.eye(k) for s in (1, 2)])
    wanted = [pivots_of(h) for h in hessians]
    assert torch.equal(smallest_last(hessians.clone()), torch.stack(wanted))
    # of what is nearly singular, and of what is zero, each column once
    hostile = torch.stack([torch.ones(k, k), torch.zeros(k, k)])
    assert torch.equal(smallest_last(hostile).sort(1).values, torch.arange(k).expand(2, k))


def test_that_order_leaves_less_to_count_errors_by_than_falling_diagonals() -> None:
    hessian = hessian_of(96)

    def counted(order: torch.Tensor) -> float:
        factor, _ = factorize(hessian.clone(), 0.01, order)
        assert factor is not None
        return float(factor.importance(order).sum())

    falling = torch.argsort(hessian.diagonal(), descending=True)
    damped = hessian + 0.01 * torch.diag(hessian.diagonal())
    assert counted(smallest_last(damped[None])[0]) < 0.99 * counted(falling)


@pytest.mark.parametrize(
    ("bits", "symmetric", "signed", "share"),
    [(3, True, False, 0.998), (4, True, True, 0.99), (4, False, False, 0.95)],
)
def test_ranges_by_the_expected_error_lower_the_loss_after_feedback(
    bits: int, symmetric: bool, signed: bool, share: float
) -> None:
    scheme, grid = WeightScheme(bits, 64, symmetric), Grid(WeightScheme(bits, 64, symmetric), torch.bfloat16)
    lost = {False: 0.0, True: 0.0}
    for seed in range(3):
        weight, hessian = weight_of(96 - seed, 256), hessian_of(256, seed=seed)
        outputs = hessian_of(96 - seed, seed=50 + seed)[None]
        factors, rows = factors_of(outputs)
        order = torch.argsort(hessian.diagonal(), descending=True)
        factor, _ = factorize(hessian.clone(), 0.01, order)
        assert factor is not None
        counted = Factor(factor.upper).importance(order)
        for fed in lost:
            given = weight_parameters(weight, scheme, torch.bfloat16, counted, True, signed, fed)
            codes = feed_back(weight, *given, factor.upper, order, factors, rows, grid)
            lost[fed] += float(loss(Codes(codes, *given, grid).errors(weight), hessian, outputs).sum())
    assert lost[True] < share * lost[False]


@pytest.mark.parametrize(("symmetric", "outliers"), [(True, 24), (False, 8)])
def test_columns_that_read_outliers_do_not_cut_the_ranges_of_the_others(
    symmetric: bool, outliers: int
) -> None:
    scheme = WeightScheme(4, 128, symmetric)
    factors = torch.ones(384)
    factors[torch.randperm(384, generator=torch.Generator().manual_seed(1))[:outliers]] = 256.0
    weight, hessian = weight_of(96, 384) / factors, hessian_of(384) * factors * factors[:, None]
    outputs = hessian_of(96, seed=9)[None]
    one_sided, both = (
        quantizer(
            weight.clone(), Statistics(MANY, hessian.clone(), gradients=outputs), scheme, torch.bfloat16
        )
        for quantizer in (GPTQQuantizer(), YAQAQuantizer())
    )
    losses = [float(loss(weight - x.tensor.dequantize(), hessian, outputs).sum()) for x in (one_sided, both)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("size", [192, 256, 512])
def test_of_a_large_block_a_sweep_changes_more_codes(size: int) -> None:
    grid = Grid(WeightScheme(4, -1), torch.float32)
    made = Codes(torch.zeros(size, 3), torch.ones(size, 1), None, grid)
    after, gained = descend(torch.ones(size, 3), made, torch.eye(3), torch.eye(size)[None])
    changed = 3 * 4 * max(1, size // 256)
    assert int((after.codes == 1).sum()) == changed == int(gained.sum())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if YAQAQuantizer.refuse(s) is None], ids=str)
def test_whatever_the_scheme_the_loss_is_below_gptqs(scheme: WeightScheme) -> None:
    weight, hessian, outputs = weight_of(48, 192), hessian_of(192), outputs_of(48, 24)
    one_sided = GPTQQuantizer()(weight.clone(), Statistics(MANY, hessian.clone()), scheme, torch.bfloat16)
    both = YAQAQuantizer()(
        weight.clone(), Statistics(MANY, hessian.clone(), gradients=outputs), scheme, torch.bfloat16
    )
    assert not both.fallbacks and both.tensor.codes.dtype == one_sided.tensor.codes.dtype
    losses = [float(loss(weight - x.tensor.dequantize(), hessian, outputs).sum()) for x in (one_sided, both)]
    assert losses[1] < 0.9 * losses[0]
    if scheme.strategy == "tensor_group":
        scales = both.tensor.scales
        assert scales.dtype == torch.float8_e4m3fn and both.tensor.global_scale is not None
        whole = YAQAQuantizer()(
            weight.clone(),
            Statistics(MANY, hessian.clone(), gradients=outputs),
            scheme,
            torch.bfloat16,
            2 * weight.abs().max(),
        )
        assert float(whole.tensor.global_scale) == pytest.approx(float(both.tensor.global_scale) / 2)


def test_hessians_that_are_of_no_use_are_named() -> None:
    weight, scheme = weight_of(8, 64), WeightScheme(4, 32)
    broken = torch.eye(8)
    broken[0, 1] = broken[1, 0] = 1000.0
    result = YAQAQuantizer()(
        weight.clone(), Statistics(99, hessian_of(64), gradients=broken[None]), scheme, torch.float16
    )
    assert result.fallbacks == (
        "the Hessian of some of its outputs is not positive definite: those do not feed back on each other",
    )
    assert bool(result.tensor.dequantize().isfinite().all())
    broken = hessian_of(64)
    broken[0, 1] = broken[1, 0] = 1000 * broken.diagonal().max()
    result = YAQAQuantizer()(
        weight.clone(), Statistics(99, broken, gradients=torch.eye(8)[None]), scheme, torch.float16
    )
    assert "rounded to nearest instead" in result.fallbacks[0]
    dead = YAQAQuantizer()(
        weight.clone(),
        Statistics(99, torch.zeros(64, 64), gradients=torch.zeros(1, 8, 8)),
        scheme,
        torch.float16,
    )
    assert dead.fallbacks == (
        "its inputs, or the gradients at its outputs, are zero on all calibration tokens: rounded to nearest "
        "instead",
    )
    assert not dead.notes and bool(dead.tensor.dequantize().isfinite().all())


def test_what_no_gradient_reaches_is_rounded_as_gptq_does_and_named() -> None:
    scheme = WeightScheme(4, 32)
    wanted = GPTQQuantizer()(weight_of(8, 64), Statistics(MANY, hessian_of(64)), scheme, torch.float16)
    made = YAQAQuantizer()(weight_of(8, 64), Statistics(MANY, hessian_of(64)), scheme, torch.float16)
    assert made.fallbacks == ("no gradient reaches its outputs: rounded as gptq does",)
    assert torch.equal(made.tensor.codes, wanted.tensor.codes) and made.notes == wanted.notes


def test_outputs_that_few_tokens_were_seen_of_are_damped_and_named() -> None:
    weight, scheme = weight_of(24, 64), WeightScheme(4, 32)

    def made(tokens: int, gradients: torch.Tensor) -> Quantized:
        return YAQAQuantizer()(
            weight.clone(), Statistics(tokens, hessian_of(64), gradients=gradients), scheme, torch.float16
        )

    gradients = outputs_of(24, 24)
    assert made(96, gradients).fallbacks == made(MANY, gradients).fallbacks == ()
    few = made(24, gradients)
    assert few.fallbacks == (
        "24 tokens show how 24 of its outputs depend on each other, which is less than 4 for each: what they "
        "say counts 20%",
    )
    # as if 96 more had shown no output to depend on another, and 64 no input
    diagonals = torch.diag_embed(gradients.diagonal(dim1=1, dim2=2))
    hessian = hessian_of(64) * 24 / 88
    hessian.diagonal().mul_(88 / 24)
    wanted = Statistics(MANY, hessian, gradients=gradients / 5 + diagonals * 4 / 5)
    codes = YAQAQuantizer()(weight.clone(), wanted, scheme, torch.float16).tensor.codes
    assert float((few.tensor.codes != codes).float().mean()) < 0.01  # a tie may turn


@pytest.mark.parametrize("symmetric", [True, False])
def test_several_weights_at_once_become_what_each_becomes_alone(symmetric: bool) -> None:
    """One of them without feedback among its outputs, one of no use."""
    scheme, count = WeightScheme(3, 32, symmetric), 5
    weights = torch.stack([weight_of(40, 96) * (1 + i) for i in range(count)])
    gradients = [outputs_of(40, 20) * (1 + i) for i in range(count)]
    gradients[1] = torch.eye(20).expand(2, 20, 20).clone()
    hessians = [hessian_of(96, seed=i) for i in range(count)]
    hessians[3] = torch.zeros(96, 96)
    given = [Statistics(999, h, gradients=g) for h, g in zip(hessians, gradients, strict=True)]
    alone = [
        YAQAQuantizer()(w.clone(), s.copy(), scheme, torch.bfloat16)
        for w, s in zip(weights, given, strict=True)
    ]
    together = YAQAQuantizer().many(weights.clone(), [s.copy() for s in given], scheme, torch.bfloat16)
    for one, made in zip(alone, together, strict=True):
        assert made.fallbacks == one.fallbacks and len(made.notes) == len(one.notes)
        # sums of other shapes may turn ties
        different = made.tensor.dequantize() - one.tensor.dequantize()
        assert float(different.norm() / one.tensor.dequantize().norm()) < 0.02
    assert together[3].fallbacks and not together[1].fallbacks


def test_what_it_cannot_do_is_refused() -> None:
    blocks = WeightScheme(8, 128, type="float", strategy="block", scales="F32")
    assert "use --method fp8 or gptq" in str(YAQAQuantizer.refuse(blocks))
    assert YAQAQuantizer.refuse(WeightScheme(3, 64, False)) is None
    with pytest.raises(QuantError, match="yaqa needs calibration text"):
        YAQAQuantizer()(weight_of(8, 64), Statistics(99), WeightScheme(4, 32), torch.float16)
    with pytest.raises(ValueError, match="damping is 0"):
        YAQAQuantizer(damping=0)
    with pytest.raises(ValueError, match="sweeps is -1"):
        YAQAQuantizer(sweeps=-1)
