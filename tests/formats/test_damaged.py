"""Quantized checkpoints whose tensors or config contradict each other: an error that names the layer, before
anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.header import TensorInfo
from quant.errors import CheckpointError, QuantError
from quant.evaluation.verify import verify
from quant.formats import find_format
from quant.pipeline.export import export
from tests.helpers import change_config, copy_model, load_all, read_config, save_all

LAYER = "model.layers.0.self_attn.q_proj"
#: Options of the checkpoint, the tensor that is changed, what becomes of it.
DAMAGES: dict[str, tuple[dict[str, Any], str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "words of half the inputs": ({"group_size": -1}, "weight_packed", lambda t: t[:, : t.shape[1] // 2]),
    "no words": ({}, "weight_packed", lambda t: t[:0]),
    "scales in one row": ({}, "weight_scale", lambda t: t.reshape(-1)),
    "scales of half the outputs": ({}, "weight_scale", lambda t: t[: len(t) // 2]),
    "scales turned": (
        {"scheme": "w8a8-int8", "group_size": None, "outlier_suppression": "none"},
        "weight_scale",
        lambda t: t.t(),
    ),
    "zero points of half the outputs": (
        {"symmetric": False},
        "weight_zero_point",
        lambda t: t[: len(t) // 2],
    ),
    "zero points as one number": ({"symmetric": False}, "weight_zero_point", lambda t: t.reshape(-1)[0]),
    "another shape": ({}, "weight_shape", lambda t: torch.zeros_like(t)),
    "a shape of one side": ({}, "weight_shape", lambda t: t[:1]),
    "exponents that are numbers": (
        {"scheme": "mxfp8", "group_size": None},
        "weight_scale",
        lambda t: t.float(),
    ),
    "scales of NVFP4 in fp32": (
        {"scheme": "nvfp4a16", "group_size": None},
        "weight_scale",
        lambda t: t.float(),
    ),
}


@pytest.mark.parametrize("form", ["plain", "compressed-tensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tensor_that_does_not_fit_is_named_with_its_layer(
    damage: str, form: str, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    options, last, change = DAMAGES[damage]
    folder = copy_model(quantized(**options), tmp_path / "damaged")
    tensors = load_all(folder)
    tensors[f"{LAYER}.{last}"] = change(tensors[f"{LAYER}.{last}"])
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    save_all(folder, tensors)
    with pytest.raises(QuantError, match=LAYER) as refused:
        export(folder, tmp_path / "out", form)
    assert "fetch" in str(refused.value) or "contract" in str(refused.value)
    assert not (tmp_path / "out").exists()
    verify(folder)  # says what it finds, whatever it is


@pytest.mark.parametrize("value", [True, 3, 1.5, "lm_head", [1], ["re:("]], ids=str)
@pytest.mark.parametrize(
    ("options", "key"),
    [({}, "ignore"), ({"scheme": "w8a8-fp8-tensor", "group_size": None, "format": "fp8"}, "ignored_layers")],
)
def test_a_list_of_names_that_is_none_fails_the_check(
    options: dict[str, Any], key: str, value: Any, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_model(quantized(**options), tmp_path / "damaged")
    change_config(folder, quantization_config=read_config(folder)["quantization_config"] | {key: value})
    found = verify(folder)
    assert not found.passed and f"quantization_config has {key}" in found.failed[0]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "scale"),
    [
        ("mlp.up_proj.weight", (8, 8), "F8_E5M2", "mlp.up_proj.weight_scale"),
        ("mlp.experts.gate_up_proj", (2, 8, 8), "F8_E5M2", "mlp.experts.gate_up_proj_scale_inv"),
        ("mlp.up_proj.weight", (8, 8), "I8", "mlp.up_proj.SCB"),
    ],
)
def test_codes_that_nothing_reads_are_never_taken_for_values(
    name: str, shape: tuple[int, ...], dtype: str, scale: str, labelled: bool
) -> None:
    """An FP8 checkpoint whose config.json was replaced by the original's, or with codes of another kind than
    its method has."""
    tensors = {
        f"model.layers.0.{n}": TensorInfo(f"model.layers.0.{n}", d, s, Path(), 0, 0)
        for n, d, s in ((name, dtype, shape), (scale, "F32", (1,)))
    }
    method = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    with pytest.raises(CheckpointError, match=f"is stored as {dtype}"):
        find_format({"quantization_config": method} if labelled else {}, tensors)


@pytest.mark.parametrize(
    ("codes", "dtype", "scale"),
    [
        ("weight", "F8_E4M3", "weight_scale_inv"),
        ("weight", "F8_E4M3", "scale"),
        ("weight_packed", "I32", "weight_scale"),
        ("qweight", "I32", "scales"),
        ("down_proj_blocks", "U8", "down_proj_scales"),
    ],
)
def test_a_quantized_file_without_a_word_in_its_config_is_no_plain_one(
    codes: str, dtype: str, scale: str
) -> None:
    held = {f"x.{codes}": (dtype, (8, 8)), f"x.{scale}": ("F32", (8, 1))}
    tensors = {n: TensorInfo(n, d, s, Path(), 0, 0) for n, (d, s) in held.items()}
    with pytest.raises(CheckpointError, match=rf"x\.{codes} is stored as {dtype}, beside x\.{scale}"):
        find_format({}, tensors)
    alone = {f"x.{codes}": replace(tensors[f"x.{codes}"], dtype="BF16")}
    assert find_format({}, alone) is None


def test_a_long_value_of_config_json_is_shown_by_its_beginning() -> None:
    method = {"quant_method": "fp8", "activation_scheme": {f"k{i}": i for i in range(5000)}}
    tensors = {"x.weight": TensorInfo("x.weight", "F8_E4M3", (8, 8), Path(), 0, 0)}
    with pytest.raises(CheckpointError, match="activation_scheme is {'k0': 0") as told:
        find_format({"quantization_config": method}, tensors)
    assert len(str(told.value)) < 500
