"""What llm-compressor writes in its presets, beside what we read of it and would write ourselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.evaluation.verify import verify
from quant.formats import Format, FormatRegistry, QuantizedLayers, find_format
from quant.formats.reading import read_linear
from quant.quantizers import MinMaxQuantizer
from quant.schemes import PRESETS, Scheme, resolve_scheme
from quant.vllm.layers import fused_name
from tests.helpers import ROOT, load_all

PEERS = ROOT / "tests" / "fixtures" / "peers"
#: Its preset, by our name for it.
NAMES: dict[str, Scheme] = {
    "fp8_dynamic": PRESETS["w8a8-fp8"],
    "fp8": resolve_scheme("w8a8-fp8-tensor", activations="static"),
    "fp8_block": PRESETS["fp8-block"],
    "w8a8": PRESETS["w8a8-int8"],
    "nvfp4": PRESETS["nvfp4"],
    "mxfp4": PRESETS["mxfp4"],
    "mxfp8": PRESETS["mxfp8"],
}


def opened(preset: str) -> tuple[Path, Checkpoint, QuantizedLayers, Format]:
    path = PEERS / f"llmc-{preset}"
    checkpoint = open_checkpoint(path)
    found = find_format(checkpoint.config, checkpoint.tensors)
    assert found is not None and len(found.linears) == 14
    return path, checkpoint, found, FormatRegistry.get(found.format)


@pytest.mark.parametrize("preset", NAMES)
def test_its_files_are_of_our_scheme_with_our_tensors(preset: str) -> None:
    path, checkpoint, found, form = opened(preset)
    assert {x.scheme for x in found.linears.values()} == {NAMES[preset]}
    for name, linear in found.linears.items():
        specs = {s.name: (s.dtype, s.shape) for s in form.specs(linear, "F16")}
        held = {n: (i.dtype, i.shape) for n, i in checkpoint.tensors.items() if n.startswith(f"{name}.")}
        # it keeps scales of 8-bit formats in the model's dtype; vLLM's parameters, and ours, are fp32
        rounded = {
            n: ("F32" if v[0] == "F16" and n.endswith("_scale") else v[0], v[1]) for n, v in held.items()
        }
        assert rounded == specs
    result = verify(path)
    # 64 inputs do not fill a block, which vLLM's kernels demand
    wanted = ["tensor parallel"] if preset == "fp8_block" else []
    assert [c.name for c in result.checks if not c.passed] == wanted, result.failed


@pytest.mark.parametrize("preset", NAMES)
def test_its_values_are_read_as_the_official_package_reads_them(preset: str) -> None:
    path, checkpoint, found, form = opened(preset)
    tensors = load_all(path)
    group = QuantizationConfig.model_validate(checkpoint.config["quantization_config"]).config_groups[
        "group_0"
    ]
    assert isinstance(group, QuantizationScheme)
    compressor = BaseCompressor.get_value_from_registry(str(group.format))
    for name in found.linears:
        state = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        theirs = compressor.decompress(state, group)["weight"]
        ours = read_linear(form, found, checkpoint, name)
        assert torch.equal(ours.dequantize().to(theirs.dtype), theirs)
        assert (ours.inputs is None) == (preset not in ("fp8", "nvfp4"))


@pytest.mark.parametrize("preset", NAMES)
def test_our_rounding_is_no_farther_from_the_source(preset: str) -> None:
    _, checkpoint, found, form = opened(preset)
    source = load_all(PEERS / "source")
    largest: dict[str, torch.Tensor] = {}
    for name in found.linears:  # shards of a fused layer share the number of the tensor
        amax = source[f"{name}.weight"].float().abs().amax()
        largest[fused_name(name)] = torch.maximum(largest.get(fused_name(name), amax), amax)
    ours = theirs = 0.0
    for name, linear in found.linears.items():
        weight = source[f"{name}.weight"].float()
        shared = largest[fused_name(name)] if preset == "nvfp4" else None  # its FP8 shards have one each
        made = MinMaxQuantizer()(weight.clone(), None, linear.weights, torch.float16, shared).tensor
        ours += float((made.dequantize() - weight).square().sum())
        theirs += float((read_linear(form, found, checkpoint, name).dequantize() - weight).square().sum())
    assert ours <= theirs * 1.001, (ours, theirs)


def test_a_global_scale_is_one_for_the_fused_layer() -> None:
    _, checkpoint, found, form = opened("nvfp4")
    shards = [
        read_linear(form, found, checkpoint, f"model.layers.0.self_attn.{x}_proj").global_scale for x in "qkv"
    ]
    source = load_all(PEERS / "source")
    amax = torch.stack(
        [source[f"model.layers.0.self_attn.{x}_proj.weight"].float().abs().amax() for x in "qkv"]
    ).amax()
    for shard, letter in zip(shards, "qkv", strict=True):
        weight = source[f"model.layers.0.self_attn.{letter}_proj.weight"].float()
        ours = MinMaxQuantizer()(
            weight, None, PRESETS["nvfp4"].weights, torch.float16, amax
        ).tensor.global_scale
        assert shard is not None and ours is not None
        torch.testing.assert_close(shard.float(), ours, rtol=1e-4, atol=0)  # it divides in half precision
