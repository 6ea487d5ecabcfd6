"""A checkpoint whose decoder blocks are narrower: of each block's routed experts, MLP channels or groups of
attention heads some stay, and config.json says how many.

Which of a block's tensors are cut, and where, follows from their names and shapes. A group of heads is a KV
head with all query heads that read it. Every block keeps as many, because config.json and the engines have
one number for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from quant.models.linears import expert_layout, fused_experts
from quant.models.place import decoder_list
from quant.models.restating import with_stated_heads
from quant.models.roles import EXPERT, block_list, block_of, role_of
from quant.units import numbers
from quant.vllm.config import (
    DRAFTING,
    KEYS,
    block_count,
    head_size,
    heads_of,
    stated,
    text_config,
    whole_number,
)
from quant.vllm.layers import HEAD_SIZE_STATED

if TYPE_CHECKING:
    import torch

#: What a block may have less of: routed experts, channels of its dense MLP, KV heads with their query heads.
Kind = Literal["experts", "channels", "heads"]
#: By kind, what it is called in messages, and the key of :data:`quant.vllm.config.KEYS` that counts it.
CALLED: Mapping[Kind, tuple[str, str]] = {
    "experts": ("experts", "experts"),
    "channels": ("MLP channels", "intermediate_size"),
    "heads": ("KV heads", "num_key_value_heads"),
}
#: What projections and norms are called that have rows for query heads, and for KV heads; and those that have
#: columns for query heads.
_QUERIES, _KEYS = frozenset({"q_proj", "q_norm"}), frozenset({"k_proj", "v_proj", "k_norm"})
_OUTPUTS = frozenset({"o_proj", "dense", "out_proj"})
#: Modules whose heads config.json counts as ``num_attention_heads``: linear attention (Qwen3-Next, whose keys
#: have heads of their own) is called so too, and is none.
_ATTENTION = re.compile(r"\.(?!linear_)\w*(?:attn|attention)\.")
#: Keys that state into how many groups a router sorts the experts, and how many it takes a token to.
_GROUPS, _TOP_GROUPS = "n_group", "topk_group"


@dataclass(frozen=True)
class Taken:
    """How the units that stay are found in one dimension of a tensor: in each segment, an offset and a size,
    unit u is at ``offset + u · size`` and as many places on."""

    dimension: int
    segments: tuple[tuple[int, int], ...]

    def places(self, kept: torch.Tensor) -> torch.Tensor:
        """int64: the indices of the units ``kept`` int64 [U], segment by segment."""
        import torch

        runs = [(o + kept[:, None] * size + torch.arange(size)).flatten() for o, size in self.segments]
        return torch.cat(runs)

    def shape(self, shape: Sequence[int], stay: int) -> tuple[int, ...]:
        made = list(shape)
        made[self.dimension] = stay * sum(size for _, size in self.segments)
        return tuple(made)


@dataclass(frozen=True)
class Widths:
    """What config.json says of one kind: how many each block has (``count``), and of heads how many query
    heads read each KV head (``queries``), of experts how many a token visits (``active``), and into how many
    groups the router sorts them and takes of them (0: none)."""

    kind: Kind
    count: int
    queries: int = 0
    active: int = 0
    groups: int = 0
    top_groups: int = 0


def widths(checkpoint: Checkpoint, kind: Kind) -> Widths:
    """
    Raises:
        CheckpointError: the model has none, or they cannot be cut in its family.
    """
    config = checkpoint.config
    called, key = CALLED[kind]
    count = whole_number(stated(config, key))
    if kind == "heads":
        heads = heads_of(config)
        if stated(config, "kv_lora_rank") is not None:
            raise CheckpointError(
                f"{checkpoint.path}: its attention is latent (MLA): it has no KV heads to cut"
            )
        if heads is None or heads.attention % heads.kv:
            raise CheckpointError(
                f"{checkpoint.path}: config.json does not say how many query heads read a KV head"
            )
        config = with_stated_heads(checkpoint).config
        kinds = {str(p) for p in (text_config(config).get("model_type"), config.get("model_type")) if p}
        if not kinds & HEAD_SIZE_STATED:
            raise CheckpointError(
                f"{checkpoint.path}: vLLM takes the size of a head of model type {sorted(kinds)[0]!r} from "
                "hidden_size and num_attention_heads, so heads cannot be cut: cut --intermediate-size, or "
                "leave blocks out"
            )
        return Widths(kind, heads.kv, heads.attention // heads.kv)
    if count is None:
        raise CheckpointError(f"{checkpoint.path}: config.json states no number of {called} to cut ({key})")
    if kind == "channels":
        return Widths(kind, count)
    groups, top = (whole_number(stated(config, k)) or 0 for k in (_GROUPS, _TOP_GROUPS))
    return Widths(
        kind,
        count,
        active=whole_number(stated(config, "active")) or 1,
        groups=groups if groups > 1 else 0,
        top_groups=top,
    )


def cuts(checkpoint: Checkpoint, index: int, found: Widths) -> dict[str, Taken]:
    """The tensors of block ``index`` that have a place for each unit, and where; those of experts that have
    tensors of their own are not among them. Empty of a block without any."""
    decoder = decoder_list(checkpoint.tensors.values(), checkpoint.config)
    hidden = whole_number(stated(checkpoint.config, "hidden_size")) or 0
    own = {
        name: info
        for name, info in checkpoint.tensors.items()
        if block_list(name) == decoder and block_of(name) == index
    }
    made: dict[str, Taken] = {}
    for name, info in own.items():
        taken = _CUT[found.kind](checkpoint, name, info, found, hidden)
        if taken is not None:
            made[name] = taken
    if found.kind == "channels" and not any(t.dimension == 1 for t in made.values()):
        return {}  # a projection that only happens to be as wide
    if found.kind == "experts" and not any(role_of(n) == "experts" for n in own):
        return {}
    return made


def _expert_cut(
    checkpoint: Checkpoint, name: str, info: TensorInfo, found: Widths, hidden: int
) -> Taken | None:
    if EXPERT.search(name):
        return None
    if fused_experts(name, info.shape, expert_layout(checkpoint.config)) is not None:
        return Taken(0, ((0, 1),)) if info.shape[0] == found.count else None
    role = role_of(name)
    if role not in ("router", "experts") or "shared_expert" in name or found.count not in info.shape:
        return None
    return Taken(info.shape.index(found.count), ((0, 1),))


def _channel_cut(
    checkpoint: Checkpoint, name: str, info: TensorInfo, found: Widths, hidden: int
) -> Taken | None:
    if role_of(name) != "mlp":
        return None
    wide = found.count
    if info.shape == (hidden, wide) and name.rpartition(".")[0].endswith(
        ("down_proj", "fc2", "c_proj", "w2")
    ):
        return Taken(1, ((0, 1),))
    if info.shape in ((wide, hidden), (wide,)):
        return Taken(0, ((0, 1),))
    if info.shape in ((2 * wide, hidden), (2 * wide,)):  # gate and up, one behind the other
        return Taken(0, ((0, 1), (wide, 1)))
    return None


def _head_cut(
    checkpoint: Checkpoint, name: str, info: TensorInfo, found: Widths, hidden: int
) -> Taken | None:
    module, _, last = name.rpartition(".")
    called, heads = module.rpartition(".")[2], found.count * found.queries
    if not _ATTENTION.search(name):
        return None
    if last == "sinks":
        return Taken(0, ((0, found.queries),))
    rows = info.shape[0]
    if called == "qkv_proj":
        size = rows // (heads + 2 * found.count)
        keys = heads * size
        return Taken(0, ((0, found.queries * size), (keys, size), (keys + found.count * size, size)))
    if called.endswith("_norm") and info.shape == (head_size(checkpoint.config),):
        return None  # the same for each head
    if called in _QUERIES:
        return Taken(0, ((0, found.queries * (rows // heads)),))
    if called in _KEYS:
        return Taken(0, ((0, rows // found.count),))
    if called in _OUTPUTS and len(info.shape) == 2:
        return Taken(1, ((0, found.queries * (info.shape[1] // heads)),))
    return None


_CUT: Mapping[Kind, Callable[[Checkpoint, str, TensorInfo, Widths, int], Taken | None]] = {
    "experts": _expert_cut,
    "channels": _channel_cut,
    "heads": _head_cut,
}


def narrowed(
    checkpoint: Checkpoint,
    found: Widths,
    stay: int,
    kept: Callable[[int], torch.Tensor],
    changed: Callable[[str], torch.Tensor | None] = lambda name: None,
) -> Checkpoint:
    """The checkpoint with ``stay`` units of each block, its values computed when they are read, in the dtype
    that each tensor is stored in. Heads that predict further tokens (MTP) are left out: nothing measures what
    they need. A Qwen2 with fewer heads is a Llama (:mod:`quant.models.restating`).

    Args:
        kept: int64 [stay], rising, the units of a block that stay; asked when a value is read.
        changed: new values of a tensor, in its dtype and narrower shape; None: what is left of the old ones.

    Raises:
        CheckpointError: no block has such units, or a block's cannot be told from its tensors.
    """
    if found.kind == "heads":
        checkpoint = with_stated_heads(checkpoint)
    count = block_count(checkpoint.config)
    assert count is not None
    decoder = decoder_list(checkpoint.tensors.values(), checkpoint.config)
    tensors: dict[str, TensorInfo] = {}
    computed: dict[str, Callable[[], torch.Tensor]] = {}
    parts: dict[str, Callable[[int], torch.Tensor]] = {}
    taken = {name: (i, t) for i in range(count) for name, t in cuts(checkpoint, i, found).items()}
    if not taken:
        raise CheckpointError(
            f"{checkpoint.path}: no block has {found.count} {CALLED[found.kind][0]} in tensors of a known "
            "layout"
        )
    for name, info in checkpoint.tensors.items():
        if role_of(name, count, decoder) == "mtp":
            continue
        if (place := taken.get(name)) is not None:
            index, cut = place
            tensors[name] = _sized(info, cut.shape(info.shape, stay))
            computed[name] = partial(_cut_value, checkpoint, name, cut, partial(kept, index), changed)
            if cut.dimension == 0 and found.kind == "experts":
                parts[name] = partial(_cut_part, checkpoint, name, partial(kept, index))
            continue
        match = EXPERT.search(name) if found.kind == "experts" and block_list(name) == decoder else None
        if match is not None:
            if int(match[1]) >= stay:
                continue
            tensors[name] = info
            block = block_of(name)
            assert block is not None
            computed[name] = partial(_expert_value, checkpoint, name, match, partial(kept, block))
            continue
        tensors[name] = info
        if name in checkpoint.computed:
            computed[name] = checkpoint.computed[name]
        if name in checkpoint.computed_parts:
            parts[name] = checkpoint.computed_parts[name]
    return replace(
        checkpoint,
        config=narrowed_config(checkpoint.config, found, stay),
        tensors=tensors,
        computed=computed,
        computed_parts=parts,
    )


def again_narrowed(source: Checkpoint, said: Mapping[str, Any]) -> Checkpoint:
    """A source with what a report says was kept of each block: the ``kind``, how many stay ``after``, and
    ``kept`` by block; the source as it is where that cannot be read."""
    try:
        found, stay = widths(source, said["kind"]), int(said["after"])
        kept = {int(block): numbers(line) for block, line in said["kept"].items()}
        if any(len(k) != stay or k[-1] >= found.count for k in kept.values()):
            return source
        return narrowed(source, found, stay, lambda block: _tensor(kept.get(block, range(stay))))
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return source


def _tensor(numbers: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.tensor(list(numbers))


def _sized(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    size = info.nbytes // max(1, prod(info.shape)) * prod(shape)
    return replace(info, shape=shape, end=info.start + size)


def _cut_value(
    checkpoint: Checkpoint,
    name: str,
    cut: Taken,
    kept: Callable[[], torch.Tensor],
    changed: Callable[[str], torch.Tensor | None],
) -> torch.Tensor:
    value = changed(name)
    return checkpoint.read(name).index_select(cut.dimension, cut.places(kept())) if value is None else value


def _cut_part(checkpoint: Checkpoint, name: str, kept: Callable[[], torch.Tensor], part: int) -> torch.Tensor:
    return checkpoint.read_index(name, int(kept()[part]))


def _expert_value(
    checkpoint: Checkpoint, name: str, match: re.Match[str], kept: Callable[[], torch.Tensor]
) -> torch.Tensor:
    place = slice(match.start(1), match.end(1))
    return checkpoint.read(f"{name[: place.start]}{int(kept()[int(match[1])])}{name[place.stop :]}")


def narrowed_config(config: Mapping[str, Any], found: Widths, stay: int) -> dict[str, Any]:
    """A config.json for ``stay`` units of each block; the size of a head is stated, because it no longer
    follows from the number of heads."""
    text, keys = text_config(config), KEYS[CALLED[found.kind][1]]

    def change(part: Mapping[str, Any]) -> dict[str, Any]:
        made = {k: stay if k in keys and v == found.count else v for k, v in part.items()}
        made |= {k: 0 for k in DRAFTING if whole_number(part.get(k))}
        if found.kind == "heads" and part is text:
            for key in KEYS["num_attention_heads"]:
                if key in made:
                    made[key] = stay * found.queries
            made["head_dim"] = head_size(config)
            if not any(k in made for k in keys):
                made[keys[0]] = stay
        return made

    if text is config:
        return change(text)
    return change({k: change(v) if v is text else v for k, v in config.items()})
