"""What vLLM builds of a file's linears: its fusions, what it builds in 16 bits whatever a config says, and
the names by which it asks for what stays there. ``tests/vllm/test_vllm_builds.py`` asks vLLM itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.errors import QuantError
from quant.evaluation.verify import verify
from quant.models.support import makeable_methods, scheme_problem
from quant.schemes import PRESETS
from quant.vllm.layers import (
    built_layers,
    built_plain,
    family_problem,
    fused_layers,
    ignored_names,
)
from quant.vllm.names import misplaced_experts, unread_note
from tests.helpers import (
    change_config,
    copy_model,
    load_all,
    quantize,
    randomize,
    read_config,
    save_all,
    save_model,
)
from tests.models.built import built_model


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of the families, each made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            model = built_model(family)
            randomize(model)
            made[family] = save_model(model, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return get


@pytest.mark.parametrize(
    ("kind", "tensor", "place"),
    [
        ("mixtral", "model.layers.0.mlp.experts.down_proj", "block_sparse_moe"),
        ("minimax_m2", "model.layers.0.mlp.experts.down_proj", "block_sparse_moe"),
        ("ernie4_5_moe", "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias", "mlp.moe_statics"),
        ("granitemoehybrid", "model.layers.0.block_sparse_moe.router.weight", "router.layer"),
        ("granitemoe", "model.layers.0.block_sparse_moe.router.weight", ""),
        ("qwen3_moe", "model.layers.0.mlp.experts.down_proj", ""),
    ],
)
def test_parts_of_a_mixture_under_names_that_vllm_does_not_read_are_told(
    kind: str, tensor: str, place: str
) -> None:
    said = misplaced_experts((kind,), ["model.norm.weight", tensor])
    assert (said is None) == (not place)
    assert said is None or (said.startswith(f"{tensor}: ") and place in said and "original format" in said)


@pytest.mark.parametrize(
    ("kind", "tensor", "told"),
    [
        ("llava", "vision_tower.encoder.layers.0.mlp.fc1.weight", True),
        ("llava", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", False),
        ("mistral3", "vision_tower.encoder.layers.0.mlp.fc1.weight", False),
        ("qianfan_ocr", "language_model.model.encoder.layers.0.mlp.up_proj.weight", True),
        ("qianfan_ocr", "language_model.model.layers.0.mlp.up_proj.weight", False),
        ("kimi_linear", "model.layers.0.block_sparse_moe.gate_proj.weight", True),
        ("kimi_linear", "model.layers.1.block_sparse_moe.experts.0.w1.weight", False),
    ],
)
def test_names_that_stop_the_load_of_the_source_too_are_told(kind: str, tensor: str, told: bool) -> None:
    said = unread_note(("llama", kind), [tensor])
    assert (said is not None and said.startswith(tensor)) == told


@pytest.mark.parametrize(
    ("module", "kinds", "fused"),
    [
        (
            "linear_attn: in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj",
            (),
            "in_proj_qkvz in_proj_ba out_proj",
        ),
        ("feed_forward: w1 w3 w2", ("lfm2",), "w13 w2"),
        ("feed_forward: w1 w3 w2", ("internlm2",), "gate_up_proj w2"),
        (
            "self_attn: q_proj k_proj v_proj b_proj f_a_proj f_b_proj g_a_proj g_b_proj o_proj",
            ("kimi_linear",),
            "in_proj_qkvgfab f_b_proj g_a_proj g_b_proj o_proj",
        ),
        ("self_attn: q_proj k_proj v_proj b_proj f_a_proj g_a_proj", ("glm5_next",), "in_proj_qkvbfg_a"),
        ("linear_attn: q_proj k_proj v_proj g_proj a_proj b_proj", (), "in_proj_qkvg a_proj b_proj"),
        ("self_attn: q_a_proj kv_a_proj_with_mqa q_b_proj", (), "fused_qkv_a_proj q_b_proj"),
        ("self_attn: q_a_proj kv_a_proj_with_mqa g_proj", (), "fused_qkv_a_g_proj"),
        ("attn: wq_a wkv wq_b", (), "fused_wqa_wkv wq_b"),
        ("compressor: wkv wgate", (), "fused_wkv_wgate"),
        ("mlp: c_fc_0 c_fc_1 c_proj", (), "gate_up_proj c_proj"),
        ("self_attn: q_proj k_proj v_proj g_proj o_proj", (), "qkv_proj g_proj o_proj"),
    ],
)
def test_what_stands_beside_a_linear_tells_what_it_is_fused_with(
    module: str, kinds: tuple[str, ...], fused: str
) -> None:
    path, _, parts = module.partition(": ")
    names = [f"model.layers.0.{path}.{part}" for part in parts.split()]
    layers = fused_layers(names, kinds)
    assert [name.rpartition(".")[2] for name in layers] == fused.split()
    assert sorted(name for shards in layers.values() for name in shards) == sorted(names)


def test_linears_whose_class_takes_no_quantization_are_told_by_their_module() -> None:
    mixer = [f"model.layers.0.mamba.{x}" for x in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    second = [f"model.layers.1.mamba.{x}" for x in ("in_proj", "out_proj")]  # Mamba 2 has no more
    indexer = [f"model.layers.0.self_attn.indexer.{x}" for x in ("wk", "weights_proj", "wq_b")]
    double = [f"model.layers.0.{x}.0.down_proj" for x in ("mlps", "mlp")]
    config = {"model_type": "x", "disable_quant_module": ["mlps"]}
    plain = built_plain([*mixer, *second, *indexer, *double], config)
    assert set(plain) == {*mixer, *indexer[:2], double[0]}
    assert "Mamba 1" in plain[mixer[0]] and "disable_quant_module" in plain[double[0]]
    assert set(built_plain(indexer, {}, fp8_blocks=True)) == {indexer[1]}  # its loader widens the keys' FP8


def test_a_pattern_names_a_part_of_the_model_and_nothing_that_is_quantized() -> None:
    quantized = [f"model.language_model.layers.{i}.mlp.{x}" for i in range(2) for x in ("proj", "down_proj")]
    left = ["model.visual.blocks.0.attn.qkv", "model.sam_model.blocks.3.lin1", "mtp.layers.0.fc", "lm_head"]
    patterns = [n[3:] for n in ignored_names(left, quantized, patterns=True) if n.startswith("re:")]
    asked = ("visual.blocks.0.attn.qkv_proj", "model.sam_model.neck", "model.mtp.layers.0.mlp.gate_up_proj")
    assert all(any(re.match(p, name) for p in patterns) for name in asked)
    mine = [*quantized, "language_model.model.layers.0.mlp.gate_up_proj", "language_model.lm_head"]
    assert not any(re.match(p, name) for p in patterns for name in mine)
    # a part whose name is that of a quantized linear as well gets no pattern
    assert ignored_names(["model.proj"], quantized, patterns=True) == ["model.proj"]


def test_mixers_of_mamba_1_are_left_alone_with_the_reason_and_found_where_they_were_not(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    report = quantize(sources("jamba"), tmp_path / "out", group_size=32)
    assert report["verify"]["passed"] and not any(".mamba." in n for n in report["tensors"]["quantized"])
    plain = report["plain_in_vllm"]
    assert {n.rpartition(".")[2] for n in plain} == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    assert set(plain) <= set(read_config(tmp_path / "out")["quantization_config"]["ignore"])
    quantize(sources("jamba"), tmp_path / "other", group_size=32, target="other")
    failed = verify(tmp_path / "other").failed
    assert any("mamba.in_proj is quantized: vLLM's mixer of Mamba 1" in problem for problem in failed), failed
    assert verify(tmp_path / "other", target="other").passed


def test_what_no_scheme_of_a_family_serves_is_not_recommended() -> None:
    for kind in ("mamba", "falcon_mamba"):
        assert makeable_methods({"model_type": kind}, PRESETS["w4a16"]) == ()
        assert "in 16 bits" in str(scheme_problem({"model_type": kind}, PRESETS["w4a16"]))
    assert "reorders" in str(family_problem(("bloom",), PRESETS["w4a16"]))
    assert family_problem(("bloom",), PRESETS["w8a8-fp8"]) is None
    assert family_problem(("llama4_text",), PRESETS["w4a16"]) is None
    assert "reorders" in str(family_problem(("llama4_text",), PRESETS["w4a16-asym"]))


def test_words_that_a_loader_reorders_are_refused_before_work(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=4096, hidden_size=64, n_layer=2, n_head=4)).bfloat16()
    source = save_model(model, tmp_path / "model")
    with pytest.raises(QuantError, match="query_key_value: vLLM's loader reorders its outputs"):
        quantize(source, tmp_path / "out", group_size=32)


@pytest.mark.parametrize("family", ["glm4v", "gemma3n"])
def test_a_list_of_the_files_names_alone_is_found_where_vllm_asks_by_others(
    family: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(sources(family), tmp_path / "out", group_size=32)
    assert verify(tmp_path / "out").passed, verify(tmp_path / "out").failed
    config = read_config(tmp_path / "out")["quantization_config"]
    tensors = {n.removesuffix(".weight") for n in load_all(tmp_path / "out")}
    config["ignore"] = [n for n in config["ignore"] if n in tensors or n == "lm_head"]
    change_config(tmp_path / "out", quantization_config=config)
    wanted = {
        "glm4v": "attn.qkv_proj, by which",
        "gemma3n": "self_decoder.per_layer_model_projection, by which",
    }
    failed = [p for p in verify(tmp_path / "out").failed if "vLLM takes it" in p]
    assert failed and wanted[family] in failed[0], failed


def test_shards_of_every_fusion_share_their_global_scale_and_verify_sees_where_they_do_not(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(sources("qwen3_5"), tmp_path / "out", scheme="nvfp4a16")
    assert verify(tmp_path / "out").passed, verify(tmp_path / "out").failed
    tensors = load_all(tmp_path / "out")
    mixer = next(n for n in tensors if "in_proj_qkv" in n).rpartition(".in_proj")[0]
    scales = {x: float(tensors[f"{mixer}.in_proj_{x}.weight_global_scale"]) for x in ("qkv", "z", "b", "a")}
    assert scales["qkv"] == scales["z"] and scales["b"] == scales["a"] and scales["z"] != scales["b"]
    folder = copy_model(tmp_path / "out", tmp_path / "changed")
    tensors[f"{mixer}.in_proj_z.weight_global_scale"] *= 2
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_all(folder, tensors)
    assert any("in_proj_qkv, in_proj_z differ" in p for p in verify(folder).failed), verify(folder).failed


def test_embeddings_are_matched_by_their_class(llama: Path, tmp_path: Path) -> None:
    from quant.formats import Contents, FormatRegistry
    from quant.quantizers import MinMaxQuantizer
    from quant.schemes import WeightScheme
    from quant.vllm.layers import Linear

    quantize(llama, tmp_path / "out", group_size=32)
    folder, form = tmp_path / "out", FormatRegistry.get("compressed-tensors")
    tensors = load_all(folder)
    weight = tensors.pop("model.embed_tokens.weight")
    table = Linear("model.embed_tokens", weight.shape[0], weight.shape[1], WeightScheme(8, -1))
    rounded = MinMaxQuantizer()(weight.float(), None, table.weights, torch.bfloat16).tensor
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_all(folder, tensors | form.pack(table, rounded, torch.bfloat16))
    config = read_config(folder)["quantization_config"]
    group = (form.config(Contents([table])) or {})["config_groups"]["group_0"]
    table_group = group | {"targets": ["Embedding"]}
    config["config_groups"]["group_1"] = table_group
    change_config(folder, quantization_config=config)
    result = verify(folder)
    (head,) = [c for c in result.checks if c.name == "head and embeddings"]
    assert head.passed and "model.embed_tokens is quantized (w8a16 (W8" in head.detail, result.failed
    assert result.passed, result.failed
    del config["config_groups"]["group_1"]
    change_config(folder, quantization_config=config)
    assert not verify(folder).passed  # the group of linears is not the embedding's


def test_a_wrapped_models_head_is_targeted_under_either_name(tmp_path: Path) -> None:
    from quant.formats import Contents, FormatRegistry
    from quant.schemes import WeightScheme
    from quant.vllm.layers import Linear

    linears = [
        Linear(n, 64, 64, WeightScheme(4, 32)) for n in ("model.language_model.layers.0.fc", "lm_head")
    ]
    form = FormatRegistry.get("compressed-tensors")
    config: dict[str, Any] = form.config(Contents(linears, model_types=("llama", "llava"))) or {}
    targets = config["config_groups"]["group_0"]["targets"]
    assert any(t.startswith("re:") and re.match(t[3:], "language_model.lm_head") for t in targets)
    assert config["ignore"] == []


def test_routers_are_no_fault_of_a_foreign_list() -> None:
    names = [
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.self_attn.q_proj",
    ]
    assert set(built_layers(names, {"model_type": "qwen3_moe"})) == {
        "model.layers.0.mlp.experts",
        "model.layers.0.self_attn.qkv_proj",
    }
