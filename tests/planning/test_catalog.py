"""Names, configs and directories → what a model is. Parameter counts are checked against transformers and
published figures."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.catalog import (
    catalogue,
    find_model,
    load_model,
    model_from_config,
    model_from_directory,
    stored_bytes,
)
from quant.checkpoint.header import TensorInfo
from quant.errors import CheckpointError, UsageError
from quant.evaluation.inspect import inspect
from quant.hardware import named_gpu, named_gpus
from quant.models.roles import role_of
from quant.models.shapes import spec_from_config, weights_from_tensors
from quant.models.spec import ModelSpec
from quant.planning import EngineRequest, plan
from quant.planning.recommendation import recommend
from tests.helpers import copy_model, load_all, save_all
from tests.planning.tiny_models import TINY

#: published counts that include what is no parameter: block scales (MiniMax), or were read from another
#: revision (Llama 3.2 Vision)
LOOSE = {"MiniMaxAI/MiniMax-M2.7": 1e-4, "meta-llama/Llama-3.2-11B-Vision-Instruct": 0.005}


def test_every_catalogue_entry_can_be_planned_and_names_its_source() -> None:
    for name, entry in catalogue().items():
        assert entry["source"], name
        spec = find_model(name)
        assert spec.parameters > 1e7 and spec.cache, name


@pytest.mark.parametrize("name", [n for n, e in catalogue().items() if e.get("parameters")])
def test_parameter_counts_are_those_published(name: str) -> None:
    assert find_model(name).parameters == pytest.approx(
        catalogue()[name]["parameters"], rel=LOOSE.get(name, 1e-9)
    )


@pytest.mark.parametrize("name", sorted(TINY))
def test_parameter_counts_are_those_of_the_model_that_transformers_builds(name: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = TINY[name]
    family = dict(config)
    hf = AutoConfig.for_model(family.pop("model_type"), **family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    assert spec_from_config(config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("meta-llama/Llama-3.1-8B", {"full": 32}),
        ("deepseek-ai/DeepSeek-V3", {"mla": 61}),
        ("google/gemma-3-27b-it", {"sliding": 52, "full": 10}),
        ("openai/gpt-oss-20b", {"sliding": 12, "full": 12}),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", {"state": 36, "full": 12}),
        ("Qwen/Qwen2.5-7B", {"full": 28}),  # sliding_window is set there, but switched off
        ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", {"state": 27, "full": 4}),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", {"chunked": 36, "full": 12}),
        ("google/gemma-4-E4B-it", {"sliding": 20, "full": 4}),  # the last 18 layers read other layers' caches
    ],
)
def test_layer_kinds_are_read_from_the_config(name: str, kinds: dict[str, int]) -> None:
    found: dict[str, int] = {}
    for layer in find_model(name).cache:
        found[layer.kind] = found.get(layer.kind, 0) + 1
    assert found == kinds


def test_active_parameters_of_a_mixture_are_those_of_its_name() -> None:
    assert find_model("Qwen/Qwen3-30B-A3B").active_parameters == pytest.approx(3.0e9, rel=0.1)
    assert find_model("deepseek-ai/DeepSeek-V3").active_parameters == pytest.approx(37e9, rel=0.05)


def named_tensors(spec: ModelSpec) -> list[TensorInfo]:
    """The tensors of a model whose experts lie in its file one by one."""
    tensors = []
    for w in spec.weights:
        for i in range(w.count):
            name = re.sub(r"(?<![^.])experts[.]", f"experts.{i}.", w.tensor) if w.count > 1 else w.tensor
            tensors.append(TensorInfo(name, "BF16", w.shape, Path("m.safetensors"), 0, 0))
    return tensors


def test_shared_experts_of_a_file_are_read_for_every_token() -> None:
    spec = find_model("deepseek-ai/DeepSeek-V2-Lite-Chat")
    read = replace(spec, weights=tuple(weights_from_tensors(named_tensors(spec), {}, spec.layers)))
    h, inner, heads = 2048, 1408, 16
    attention = heads * 192 * h + 576 * h + heads * 256 * 512 + h * heads * 128 + 512 + 2 * h
    mixture = (2 + 6) * 3 * inner * h + 64 * h  # both shared experts, 6 of 64 routed ones, the router
    expected = 27 * attention + 3 * 10944 * h + 26 * mixture + 102400 * h + h
    assert read.by_role == spec.by_role and read.by_role["shared_experts"] == 26 * 2 * 3 * inner * h
    assert read.active_parameters == spec.active_parameters == expected == pytest.approx(2.45e9, rel=0.01)


@pytest.mark.parametrize("name", sorted(TINY))
def test_inspect_and_the_planner_give_every_tensor_one_role(name: str, tmp_path: Path) -> None:
    spec = spec_from_config(TINY[name])
    write_tensors(tmp_path, TINY[name], named_tensors(spec))
    assert inspect(tmp_path)["parameters_by_role"] == model_from_directory(tmp_path).by_role == spec.by_role


def test_every_weight_of_the_catalogue_has_the_role_that_its_name_says() -> None:
    for name in catalogue():
        spec = find_model(name)
        for kind in {(w.tensor, w.role) for w in spec.weights if w.layer in (-1, 0, 1, spec.layers - 1)}:
            tensor, role = kind
            assert role == "mtp" or role_of(tensor, spec.layers) == role, (name, kind)


def test_drafting_layers_are_in_the_file_but_not_among_the_parameters() -> None:
    spec = find_model("deepseek-ai/DeepSeek-V3")
    assert spec.parameters == pytest.approx(671e9, rel=0.001)
    assert spec.by_role["mtp"] == pytest.approx(14e9, rel=0.1)


@pytest.mark.parametrize(
    ("name", "method", "parameters"),
    [
        ("Qwen2.5-7B-Instruct-AWQ", "awq", 7.6e9),
        ("meta-llama/Llama-3.1-70B", None, 70.6e9),
        ("TheBloke/Llama-2-13B-chat-GPTQ", "gptq", 13.0e9),
        ("unsloth/meta-llama-3.1-8b-instruct-bnb-4bit", "bitsandbytes", 8.0e9),
        ("RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", "compressed-tensors", 70.6e9),
        ("openai/gpt-oss-120b", "mxfp4", 116.8e9),
        ("QWEN/qwen2.5_0.5b", None, 0.49e9),
        ("zai-org/GLM-4.6", None, 357e9),
        ("zai-org/GLM-4.6-FP8", "compressed-tensors", 357e9),
        ("moonshotai/Kimi-K2-Thinking", "compressed-tensors", 1.026e12),
        ("deepseek-ai/DeepSeek-V3.1-Terminus", "fp8", 671e9),
        ("Qwen/Qwen3.5-397B-A17B-FP8", "fp8", 397e9),
        ("Qwen/Qwen3.8-2.4T-A95B", None, 2.42e12),
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", None, 120.6e9),
        ("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", None, 550e9),
        ("zai-org/GLM-4.5-Air-FP8", "compressed-tensors", 106.9e9),
    ],
)
def test_names_are_found_with_their_own_quantization(
    name: str, method: str | None, parameters: float
) -> None:
    spec = find_model(name)
    assert (spec.quantization or {}).get("quant_method") == method
    assert spec.parameters == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Qwen3-9B", "Qwen/Qwen3-8B"),
        ("llama-3-9b", "meta-llama/Meta-Llama-3-8B"),
        ("Lama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("lama-2-hf", "meta-llama/Llama-2-7b-hf"),
        ("zai-org/GLM-4.6-Air", "zai-org/GLM-4.5-Air"),
        ("someone/mystery-13b-v2", ""),
        ("new-100B-A5B", ""),
    ],
)
def test_no_unknown_name_is_answered_with_another_model(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match="not in the catalogue") as refused:
        find_model(name)
    said = str(refused.value)
    assert "--online" in said and "--model-path" in said
    assert (meant in said) if meant else "Did you mean" not in said


@pytest.mark.parametrize(
    ("name", "gpu", "size"),
    [  # sizes that vllm-project/recipes@8959cf64 states; ranks hold some tensors each
        ("moonshotai/Kimi-K2-Thinking", "8xH200", 595e9),
        ("moonshotai/Kimi-K2.6", "8xH200", 595e9),
        ("Qwen/Qwen3.8-2.4T-A95B", "16xB300", 4.45 * 2**40),
    ],
)
def test_published_checkpoints_have_their_published_size(name: str, gpu: str, size: float) -> None:
    gpus = named_gpus(gpu)
    found = plan(find_model(name), gpus, None, EngineRequest(tensor_parallel=len(gpus)))
    assert found.weights_bytes * len(gpus) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("Qwen/Qwen3.5-397B-A17B-FP8", "8xH200"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct-FP8", "4xH200"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct-FP8", "8xH200"),
        ("zai-org/GLM-4.6-FP8", "8xH200"),
    ],
)
def test_makers_own_fp8_is_served_as_it_is_where_it_was_made_for(name: str, gpu: str) -> None:
    found = recommend(name, gpu)
    assert found.recommended == "none", found.reason


@pytest.mark.parametrize(
    "parts",
    [
        {
            "compress_ratios": [0, 4, 128],
            "index_topk": 512,
            "hc_mult": 4,
            "expert_dtype": "fp4",
        },  # DeepSeek V4
        {"hybrid_layer_pattern": [0, 1, 1], "swa_num_key_value_heads": 8},  # MiMo V2 Flash
        {"sparse_attention_config": {"sparse_topk_blocks": 16}},  # MiniMax M3
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_a_family_without_a_row_whose_layers_have_parts_of_their_own_is_planned_as_never_sure(
    parts: dict[str, Any],
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "newer_than_this", "hidden_size": 1024,
        "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
        "intermediate_size": 4096, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert recommend(model_from_config(config), "L40S").recommended is not None
    spec = model_from_config(config | parts)
    assert next(iter(parts)) in spec.unknown_layers and any("no verdict is sure" in n for n in spec.notes)
    found = recommend(spec, "L40S")
    assert found.recommended is None and "tight" in found.reason


def test_what_is_not_exact_says_so() -> None:
    thinking = find_model("deepseek-ai/DeepSeek-V3-Thinking")
    assert any("taken as stored in fp8, as deepseek-ai/DeepSeek-V3" in note for note in thinking.notes)
    small = find_model("Qwen/Qwen3.5-9B")
    assert small.uncertainty == pytest.approx(0.06) and any("vision tower" in note for note in small.notes)


def test_experts_in_a_narrower_space_are_counted_in_it() -> None:
    """Nemotron 3 Super: 512 experts of 1024 values in a layer of 4096."""
    spec = find_model("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16")
    shapes = {w.name: w.shape for w in spec.weights if w.layer == 1}
    assert shapes["mlp.experts.up_proj"] == (2688, 1024) and shapes["mlp.fc2_latent_proj"] == (4096, 1024)
    assert spec.active_parameters == pytest.approx(12e9, rel=0.1) and not spec.unknown_layers


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("unsloth/Qwen3-8B", "unsloth/Qwen3-8B"),
        ("TheBloke/Llama-2-13B-chat-GPTQ", "TheBloke/Llama-2-13B-chat-GPTQ"),
    ],
)
def test_commands_keep_the_owner(name: str, hub: str) -> None:
    found = recommend(name, "L40S", EngineRequest(context=2048))
    assert hub in shlex.split(found.commands[0]) and not any("OWNER" in note for note in found.notes)


def test_a_name_without_a_known_owner_says_so_in_its_commands() -> None:
    found = recommend("Qwen2.5-7B-Instruct-AWQ", "L40S")
    assert "OWNER/Qwen2.5-7B-Instruct-AWQ" in found.commands[0]
    assert any("OWNER stands for" in note for note in found.notes)


@pytest.mark.parametrize(
    "missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]
)
def test_a_config_without_a_needed_key_says_which(missing: str) -> None:
    config = {k: v for k, v in TINY["gqa"].items() if k != missing}
    with pytest.raises(UsageError, match=missing):
        model_from_config(config)


@pytest.mark.parametrize("value", [-1, 0, 10**30, "many", 1.5, True])
def test_absurd_sizes_in_a_config_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="hidden_size"):
        model_from_config({**TINY["gqa"], "hidden_size": value})


def test_heads_that_kv_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="KV heads"):
        model_from_config({**TINY["gqa"], "num_key_value_heads": 3})


def write_tensors(folder: Path, config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> None:
    """A checkpoint of BF16 tensors that are all zeros: a header, and a hole for the data."""
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for info in tensors:
        end = offset + 2 * info.numel
        header[info.name] = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(folder / "model.safetensors", 8 + len(raw) + offset)


def write_checkpoint(folder: Path, dtype: str = "BF16", width: int = 2) -> int:
    """A safetensors file of the tiny Llama whose data is all zeros; its parameters."""
    config = TINY["gqa"]
    (folder / "config.json").write_text(json.dumps(config))
    h, i, v, d = 256, 512, 1024, 64
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [v, h],
        "lm_head.weight": [v, h],
        "model.norm.weight": [h],
    }
    for n in range(4):
        p = f"model.layers.{n}."
        shapes |= {p + "input_layernorm.weight": [h], p + "post_attention_layernorm.weight": [h]}
        shapes |= {p + "self_attn.q_proj.weight": [4 * d, h], p + "self_attn.o_proj.weight": [h, 4 * d]}
        shapes |= {p + f"self_attn.{x}_proj.weight": [2 * d, h] for x in "kv"}
        shapes |= {
            p + "mlp.gate_proj.weight": [i, h],
            p + "mlp.up_proj.weight": [i, h],
            p + "mlp.down_proj.weight": [h, i],
        }
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = shape[0] * (shape[1] if len(shape) > 1 else 1) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(file, 8 + len(raw) + offset)  # the data itself is a hole
    return offset // width


def test_a_directory_gives_the_exact_bytes_by_role_from_its_headers(tmp_path: Path) -> None:
    count = write_checkpoint(tmp_path)
    spec = model_from_directory(tmp_path)
    assert spec.parameters == count == spec_from_config(TINY["gqa"]).parameters
    assert stored_bytes(spec) == 2 * count
    assert spec.by_role == {k: v for k, v in spec_from_config(TINY["gqa"]).by_role.items() if v}


def test_a_32_bit_file_is_known_to_be_one(tmp_path: Path) -> None:
    count = write_checkpoint(tmp_path, "F32", 4)
    spec = model_from_directory(tmp_path)
    assert stored_bytes(spec) == 4 * count
    found = plan(spec, [named_gpu("L40S")], None, EngineRequest(context=1024))
    assert found.weights_bytes == 2 * count + spec.rotary_bytes  # served in 16 bits: half of the file


def test_a_bf16_file_is_served_at_its_size(tmp_path: Path) -> None:
    count = write_checkpoint(tmp_path)
    spec = model_from_directory(tmp_path)
    assert (
        plan(spec, [named_gpu("L40S")], None, EngineRequest(context=1024)).weights_bytes
        == 2 * count + spec.rotary_bytes
    )


def test_a_directory_without_weights_is_computed_and_one_without_config_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        model_from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY["gqa"]))
    assert "computed from config.json" in " ".join(load_model(tmp_path).notes)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    assert "before it can be quantized" in load_model(tmp_path).notes[-1]
    assert "pickled weights" in load_model(tmp_path).notes[-1]


@pytest.mark.parametrize(
    "content", [b"", b"short", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 5) + b"{bad}"]
)
def test_damaged_safetensors_headers_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY["gqa"]))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        model_from_directory(tmp_path)


def test_an_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY["gqa"]))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../other.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="inside the model's folder"):
        model_from_directory(tmp_path)


def test_numbers_without_a_dimension_and_leftover_buffers_are_planned_with(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """As EleutherAI's Pythia publishes its masks: they count for nothing, and a note says so."""
    source = copy_model(checkpoints("llama"), tmp_path / "model")
    tensors = load_all(source)
    before = model_from_directory(source)
    place = "model.layers.0.attention."
    extra = {f"{place}bias": torch.ones(1, 1, 8, 8).bool(), f"{place}masked_bias": torch.tensor(-1e4)}
    save_all(source, {**tensors, **extra, "model.scale": torch.tensor(1.0)})
    after = model_from_directory(source)
    assert after.parameters == before.parameters + 1
    assert any(n.startswith("2 leftover buffers (bias, masked_bias") for n in after.notes)
    recommended = recommend(source, "L40S-48GB", EngineRequest(context=128))
    assert recommended.plans


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("QuantTrio/MiniMax-M2.7-AWQ", "awq"), ("cognitivecomputations/DeepSeek-R1-AWQ", "awq"),
        ("nvidia/DeepSeek-R1-0528-NVFP4", "modelopt"), ("MiniMaxAI/MiniMax-M2-FP8", "fp8"),
        ("unsloth/DeepSeek-V3-bf16", None), ("MiniMaxAI/MiniMax-M2", "fp8"),
    ],
)  # fmt: skip
def test_a_mark_in_the_name_wins_over_how_the_maker_stores_the_model(name: str, method: str | None) -> None:
    """Of a model that is published in FP8 too: half or twice its size."""
    spec = find_model(name)
    assert (spec.quantization or {}).get("quant_method") == method
    own = find_model("MiniMaxAI/MiniMax-M2.7" if "MiniMax" in name else "deepseek-ai/DeepSeek-V3")
    gpus = [named_gpu("H200")] * 8
    request = EngineRequest(context=8192, tensor_parallel=8)
    share = plan(spec, gpus, None, request).weights_bytes / plan(own, gpus, None, request).weights_bytes
    low, high = {"awq": (0.5, 0.55), "modelopt": (0.5, 0.6), "fp8": (0.99, 1.01), None: (1.85, 2.05)}[method]
    assert low < share < high, share
