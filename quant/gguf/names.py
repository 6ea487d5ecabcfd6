"""Names of a GGUF file's tensors as transformers has them: the way back from the ``gguf`` package's table. No
torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Outside of the blocks, by GGUF's name without ``.weight``.
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
#: In a block, of every family.
_BLOCK: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
#: What a family has otherwise, by ``model_type``.
_OTHERWISE: Mapping[str, Mapping[str, str]] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "mixtral": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
}
#: Rotary factors, which config.json has, and buffers of no use.
_NOT_WEIGHTS = frozenset({"rope_freqs", "rope_factors_long", "rope_factors_short"})
_IN_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)")


def is_no_weight(name: str) -> bool:
    """Whether config.json says what a tensor says."""
    return name.rpartition(".")[0] in _NOT_WEIGHTS


def original_name(name: str, kind: str) -> str | None:
    """What a tensor is called in a checkpoint of a family, ``{}`` for the number of an expert; None where it
    has no such tensor.

    Args:
        kind: ``model_type``.

    >>> original_name("blk.3.ffn_norm.weight", "gemma2")
    'model.layers.3.pre_feedforward_layernorm.weight'
    >>> original_name("blk.0.ffn_up_exps.weight", "mixtral")
    'model.layers.0.block_sparse_moe.experts.{}.w3.weight'
    """
    stem, _, last = name.rpartition(".")
    if last not in ("weight", "bias"):
        return None
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{last}"
    inside = _IN_BLOCK.fullmatch(stem)
    if inside is None:
        return None
    own = _OTHERWISE.get(kind, {}).get(inside[2]) or _BLOCK.get(inside[2])
    return None if own is None else f"model.layers.{inside[1]}.{own}.{last}"
