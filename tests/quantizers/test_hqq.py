"""HQQ against a reference that treats one group at a time, and what it promises: values a file can hold, and
never more error than plain rounding."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from quant.errors import Problems, QuantError
from quant.evaluation.quality import evaluate
from quant.pipeline.plan import plan_job
from quant.quantizers import HQQQuantizer, MinMaxQuantizer
from quant.quantizers.hqq import line, shrink
from quant.quantizers.rounding import group_parameters
from quant.schemes import WeightScheme
from tests.helpers import TINYLM, quantize, recipe
from tests.quantizers.test_rounding import DTYPES, SCHEMES, weight_of


def slow_hqq(
    group: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype, settings: HQQQuantizer
) -> tuple[float, int, float]:
    """Scale, zero point and squared error of one group [g], in fp64 but for what is stored."""
    start = group_parameters(group[None, None], scheme, dtype)
    scale, zero = float(start[0]), 0.0 if start[1] is None else float(start[1])
    values = [float(x) for x in group]

    def code(x: float, s: float, z: float) -> int:
        return min(max(round(x / s + z), scheme.low), scheme.high)

    def cost(s: float, z: float) -> float:
        return sum(((code(x, s, z) - z) * s - x) ** 2 for x in values)

    best = (cost(scale, zero), scale, zero)
    penalty = settings.penalty
    for _ in range(settings.iterations):
        codes = [code(x, scale, zero) for x in values]
        wanted = []
        for x, q in zip(values, codes, strict=True):
            error = x / scale - (q - zero)
            left = abs(error) - abs(error) ** (settings.norm - 1) / penalty if error else 0.0
            wanted.append(x - (max(left, 0.0) if error > 0 else -max(left, 0.0)) * scale)
        if not scheme.symmetric:
            q_mean, w_mean = sum(codes) / len(codes), sum(wanted) / len(wanted)
            spread = sum((q - q_mean) ** 2 for q in codes)
            slope = (
                sum((q - q_mean) * (w - w_mean) for q, w in zip(codes, wanted, strict=True)) / spread
                if spread
                else 0.0
            )
            if slope > 0:
                scale, zero = slope, q_mean - w_mean / slope
        stored_zero = min(max(round(zero), scheme.low), scheme.high)
        steps = sum((q - stored_zero) ** 2 for q in codes)
        slope = (
            sum((q - stored_zero) * w for q, w in zip(codes, wanted, strict=True)) / steps if steps else 0.0
        )
        stored = float(torch.tensor(slope if slope > 0 else best[1]).to(dtype))
        if scheme.symmetric:
            scale = stored
        found = (cost(stored, stored_zero), stored, stored_zero)
        if found[0] < best[0]:
            best = found
        penalty *= settings.growth
    return best[1], int(best[2]), best[0]


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.group_size != 8], ids=str)
def test_it_finds_what_the_reference_finds(scheme: WeightScheme) -> None:
    weight = weight_of(8, 80, seed=3)
    settings = HQQQuantizer(iterations=6)
    tensor = settings(weight.clone(), None, scheme, torch.bfloat16).tensor
    missed = (tensor.dequantize() - weight).square()
    alike = 0
    for row, column in itertools.product(range(8), range(tensor.scales.shape[1])):
        part = slice(column * 80 // tensor.scales.shape[1], (column + 1) * 80 // tensor.scales.shape[1])
        scale, zero, cost = slow_hqq(weight[row, part], scheme, torch.bfloat16, settings)
        assert float(missed[row, part].sum()) == pytest.approx(cost, rel=0.05, abs=1e-12)
        alike += (
            float(tensor.scales[row, column]),
            0 if tensor.zeros is None else int(tensor.zeros[row, column]),
        ) == (scale, zero)
    assert alike >= 0.8 * tensor.scales.numel()  # a quotient on a tie may go another way in fp64


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_are_those_of_the_file_and_no_group_is_worse_than_rounded_plainly(
    scheme: WeightScheme,
) -> None:
    weight = weight_of(12, 80)
    for dtype in DTYPES:
        made = HQQQuantizer()(weight.clone(), None, scheme, dtype).tensor
        plain = MinMaxQuantizer()(weight.clone(), None, scheme, dtype).tensor
        assert made.codes.dtype == torch.int8 and made.scales.dtype == dtype and bool((made.scales > 0).all())
        assert (made.zeros is None) == scheme.symmetric
        for part in (made.codes, *([] if made.zeros is None else [made.zeros])):
            assert part.min() >= scheme.low and part.max() <= scheme.high
        groups = (12, made.scales.shape[1], -1)
        errors = [(t.dequantize() - weight).square().view(groups).sum(-1) for t in (made, plain)]
        assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())
        assert float(errors[0].sum()) < float(errors[1].sum()) or scheme.bits == 8


def test_zero_and_constant_groups_and_extreme_weights_stay_finite() -> None:
    weight = torch.zeros(6, 32)
    weight[1], weight[2] = 0.25, -0.25
    weight[3] = 1e-30
    weight[4] = 1e30 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    weight[5, 7] = 3.0
    for symmetric, dtype in itertools.product((True, False), (torch.bfloat16, torch.float32)):
        value = HQQQuantizer()(
            weight.clone(), None, WeightScheme(4, 16, symmetric), dtype
        ).tensor.dequantize()
        assert bool(value.isfinite().all())
        assert torch.equal(value[0], torch.zeros(32))
        assert torch.allclose(value[1:3], weight[1:3], rtol=0.01)
        assert float(value[5, 7]) == pytest.approx(3.0, rel=0.01) and value[5].count_nonzero() == 1


def test_shrinking_is_the_papers_formula_and_soft_thresholding_at_p_1() -> None:
    values = torch.linspace(-3, 3, 121)
    assert torch.allclose(shrink(values, 2.0, 1.0), torch.nn.functional.softshrink(values, 0.5))
    half = shrink(values, 3.0, 0.5)
    for x, y in zip(values.tolist(), half.tolist(), strict=True):
        wanted = 0.0 if x == 0 else max(abs(x) - abs(x) ** -0.5 / 3, 0.0)
        assert y == pytest.approx(wanted if x > 0 else -wanted, abs=1e-6)
    assert float(half[60]) == 0.0


def test_the_line_is_that_of_least_squares_and_stays_where_there_is_none() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (5, 40), generator=generator).float()
    wanted = codes * 0.3 + 1 + 0.05 * torch.randn(5, 40, generator=generator)
    slope, zero = line(codes, wanted, torch.ones(5, 1), torch.zeros(5, 1))
    for row in range(5):
        solution = torch.linalg.lstsq(torch.stack([codes[row], torch.ones(40)], 1), wanted[row]).solution
        assert float(slope[row]) == pytest.approx(float(solution[0]), rel=1e-4)
        assert float(-zero[row] * slope[row]) == pytest.approx(float(solution[1]), rel=1e-4)
    slope, zero = line(torch.ones(1, 4), torch.rand(1, 4), torch.full((1, 1), 7.0), torch.full((1, 1), 3.0))
    assert (float(slope), float(zero)) == (7.0, 3.0)


def test_rows_do_not_depend_on_one_another() -> None:
    # more than are searched at a time
    weight = torch.randn(5000, 64, generator=torch.Generator().manual_seed(2))
    scheme = WeightScheme(4, 32, False)
    whole = HQQQuantizer()(weight.clone(), None, scheme, torch.bfloat16).tensor
    part = HQQQuantizer()(weight[4000:4100].clone(), None, scheme, torch.bfloat16).tensor
    assert torch.equal(whole.codes[4000:4100], part.codes) and torch.equal(
        whole.scales[4000:4100], part.scales
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"options": {"norm": 1.5}}, "--method hqq: norm is 1.5: p of the lp norm is above 0 and at most 1"),
        ({"options": {"norm": "x"}}, "--method hqq"),
        ({"options": {"iterations": 0}}, "iterations is 0: must be 1 to 1000"),
        ({"options": {"penalty": -1.0}}, "penalty is -1.0 and growth 1.01"),
        (
            {"damping": 0.1},
            "--damping is not an option of --method hqq: it has norm, penalty, growth, iterations",
        ),
        (
            {"scheme": "w8a16-fp8", "group_size": None},
            "optimises scales and zero points of integers, it does not make FP8 channel",
        ),
        ({"scheme": "nvfp4a16", "group_size": None}, "it does not make NVFP4 g16"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(
    options: dict[str, object], said: str, llama: Path, tmp_path: Path
) -> None:
    values = {"method": "hqq", "group_size": 32} | options
    with pytest.raises(QuantError) as refused:
        plan_job(recipe(llama, tmp_path / "out", **{k: v for k, v in values.items() if v is not None}))
    assert said in str(refused.value)


def test_it_is_closer_to_the_source_than_plain_rounding_on_the_bundled_model(tmp_path: Path) -> None:
    kl = {}
    for method in ("minmax", "hqq"):
        report = quantize(TINYLM, tmp_path / method, method=method, scheme="w4a16-asym", group_size=64)
        assert report["calibration"] is None and report["verify"]["passed"]
        found = evaluate(tmp_path / method, against=TINYLM, length=128, chunks=24).kl
        assert found is not None
        kl[method] = found.mean
    assert kl["hqq"] < 0.95 * kl["minmax"], kl


def test_problems_are_listed_with_the_others(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Problems) as refused:
        plan_job(recipe(llama, tmp_path / "out", method="hqq", scheme="fp8-block", tensor_parallel=3))
    assert (
        any(p.startswith("--method hqq: optimises") for p in refused.value.problems)
        and len(refused.value.problems) > 1
    )
