"""The KV cache as vLLM lays it out: pages, groups of layers, blocks, and what a request of a given length
needs.

A page is one layer's share of a block. Layers of one kind form a group with one block table; a model of
several kinds has several groups of equal size, which draw blocks from one pool, so a block costs ``group size
× page`` bytes whoever takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from quant.models.spec import CacheLayer, ModelSpec
from quant.vllm.releases import Rules

#: bytes of one cached value, by --kv-cache-dtype; ``auto`` is the model's own dtype
KV_DTYPES: dict[str, float] = {"auto": 0, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True)
class Group:
    """Layers with one block table: their kind, tokens a block, bytes of one layer's page; ``held``: blocks of
    a recurrent state."""

    kind: str
    layers: int
    block: int
    page: int
    window: int = 0
    held: int = 1

    def blocks(self, length: int, in_flight: int) -> int:
        """Blocks that one request of ``length`` tokens holds at most, with ``in_flight`` tokens not yet
        settled."""
        if self.kind == "sliding":
            return ceil(min(self.window - 1 + in_flight, length) / self.block) + 1
        if self.kind == "chunked":
            return ceil(min(self.window + in_flight, length) / self.block)
        if self.kind == "state":
            return self.held
        return ceil(length / self.block)


@dataclass(frozen=True)
class CacheLayout:
    """All groups of a pipeline stage. ``bytes_per_block`` is what one block of the pool costs, ``block`` an
    attention block's tokens."""

    groups: tuple[Group, ...]
    bytes_per_block: int
    block: int

    def blocks_for(self, length: int, in_flight: int) -> int:
        """Blocks that one request of ``length`` tokens needs, over all groups."""
        return sum(g.blocks(length, in_flight) for g in self.groups)

    def bytes_per_token(self) -> float:
        """Bytes of the pool a token takes when every group holds it, as vLLM's printed tokens imply."""
        if not self.groups:
            return 0.0
        return self.bytes_per_block * len(self.groups) / self.block

    def to_dict(self) -> dict[str, Any]:
        return {
            "block_tokens": self.block, "bytes_per_block": self.bytes_per_block,
            "groups": [{"kind": g.kind, "layers": g.layers, "block_tokens": g.block,
            "page_bytes": g.page} for g in self.groups],
        }  # fmt: skip


def layer_bytes(
    layer: CacheLayer, tensor_parallel: int, width: float, rules: Rules, spec: ModelSpec
) -> float:
    """Bytes that one attention layer caches for one token on one rank."""
    if layer.kind == "mla":
        if rules.mla:
            return ceil(layer.key_dim * width / rules.mla_alignment) * rules.mla_alignment
        # before latent caching: full keys and values of every head, padded to the kernels' 256
        size = spec.latent.get("qk_nope_head_dim", 128) + spec.latent.get("qk_rope_head_dim", 64)
        padded = 256 if size > 128 else 128
        return max(1, spec.heads // tensor_parallel) * 2 * padded * width
    return max(1, layer.kv_heads // tensor_parallel) * (layer.key_dim + layer.value_dim) * width


def state_bytes(layer: CacheLayer, tensor_parallel: int, width: float, least: int = 0) -> int:
    """Bytes of a recurrent layer's state for one request on one rank.

    Args:
        width: bytes of a value whose dtype the config does not name.
        least: bytes that every value of the state itself has at least, whatever the config names.
    """
    convolution, *state = layer.state
    total = convolution[0] * (convolution[1] or width) + sum(
        count * max(each or width, least) for count, each in state
    )
    return int(total / tensor_parallel)


def layout(
    spec: ModelSpec,
    layers: Sequence[CacheLayer],
    tensor_parallel: int,
    width: float,
    rules: Rules,
    block: int,
    least_state: int = 0,
) -> CacheLayout:
    """The groups of the given layers.

    Args:
        layers: the cache layers of one pipeline stage, or of the whole model.
        width: bytes of one cached value.
        block: tokens of a block as asked for, before hybrid models enlarge it.
        least_state: bytes that every value of a recurrent state has at least.
    """
    attention = [c for c in layers if c.kind != "state"]
    states = [c for c in layers if c.kind == "state"]
    if not attention and not states:
        return CacheLayout((), 0, block)
    token = {id(c): layer_bytes(c, tensor_parallel, width, rules, spec) for c in attention}
    state = max((state_bytes(c, tensor_parallel, width, least_state) for c in states), default=0)
    if states and attention:  # the attention block grows until its page holds a state
        align = max(block, 128) if any(c.kind == "mla" for c in attention) else block
        block = align * ceil(state / (align * min(token.values())))
    kinds: dict[tuple[str, int, float], list[CacheLayer]] = {}
    kind: str
    for entry in attention:
        kind, window = entry.kind, entry.window
        if kind == "mla" or not rules.hybrid:
            kind, window = "full", 0
        kinds.setdefault((kind, window, token[id(entry)]), []).append(entry)
    if states:
        kinds[("state", 0, 0.0)] = list(states)
    if len({(k, w) for k, w, _ in kinds}) == 1:  # one type: a single group, whatever the pages
        (kind, window), count = next(iter({(k, w) for k, w, _ in kinds})), len(attention) + len(states)
        pages = [int(token[id(c)] * block) for c in attention] + [state for _ in states]
        return CacheLayout((Group(kind, count, block, sum(pages) // count, window),), sum(pages), block)
    largest = max([int(t * block) for _, _, t in kinds if t] or [0] + [state])
    page = max(largest, state)
    buckets = []
    for (kind, window, each), members in kinds.items():
        own_block = block
        if each and page % int(each * block) == 0:
            own_block = block * (page // int(each * block))
        buckets.append(
            (
                Group(
                    kind, len(members), own_block, page, window, rules.state_blocks if kind == "state" else 1
                ),
                members,
            )
        )
    sizes = [len(m) for _, m in buckets]
    size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    groups = [replace(g, layers=size) for g, members in buckets for _ in range(ceil(len(members) / size))]
    return CacheLayout(tuple(groups), size * page, block)


def longest_context(layout_: CacheLayout, blocks: int, in_flight: int, limit: int) -> int:
    """The longest request, up to ``limit`` tokens, that ``blocks`` hold; 0 when not even one token fits."""
    if not layout_.groups:
        return limit
    if layout_.blocks_for(1, in_flight) > blocks:
        return 0
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        if layout_.blocks_for(middle, in_flight) <= blocks:
            low = middle
        else:
            high = middle - 1
    return low
