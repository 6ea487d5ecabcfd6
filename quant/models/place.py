"""Where in a file the text decoder's blocks are. No torch.

Files of several models keep a list of blocks for each: towers, speakers, drafting heads. Which of them is the
text decoder is told by what config.json says of it (how many blocks, how wide), not by what its makers call
the others; their names are asked only where numbers leave a tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.checkpoint.header import TensorInfo
from quant.models.roles import block_list, block_of, role_of
from quant.vllm.config import block_count, drafting_blocks, stated, whole_number


@dataclass
class _List:
    """A numbered list of blocks: its indices, tensors, those with a side as wide as the decoder, and
    elements."""

    indices: set[int] = field(default_factory=set)
    tensors: int = 0
    wide: int = 0
    elements: int = 0


def decoder_list(tensors: Iterable[TensorInfo], config: Mapping[str, Any]) -> str | None:
    """What stands before a block's number in the names of the text decoder's tensors (``model.layers.``);
    None where a file numbers no blocks.

    Of several lists it is the one of the decoder's width, then the one with as many blocks as config.json
    says (and no more than its drafting blocks beyond), then one that is not named as another modality, then
    the largest.
    """
    hidden, blocks = whole_number(stated(config, "hidden_size")), block_count(config)
    lists: dict[str, _List] = {}
    for info in tensors:
        name, prefix = info.name, block_list(info.name)
        if prefix is None:
            continue
        one = lists.setdefault(prefix, _List())
        index = block_of(name)
        assert index is not None  # it has a prefix
        one.indices.add(index)
        one.tensors += 1
        one.wide += hidden in info.shape
        one.elements += info.numel
    most = None if blocks is None else blocks + max(1, drafting_blocks(config))

    def fits(prefix: str) -> tuple[bool, bool, int, bool, int]:
        one = lists[prefix]
        role = role_of(f"{prefix}0.mlp.weight")
        count = len(one.indices)
        as_many = 2 if blocks in (None, count) else int(most is not None and blocks <= count <= most)
        # of a packed file few tensors keep the width of the model, but its norms do
        return role != "mtp", 8 * one.wide > one.tensors, as_many, role != "tower", one.elements

    fitting = max(lists, key=fits, default=None)
    if fitting is not None:
        decodes, wide, as_many, named, _ = fits(fitting)
        if not named and not (decodes and wide and as_many):
            return None  # a file of towers alone
    return fitting
