"""Products of bf16 matrices where a CPU has no instructions for them: fp32's, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quant.models import products
from quant.models.attention import causal

#: Distance of neighbouring numbers, as a share of the smaller one at the most.
BF16_STEP = 2.0**-7


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without them, whatever this one has."""
    monkeypatch.setattr(products, "bf16_is_slow", lambda: True)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("piece", [products._PIECE, 1 << 10])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_are_rounded_once(monkeypatch: pytest.MonkeyPatch, piece: int, transposed: bool) -> None:
    monkeypatch.setattr(products, "_PIECE", piece)
    x, weight, bias = some(3, 37, 96), some(70, 96, seed=1), some(70, seed=2)
    weight = weight.t().contiguous().t() if transposed else weight
    made = products.linear(x, weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    assert made.dtype == torch.bfloat16
    assert made.shape == (3, 37, 70)
    # half a step of the number itself, and what fp32 loses in a sum
    assert bool(((made.double() - exact).abs() <= exact.abs() * BF16_STEP / 2 * 1.001 + 1e-4).all())


def test_gradients_are_those_of_torch() -> None:
    x, weight, bias = (t.requires_grad_() for t in (some(2, 20, 48), some(24, 48, seed=1), some(24, seed=2)))
    upstream = some(2, 20, 24, seed=3)
    found = torch.autograd.grad(products.linear(x, weight, bias), (x, weight, bias), upstream)
    wide = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    wanted = torch.autograd.grad(nn.functional.linear(*wide), wide, upstream.float())
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), theirs, rtol=2 * BF16_STEP, atol=0.05)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_row_is_widened_where_there_is_a_way_back(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, torch's own loop over one row is as fast; back it takes a hundred times as long."""
    widened = []
    whole = products._widened
    monkeypatch.setattr(products, "_widened", lambda *given: (widened.append(1), whole(*given))[1])
    x = some(1, 48).requires_grad_(recorded)
    made = products.linear(x, some(24, 48, seed=1))
    if recorded:
        torch.autograd.grad(made.sum(), x)
    assert len(widened) == (2 if recorded else 0)


def test_a_result_that_is_changed_in_place_keeps_its_gradient() -> None:
    """Llama 4 adds its routed experts into what the shared one gives."""
    x, weight = some(16, 32).requires_grad_(), some(8, 32, seed=1)
    reached = []
    made = products.linear(x, weight)
    made.register_hook(lambda g: reached.append(g))
    made.add_(1.0).sum().backward()
    assert len(reached) == 1


def test_linears_of_a_block_multiply_so_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    block = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8, bias=False)).bfloat16()
    calls = []
    inner = products._widened
    monkeypatch.setattr(products, "_widened", lambda *a: calls.append(1) or inner(*a))
    x = some(16, 32)
    with torch.no_grad():
        before = block(x)
        assert not calls
        with products.linears_widened(block):
            found = block(x)
        assert len(calls) == 2
        block(x)
    assert len(calls) == 2
    torch.testing.assert_close(found, before, rtol=4 * BF16_STEP, atol=0.02)


def test_attention_is_rounded_at_its_end() -> None:
    query, key, value = (some(2, heads, 130, 32, seed=heads) for heads in (4, 2, 2))
    wanted = nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True
    )
    assert bool((causal(query, key, value, None).float() - wanted).abs().max() <= 4 * BF16_STEP / 2)
    assert torch.equal(causal(query, key, value, None)[1:], causal(query[1:], key[1:], value[1:], None))


def test_products_of_very_many_inputs_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_WIDE", 90)
    monkeypatch.setattr(products, "_PIECE", 37 * 25)
    test_sums_are_rounded_once(monkeypatch, 37 * 25, False)
    test_gradients_are_those_of_torch()
