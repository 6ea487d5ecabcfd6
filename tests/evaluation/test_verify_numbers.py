"""What verify finds in checkpoints of 8-bit activations, FP8, FP4 and FP8 caches, damaged one way each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.errors import QuantError
from quant.evaluation.verify import verify
from tests.evaluation.test_inspect_compare_verify import gathered, poked, setting, without
from tests.helpers import change_config, load_all, quantize, read_config, save_all, short_text

ATTENTION = "model.layers.0.self_attn"
Q = f"{ATTENTION}.q_proj"
KINDS: dict[str, dict[str, Any]] = {
    "int8 static": {"scheme": "w8a8-int8", "activations": "static"},
    "int8 static asymmetric": {
        "scheme": "w8a8-int8",
        "activations": "static",
        "symmetric_activations": False,
    },
    "fp8": {"scheme": "w8a8-fp8"},
    "fp8 tensor": {"scheme": "w8a8-fp8-tensor", "activations": "static"},
    "block": {"scheme": "fp8-block"},
    "native block": {"scheme": "fp8-block", "format": "fp8"},
    "native tensor": {"scheme": "w8a8-fp8-tensor", "format": "fp8", "activations": "static"},
    "nvfp4": {"scheme": "nvfp4"},
    "mxfp4": {"scheme": "mxfp4"},
    "mxfp8": {"scheme": "mxfp8"},
    "cache": {"scheme": "w4a16", "group_size": 32, "kv_cache_scheme": "fp8"},
}


@pytest.fixture(scope="module")
def source(checkpoints: Callable[..., Path]) -> Path:
    """Every side fills blocks of 128."""
    return checkpoints(
        "llama", hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2
    )


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("numbers") / "output"
            text = {"samples": 8, "sequence_length": 64, "calibration_dataset": [short_text()]}
            quantize(source, made[kind], **{"method": "minmax"}, **KINDS[kind], **text)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_passes(kind: str, source: Path, checkpoint: Callable[[str], Path]) -> None:
    result = verify(checkpoint(kind), source=source)
    assert result.passed, result.failed


def with_code(code: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """One byte of a tensor of 8-bit numbers replaced."""

    def change(t: torch.Tensor) -> torch.Tensor:
        data = t.clone().view(torch.uint8)
        data.view(-1)[3] = code
        return data.view(t.dtype)

    return change


DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "NaN among FP8 weights": ("fp8", setting(f"{Q}.weight", with_code(0x7F)), "q_proj.weight holds 1 NaN"),
    "negative NaN": ("block", setting(f"{Q}.weight", with_code(0xFF)), "q_proj.weight holds 1 NaN"),
    "NaN among E8M0 scales": ("mxfp4", setting(f"{Q}.weight_scale", with_code(0xFF)),
        "q_proj.weight_scale "
        "holds 1 NaN"),
    "NaN among E8M0 scales of FP8": ("mxfp8", setting(f"{Q}.weight_scale", with_code(0xFF)),
    "q_proj.weight_scale holds 1 NaN"),
    "a zero among E4M3 scales": ("nvfp4", setting(f"{Q}.weight_scale", with_code(0)),
        "holds 1 scales that "
        "are not positive"),
    "a negative E4M3 scale": ("nvfp4", setting(f"{Q}.weight_scale", with_code(0x90)),
        "holds 1 scales that "
        "are not positive"),
    "a zero block scale": ("native block", setting(f"{Q}.weight_scale_inv", lambda t: t * 0),
    "weight_scale_inv holds 1 zero scales"),
    "a lost scale": ("fp8", without(f"{Q}.weight_scale"), "has no tensor"),
    "a lost input scale": ("int8 static", without(f"{Q}.input_scale"), "q_proj.input_scale is missing"),
    "a lost zero point": ("int8 static asymmetric", without(f"{Q}.input_zero_point"),
    "q_proj.input_zero_point is missing"),
    "a lost global scale": ("nvfp4", without(f"{Q}.weight_global_scale"),
        "q_proj.weight_global_scale is "
        "missing"),
    "a lost input global scale": ("nvfp4", without(f"{Q}.input_global_scale"),
        "q_proj.input_global_scale "
        "is missing"),
    "a native input scale lost": ("native tensor", without(f"{Q}.input_scale"),
        "q_proj.input_scale is "
        "missing"),
    "scales in place of exponents": ("mxfp4",
    setting(f"{Q}.weight_scale", lambda t: t.to(torch.float8_e4m3fn)), "is F8_E4M3, the contract is U8"),
    "scales of NVFP4 as fp32": ("nvfp4", setting(f"{Q}.weight_scale", lambda t: t.float()),
        "is F32, the "
        "contract is F8_E4M3"),
    "an input scale of its own": ("int8 static", setting(f"{Q}.input_scale", lambda t: t * 2),
        "q_proj, "
        "v_proj differ in input_scale, of which vLLM keeps one"),
    "a zero point of its own": ("int8 static asymmetric", setting(f"{Q}.input_zero_point", lambda t: t + 1),
    "differ in input_zero_point"),
    "a global scale of its own": ("nvfp4", setting(f"{Q}.weight_global_scale", lambda t: t / 2),
        "differ in "
        "weight_global_scale"),
    "an input global scale of its own": ("nvfp4", setting(f"{Q}.input_global_scale", lambda t: t / 2),
    "differ in input_global_scale"),
    "a negative input scale": ("fp8 tensor", setting(f"{Q}.input_scale", lambda t: -t),
        "q_proj.input_scale "
        "is negative"),
    "an infinite input scale": ("fp8 tensor", setting(f"{Q}.input_scale", lambda t: t * torch.inf),
    "q_proj.input_scale holds 1 NaN or infinite"),
    "a lost cache scale": ("cache", without(f"{ATTENTION}.k_scale"),
        "k_scale is missing: vLLM would take "
        "1.0|k_scale is missing"),
    "a zero cache scale": ("cache", setting(f"{ATTENTION}.v_scale", lambda t: t * 0),
        "v_scale holds 1 zero "
        "scales"),
    "a negative cache scale": ("cache", setting(f"{ATTENTION}.v_scale", lambda t: -t), "v_scale is negative"),
    "a cache scale a head": ("cache", setting(f"{ATTENTION}.v_scale", lambda t: t.repeat(2)),
    r"v_scale is F32 \(2,\), the contract is F32 \(1,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_the_damage_is_found_and_the_tensor_named(
    case: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, damage, message = DAMAGES[case]
    folder = gathered(checkpoint(kind), tmp_path / "m")
    assert verify(folder).passed
    tensors = load_all(folder)
    damage(tensors)
    save_all(folder, tensors)
    result = verify(folder)
    assert any(re.search(message, problem) for problem in result.failed), result.failed


def test_fp8_shards_with_a_scale_each_load_and_it_is_said(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Other writers leave them so; vLLM requantizes such shards to the largest scale."""
    folder = gathered(checkpoint("fp8 tensor"), tmp_path / "m")
    tensors = load_all(folder)
    assert "rounds" not in str(verify(folder).checks)
    tensors[f"{Q}.weight_scale"] /= 2
    save_all(folder, tensors)
    result = verify(folder)
    assert result.passed
    said = next(c.detail for c in result.checks if c.name == "shared numbers")
    assert said.endswith(
        "self_attn: k_proj, q_proj, v_proj differ in weight_scale: vLLM rounds their codes anew to the "
        "largest"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 4}, "kv_cache_scheme has num_bits 4: vLLM takes 8"),
        ({"type": "int"}, "kv_cache_scheme has type 'int'"),
        ({"dynamic": True}, "kv_cache_scheme has dynamic True"),
        ({"strategy": "token"}, "kv_cache_scheme has strategy 'token'"),
    ],
)
def test_cache_schemes_that_vllm_refuses_are_named(
    change: dict[str, Any], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = gathered(checkpoint("cache"), tmp_path / "m")
    config = read_config(folder)["quantization_config"]
    change_config(
        folder, quantization_config=config | {"kv_cache_scheme": config["kv_cache_scheme"] | change}
    )
    assert any(message in problem for problem in verify(folder).failed)


def test_names_of_a_native_config_are_compared_exactly(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = gathered(checkpoint("native block"), tmp_path / "m")
    config = read_config(folder)["quantization_config"]
    change_config(folder, quantization_config=config | {"ignored_layers": ["lm_head", Q]})
    assert any(f"{Q} is quantized, but ignored_layers names it" in p for p in verify(folder).failed)
    change_config(folder, quantization_config=config)
    tensors = load_all(folder)
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"{ATTENTION}.{name}.weight"] = tensors[f"{ATTENTION}.{name}.weight"].to(torch.bfloat16)
        del tensors[f"{ATTENTION}.{name}.weight_scale_inv"]
    save_all(folder, tensors)
    assert any(
        f"{Q} is not quantized, but ignored_layers does not name it" in p for p in verify(folder).failed
    )
    ignored = [f"{ATTENTION}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    change_config(folder, quantization_config=config | {"ignored_layers": ["lm_head", *ignored]})
    assert verify(folder).passed


def test_poked_scales_of_tokens_are_found_in_the_middle_of_a_tensor(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = gathered(checkpoint("fp8"), tmp_path / "m")
    tensors = load_all(folder)
    tensors[f"{Q}.weight_scale"] = poked(0.0)(tensors[f"{Q}.weight_scale"])
    save_all(folder, tensors)
    assert any("q_proj.weight_scale holds 1 zero scales" in p for p in verify(folder).failed)


def test_a_cache_whose_scales_have_no_place_is_refused_and_not_verified(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Persimmon's K and V come out of `query_key_value`, beside which nobody looks for scales."""
    source = checkpoints("persimmon", intermediate_size=128)
    with pytest.raises(
        QuantError,
        match="no layer has any of k_proj, qkv_proj, kv_a_proj_with_mqa, .*leave --kv-cache-scheme out",
    ):
        quantize(source, tmp_path / "refused", method="minmax", group_size=32, kv_cache_scheme="fp8")
    quantize(source, tmp_path / "out", method="minmax", group_size=32)
    config = read_config(tmp_path / "out")["quantization_config"]
    cache = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    change_config(tmp_path / "out", quantization_config=config | {"kv_cache_scheme": cache})
    assert any("no layer has any of k_proj" in p for p in verify(tmp_path / "out").failed)
