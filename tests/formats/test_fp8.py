"""vLLM's native fp8 layout: names, dtypes and shapes of its contract, published configs, and the way back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quant.errors import CheckpointError
from quant.formats import Contents, FormatRegistry, find_format
from quant.quantizers import MinMaxQuantizer
from quant.schemes import PRESETS, Scheme, WeightScheme, resolve_scheme
from quant.tensors import InputParameters, QuantizedTensor
from quant.vllm.layers import Linear, shape_problems
from tests.formats.test_contracts import infos

FP8, CT = FormatRegistry.get("fp8"), FormatRegistry.get("compressed-tensors")
NAME = "model.layers.0.self_attn.q_proj"
STATIC = resolve_scheme("w8a8-fp8-tensor", activations="static")
#: As DeepSeek-V3 and Qwen3-FP8 publish theirs.
DEEPSEEK: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}


def made(scheme: Scheme, n: int = 200, k: int = 384) -> tuple[Linear, QuantizedTensor]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    tensor = MinMaxQuantizer()(weight, None, scheme.weights, torch.bfloat16).tensor
    if scheme == STATIC:
        tensor = replace(tensor, inputs=InputParameters(scale=torch.tensor([0.03])))
    return Linear(NAME, n, k, scheme.weights, scheme.activations), tensor


@pytest.mark.parametrize(
    ("scheme", "tensors", "config"),
    [
        (
            PRESETS["fp8-block"],
            {"weight": ("F8_E4M3", (200, 384)), "weight_scale_inv": ("F32", (2, 3))},
            {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        ),
        (
            PRESETS["w8a8-fp8-tensor"],
            {"weight": ("F8_E4M3", (200, 384)), "weight_scale": ("F32", (1,))},
            {"activation_scheme": "dynamic"},
        ),
        (
            STATIC,
            {"weight": ("F8_E4M3", (200, 384)), "weight_scale": ("F32", (1,)), "input_scale": ("F32", (1,))},
            {"activation_scheme": "static"},
        ),
    ],
    ids=lambda x: str(x)[:24],
)
def test_each_form_has_its_tensors_and_reads_back_to_the_bit(
    scheme: Scheme, tensors: dict[str, tuple[str, tuple[int, ...]]], config: dict[str, Any]
) -> None:
    linear, tensor = made(scheme)
    packed = FP8.pack(linear, tensor, torch.bfloat16)
    assert {n.removeprefix(f"{NAME}."): (i.dtype, i.shape) for n, i in infos(packed).items()} == tensors
    assert {s.name.removeprefix(f"{NAME}."): (s.dtype, s.shape) for s in FP8.specs(linear, "BF16")} == tensors
    written = FP8.config(Contents([linear], ["lm_head", "model.layers.1.mlp.gate"]))
    assert written is not None
    names = ["lm_head", "model.layers.1.mlp.gate"]
    assert (
        written
        == {"quant_method": "fp8", "fmt": "e4m3", "ignored_layers": names, "modules_to_not_convert": names}
        | config
    )
    found = find_format({"quantization_config": written}, infos(packed))
    assert found is not None and found.linears == {NAME: linear}
    again = FP8.unpack(linear, packed, found.options)
    assert torch.equal(again.dequantize(), tensor.dequantize()) and torch.equal(
        again.codes.view(torch.uint8), tensor.codes.view(torch.uint8)
    )
    assert (again.inputs is None) == (scheme != STATIC)
    assert again.inputs is None or again.inputs == replace(again.inputs, scale=again.inputs.scale)
    assert again.inputs is None or (
        again.inputs.scale is not None and float(again.inputs.scale) == pytest.approx(0.03)
    )


def test_a_published_block_checkpoint_is_read_with_its_scales_as_multipliers() -> None:
    """Ones everywhere but in the last, ragged block; scales as bf16, as Qwen stores them."""
    codes = torch.ones(130, 200).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=torch.bfloat16)
    tensors = {
        f"{NAME}.weight": codes,
        f"{NAME}.weight_scale_inv": scales,
        "lm_head.weight": torch.ones(2, 2),
    }
    found = find_format({"quantization_config": DEEPSEEK}, infos(tensors))
    assert (
        found is not None
        and list(found.linears) == [NAME]
        and found.linears[NAME].scheme == PRESETS["fp8-block"]
    )
    values = FP8.unpack(found.linears[NAME], tensors, found.options).dequantize()
    wanted = torch.ones(130, 200)
    wanted[:128, 128:], wanted[128:, :128], wanted[128:, 128:] = 2.0, 3.0, 0.5
    assert torch.equal(values, wanted)


def test_blocks_carry_over_to_compressed_tensors_unchanged() -> None:
    linear, tensor = made(PRESETS["fp8-block"])
    there = CT.pack(linear, tensor, torch.bfloat16)
    here = FP8.pack(linear, tensor, torch.bfloat16)
    assert torch.equal(there[f"{NAME}.weight_scale"], here[f"{NAME}.weight_scale_inv"])
    assert torch.equal(there[f"{NAME}.weight"].view(torch.uint8), here[f"{NAME}.weight"].view(torch.uint8))


@pytest.mark.parametrize("scale", [(), (1,), (1, 1)])
def test_a_scale_of_a_tensor_may_be_a_scalar(scale: tuple[int, ...]) -> None:
    codes = torch.full((8, 16), 2.0).to(torch.float8_e4m3fn)
    tensors = {f"{NAME}.weight": codes, f"{NAME}.weight_scale": torch.full(scale, 0.25)}
    found = find_format(
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, infos(tensors)
    )
    assert found is not None
    assert torch.equal(
        FP8.unpack(found.linears[NAME], tensors, found.options).dequantize(), torch.full((8, 16), 0.5)
    )


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("fp8-block", "w8a8-fp8-tensor")])
def test_what_the_layout_cannot_hold_is_refused_with_the_way_out(name: str) -> None:
    assert "use --format compressed-tensors" in str(FP8.refuse(PRESETS[name], "vllm"))


def test_the_three_forms_are_taken_and_weights_alone_are_not() -> None:
    assert [FP8.refuse(s, "vllm") for s in (PRESETS["fp8-block"], PRESETS["w8a8-fp8-tensor"], STATIC)] == [
        None
    ] * 3
    assert "always has FP8 activations" in str(FP8.refuse(replace(STATIC, activations=None), "vllm"))
    assert "no word for activations" in str(
        FP8.refuse(replace(PRESETS["fp8-block"], activations=STATIC.activations), "vllm")
    )


@pytest.mark.parametrize(
    ("config", "lost", "message"),
    [
        (DEEPSEEK | {"weight_block_size": [64, 64]}, "", r"\(200, 384\) is .* \(4, 6\)"),
        (DEEPSEEK | {"weight_block_size": [0, 64]}, "", r"weight_block_size is \[0, 64\]: rows and columns"),
        (DEEPSEEK | {"activation_scheme": "static"}, "", "activation_scheme is 'static' with blocks"),
        (DEEPSEEK | {"activation_scheme": None}, "", "activation_scheme is None"),
        (
            DEEPSEEK | {"weight_block_size": 128},
            "",
            "weight_block_size is 128: rows and columns of a block are needed",
        ),
        (
            DEEPSEEK,
            "weight_scale_inv",
            "q_proj is quantized but has no tensor 'model.layers.0.self_attn.q_proj.weight_scale_inv'",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            "",
            r"weight_scale_inv is F32 \(2, 3\), the contract for a weight \(200, 384\) is .* \(1,\)",
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_in_words(
    config: dict[str, Any], lost: str, message: str
) -> None:
    linear, tensor = made(PRESETS["fp8-block"])
    tensors = {
        n: t for n, t in FP8.pack(linear, tensor, torch.bfloat16).items() if not lost or not n.endswith(lost)
    }
    with pytest.raises(CheckpointError, match=message):
        find_format({"quantization_config": config}, infos(tensors))


def test_scales_of_another_shape_or_type_are_refused() -> None:
    linear, tensor = made(PRESETS["fp8-block"])
    packed = FP8.pack(linear, tensor, torch.bfloat16)
    name = f"{NAME}.weight_scale_inv"
    for wrong in (packed[name][:1], packed[name].to(torch.float8_e5m2)):
        with pytest.raises(
            CheckpointError,
            match=r"weight_scale_inv is .*the contract for a weight \(200, 384\) is .*\(2, 3\)",
        ):
            find_format({"quantization_config": DEEPSEEK}, infos(packed | {name: wrong}))


def test_blocks_that_vllm_cannot_cut_are_named() -> None:
    scheme = PRESETS["fp8-block"].weights

    def linears(**sides: tuple[int, int]) -> list[Linear]:
        return [Linear(f"model.layers.0.mlp.{n}", *s, scheme) for n, s in sides.items()]

    assert shape_problems(linears(down_proj=(200, 256)), 1) == []
    (ragged,) = shape_problems(linears(down_proj=(256, 200)), 1)
    assert ragged.startswith(
        "model.layers.*.mlp.down_proj: 200 inputs do not divide into groups of 128: quantize with "
        "--scheme w8a8-fp8"
    )
    (shard,) = shape_problems(linears(gate_proj=(200, 256), up_proj=(200, 256)), 1)
    assert shard.startswith("model.layers.*.mlp.gate_proj: 200 outputs do not divide into blocks of 128")
    (rank,) = shape_problems(linears(up_proj=(384, 256)), 2)
    assert (
        "384 outputs over --tensor-parallel 2 do not divide into blocks of 128: tensor parallel sizes that "
        "do: 1" in rank
    )
    assert WeightScheme(8, -1).strategy == "channel"
