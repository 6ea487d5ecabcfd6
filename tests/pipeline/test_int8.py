"""Passes in 8-bit products: close to 16-bit ones whatever the inputs hold, and the same when they are made
again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quant.models.adapter import InputGroup
from quant.pipeline import int8
from quant.pipeline.int8 import Int8Linear, SharedCodes, encode, in_int8, int8_passes
from tests.helpers import LATENT, TINYLM, quantize, weight_files
from tests.pipeline.test_resume import Stopped, stop_after

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(),
    reason="this CPU has no VNNI, without which the products are not exact",
)


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU with AMX, which has no need of them."""
    monkeypatch.setattr(int8, "int8_passes", lambda device, dtype: dtype == torch.bfloat16)


def made(n: int, k: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(n + k)
    return nn.Linear(k, n, bias=bias).requires_grad_(False).bfloat16()


def inputs(tokens: int, k: int) -> torch.Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def error(found: torch.Tensor, x: torch.Tensor, linear: nn.Linear) -> float:
    """Of the token that is worst off, relative to what the magnitudes of its inputs and of the weights make
    of it; outlying tokens are their own scale."""
    wanted = x.double() @ linear.weight.double().t() + (0 if linear.bias is None else linear.bias.double())
    return float(((found.double() - wanted).square().sum(-1) / wanted.square().sum(-1)).sqrt().max())


@pytest.mark.parametrize(
    ("tokens", "k", "n"),
    [(512, 256, 768), (2048, 1024, 96), (1, 64, 64), (3, 16, 5), (2, 96, 1), (33, 100, 70)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_pass_is_off_by_about_one_percent(tokens: int, k: int, n: int, bias: bool) -> None:
    linear, x = made(n, k, bias), inputs(tokens, k)
    found = Int8Linear(linear, SharedCodes())(x[None])
    assert found.shape == (1, tokens, n) and found.dtype == torch.bfloat16
    limit = 0.02 if n > 5 else 0.2  # what a few outputs add up to may be next to nothing
    assert error(found[0], x, linear) < limit
    if n > 5:
        assert error(found[0], x, linear) > error(linear(x), x, linear)  # it is not the 16-bit product


def _outlying_features(x: torch.Tensor, linear: nn.Linear) -> None:
    x[:, ::50] *= 100
    linear.weight[:, ::50] /= 100  # or what the others are off by would not show


def _one_large_number(x: torch.Tensor, linear: nn.Linear) -> None:
    x[5, 3] = 400
    linear.weight[:, 3] /= 400


def _a_large_number_in_more_features_than_are_wide(x: torch.Tensor, linear: nn.Linear) -> None:
    for i in range(40):
        x[i, 3 * i] = 400
        linear.weight[:, 3 * i] /= 400


def _an_outlying_weight(x: torch.Tensor, linear: nn.Linear) -> None:
    linear.weight[7, 3] = 100
    x[:, 3] /= 1000


def _most_features_zero(x: torch.Tensor, linear: nn.Linear) -> None:
    x[:, 20:] = 0


def _a_heavy_tail(x: torch.Tensor, linear: nn.Linear) -> None:
    x.copy_(x.float() ** 5)


def _tokens_of_any_size(x: torch.Tensor, linear: nn.Linear) -> None:
    x *= torch.logspace(-30, 30, len(x)).bfloat16()[:, None]


@pytest.mark.parametrize(
    "change",
    [
        _outlying_features,
        _one_large_number,
        _a_large_number_in_more_features_than_are_wide,
        _an_outlying_weight,
        _most_features_zero,
        _a_heavy_tail,
        _tokens_of_any_size,
    ],
)
def test_numbers_far_beyond_the_others_do_not_drown_them(
    change: Callable[[torch.Tensor, nn.Linear], None],
) -> None:
    linear, x = made(96, 512), inputs(300, 512)
    change(x, linear)
    found = Int8Linear(linear, SharedCodes())(x)
    assert error(found, x, linear) < 0.04
    wanted = x.double() @ linear.weight.double().t()
    outputs = ((found.double() - wanted).square().sum(0) / wanted.square().sum(0)).sqrt()
    assert float(outputs.max()) < 0.04


def test_zeros_stay_zeros_and_nan_stays_nan() -> None:
    linear, x = made(96, 64), inputs(10, 64)
    x[1], x[2, 5], x[3, 5] = 0, torch.nan, torch.inf
    linear.weight[4] = 0
    found = Int8Linear(linear, SharedCodes())(x)
    assert not found[1].any() and not found[[0, 4, 5, 6, 7, 8, 9], 4].any()
    assert found[2].isnan().all() and not found[3].isfinite().any()
    assert found[[0, 4, 5, 6, 7, 8, 9]].isfinite().all()


def test_codes_are_made_once_for_linears_that_share_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(int8, "encode", lambda x: seen.append(x) or encode(x))
    block = nn.ModuleDict({"q": made(64, 64), "k": made(32, 64)})
    x, other = inputs(20, 64)[None], inputs(21, 64)[None]
    before = {name: module.forward for name, module in block.items()}
    with in_int8(block, [InputGroup(("q", "k"), None)]):
        found = [block[name](tokens) for tokens in (x, other) for name in ("q", "k")]
    assert len(seen) == 2
    assert {name: module.forward for name, module in block.items()} == before
    for i, (tokens, name) in enumerate([(x, "q"), (x, "k"), (other, "q"), (other, "k")]):
        assert error(found[i][0], tokens[0], block[name]) < 0.02


def test_linears_of_other_kinds_and_dtypes_are_left_alone() -> None:
    class Other(nn.Linear):
        pass

    block = nn.ModuleDict({"a": Other(64, 64).bfloat16(), "b": nn.Linear(64, 64)})
    assert int8.int8_linears(block, InputGroup(("a", "b"), None)) == {}


def test_only_a_cpu_without_amx_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert int8_passes(torch.device("cpu"), torch.bfloat16) is not amx
    assert not int8_passes(torch.device("cpu"), torch.float32)
    assert not int8_passes(torch.device("cuda"), torch.bfloat16)


def test_a_torch_without_the_product_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert int8._exact.__wrapped__()
    for product in (
        lambda *_: torch.zeros(8, 8, dtype=torch.bfloat16),
        lambda *_: torch.ops.onednn.no_such_product(),
    ):
        monkeypatch.setattr(int8, "_product", product)
        assert not int8._exact.__wrapped__()


def _job(output: Path, **options: Any) -> dict[str, Any]:
    return quantize(TINYLM, output, **{"method": "gptq", "samples": 8, "sequence_length": 256, **options})


def test_an_interrupted_job_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _job(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(2, patch)
        _job(tmp_path / "out")
    _job(tmp_path / "out")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")
    monkeypatch.setattr(int8, "int8_passes", lambda device, dtype: False)
    _job(tmp_path / "wide")
    assert weight_files(tmp_path / "wide") != weight_files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "settings", "options"),
    [
        # attention and MLP side by side: the MLP's first linear shares q's input, and runs after o
        ("gptj", {}, {}),
        ("cohere", {"num_hidden_layers": 3}, {}),
        # kv_a shares q_a's input, and runs after q_b
        ("deepseek_v3", LATENT | {"num_hidden_layers": 3, "first_k_dense_replace": 3}, {}),
        (
            "llama",
            {"num_hidden_layers": 3},
            {"rules": [{"layers": "*.k_proj", "bits": 8, "group_size": 32}], "format": "plain"},
        ),
    ],
)
def test_linears_that_share_an_input_and_run_at_other_times_do_too(
    kind: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoints(kind, **settings)
    job = {"method": "gptq", "group_size": 32, **options}
    quantize(source, tmp_path / "whole", **job)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(2, patch)
        quantize(source, tmp_path / "out", **job)
    quantize(source, tmp_path / "out", **job)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")


@pytest.mark.parametrize("bits", [3, 8])
def test_other_weights_than_those_of_four_bits_are_passed_through_in_sixteen(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(int8, "Int8Linear", never)
    _job(tmp_path / "out", bits=bits, format="plain")
    with pytest.raises(AssertionError):
        _job(tmp_path / "four")
