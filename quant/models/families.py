"""Families of text decoders as rows of data: the facts of a ``model_type`` that its config.json leaves
unsaid.

The shapes themselves are always computed (:mod:`quant.models.shapes`), so any size of a known family is
exact. Adding a family to the planner is adding a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Keys under which configs state whether the projections of attention have biases, and those of the MLP.
_ATTENTION_BIAS = ("attention_bias", "use_bias", "bias", "enable_bias")
MLP_BIAS = ("mlp_bias", "use_bias", "bias", "enable_bias")


@dataclass(frozen=True)
class Family:
    """The facts of one family. The defaults are Llama's.

    Attributes:
        mlp: ``gated`` has a gate beside the up projection.
        norm: ``layer`` norms have a bias, but see ``scale_only``.
        norms: of a block, those of queries and keys aside.
        qkv_bias: queries, keys and values have biases, where the config states nothing under ``bias_keys``.
        output_bias: likewise the output projection; ``output_bias_stated`` is False where what is stated is
            not
            said of it.
        mlp_bias: likewise the MLP's projections.
        qk_norm: of queries and keys: one gain for every ``head``, one for the ``width`` of all heads, or
            ``each``
            head's own, which the config must ask for.
        tied: the head is the embedding, where the config states nothing.
        head_bias: likewise the head's bias.
        positions: learned positions: rows beyond the context; None where there are none.
        rotary: there is a table of rotary positions; ``local_rotary``: a second one for sliding layers.
        windowed: ``sliding_window`` is in force when it is set.
        window_pattern: every n-th layer is full attention, the others slide; 0: all or none.
        wide_query: the query projection also makes an output gate.
        scale_only: layer norms without a bias.
        sinks: every head has a learned attention sink.
        inner_ratio: inner size of the MLP in hidden sizes, where the config states none.
        expert_bias: router and experts have biases; ``score_bias``: the router has one by which it chooses.
        shared_experts: experts that every token visits, where the config states no number.
        dense_beside_experts: every block has experts and an MLP, with three more norms.
        layer_scalar: every block's output is scaled by one number.
        lists: what stands before a block's number in a file of the decoder alone; the second as a model
            without its head is saved.
        grouped: several query heads may share one of keys and values; else the config's number is not asked.
        extra_rows: of the embedding, beyond the vocabulary.
    """

    mlp: Literal["gated", "plain"] = "gated"
    norm: Literal["rms", "layer"] = "rms"
    norms: int = 2
    qkv_bias: bool = False
    output_bias: bool = False
    output_bias_stated: bool = True
    mlp_bias: bool = False
    bias_keys: tuple[str, ...] = _ATTENTION_BIAS
    qk_norm: Literal["", "head", "width", "each"] = ""
    tied: bool = False
    head_bias: bool = False
    positions: int | None = None
    rotary: bool = True
    local_rotary: bool = False
    window_pattern: int = 0
    windowed: bool = False
    wide_query: bool = False
    scale_only: bool = False
    sinks: bool = False
    inner_ratio: int = 0
    expert_bias: bool = False
    score_bias: bool = False
    shared_experts: int = 0
    dense_beside_experts: bool = False
    layer_scalar: bool = False
    lists: tuple[str, ...] = ("model.layers.", "layers.")
    grouped: bool = True
    extra_rows: int = 0


#: Where GPT-2 and its relatives have their blocks.
_TRANSFORMER_H = ("transformer.h.", "h.")
#: Qwen 2: queries, keys and values have biases, the output projection never.
_QWEN2 = Family(qkv_bias=True, bias_keys=("qkv_bias",), output_bias_stated=False)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(windowed=True),
    "ministral": Family(windowed=True),
    "mixtral": Family(windowed=True),
    "qwen2": _QWEN2,
    "qwen2_moe": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_omni_text": _QWEN2,
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head"),
    "qwen3_vl_text": Family(qk_norm="head"),
    "qwen3_vl_moe_text": Family(qk_norm="head"),
    "qwen3_next": Family(qk_norm="head", wide_query=True),
    "qwen3_5_text": Family(qk_norm="head", wide_query=True),
    "qwen3_5_moe_text": Family(qk_norm="head", wide_query=True),
    "gemma": Family(tied=True),
    "gemma2": Family(norms=4, tied=True, window_pattern=2, windowed=True),
    "gemma3_text": Family(
        norms=4, tied=True, qk_norm="head", window_pattern=6, windowed=True, local_rotary=True
    ),
    "gemma4_text": Family(
        norms=4, tied=True, qk_norm="head", windowed=True, dense_beside_experts=True, layer_scalar=True
    ),
    "phi": Family(
        mlp="plain", norm="layer", norms=1, qkv_bias=True, output_bias=True, mlp_bias=True, head_bias=True
    ),
    "phi3": Family(windowed=True),
    "phimoe": Family(norm="layer", qkv_bias=True, output_bias=True, windowed=True),
    "granite": Family(),
    "olmo2": Family(qk_norm="width"),
    "olmo3": Family(qk_norm="width", window_pattern=4, windowed=True),
    "cohere": Family(norm="layer", norms=1, tied=True, scale_only=True, qk_norm="each"),
    "starcoder2": Family(
        mlp="plain", norm="layer", qkv_bias=True, output_bias=True, mlp_bias=True, tied=True, windowed=True
    ),
    "internlm2": Family(),
    "deepseek": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(score_bias=True),
    "deepseek_v32": Family(score_bias=True),
    "glm_moe_dsa": Family(score_bias=True),
    "kimi_k2": Family(score_bias=True),
    "kimi_linear": Family(score_bias=True),
    "glm4_moe": Family(qk_norm="head", output_bias_stated=False, score_bias=True),
    "seed_oss": Family(output_bias_stated=False),
    "gpt_oss": Family(
        qkv_bias=True, output_bias=True, windowed=True, window_pattern=2, sinks=True, expert_bias=True
    ),
    "gpt_neox": Family(
        mlp="plain",
        norm="layer",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        lists=("gpt_neox.layers.", "layers."),
        grouped=False,
    ),
    "gpt2": Family(
        mlp="plain",
        norm="layer",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=True,
        positions=0,
        rotary=False,
        inner_ratio=4,
        lists=_TRANSFORMER_H,
        grouped=False,
    ),
    "gptj": Family(
        mlp="plain",
        norm="layer",
        norms=1,
        mlp_bias=True,
        head_bias=True,
        bias_keys=(),
        inner_ratio=4,
        lists=_TRANSFORMER_H,
        grouped=False,
    ),
    "opt": Family(
        mlp="plain",
        norm="layer",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=True,
        positions=2,
        rotary=False,
        lists=("model.decoder.layers.", "decoder.layers."),
        grouped=False,
    ),
    "falcon": Family(mlp="plain", norm="layer", norms=1, tied=True, inner_ratio=4, lists=_TRANSFORMER_H),
    "mpt": Family(
        mlp="plain",
        norm="layer",
        tied=True,
        scale_only=True,
        rotary=False,
        inner_ratio=4,
        lists=("transformer.blocks.", "blocks."),
    ),
    "llama4_text": Family(shared_experts=1),
    "mllama_text_model": Family(extra_rows=8),
    "minimax_m2": Family(qk_norm="width", score_bias=True),
    "nemotron_h": Family(
        mlp="plain", norms=1, rotary=False, score_bias=True, lists=("backbone.layers.", "model.layers.")
    ),
}

#: multimodal wrappers whose text part has no model_type of its own → the family of that part
WRAPPERS = {
    "qwen2_5_vl": "qwen2_5_vl_text", "qwen2_vl": "qwen2_vl_text", "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text", "mllama": "mllama_text_model", "mistral3": "mistral", "llava": "llama",
    "kimi_k25": "kimi_k2",
    "qwen2_5_omni": "qwen2", "qwen2_5_omni_thinker": "qwen2", "kimi_vl": "deepseek_v3", "internvl": "qwen3",
    "llava_next": "llama",
    "idefics3": "llama",
}  # fmt: skip
