"""The attention of calibration on a CPU: the model's own numbers, by fewer products; and only where attention
is plain causal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from quant.checkpoint.reader import open_checkpoint
from quant.models import attention
from quant.models.skeleton import Skeleton
from tests.helpers import LATENT


@pytest.mark.parametrize(("heads", "groups", "tokens"), [(4, 2, 128), (4, 4, 65), (6, 1, 200), (3, 3, 64)])
def test_causal_attention_is_that_of_torch(heads: int, groups: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, tokens, n, 32, generator=generator).transpose(1, 2) for n in (heads, groups, groups)
    )
    wanted = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, scale=0.3
    )
    torch.testing.assert_close(attention.causal(query, key, value, 0.3), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("llama", True),
        ("qwen3", True),
        ("phi3", True),
        ("mistral", False),
        ("gemma2", False),
        ("gemma3_text", False),
    ],
)
def test_a_block_computes_the_same_and_other_attention_is_left_alone(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str, taken: bool
) -> None:
    calls = []
    causal = attention.causal
    monkeypatch.setattr(attention, "causal", lambda *a: calls.append(1) or causal(*a))
    skeleton = Skeleton(open_checkpoint(checkpoints(kind)), torch.device("cpu"), torch.float32)
    tokens = torch.randint(0, 4000, (2, 96), generator=torch.Generator().manual_seed(0))
    (hidden,), ((call, *_),) = skeleton.embed([tokens])
    block = skeleton.load_block(0)

    def run() -> torch.Tensor:
        with torch.no_grad():
            output = block(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    wanted = run()
    with attention.staircase_attention(block):
        found = run()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert bool(calls) == taken  # the others have sliding windows (masks) or soft caps at this length
    assert torch.equal(run(), wanted)


def test_of_bf16_inputs_it_is_as_exact_as_transformers_eager_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, 300, n, 64, generator=generator).bfloat16().transpose(1, 2) for n in (8, 2, 2)
    )
    exact = functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True
    )
    keys, values = (x.repeat_interleave(4, 1) for x in (key, value))
    mask = torch.full((300, 300), -torch.inf).triu_(1).bfloat16()
    eager = (
        torch.softmax(query @ keys.transpose(2, 3) / 8 + mask, -1, dtype=torch.float32).bfloat16() @ values
    )
    found = attention.causal(query, key, value, None)
    assert found.dtype == torch.bfloat16

    def error(x: torch.Tensor) -> float:
        return float((x.double() - exact).square().mean().sqrt())

    assert error(found) < 1.05 * error(eager) and error(found) < 3 * error(exact.bfloat16())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # computes by the name of its attention function
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("deepseek_v3", LATENT),  # values are smaller than keys
    ],
)
def test_unusual_attention_computes_the_same_while_it_is_watched(
    kind: str, changes: dict[str, object], checkpoints: Callable[..., Path]
) -> None:
    skeleton = Skeleton(open_checkpoint(checkpoints(kind, **changes)), torch.device("cpu"), torch.float32)
    tokens = torch.randint(2, 4096, (2, 100), generator=torch.Generator().manual_seed(0))
    (hidden,), ((call, *_),) = skeleton.embed([tokens])
    block = skeleton.load_block(0)

    def run() -> torch.Tensor:
        output = block(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    with torch.no_grad():
        wanted = run()
        with (
            attention.staircase_attention(block),
            attention.observed_attention(block, lambda key, value: (key, value)),
        ):
            found = run()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
