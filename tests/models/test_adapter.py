"""Which tensors are linears of the text decoder, what vLLM fuses, and which blocks they are in: by name,
shape and dtype alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.checkpoint.header import TensorInfo
from quant.models.adapter import adapter_for, block_of, decoder_linears, not_quantizable
from quant.vllm.layers import fused_name


def info(name: str, *shape: int, dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, dtype, shape or (64, 64), Path("m.safetensors"), 0, 0)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.7.gate_proj.weight",
        "model.layers.1.block_sparse_moe.experts.0.w1.weight",
        "model.language_model.layers.1.mlp.gate_proj.weight",
        "language_model.model.layers.0.self_attn.o_proj.weight",
        "transformer.h.0.mlp.dense_h_to_4h.weight",
        "model.layers.1.mlp.shared_expert.up_proj.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
    ],
)
def test_linears_of_decoder_blocks_are_quantizable(name: str) -> None:
    assert not_quantizable(info(name), 2) is None


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (64,), "not a linear's weight"),
        ("model.layers.0.input_layernorm.weight", (64,), "1-dimensional"),
        ("model.layers.0.self_attn.q_norm.weight", (4, 16), "a norm"),
        ("model.layers.0.conv.weight", (4, 1, 4), "3-dimensional"),
        ("model.layers.0.mlp.gate.weight", (8, 64), "a router"),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 64), "a router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), "a router"),
        ("model.layers.0.feed_forward.router.weight", (8, 64), "a router"),
        (
            "model.layers.2.mlp.up_proj.weight",
            (64, 64),
            "in block 2, beyond the 2 decoder blocks: a prediction head",
        ),
        ("model.embed_tokens.weight", (64, 64), "part of embed_tokens"),
        ("lm_head.weight", (64, 64), "part of lm_head"),
        ("model.norm.weight", (64, 64), "outside the decoder blocks"),
        ("model.visual.blocks.0.attn.qkv.weight", (64, 64), "part of visual"),
        (
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
            (64, 64),
            "part of vision_tower",
        ),
        ("audio_tower.layers.0.fc1.weight", (64, 64), "part of audio_tower"),
        ("multi_modal_projector.linear_1.weight", (64, 64), "part of multi_modal_projector"),
    ],
)
def test_everything_else_is_left_with_a_reason(name: str, shape: tuple[int, ...], reason: str) -> None:
    assert not_quantizable(info(name, *shape), 2) == reason


def test_integers_are_no_weights() -> None:
    assert not_quantizable(info("model.layers.0.mlp.up_proj.weight", dtype="I32"), 2) == "stored as I32"


def test_linears_are_sorted_by_block_number_not_by_text() -> None:
    names = [f"model.layers.{i}.mlp.{p}_proj.weight" for i in (10, 2, 0) for p in ("up", "down")]
    found = decoder_linears({n: info(n) for n in names}, {"num_hidden_layers": 12})
    assert [n.removeprefix("model.layers.") for n in found] == [
        f"{i}.mlp.{p}_proj" for i in (0, 2, 10) for p in ("down", "up")
    ]


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.qkv_proj"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up_proj"),
        ("model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.experts"),
        ("model.layers.0.mlp.shared_expert.gate_proj", "model.layers.0.mlp.shared_expert.gate_up_proj"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", "model.layers.0.self_attn.fused_qkv_a_proj"),
        ("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.o_proj"),
        ("model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.qkv_proj"),
        ("q_proj", "q_proj"),
    ],
)
def test_fused_names_are_vllms(name: str, fused: str) -> None:
    assert fused_name(name) == fused


def test_blocks_are_found_in_any_familys_names() -> None:
    assert [
        block_of(n)
        for n in (
            "model.layers.12.x",
            "transformer.h.3.x",
            "gpt_neox.layers.0.x",
            "model.norm.weight",
            "layers.x.1.y",
        )
    ] == [12, 3, 0, None, None]


def test_rows_are_found_by_model_type() -> None:
    names = {
        t: (a.name if (a := adapter_for({"model_type": t})) else None)
        for t in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "x")
    }
    assert names == {
        "llama": "llama",
        "qwen2": "qwen",
        "qwen3": "qwen",
        "mistral": "mistral",
        "gemma2": "gemma",
        "gemma3_text": "gemma",
        "phi3": "phi3",
        "x": None,
    }
