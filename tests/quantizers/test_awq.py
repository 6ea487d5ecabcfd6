"""AWQ's rounding against a search over every group written as loops, and on groups and inputs that hold
nothing."""

from __future__ import annotations

import pytest
import torch

from quant.calibration.statistics import Statistics
from quant.errors import QuantError
from quant.quantizers import MinMaxQuantizer
from quant.quantizers.awq import AWQQuantizer
from quant.quantizers.rounding import SEARCH_FLOOR, SEARCH_STEPS
from quant.schemes import PRESETS, WeightScheme

G = 32


def weights(n: int = 6, k: int = 96, seed: int = 0) -> torch.Tensor:
    """Tails heavy enough that clipping pays in some groups and not in others."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, k, generator=generator) * torch.rand(n, k, generator=generator).add(0.2).reciprocal()
    )


def statistics(k: int = 96, seed: int = 1) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(200, k, generator=generator)
        * torch.logspace(-1, 1, k)[torch.randperm(k, generator=generator)]
    )
    return Statistics(len(x), x.t() @ x / len(x))


def loss(
    weight: torch.Tensor, rounded: torch.Tensor, given: Statistics, floating: bool = False
) -> torch.Tensor:
    """Of every group [N, G], the mean square of what rounding changes of its share of the output; of floats
    with inputs taken as independent."""
    assert given.hessian is not None
    hessian = given.hessian.double()
    if floating:
        hessian = hessian.diagonal().diag()
    changed = (rounded - weight).double().view(len(weight), -1, G)
    return torch.stack(
        [
            ((e @ hessian[i * G : (i + 1) * G, i * G : (i + 1) * G]) * e).sum(-1)
            for i, e in enumerate(changed.unbind(1))
        ],
        1,
    )


def slow(
    weight: torch.Tensor, given: Statistics, scheme: WeightScheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and losses of the best of all ranges of each group, one group at a time."""
    assert given.hessian is not None
    values, losses = (
        torch.empty_like(weight),
        torch.empty(len(weight), weight.shape[1] // G, dtype=torch.float64),
    )
    levels, low, high = 2**scheme.bits - 1, -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    for row in range(len(weight)):
        for group in range(weight.shape[1] // G):
            part = slice(group * G, (group + 1) * G)
            w, hessian = weight[row, part].double(), given.hessian[part, part].double()
            best = float("inf")
            for step in range(SEARCH_STEPS):
                shrink = 1 - (1 - SEARCH_FLOOR[scheme.bits]) * step / (SEARCH_STEPS - 1)
                least, most = min(float(w.min()), 0.0) * shrink, max(float(w.max()), 0.0) * shrink
                scale = 2 * max(-least, most) / levels if scheme.symmetric else (most - least) / levels
                scale = float(torch.tensor(scale).to(dtype))
                zero = 0 if scheme.symmetric else min(max(round(low - least / scale), low), high)
                made = ((w / scale + zero).round().clamp(low, high) - zero) * scale
                error = float((made - w) @ hessian @ (made - w))
                if error < best:
                    best, values[row, part] = error, made.float()
            losses[row, group] = best
    return values, losses


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_group_has_the_range_of_least_weighted_error(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    scheme, weight, given = WeightScheme(bits, G, symmetric), weights(), statistics()
    made = AWQQuantizer()(weight.clone(), given, scheme, dtype).tensor
    values, losses = slow(weight, given, scheme, dtype)
    found = loss(weight, made.dequantize(), given)
    # two ranges of one loss are both right; fp32 may take the other one
    assert torch.allclose(found, losses, rtol=2e-3)
    assert float((made.dequantize() == values).float().mean()) > 0.98
    assert made.scales.dtype == dtype and (made.zeros is None) == symmetric


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w3a16", "w2a16", "nvfp4a16"])
def test_no_group_loses_more_than_with_its_whole_range(name: str) -> None:
    scheme = (
        PRESETS[name].weights
        if name == "nvfp4a16"
        else WeightScheme(PRESETS[name].weights.bits, G, PRESETS[name].weights.symmetric)
    )
    weight, given = weights(40), statistics()
    searched, whole = (
        AWQQuantizer(clip_search=c)(weight.clone(), given, scheme, torch.bfloat16).tensor
        for c in (True, False)
    )
    after, before = (loss(weight, t.dequantize(), given, name == "nvfp4a16") for t in (searched, whole))
    assert bool((after <= before * (1 + 1e-5)).all()) and float(after.sum()) < 0.99 * float(before.sum())
    plain = MinMaxQuantizer()(weight.clone(), None, scheme, torch.bfloat16).tensor
    assert torch.equal(whole.codes, plain.codes) and torch.equal(whole.scales.float(), plain.scales.float())


@pytest.mark.parametrize(
    "name",
    [
        "w4a16",
        "w4a16-asym",
        "w2a16",
        "w8a16-asym",
        "w8a8-int8",
        "w8a8-fp8",
        "fp8-block",
        "nvfp4",
        "mxfp4",
        "mxfp8",
    ],
)
def test_groups_of_zeros_and_dead_inputs_make_numbers(name: str) -> None:
    """A row, a group and a column without weights; inputs that no token reaches, a whole group of them among
    these."""
    k = 256
    weight, given = weights(k=k), statistics(k)
    assert given.hessian is not None
    weight[2], weight[:, :128], weight[:, 130] = 0, 0, 0
    dead = torch.cat([torch.arange(128, 256, 7), torch.arange(0, 128)])
    given.hessian[dead], given.hessian[:, dead] = 0, 0
    made = AWQQuantizer()(weight.clone(), given, PRESETS[name].weights, torch.float16).tensor
    values = made.dequantize()
    assert bool(torch.isfinite(values).all()) and bool(torch.isfinite(made.scales.float()).all())
    assert not values[weight == 0].any()
    nothing = AWQQuantizer()(
        torch.zeros(4, k), given, PRESETS[name].weights, torch.float16
    ).tensor.dequantize()
    assert not nothing.any()


def test_an_input_that_no_token_reaches_decides_nothing() -> None:
    """Its weight is the largest of the group, and clipped for the others' sake."""
    weight, given = weights(1), statistics()
    assert given.hessian is not None
    weight[0, 5] = 1.2 * float(weight[0, :G].abs().max())
    given.hessian[5], given.hessian[:, 5] = 0, 0
    made = AWQQuantizer()(weight.clone(), given, WeightScheme(4, G), torch.float16).tensor
    assert float(made.dequantize()[0, 5]) < 0.95 * float(weight[0, 5])


def test_it_asks_for_text() -> None:
    for given in (None, Statistics(0)):
        with pytest.raises(QuantError, match="awq needs calibration text"):
            AWQQuantizer()(weights(), given, WeightScheme(4, G), torch.float16)
