"""Keys of config.json that change what a model computes and that transformers' class of it does not read:
those of other families' classes, or of a model's own code. transformers takes every key without a word, and
calibration would run through another model than was meant.

Sources: the config classes of transformers 5, whose fields are what their models read; the keys that models'
own code adds to a config of a known type (MiniCPM's scales, DBRX' and OLMo's clipping, Cohere's and Granite's
multipliers, Gemma 2's caps, ChatGLM's rotary ratio).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quant.errors import clipped

#: Keys that change what a model computes, and the values besides null and false with which they do not.
_ARITHMETIC: dict[str, tuple[float, ...]] = {
    "alibi": (),
    "attention_logits_soft_cap": (0,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (0,),
    "clip_qkv": (0,),
    "dual_chunk_attention_config": (),
    "embedding_multiplier": (1,),
    "embedding_scale": (1,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "logits_soft_cap": (0,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_ratio": (1,),
    "rope_scaling": (),
    "routed_scaling_factor": (1,),
    "scale_depth": (0,),
    "scale_emb": (1,),
    "use_alibi": (),
    "use_parallel_residual": (),
}
#: Names of the base of rotary positions.
_BASES = ("rope_theta", "rotary_emb_base", "rotary_base")
#: Names of one fact: a class that has any of them reads the fact under that name alone.
_ALIKE = (
    ("hidden_act", "hidden_activation", "activation_function", "ffn_act_fn"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon"),
    _BASES,
)
_NONE = object()


def ignored_note(stated: Mapping[str, Any], config: Any) -> str | None:
    """What to say of keys of config.json that change what is computed and that the class of the model does
    not read; None where there are none.

    Args:
        stated: the part of config.json that describes the text decoder.
        config: transformers' own object of that part.
    """
    fields = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    if not fields:  # a class of another package says otherwise what it reads
        return None
    known = fields | set(getattr(config, "attribute_map", None) or ())
    missed = [
        f"{key} ({clipped(value)})"
        for key, value in stated.items()
        if key not in known and _changes(key, value, config, known)
    ]
    if not missed:
        return None
    return (
        f"transformers' {type(config).__name__} reads no {', '.join(sorted(missed))} of config.json: "
        "calibration runs without it: where the model was trained with it, set model_type to the type that "
        "has it, or take --method minmax or hqq, which run nothing"
    )


def _changes(key: str, value: Any, config: Any, known: set[str]) -> bool:
    """Whether a key that is not known states what the model would compute otherwise."""
    if value is None or value is False:
        return False
    if _is_rotary(key, value, config):
        return False
    if key in _ARITHMETIC:
        return value not in _ARITHMETIC[key]
    for names in _ALIKE:
        if key in names:
            theirs = [getattr(config, n, _NONE) for n in names if n in known]
            return bool(theirs) and value not in theirs
    return False


def _is_rotary(key: str, value: Any, config: Any) -> bool:
    """Whether transformers has moved a key into ``rope_parameters``, from which its models read it."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return False
    if key == "rope_scaling":
        return True
    kinds = [rope, *(x for x in rope.values() if isinstance(x, Mapping))]
    return key in _BASES and any(k.get("rope_theta") == value for k in kinds)
