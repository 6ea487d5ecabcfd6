"""Activations as vLLM rounds them: each scheme against its definition, and the runs that use them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.calibration.statistics import Statistics
from quant.checkpoint.reader import open_checkpoint
from quant.evaluation import quality, simulation
from quant.evaluation.simulation import Kernels, cut
from quant.formats import QuantizedLayers
from quant.quantizers.activations import fake_quantize, input_parameters
from quant.schemes import PRESETS, ActivationScheme
from quant.serving.reference import Reference, kernels
from quant.tensors import E2M1, InputParameters
from quant.vllm.layers import Linear
from tests.helpers import quantize, short_text
from tests.models.mixtures import save_mixture

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[torch.isfinite(E4M3)].unique()
FP4 = torch.tensor([*E2M1, *(-x for x in E2M1)]).unique()


def tokens(t: int = 7, k: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(t, k, generator=generator) + 0.5
    x[:, 3] *= 40
    x[2] = 0
    return x


def nearest(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Distance of each value from the nearest of some numbers."""
    return (x.unsqueeze(-1).double() - numbers.double()).abs().amin(-1)


def test_int8_by_token_is_within_half_a_step_of_each_token_s_own() -> None:
    x = tokens()
    symmetric, asymmetric = (
        fake_quantize(x, ActivationScheme()),
        fake_quantize(x, ActivationScheme(symmetric=False)),
    )
    step = x.abs().amax(-1, keepdim=True) / 127
    assert bool(((symmetric - x).abs() <= step / 2 * 1.0001).all())
    codes = symmetric / step.where(step > 0, 1.0)
    assert torch.allclose(codes, codes.round(), atol=1e-4) and float(codes.abs().max()) == pytest.approx(127)
    width = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    assert bool(((asymmetric - x).abs() <= width * 1.0001).all())  # code and zero point are rounded apart
    assert float((asymmetric - x).square().mean()) < float((symmetric - x).square().mean())
    assert not symmetric[2].any() and bool(torch.isfinite(asymmetric).all())


def test_a_token_far_from_zero_keeps_its_precision_with_a_zero_point() -> None:
    x = 1000 + torch.linspace(0, 1, 64)[None]  # vLLM's range is the token's own, its zero point an int32
    assert float((fake_quantize(x, ActivationScheme(symmetric=False)) - x).abs().max()) < 1 / 255 + 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_int8_clips_what_calibration_did_not_see(symmetric: bool) -> None:
    scheme = ActivationScheme(strategy="tensor", dynamic=False, symmetric=symmetric)
    numbers = input_parameters(
        Statistics(1, minimum=torch.tensor([-1.0, 0.0]), maximum=torch.tensor([0.0, 3.0])), scheme
    )
    assert numbers is not None and numbers.scale is not None and (numbers.zero is None) == symmetric
    x = torch.tensor([[-1.0, 3.0, 0.0, 50.0, 1.234]])
    found = fake_quantize(x, scheme, numbers)
    step = float(numbers.scale)
    assert step == pytest.approx((6 if symmetric else 4) / 255)
    assert float((found - x)[0, [0, 1, 2, 4]].abs().max()) <= 1.01 * step and float(
        found[0, 3]
    ) == pytest.approx(3, abs=1.01 * step)
    assert float(found[0, 2]) == 0


def test_fp8_gives_e4m3_numbers_times_one_scale() -> None:
    x = tokens()
    by_token = fake_quantize(x, PRESETS["w8a8-fp8"].activations)  # type: ignore[arg-type]
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1 / (448 * 512))
    assert float(nearest(by_token / scale, E4M3).max()) < 1e-4 * 448
    assert bool(((by_token - x).abs() <= x.abs() * 2**-4 + scale * 2**-10).all())
    static = fake_quantize(
        x, ActivationScheme(8, "float", "tensor", dynamic=False), InputParameters(scale=torch.tensor([0.01]))
    )
    assert float(nearest(static / 0.01, E4M3).max()) < 1e-3 and float(static.abs().max()) <= 4.4801
    groups = fake_quantize(x[:, :200], PRESETS["fp8-block"].activations)  # type: ignore[arg-type]
    assert groups.shape == (7, 200)
    assert float((groups - x[:, :200])[:, 128:].abs().max()) <= float(x[:, 128:200].abs().max()) * 2**-4


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_small_groups_give_numbers_of_their_format_times_a_scale_of_their_own(name: str) -> None:
    x, scheme = tokens(), PRESETS[name].activations
    assert scheme is not None and scheme.group_size is not None
    numbers = InputParameters(global_scale=(448 * 6 / x.abs().max()).reshape(1)) if name == "nvfp4" else None
    found = fake_quantize(x, scheme, numbers)
    values = FP4 if scheme.bits == 4 else E4M3
    for group, exact in zip(found.view(-1, scheme.group_size), x.view(-1, scheme.group_size), strict=True):
        largest = float(exact.abs().max())
        if largest == 0:
            assert not group.any()
            continue
        if numbers is not None and numbers.global_scale is not None:
            scale = float(
                (numbers.global_scale * largest / 6).to(torch.float8_e4m3fn).float() / numbers.global_scale
            )
        else:
            scale = 2.0 ** math.ceil(math.log2(largest / (6 if scheme.bits == 4 else 448)))
        assert float((nearest(group / scale, values)).max()) < 1e-3
        assert float((group - exact).abs().max()) <= (1.2 if scheme.bits == 4 else 32) * scale


def test_the_dtype_stays_and_the_argument_is_not_changed() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = tokens().to(dtype)
        before = x.clone()
        assert fake_quantize(x, ActivationScheme()).dtype == dtype and torch.equal(x, before)


@pytest.fixture
def with_int8(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a plain checkpoint pass for one whose linears have int8 activations."""

    def mark(path: Path) -> None:
        tensors = open_checkpoint(path).tensors
        names = [n.removesuffix(".weight") for n in tensors if "_proj" in n]
        scheme = PRESETS["w8a8-int8"]
        linears = {
            n: Linear(n, *tensors[f"{n}.weight"].shape, scheme.weights, scheme.activations) for n in names
        }
        monkeypatch.setattr(
            simulation, "find_format", lambda config, found: QuantizedLayers("plain", linears, {})
        )

    return mark


def test_evaluate_rounds_the_candidate_s_activations_alone_and_says_so(
    llama: Path, with_int8: Callable[[Path], None]
) -> None:
    options: dict[str, Any] = {"against": llama, "text": short_text(), "length": 32, "chunks": 3}
    plain = quality.evaluate(llama, **options)
    assert plain.activations is None and plain.kl is not None and plain.kl.mean == 0
    with_int8(llama)
    found = quality.evaluate(llama, **options)
    assert found.activations == "simulated INT8 dynamic token"
    assert found.kl is not None and 1e-7 < found.kl.mean < 1e-2
    assert found.source_perplexity == plain.source_perplexity and found.perplexity != plain.perplexity


def test_the_reference_for_vllm_rounds_them_too(llama: Path, with_int8: Callable[[Path], None]) -> None:
    rows = torch.arange(2, 34).reshape(2, 16)
    plain, _ = Reference(llama).logs(rows, torch.float32)
    with_int8(llama)
    rounded, _ = Reference(llama).logs(rows, torch.float32)
    assert 1e-5 < float((plain - rounded).abs().max()) < 0.5


def test_an_fp8_cache_is_rounded_where_the_checkpoint_has_its_scales(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"text": short_text(), "length": 32, "chunks": 3, "against": llama}
    kinds = {"samples": 4, "sequence_length": 64, "calibration_dataset": [short_text()], "group_size": 32}
    quantize(llama, tmp_path / "plain", bits=8, **kinds)
    quantize(llama, tmp_path / "cached", bits=8, kv_cache_scheme="fp8", **kinds)
    without, cached = (quality.evaluate(tmp_path / n, **options) for n in ("plain", "cached"))
    assert (without.activations, cached.activations) == (None, "simulated FP8 KV cache")
    assert without.kl is not None and cached.kl is not None and without.kl.mean < cached.kl.mean < 0.05


def test_kernels_that_take_weights_alone_are_told_from_the_log() -> None:
    """Lines as vLLM 0.32 prints them."""
    line = "(EngineCore pid=7) INFO 11-25 09:00:01 [__init__.py:757] Selected {} for {}"
    alone = [
        line.format("MarlinFP8ScaledMMLinearKernel", "CompressedTensorsW8A8Fp8"),
        line.format("CPUFp8BlockScaledMMKernel", "Fp8LinearMethod"),
        "INFO Using MarlinNvFp4LinearKernel for NVFP4 GEMM",
        "INFO Using MarlinMxFp4LinearKernel for MXFP4 GEMM",
        "INFO Using MarlinMxfp8LinearKernel for MXFP8 GEMM",
    ]
    assert not any(kernels(["INFO starting", x]).activations for x in alone)
    rounding = [
        line.format("ChannelWiseTorchFP8ScaledMMLinearKernel", "CompressedTensorsW8A8Fp8"),
        line.format("CutlassFP8ScaledMMLinearKernel", "CompressedTensorsW8A8Fp8"),
        line.format("CPUFp8W8A8BlockScaledMMKernel", "Fp8LinearMethod"),
        "INFO Using MarlinLinearKernel for CompressedTensorsWNA16",  # of a mixed file's 4-bit layers
    ]
    assert kernels(rounding) == Kernels()
    assert kernels(
        ["INFO [core.py:109] Initializing a V1 LLM engine (v0.32.0) with config: device_config=cpu, seed=0"]
    ) == Kernels(nearest_cache=False)


def test_a_run_without_rounded_activations_is_another_one(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    job = {"method": "minmax", "scheme": "w8a8-int8", "outlier_suppression": "none"}
    quantize(checkpoints("llama"), tmp_path / "o", **job)
    rows = torch.arange(24).view(2, 12)
    rounded, alone = (
        Reference(tmp_path / "o", Kernels(activations=a)).logs(rows, torch.float32)[0] for a in (True, False)
    )
    assert 0 < float((rounded - alone).abs().max()) < 1


def test_cutting_takes_the_next_number_towards_zero() -> None:
    """Vectors are what vLLM 0.32's cpu_attn_reshape_and_cache made of the quotients."""
    given = [50.99, -70.4, -35.2, -108.37, 110.08, 19.41, 448.0, 1000.0, 0.0, 2.0**-10, -(2.0**-9)]
    assert cut(torch.tensor(given)).tolist() == [
        48.0,
        -64.0,
        -32.0,
        -104.0,
        104.0,
        18.0,
        448.0,
        448.0,
        0.0,
        0.0,
        -(2.0**-9),
    ]
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 100
    below = torch.stack([n.where(n.abs() <= values.abs(), 0.0) for n in E4M3])
    below = below.where(below.sign() == values.sign(), 0.0)
    assert torch.equal(cut(values).abs(), below.abs().amax(0))


@pytest.mark.parametrize("scheme", ["w8a8-fp8", "nvfp4"])
def test_each_expert_reads_what_its_own_numbers_round(scheme: str, tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "model", "qwen3_moe")
    quantize(source, tmp_path / "out", method="minmax", scheme=scheme, samples=4, sequence_length=32)
    checkpoint = open_checkpoint(tmp_path / "out")
    runner = quality.Runner(checkpoint, torch.device("cpu"), simulation.Simulation(checkpoint))
    skeleton, rounding = runner.skeleton, runner.simulation
    block = skeleton.load_block(0)
    experts = block.mlp.experts
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    index, weights = torch.tensor([[0, 2], [1, 2], [3, 0]] * 2), torch.rand(6, 2)
    with torch.no_grad(), rounding.inside(block, skeleton.block_prefix(0), skeleton.linears(0)):
        found = experts(hidden, index, weights)
    kind = PRESETS[scheme].activations
    wanted = torch.zeros_like(hidden)
    with torch.no_grad():
        for token, (chosen, gates) in enumerate(zip(index.tolist(), weights, strict=True)):
            for expert, gate in zip(chosen, gates, strict=True):

                def read(last: str, expert: int = expert) -> InputParameters | None:
                    name = f"model.layers.0.mlp.experts.{expert}.{last}.input_global_scale"
                    numbers = checkpoint.tensors.get(name) and checkpoint.read(name)
                    return None if numbers is None else InputParameters(global_scale=numbers)

                row = fake_quantize(hidden[token : token + 1], kind, read("gate_proj"))
                g, u = (row @ experts.gate_up_proj[expert].t()).chunk(2, -1)
                inner = fake_quantize(torch.nn.functional.silu(g) * u, kind, read("down_proj"))
                wanted[token] += gate * (inner @ experts.down_proj[expert].t())[0]
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, experts(hidden, index, weights), rtol=1e-4, atol=1e-5)
