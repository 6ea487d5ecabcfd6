"""config.json as vLLM reads it: which part describes the text decoder, and what it says of dtype, context and
quantization.

Sources: transformers' `PretrainedConfig.get_text_config`, vLLM's `transformers_utils/config.py` (which adds the
names that remote code uses) and `transformers_utils/model_arch_config_convertor.py::_normalize_quantization_config`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quant.errors import CheckpointError

#: Keys under which wrappers keep the config of their text decoder: transformers' own, a thinker of several parts
#: (Qwen Omni), and the names of remote code (InternVL, DeepSeek-VL2). They nest.
TEXT_KEYS = ("text_config", "thinker_config", "llm_config", "language_config")
#: Names of a config's floats → those of a safetensors header.
HEADER_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


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


def quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where vLLM looks for it: ``quantization_config`` at the top, the one of the text decoder's part,
    ``compression_config``.

    Raises:
        CheckpointError: it is not an object.
    """
    outside_in = reversed(list(parts(config)))
    found = next((q for part in outside_in if (q := part.get("quantization_config"))), None)
    found = found or config.get("compression_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"config.json: quantization_config is not an object but {str(found)[:60]!r}: repair it, or fetch the "
            "checkpoint again"
        )
    return found


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
    """The dtype that config.json states (``bfloat16``), outermost part first, as vLLM's `_find_dtype` looks for
    it; None where it states none."""
    for part in reversed(list(parts(config))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                return str(part[key]).removeprefix("torch.")
    return None


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Header name of the dtype that config.json states, in which vLLM keeps scales; None where it states none
    that weights are stored in."""
    return HEADER_DTYPES.get(config_dtype(config) or "")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Longest context that config.json states, in tokens."""
    for part in parts(config):
        value = part.get("max_position_embeddings")
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def block_count(config: Mapping[str, Any]) -> int | None:
    """Number of decoder blocks that config.json states."""
    stated = text_config(config).get("num_hidden_layers")
    return stated if isinstance(stated, int) and not isinstance(stated, bool) and stated > 0 else None
