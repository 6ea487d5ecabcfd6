"""Values of a config.json that no model has: refused by their key, never met as a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from quant.catalog import catalogue, model_from_config
from quant.errors import QuantError, UsageError
from quant.evaluation.inspect import inspect
from quant.evaluation.verify import verify
from quant.models.values import LARGEST_DEPTH, Values
from quant.planning.cuts import group_problems
from quant.schemes import PRESETS
from tests.planning.tiny_models import TINY

#: One of each kind of layer, of experts, of towers.
MODELS = (
    "deepseek-ai/DeepSeek-V3.2", "google/gemma-4-E4B-it", "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "moonshotai/Kimi-Linear-48B-A3B-Instruct", "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "meta-llama/Llama-3.2-11B-Vision-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "OpenGVLab/InternVL3_5-14B-HF",
    "openai/gpt-oss-20b", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "openai-community/gpt2",
    "tiiuae/falcon-7b", "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen3-VL-8B-Instruct",
)  # fmt: skip
WRONG = (
    float("inf"),
    float("nan"),
    -1,
    0,
    10**30,
    10**400,
    1.5,
    True,
    "many",
    "",
    [],
    [7],
    ["x"],
    {},
    {"x": 1},
    None,
)


def places(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path to every value of a config, of objects inside too."""
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, Mapping):
            yield from places(value, (*path, key))


def replaced(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = deepcopy(dict(config))
    part = changed
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return changed


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with few layers, so that many of them are built in a second."""
    changed = deepcopy(dict(config))
    for path in list(places(changed)):
        if path[-1] in ("num_hidden_layers", "n_layer", "depth") and "vision_config" not in path:
            changed = replaced(changed, path, 4)
    return changed


@pytest.mark.parametrize("name", MODELS)
def test_no_wrong_value_of_a_config_gives_a_traceback(name: str) -> None:
    config = small(catalogue()[name]["config"])
    refused = 0
    for path in places(config):
        for value in WRONG:
            try:
                spec = model_from_config(replaced(config, path, value))
                assert spec.to_dict() and group_problems(spec, PRESETS["w4a16"], 2) is not None
            except QuantError as error:
                refused += 1
                assert len(str(error)) < 400, (path, value)
    assert refused > 50


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", float("inf"), "hidden_size is inf: must be a whole number from 1"),
        ("num_hidden_layers", LARGEST_DEPTH + 1, "is 16385: must be a whole number from 1 to 16,384"),
        ("intermediate_size", [8192] * 3, r"intermediate_size is \[8192, .*: must be .* one for each of"),
        ("sliding_window", float("nan"), "sliding_window is nan: must be a whole number from 0"),
        ("mlp_only_layers", 3, "mlp_only_layers is 3: must be a list"),
        ("layer_types", [["full_attention"]] * 8, r"layer_types has \['full_.*: must be a list of words"),
        ("linear_attn_config", 7, "linear_attn_config is 7: must be an object"),
        ("partial_rotary_factor", "half", "partial_rotary_factor is 'half': must be a number above 0"),
        ("model_type", 5, "model_type is 5: must be a word"),
        ("rope_scaling", {"rope_type": "linear", "factor": float("inf")}, "rope_scaling: factor is inf"),
        ("vision_config", {"hidden_size": "wide"}, "vision_config: hidden_size is 'wide'"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key_with_the_rule(key: str, value: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        model_from_config({**TINY["moe"], key: value})


@pytest.mark.parametrize(
    "listed",
    [{"layers_block_type": ["moe", "attention"]}, {"layer_types": ["moe", "full_attention"]},
     {"hybrid_override_pattern": "E*"}],
)  # fmt: skip
def test_layers_of_experts_without_a_number_of_experts_are_refused(listed: dict[str, Any]) -> None:
    config = {k: v for k, v in TINY["gqa"].items() if "layer" not in k or k == "num_hidden_layers"}
    with pytest.raises(UsageError, match="layer 0 is one of experts .* give a complete config.json"):
        model_from_config({**config, "model_type": "nemotron_h", "num_hidden_layers": 2, **listed})


@pytest.mark.parametrize("more", [{"n_mamba_heads": 8}, {"mamba_d_state": 16}])
def test_recurrent_layers_whose_sizes_are_called_otherwise_are_never_planned_as_surely(
    more: dict[str, Any],
) -> None:
    config = {**TINY["gqa"], "model_type": "novel", "num_hidden_layers": 2, **more}
    spec = model_from_config({**config, "layers_block_type": ["mamba", "attention"]})
    assert "mamba without sizes" in spec.unknown_layers


@pytest.mark.parametrize("key", ["architectures", "model_type", "num_attention_heads", "rope_scaling"])
def test_commands_read_a_checkpoint_whose_config_has_values_of_wrong_kinds(
    key: str, llama: Path, tmp_path: Path
) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    for value in (float("inf"), 7, [7], {"x": 7}):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        assert inspect(tmp_path)["tensors"] and verify(tmp_path, tensor_parallel=2).checks


def test_values_are_those_of_the_text_decoder_under_any_of_their_names() -> None:
    values = Values({"n_embd": 64, "text_config": {"hidden_size": 32, "rope": {"theta": 2}}}, "config.json")
    assert (values.count("hidden_size"), values.part("rope").number("theta", 1.0)) == (32, 2.0)
    assert values.count("absent", 5) == 5 and values.items("absent") == [] and values.text("absent") == ""
    with pytest.raises(UsageError, match="config.json lacks vocab_size or padded_vocab_size: it is needed"):
        values.count("vocab_size")


_BASE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 100}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4}


def test_families_that_size_layers_otherwise_are_planned_and_never_as_sure() -> None:
    each = model_from_config({**_BASE, "model_type": "llama", "intermediate_size": [8, 16, 8, 16]})
    inner = [w.shape[0] for w in each.weights if w.name.endswith("gate_proj")]
    assert inner == [8, 16, 8, 16] and not each.unknown_layers
    # GPT-2's relatives state none, and others have it where this does not look
    plain = model_from_config({**_BASE, "model_type": "some_bloom"})
    assert plain.intermediate == 256 and "inner size" in plain.unknown_layers
    # of one word for several kinds the sizes decide
    kinds = ["linear_attention", "full_attention"] * 2
    granite = {
        **_BASE,
        **_MAMBA,
        "model_type": "granitemoehybrid",
        "intermediate_size": 8,
        "layer_types": kinds,
    }
    states = [c.kind for c in model_from_config(granite).cache]
    assert states == ["state", "full"] * 2
    blocks = ["linear_attention", "mlp", "full_attention", "mlp"]
    counted = {k: v for k, v in _BASE.items() if k != "num_hidden_layers"}
    nemotron = {
        **counted,
        **_MAMBA,
        "model_type": "nemotron_h",
        "intermediate_size": 8,
        "layers_block_type": blocks,
    }
    made = model_from_config(nemotron)
    assert made.layers == 4 and [c.kind for c in made.cache] == ["state", "full"]
    lightning = {**_BASE, "model_type": "minimax", "intermediate_size": 8, "layer_types": kinds}
    assert "without sizes" in model_from_config(lightning).unknown_layers
    with pytest.raises(UsageError, match="models without attention are not planned"):
        model_from_config({"model_type": "mamba", "hidden_size": 64, "n_layer": 2, "vocab_size": 100})
