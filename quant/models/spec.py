"""A model as the planner sees it: every weight, what each layer keeps in the KV cache, and the sums of both.

The values alone; :mod:`quant.models.shapes` lists them from a config.json or from a file's header. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

from quant.models.roles import Role, kind_of
from quant.vllm.config import Heads, source_method
from quant.vllm.layers import Split, split_of

#: bytes of one stored value, by the names that config.json and safetensors use
DTYPE_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4,
    "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F4": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """One tensor, or ``count`` equal ones (experts).

    ``linear`` marks the linears of decoder blocks that weight quantization touches. ``layer`` is -1 outside
    the blocks, ``stored_bytes`` the bytes in the file where the tensor was read from one (0: only known from
    its shape; ``name`` is then relative to the block).
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    linear: bool = False
    layer: int = -1
    count: int = 1
    stored_bytes: int = 0
    stored_dtype: str = ""

    @cached_property
    def parameters(self) -> int:
        return prod(self.shape) * self.count

    @property
    def tensor(self) -> str:
        """The name of its tensor in a file: its own where it was read from one, else the usual one."""
        if self.stored_bytes:
            return self.name
        suffix = "" if self.name.endswith((".weight", ".bias")) else ".weight"
        return f"{'' if self.layer < 0 else f'model.layers.{self.layer}.'}{self.name}{suffix}"

    @cached_property
    def split(self) -> Split:
        """How tensor parallelism cuts it; a row's bias and what is no part of the text decoder is copied."""
        split = "none" if self.role in ("tower", "mtp") else split_of(self.name)
        return "none" if split == "row" and len(self.shape) < 2 else split


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps for every token, or for every request.

    ``kind``: ``full``, ``sliding`` (``window`` tokens), ``chunked`` (``window`` tokens), ``mla`` (one latent
    of ``key_dim`` values for all heads) or ``state`` (``state_bytes`` a request, whatever its length).
    ``owner`` is False for a layer that reads another layer's cache.
    """

    layer: int
    kind: Literal["full", "sliding", "chunked", "mla", "state"]
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    #: values kept by a state layer, as (count, bytes each; 0 = the KV cache's own dtype, divided by tensor
    #: parallelism)
    state: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Moe:
    """Routed experts: how many, how many a token visits, and the inner width of one."""

    experts: int
    active: int
    intermediate: int


@dataclass(frozen=True)
class ModelSpec:
    """A model as the planner sees it. Counts are of parameters, sizes of bytes, lengths of tokens."""

    name: str
    family: str
    #: of the text decoder as config.json states it, of the whole where it states none
    model_type: str
    architecture: str
    dtype: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    max_context: int
    tied: bool
    layers: int
    weights: tuple[Weight, ...]
    cache: tuple[CacheLayer, ...]
    moe: Moe | None = None
    vision: bool = False
    quantization: Mapping[str, Any] | None = None
    rotary_bytes: int = 0
    source: str = ""
    #: where ``weights`` are a quantized file's tensors: the shapes that its linears have unpacked
    unpacked: tuple[Weight, ...] = ()
    #: the vision tower's shape: hidden, inner, projections (3 gated, 2 plain), patches per token, tokens of
    #: the largest image, whether the decoder reads it by cross attention, images' worth of the longest video
    vision_shape: Mapping[str, int] = field(default_factory=dict)
    #: the name on the hub, where the catalogue knows it
    hub: str = ""
    notes: tuple[str, ...] = ()
    #: relative uncertainty of the sizes: 0 where they come from shapes or files
    uncertainty: float = 0.0
    latent: Mapping[str, int] = field(default_factory=dict)
    #: what config.json says of the layers that is not understood; empty where nothing is
    unknown_layers: str = ""
    #: heads of recurrent layers, as :class:`quant.vllm.config.Heads` counts them
    state_heads: tuple[int, ...] = ()
    #: why vLLM does not load the checkpoint as it is; empty where its tensors say nothing of the kind
    unserved: str = ""
    #: config.json itself
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def shared_heads(self) -> Heads:
        """The heads that tensor parallelism shares out whole."""
        return Heads(self.heads, self.kv_heads, self.state_heads)

    @cached_property
    def linear_kinds(self) -> tuple[Weight, ...]:
        """The linears of one decoder block of each kind, of experts one, unpacked where a file has them
        packed: whatever is asked of shapes is asked of these."""
        blocks: dict[int, dict[tuple[str, tuple[int, ...]], Weight]] = {}
        for weight in self.unpacked or self.weights:
            if weight.linear and len(weight.shape) == 2:
                key = (kind_of(weight.name), weight.shape)
                blocks.setdefault(weight.layer, {}).setdefault(key, weight)
        kinds: dict[frozenset[tuple[str, tuple[int, ...]]], dict[tuple[str, tuple[int, ...]], Weight]] = {}
        for block in blocks.values():
            kinds.setdefault(frozenset(block), block)
        return tuple(weight for block in kinds.values() for weight in block.values())

    @property
    def selects(self) -> bool:
        """Whether attention selects the tokens that it reads by an indexer (DeepSeek V3.2)."""
        return any("self_attn.indexer." in w.name for w in self.weights)

    @property
    def parameters(self) -> int:
        """All parameters, drafting (MTP) layers excepted; a tied head counts once."""
        return sum(w.parameters for w in self.weights if w.role != "mtp")

    @property
    def active_parameters(self) -> int:
        """Parameters that one token's forward pass reads: the active experts' share of the routed ones, and
        no embedding table."""
        total = 0.0
        for weight in self.weights:
            if weight.role in ("mtp", "tower") or (weight.role == "embedding" and not self.tied):
                continue
            share = self.moe.active / self.moe.experts if self.moe and weight.role == "experts" else 1.0
            total += weight.parameters * share
        return int(total)

    @property
    def by_role(self) -> dict[str, int]:
        """Parameters by role, in the order in which a file lists them."""
        roles: dict[str, int] = {}
        for weight in self.weights:
            roles[weight.role] = roles.get(weight.role, 0) + weight.parameters
        return roles

    def to_dict(self) -> dict[str, Any]:
        kinds: dict[str, int] = {}
        for entry in self.cache:
            kinds[entry.kind] = kinds.get(entry.kind, 0) + 1
        return {
            "name": self.name, "family": self.family, "architecture": self.architecture, "dtype": self.dtype,
            "layers": self.layers,
            "hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate": self.intermediate, "vocabulary": self.vocabulary, "max_context": self.max_context,
            "tied": self.tied,
            "parameters": self.parameters, "active_parameters": self.active_parameters,
            "parameters_by_role": self.by_role,
            "cache_layers": kinds, "experts": self.moe.experts if self.moe else 0, "vision": self.vision,
            "quantization": source_method(self.quantization), "source": self.source,
            "uncertainty": self.uncertainty,
            "notes": list(self.notes),
        }  # fmt: skip
