"""GGUF's keys as the config.json that transformers and vLLM read: the way back from
:mod:`quant.gguf.metadata`. No torch.

The keys are written as transformers had them before version 5, which every version reads. Defaults of keys
that a file leaves out are llama.cpp's (``src/llama-model.cpp``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quant.errors import CheckpointError, UsageError, clipped
from quant.gguf.families import FAMILIES, Family
from quant.gguf.header import Header
from quant.gguf.metadata import llama3_factors, longrope_attention
from quant.vllm.arguments import BF16_MODELS

#: llama.cpp's architecture → ``model_type`` and class; a Llama with experts is a Mixtral.
_CLASSES: Mapping[str, tuple[str, str]] = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
#: Largest relative difference between rotary factors of a file and those of four numbers.
_SAME_FACTOR = 1e-3


class _Keys:
    """The keys of one architecture.

    Raises:
        CheckpointError: a key is missing, or of another kind.
    """

    def __init__(self, header: Header, architecture: str):
        self.file, self.fields, self.architecture = header.files[0], header.fields, architecture

    def refuse(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {self.architecture}.{key} {why}")

    def get(self, key: str) -> Any:
        return self.fields.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # one for each block, all alike
        if value is None:
            raise self.refuse(key, "is missing: llama.cpp would not load the file either: fetch it again")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.refuse(key, f"is {clipped(value)}: one number for all blocks is read")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise self.refuse(key, f"is {clipped(value)}: a whole number above 0 is needed")
        return value

    def some(self, key: str) -> int | None:
        """A count that need not be there; 0 says that it is not."""
        return None if self.get(key) in (None, 0) else self.count(key)


def family_of_file(header: Header) -> tuple[str, Family]:
    """``model_type`` and row of the family that a file is of.

    Raises:
        CheckpointError: it names no architecture.
        UsageError: one that is not read here.
    """
    architecture = header.fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"{header.files[0]}: has no general.architecture: it is no model of llama.cpp's, or not the "
            "first of several files"
        )
    if architecture not in _CLASSES:
        raise UsageError(
            f"{header.files[0]}: architecture {clipped(architecture)} cannot be read here: "
            f"{', '.join(_CLASSES)} can: start from the original in safetensors"
        )
    kind = _CLASSES[architecture][0]
    if kind == "llama" and header.fields.get("llama.expert_count"):
        kind = "mixtral"
    return kind, FAMILIES[kind]


def config_of_file(header: Header) -> dict[str, Any]:
    """The config.json that a file stands for.

    Raises:
        CheckpointError: a key that llama.cpp needs is missing, or says what no config of the family can.
        UsageError: an architecture that is not read here.
    """
    kind, family = family_of_file(header)
    keys, tensors = _Keys(header, family.architecture), header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{keys.file}: has no token_embd.weight: it is no model, or not all of its files"
        )
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    size = keys.count("attention.key_length", hidden // heads or 1)
    if keys.count("attention.value_length", size) != size:
        raise keys.refuse("attention.value_length", f"differs from key_length, {size}: not read here")
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if kind == "mixtral" else _CLASSES[family.architecture][1]],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": _shortest(keys.number("attention.layer_norm_rms_epsilon")),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": _dtype(header, kind),
        "use_cache": True,
        "hidden_act": family.activations[0],
        **_special_tokens(header),
    }
    if family.window:
        config |= _of_gemma(keys, config, family)
    if kind in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if kind == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if family.architecture.startswith("qwen"):
        config |= {"use_sliding_window": False, "sliding_window": None}
    elif not family.window:
        config["sliding_window"] = None  # its graph has none
    if family.normalized is not None:
        config |= _of_experts(keys, kind, family)
    return config | _rotary(header, keys, config)


def _shortest(value: float) -> float:
    """The shortest decimal number that fp32 rounds to the same: what a config had before it was stored."""
    import numpy as np

    return float(str(np.float32(value)))


def _dtype(header: Header, kind: str) -> str:
    """Of the model: that of most numbers, fp16 where blocks have their scales in it."""
    if kind in BF16_MODELS:
        return "bfloat16"
    counts = {"bfloat16": 0, "float32": 0, "float16": 0}
    for entry in header.tensors.values():
        kind = {"BF16": "bfloat16", "F32": "float32"}.get(entry.type, "float16")
        counts[kind] += math.prod(entry.shape)
    return max(counts, key=lambda k: counts[k])


def _special_tokens(header: Header) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = header.fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(value, int) and not isinstance(value, bool):
            found[f"{role}_token_id"] = value
    return found


def _of_gemma(keys: _Keys, config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    blocks = config["num_hidden_layers"]
    width = config["hidden_size"] / config["num_attention_heads"]
    divisor = width if blocks == family.scale_by_width else config["head_dim"]
    period = keys.count("attention.sliding_window_pattern", family.window or 1)
    found = {
        "hidden_activation": family.activations[0],
        "query_pre_attn_scalar": int(divisor) if divisor == int(divisor) else divisor,
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": [
            "full_attention" if i % period == period - 1 else "sliding_attention" for i in range(blocks)
        ],
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        stated = keys.number(key, -1.0)
        found[key] = stated if stated > 0 else family.caps.get(key)
    return found


def _of_experts(keys: _Keys, kind: str, family: Family) -> dict[str, Any]:
    count = keys.some("expert_count")
    if count is None:
        raise keys.refuse("expert_count", "is missing: llama.cpp would not load the file either")
    found: dict[str, Any] = {"num_experts_per_tok": keys.count("expert_used_count")}
    if kind == "mixtral":
        return found | {"num_local_experts": count}
    found |= {
        "num_experts": count,
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "norm_topk_prob": family.normalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if (shared := keys.some("expert_shared_feed_forward_length")) is not None:
        found["shared_expert_intermediate_size"] = shared
    return found


def _rotary(header: Header, keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and what belongs to them.

    Raises:
        CheckpointError: a scaling that no config of the family states.
    """
    size, architecture = config["head_dim"], keys.architecture
    theta = _shortest(keys.number("rope.freq_base", 10000.0))
    turned = keys.count("rope.dimension_count", size)
    found: dict[str, Any] = {"rope_theta": theta}
    if turned != size:
        if architecture != "phi3":
            raise keys.refuse("rope.dimension_count", f"is {turned}, heads have {size}: not read here")
        found["partial_rotary_factor"] = turned / size
    if architecture == "gemma3":
        found["rope_local_base_freq"] = _shortest(keys.number("rope.freq_base_swa", 10000.0))
    kind = keys.get("rope.scaling.type") or "none"
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    longest = config["max_position_embeddings"]
    original = keys.some("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in header.tensors:
        original = original or longest
        scaling: dict[str, Any] = {
            "type": "longrope",
            "short_factor": _floats(header, "rope_factors_short.weight"),
            "long_factor": _floats(header, "rope_factors_long.weight"),
        }
        attention = _shortest(keys.number("rope.scaling.attn_factor", 1.0))
        if not math.isclose(attention, longrope_attention(longest / original, original), rel_tol=1e-6):
            scaling["attention_factor"] = attention
        return found | {"rope_scaling": scaling, "original_max_position_embeddings": original}
    if "rope_freqs.weight" in header.tensors:
        factors = _floats(header, "rope_freqs.weight")
        llama3 = llama3_of(factors, theta, turned, original)
        if llama3 is None:
            raise CheckpointError(
                f"{keys.file}: rope_freqs.weight is not of Llama 3's scaling, the one that a config of "
                f"{architecture} can state: start from the original"
            )
        return found | {"rope_scaling": llama3} if max(factors) > 1 else found
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return found | ({"rope_scaling": {"rope_type": "linear", "factor": factor}} if factor != 1.0 else {})
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        scaling["original_max_position_embeddings"] = original or longest
        for key in ("beta_fast", "beta_slow"):
            if keys.get(f"rope.scaling.yarn_{key}") is not None:
                scaling[key] = keys.number(f"rope.scaling.yarn_{key}")
        return found | {"rope_scaling": scaling}
    if kind != "none":
        raise keys.refuse(
            "rope.scaling.type", f"is {clipped(kind)}: none, linear, yarn and longrope are read"
        )
    return found


def _floats(header: Header, name: str) -> list[float]:
    """A vector of rotary factors.

    Raises:
        CheckpointError: it is missing, or none.
    """
    import numpy as np

    from quant.remote import open_weights

    entry = header.tensors.get(name)
    if entry is None or entry.type != "F32" or len(entry.shape) != 1:
        raise CheckpointError(f"{header.files[0]}: {name} is missing, or no vector of fp32: fetch it again")
    with open_weights(entry.file) as stream:
        stream.seek(entry.start)
        values = np.frombuffer(stream.read(entry.nbytes), "<f4")
    if not np.isfinite(values).all() or len(values) * 4 != entry.nbytes or (values <= 0).any():
        raise CheckpointError(f"{header.files[0]}: {name} holds no positive numbers: fetch the file again")
    return [float(str(v)) for v in values]


def llama3_of(
    factors: Sequence[float], theta: float, size: int, original: int | None = None
) -> dict[str, Any] | None:
    """Numbers of Llama 3's scaling that make these divisors of the rotary frequencies; None where none do.

    A file holds the divisors alone. They tell ``factor``, and between the two bounds a line over the turns
    that a frequency makes: two numbers for ``low_freq_factor``, ``high_freq_factor`` and the original
    context, of which only the ratios count; so ``low_freq_factor`` is 1, as all published configs have it.

    Args:
        factors: [size / 2].
        original: context before the scaling, where the file says so.

    >>> made = llama3_factors(64, 500000.0, 8.0, 1.0, 4.0, 8192)
    >>> found = llama3_of(made, 500000.0, 64)
    >>> found["original_max_position_embeddings"], found["high_freq_factor"], found["factor"]
    (8192, 4.0, 8.0)
    """
    if len(factors) != size // 2 or min(factors) < 1 - 1e-6:
        return None
    factor = max(factors)
    if factor <= 1:
        return {}
    guesses = [(4.0, x) for x in (original, 8192, *(2**i for i in range(6, 20))) if x]
    points = []
    for i, value in enumerate(factors):
        kept = (1 / value - 1 / factor) / (1 - 1 / factor)
        if 1e-4 < kept < 1 - 1e-4:
            points.append((1 / (2 * math.pi * theta ** (2 * i / size)), kept))
    if len(points) > 1:  # kept = slope · frequency - offset; offset = low / (high - low)
        (x0, y0), (x1, y1) = points[0], points[-1]
        slope = (y1 - y0) / (x1 - x0)
        offset = slope * x0 - y0
        if offset > 0:
            guesses.append((1 + 1 / offset, round(slope / offset)))
    elif points:
        guesses.append((4.0, round((3 * points[0][1] + 1) / points[0][0])))
    for high, context in guesses:
        high = round(high, 3)
        if high <= 1 or context < 1:
            continue
        made = llama3_factors(size, theta, factor, 1.0, high, context)
        if all(math.isclose(a, b, rel_tol=_SAME_FACTOR) for a, b in zip(made, factors, strict=True)):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }  # fmt: skip
    return None
