"""Every sub-format against the official compressed-tensors package: it reads our files to our values, and we
read its files to its values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize

from quant.formats import Contents, FormatRegistry, find_format
from quant.formats.compressed_tensors import layout_of
from quant.formats.packing import pack_halves, unpack_halves
from quant.quantizers import MinMaxQuantizer
from quant.quantizers.floats import encode, nearest_float
from quant.schemes import PRESETS, Scheme, resolve_scheme
from quant.tensors import InputParameters, QuantizedTensor, code_values
from quant.vllm.cache import KV_CACHE
from quant.vllm.layers import Linear
from tests.formats.test_contracts import infos

CT = FormatRegistry.get("compressed-tensors")
NAME = "model.layers.0.mlp.down_proj"
LOADED = [s for s in PRESETS.values() if CT.refuse(s, "vllm") is None]
STATIC = [
    resolve_scheme("w8a8-int8", activations="static"),
    resolve_scheme("w8a8-int8", activations="static", symmetric_activations=False),
    resolve_scheme("w8a8-fp8-tensor", activations="static"),
]


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Heavy tails, outputs of different sizes, a column of outliers, one output and one group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator).mul_(0.1)
    values[:, 5] *= 20
    values[3] = 0
    values[4, :32] = 0
    return values.to(torch.bfloat16).float()


def made(scheme: Scheme, n: int = 128, k: int = 256) -> tuple[torch.Tensor, Linear, QuantizedTensor]:
    weight = weights(n, k)
    tensor = MinMaxQuantizer()(weight.clone(), None, scheme.weights, torch.bfloat16).tensor
    if scheme.activations is not None and scheme.activations.calibrated:
        nvfp4 = scheme.activations.strategy == "tensor_group"
        inputs = (
            InputParameters(global_scale=torch.tensor([512.0]))
            if nvfp4
            else InputParameters(scale=torch.tensor([0.02]))
        )
        inputs = replace(
            inputs, zero=None if scheme.activations.symmetric else torch.tensor([-7], dtype=torch.int8)
        )
        tensor = replace(tensor, inputs=inputs)
    return weight, Linear(NAME, n, k, scheme.weights, scheme.activations), tensor


def official(config: dict[str, Any]) -> tuple[Any, QuantizationScheme]:
    """The package's own reading of a config: its compressor and its scheme."""
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    return BaseCompressor.get_value_from_registry(str(scheme.format)), scheme


def short(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(f"{NAME}."): t for n, t in tensors.items()}


@pytest.mark.parametrize("scheme", [*LOADED, *STATIC], ids=lambda s: f"{s.name}-{s.activations}")
def test_the_package_reads_our_files_to_our_values(scheme: Scheme) -> None:
    _, linear, tensor = made(scheme)
    packed = CT.pack(linear, tensor, torch.bfloat16)
    assert {n: (i.dtype, i.shape) for n, i in infos(packed).items()} == {
        s.name: (s.dtype, s.shape) for s in CT.specs(linear, "BF16")
    }
    config = CT.config(Contents([linear], ["lm_head"]))
    assert config is not None and config["format"] == layout_of(linear)
    compressor, theirs = official(config)
    values = compressor.decompress(short(packed), theirs)["weight"]
    ours = tensor.dequantize()
    # it multiplies in the dtype it gives back
    torch.testing.assert_close(
        values.float(),
        ours.to(values.dtype).float(),
        rtol=0 if values.dtype != torch.float32 else 1e-6,
        atol=0,
    )


@pytest.mark.parametrize("scheme", [*LOADED, *STATIC], ids=lambda s: f"{s.name}-{s.activations}")
def test_a_file_reads_back_to_the_same_bits(scheme: Scheme) -> None:
    _, linear, tensor = made(scheme)
    packed = CT.pack(linear, tensor, torch.bfloat16)
    found = find_format({"quantization_config": CT.config(Contents([linear]))}, infos(packed))
    assert found is not None and found.linears == {NAME: linear}
    again = CT.unpack(found.linears[NAME], packed, found.options)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert again.scheme == tensor.scheme
    assert (again.inputs is None) == (tensor.inputs is None)
    if again.inputs is not None and tensor.inputs is not None:
        for mine, theirs in zip(vars(again.inputs).values(), vars(tensor.inputs).values(), strict=True):
            assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))


@pytest.mark.parametrize("scheme", LOADED, ids=lambda s: s.name)
def test_we_read_the_packages_files_to_its_values(scheme: Scheme) -> None:
    """Scales are ours, codes and packing its own."""
    weight, linear, tensor = made(scheme)
    config = CT.config(Contents([linear]))
    assert config is not None
    compressor, theirs = official(config)
    arrays = short(CT.pack(linear, tensor, torch.bfloat16))
    state = {"weight": weight, "weight_scale": tensor.scales.float()}
    if scheme.weights.scales == "U8":
        state["weight_scale"] = torch.ldexp(torch.ones(tensor.scales.shape), tensor.scales.int() - 127)
    if tensor.zeros is not None:
        state["weight_zero_point"] = tensor.zeros
    if tensor.global_scale is not None:
        state["weight_global_scale"] = tensor.global_scale
    written = compressor.compress(state, theirs)
    files = {
        f"{NAME}.{n}": t for n, t in (arrays | {k: v for k, v in written.items() if k in arrays}).items()
    }
    found = find_format({"quantization_config": config}, infos(files))
    assert found is not None
    values = CT.unpack(found.linears[NAME], files, found.options).dequantize()
    wanted = compressor.decompress(short(files), theirs)["weight"]
    torch.testing.assert_close(
        values.to(wanted.dtype).float(),
        wanted.float(),
        rtol=0 if wanted.dtype != torch.float32 else 1e-6,
        atol=0,
    )
    # and where it rounds with our scales, it is never nearer to the weight than we are
    ours, its = (tensor.dequantize() - weight).square().sum(), (values - weight).square().sum()
    assert ours <= its * (1 + 1e-6), (float(ours), float(its))


@pytest.mark.parametrize(
    "name", ["w8a8-int8", "w8a8-fp8", "w8a8-fp8-tensor", "fp8-block", "nvfp4", "mxfp4", "mxfp8"]
)
def test_codes_are_the_packages_own(name: str) -> None:
    """With our stored scales its fake quantization chooses the same numbers, ties apart."""
    weight, linear, tensor = made(PRESETS[name])
    _, theirs = official(CT.config(Contents([linear])) or {})
    scale = (
        tensor.scales.float()
        if tensor.scales.dtype != torch.uint8
        else torch.ldexp(torch.ones(tensor.scales.shape), tensor.scales.int() - 127)
    )
    codes = quantize(weight, scale, torch.zeros_like(scale), theirs.weights, global_scale=tensor.global_scale)
    ours = code_values(tensor.codes) if PRESETS[name].weights.type == "float" else tensor.codes.float()
    assert float((codes.float() != ours).float().mean()) < 1e-3


@pytest.mark.parametrize("scheme", [*LOADED, *STATIC], ids=lambda s: f"{s.name}-{s.activations}")
def test_the_package_takes_every_config_that_we_write(scheme: Scheme) -> None:
    linear = Linear(NAME, 128, 256, scheme.weights, scheme.activations)
    config = CT.config(Contents([linear], ["lm_head"], KV_CACHE))
    assert config is not None
    read = QuantizationConfig.model_validate(config)
    assert read.kv_cache_scheme is not None
    group = read.config_groups["group_0"]
    assert isinstance(group, QuantizationScheme)
    assert (group.input_activations is None) == (scheme.activations is None)


def test_kinds_of_one_checkpoint_are_mixed_precision_by_full_names() -> None:
    """vLLM needs a format in every group then."""
    linears = [
        Linear("m.0.a", 128, 256, PRESETS["w8a8-fp8"].weights, PRESETS["w8a8-fp8"].activations),
        Linear("m.0.b", 128, 256, PRESETS["w4a16"].weights),
        Linear("m.1.a", 128, 256, PRESETS["w8a8-fp8"].weights, PRESETS["w8a8-fp8"].activations),
    ]
    config = CT.config(Contents(linears, ["lm_head"]))
    assert config is not None
    assert config["format"] == "mixed-precision"
    groups = [(g["format"], g["targets"]) for g in config["config_groups"].values()]
    assert groups == [("float-quantized", ["m.0.a", "m.1.a"]), ("pack-quantized", ["m.0.b"])]
    assert len(QuantizationConfig.model_validate(config).config_groups) == 2


def test_the_published_order_of_halves() -> None:
    """Codes 0 … 7 and their negatives: bytes of OCP's and vLLM's order, the even input low."""
    values = torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0]])
    codes = encode(nearest_float(values, 4), 4)
    packed = pack_halves(codes)
    assert packed.tolist() == [[0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x0F]]
    assert torch.equal(unpack_halves(packed), codes)
