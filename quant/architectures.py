"""What a config.json says of a model: the shape of every weight and what each layer keeps in the KV cache.

Nothing is loaded and torch is not imported. A family (``model_type``) is a row of :data:`FAMILIES`: the facts
that its config.json leaves unsaid, such as whether the projections have biases and how many norms a block
has. The shapes themselves are always computed, so any size of a known family is exact, and an unknown family
falls back to the Llama layout with a note that says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

from quant.errors import UsageError
from quant.models.roles import Role, block_of, no_linear, role_of
from quant.vllm.config import Heads, config_dtype, heads_of, quantization_config, source_method, text_config
from quant.vllm.layers import Split, split_of

#: bytes of one stored value, by the names that config.json and safetensors use
DTYPE_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4,
    "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F4": 0.5,
}  # fmt: skip

_NUMBER = re.compile(r"\.\d+(?=\.)")
#: A dimension beyond this is a typing error in the config, not a model.
LARGEST_DIMENSION = 2**31


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

    @property
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
    #: the largest image
    vision_shape: Mapping[str, int] = field(default_factory=dict)
    #: the name on the hub, where the catalogue knows it
    hub: str = ""
    notes: tuple[str, ...] = ()
    #: relative uncertainty of the sizes: 0 where they come from shapes or files
    uncertainty: float = 0.0
    latent: Mapping[str, int] = field(default_factory=dict)
    #: heads of recurrent layers, as :class:`quant.vllm.config.Heads` counts them
    state_heads: tuple[int, ...] = ()

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
                key = (_NUMBER.sub(".", weight.name), weight.shape)
                blocks.setdefault(weight.layer, {}).setdefault(key, weight)
        kinds: dict[frozenset[tuple[str, tuple[int, ...]]], dict[tuple[str, tuple[int, ...]], Weight]] = {}
        for block in blocks.values():
            kinds.setdefault(frozenset(block), block)
        return tuple(weight for block in kinds.values() for weight in block.values())

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


@dataclass(frozen=True)
class Family:
    """Facts of a ``model_type`` that its config.json leaves unsaid. The defaults are Llama's."""

    mlp: Literal["gated", "plain"] = "gated"
    norm: Literal["rms", "layer"] = "rms"
    norms: int = 2
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    tied: bool = False
    head_bias: bool = False
    positions: int | None = None  # learned positions: extra rows beyond max_position_embeddings
    embedding_norm: bool = False
    # every n-th layer is full attention, the others slide; 0: sliding_window applies to all or none
    window_pattern: int = 0
    windowed: bool = False  # sliding_window is in force when it is set
    wide_query: bool = False  # the query projection also makes an output gate
    scale_only: bool = False  # layer norms without a bias


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(windowed=True),
    "ministral": Family(windowed=True),
    "mixtral": Family(windowed=True),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True),
    "qwen2_5_vl_text": Family(qkv_bias=True),
    "qwen2_vl_text": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head"),
    "qwen3_vl_text": Family(qk_norm="head"),
    "qwen3_vl_moe_text": Family(qk_norm="head"),
    "qwen3_next": Family(qk_norm="head", wide_query=True),
    "qwen3_5_text": Family(qk_norm="head", wide_query=True),
    "qwen3_5_moe_text": Family(qk_norm="head", wide_query=True),
    "gemma": Family(tied=True),
    "gemma2": Family(norms=4, tied=True, window_pattern=2, windowed=True),
    "gemma3_text": Family(norms=4, tied=True, qk_norm="head", window_pattern=6, windowed=True),
    "gemma4_text": Family(norms=4, tied=True, qk_norm="head", windowed=True),
    "phi": Family(
        mlp="plain", norm="layer", norms=1, qkv_bias=True, output_bias=True, mlp_bias=True, head_bias=True
    ),
    "phi3": Family(windowed=True),
    "phimoe": Family(norm="layer", qkv_bias=True, output_bias=True, windowed=True),
    "granite": Family(),
    "olmo2": Family(qk_norm="width"),
    "olmo3": Family(qk_norm="width", window_pattern=4, windowed=True),
    "cohere": Family(norm="layer", norms=1, tied=True, scale_only=True),
    "starcoder2": Family(
        mlp="plain", norm="layer", qkv_bias=True, output_bias=True, mlp_bias=True, tied=True, windowed=True
    ),
    "internlm2": Family(),
    "deepseek": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "deepseek_v32": Family(),
    "kimi_k2": Family(),
    "kimi_linear": Family(),
    "gpt_oss": Family(qkv_bias=True, output_bias=True, windowed=True, window_pattern=2),
    "gpt_neox": Family(mlp="plain", norm="layer", qkv_bias=True, output_bias=True, mlp_bias=True),
    "gpt2": Family(
        mlp="plain", norm="layer", qkv_bias=True, output_bias=True, mlp_bias=True, tied=True, positions=0
    ),
    "gptj": Family(mlp="plain", norm="layer", norms=1, mlp_bias=True, head_bias=True),
    "opt": Family(
        mlp="plain", norm="layer", qkv_bias=True, output_bias=True, mlp_bias=True, tied=True, positions=2
    ),
    "falcon": Family(mlp="plain", norm="layer", norms=1, tied=True),
    "mpt": Family(mlp="plain", norm="layer", tied=True, scale_only=True),
    "llama4_text": Family(),
    "mllama_text_model": Family(),
    "minimax_m2": Family(qk_norm="width"),
    "nemotron_h": Family(mlp="plain", norms=1),
}

#: multimodal wrappers whose text part has no model_type of its own → the family of that part
WRAPPERS = {
    "qwen2_5_vl": "qwen2_5_vl_text", "qwen2_vl": "qwen2_vl_text", "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text", "mllama": "mllama_text_model", "mistral3": "mistral", "llava": "llama",
    "kimi_k25": "kimi_k2",
    "qwen2_5_omni": "qwen2", "qwen2_5_omni_thinker": "qwen2", "kimi_vl": "deepseek_v3", "internvl": "qwen3",
    "llava_next": "llama",
    "idefics3": "llama",
}  # fmt: skip

#: other spellings of the same key, first match wins
ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "max_position_embeddings": (
        "max_position_embeddings",
        "n_positions",
        "model_max_length",
        "max_seq_len",
        "seq_length",
        "n_ctx",
    ),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "active": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "top_k_experts",
        "moe_topk",
    ),
}


class Config:
    """A config.json whose text part is found and whose numbers are checked when they are read."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where
        text = self.text = text_config(raw)
        self.model_type = str(text.get("model_type") or raw.get("model_type") or "")
        self.family = WRAPPERS.get(self.model_type, self.model_type)

    def get(self, key: str, default: Any = None) -> Any:
        for name in ALIASES.get(key, (key,)):
            for part in (self.text, self.raw):
                if part.get(name) is not None:
                    return part[name]
        return default

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises:
            UsageError: the key is missing and has no default, or its value is not a possible size.
        """
        value = self.get(key, default)
        if value is None:
            names = " or ".join(ALIASES.get(key, (key,)))
            raise UsageError(f"{self.where} lacks {names}: it is needed to plan; give a complete config.json")
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or value != int(value)
            or not 0 < value < LARGEST_DIMENSION
        ):
            raise UsageError(f"{self.where}: {key} is {value!r}: must be a whole number from 1 to 2^31")
        return int(value)


def spec_from_config(
    raw: Mapping[str, Any], name: str = "model", where: str = "config.json", source: str = ""
) -> ModelSpec:
    """The model that a config.json describes.

    Raises:
        UsageError: a needed key is missing or absurd; the message names the key and its value.
    """
    config = Config(raw, where)
    known = config.family in FAMILIES
    family = FAMILIES.get(config.family, Family())
    notes: list[str] = []
    if not known:
        notes.append(f"model_type {config.family or '(none)'} is not known: planned with the Llama layout")
    builder = _Builder(config, family)
    weights = tuple(builder.weights())
    heads = config.count("num_attention_heads")
    experts = builder.moe()
    architectures = raw.get("architectures") or config.text.get("architectures") or [""]
    dtype = config_dtype(raw) or ""
    if dtype not in DTYPE_BYTES:
        notes.append(f"config.json names no dtype ({dtype or 'absent'}): bfloat16 is assumed")
        dtype = "bfloat16"
    quantization = quantization_config(raw)
    return ModelSpec(
        name=name, family=config.family or "unknown", model_type=config.model_type,
        architecture=str(architectures[0]), dtype=dtype,
        hidden=builder.hidden, heads=heads,
        kv_heads=builder.kv_heads, head_dim=builder.head_dim, intermediate=builder.intermediate,
        vocabulary=builder.vocabulary,
        max_context=config.count("max_position_embeddings", 2048), tied=builder.tied, layers=builder.layers,
        weights=weights,
        cache=tuple(builder.cache()), moe=experts, vision=any(w.role == "tower" for w in weights),
        quantization=quantization,
        rotary_bytes=builder.rotary_bytes(dtype),
        vision_shape=_vision_shape(raw), source=source or where, notes=tuple([*notes, *builder.notes]),
        uncertainty=0.0 if known else 0.1, latent=builder.latent,
        state_heads=builder.state_heads,
    )  # fmt: skip


class _Builder:
    """Lists the weights and cache entries of one config, layer by layer."""

    def __init__(self, config: Config, family: Family):
        self.config, self.family = config, family
        get, count = config.get, config.count
        self.notes: list[str] = []
        self.hidden = count("hidden_size")
        self.layers = count("num_hidden_layers")
        self.heads = count("num_attention_heads")
        self.kv_heads = count("num_key_value_heads", self.heads)
        stated_heads = heads_of(config.raw)
        assert stated_heads is not None
        self.kv_heads, self.state_heads = stated_heads.kv, stated_heads.state
        if get("head_dim") is None and self.hidden % self.heads:
            raise UsageError(
                f"{config.where}: hidden_size {self.hidden} is not a multiple of num_attention_heads "
                f"{self.heads} and there is no head_dim"
            )
        self.head_dim = count("head_dim", max(self.hidden // self.heads, 1))
        if self.heads % self.kv_heads:
            raise UsageError(
                f"{config.where}: {self.heads} attention heads are not a multiple of {self.kv_heads} KV heads"
            )
        widths = {"gpt2": 4, "gptj": 4, "falcon": 4, "mpt": get("expansion_ratio", 4)}
        default = int(widths[config.family] * self.hidden) if config.family in widths else None
        if default is None and get("intermediate_size") is None and get("moe_intermediate_size") is not None:
            default = count("moe_intermediate_size")
        self.intermediate = count("intermediate_size", default)
        self.vocabulary = count("vocab_size")
        tied = get("tie_word_embeddings")
        if tied is None and config.family == "qwen2_5_vl_text":
            tied = False
        self.tied = family.tied if tied is None else bool(tied)
        self.latent = {
            k: int(get(k))
            for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
            if get(k)
        }

    # -- facts of single layers ------------------------------------------------------------------------------

    def moe(self) -> Moe | None:
        get, count = self.config.get, self.config.count
        if not get("experts") or get("enable_moe_block") is False:
            return None
        inner = count("moe_intermediate_size", self.intermediate)
        return Moe(count("experts"), min(count("active", 2), count("experts")), inner)

    def layer_types(self) -> list[str]:
        """The kind of every layer's attention, in transformers' words, plus ``mla`` and what nemotron's
        pattern letters mean."""
        get, n = self.config.get, self.layers
        family = self.config.family
        if pattern := get("hybrid_override_pattern"):
            words = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}
            return [words.get(letter, "mlp") for letter in str(pattern)]
        if family == "kimi_linear":
            full = set((get("linear_attn_config") or {}).get("full_attn_layers", []))
            return ["mla" if i + 1 in full else "kda" for i in range(n)]
        if "kv_lora_rank" in self.latent:
            return ["mla"] * n
        types = get("layer_types")
        if isinstance(types, list) and len(types) == n:
            return [str(t) for t in types]
        if interval := get("full_attention_interval"):
            return [
                "full_attention" if (i + 1) % int(interval) == 0 else "linear_attention" for i in range(n)
            ]
        if crossing := get("cross_attention_layers"):
            return ["cross_attention" if i in crossing else "full_attention" for i in range(n)]
        if family == "llama4_text" and get("attention_chunk_size"):
            nope = get("no_rope_layers") or [0 if (i + 1) % 4 == 0 else 1 for i in range(n)]
            return ["chunked_attention" if nope[i] else "full_attention" for i in range(n)]
        window = get("sliding_window")
        if not window or not self.family.windowed:
            # Qwen2: only above max_window_layers, and only when switched on
            if window and get("use_sliding_window"):
                first = int(get("max_window_layers", n))
                return ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
            return ["full_attention"] * n
        period = int(get("sliding_window_pattern") or self.family.window_pattern or 0)
        if not period:
            return ["sliding_attention"] * n
        if family == "gpt_oss":
            return ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(n)]
        return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(n)]

    def heads_of(self, kind: str) -> tuple[int, int, bool]:
        """KV heads, head size and whether keys double as values, for a layer of that kind (Gemma 4 differs by
        kind)."""
        get = self.config.get
        if self.config.family == "gemma4_text" and kind == "full_attention":
            shared = bool(get("attention_k_eq_v"))
            kv = int(get("num_global_key_value_heads") or self.kv_heads) if shared else self.kv_heads
            return kv, int(get("global_head_dim") or self.head_dim), shared
        return self.kv_heads, self.head_dim, False

    def shares_cache(self, layer: int) -> bool:
        """Gemma 3n and 4: the last layers read the cache of an earlier one and have no key and value
        projections."""
        return layer >= self.layers - int(self.config.get("num_kv_shared_layers") or 0)

    def is_moe(self, layer: int) -> bool:
        get = self.config.get
        if self.moe() is None or self.config.family == "gemma4_text":
            return False
        if layer in (get("mlp_only_layers") or []):
            return False
        if layer < int(get("first_k_dense_replace") or 0):
            return False
        if (frequency := get("moe_layer_freq")) and isinstance(frequency, int) and layer % frequency:
            return False
        if step := get("interleave_moe_layer_step"):
            return (layer + 1) % int(step) == 0
        return (layer + 1) % int(get("decoder_sparse_step") or 1) == 0

    # -- weights ---------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[Weight]:
        f, h, v = self.family, self.hidden, self.vocabulary
        width = int(self.config.get("word_embed_proj_dim") or h)
        yield Weight("embed_tokens", "embedding", (v, width))
        if f.positions is not None:
            yield Weight(
                "embed_positions",
                "embedding",
                (self.config.count("max_position_embeddings") + f.positions, h),
            )
        if width != h:
            yield Weight("project_in", "other", (h, width))
            yield Weight("project_out", "other", (width, h))
        for layer, kind in enumerate(self.layer_types()):
            yield from (replace(w, layer=layer) for w in self._block(layer, kind))
        if self.config.get("do_layer_norm_before", True):
            yield from self._norm("norm", h)
        if not self.tied:
            yield Weight("lm_head", "head", (v, width))
        if self.config.get("lm_head_bias", f.head_bias):
            yield Weight("lm_head.bias", "head", (v,))
        if per_layer := int(self.config.get("hidden_size_per_layer_input") or 0):
            rows = int(self.config.get("vocab_size_per_layer_input") or v)
            yield Weight("embed_tokens_per_layer", "embedding", (rows, self.layers * per_layer))
            yield Weight("per_layer_model_projection", "other", (self.layers * per_layer, h))
            yield Weight("per_layer_projection_norm", "norm", (per_layer,))
        yield from self._mtp()
        yield from vision_weights(self.config.raw, h, self.notes)

    def _norm(self, name: str, width: int, role: Role = "norm") -> Iterator[Weight]:
        yield Weight(f"{name}.weight", role, (width,))
        if self.family.norm == "layer" and not self.family.scale_only:
            yield Weight(f"{name}.bias", role, (width,))

    def _block(self, layer: int, kind: str) -> Iterator[Weight]:
        h = self.hidden
        norms = (
            2
            if self.config.get("new_decoder_architecture")
            and self.config.get("num_ln_in_parallel_attn", 2) == 2
            else self.family.norms
        )
        for i in range(norms):
            yield from self._norm(f"norm{i}", h)
        if kind == "mla":
            yield from self._mla()
        elif kind == "linear_attention":
            yield from self._gated_delta()
        elif kind == "kda":
            yield from self._kda()
        elif kind == "mamba":
            yield from self._mamba2()
        elif kind == "cross_attention":
            yield from self._attention(kind, layer)
            yield Weight("cross_attn.q_norm", "norm", (self.head_dim,))
            yield Weight("cross_attn.k_norm", "norm", (self.head_dim,))
            yield Weight("cross_attn_gates", "other", (2,))
        elif kind not in ("mlp", "moe"):
            yield from self._attention(kind, layer)
        if self.config.family == "nemotron_h" and kind not in ("mlp", "moe"):
            return
        if (kind == "moe") or (kind != "mlp" and self.is_moe(layer)):
            yield from self._experts()
        else:
            yield from self._mlp(layer)
        if self.config.family == "gemma4_text":
            yield from self._gemma4_extras()

    def _linear(
        self, name: str, rows: int, columns: int, bias: bool = False, role: Role = "attention"
    ) -> Iterator[Weight]:
        yield Weight(name, role, (rows, columns), linear=True)
        if bias:
            yield Weight(f"{name}.bias", role, (rows,))

    def _attention(self, kind: str, layer: int) -> Iterator[Weight]:
        f, h, get = self.family, self.hidden, self.config.get
        kv_heads, dim, values_are_keys = self.heads_of(kind)
        declared = get("attention_bias", get("use_bias", get("bias")))
        if self.config.family == "gpt_oss" or declared is None or not isinstance(declared, bool):
            qkv_bias, out_bias = f.qkv_bias, f.output_bias
        else:
            qkv_bias, out_bias = declared, declared and self.config.family != "qwen2_moe"
        if self.config.family.startswith("qwen2"):
            qkv_bias, out_bias = bool(get("qkv_bias", True)), False
        if self.config.family == "gptj":
            qkv_bias = out_bias = False
        if self.config.family == "mpt":
            qkv_bias = out_bias = not get("no_bias", True)
        query = self.heads * dim * (2 if f.wide_query else 1)
        yield from self._linear("self_attn.q_proj", query, h, qkv_bias)
        if not self.shares_cache(layer):
            yield from self._linear("self_attn.k_proj", kv_heads * dim, h, qkv_bias)
            if not values_are_keys:
                yield from self._linear("self_attn.v_proj", kv_heads * dim, h, qkv_bias)
        yield from self._linear("self_attn.o_proj", h, self.heads * dim, out_bias)
        use_norm = get("use_qk_norm")
        if f.qk_norm == "width" or (f.qk_norm == "head" and use_norm is not False):
            wide = f.qk_norm == "width"
            yield Weight("self_attn.q_norm", "norm", (self.heads * dim if wide else dim,))
            if not self.shares_cache(layer):
                yield Weight("self_attn.k_norm", "norm", (kv_heads * dim if wide else dim,))
        elif self.config.family == "cohere" and use_norm:
            yield Weight("self_attn.q_norm", "norm", (self.heads, dim))
            yield Weight("self_attn.k_norm", "norm", (kv_heads, dim))
        if self.config.family == "gpt_oss":
            yield Weight("self_attn.sinks", "attention", (self.heads,))

    def _mla(self) -> Iterator[Weight]:
        get, h = self.config.get, self.hidden
        rank, rope, nope, value = (
            self.latent.get(k, 0)
            for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        )
        missing = [
            k
            for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
            if k not in self.latent
        ]
        if missing:
            raise UsageError(
                f"{self.config.where} lacks {', '.join(missing)}: latent attention needs them to plan"
            )
        bias = bool(get("attention_bias", False))
        if query_rank := get("q_lora_rank"):
            yield from self._linear("self_attn.q_a_proj", int(query_rank), h, bias)
            yield Weight("self_attn.q_a_layernorm", "norm", (int(query_rank),))
            yield from self._linear("self_attn.q_b_proj", self.heads * (nope + rope), int(query_rank))
        else:
            yield from self._linear("self_attn.q_proj", self.heads * (nope + rope), h)
        yield from self._linear("self_attn.kv_a_proj_with_mqa", rank + rope, h, bias)
        yield Weight("self_attn.kv_a_layernorm", "norm", (rank,))
        yield from self._linear("self_attn.kv_b_proj", self.heads * (nope + value), rank)
        yield from self._linear("self_attn.o_proj", h, self.heads * value, bias)
        # DeepSeek V3.2: the selector of sparse attention, kept whole on every rank
        if index := get("index_n_heads"):
            dim = self.config.count("index_head_dim")
            yield from self._linear("self_attn.indexer.wq_b", int(index) * dim, int(query_rank or h))
            yield from self._linear("self_attn.indexer.wk", dim, h)
            yield Weight("self_attn.indexer.k_norm", "norm", (2, dim))
            yield Weight("self_attn.indexer.weights_proj", "attention", (int(index), h))

    def _gated_delta(self) -> Iterator[Weight]:
        count, h = self.config.count, self.hidden
        keys = count("linear_num_key_heads") * count("linear_key_head_dim")
        value_heads, value_dim = count("linear_num_value_heads"), count("linear_value_head_dim")
        values = value_heads * value_dim
        yield from self._linear("linear_attn.in_proj_qkvz", 2 * keys + 2 * values, h)
        yield from self._linear("linear_attn.in_proj_ba", 2 * value_heads, h)
        yield Weight(
            "linear_attn.conv1d", "attention", (2 * keys + values, 1, count("linear_conv_kernel_dim"))
        )
        yield Weight("linear_attn.dt_bias", "attention", (value_heads,))
        yield Weight("linear_attn.A_log", "attention", (value_heads,))
        yield Weight("linear_attn.norm", "norm", (value_dim,))
        yield from self._linear("linear_attn.out_proj", h, values)

    def _kda(self) -> Iterator[Weight]:
        linear, h = self.config.get("linear_attn_config") or {}, self.hidden
        heads, dim, kernel = (
            int(linear["num_heads"]),
            int(linear["head_dim"]),
            int(linear["short_conv_kernel_size"]),
        )
        width = heads * dim
        for name in "qkv":
            yield from self._linear(f"self_attn.{name}_proj", width, h)
            yield Weight(f"self_attn.{name}_conv1d", "attention", (width, 1, kernel))
        yield Weight("self_attn.A_log", "attention", (heads,))
        yield Weight("self_attn.dt_bias", "attention", (width,))
        yield from self._linear("self_attn.b_proj", heads, h)
        for name in "fg":
            yield from self._linear(f"self_attn.{name}_a_proj", dim, h)
            yield from self._linear(f"self_attn.{name}_b_proj", width, dim)
        yield Weight("self_attn.o_norm", "norm", (dim,))
        yield from self._linear("self_attn.o_proj", h, width)

    def _mamba2(self) -> Iterator[Weight]:
        count, h = self.config.count, self.hidden
        heads = count("mamba_num_heads")
        inner = heads * count("mamba_head_dim")
        groups = 2 * count("n_groups") * count("ssm_state_size")
        yield from self._linear("mixer.in_proj", 2 * inner + groups + heads, h)
        yield Weight("mixer.conv1d", "attention", (inner + groups, 1, count("conv_kernel")))
        yield Weight("mixer.conv1d.bias", "attention", (inner + groups,))
        for name in ("dt_bias", "A_log", "D"):
            yield Weight(f"mixer.{name}", "attention", (heads,))
        yield Weight("mixer.norm", "norm", (inner,))
        yield from self._linear("mixer.out_proj", h, inner)

    def _mlp(self, layer: int) -> Iterator[Weight]:
        f, h, get = self.family, self.hidden, self.config.get
        inner = int(get("intermediate_size_mlp") or self.intermediate)
        if get("use_double_wide_mlp") and self.shares_cache(layer):
            inner *= 2
        declared = get("mlp_bias", get("use_bias", get("bias")))
        bias = declared if isinstance(declared, bool) else f.mlp_bias
        if self.config.family == "mpt":
            bias = not get("no_bias", True)
        if self.config.family == "opt":
            bias = bool(get("enable_bias", True))
        if f.mlp == "gated":
            yield from self._linear("mlp.gate_proj", inner, h, bias, "mlp")
        yield from self._linear("mlp.up_proj", inner, h, bias, "mlp")
        yield from self._linear("mlp.down_proj", h, inner, bias, "mlp")

    def _experts(self) -> Iterator[Weight]:
        get, h = self.config.get, self.hidden
        experts = self.moe()
        assert experts is not None
        n, inner = experts.experts, experts.intermediate
        router_bias = self.config.family == "gpt_oss"
        yield Weight("mlp.router", "router", (n, h))
        if router_bias:
            yield Weight("mlp.router.bias", "router", (n,))
        if self.config.family in (
            "deepseek_v3",
            "deepseek_v32",
            "kimi_k2",
            "nemotron_h",
            "minimax_m2",
            "kimi_linear",
        ):
            yield Weight("mlp.e_score_correction_bias", "router", (n,))
        names = ("gate_proj", "up_proj") if self.family.mlp == "gated" else ("up_proj",)
        for name in names:
            yield Weight(f"mlp.experts.{name}", "experts", (inner, h), True, count=n)
        yield Weight("mlp.experts.down_proj", "experts", (h, inner), True, count=n)
        if router_bias:  # gpt-oss: its experts have biases too
            yield Weight("mlp.experts.gate_up_proj.bias", "experts", (2 * inner,), count=n)
            yield Weight("mlp.experts.down_proj.bias", "experts", (h,), count=n)
        shared = 0
        if self.config.family in ("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"):
            shared = inner * int(get("n_shared_experts") or 0)
        elif self.config.family == "kimi_linear":
            shared = inner * int(get("num_shared_experts") or 0)
        elif self.config.family == "nemotron_h":
            shared = int(get("moe_shared_expert_intermediate_size") or 0) * int(get("n_shared_experts") or 1)
        elif self.config.family == "llama4_text":
            shared = inner
        elif get("shared_expert_intermediate_size"):
            shared = int(get("shared_expert_intermediate_size"))
            yield Weight("mlp.shared_expert_gate", "router", (1, h))
        if shared:
            for name in names:
                yield from self._linear(f"mlp.shared_experts.{name}", shared, h, role="shared_experts")
            yield from self._linear("mlp.shared_experts.down_proj", h, shared, role="shared_experts")

    def _gemma4_extras(self) -> Iterator[Weight]:
        h = self.hidden
        yield Weight("layer_scalar", "other", (1,))
        if per_layer := int(self.config.get("hidden_size_per_layer_input") or 0):
            yield from self._linear("per_layer_input_gate", per_layer, h, role="other")
            yield from self._linear("per_layer_projection", h, per_layer, role="other")
            yield Weight("post_per_layer_input_norm", "norm", (h,))
        experts = self.moe()
        if experts:
            n, inner = experts.experts, experts.intermediate
            for i in range(3):
                yield Weight(f"moe_norm{i}", "norm", (h,))
            yield Weight("router.proj", "router", (n, h))
            yield Weight("router.scale", "router", (h,))
            yield Weight("router.per_expert_scale", "router", (n,))
            for name in ("gate_proj", "up_proj"):
                yield Weight(f"experts.{name}", "experts", (inner, h), True, count=n)
            yield Weight("experts.down_proj", "experts", (h, inner), True, count=n)

    def _mtp(self) -> Iterator[Weight]:
        """Drafting layers: in the file, but not in memory unless speculative decoding asks for them."""
        n = int(self.config.get("num_nextn_predict_layers") or 0)
        if not n or self.config.family not in ("deepseek_v3", "deepseek_v32"):
            return
        h = self.hidden
        for _ in range(n):
            for w in self._block(self.layers, "mla"):
                yield replace(w, role="mtp", linear=False)
            yield Weight("eh_proj", "mtp", (h, 2 * h))
            yield Weight("mtp_norms", "mtp", (3, h))
            yield Weight("mtp_embeddings", "mtp", (2 * self.vocabulary, h))

    # -- cache -----------------------------------------------------------------------------------------------

    def cache(self) -> Iterator[CacheLayer]:
        get = self.config.get
        for layer, kind in enumerate(self.layer_types()):
            if self.shares_cache(layer) or kind in ("mlp", "moe"):
                continue
            kv, dim, _ = self.heads_of(kind)
            if kind == "mla":
                yield CacheLayer(
                    layer, "mla", 1, self.latent["kv_lora_rank"] + self.latent["qk_rope_head_dim"]
                )
            elif kind == "sliding_attention":
                yield CacheLayer(layer, "sliding", kv, dim, dim, self.config.count("sliding_window"))
            elif kind == "chunked_attention":
                yield CacheLayer(layer, "chunked", kv, dim, dim, self.config.count("attention_chunk_size"))
            elif kind == "linear_attention":
                count = self.config.count
                keys = count("linear_num_key_heads") * count("linear_key_head_dim")
                values = count("linear_num_value_heads") * count("linear_value_head_dim")
                state = (
                    count("linear_num_value_heads")
                    * count("linear_key_head_dim")
                    * count("linear_value_head_dim")
                )
                yield CacheLayer(
                    layer,
                    "state",
                    state=(
                        ((2 * keys + values) * (count("linear_conv_kernel_dim") - 1), 0),
                        (state, self._state_bytes()),
                    ),
                )
            elif kind == "kda":
                linear = get("linear_attn_config") or {}
                width = int(linear["num_heads"]) * int(linear["head_dim"])
                conv = 3 * width * (int(linear["short_conv_kernel_size"]) - 1)
                yield CacheLayer(layer, "state", state=((conv, 0), (width * int(linear["head_dim"]), 4)))
            elif kind == "mamba":
                count = self.config.count
                inner = count("mamba_num_heads") * count("mamba_head_dim")
                conv = (inner + 2 * count("n_groups") * count("ssm_state_size")) * (count("conv_kernel") - 1)
                yield CacheLayer(
                    layer, "state", state=((conv, 0), (inner * count("ssm_state_size"), self._state_bytes()))
                )
            else:
                yield CacheLayer(layer, "full", kv, dim, dim)

    def _state_bytes(self) -> int:
        """Bytes of one value of a recurrent state: what the config says, else the cache's own dtype (0)."""
        named = self.config.get("mamba_ssm_dtype") or self.config.get("mamba_ssm_cache_dtype")
        return int(DTYPE_BYTES.get(str(named), 0))

    def rotary_bytes(self, dtype: str) -> int:
        """vLLM keeps one table of cosines and sines for every position, in the model's dtype, shared by all
        layers of one kind. Linear scaling stretches the table of the full-attention layers: eight times the
        positions in Gemma 3 from 4B up."""
        get = self.config.get
        if self.config.family in ("gpt2", "opt", "mpt", "nemotron_h"):
            return 0
        dim = self.latent.get("qk_rope_head_dim") or int(
            self.head_dim * float(get("partial_rotary_factor") or 1)
        )
        scaling = get("rope_scaling") or get("rope_parameters") or {}
        scaling = scaling.get("full_attention", scaling) if isinstance(scaling, Mapping) else {}
        kind = scaling.get("rope_type") or scaling.get("type")
        stretch = float(scaling.get("factor") or 1) if kind == "linear" else 1.0
        local = 1 if self.config.family.startswith("gemma3") else 0
        return int(
            self.config.count("max_position_embeddings", 2048)
            * dim
            * int(DTYPE_BYTES[dtype])
            * (stretch + local)
        )


def vision_weights(raw: Mapping[str, Any], hidden: int, notes: list[str]) -> Iterator[Weight]:
    """The vision tower and its projector, from ``vision_config``; approximate where the tower's kind is not
    known, and then said so."""
    vision = raw.get("vision_config")
    if not isinstance(vision, Mapping):
        return
    width = vision.get("hidden_size") or vision.get("embed_dim") or vision.get("vt_hidden_size")
    depth = vision.get("num_hidden_layers") or vision.get("depth") or vision.get("vt_num_hidden_layers")
    inner = vision.get("intermediate_size") or vision.get("vt_intermediate_size")
    wrapper = str(raw.get("model_type"))
    defaults = {
        "mistral3": (1024, 24, 4096), "llama4": (1408, 34, 5632), "kimi_k25": (1152, 27, 4304),
        "kimi_vl": (1152, 27, 4304),
        "qwen2_5_vl": (1280, 32, 3420),
    }  # fmt: skip
    if wrapper in defaults:
        fallback = defaults[wrapper]
        width, depth, inner = width or fallback[0], depth or fallback[1], inner or fallback[2]
    if not (width and depth and inner):
        notes.append("vision_config gives no width, depth and inner width: the vision tower is not counted")
        return
    h, n, i = int(width), int(depth), int(inner)
    patch = int(vision.get("patch_size") or 14)
    channels = int(vision.get("num_channels") or vision.get("in_channels") or vision.get("in_chans") or 3)
    temporal = int(vision.get("temporal_patch_size") or 1)

    def tensor(name: str, *shape: int, count: int = 1) -> Weight:
        return Weight(f"vision.{name}", "tower", shape, count=count)

    yield tensor("patch_embed", h, channels * temporal * patch * patch)
    if wrapper in ("qwen2_5_vl", "qwen2_vl"):
        merge = h * int(vision.get("spatial_merge_size") or 2) ** 2
        out = int(vision.get("out_hidden_size") or hidden)
        yield tensor("qkv", 3 * h, h + 1, count=n)
        yield tensor("proj", h, h + 1, count=n)
        yield tensor("gate_up", 2 * i, h + 1, count=n)
        yield tensor("down", h, i + 1, count=n)
        yield tensor("norms", 2, h, count=n)
        yield tensor("merger", merge, merge + 1)
        yield tensor("merger_out", out, merge + 1)
        yield tensor("merger_norm", h)
        return
    if wrapper in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"):
        merge = h * int(vision.get("spatial_merge_size") or 2) ** 2
        out = int(vision.get("out_hidden_size") or hidden)
        deep = len(vision.get("deepstack_visual_indexes") or [])
        yield tensor("patch_bias", h)
        yield tensor("positions", int(vision.get("num_position_embeddings") or 2304), h)
        yield tensor("attention", 4 * h, h + 1, count=n)
        yield tensor("up", i, h + 1, count=n)
        yield tensor("down", h, i + 1, count=n)
        yield tensor("norms", 4, h, count=n)
        yield tensor("merger", merge, merge + 1, count=1 + deep)
        yield tensor("merger_out", out, merge + 1, count=1 + deep)
        yield tensor("merger_norm", 2, h)
        if deep:
            yield tensor("deep_norms", 2, merge, count=deep)
        return
    if wrapper in ("mistral3",):
        yield tensor("attention", 4 * h, h, count=n)
        yield tensor("mlp", 3 * i, h, count=n)
        yield tensor("norms", 2, h, count=n)
        yield tensor("ln_pre", h)
        merge = int(raw.get("spatial_merge_size") or 2) ** 2
        yield tensor("patch_merger", h, h * merge)
        yield tensor("projector_norm", h)
        yield tensor("projector", hidden, h)
        yield tensor("projector2", hidden, hidden)
        return
    image = int(vision.get("image_size") or 336)
    positions = (image // patch) ** 2
    yield tensor("attention", 4 * h, h + 1, count=n)
    yield tensor("up", i, h + 1, count=n)
    yield tensor("down", h, i + 1, count=n)
    yield tensor("norms", 4, h, count=n)
    if wrapper == "gemma3":
        yield tensor("patch_bias", h)
        yield tensor("positions", positions, h)
        yield tensor("post_norm", 2, h)
        yield tensor("projector", h, hidden)
        yield tensor("projector_norm", h)
        return
    if wrapper in ("llava", "llava_next"):
        features = raw.get("vision_feature_layer")
        siglip = "siglip" in str(vision.get("model_type"))
        if not siglip:
            yield tensor("class_embedding", h)
            yield tensor("pre_norm", 2, h)
        yield tensor("positions", positions + (0 if siglip else 1), h)
        yield tensor("post_norm", 2, h)
        yield tensor("projector", hidden, h * (len(features) if isinstance(features, list) else 1) + 1)
        yield tensor("projector2", hidden, hidden + 1)
        return
    if wrapper == "internvl":
        merge = int(round(1 / float(raw.get("downsample_ratio") or 0.5))) ** 2
        yield tensor("class_embedding", h)
        yield tensor("patch_bias", h)
        yield tensor("positions", positions + 1, h)
        yield tensor("scales", 2, h, count=n)
        yield tensor("projector_norm", 2, h * merge)
        yield tensor("projector", hidden, h * merge + 1)
        yield tensor("projector2", hidden, hidden + 1)
        return
    # eight more layers with global attention, position tables for every tile and aspect ratio
    if wrapper == "mllama":
        more = int(vision.get("num_global_layers") or 8)
        tiles, ratios = int(vision.get("max_num_tiles") or 4), 9
        yield tensor("global_layers", 4 * h * h + 2 * h * i, count=more)
        yield tensor("tile_positions", ratios, tiles * (positions + 1) * h)
        yield tensor("projector", hidden, int(vision.get("vision_output_dim") or 7680) + 1)
        return
    notes.append(
        f"the vision tower of {wrapper} is counted as a plain vision transformer: its size is approximate"
    )
    yield tensor("positions", positions + 1, h)
    yield tensor("projector", hidden, h)


#: wrapper → projections of the tower's MLP, patches that make one token, tokens of the largest image that its
#: processor lets through
_VISION_SHAPES = {
    "qwen2_vl": (2, 4, 16384), "qwen2_5_vl": (3, 4, 16384), "qwen3_vl": (2, 4, 16384),
    "qwen3_vl_moe": (2, 4, 16384),
    "qwen3_5": (2, 4, 16384), "qwen3_5_moe": (2, 4, 16384), "gemma3": (2, 16, 256), "gemma4": (2, 9, 280),
    "mistral3": (3, 4, 3025),
    "llava": (2, 1, 576), "llava_next": (2, 1, 2928), "internvl": (2, 4, 3328), "llama4": (2, 4, 2584),
    "mllama": (2, 1, 6404),
    "kimi_k25": (2, 4, 4096), "kimi_vl": (2, 4, 1024),
}  # fmt: skip


def _vision_shape(raw: Mapping[str, Any]) -> dict[str, int]:
    weights = [w for w in vision_weights(raw, 1, []) if w.role == "tower"]
    wrapper = str(raw.get("model_type"))
    if not weights or wrapper not in _VISION_SHAPES:
        return {}
    vision = raw["vision_config"]
    inner = vision.get("intermediate_size") or next(
        (w.shape[0] for w in weights if w.name.endswith(".up")), 0
    )
    projections, patches, tokens = _VISION_SHAPES[wrapper]
    hidden = weights[0].shape[0]
    return {
        "hidden": hidden,
        "inner": int(inner or 4 * hidden),
        "projections": projections,
        "patches": patches,
        "tokens": tokens,
    }


# -- from the tensors of a checkpoint ------------------------------------------------------------------------


def weights_from_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...]]], layers: int) -> list[Weight]:
    """Weights from safetensors headers: ``(name, dtype, shape)`` of every tensor, so that bytes are those of
    the file.

    Blocks beyond ``layers`` are drafting (MTP) layers.
    """
    weights = []
    for name, dtype, shape in tensors:
        role = role_of(name, layers)
        index = block_of(name) if role not in ("tower", "mtp") else None
        layer = -1 if index is None else index
        size = int(prod(shape) * DTYPE_BYTES.get(dtype, 2))
        if len(shape) == 3 and role == "experts":  # all experts of a layer in one tensor
            weights.append(Weight(name, role, tuple(shape[1:]), True, layer, shape[0], size, dtype))
            continue
        linear = len(shape) == 2 and name.endswith(".weight") and no_linear(name, layers) is None
        weights.append(Weight(name, role, tuple(shape), linear, layer, 1, size, dtype))
    return weights
