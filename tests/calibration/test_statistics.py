"""Statistics against sums in fp64."""

from __future__ import annotations

import pytest
import torch

from quant.calibration import statistics as module
from quant.calibration.statistics import Accumulator

CPU = torch.device("cpu")


def batches(k: int, dtype: torch.dtype, sizes: tuple[int, ...] = (37, 1, 200)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    scale = torch.rand(k, generator=generator) * 3 + 0.01
    return [(torch.randn(2, t, k, generator=generator) * scale + 0.3).to(dtype) for t in sizes]


@pytest.mark.parametrize("k", [1, 5, 512, 513, 700, 1100])
@pytest.mark.parametrize("gram", [module.Gram, module.AmxGram, module.SplitGram])
def test_the_hessian_is_the_mean_outer_product_mirrored_exactly(k: int, gram: type[module.Gram], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gram_for", gram)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        accumulator = Accumulator(k, CPU, {"hessian"})
        wanted, tokens = torch.zeros(k, k, dtype=torch.float64), 0
        for x in batches(k, dtype):
            accumulator.add(x)
            rows = x.reshape(-1, k).double()
            wanted += rows.t() @ rows
            tokens += len(rows)
        found = accumulator.finish()
        assert found.tokens == tokens and found.minimum is None and found.hessian is not None
        assert found.hessian.dtype == torch.float32
        assert torch.equal(found.hessian, found.hessian.t())
        wanted /= tokens
        size = wanted.diagonal().sqrt()
        error = ((found.hessian.double() - wanted).abs() / (size[:, None] * size)).max()
        # split: both factors of what is left are rounded to bf16, and so is their product: half of 2^-8 each
        assert float(error) < (3 * 2**-9 if gram is module.SplitGram and dtype == torch.bfloat16 else 1e-5)


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
