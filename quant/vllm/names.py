"""What vLLM calls a tensor, and which of its model classes know other names for one: scales, experts, parts
that transformers saves otherwise than they were published.

Source: vLLM 0.32 `quantization/fp8.py::Fp8LinearMethod.create_weights` and the ``hf_to_vllm_mapper`` of the
model classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from quant.vllm.releases import VLLM_VERSION

#: Model type → spellings that its class renames, with vLLM's own.
_KNOWN: Mapping[str, Mapping[str, str]] = {
    # `models/mistral3.py`: the names that transformers gives to FP8 with one scale a tensor
    "mistral3": {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"},
    # `models/deepseek_v4.py`: DeepSeek's own
    "deepseek_v4": {"scale": "weight_scale_inv"},
}


def unread_spellings(model_type: str, stored: Mapping[str, str]) -> list[str]:
    """What vLLM would not find of a checkpoint's scales, because the file calls them otherwise.

    Args:
        stored: vLLM's name of a tensor → the file's, where they differ.
    """
    known = _KNOWN.get(model_type, {})
    return [
        f"{name} is what vLLM calls {own.rpartition('.')[2]}, and its class for model type {model_type!r} "
        "knows no other name: quant export-vllm writes it so"
        for own, name in stored.items()
        if known.get(name.rpartition(".")[2]) != own.rpartition(".")[2]
    ]


#: Model types whose loader numbers an expert's projections (``ckpt_names`` of `models/mixtral.py`,
#: `lfm2_moe.py`, `minimax_m2.py`, `models/deepseek_v4`) → whether it knows them by these names alone: others
#: then stay empty without a word. And the number of each.
NUMBERED_PROJECTIONS: Mapping[str, bool] = {
    "mixtral": False,
    "minimax": False,
    "phimoe": False,
    "minimax_m2": True,
    "lfm2_moe": True,
    "deepseek_v4": True,
}
NUMBERED_AS: Mapping[str, str] = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


#: Model types whose loader renames projections of numbered experts, in a config's lists too → which ones
#: (`models/gpt_oss.py`, ``hf_to_vllm_mapper``; `models/aria.py::AriaTextModel`, whose mapper is Llama's).
#: Of a gate and an up projection, which become the fused layer's, half stays empty.
RENAMED_PROJECTIONS: Mapping[str, frozenset[str]] = {
    "gpt_oss": frozenset({"down_proj"}),
    "aria": frozenset({"gate_proj", "up_proj", "down_proj"}),
}


def unfound_expert(kinds: Collection[str], linears: Iterable[str]) -> str | None:
    """What vLLM's loader would not find of a mixture's quantized experts, said of one of them; or None."""
    if any(NUMBERED_PROJECTIONS.get(kind) for kind in kinds):
        why = "vLLM looks for experts as w1, w3 and w2, and leaves these empty"
    elif any("gate_proj" in RENAMED_PROJECTIONS.get(kind, ()) for kind in kinds):
        why = (
            "vLLM's loader of this family renames the projections of single experts, and leaves half of each "
            "empty: it reads experts in 16 bits alone"
        )
    else:
        return None
    wrong = (n for n in linears if ".experts." in n and n.endswith(tuple(NUMBERED_AS)))
    return next((f"{n}: {why}" for n in wrong), None)


#: Model types of which transformers 5 holds parts of a mixture under names of its own, and can save them so,
#: where vLLM's loader knows those of published files alone → the former, and what vLLM has
#: (`models/mixtral.py`, `minimax_m2.py`, `ernie45_moe.py`, `granitemoehybrid.py`).
_MISPLACED = {
    "mixtral": (re.compile(r"\.\d+\.mlp\.experts\."), "block_sparse_moe"),
    "minimax_m2": (re.compile(r"\.\d+\.mlp\.experts\."), "block_sparse_moe"),
    "ernie4_5_moe": (re.compile(r"\.mlp\.gate\.moe_statics\."), "mlp.moe_statics"),
    "granitemoehybrid": (re.compile(r"\.block_sparse_moe\.router\.weight$"), "block_sparse_moe.router.layer"),
}


def misplaced_experts(kinds: Collection[str], tensors: Iterable[str]) -> str | None:
    """What stops vLLM's loader at a mixture of which a part lies where its class has none; or None."""
    pattern, has = next((_MISPLACED[k] for k in kinds if k in _MISPLACED), (None, ""))
    name = next((n for n in tensors if pattern is not None and pattern.search(n)), None)
    if name is None:
        return None
    return (
        f"{name}: vLLM has no such module, but {has}: the file was saved under transformers' own names: save "
        "it in the original format (save_pretrained without save_original_format=False)"
    )


_ATTENTION = r"(self_attn|mixer)\.[qkvo]_proj"
#: Model types of which a config can give linears biases that transformers computes with, and for which vLLM's
#: class has no parameter → those linears (``bias=False`` in `models/qwen3.py`, `gemma.py`, `deepseek_v2.py`,
#: `ernie45_moe.py` and the others). Most loaders pass over a bias that they do not know.
_UNBIASED = (
    (
        frozenset({"qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text", "ernie4_5_moe"}),
        re.compile(r"\.self_attn\.o_proj\.bias$"),
    ),
    (frozenset({"step3p5"}), re.compile(r"\.(self_attn\.o_proj|mlp\.\w+_proj)\.bias$")),
    # Llama's class, which reads other keys than `use_bias`
    (frozenset({"ernie4_5", "paddleocr_vl_text"}), re.compile(r"\.(self_attn|mlp)\.\w+_proj\.bias$")),
    (
        frozenset(
            {"gemma", "cohere", "cohere2", "olmoe", "olmo_hybrid", "granitemoe", "granitemoeshared", "afmoe"}
            | {"falcon_h1", "nemotron_h", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
        ),
        re.compile(rf"\.{_ATTENTION}\.bias$"),
    ),
    (
        frozenset({"deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"})
        | {"longcat_flash", "minicpm3"},
        re.compile(r"\.(self_attn|mlp)(\.\w+)*_proj(_with_mqa)?\.bias$"),
    ),
)


def passed_over_bias(
    kinds: Collection[str], tensors: Iterable[str], is_zero: Callable[[str], bool]
) -> str | None:
    """What vLLM's class of a family would compute without, said of one bias; or None.

    Args:
        is_zero: whether a tensor holds nothing but zeros, which change no output.
    """
    pattern = next((p for names, p in _UNBIASED if names & set(kinds)), None)
    name = next((n for n in tensors if pattern is not None and pattern.search(n) and not is_zero(n)), None)
    if name is None:
        return None
    return (
        f"{name}: vLLM {VLLM_VERSION}'s class has no such bias, and would compute without it: the model's "
        "outputs would be others"
    )


#: Model types of which transformers 5 saves a part under other names than published files have, and vLLM's
#: class loads under the latter alone → the former, and what vLLM has (`models/siglip.py`, `clip.py`, whose
#: towers keep a ``vision_model``; `models/kimi_k3`, whose dense blocks have an ``mlp``).
_SAVED_OTHERWISE = (
    (
        frozenset({"gemma3", "llava", "llava_next", "paligemma"}),
        re.compile(r"(^|\.)vision_tower\.(embeddings|encoder|pre_layrnorm|post_layernorm|head)\."),
        "vision_tower.vision_model",
    ),
    (
        frozenset({"qianfan_ocr"}),
        re.compile(r"^language_model\.model\.encoder\.layers\."),
        "language_model.model.layers",
    ),
    (frozenset({"kimi_linear"}), re.compile(r"\.block_sparse_moe\.(gate|up|down)_proj\."), "mlp"),
)


def unread_note(kinds: Collection[str], tensors: Iterable[str]) -> str | None:
    """What to say of a file that vLLM does not load, whatever is quantized, because a part that is copied has
    another name than in published files; or None.

    >>> unread_note(("gemma3_text", "gemma3"), ["vision_tower.head.weight"]).split(",")[0]
    "vision_tower.head.weight: vLLM's class looks for vision_tower.vision_model"
    """
    rows = (row for row in _SAVED_OTHERWISE if not row[0].isdisjoint(kinds))
    found = ((n, has) for _, pattern, has in rows for n in tensors if pattern.search(n))
    name, has = next(found, ("", ""))
    if not name:
        return None
    return (
        f"{name}: vLLM's class looks for {has}, as published files have it, and loads neither this file nor "
        "what is made of it before its tensors are renamed so"
    )
