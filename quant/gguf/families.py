"""Which models become a GGUF file, and what each needs to be turned into: a row a family. No torch.

A row says what llama.cpp calls the architecture and what its graph computes otherwise than transformers.
Where a config asks for something that the graph does not compute, the model is refused by name: a file that
loads and answers wrongly is the worst result. Facts are of llama.cpp's ``src/models/*.cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.errors import CheckpointError, UsageError, clipped
from quant.vllm.config import head_size, stated, text_config, whole_number


@dataclass(frozen=True)
class Family:
    """A family of models as llama.cpp has it.

    Attributes:
        architecture: llama.cpp's name, of :class:`gguf.MODEL_ARCH`.
        interleaved: rotary embeddings turn neighbouring rows of a head of q and k, where transformers turns
            rows that are half a head apart: rows are reordered.
        norm_offset: what the family's norms add to their weights, which the file holds added.
        activations: of the feed-forward layer, by transformers' names, that the graph has.
        normalized: what the graph does with the chosen experts' weights: whether they sum to one; None: it
            has no experts.
        window: period of sliding attention: the last of so many blocks attends to everything; 0: the graph
            has no sliding window; None: of no matter.
        scale_by_width: number of blocks of the one size whose attention divides by the root of
            ``hidden_size / num_attention_heads``; others divide by that of the head's size.
        tied: whether the head is the embedding, whatever the config says.
        caps: of logits, which the graph has always; and what both it and transformers take where nothing is
            stated.
    """

    architecture: str
    interleaved: bool = False
    norm_offset: float = 0.0
    activations: tuple[str, ...] = ("silu",)
    normalized: bool | None = None
    window: int | None = 0
    scale_by_width: int = 0
    tied: bool = False
    caps: Mapping[str, float] = field(default_factory=dict)


_GELU = ("gelu_pytorch_tanh",)
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
#: ``model_type`` of the text decoder → its row.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "ministral": Family("llama", interleaved=True),
    "mixtral": Family("llama", interleaved=True, normalized=True),
    "qwen2": Family("qwen2"),
    "qwen2_moe": Family("qwen2moe", normalized=False),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe", normalized=True),
    "gemma2": Family(
        "gemma2", norm_offset=1.0, activations=_GELU, window=2, scale_by_width=46, tied=True, caps=_CAPS
    ),
    "gemma3_text": Family(
        "gemma3", norm_offset=1.0, activations=_GELU, window=6, scale_by_width=62, tied=True
    ),
    "phi3": Family("phi3"),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of a config.

    Raises:
        UsageError: the family has none.
    """
    kind = str(text_config(config).get("model_type"))
    if kind not in FAMILIES:
        raise UsageError(
            f"model type {clipped(kind)} cannot be written as GGUF here: {', '.join(sorted(FAMILIES))} can. "
            "llama.cpp's own convert_hf_to_gguf.py knows more families: give it the output of quant "
            "export-vllm --format plain"
        )
    return FAMILIES[kind]


def number(said: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """What a config, or a part of it, states under a key, or ``default`` where it states nothing.

    Raises:
        CheckpointError: that is no finite number, or nothing where there is no default.
    """
    value = default if said.get(key) is None else said[key]
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond all floats
        pass
    of = f" of rotary scaling {said['rope_type']}" if "rope_type" in said else ""
    raise CheckpointError(f"config.json: {key}{of} is {clipped(value)}, no number, which llama.cpp needs")


def rotary(config: Mapping[str, Any], kind: str = "full_attention") -> dict[str, Any]:
    """What a config says of rotary embeddings, old and new keys alike: ``rope_type``, ``rope_theta`` and the
    numbers of a scaling, for blocks of one kind of attention.

    Raises:
        CheckpointError: it says something else.
    """
    text = text_config(config)
    said = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        raise CheckpointError(f"config.json: rotary scaling is {clipped(said)}, no object with its numbers")
    if isinstance(said.get(kind), Mapping):
        said = said[kind]
    said = dict(said)
    local = kind == "sliding_attention"
    if local and "full_attention" not in (text.get("rope_parameters") or {}):
        said = {}  # Gemma 3's scaling is of its global blocks
    theta = text.get("rope_local_base_freq") if local else text.get("rope_theta")
    said.setdefault("rope_theta", theta if theta is not None else 10000.0)
    said["rope_type"] = said.get("rope_type") or said.get("type") or "default"
    return said


def yarn_attention(factor: float) -> float:
    """What YaRN multiplies queries and keys by, by a rule that llama.cpp and transformers share.

    Source: Peng et al., 2023, YaRN (arXiv:2309.00071), equation 22.
    """
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


#: Scalings that are written.
_SCALINGS = ("default", "linear", "llama3", "yarn", "longrope", "su")


def config_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    """What of a config llama.cpp's graph of its family does not compute, a line each."""
    text, problems = text_config(config), []
    # Gemma's configs state hidden_act too, which its classes do not read
    act = text.get("hidden_activation" if family.activations is _GELU else "hidden_act")
    act = act or family.activations[0]
    if act not in family.activations:
        problems.append(f"hidden_act is {clipped(act)}: llama.cpp computes {', '.join(family.activations)}")
    scaling = rotary(config)["rope_type"]
    if scaling not in _SCALINGS:
        problems.append(f"rotary scaling {clipped(scaling)}: written are {', '.join(_SCALINGS)}")
    if scaling in ("longrope", "su") and family.architecture != "phi3":
        problems.append(f"rotary scaling {scaling}: llama.cpp has its factors for phi3 alone")
    said = rotary(config)
    if scaling == "yarn" and said.get("attention_factor") is not None:
        usual, times = yarn_attention(number(said, "factor", 1.0)), number(said, "attention_factor")
        if not math.isclose(times, usual, rel_tol=1e-6):
            problems.append(f"attention_factor of YaRN is {times}: llama.cpp multiplies by {usual:.6g}")
    problems += [
        f"{key} is {clipped(text[key])}: llama.cpp's {family.architecture} caps always"
        for key in family.caps
        if key in text and not text[key]
    ]
    problems += _attention_problems(config, family) + _expert_problems(text, family)
    return problems


def config_notes(config: Mapping[str, Any], family: Family) -> list[str]:
    """What llama.cpp's graph does otherwise, and is right where models are used as they were trained."""
    text, notes = text_config(config), []
    window, longest = whole_number(text.get("sliding_window")), number(text, "max_position_embeddings", 0)
    if family.architecture in ("llama", "phi3") and window and window < longest:
        notes.append(
            f"sliding_window is {window}: llama.cpp's {family.architecture} has none, and attends to "
            "everything beyond it"
        )
    if rotary(config)["rope_type"] in ("longrope", "su"):
        notes.append("llama.cpp takes the long rotary factors by the context it is started with")
    return notes


def _attention_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    text, problems = text_config(config), []
    kinds = text.get("layer_types") or []
    window = whole_number(text.get("sliding_window"))
    if text.get("use_sliding_window") is False:
        window = None
    slides = "sliding_attention" in kinds if kinds else window is not None and "use_sliding_window" in text
    if family.architecture.startswith("qwen") and slides and window:
        problems.append(
            f"sliding_window is {window}: llama.cpp's {family.architecture} has none, and would answer "
            "otherwise beyond it: set use_sliding_window to false where it is of no matter"
        )
    if family.window and kinds and sliding_period(config, family) is None:
        problems.append(
            f"layer_types {clipped(kinds)}: llama.cpp's {family.architecture} has global attention in the "
            "last of every so many blocks, and sliding attention in the others"
        )
    divisor = stated(config, "query_pre_attn_scalar")
    if family.scale_by_width and divisor is not None:
        divisor = number({"query_pre_attn_scalar": divisor}, "query_pre_attn_scalar")
        hidden, heads = number(text, "hidden_size", 0), number(text, "num_attention_heads", 1)
        by_width = text.get("num_hidden_layers") == family.scale_by_width
        wanted = hidden / max(heads, 1.0) if by_width else head_size(config) or 0
        if not math.isclose(divisor, wanted):
            problems.append(
                f"query_pre_attn_scalar is {divisor:g}: llama.cpp's {family.architecture} of "
                f"{text.get('num_hidden_layers')} blocks divides by the root of {wanted:g}"
            )
    return problems


def _expert_problems(text: Mapping[str, Any], family: Family) -> list[str]:
    if family.normalized is None:
        return []
    normalized = bool(text.get("norm_topk_prob", family.normalized))
    problems = []
    if normalized != family.normalized and text.get("model_type") != "mixtral":
        does = "normalizes" if family.normalized else "does not normalize"
        problems.append(
            f"norm_topk_prob is {str(normalized).lower()}: llama.cpp's {family.architecture} {does} the "
            "weights of the chosen experts"
        )
    if (text.get("decoder_sparse_step") or 1) != 1 or text.get("mlp_only_layers"):
        problems.append(
            "blocks without experts (decoder_sparse_step, mlp_only_layers): llama.cpp's "
            f"{family.architecture} has experts in every block"
        )
    return problems


def sliding_period(config: Mapping[str, Any], family: Family) -> int | None:
    """Of how many blocks the last attends to everything, where the others have a sliding window; None where
    the blocks follow no such period.

    >>> kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    >>> sliding_period({"layer_types": kinds}, FAMILIES["gemma3_text"])
    3
    """
    text = text_config(config)
    kinds = text.get("layer_types")
    if not kinds:
        said = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
        return whole_number(said) or family.window
    # a period longer than the model: all of its blocks slide
    for period in [family.window or 1, *range(1, len(kinds) + 2)]:
        if all((k == "full_attention") == (i % period == period - 1) for i, k in enumerate(kinds)):
            return period
    return None
