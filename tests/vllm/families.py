"""Small random checkpoints of families that real vLLM serves in the ring: mixtures of experts in both
layouts, latent attention, wrappers, hybrids. Every side of a linear is a multiple of 32, which vLLM's 4-bit
kernel for CPUs asks for, and latent attention has the one size that its CPU kernel is compiled for.
A token visits all experts: of random routers' near ties 16-bit arithmetic makes other choices here than
there, which says nothing of the weights and is the larger part of all noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers import load_all, randomize, save_all, save_model

_COMMON: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "head_dim": 64,
    # as published; of plain rotary embeddings vLLM's kernel for CPUs turns the wrong part of such queries
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
    },
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 16, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "shared_expert_intermediate_size": 64,
    "layer_types": ["linear_attention", "full_attention"], "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 56,
    "vision_use_head": False,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 14,
    "out_hidden_size": 128, "fullatt_block_indexes": [0],
}  # fmt: skip
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}

#: name → model type, what its config says beside the common sides (of a wrapper: its parts).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}),
    "qwen3_moe_fused": ("qwen3_moe", _EXPERTS),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "gemma3": (
        "gemma3",
        {
            "text_config": {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"text_config": {"rope_parameters": _SECTIONS}, "vision_config": _QWEN_VISION},
    ),
    "qwen3_next": ("qwen3_next", _EXPERTS | _DELTA),
    # vLLM has no class of it, and runs transformers' own
    "ministral": ("ministral", {"sliding_window": 16}),
}
#: More of them, which are loaded and not served: experts are all that is different.
LOADED: dict[str, tuple[str, dict[str, Any]]] = FAMILIES | {
    "glm4_moe": (
        "glm4_moe",
        {k: v for k, v in _LATENT.items() if k not in ("kv_lora_rank", "rope_parameters")}
        | {"num_key_value_heads": 2, "head_dim": 32, "use_qk_norm": True},
    ),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": (
        "llama4_text",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 256,
         "interleave_moe_layer_step": 1},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 128},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 128,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
            "num_hidden_layers": 4,
            "expand": 2,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "qwen3_5_moe_fused": (
        "qwen3_5_moe",
        {"text_config": _EXPERTS | _DELTA, "vision_config": _SIGLIP | {"model_type": "qwen3_5_moe"}},
    ),
}  # fmt: skip
#: Names of routed experts' linears: without AMX, vLLM's CPU build has no kernel for quantized ones.
EXPERTS = r"re:.*\.experts\..*"
MIXTURES = frozenset(LOADED) - {"gemma3", "ministral", "qwen2_5_vl", "nemotron_h"}


def save_family(folder: Path, name: str) -> Path:
    """A checkpoint of a family in bf16, as transformers writes it, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind, said = LOADED[name]
    if "text_config" in said:
        values = said | {"text_config": _COMMON | said["text_config"]}
        build: Any = AutoModelForImageTextToText
    else:
        values, build = _COMMON | said, AutoModelForCausalLM
    model = build.from_config(AutoConfig.for_model(kind, **values), dtype=torch.bfloat16)
    randomize(model)
    options = {"save_original_format": False} if name.endswith("_fused") else {}
    save_model(model, folder, **options)
    if kind == "gemma3":  # published files have the tower's names of older releases, which vLLM knows alone
        old = "vision_tower.vision_model."
        save_all(folder, {n.replace("vision_tower.", old, 1): t for n, t in load_all(folder).items()})
    return folder
