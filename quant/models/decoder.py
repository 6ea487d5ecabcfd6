"""What a config.json says of a text decoder's layers: sizes, the kind of every layer, which of them have
experts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from quant.errors import UsageError, clipped
from quant.models.families import FAMILIES, WRAPPERS, Family
from quant.models.spec import Moe
from quant.models.values import LARGEST_DEPTH, LARGEST_DIMENSION, Values, is_number
from quant.vllm.config import BLOCK_KINDS, block_count, heads_of
from quant.vllm.context import context_length

#: Sizes of latent attention.
LATENT = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
#: Letters of Nemotron-H's pattern → kinds of layers: each is one mixer, or one MLP.
_LETTERS = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}

#: Kinds of layers whose weights and caches are computed.
_KNOWN_KINDS = frozenset(
    {
        "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "cross_attention",
        "mla", "kda", "mamba", "mlp", "moe",
    }
)  # fmt: skip
#: Kinds of layers that are an MLP alone.
_MLPS = frozenset({"mlp", "moe"})
#: How keys begin that say of attention what others call its heads.
_ATTENTION = ("attn_", "num_attention_heads")
#: How keys begin that size what a layer has in the place of attention, or beside it: recurrence, windows with
#: heads of their own, compressed or sparse attention, several residual streams, experts of another dtype.
_PARTS_OF_LAYERS = (
    "mamba_", "ssm_", "conv_", "lru_", "rwkv_", "altup_", "laurel_", "attn_type_list", "layers_block_type",
    "swa_", "hybrid_layer_pattern", "compress_", "sparse_", "index_", "o_lora_", "hc_", "num_hash_layers",
    "ngram_", "ple_", "expert_dtype",
)  # fmt: skip


class Decoder:
    """The facts of one config, checked as they are read.

    Attributes:
        values: of the config; the text decoder's part first.
        model_type: of the text part, of a wrapper where that states none; empty where neither does.
        name: of the family.
        known: whether the family has a row.
        positions: that are stated; ``context``: tokens that vLLM derives from them.
        latent: sizes of latent attention; empty where there is none.
        single: a layer is a mixer or an MLP, not both.

    Raises:
        UsageError: a needed key is missing or absurd; the message names the key and its value.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self.values = values = Values(config, where)
        self.model_type = values.text("model_type")
        self.name = WRAPPERS.get(self.model_type, self.model_type)
        self.known = self.name in FAMILIES
        self.family = FAMILIES.get(self.name, Family())
        self.hidden = values.count("hidden_size")
        self.layers = values.count("num_hidden_layers", block_count(config), most=LARGEST_DEPTH)
        if values.get("num_attention_heads") is None and not self.known and not values.named(_ATTENTION):
            raise UsageError(
                f"{where}: model_type {self.model_type!r} states no attention heads: models without "
                "attention are not planned here; name what to make with --method and --scheme, and see what "
                "vLLM says at its start"
            )
        self.heads = values.count("num_attention_heads")
        values.count("num_key_value_heads", self.heads)
        heads = heads_of(config)
        assert heads is not None  # both counts stand
        self.kv_heads = heads.kv if self.family.grouped else self.heads
        self.state_heads = heads.state
        if values.get("head_dim") is None and self.hidden % self.heads and not values.get("v_head_dim"):
            raise UsageError(
                f"{where}: hidden_size {self.hidden} is not a multiple of num_attention_heads "
                f"{self.heads} and there is no head_dim: state it in config.json"
            )
        self.head_dim = values.count("head_dim", max(self.hidden // self.heads, 1))
        if self.heads % self.kv_heads:
            raise UsageError(
                f"{where}: {self.heads} attention heads are not a multiple of {self.kv_heads} KV heads"
            )
        self.inner_sizes = self._inner_sizes()
        self.intermediate = max(self.inner_sizes)
        self.vocabulary = values.count("vocab_size")
        self.positions = values.count("max_position_embeddings", 2048)
        self.context = context_length(config) or self.positions
        tied = values.get("tie_word_embeddings")
        self.tied = self.family.tied if tied is None else bool(tied)
        self.latent = {k: size for k in LATENT if (size := values.count(k, 0, least=0))}
        self.single = bool(values.text("hybrid_override_pattern")) or bool(_MLPS & set(self._stated_kinds()))

    def _inner_sizes(self) -> list[int]:
        """The MLP's inner size of every layer: one number, or as Gemma 3n states them one for each."""
        stated = self.values.get("intermediate_size")
        if not isinstance(stated, list):
            return [self.values.count("intermediate_size", self._default_inner())] * self.layers
        if len(stated) != self.layers or not all(
            is_number(x) and x == int(x) and 0 < x <= LARGEST_DIMENSION for x in stated
        ):
            raise UsageError(
                f"{self.values.where}: intermediate_size is {clipped(stated)}: must be one whole number, or "
                f"one for each of {self.layers} layers; repair config.json"
            )
        return [int(x) for x in stated]

    def _default_inner(self) -> int | None:
        """The inner size where ``intermediate_size`` is not stated; of a family without a row what plain MLPs
        have, and :attr:`unknown_layers` tells it."""
        if self.family.inner_ratio:
            return int(self.hidden * self.values.number("expansion_ratio", self.family.inner_ratio))
        own = self.values.count("moe_intermediate_size", 0, least=0)
        return own or (None if self.known else 4 * self.hidden)

    def _stated_kinds(self) -> list[str]:
        """The kinds of layers as the config lists them, one for each; empty where it does not."""
        for key in BLOCK_KINDS:
            types = self.values.get(key)
            if not isinstance(types, list):
                continue
            if wrong := [t for t in types if not isinstance(t, str)]:
                raise UsageError(
                    f"{self.values.where}: {key} has {clipped(wrong[0])}: must be a list of words; repair "
                    "config.json"
                )
            if len(types) == self.layers:
                return types
        return []

    def _sized(self, kind: str) -> str:
        """A recurrent kind by the sizes that the config states for it: several share one word."""
        if kind == "attention":
            return "full_attention"
        if kind in ("linear_attention", "mamba") and self.values.get("mamba_num_heads") is not None:
            return "mamba"
        if kind == "mamba" or kind == "linear_attention" and self.values.get("linear_num_key_heads") is None:
            return f"{kind.replace('_', ' ')} without sizes"
        return kind

    @cached_property
    def moe(self) -> Moe | None:
        """The routed experts, or None."""
        experts = self.values.count("experts", 0, least=0)
        if not experts or self.values.get("enable_moe_block") is False:
            return None
        inner = self.values.count("moe_intermediate_size", self.intermediate)
        return Moe(experts, min(self.values.count("active", 2), experts), inner)

    @property
    def expert_width(self) -> int:
        """What a routed expert reads and writes: the layer's own size, or a narrower one that all of them
        share (Nemotron 3, Kimi K3)."""
        return self.values.count("expert_width", 0, least=0) or self.hidden

    @cached_property
    def kinds(self) -> list[str]:
        """The kind of every layer's attention, in transformers' words; also ``mla``, ``kda``, ``mamba``, and
        ``mlp`` and ``moe`` for layers that have none.

        Raises:
            UsageError: layers of experts, and no number of experts.
        """
        kinds = self._kinds()
        if "moe" in kinds and self.moe is None:
            raise UsageError(
                f"{self.values.where}: layer {kinds.index('moe')} is one of experts (moe), and no number of "
                "experts is stated (n_routed_experts, num_experts): give a complete config.json"
            )
        return kinds

    def _kinds(self) -> list[str]:
        values, n = self.values, self.layers
        if pattern := values.text("hybrid_override_pattern"):
            return [_LETTERS.get(letter, "mlp") for letter in pattern]
        if full := values.part("linear_attn_config").items("full_attn_layers"):
            return ["mla" if i + 1 in full else "kda" for i in range(n)]
        types = self._stated_kinds()
        if "kv_lora_rank" in self.latent:
            recurrent = values.get("linear_head_dim") is not None
            return ["kda" if recurrent and t == "linear_attention" else "mla" for t in types or [""] * n]
        if types:
            return [self._sized(t) for t in types]
        if interval := values.count("full_attention_interval", 0, least=0):
            return ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(n)]
        if crossing := values.items("cross_attention_layers"):
            return ["cross_attention" if i in crossing else "full_attention" for i in range(n)]
        if values.count("attention_chunk_size", 0, least=0):
            stated = values.items("no_rope_layers")
            rotary = stated if len(stated) == n else [(i + 1) % 4 for i in range(n)]
            return ["chunked_attention" if rotary[i] else "full_attention" for i in range(n)]
        return self._windowed()

    @property
    def unknown_layers(self) -> str:
        """What the config says of its layers that is not understood: kinds, or sizes of recurrent and
        convolutional parts in a family without a row. Empty where nothing is."""
        kinds = sorted({k for k in self.kinds if k not in _KNOWN_KINDS})
        if kinds or self.known:
            return ", ".join(kinds)
        named = self.values.named(_PARTS_OF_LAYERS)[:3]
        if self.values.get("intermediate_size") is None and not self.moe:
            named.append("no inner size of the MLP is stated")
        return ", ".join(named)

    @cached_property
    def kda(self) -> tuple[int, int, int]:
        """Heads, head size and convolution of layers of Kimi's delta attention, as their authors' configs and
        as transformers' own call them."""
        linear = self.values.part("linear_attn_config")
        if linear.get("num_heads") is not None:
            names = ("num_heads", "head_dim", "short_conv_kernel_size")
        else:
            linear, names = self.values, ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        heads, size, kernel = (linear.count(name) for name in names)
        return heads, size, kernel

    def _windowed(self) -> list[str]:
        """Full and sliding attention, where nothing but a window and its pattern is stated."""
        values, n = self.values, self.layers
        window = values.count("sliding_window", 0, least=0)
        if not window or not self.family.windowed:
            # Qwen2: only above max_window_layers, and only when switched on
            if window and values.get("use_sliding_window"):
                first = values.count("max_window_layers", n, least=0)
                return ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
            return ["full_attention"] * n
        period = values.count("sliding_window_pattern", 0, least=0) or self.family.window_pattern
        if not period:
            return ["sliding_attention"] * n
        return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(n)]

    def heads_of(self, kind: str) -> tuple[int, int, bool]:
        """KV heads, head size and whether keys double as values, for a layer of that kind (Gemma 4's full
        attention has its own)."""
        if kind != "full_attention":
            return self.kv_heads, self.head_dim, False
        shared = bool(self.values.get("attention_k_eq_v"))
        kv = self.values.count("num_global_key_value_heads", 0, least=0) if shared else 0
        dim = self.values.count("global_head_dim", 0, least=0)
        return kv or self.kv_heads, dim or self.head_dim, shared

    def shares_cache(self, layer: int) -> bool:
        """Gemma 3n and 4: the last layers read the cache of an earlier one and have no key and value
        projections."""
        return layer >= self.layers - self.values.count("num_kv_shared_layers", 0, least=0)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in the place of the MLP."""
        values = self.values
        if self.moe is None or self.family.dense_beside_experts:
            return False
        if layer in values.items("mlp_only_layers"):
            return False
        if layer < values.count("first_k_dense_replace", 0, least=0):
            return False
        frequency = values.get("moe_layer_freq")  # some state a list instead
        if isinstance(frequency, int) and frequency and layer % frequency:
            return False
        if step := values.count("interleave_moe_layer_step", 0, least=0):
            return (layer + 1) % step == 0
        return (layer + 1) % (values.count("decoder_sparse_step", 0, least=0) or 1) == 0
