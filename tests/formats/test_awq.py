"""AWQ words by hand, and AutoAWQ's three packings of one model read back to AutoAWQ's own values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant.checkpoint.dtypes import HEADER
from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError
from quant.evaluation.verify import verify
from quant.formats import Contents, FormatRegistry, find_format
from quant.formats.reading import dequantized, read_linear
from quant.schemes import WeightScheme, scheme_of
from quant.tensors import QuantizedTensor
from quant.vllm.layers import Linear
from tests.helpers import ROOT

PEERS = ROOT / "tests" / "fixtures" / "peers"
AWQ = FormatRegistry.get("awq")
NAME = "model.layers.0.self_attn.q_proj"
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {n: TensorInfo(n, HEADER[t.dtype], tuple(t.shape), None, 0, 0) for n, t in tensors.items()}  # type: ignore[arg-type]


def random_tensor(n: int, k: int, group: int, symmetric: bool) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(n + k)
    scheme = WeightScheme(4, group, symmetric)
    zeros = torch.randint(-8, 8, (n, scheme.groups(k)), generator=generator).to(torch.int8)
    codes = torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8)
    scales = torch.rand(n, scheme.groups(k), generator=generator) + 0.01
    return QuantizedTensor(codes, scales.bfloat16(), None if symmetric else zeros, scheme)


def test_eight_outputs_are_interleaved_in_a_word_and_zero_points_are_stored_as_they_are() -> None:
    scheme = WeightScheme(4, 8, False)
    codes = (torch.arange(8) - 8).to(torch.int8).unsqueeze(1).repeat(1, 8)  # output n holds n
    tensor = QuantizedTensor(
        codes, torch.ones(8, 1, dtype=torch.float16), torch.zeros(8, 1, dtype=torch.int8), scheme
    )
    packed = AWQ.pack(Linear(NAME, 8, 8, scheme), tensor, torch.float16)
    assert packed[f"{NAME}.qweight"].tolist() == [[0x75316420]] * 8
    assert packed[f"{NAME}.qzeros"].tolist() == [[0x88888888 - (1 << 32)]]
    assert packed[f"{NAME}.scales"].shape == (1, 8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 32, 128])
def test_what_is_packed_unpacks_to_equal_values(group: int, symmetric: bool) -> None:
    tensor = random_tensor(48, 256, group, symmetric)
    linear = Linear(NAME, 48, 256, tensor.scheme)
    packed = AWQ.pack(linear, tensor, torch.bfloat16)
    assert {t: (HEADER[v.dtype], tuple(v.shape)) for t, v in packed.items()} == {
        s.name: (s.dtype, s.shape) for s in AWQ.specs(linear, "BF16")
    }
    config = AWQ.config(Contents([linear], ["lm_head"]))
    assert config is not None and config["zero_point"] and config["modules_to_not_convert"] is None
    found = find_format({"quantization_config": config}, infos(packed))
    assert found is not None and found.options["packing"] == {NAME: "gemm"}
    again = AWQ.unpack(found.linears[NAME], packed, found.options)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
def test_each_packing_of_autoawq_is_told_by_its_shapes_and_read_to_its_values(version: str) -> None:
    from safetensors.torch import load_file

    checkpoint = open_checkpoint(PEERS / f"awq-{version}")
    config = checkpoint.config["quantization_config"]
    for claimed in (
        config,
        {**config, "version": "gemm"},
        {k: v for k, v in config.items() if k != "version"},
    ):
        found = find_format({"quantization_config": claimed}, checkpoint.tensors)
        assert (
            found is not None
            and set(found.options["packing"].values()) == {version}
            and len(found.linears) == 14
        )
    values, plain = load_file(PEERS / "awq-gemm" / "values.oracle"), dequantized(checkpoint)
    for name in found.linears:
        assert torch.equal(plain.read(f"{name}.weight").half(), values[f"{name}.weight"])
    checks = verify(PEERS / f"awq-{version}").checks
    refused = [c.detail for c in checks if c.name == "vLLM takes it" and not c.passed]
    assert refused == (
        []
        if version == "gemm"
        else [
            f"the words are packed as AutoAWQ's {version}: vLLM reads every AWQ file as gemm; quant "
            "export-vllm converts it"
        ]
    )


def words(**changes: Any) -> dict[str, torch.Tensor]:
    tensor = random_tensor(48, 256, 32, False)
    return AWQ.pack(Linear(NAME, 48, 256, tensor.scheme), tensor, torch.float16) | {
        f"{NAME}.{k}": v for k, v in changes.items()
    }


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"bits": 8}, words(), "says bits 8: AWQ files hold 4"),
        ({"group_size": 64}, words(), "are not of groups of 64"),
        ({"group_size": 0}, words(), "says group_size 0"),
        ({}, words(qzeros=torch.zeros(3, 5, dtype=torch.int32)), "none of AutoAWQ's packings"),
        ({}, {k: v for k, v in words().items() if "scales" not in k}, "has no tensor"),
    ],
)
def test_what_is_no_awq_file_is_refused_by_name(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_format({"quantization_config": CONFIG | config}, infos(tensors))


def test_zero_points_that_the_config_denies_are_refused() -> None:
    tensors = words()
    found = find_format({"quantization_config": CONFIG | {"zero_point": False}}, infos(tensors))
    assert found is not None
    with pytest.raises(CheckpointError, match="zero_point is false, but zero points other than 8 are stored"):
        AWQ.unpack(found.linears[NAME], tensors, found.options)


def test_damaged_zero_points_of_gemv_fast_are_refused() -> None:
    from dataclasses import replace

    checkpoint = open_checkpoint(PEERS / "awq-gemv_fast")
    found = find_format(checkpoint.config, checkpoint.tensors)
    assert found is not None
    broken = replace(
        checkpoint, computed={f"{NAME}.qzeros": lambda: checkpoint.read(f"{NAME}.qzeros") * 1.05}
    )
    with pytest.raises(CheckpointError, match="gemv_fast file is damaged"):
        read_linear(AWQ, found, broken, NAME)


def test_the_list_of_unquantized_layers_is_complete_or_absent() -> None:
    scheme = WeightScheme(4, 32, False)
    linears = [Linear(f"model.layers.1.mlp.{x}_proj", 64, 64, scheme) for x in ("gate", "up", "down")]
    full = AWQ.config(Contents(linears, ["lm_head", "model.layers.0.mlp.down_proj"]))
    assert full is not None and full["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    router = AWQ.config(
        Contents(linears, ["lm_head", "model.layers.1.mlp.gate"])
    )  # a part of mlp.gate_up_proj
    assert router is not None and router["modules_to_not_convert"] is None


@pytest.mark.parametrize(
    ("scheme", "target", "message"),
    [
        (WeightScheme(8, 128), "vllm", "AWQ files hold 4 bits, not 8"),
        (WeightScheme(4, 256), "vllm", "group size 256"),
        (WeightScheme(4, 256), "other", None),
        (WeightScheme(4, 128, False), "vllm", None),
    ],
)
def test_schemes_it_cannot_hold_are_refused(scheme: WeightScheme, target: str, message: str | None) -> None:
    reason = AWQ.refuse(scheme_of(scheme), target)
    assert (reason is None) == (message is None) and (message is None or message in str(reason))
