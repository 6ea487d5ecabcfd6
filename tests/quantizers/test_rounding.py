"""Scales, zero points and rounding against a reference that treats one group at a time in Python's own
numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.formats.reading import dequantized
from quant.quantizers import MinMaxQuantizer
from quant.quantizers.rounding import group_parameters, round_weight, weight_parameters
from quant.schemes import WeightScheme
from tests.helpers import copy_model, load_all, quantize, save_all

SCHEMES = [WeightScheme(b, g, s) for b, g, s in itertools.product((2, 3, 4, 8), (-1, 8, 40), (True, False))]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight_of(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight[0] = 0  # a dead output
    weight[1] = weight[1].abs()  # all of one sign
    weight[2] *= 1000
    weight[3, 3] = 50  # an outlier
    return weight


def slow_minmax(
    weight: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype
) -> tuple[list[list[int]], torch.Tensor]:
    """Codes, and values (q - z)·s, one group after another. Divisions are fp32's, as the definition has
    them."""
    n, k = weight.shape
    g = k if scheme.group_size == -1 else scheme.group_size
    codes, values = [[0] * k for _ in range(n)], torch.zeros(n, k)
    for row, start in itertools.product(range(n), range(0, k, g)):
        group = weight[row, start : start + g]
        low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
        span = 2 * max(-low, high) if scheme.symmetric else high - low
        scale = torch.tensor(span) / (2**scheme.bits - 1) if span else torch.tensor(1.0)
        scale = scale.to(dtype).float()
        zero = (
            0
            if scheme.symmetric
            else int((scheme.low - torch.tensor(low) / scale).round().clamp(scheme.low, scheme.high))
        )
        for column in range(start, start + g):
            code = int((weight[row, column] / scale + zero).round().clamp(scheme.low, scheme.high))
            codes[row][column] = code
            values[row, column] = (code - zero) * scale
    return codes, values


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_minmax_equals_the_reference_group_by_group(scheme: WeightScheme) -> None:
    weight = weight_of(5, 80)
    for dtype in DTYPES:
        result = MinMaxQuantizer()(weight.clone(), None, scheme, dtype)
        codes, values = slow_minmax(weight, scheme, dtype)
        assert result.tensor.codes.tolist() == codes
        assert torch.equal(result.tensor.dequantize(), values)
        assert result.tensor.scales.dtype == dtype and result.tensor.codes.dtype == torch.int8
        assert (result.tensor.zeros is None) == scheme.symmetric
        assert not result.fallbacks


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("search", [False, True])
def test_scales_are_values_that_the_stored_dtype_holds_and_never_zero(
    scheme: WeightScheme, dtype: torch.dtype, search: bool
) -> None:
    weight = weight_of(6, 80)
    weight[5] = 1e-30  # smaller than any 16-bit scale
    scales, zeros = weight_parameters(weight, scheme, dtype, search=search)
    assert torch.equal(scales, scales.to(dtype).float())
    assert bool((scales > 0).all()) and bool(scales.isfinite().all())
    assert (zeros is None) == scheme.symmetric
    if zeros is not None:
        assert torch.equal(zeros, zeros.round().clamp(scheme.low, scheme.high))
    codes = round_weight(weight, scales, zeros, scheme)
    assert int(codes.min()) >= scheme.low and int(codes.max()) <= scheme.high


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_group_of_zeros_stays_zero(scheme: WeightScheme) -> None:
    for search in (False, True):
        tensor = MinMaxQuantizer(clip_search=search)(torch.zeros(3, 80), None, scheme, torch.float16).tensor
        assert torch.equal(tensor.dequantize(), torch.zeros(3, 80))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_is_never_worse_than_the_whole_range_in_any_group(
    scheme: WeightScheme, weighted: bool
) -> None:
    weight = weight_of(37, 80)
    importance = torch.rand(80, generator=torch.Generator().manual_seed(1)) if weighted else torch.ones(80)

    def errors(search: bool) -> torch.Tensor:
        scales, zeros = weight_parameters(
            weight, scheme, torch.bfloat16, importance if weighted else None, search
        )
        codes = round_weight(weight, scales, zeros, scheme)
        groups = (
            codes.view(37, scales.shape[1], -1) - (0 if zeros is None else zeros.unsqueeze(-1))
        ) * scales.unsqueeze(-1)
        return ((groups.view(37, 80) - weight).square() * importance).view(37, scales.shape[1], -1).sum(-1)

    whole, searched = errors(False), errors(True)
    assert bool((searched <= whole * (1 + 1e-5) + 1e-12).all())
    if scheme.bits < 8:
        assert float(searched.sum()) < float(whole.sum())


def test_groups_of_a_large_weight_are_searched_alike_whatever_the_part_they_are_in() -> None:
    weight = weight_of(300, 640, seed=4)
    scheme = WeightScheme(4, 40, False)
    scales, zeros = weight_parameters(weight, scheme, torch.float16, search=True)
    assert zeros is not None
    for row in (0, 1, 150, 299):
        one, zero = weight_parameters(weight[row : row + 1].clone(), scheme, torch.float16, search=True)
        assert zero is not None
        assert torch.equal(one[0], scales[row]) and torch.equal(zero[0], zeros[row])


def test_weights_beyond_the_range_of_fp16_scales_stay_finite() -> None:
    weight = torch.full((2, 32), 1e30)
    for search in (False, True):
        tensor = MinMaxQuantizer(clip_search=search)(weight, None, WeightScheme(4, 32), torch.float16).tensor
        assert tensor.scales.tolist() == [[65504.0], [65504.0]] and bool((tensor.codes == 7).all())


def test_dequantizing_by_groups_equals_dequantizing_by_an_index_that_says_the_same() -> None:
    from quant.tensors import dequantize

    tensor = MinMaxQuantizer()(weight_of(5, 80), None, WeightScheme(4, 40, False), torch.float16).tensor
    index = torch.arange(80, dtype=torch.int32) // 40
    assert torch.equal(tensor.dequantize(), dequantize(tensor.codes, tensor.scales, tensor.zeros, index))
    assert torch.equal(tensor.rows(1, 3).dequantize(), tensor.dequantize()[1:3])


def test_groups_along_inputs_that_do_not_divide_are_refused() -> None:
    from quant.errors import UsageError

    with pytest.raises(
        UsageError, match="80 inputs do not divide into groups of 32: use a group size that divides 80, or -1"
    ):
        MinMaxQuantizer()(torch.zeros(2, 80), None, WeightScheme(4, 32), torch.float16)


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 2, 8)])
def test_group_parameters_have_one_scale_a_group(shape: tuple[int, ...]) -> None:
    scales, zeros = group_parameters(torch.ones(shape), WeightScheme(4, 8, False), torch.float32)
    assert zeros is not None and scales.shape == zeros.shape == shape[:-1]


@pytest.mark.parametrize("method", ["minmax", "gptq", "hqq"])
def test_scales_below_the_smallest_normal_fp16_number_keep_small_weights(
    method: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights of a standard deviation of 2e-5 in fp16: their scales are subnormal numbers, and the error is
    that of the same weights a thousand times larger; the report names them."""
    source = copy_model(checkpoints("llama", dtype=torch.float16), tmp_path / "model")
    tensors = load_all(source)
    name = "model.layers.0.mlp.up_proj"
    large = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    found = {}
    for deviation in (2e-2, 2e-5):
        small = (large * deviation).half()
        save_all(source, {**tensors, f"{name}.weight": small})
        out = tmp_path / f"{method}-{deviation}"
        report = quantize(source, out, method=method, group_size=32, bits=8, target="other")
        (layer,) = (x for x in report["layers"] if x["name"] == name)
        read = dequantized(open_checkpoint(out)).read(f"{name}.weight")
        found[deviation] = float((read - small.float()).norm() / small.float().norm())
        assert any("below 6.1e-05" in n for n in layer["notes"]) == (deviation == 2e-5)
    assert found[2e-5] < max(1.5 * found[2e-2], 0.02)
    assert found[2e-2] < 0.02
