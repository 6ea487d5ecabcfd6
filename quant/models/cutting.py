"""A checkpoint without some of its decoder blocks: what is left of its tensors, renumbered, and the
config.json that says so. No value is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from quant.models.place import decoder_list
from quant.models.roles import block_list, block_of
from quant.vllm.config import KEYS, block_count, text_config

#: Keys whose number splits the blocks in two: those before it are of another kind than those from it on.
_BORDERS = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
#: Keys whose list holds numbers of blocks.
_PLACES = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers")
#: Keys by which blocks read what others leave: none of these can be left out alone.
_SHARED = ("num_kv_shared_layers",)


def without_blocks(checkpoint: Checkpoint, kept: Sequence[int]) -> Checkpoint:
    """The checkpoint with these decoder blocks alone, in this order (rising). Blocks beyond the decoder's (of
    heads that predict further tokens) move up.

    Raises:
        CheckpointError: the config does not say how many blocks there are, or says of them what has no
            meaning without the others.
    """
    count = block_count(checkpoint.config)
    decoder = decoder_list(checkpoint.tensors.values(), checkpoint.config)
    if count is None or decoder is None:
        raise CheckpointError(
            f"{checkpoint.path}: config.json does not say how many decoder blocks there are"
        )
    places = {old: new for new, old in enumerate(kept)}
    tensors, origins = {}, {}
    for name, info in checkpoint.tensors.items():
        index = block_of(name) if block_list(name) == decoder else None
        if index is None:
            renamed = name
        elif index >= count:
            renamed = _renumbered(name, decoder, index, index - count + len(kept))
        elif index in places:
            renamed = _renumbered(name, decoder, index, places[index])
        else:
            continue
        tensors[renamed], origins[renamed] = replace(info, name=renamed), name
    computed = {n: checkpoint.computed[o] for n, o in origins.items() if o in checkpoint.computed}
    parts = {n: checkpoint.computed_parts[o] for n, o in origins.items() if o in checkpoint.computed_parts}
    return replace(
        checkpoint,
        config=config_without_blocks(checkpoint.config, kept, count),
        tensors=tensors,
        computed=computed,
        computed_parts=parts,
    )


def _renumbered(name: str, decoder: str, old: int, new: int) -> str:
    return f"{decoder}{new}{name[len(decoder) + len(str(old)) :]}"


def config_without_blocks(config: Mapping[str, Any], kept: Collection[int], count: int) -> dict[str, Any]:
    """A config.json for these of its ``count`` decoder blocks.

    Every list that has an entry for each block loses those of the blocks that go, a list of blocks' numbers
    and a number that divides them are counted anew.

    Raises:
        CheckpointError: blocks share what one of them makes.
    """
    text = text_config(config)
    if shared := [k for k in _SHARED if text.get(k)]:
        raise CheckpointError(
            f"{shared[0]} is {text[shared[0]]}: later blocks read keys and values of earlier ones, so none "
            "can be left out"
        )
    places = {old: new for new, old in enumerate(kept)}

    def changed(key: str, value: Any) -> Any:
        if key in KEYS["num_hidden_layers"] and value == count:
            return len(kept)
        if key in _BORDERS and type(value) is int:
            return sum(index < value for index in kept)
        if key in _PLACES and isinstance(value, list):
            return [places[index] for index in value if index in places]
        if isinstance(value, list) and len(value) == count and not key.endswith("_factor"):
            return [value[index] for index in kept]
        if key == "hybrid_override_pattern" and isinstance(value, str) and len(value) == count:
            return "".join(value[index] for index in kept)
        return value

    made = {key: changed(key, value) for key, value in text.items()}
    if text is config:
        return made
    return {key: made if value is text else value for key, value in config.items()}
