"""Rows of families, and what vLLM fuses of their linears."""

from __future__ import annotations

import pytest

from quant.models.adapter import adapter_for
from quant.vllm.layers import fused_name


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
