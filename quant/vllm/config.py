"""config.json as vLLM reads it: which part describes the text decoder, and what it says of dtype, context and
quantization.

Sources: transformers' `PretrainedConfig.get_text_config`, vLLM's `transformers_utils/config.py` (which adds
the names that remote code uses) and
`transformers_utils/model_arch_config_convertor.py::_normalize_quantization_config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quant.errors import CheckpointError

#: Keys under which wrappers keep the config of their text decoder: transformers' own, a thinker of several
#: parts (Qwen Omni), and the names of remote code (InternVL, DeepSeek-VL2). They nest.
TEXT_KEYS = ("text_config", "thinker_config", "llm_config", "language_config")
#: A fact of the text decoder → the keys under which families state it; the first that is stated holds.
KEYS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "max_position_embeddings": (
        "max_position_embeddings", "n_positions", "model_max_length", "max_seq_len", "seq_length", "n_ctx",
    ),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "expert_width": ("moe_latent_size", "routed_expert_hidden_size"),
    "mamba_num_heads": ("mamba_num_heads", "mamba_n_heads"),
    "mamba_head_dim": ("mamba_head_dim", "mamba_d_head"),
    "n_groups": ("n_groups", "mamba_n_groups"),
    "ssm_state_size": ("ssm_state_size", "mamba_d_state"),
    "conv_kernel": ("conv_kernel", "mamba_d_conv"),
    "active": (
        "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_topk",
    ),
}  # fmt: skip
#: Keys that state how many heads of keys and values some layers have, and how large heads are.
KV_HEADS = (
    *KEYS["num_key_value_heads"],
    "kv_n_heads",
    "num_global_key_value_heads",
    "swa_num_key_value_heads",
)
HEAD_SIZES = ("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim", "head_size", "kv_channels")
#: Keys that state how many heads a recurrent layer has.
STATE_HEADS = ("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "mamba_num_heads")
#: Names of a config's floats → those of a safetensors header.
HEADER_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
#: Names that torch has for numbers that a model is run or stored in.
TORCH_DTYPES = re.compile(r"(torch\.)?(bfloat16|float(16|32)?|half|float8_\w+|float4_\w+|u?int(8|16|32|64))")


def text_path(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that lead to the part that describes the text decoder; empty where that is the whole.

    >>> text_path({"thinker_config": {"text_config": {"hidden_size": 8}}})
    ('thinker_config', 'text_config')
    """
    path: list[str] = []
    part: Mapping[str, Any] = config
    while (key := next((k for k in TEXT_KEYS if isinstance(part.get(k), Mapping)), None)) is not None:
        path.append(key)
        part = part[key]
    return tuple(path)


def parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The text decoder's part first, then what surrounds it, outermost last."""
    nested = [config]
    for key in text_path(config):
        nested.append(nested[-1][key])
    return reversed(nested)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the text decoder: that of a wrapper, else the whole."""
    return next(parts(config))


def model_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The ``model_type`` of the text decoder and of what surrounds it, outermost last.

    >>> model_types({"model_type": "lfm2_vl", "text_config": {"model_type": "lfm2"}})
    ('lfm2', 'lfm2_vl')
    """
    return tuple(str(t) for part in parts(config) if (t := part.get("model_type")))


def stated(config: Mapping[str, Any], key: str) -> Any:
    """What config.json states of a fact, under any of its :data:`KEYS`, the text decoder's part first; None
    where it states nothing."""
    return next(
        (
            part[name]
            for name in KEYS.get(key, (key,))
            for part in parts(config)
            if part.get(name) is not None
        ),
        None,
    )


def whole_number(value: Any) -> int | None:
    """A positive whole number that config.json states, or None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 < value < 2**31 and value == int(value) else None


def quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where vLLM looks for it: ``quantization_config`` at the top, the one of the text decoder's part,
    ``compression_config``.

    Raises:
        CheckpointError: it is not an object.
    """
    outside_in = reversed(list(parts(config)))
    section = next((q for part in outside_in if (q := part.get("quantization_config"))), None)
    section = section or config.get("compression_config")
    if not section:
        return None
    if not isinstance(section, dict):
        raise CheckpointError(
            f"config.json: quantization_config is not an object but {str(section)[:60]!r}: repair it, or "
            "fetch the checkpoint again"
        )
    return section


def source_method(quantization: Mapping[str, Any] | None) -> str | None:
    """The ``quant_method`` of a checkpoint that is already quantized, in vLLM's spelling; or None."""
    return (
        str(quantization.get("quant_method", "unknown")).lower().replace("_", "-") if quantization else None
    )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without any word of quantization, in whatever part it stands."""
    left = {k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")}
    for key in TEXT_KEYS:
        if isinstance(left.get(key), Mapping):
            left[key] = without_quantization(left[key])
    return left


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that config.json states (``bfloat16``), outermost part first, as vLLM's `_find_dtype` looks
    for it; None where it states none."""
    for part in reversed(list(parts(config))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                return str(part[key]).removeprefix("torch.")
    return None


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Header name of the dtype that config.json states, in which vLLM keeps scales; None where it states none
    that weights are stored in."""
    return HEADER_DTYPES.get(config_dtype(config) or "")


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Number of tokens that the embedding has rows for, as config.json states it."""
    return whole_number(stated(config, "vocab_size"))


def head_size(config: Mapping[str, Any]) -> int | None:
    """Values of an attention head that config.json states, or that its sizes imply."""
    hidden, heads = stated(config, "hidden_size"), stated(config, "num_attention_heads")
    hidden, heads = whole_number(hidden), whole_number(heads)
    return whole_number(stated(config, "head_dim")) or (hidden // heads if hidden and heads else None)


#: Keys that list the kind of every block.
BLOCK_KINDS = ("layer_types", "layers_block_type")


def block_count(config: Mapping[str, Any]) -> int | None:
    """Number of decoder blocks that config.json states."""
    count = whole_number(stated(config, "num_hidden_layers"))
    kinds = (stated(config, key) for key in (*BLOCK_KINDS, "hybrid_override_pattern"))
    return count or next((len(k) for k in kinds if isinstance(k, (list, str)) and k), None)


#: Keys that state how many blocks a file has beyond the decoder's, which predict further tokens.
DRAFTING = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")


def drafting_blocks(config: Mapping[str, Any]) -> int:
    """Number of blocks that predict further tokens (MTP), as config.json states it; 0 where it does not."""
    return next((n for key in DRAFTING if (n := whole_number(stated(config, key)))), 0)


@dataclass(frozen=True)
class Heads:
    """The heads of a model, which tensor parallelism shares out whole.

    Attributes:
        attention: query heads.
        kv: heads of keys and values; fewer than ranks are repeated.
        state: heads of recurrent layers, and groups of several that share a state: linear attention's keys
            and values, Mamba's.
    """

    attention: int
    kv: int
    state: tuple[int, ...] = ()


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """The heads that config.json states; None where it states none.

    Source: `get_total_num_kv_heads` of vLLM's convertors (Falcon's older models have one KV head for all
    queries), `layers/mamba/mamba_mixer2.py` and `layers/mamba/gdn` for the recurrent layers.
    """
    attention = whole_number(stated(config, "num_attention_heads"))
    if attention is None:
        return None
    kv = whole_number(stated(config, "num_key_value_heads"))
    if stated(config, "model_type") == "falcon" and not stated(config, "new_decoder_architecture"):
        kv = attention if stated(config, "multi_query") is False else 1
    linear = stated(config, "linear_attn_config")
    counts = [stated(config, key) for key in STATE_HEADS]
    counts.append(linear.get("num_heads") if isinstance(linear, Mapping) else None)
    groups = stated(config, "n_groups") if stated(config, "mamba_num_heads") is not None else None
    counts.append(None if groups == 1 else groups)  # a single group is repeated
    state = tuple(n for x in counts if (n := whole_number(x)) is not None)
    return Heads(attention, kv or attention, state)
