"""Speculative decoding as vLLM is told of it: the keys of ``--speculative-config`` and the flags that older
releases had instead."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quant.errors import UsageError, clipped
from quant.vllm.config import block_count, drafting_blocks

if TYPE_CHECKING:
    from quant.checkpoint.reader import Checkpoint

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
    """How many prediction heads a checkpoint has itself, in its config and in its files; None without."""
    heads = drafting_blocks(checkpoint.config)
    blocks = block_count(checkpoint.config)
    held = any(".mtp." in f".{name}" or f".layers.{blocks}." in f".{name}" for name in checkpoint.tensors)
    return heads if heads and held else None
