"""Speculative decoding as vLLM is told of it: the keys of ``--speculative-config`` and the flags that older
releases had instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quant.errors import CheckpointError, UsageError, clipped
from quant.vllm.config import block_count, drafting_blocks

if TYPE_CHECKING:
    from quant.checkpoint.reader import Checkpoint

#: vLLM's name of a proposer that is computed here → what it is called.
PROPOSERS = {
    "ngram": "ngram",
    "draft_model": "draft model",
    "eagle3": "EAGLE-3",
    "dflash": "DFlash",
    "mtp": "mtp",
    "suffix": "suffix",
}
#: Package that vLLM needs for a proposer beside its own.
PACKAGES = {"suffix": "arctic-inference"}
#: Flag of releases before 0.8 → key of the object that has replaced them all.
_OLD = {
    "--speculative-model": "model",
    "--num-speculative-tokens": "num_speculative_tokens",
    "--ngram-prompt-lookup-max": "prompt_lookup_max",
    "--ngram-prompt-lookup-min": "prompt_lookup_min",
    "--speculative-draft-tensor-parallel-size": "draft_tensor_parallel_size",
    "--speculative-max-model-len": "max_model_len",
    "--speculative-disable-by-batch-size": "disable_by_batch_size",
}
#: The same within an object that is written with the old names.
_OLD_KEYS = {flag[2:].replace("-", "_"): key for flag, key in _OLD.items()}


@dataclass(frozen=True)
class HeadLayout:
    """How a family's prediction head is stored and computed.

    Attributes:
        start: how the names of its tensors begin, with ``{blocks}`` for the number of the target's blocks.
        block: the same of its block alone.
        embedding, state, last: norms of the embedding, the target's state and the end, behind ``start``.
        projection: of embedding and state, in that order, to one state.
        shared: how the names of tensors behind ``start`` begin that are the target's own once more.
        normed: whether further tokens are proposed from its state behind the last norm.
        masked: whether the embedding of the first row is zero.
        kind: of its block's attention, where the target's blocks have several kinds.
    """

    start: str
    block: str
    embedding: str
    state: str
    last: str
    projection: str
    shared: tuple[str, ...] = ()
    normed: bool = True
    masked: bool = False
    kind: str = ""


_DEEPSEEK = HeadLayout(
    start="model.layers.{blocks}.",
    block="model.layers.{blocks}.",
    embedding="enorm.weight",
    state="hnorm.weight",
    last="shared_head.norm.weight",
    projection="eh_proj.weight",
    shared=("shared_head.head.", "embed_tokens."),
    masked=True,
)
_QWEN = HeadLayout(
    start="mtp.",
    block="mtp.layers.0.",
    embedding="pre_fc_norm_embedding.weight",
    state="pre_fc_norm_hidden.weight",
    last="norm.weight",
    projection="fc.weight",
    kind="full_attention",
)
#: Families whose prediction head is computed here, as vLLM 0.32 computes it (``models/deepseek_mtp.py``,
#: ``glm4_moe_mtp.py``, ``qwen3_next_mtp.py``, ``qwen3_5_mtp.py``). The acceptance of each has been
#: compared with vLLM's counters (benchmarks/speculation.py; GLM-4-MoE in tests/vllm).
HEADS = {
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": replace(_DEEPSEEK, normed=False),
    "qwen3_next": _QWEN,
    "qwen3_5_text": _QWEN,
}


def draft_method(config: Mapping[str, Any]) -> str:
    """The ``method`` of a draft by its own config.json, as vLLM finds it (``config/speculative.py``).

    >>> draft_method({"architectures": ["LlamaForCausalLMEagle3"]}), draft_method({"model_type": "llama"})
    ('eagle3', 'draft_model')
    """
    kind = str(config.get("speculators_model_type") or "")
    names = [str(n).lower() for n in (kind, config.get("model_type"), *(config.get("architectures") or ()))]
    marks = ("eagle3", "peagle", "dflash", "dspark", "eagle", "medusa", "mlp_speculator")
    found = next((m for m in marks if any(m in n for n in names)), "draft_model")
    return "eagle3" if found == "peagle" else found


def eagle3_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an EAGLE-3 draft in one form: as its authors write it, or as the speculators library
    does, whose blocks are described apart (vLLM's ``transformers_utils/configs/speculators/algos.py``).

    Raises:
        CheckpointError: a part of it is no object.
    """
    for key in ("eagle_config", "transformer_layer_config"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise CheckpointError(
                f"{key} of the draft's config.json is {clipped(config[key])}: an object is needed: "
                "download the draft again, or leave --draft out"
            )
    kind = config.get("speculators_model_type")
    if not kind:
        own = {"eagle_aux_hidden_state_layer_ids": None} | (config.get("eagle_config") or {})
        return {"model_type": "llama", **own, **config}
    keys = (
        "draft_vocab_size",
        "norm_before_fc",
        "fc_norm",
        "norm_output",
        "eagle_aux_hidden_state_layer_ids",
    )
    return {
        "model_type": "llama",
        **(config.get("transformer_layer_config") or {}),
        **{k: config[k] for k in keys if k in config},
        "norm_before_residual": config.get("norm_before_residual", kind == "eagle3"),
        "parallel_drafting": kind != "eagle3",
    }


def dflash_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a DFlash draft in one form, its own keys at the top: as its authors write it (with
    ``dflash_config``), or as the speculators library does. Where the target's states are read stands under
    the key that EAGLE-3's has, as block i that they enter: a DFlash config counts the blocks that they leave.

    Raises:
        CheckpointError: a part of it is no object.
    """
    for key in ("dflash_config", "transformer_layer_config"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise CheckpointError(
                f"{key} of the draft's config.json is {clipped(config[key])}: an object is needed: "
                "download the draft again, or leave --draft out"
            )
    own = dict(config.get("dflash_config") or {})
    found = {"model_type": "qwen3", **(config.get("transformer_layer_config") or {}), **config, **own}
    left = found.get("target_layer_ids")
    if isinstance(left, (list, tuple)) and all(type(i) is int for i in left):
        found["eagle_aux_hidden_state_layer_ids"] = [i + 1 for i in left]
    elif "aux_hidden_state_layer_ids" in found:
        found["eagle_aux_hidden_state_layer_ids"] = found["aux_hidden_state_layer_ids"]
    if "rope_parameters" not in found:
        found = {"rope_theta": 1000000} | found  # vLLM's, where the config says none
    return found


def eagle3_places(blocks: int) -> tuple[int, int, int]:
    """Before which blocks an EAGLE-3 draft reads the target's states where its config names none (vLLM's
    ``get_eagle3_default_aux_hidden_state_layers``)."""
    return 2, blocks // 2, blocks - 3


def translated(extra: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """vLLM's arguments with what older releases called the speculation in today's form.

    Returns:
        the arguments, and a note for each name that was translated.

    Raises:
        UsageError: ``--speculative-config`` that is no JSON object; a flag without a value.

    >>> translated(["--speculative-model", "[ngram]", "--num-speculative-tokens", "4"])[0]
    ('--speculative-config', '{"method": "ngram", "num_speculative_tokens": 4}')
    """
    words, kept = list(extra), list[str]()
    found: dict[str, Any] = {}
    notes: list[str] = []
    while words:
        flag, _, inline = words.pop(0).partition("=")
        name = flag.replace("_", "-") if flag.startswith("--") else flag
        if name not in _OLD and name != "--speculative-config":
            kept.append(f"{flag}={inline}" if inline else flag)
            continue
        if not inline and not words:
            raise UsageError(f"{flag} has no value")
        value = inline or words.pop(0)
        if name == "--speculative-config":
            found |= _object(value, notes)
        else:
            found |= _entry(_OLD[name], value)
            notes.append(f"{flag} is an older release's: it is {_OLD[name]!r} of --speculative-config now")
    return (*kept, *(("--speculative-config", json.dumps(found)) if found else ())), notes


def _object(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"--speculative-config is {clipped(text)}: a JSON object is needed")
    known: dict[str, Any] = {}
    for key, entry in value.items():
        if key in _OLD_KEYS and _OLD_KEYS[key] != key:
            notes.append(f"{key!r} is an older release's: it is {_OLD_KEYS[key]!r} now")
            known |= _entry(_OLD_KEYS[key], entry)
        else:
            known[key] = entry
    return known


def _entry(key: str, value: Any) -> dict[str, Any]:
    if key == "model" and value == "[ngram]":
        return {"method": "ngram"}
    return {key: int(value) if isinstance(value, str) and value.isdigit() else value}


def native_heads(checkpoint: Checkpoint) -> int | None:
    """How many prediction heads a checkpoint has itself, in its files and, but for Qwen3-Next's, which has
    one, in its config; None without."""
    apart = any(name.startswith("mtp.") or ".mtp." in name for name in checkpoint.tensors)
    blocks = block_count(checkpoint.config)
    held = apart or any(f".layers.{blocks}." in f".{name}" for name in checkpoint.tensors)
    return drafting_blocks(checkpoint.config) or (1 if apart else None) if held else None


def head_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's own prediction heads, without what they share with the target."""
    starts = tuple(x.start.format(blocks=block_count(checkpoint.config)) for x in (_DEEPSEEK, _QWEN))
    shared = tuple(start + name for start in starts for name in _DEEPSEEK.shared)
    return sum(
        info.nbytes
        for name, info in checkpoint.tensors.items()
        if name.startswith(starts) and not name.startswith(shared)
    )
