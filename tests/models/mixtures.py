"""Tiny mixtures of experts, random, as transformers saves them: one expert a tensor, or all of a layer in
one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers import SHAPE, add_tokenizer, randomize

#: family → what its config says beside the common shape; ``fused``: saved with all experts of a layer in one
#: tensor.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "qwen3_moe_fused": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "head_dim": 16},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
        "head_dim": 16,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    "granitemoe_fused": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
}


def mixture(family: str) -> torch.nn.Module:
    """A random model of a family, fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = family.removesuffix("_fused")
    config = AutoConfig.for_model(kind, **{**SHAPE, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    return model.eval()


def save_mixture(folder: Path, family: str) -> Path:
    """A checkpoint in bf16 with a tokenizer."""
    model = mixture(family).bfloat16()
    model.save_pretrained(folder, **({"save_original_format": False} if family.endswith("_fused") else {}))
    add_tokenizer(folder)
    return folder
