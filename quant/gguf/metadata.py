"""config.json in GGUF's keys. No torch.

The keys are those of the ``gguf`` package's writer; what each means to a family's graph is llama.cpp's
``src/llama-model.cpp`` and ``src/models/*.cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant.errors import CheckpointError, clipped
from quant.gguf.families import Family, number, rotary, sliding_period
from quant.gguf.levels import package
from quant.vllm.config import block_count, head_size, heads_of, text_config, whole_number

if TYPE_CHECKING:
    from gguf import GGUFWriter


def needed(config: Mapping[str, Any], key: str) -> int:
    """A positive whole number that a config must state.

    Raises:
        CheckpointError: it does not.
    """
    said = text_config(config)
    if said.get(key) is None:
        raise CheckpointError(f"config.json: {key} is missing: llama.cpp cannot do without it")
    return _whole(said, key)


def _whole(said: Mapping[str, Any], key: str) -> int:
    if (value := whole_number(said[key])) is None:
        raise CheckpointError(
            f"config.json: {key} is {clipped(said[key])}, no positive whole number, which llama.cpp needs"
        )
    return value


def rotary_size(config: Mapping[str, Any]) -> int:
    """How many numbers of a head are turned."""
    text, size = text_config(config), head_size(config) or 0
    share = number(rotary(config), "partial_rotary_factor", number(text, "partial_rotary_factor", 1.0))
    return int(size * share)


def add_hyperparameters(writer: GGUFWriter, config: Mapping[str, Any], family: Family) -> None:
    """Everything that the graph is built from.

    Raises:
        CheckpointError: the config lacks a number that llama.cpp needs.
    """
    text, heads, size = text_config(config), heads_of(config), head_size(config)
    blocks = block_count(config)
    if heads is None or size is None or blocks is None:
        raise CheckpointError(
            "config.json: num_attention_heads, num_hidden_layers and hidden_size are needed, which say how "
            "large a head is"
        )
    writer.add_context_length(needed(config, "max_position_embeddings"))
    writer.add_embedding_length(needed(config, "hidden_size"))
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(needed(config, "intermediate_size"))
    writer.add_head_count(heads.attention)
    writer.add_head_count_kv(heads.kv)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(number(text, "rms_norm_eps", 1e-6))
    writer.add_vocab_size(needed(config, "vocab_size"))
    _add_rotary(writer, config)
    if family.window:
        _add_window(writer, config, family)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if text.get(key, family.caps.get(key)):
            add(number(text, key, family.caps.get(key)))
    if family.normalized is not None:
        _add_experts(writer, config)


def _add_window(writer: GGUFWriter, config: Mapping[str, Any], family: Family) -> None:
    text = text_config(config)
    if text.get("sliding_window"):
        writer.add_sliding_window(_whole(text, "sliding_window"))
        writer.add_sliding_window_pattern(int(sliding_period(config, family) or 1))
    if family.architecture == "gemma3":
        writer.add_rope_freq_base_swa(number(rotary(config, "sliding_attention"), "rope_theta"))


def _add_experts(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    text = text_config(config)
    named = "num_experts" if text.get("num_experts") else "num_local_experts"
    if text.get(named) is None:
        raise CheckpointError("config.json: num_experts is missing: llama.cpp cannot do without it")
    writer.add_expert_count(_whole(text, named))
    writer.add_expert_used_count(needed(config, "num_experts_per_tok"))
    if text.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(_whole(text, "moe_intermediate_size"))
    if text.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(_whole(text, "shared_expert_intermediate_size"))


def _add_rotary(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    said, text = rotary(config), text_config(config)
    writer.add_rope_dimension_count(rotary_size(config))
    writer.add_rope_freq_base(number(said, "rope_theta"))
    kind = said["rope_type"]
    original = int(
        number(said, "original_max_position_embeddings", 0)
        or number(text, "original_max_position_embeddings", 0)
    )
    longest = needed(config, "max_position_embeddings")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(number(said, "factor"))
    elif kind == "yarn":
        original = original or longest
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(number(said, "factor", 0) or longest / original)
        writer.add_rope_scaling_orig_ctx_len(original)
        for key, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if said.get(key) is not None:
                add(number(said, key))
    elif kind in ("longrope", "su"):
        original = original or longest
        factor = number(said, "factor", 0) or longest / original
        attention = number(said, "attention_factor", longrope_attention(factor, original))
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(attention)


def _list_of_scaling(said: Mapping[str, Any], key: str) -> list[float]:
    value = said.get(key)
    if not isinstance(value, list):
        raise CheckpointError(
            f"config.json: {key} of rotary scaling {said['rope_type']} is {clipped(value)}, no "
            "list of numbers"
        )
    return [number({key: x, "rope_type": said["rope_type"]}, key) for x in value]


#: What llama.cpp's YaRN takes where a file says nothing, as transformers does (``llama_hparams``).
_YARN = {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}


def graph_facts(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """All that llama.cpp's graph of a config is built from: GGUF's keys without the architecture's name, and
    the divisors of rotary frequencies by the names of their tensors. Equal graphs have equal facts, whatever
    a config leaves to defaults.

    Raises:
        CheckpointError: the config lacks a number that llama.cpp needs.
        QuantError: the ``gguf`` package is not installed.
    """
    writer = package().GGUFWriter(None, family.architecture)
    add_hyperparameters(writer, config, family)
    own = f"{family.architecture}."
    stated = {k.removeprefix(own): v.value for k, v in writer.kv_data[0].items() if k.startswith(own)}
    defaults = _YARN if stated.get("rope.scaling.type") == "yarn" else {}
    return {**defaults, **stated, **rotary_factors(config)}


def rotary_factors(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """Tensors of divisors of the rotary frequencies, fp32 [rotary size / 2] each, by GGUF name; none where
    the scaling is a number."""
    said, text = rotary(config), text_config(config)
    kind = said["rope_type"]
    if kind in ("longrope", "su"):
        return {
            "rope_factors_long.weight": _list_of_scaling(said, "long_factor"),
            "rope_factors_short.weight": _list_of_scaling(said, "short_factor"),
        }
    if kind != "llama3":
        return {}
    original = said.get("original_max_position_embeddings") or text["max_position_embeddings"]
    keys = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor")
    theta, factor, low, high = (number(said, key) for key in keys)
    return {"rope_freqs.weight": llama3_factors(rotary_size(config), theta, factor, low, high, original)}


def longrope_attention(factor: float, original: int) -> float:
    """What LongRoPE multiplies queries and keys by that reach ``factor`` times the original context.

    Source: transformers ``modeling_rope_utils._compute_longrope_parameters``.
    """
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0


def llama3_factors(
    size: int, theta: float, factor: float, low: float, high: float, original: int
) -> list[float]:
    """Divisors of the rotary frequencies, [size / 2].

    Waves longer than the original context over ``low`` are divided by ``factor``, those shorter than it over
    ``high`` stay, and frequencies between are mixed linearly. Source: transformers
    ``modeling_rope_utils._compute_llama3_parameters``.
    """
    factors = []
    for i in range(0, size, 2):
        turns = original / (2 * math.pi * theta ** (i / size))  # of the original context
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1.0 / ((1 - kept) / factor + kept))
    return factors
