"""Float rounding: hand-made vectors, error bounds, zeros, ragged blocks, and numbers shared by a fused
layer."""

from __future__ import annotations

import itertools

import pytest
import torch

from quant.calibration.statistics import Statistics
from quant.quantizers import GPTQQuantizer, MinMaxQuantizer
from quant.quantizers.floats import encode, float_scales, nearest_float
from quant.schemes import PRESETS, Scheme
from quant.tensors import E2M1, QuantizedTensor, code_values, largest_magnitude, scale_values, sum_of_squares
from tests.quantizers.test_gptq import hessian_of

FLOATS = [s for s in PRESETS.values() if s.weights.type == "float"]


def rounded(
    weight: torch.Tensor, name: str, amax: torch.Tensor | None = None, clip: bool = False
) -> QuantizedTensor:
    return MinMaxQuantizer(clip_search=clip)(
        weight.clone(), None, PRESETS[name].weights, torch.bfloat16, amax
    ).tensor


def normal(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_e2m1_ties_go_to_the_even_code_and_large_numbers_saturate() -> None:
    """OCP MX 1.0, 5.3: nearest, ties to even; the eight magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    given = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9, -0.25, -0.75, -5.0, 0.26, 5.01])
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 0.0, -1.0, -4.0, 0.5, 6.0]
    assert nearest_float(given, 4).tolist() == wanted
    codes = encode(nearest_float(given, 4), 4)
    assert codes.dtype == torch.uint8 and torch.equal(code_values(codes), torch.tensor(wanted))


def test_every_e2m1_code_stands_for_its_number() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert code_values(codes).tolist() == [*E2M1, *(-x for x in E2M1)]
    assert encode(code_values(codes[:8]), 4).tolist() == list(range(8)) and encode(
        code_values(codes[9:]), 4
    ).tolist() == list(range(9, 16))


def test_snapping_is_to_the_nearest_of_all_numbers() -> None:
    """By brute force over every finite number of each format."""
    values = normal(64, 64).flatten() * 3
    for bits, numbers in (
        (4, torch.tensor([*E2M1, *(-x for x in E2M1)])),
        (8, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()),
    ):
        finite = numbers[torch.isfinite(numbers)]
        best = (values[:, None] - finite).abs().amin(1)
        assert torch.equal((values - nearest_float(values, bits)).abs(), best)
    assert nearest_float(torch.tensor([1e9, -1e9, 449.0, 2.0**-11]), 8).tolist() == [
        448.0,
        -448.0,
        448.0,
        0.0,
    ]


def test_a_negative_number_that_rounds_to_zero_has_the_code_of_zero() -> None:
    assert encode(nearest_float(torch.tensor([-0.2, -0.0, 0.2]), 4), 4).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dim", [(), -1, (1, 3)])
def test_the_largest_magnitude_is_that_of_either_sign(dim: int | tuple[int, ...]) -> None:
    values = normal(6, 320).view(2, 3, 4, 80)
    assert torch.equal(largest_magnitude(values, dim), values.abs().amax(dim))
    assert torch.equal(largest_magnitude(-values.abs(), dim), values.abs().amax(dim))


def test_a_sum_of_squares_is_finite_only_if_every_number_is() -> None:
    values = normal(64, 100)
    assert float(sum_of_squares(values)) == pytest.approx(float(values.double().square().sum()), rel=1e-5)
    assert float(sum_of_squares(torch.empty(0, 4))) == 0
    for damage in (torch.nan, torch.inf, -torch.inf):
        values[-1, -1] = damage
        assert not sum_of_squares(values).isfinite()


def test_an_fp8_weight_by_hand() -> None:
    weight = torch.tensor([[44.8, -22.4, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    tensor = rounded(weight, "w8a8-fp8")
    assert (
        tensor.scales.dtype == torch.float32
        and tensor.scales[0].item() == pytest.approx(0.1)
        and tensor.scales[1].item() == 1.0
    )
    assert tensor.codes.float().tolist() == [[448.0, -224.0, 1.0, 0.0], [0.0] * 4]


def test_an_mxfp4_group_by_hand() -> None:
    """Largest 6: the exponent of 6 less 2 is 0, stored as 127. Largest 12 doubles it. A group of zeros has
    scale 1."""
    weight = torch.zeros(1, 96)
    weight[0, :8] = torch.tensor(E2M1)
    weight[0, 32:40] = 2 * torch.tensor(E2M1)
    tensor = rounded(weight, "mxfp4a16")
    assert tensor.scales.dtype == torch.uint8 and tensor.scales.tolist() == [[127, 128, 127]]
    assert tensor.codes[0, :8].tolist() == tensor.codes[0, 32:40].tolist() == list(range(8))
    assert torch.equal(tensor.dequantize(), weight)


def test_an_mxfp8_group_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1] = 448.0, 2.0**-9
    tensor = rounded(weight, "mxfp8")
    assert tensor.scales.tolist() == [[127]] and torch.equal(tensor.dequantize(), weight)


def test_an_nvfp4_weight_by_hand() -> None:
    """The divisor is 448 · 6 / 6 = 448: the group of the largest number has scale 448, one of half its range
    224."""
    weight = torch.zeros(1, 48)
    weight[0, :8], weight[0, 16:24] = torch.tensor(E2M1), torch.tensor(E2M1) / 2
    tensor = rounded(weight, "nvfp4a16")
    assert tensor.global_scale is not None and tensor.global_scale.tolist() == [448.0]
    assert tensor.scales.dtype == torch.float8_e4m3fn and tensor.scales.float().tolist() == [
        [448.0, 224.0, 1.0]
    ]
    assert torch.equal(tensor.dequantize(), weight)


@pytest.mark.parametrize("scheme", FLOATS, ids=lambda s: s.name)
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e4, 1e30])
def test_errors_stay_within_half_a_step_of_what_each_group_can_hold(scheme: Scheme, size: float) -> None:
    """Relative to a group's largest number: FP8 to its 4 significant bits (and subnormals of 2^-9), FP4 to
    one in 6, MX up to one power more."""
    weight = normal(128, 256) * size
    tensor = rounded(weight, scheme.name)
    values = tensor.dequantize()
    assert bool(torch.isfinite(values).all())
    g = {"group": 32, "tensor_group": 16}.get(scheme.weights.strategy, 256)
    largest = weight.view(128, -1, g).abs().amax(-1, keepdim=True).expand(-1, -1, g).reshape(128, 256)
    if scheme.weights.strategy in ("tensor", "block"):
        largest = weight.abs().amax()
    error = (values - weight).abs()
    if scheme.weights.scales == "F8_E4M3":
        bound = largest * (1 / 6 + 1 / 16)
    elif scheme.weights.scales == "U8":
        bound = largest * (0.26 if scheme.weights.bits == 4 else 1 / 8)
    else:
        bound = weight.abs() / 16 + largest / 448 * 2.0**-10
    assert bool((error <= bound * 1.0001).all()), float((error / bound).max())


@pytest.mark.parametrize("scheme", FLOATS, ids=lambda s: s.name)
def test_zeros_stay_zeros_and_nothing_is_nan(scheme: Scheme) -> None:
    for weight in (torch.zeros(128, 256), torch.zeros(128, 256).index_fill(0, torch.tensor([7]), 1.0)):
        tensor = rounded(weight, scheme.name)
        assert torch.equal(tensor.dequantize(), weight)
        assert bool((scale_values(tensor.scales, tensor.global_scale) > 0).all())


@pytest.mark.parametrize(("n", "k"), [(128, 128), (129, 128), (100, 300), (256, 130), (1, 1), (300, 127)])
def test_blocks_may_be_ragged_on_both_sides(n: int, k: int) -> None:
    weight = normal(n, k)
    tensor = rounded(weight, "fp8-block")
    assert tensor.scales.shape == (-(-n // 128), -(-k // 128))
    values = tensor.dequantize()
    for i, j in itertools.product(range(tensor.scales.shape[0]), range(tensor.scales.shape[1])):
        rows, columns = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
        part = weight[rows, columns]
        assert tensor.scales[i, j].item() == pytest.approx(part.abs().max().item() / 448)
        assert torch.equal(values[rows, columns], tensor.codes[rows, columns].float() * tensor.scales[i, j])


@pytest.mark.parametrize("scheme", FLOATS, ids=lambda s: s.name)
def test_rounding_twice_changes_nothing(scheme: Scheme) -> None:
    """What a file holds is what rounding it again gives: the range and every number are of the format."""
    first = rounded(normal(128, 256), scheme.name).dequantize()
    second = rounded(first, scheme.name).dequantize()
    assert torch.allclose(first, second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["nvfp4", "w8a8-fp8-tensor"])
def test_shards_of_a_fused_layer_take_the_number_of_the_largest(name: str) -> None:
    small, large = normal(64, 256, 1), normal(64, 256, 2) * 10
    amax = torch.maximum(small.abs().amax(), large.abs().amax())
    parts = [rounded(w, name, amax) for w in (small, large)]
    whole = rounded(torch.cat([small, large]), name)
    if name == "nvfp4":
        assert all(torch.equal(p.global_scale, whole.global_scale) for p in parts)  # type: ignore[arg-type]
    else:
        assert all(torch.equal(p.scales, whole.scales) for p in parts)
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), whole.dequantize())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_searching_scales_never_makes_a_group_worse(name: str) -> None:
    weight = normal(64, 256)
    groups = PRESETS[name].weights.group_size
    kept, searched = (
        ((rounded(weight, name, clip=c).dequantize() - weight).view(64, -1, groups) ** 2).sum(-1)
        for c in (False, True)
    )
    assert bool((searched <= kept * (1 + 1e-6)).all())


def test_the_power_of_two_is_the_better_of_two() -> None:
    """A largest number of 7: at 2^0 it is cut to 6, at 2^1 others lose their last bit."""
    cut, kept = torch.full((1, 32), 1.5), torch.full((1, 32), 3.0)
    cut[0, 0], kept[0, 0] = 6.2, 7.9
    assert rounded(cut, "mxfp4").scales.tolist() == [[127]]
    assert rounded(kept, "mxfp4").scales.tolist() == [[128]]


def loss(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = (values - weight).double()
    return float(torch.einsum("nk,kj,nj->", difference, hessian.double(), difference))


@pytest.mark.parametrize("order", ["none", "static"])
@pytest.mark.parametrize("scheme", FLOATS, ids=lambda s: s.name)
def test_gptq_lowers_the_output_error_of_every_float_scheme(scheme: Scheme, order: str) -> None:
    weight, hessian = normal(136, 256), hessian_of(256)
    plain = rounded(weight, scheme.name)
    solver = GPTQQuantizer(act_order=order)  # type: ignore[arg-type]
    solved = solver(weight.clone(), Statistics(2000, hessian.clone()), scheme.weights, torch.bfloat16).tensor
    assert loss(weight, solved.dequantize(), hessian) < 0.75 * loss(weight, plain.dequantize(), hessian)
    assert (
        solved.codes.dtype == plain.codes.dtype
        and solved.scales.dtype == plain.scales.dtype
        and solved.scales.shape == plain.scales.shape
    )
    assert (solved.global_scale is None) == (plain.global_scale is None)
    assert bool(torch.isfinite(solved.dequantize()).all())


@pytest.mark.parametrize("scheme", FLOATS, ids=lambda s: s.name)
def test_gptq_with_independent_inputs_is_rounding_to_nearest(scheme: Scheme) -> None:
    """Without correlation there is no error to compensate."""
    weight = normal(128, 256)
    solved = GPTQQuantizer(clip_search=False, sweeps=0)(
        weight.clone(), Statistics(1, torch.eye(256)), scheme.weights, torch.bfloat16
    ).tensor
    plain = rounded(weight, scheme.name)
    assert torch.equal(solved.dequantize(), plain.dequantize())


def test_the_search_of_nvfp4_looks_at_all_scales_near_that_of_the_whole_range() -> None:
    """Larger ones too: a group of 4, 4 and 6 tenths of them has no code for 5 beside that of 6."""
    scheme, weight = PRESETS["nvfp4a16"].weights, normal(64, 128)
    weight[0, :16] = torch.tensor([5.0, 6.0]).repeat(8)
    weight[1] *= 1e-6
    weight[2] = 0
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1))
    found = float_scales(weight, scheme, None, importance, True)
    assert found.global_scale is not None
    every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    groups, weights = weight.view(64, 8, 16), importance.view(8, 16)

    def errors(wide: torch.Tensor) -> torch.Tensor:
        rounded = nearest_float(groups / wide.unsqueeze(-1), 4) * wide.unsqueeze(-1)
        return ((rounded - groups).square() * weights).sum(-1)

    least = torch.stack(
        [errors(scale_values(e, found.global_scale).expand(64, 8)) for e in every.unbind()]
    ).amin(0)
    plain = float_scales(weight, scheme, None, importance, False)
    got, whole = errors(found.wide), errors(plain.wide)
    assert bool((got <= whole * (1 + 1e-6)).all())
    # what lies farther off is better for a group in twenty, and by little
    assert float((got <= least * (1 + 1e-5) + 1e-20).float().mean()) > 0.9
    assert float(got.sum()) < 1.01 * float(least.sum()) < 0.9 * float(whole.sum())
    assert bool((found.wide > plain.wide).any()) and bool((found.wide < plain.wide).any())
