"""Tiny models of families whose linears vLLM names, fuses or builds in a way of its own."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers import SHAPE

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_SMALL = SHAPE | {"tie_word_embeddings": False}
_STATES = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}  # fmt: skip
_TOWER = {
    "depth": 1, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
    "num_attention_heads": 2, "patch_size": 14, "image_size": 28, "out_hidden_size": 64, "in_channels": 3,
}  # fmt: skip
#: Family → model type and config.
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5_text", _SMALL | _STATES | {"head_dim": 32, "num_hidden_layers": 4}),
    "lfm2": (
        "lfm2",
        _SMALL
        | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
    ),
    "jamba": (
        "jamba",
        _SMALL
        | {"num_experts": 2, "mamba_dt_rank": 32, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "gemma3n": (
        "gemma3n_text",
        _SMALL
        | {"vocab_size_per_layer_input": 4096, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 0}
        | {"laurel_rank": 32, "altup_num_inputs": 2, "head_dim": 32, "intermediate_size": [96, 96]}
        | {"activation_sparsity_pattern": [0.0, 0.0], "tie_word_embeddings": True},
    ),
    "glm4v": (
        "glm4v",
        {"text_config": _SMALL | {"rope_parameters": _ROTARY | {"partial_rotary_factor": 0.5}}}
        | {"vision_config": _TOWER},
    ),
    "granitemoe": ("granitemoe", _SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "gpt_oss": (
        "gpt_oss",
        _SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 32, "sliding_window": 16},
    ),
    # of which vLLM has no class: transformers' modules, with its own linears and experts in their places
    "ministral": ("ministral", _SMALL | {"head_dim": 32, "sliding_window": 16}),
    "phimoe": ("phimoe", _SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        _SMALL | {"head_dim": 32, "num_experts": 2, "moe_topk": 1},
    ),
    "dots1": (
        "dots1",
        _SMALL
        | {"head_dim": 32, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1}
        | {"moe_intermediate_size": 64, "first_k_dense_replace": 1},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        _SMALL | {"moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 64, "moe_layer_start_index": 1},
    ),
}
#: Families that vLLM has no class for, and whose blocks it cannot run in transformers' modules; and one of
#: which its class loads no file.
UNSERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": (
        "minimax",
        _SMALL
        | {"num_local_experts": 2, "num_experts_per_tok": 1}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 4096, "max_seq_len": 256}),
    "dbrx": (
        "dbrx",
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 4096, "max_seq_len": 256}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1}},
    ),
}

#: Family → what it is quantized to, where that is not w4a16.
ASKED: dict[str, dict[str, Any]] = {"gpt_oss": {"scheme": "mxfp4a16", "format": "mxfp4"}}

#: Family → what published configs state and transformers drops, but vLLM asks for.
DROPPED: dict[str, dict[str, Any]] = {
    "lfm2": {"conv_dim": 64, "conv_dim_out": 64, "block_dim": 64, "block_multiple_of": 32}
    | {"block_ffn_dim_multiplier": 1.0, "block_ff_dim": 96},
    # and what it writes besides, and vLLM does not take
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
    | {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1}},
}


def built_model(family: str) -> Any:
    """A bf16 model of a family."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind, settings = (BUILT | UNSERVED)[family]
    maker = AutoModelForImageTextToText if "vision_config" in settings else AutoModelForCausalLM
    return maker.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16)
