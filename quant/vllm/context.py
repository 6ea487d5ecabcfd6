"""How long a context a model has, and what is said of a longer one. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from quant.errors import UsageError
from quant.vllm.config import KEYS, parts, stated, text_config, whole_number

#: The variable under which vLLM takes a context beyond the model's positions (``envs.py``).
ALLOW = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
#: Kinds of rope scaling whose factor ``max_position_embeddings`` holds already.
_SCALED = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})
#: Families whose positions are stated as they are after scaling.
_STATED_SCALED = "gemma3"
#: The argument that changes config.json as vLLM reads it.
OVERRIDES = "hf-overrides"
#: Tokens that no context reaches.
LONGEST = 2**31


def context_length(config: Mapping[str, Any]) -> int | None:
    """Longest context that vLLM derives from a config.json, in tokens: the smallest of its keys,
    ``model_max_length`` before them, times the factor of a rope scaling that they do not hold.

    Source: `config/model.py::_get_and_verify_max_len` and
    `transformers_utils/model_arch_config_convertor.py::derive_max_model_len_and_key`.

    >>> context_length({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}})
    8192
    >>> context_length({"max_position_embeddings": 2048, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    2048
    """
    names = (*KEYS["max_position_embeddings"], "max_sequence_length", "max_seq_length", "seq_len")
    for part in parts(config):
        found = [n for name in names if (n := whole_number(part.get(name)))]
        if found:
            longest = whole_number(part.get("model_max_length")) or min(found)
            return whole_number(int(longest * _stretch(config)))
    return None


def _stretch(config: Mapping[str, Any]) -> float:
    """The factor by which rope scaling stretches the positions that are stated; the last layers' where
    several kinds of them have one each."""
    if _STATED_SCALED in str(text_config(config).get("model_type", "")):
        return 1.0
    scaling = stated(config, "rope_scaling") or stated(config, "rope_parameters")
    if not isinstance(scaling, Mapping):
        return 1.0
    nested = [v for v in scaling.values() if isinstance(v, Mapping)]
    factor = 1.0
    for row in nested or [scaling]:
        value = row.get("factor")
        if str(row.get("rope_type", row.get("type"))) in _SCALED or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) and 1 <= value < 2**20:
            factor = float(value)
    return factor


def is_allowed(environment: Mapping[str, str] | None = None) -> bool:
    """Whether vLLM, started from here, would take a context beyond the model's positions.

    Args:
        environment: None for this process's own.
    """
    set_to = (os.environ if environment is None else environment).get(ALLOW, "0")
    return set_to.strip().lower() in ("1", "true")


def context_problem(
    option: str, tokens: int, longest: int | None, name: str, may_exceed: bool = True
) -> str | None:
    """What is wrong with a context that is asked for, or None. One beyond the positions that are stated is,
    unless :data:`ALLOW` is set, as vLLM has it.

    Args:
        option: that asks for it.
        longest: :func:`context_length` of the model; None where it states none.
        name: of the model.
        may_exceed: whether the variable counts.
    """
    if longest is None or tokens <= longest or (may_exceed and is_allowed()):
        return None
    return (
        f"{option} is {tokens}: {name} has positions for {longest}; give at most that, or a checkpoint "
        "whose config.json extends it (rope scaling)"
    )


def beyond_note(tokens: int, longest: int | None) -> str | None:
    """What is to be said of a context that :data:`ALLOW` let pass; None of one that needs it not."""
    if longest is None or tokens <= longest or not is_allowed():
        return None
    return (
        f"{tokens:,} tokens are beyond the model's {longest:,} positions, and vLLM takes them because "
        f"{ALLOW} is set: what it computes there may be wrong, up to NaN, or end it"
    )


def overridden(config: Mapping[str, Any], passed: Mapping[str, str]) -> Mapping[str, Any]:
    """A config.json as vLLM reads it with ``--hf-overrides``.

    Args:
        passed: flags that are passed on, by name; ``hf-overrides.KEY`` is one key of it.

    Raises:
        UsageError: the argument is no JSON object.
    """
    changes: dict[str, Any] = {}
    for flag, value in passed.items():
        if flag == OVERRIDES:
            changes = _merged(changes, _read(value))
        elif flag.startswith(f"{OVERRIDES}."):
            *outer, key = flag.split(".")[1:]
            nested: Any = {key.replace("-", "_"): _value(value)}
            for name in reversed(outer):
                nested = {name.replace("-", "_"): nested}
            changes = _merged(changes, nested)
    return _merged(config, changes)


def _read(value: str) -> dict[str, Any]:
    try:
        read = json.loads(value)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise UsageError(
            f"--{OVERRIDES} is {value!r}: a JSON object is needed, in quotes of the shell, such as "
            "'{\"max_position_embeddings\": 131072}'"
        )
    return read


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with changed values; parts of it are changed key by key."""
    merged = dict(config)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = _merged(old, value) if both and isinstance(old, Mapping) else value
    return merged
