"""A quantized output head, as other programs write it: what each format must say of it so that vLLM builds it
quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import INDEX, open_checkpoint
from quant.errors import QuantError
from quant.evaluation.verify import verify
from quant.formats import Contents, FormatRegistry
from quant.formats.reading import dequantized
from quant.pipeline.export import export
from quant.quantizers import MinMaxQuantizer
from quant.schemes import WeightScheme
from quant.vllm.layers import Linear
from tests.helpers import change_config, copy_model, load_all, read_config, save_all

FORMATS = ("compressed-tensors", "gptq", "awq")


@pytest.fixture(scope="module")
def with_head(
    quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The tiny Llama in a format, its head quantized like all else and said to be so."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name in made:
            return made[name]
        folder = copy_model(quantized(format=name), tmp_path_factory.mktemp("head") / "model")
        form, tensors = FormatRegistry.get(name), load_all(folder)
        weight = tensors.pop("lm_head.weight")
        head = Linear("lm_head", weight.shape[0], weight.shape[1], WeightScheme(4, 32))
        rounded = MinMaxQuantizer()(weight.float(), None, head.weights, weight.dtype).tensor
        for file in (*folder.glob("*.safetensors"), folder / INDEX):
            file.unlink()
        save_all(folder, tensors | form.pack(head, rounded, weight.dtype))
        config = read_config(folder)["quantization_config"]
        said = form.config(Contents([head, head])) or {}
        change_config(folder, quantization_config=config | {k: said[k] for k in SAID[name]})
        made[name] = folder
        return folder

    return get


#: What a config says of a quantized head, by format.
SAID = {"compressed-tensors": ("config_groups", "ignore"), "gptq": ("lm_head",), "awq": ("lm_head",)}


def words(folder: Path) -> Any:
    """That of a config which says whether the head is quantized."""
    config = read_config(folder)["quantization_config"]
    if config["quant_method"] != "compressed-tensors":
        return config["lm_head"]
    (group,) = config["config_groups"].values()
    return group["targets"], config["ignore"]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_head_that_is_written_anew_is_still_said_to_be_quantized(
    name: str, to: str, with_head: Callable[[str], Path], tmp_path: Path
) -> None:
    assert verify(with_head(name)).passed, verify(with_head(name)).failed
    report = export(with_head(name), tmp_path / "out", to).to_dict()
    assert report["verify"]["passed"] and report["linears"] == 15
    assert words(tmp_path / "out") == ((["Linear", "lm_head"], []) if to == "compressed-tensors" else True)
    (said,) = [c.detail for c in verify(tmp_path / "out").checks if c.name == "head and embeddings"]
    assert said == "lm_head is quantized (w4a16 (W4 g32 symmetric))" or (
        to == "awq" and said == "lm_head is quantized (w4a16-asym (W4 g32 asymmetric))"
    )
    before, after = (dequantized(open_checkpoint(p)) for p in (with_head(name), tmp_path / "out"))
    assert torch.equal(before.read("lm_head.weight"), after.read("lm_head.weight"))


def test_a_head_that_is_not_quantized_is_said_to_be_none(quantized: Callable[..., Path]) -> None:
    for name in FORMATS:
        config = read_config(quantized(format=name))["quantization_config"]
        assert config.get("lm_head") in (None, False)
        (said,) = [c.detail for c in verify(quantized(format=name)).checks if c.name == "head and embeddings"]
        assert said == "unquantized"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", {"lm_head": False}, "lm_head is quantized, but lm_head is not true"),
        ("awq", {"lm_head": None}, "lm_head is quantized, but lm_head is not true"),
        ("compressed-tensors", {"ignore": ["lm_head"]}, "lm_head is quantized, but the ignore list hits it"),
        ("compressed-tensors", {"targets": ["Linear"]}, "lm_head is quantized, but no target names it"),
    ],
)
def test_a_config_by_which_vllm_would_build_the_head_in_full_precision_is_found(
    name: str, change: dict[str, Any], message: str, with_head: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_model(with_head(name), tmp_path / "m")
    config = read_config(folder)["quantization_config"]
    if "targets" in change:
        config["config_groups"]["group_0"]["targets"] = change["targets"]
    else:
        config |= change
    change_config(folder, quantization_config=config)
    assert any(message in problem for problem in verify(folder).failed), verify(folder).failed
    assert not any(message in problem for problem in verify(folder, target="other").failed)


def test_native_fp8_has_no_quantized_head(
    quantized: Callable[..., Path], with_head: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"scheme": "w8a8-fp8-tensor", "group_size": None, "format": "fp8"}
    folder = copy_model(quantized(**options), tmp_path / "m")
    tensors = load_all(folder)
    weight = tensors.pop("lm_head.weight")
    form, scheme = FormatRegistry.get("fp8"), WeightScheme(8, -1, True, "float", "tensor", "F32")
    head = Linear("lm_head", weight.shape[0], weight.shape[1], scheme)
    rounded = MinMaxQuantizer()(weight.float(), None, scheme, weight.dtype).tensor
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    save_all(folder, tensors | form.pack(head, rounded, weight.dtype))
    assert any("leaves the output head of a native fp8 file" in p for p in verify(folder).failed)
    with pytest.raises(QuantError, match="lm_head: vLLM leaves the output head .* use --format compressed"):
        export(folder, tmp_path / "out")
    report = export(folder, tmp_path / "out", "compressed-tensors").to_dict()
    assert report["verify"]["passed"] and words(tmp_path / "out") == (["Linear", "lm_head"], [])
