"""What a text decoder's layers keep in the KV cache, and vLLM's table of rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from quant.models.decoder import Decoder
from quant.models.spec import DTYPE_BYTES, CacheLayer
from quant.models.values import Values


def cache_layers(decoder: Decoder) -> Iterator[CacheLayer]:
    """One entry for each layer that caches something of its own."""
    for layer, kind in enumerate(decoder.kinds):
        if not decoder.shares_cache(layer) and kind not in ("mlp", "moe"):
            yield _CACHES.get(kind, _full)(decoder, layer, kind)


def _full(decoder: Decoder, layer: int, kind: str) -> CacheLayer:
    heads, size, _ = decoder.heads_of(kind)
    return CacheLayer(layer, "full", heads, size, size)


def _sliding(decoder: Decoder, layer: int, kind: str) -> CacheLayer:
    heads, size, _ = decoder.heads_of(kind)
    return CacheLayer(layer, "sliding", heads, size, size, decoder.values.count("sliding_window"))


def _chunked(decoder: Decoder, layer: int, kind: str) -> CacheLayer:
    heads, size, _ = decoder.heads_of(kind)
    return CacheLayer(layer, "chunked", heads, size, size, decoder.values.count("attention_chunk_size"))


def _latent(decoder: Decoder, layer: int, kind: str) -> CacheLayer:
    latent = decoder.latent
    return CacheLayer(layer, "mla", 1, latent["kv_lora_rank"] + latent["qk_rope_head_dim"])


def _gated_delta(decoder: Decoder, layer: int, kind: str) -> CacheLayer:
    count = decoder.values.count
    keys = count("linear_num_key_heads") * count("linear_key_head_dim")
    values = count("linear_num_value_heads") * count("linear_value_head_dim")
    convolution = (2 * keys + values) * (count("linear_conv_kernel_dim") - 1)
    state = values * count("linear_key_head_dim")
    return CacheLayer(layer, "state", state=((convolution, 0), (state, _state_bytes(decoder.values))))


def _kda(decoder: Decoder, layer: int, kind: str) -> CacheLayer:
    heads, size, kernel = decoder.kda
    width = heads * size
    return CacheLayer(layer, "state", state=((3 * width * (kernel - 1), 0), (width * size, 4)))


def _mamba(decoder: Decoder, layer: int, kind: str) -> CacheLayer:
    count = decoder.values.count
    inner = count("mamba_num_heads") * count("mamba_head_dim")
    convolution = (inner + 2 * count("n_groups") * count("ssm_state_size")) * (count("conv_kernel") - 1)
    state = inner * count("ssm_state_size")
    return CacheLayer(layer, "state", state=((convolution, 0), (state, _state_bytes(decoder.values))))


#: Kind of a layer → what it caches; of others :func:`_full`.
_CACHES: Mapping[str, Callable[[Decoder, int, str], CacheLayer]] = {
    "sliding_attention": _sliding,
    "chunked_attention": _chunked,
    "mla": _latent,
    "linear_attention": _gated_delta,
    "kda": _kda,
    "mamba": _mamba,
}


def _state_bytes(values: Values) -> int:
    """Bytes of one value of a recurrent state: what the config says, else the cache's own dtype (0)."""
    named = values.get("mamba_ssm_dtype") or values.get("mamba_ssm_cache_dtype")
    return int(DTYPE_BYTES.get(str(named), 0))


def rotary_bytes(decoder: Decoder, dtype: str) -> int:
    """Bytes of the table of cosines and sines that vLLM keeps for every position, in the model's dtype,
    shared by all layers of one kind.

    Linear scaling stretches the table of the full-attention layers: eight times the positions in Gemma 3 from
    4B up.
    """
    if not decoder.family.rotary:
        return 0
    values = decoder.values
    dim = decoder.latent.get("qk_rope_head_dim") or int(
        decoder.head_dim * values.number("partial_rotary_factor", 1)
    )
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if isinstance(scaling, Mapping) and isinstance(scaling.get("full_attention"), Mapping):
        scaling = scaling["full_attention"]
    scaled = Values(scaling if isinstance(scaling, Mapping) else {}, f"{values.where}: rope_scaling")
    kind = scaled.get("rope_type") or scaled.get("type")
    tables = (scaled.number("factor", 1) if kind == "linear" else 1) + decoder.family.local_rotary
    return int(decoder.positions * dim * DTYPE_BYTES[dtype] * tables)
