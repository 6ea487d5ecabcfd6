"""Statistics against sums in fp64."""

from __future__ import annotations

import pytest
import torch

from quant.calibration import statistics as module
from quant.calibration.statistics import Accumulator, Int8Gram, int8_products

CPU = torch.device("cpu")


def batches(k: int, dtype: torch.dtype, sizes: tuple[int, ...] = (37, 1, 200)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    scale = torch.rand(k, generator=generator) * 3 + 0.01
    return [(torch.randn(2, t, k, generator=generator) * scale + 0.3).to(dtype) for t in sizes]


def hessian_of(
    gram: type[module.Gram], parts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean outer product as ``gram`` sums it, and in fp64."""
    monkeypatch.setattr(module, "gram_for", gram)
    k = parts[0].shape[-1]
    accumulator = Accumulator(k, CPU, {"hessian"})
    wanted, tokens = torch.zeros(k, k, dtype=torch.float64), 0
    for x in parts:
        accumulator.add(x)
        rows = x.reshape(-1, k).double()
        wanted += rows.t() @ rows
        tokens += len(rows)
    found = accumulator.finish()
    assert (
        found.tokens == tokens
        and found.minimum is None
        and found.hessian is not None
        and found.hessian.dtype == torch.float32
    )
    return found.hessian, wanted / tokens


@pytest.mark.parametrize("k", [1, 5, 512, 513, 700, 1100])
@pytest.mark.parametrize("gram", [module.Gram, Int8Gram])
def test_the_hessian_is_the_mean_outer_product_mirrored_exactly(
    k: int, gram: type[module.Gram], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found, wanted = hessian_of(gram, batches(k, dtype), monkeypatch)
        assert torch.equal(found, found.t())
        size = wanted.diagonal().sqrt()
        error = ((found.double() - wanted).abs() / (size[:, None] * size)).max()
        # 8 bits: both factors are off by at most half a step, which is 1/126 of a range of some three times
        # their power, mostly at random
        assert float(error) < (6e-3 if gram is Int8Gram else 1e-5)


def test_eight_bit_sums_of_inputs_that_are_whole_steps_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-126, 127, (3000, 130), generator=generator).bfloat16()
    x[0] = 126
    x[2000] = 126  # the second batch has steps of its own, of 1 too
    found, wanted = hessian_of(Int8Gram, [x[:2000], x[2000:]], monkeypatch)
    assert torch.equal(found, (wanted * 3000).float() * (1 / 3000))


def test_a_feature_of_wide_range_is_summed_as_well_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a hundred times as large must not drown what a feature says in all others."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(4000, 1, generator=generator)
    x = (torch.randn(4000, 40, generator=generator) + 2 * common).bfloat16()
    x[17, 3], x[18, 4:7], x[19] = 300.0, -1000.0, 20 * x[19]
    found, wanted = hessian_of(Int8Gram, [x], monkeypatch)
    calm = torch.ones(4000, dtype=torch.bool)
    calm[17:20] = False
    power = (x[calm].double().square().sum(0) / 4000).sqrt()  # of all other tokens
    assert float(((found.double() - wanted).abs() / (power[:, None] * power)).max()) < 8e-3
    monkeypatch.setattr(module, "_LEAST", 0.0)  # without a second column
    found, _ = hessian_of(Int8Gram, [x], monkeypatch)
    assert float(((found.double() - wanted).abs() / (power[:, None] * power)).max()) > 4e-2


@pytest.mark.parametrize("gram", [module.Gram, Int8Gram])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_found_in_the_sums(
    gram: type[module.Gram], bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "gram_for", gram)
    accumulator = Accumulator(600, CPU, {"hessian"})
    for part in range(3):
        x = torch.randn(50, 600, generator=torch.Generator().manual_seed(part)).bfloat16()
        if part == 1:
            x[7, 555] = bad
        accumulator.add(x)
    assert not accumulator.finish().finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_features_of_zeros_have_zeros_and_tiny_ones_are_no_nan(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[:, 2] = 0
    x[:, 3] *= 1e-7 if dtype == torch.float16 else 1e-40
    found, wanted = hessian_of(Int8Gram, [x], monkeypatch)
    assert bool(torch.isfinite(found).all()) and torch.equal(found[2], torch.zeros(8))
    rest = [0, 1, 4, 5, 6, 7]
    assert torch.allclose(found[rest][:, rest].double(), wanted[rest][:, rest], atol=1e-2)


@pytest.mark.parametrize("tokens", [1, 2, 333, 2048])
@pytest.mark.parametrize("m", [1, 2, 33, 512])
@pytest.mark.parametrize("n", [1, 5, 512])
def test_integer_products_are_exact_whatever_the_shape(tokens: int, m: int, n: int) -> None:
    """torch 2.13 gives garbage for a single row."""
    generator = torch.Generator().manual_seed(tokens + m + n)
    left, right = (
        torch.randint(-127, 128, (tokens, c + 3), generator=generator, dtype=torch.int8)[:, 2 : c + 2]
        for c in (m, n)
    )
    wanted = (left.double().t() @ right.double()).int()
    assert torch.equal(int8_products(left, right), wanted)
    out = torch.full((m, n), 7, dtype=torch.int32)
    assert torch.equal(int8_products(left, right, out=out), wanted) and torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_absolute_maximum_of_each_feature_is_exact(dtype: torch.dtype) -> None:
    parts = batches(33, dtype)
    accumulator = Accumulator(33, CPU, ["range"])
    for x in parts:
        accumulator.add(x)
    found = accumulator.finish()
    assert found.hessian is None and found.maximum is not None
    assert torch.equal(found.abs_max, torch.cat([x.reshape(-1, 33) for x in parts]).float().abs().amax(0))


def test_the_same_batches_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        accumulator = Accumulator(600, CPU, {"hessian", "range"})
        for x in batches(600, torch.bfloat16):
            accumulator.add(x)
        results.append(accumulator.finish())
    first, second = (r.hessian for r in results)
    assert first is not None and second is not None and torch.equal(first, second)


def test_no_tokens_give_zeros_not_nan() -> None:
    found = Accumulator(4, CPU, {"hessian"}).finish()
    assert found.tokens == 0 and found.hessian is not None and torch.equal(found.hessian, torch.zeros(4, 4))


def test_a_statistic_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such statistic: kurtosis"):
        Accumulator(4, CPU, {"kurtosis", "hessian"})


@pytest.mark.parametrize("gram", [module.Gram, Int8Gram])
@pytest.mark.parametrize("tokens", [0, 1, 9000])
def test_one_batch_alone_gives_the_same_bits_as_in_parts(
    gram: type[module.Gram], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "gram_for", gram)
    rows = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = Accumulator(40, CPU, module.STATISTICS)
    if tokens:
        parts.add(rows)
    alone, wanted = Accumulator.of(rows, module.STATISTICS), parts.finish()
    assert alone.tokens == tokens
    for name in ("hessian", "minimum", "maximum", "sample"):
        assert torch.equal(getattr(alone, name), getattr(wanted, name)), name
