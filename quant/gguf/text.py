"""Which tensors of a checkpoint a GGUF file holds: those of the text decoder, by their names
without a wrapper. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from quant.checkpoint.reader import Checkpoint
from quant.gguf.families import Family
from quant.models.linears import LinearRef, decoder_refs
from quant.models.place import decoder_list
from quant.models.roles import leftover, role_of
from quant.vllm.config import block_count, stated

_EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
#: Projections of experts by every name they have.
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def common_name(name: str) -> str:
    """A name of a family's tensor, that of Mixtral's experts and routers as other families call theirs.

    >>> common_name("model.layers.0.block_sparse_moe.experts.3.w2.weight")
    'model.layers.0.mlp.experts.3.down_proj.weight'
    """
    name = name.replace(".block_sparse_moe.", ".mlp.")
    for old, new in _PROJECTIONS.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def family_name(name: str, decoder: str) -> str:
    """A tensor's name as models without a wrapper have it.

    Args:
        decoder: what stands before the numbers of the text decoder's blocks.

    >>> family_name("model.language_model.layers.3.mlp.up_proj.weight", "model.language_model.layers.")
    'model.layers.3.mlp.up_proj.weight'
    """
    if name.startswith(decoder):
        return f"model.layers.{name.removeprefix(decoder)}"
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    return f"model.{name.removeprefix(decoder.removesuffix('layers.'))}"


@dataclass(frozen=True)
class TextTensors:
    """What a file of a checkpoint holds.

    Attributes:
        named: a tensor of the checkpoint → its name without a wrapper.
        experts: a projection of an expert, likewise without ``.weight`` → where its numbers are: in a tensor
            of its own, or in one of all.
        refs: all linears of the decoder, by their own names.
        dropped: a tensor that no file has a place for → why.
    """

    named: dict[str, str] = field(default_factory=dict)
    experts: dict[str, LinearRef] = field(default_factory=dict)
    refs: Mapping[str, LinearRef] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def is_tied(family: Family, checkpoint: Checkpoint) -> bool:
    """Whether the head of a checkpoint is its embedding."""
    return family.tied or bool(stated(checkpoint.config, "tie_word_embeddings"))


def text_tensors(plain: Checkpoint, family: Family) -> TextTensors:
    """The tensors of a checkpoint's text decoder, values for its quantized linears; buffers that were saved
    with the weights are in none of the lists."""
    config, blocks = plain.config, block_count(plain.config) or 0
    decoder = decoder_list(plain.tensors.values(), config) or "model.layers."
    found = TextTensors(refs=decoder_refs(plain.tensors, config))
    for name, ref in found.refs.items():
        if _EXPERT.fullmatch(own := common_name(f"{family_name(name, decoder)}.").removesuffix(".")):
            found.experts[own] = ref
    inside = {r.tensor for r in found.experts.values()}
    for name, info in plain.tensors.items():
        if name in inside or leftover(info):
            continue
        own = family_name(name, decoder)
        if role_of(name, blocks, decoder) in ("tower", "mtp"):
            found.dropped[name] = "the file holds the text decoder alone"
        elif own == "lm_head.weight" and is_tied(family, plain):
            found.dropped[name] = "the head is the embedding"
        else:
            found.named[name] = own
    return found


def expert_of(name: str) -> tuple[str, str, int]:
    """The block's name, projection and number of an expert's linear, of :attr:`TextTensors.experts`.

    >>> expert_of("model.layers.0.mlp.experts.3.down_proj")
    ('model.layers.0', 'down_proj', 3)
    """
    match = _EXPERT.fullmatch(name)
    assert match is not None
    return match[1], match[3], int(match[2])
