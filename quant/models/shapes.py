"""The shape of every weight of a text decoder, computed from its config.json, or read from the headers of its
files.

Nothing is loaded and torch is not imported. What a config.json leaves unsaid is in the row of its family
(:mod:`quant.models.families`); an unknown family falls back to the Llama layout with a note that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from quant.checkpoint.header import TensorInfo
from quant.errors import UsageError
from quant.models.cache import cache_layers, rotary_bytes
from quant.models.decoder import LATENT, Decoder
from quant.models.families import MLP_BIAS
from quant.models.linears import expert_layout, fused_matrix
from quant.models.place import decoder_list
from quant.models.roles import block_of, leftover, no_linear, role_of
from quant.models.spec import DTYPE_BYTES, ModelSpec, Weight
from quant.models.values import LARGEST_DEPTH
from quant.models.vision import vision_weights
from quant.vllm.config import config_dtype, parts, quantization_config, text_config
from quant.vllm.layers import built_plain, stored_transposed

#: Keys that state how many experts every token visits.
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts")


def spec_from_config(
    config: Mapping[str, Any], name: str = "model", where: str = "config.json", source: str = ""
) -> ModelSpec:
    """The model that a config.json describes.

    Raises:
        UsageError: a needed key is missing or absurd; the message names the key and its value.
        CheckpointError: its quantization_config is not an object.
    """
    decoder = Decoder(config, where)
    notes = []
    if not decoder.known:
        notes.append(f"model_type {decoder.name or '(none)'} is not known: planned with the Llama layout")
    dtype = config_dtype(config) or ""
    if dtype not in DTYPE_BYTES:
        notes.append(f"config.json names no dtype ({dtype or 'absent'}): bfloat16 is assumed")
        dtype = "bfloat16"
    if decoder.unknown_layers:
        notes.append(
            f"its layers have parts that are not known here ({decoder.unknown_layers}): planned as "
            "attention, and no verdict is sure: start vLLM and see, or name what to make with --method and "
            "--scheme"
        )
    towers, vision_shape, said = vision_weights(config, where, decoder.hidden)
    architectures = next((a for p in reversed(list(parts(config))) if (a := p.get("architectures"))), None)
    return ModelSpec(
        name=name,
        family=decoder.name or "unknown",
        model_type=decoder.model_type,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        dtype=dtype,
        hidden=decoder.hidden,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        intermediate=decoder.intermediate,
        vocabulary=decoder.vocabulary,
        max_context=decoder.context,
        tied=decoder.tied,
        layers=decoder.layers,
        weights=(*decoder_weights(decoder), *towers),
        cache=tuple(cache_layers(decoder)),
        moe=decoder.moe,
        vision=bool(towers),
        quantization=quantization_config(config),
        rotary_bytes=rotary_bytes(decoder, dtype),
        vision_shape=vision_shape,
        source=source or where,
        notes=(*notes, *said),
        uncertainty=0.0 if decoder.known else 0.1,
        latent=decoder.latent,
        unknown_layers=decoder.unknown_layers,
        state_heads=decoder.state_heads,
        config=config,
    )


def decoder_weights(decoder: Decoder) -> Iterator[Weight]:
    """Every weight of a text decoder, block by block; names are relative to the block."""
    h, v, family, values = decoder.hidden, decoder.vocabulary, decoder.family, decoder.values
    width = values.count("word_embed_proj_dim", h)
    yield _tensor("embed_tokens", v, width)
    if family.positions is not None:
        yield _tensor("embed_positions", values.count("max_position_embeddings") + family.positions, h)
    if width != h:
        yield _tensor("project_in", h, width)
        yield _tensor("project_out", width, h)
    disabled = {"disable_quant_module": values.get("disable_quant_module")}
    for layer, kind in enumerate(decoder.kinds):
        block = [replace(w, layer=layer) for w in _block(decoder, layer, kind)]
        plain = built_plain((w.name for w in block if len(w.shape) == 2), disabled)
        yield from (replace(w, linear=False) if w.linear and w.name in plain else w for w in block)
    if values.get("do_layer_norm_before", True):
        yield from _norm(decoder, "norm")
    if not decoder.tied:
        yield _tensor("lm_head", v, width)
    if values.get("lm_head_bias", family.head_bias):
        yield _tensor("lm_head.bias", v)
    if per_layer := values.count("hidden_size_per_layer_input", 0, least=0):
        rows = values.count("vocab_size_per_layer_input", v)
        yield _tensor("embed_tokens_per_layer", rows, decoder.layers * per_layer)
        yield _tensor("per_layer_model_projection", decoder.layers * per_layer, h)
        yield _tensor("per_layer_projection_norm", per_layer)
    yield from _drafts(decoder)


def _tensor(name: str, *shape: int, count: int = 1, linear: bool = False) -> Weight:
    return Weight(name, role_of(name), shape, linear, count=count)


def _linear(name: str, outputs: int, inputs: int, bias: bool = False) -> Iterator[Weight]:
    yield _tensor(name, outputs, inputs, linear=True)
    if bias:
        yield _tensor(f"{name}.bias", outputs)


def _norm(decoder: Decoder, name: str) -> Iterator[Weight]:
    yield _tensor(f"{name}.weight", decoder.hidden)
    if decoder.family.norm == "layer" and not decoder.family.scale_only:
        yield _tensor(f"{name}.bias", decoder.hidden)


def _block(decoder: Decoder, layer: int, kind: str) -> Iterator[Weight]:
    values = decoder.values
    # Falcon's newer models have a norm for each of the parallel branches, unless they say otherwise
    parallel = values.get("new_decoder_architecture") and values.get("num_ln_in_parallel_attn", 2) == 2
    for i in range(2 if parallel else decoder.family.norms):
        yield from _norm(decoder, f"norm{i}")
    yield from _MIXERS.get(kind, _attention)(decoder, layer, kind)
    if decoder.single and kind not in ("mlp", "moe"):
        return
    if kind == "moe" or (kind != "mlp" and decoder.has_experts(layer)):
        yield from _experts(decoder)
    else:
        yield from _mlp(decoder, layer)
    if decoder.family.layer_scalar:
        yield _tensor("layer_scalar", 1)
    if per_layer := values.count("hidden_size_per_layer_input", 0, least=0):
        yield from _linear("per_layer_input_gate", per_layer, decoder.hidden)
        yield from _linear("per_layer_projection", decoder.hidden, per_layer)
        yield _tensor("post_per_layer_input_norm", decoder.hidden)
    if decoder.family.dense_beside_experts and decoder.moe:
        yield from _experts_beside(decoder)


# -- attention and what stands in its place
# --------------------------------------------------------------------


def _attention(decoder: Decoder, layer: int, kind: str) -> Iterator[Weight]:
    f, h, values = decoder.family, decoder.hidden, decoder.values
    kv_heads, dim, values_are_keys = decoder.heads_of(kind)
    stated = _stated_bias(decoder, f.bias_keys)
    qkv_bias = f.qkv_bias if stated is None else stated
    output_bias = f.output_bias if stated is None or not f.output_bias_stated else stated
    query = decoder.heads * dim * (2 if f.wide_query else 1)
    yield from _linear("self_attn.q_proj", query, h, qkv_bias)
    own = not decoder.shares_cache(layer)
    if own:
        yield from _linear("self_attn.k_proj", kv_heads * dim, h, qkv_bias)
        if not values_are_keys:
            yield from _linear("self_attn.v_proj", kv_heads * dim, h, qkv_bias)
    yield from _linear("self_attn.o_proj", h, decoder.heads * dim, output_bias)
    if f.qk_norm and values.get("use_qk_norm", f.qk_norm != "each"):
        yield _tensor("self_attn.q_norm", *_gains(f.qk_norm, decoder.heads, dim))
        if own:
            yield _tensor("self_attn.k_norm", *_gains(f.qk_norm, kv_heads, dim))
    if f.sinks:
        yield _tensor("self_attn.sinks", decoder.heads)


def _gains(norm: str, heads: int, dim: int) -> tuple[int, ...]:
    """The shape of a norm of queries or keys."""
    return {"head": (dim,), "width": (heads * dim,), "each": (heads, dim)}[norm]


def _stated_bias(decoder: Decoder, keys: tuple[str, ...]) -> bool | None:
    """Whether projections have biases, as the config states it under one of ``keys``; None where it does
    not."""
    if keys and isinstance(none := decoder.values.get("no_bias"), bool):  # MPT
        return not none
    stated = next((value for key in keys if (value := decoder.values.get(key)) is not None), None)
    return stated if isinstance(stated, bool) else None


def _cross_attention(decoder: Decoder, layer: int, kind: str) -> Iterator[Weight]:
    yield from _attention(decoder, layer, kind)
    yield _tensor("cross_attn.q_norm", decoder.head_dim)
    yield _tensor("cross_attn.k_norm", decoder.head_dim)
    yield _tensor("cross_attn_gates", 2)


def _latent(decoder: Decoder, layer: int, kind: str) -> Iterator[Weight]:
    h, heads, values, latent = decoder.hidden, decoder.heads, decoder.values, decoder.latent
    if missing := [k for k in LATENT if k not in latent]:
        raise UsageError(
            f"{values.where} lacks {', '.join(missing)}: latent attention needs them to plan; give a "
            "complete config.json"
        )
    rank, rope, nope, value = (latent[k] for k in LATENT)
    bias = bool(values.get("attention_bias", False))
    query_rank = values.count("q_lora_rank", 0, least=0)
    if query_rank:
        yield from _linear("self_attn.q_a_proj", query_rank, h, bias)
        yield _tensor("self_attn.q_a_layernorm", query_rank)
        yield from _linear("self_attn.q_b_proj", heads * (nope + rope), query_rank)
    else:
        yield from _linear("self_attn.q_proj", heads * (nope + rope), h)
    yield from _linear("self_attn.kv_a_proj_with_mqa", rank + rope, h, bias)
    yield _tensor("self_attn.kv_a_layernorm", rank)
    yield from _linear("self_attn.kv_b_proj", heads * (nope + value), rank)
    yield from _linear("self_attn.o_proj", h, heads * value, bias)
    # DeepSeek V3.2: the selector of sparse attention
    if index := values.count("index_n_heads", 0, least=0):
        dim = values.count("index_head_dim")
        yield from _linear("self_attn.indexer.wq_b", index * dim, query_rank or h)
        yield from _linear("self_attn.indexer.wk", dim, h)
        yield _tensor("self_attn.indexer.k_norm", 2, dim)
        yield _tensor("self_attn.indexer.weights_proj", index, h)


def _gated_delta(decoder: Decoder, layer: int, kind: str) -> Iterator[Weight]:
    count, h = decoder.values.count, decoder.hidden
    keys = count("linear_num_key_heads") * count("linear_key_head_dim")
    heads, dim = count("linear_num_value_heads"), count("linear_value_head_dim")
    yield from _linear("linear_attn.in_proj_qkvz", 2 * keys + 2 * heads * dim, h)
    yield from _linear("linear_attn.in_proj_ba", 2 * heads, h)
    yield _tensor("linear_attn.conv1d", 2 * keys + heads * dim, 1, count("linear_conv_kernel_dim"))
    yield _tensor("linear_attn.dt_bias", heads)
    yield _tensor("linear_attn.A_log", heads)
    yield _tensor("linear_attn.norm", dim)
    yield from _linear("linear_attn.out_proj", h, heads * dim)


def _kda(decoder: Decoder, layer: int, kind: str) -> Iterator[Weight]:
    h, (heads, dim, kernel) = decoder.hidden, decoder.kda
    width = heads * dim
    for name in "qkv":
        yield from _linear(f"self_attn.{name}_proj", width, h)
        yield _tensor(f"self_attn.{name}_conv1d", width, 1, kernel)
    yield _tensor("self_attn.A_log", heads)
    yield _tensor("self_attn.dt_bias", width)
    yield from _linear("self_attn.b_proj", heads, h)
    for name in "fg":
        yield from _linear(f"self_attn.{name}_a_proj", dim, h)
        yield from _linear(f"self_attn.{name}_b_proj", width, dim)
    yield _tensor("self_attn.o_norm", dim)
    yield from _linear("self_attn.o_proj", h, width)


def _mamba(decoder: Decoder, layer: int, kind: str) -> Iterator[Weight]:
    count, h = decoder.values.count, decoder.hidden
    heads = count("mamba_num_heads")
    inner = heads * count("mamba_head_dim")
    groups = 2 * count("n_groups") * count("ssm_state_size")
    yield from _linear("mixer.in_proj", 2 * inner + groups + heads, h)
    yield _tensor("mixer.conv1d", inner + groups, 1, count("conv_kernel"))
    yield _tensor("mixer.conv1d.bias", inner + groups)
    for name in ("dt_bias", "A_log", "D"):
        yield _tensor(f"mixer.{name}", heads)
    yield _tensor("mixer.norm", inner)
    yield from _linear("mixer.out_proj", h, inner)


def _no_mixer(decoder: Decoder, layer: int, kind: str) -> Iterator[Weight]:
    return iter(())


#: Kind of a layer → its weights beside the MLP; of others :func:`_attention`.
_MIXERS: Mapping[str, Callable[[Decoder, int, str], Iterator[Weight]]] = {
    "mla": _latent,
    "linear_attention": _gated_delta,
    "kda": _kda,
    "mamba": _mamba,
    "cross_attention": _cross_attention,
    "mlp": _no_mixer,
    "moe": _no_mixer,
}


# -- the MLP and experts
# ---------------------------------------------------------------------------------------


def _mlp(decoder: Decoder, layer: int) -> Iterator[Weight]:
    h, values = decoder.hidden, decoder.values
    inner = values.count("intermediate_size_mlp", decoder.inner_sizes[min(layer, decoder.layers - 1)])
    if values.get("use_double_wide_mlp") and decoder.shares_cache(layer):
        inner *= 2
    stated = _stated_bias(decoder, MLP_BIAS)
    bias = decoder.family.mlp_bias if stated is None else stated
    for name in _inward(decoder):
        yield from _linear(f"mlp.{name}", inner, h, bias)
    yield from _linear("mlp.down_proj", h, inner, bias)


def _inward(decoder: Decoder) -> tuple[str, ...]:
    """The projections of an MLP that read its input."""
    return ("gate_proj", "up_proj") if decoder.family.mlp == "gated" else ("up_proj",)


def _routed(decoder: Decoder, module: str) -> Iterator[Weight]:
    """The routed experts of a layer."""
    moe, h = decoder.moe, decoder.expert_width
    assert moe is not None
    for name in _inward(decoder):
        yield _tensor(f"{module}.{name}", moe.intermediate, h, count=moe.experts, linear=True)
    yield _tensor(f"{module}.down_proj", h, moe.intermediate, count=moe.experts, linear=True)


def _experts(decoder: Decoder) -> Iterator[Weight]:
    """Experts in the place of the MLP: router, routed experts, shared ones."""
    moe, h, family, values = decoder.moe, decoder.hidden, decoder.family, decoder.values
    assert moe is not None
    yield _tensor("mlp.router", moe.experts, h)
    if family.expert_bias:
        yield _tensor("mlp.router.bias", moe.experts)
    if family.score_bias:
        yield _tensor("mlp.e_score_correction_bias", moe.experts)
    yield from _routed(decoder, "mlp.experts")
    if (narrow := decoder.expert_width) != h:
        yield from _linear("mlp.fc1_latent_proj", narrow, h)
        yield from _linear("mlp.fc2_latent_proj", h, narrow)
    if family.expert_bias:
        yield _tensor("mlp.experts.gate_up_proj.bias", 2 * moe.intermediate, count=moe.experts)
        yield _tensor("mlp.experts.down_proj.bias", h, count=moe.experts)
    shared = values.count("shared_expert_intermediate_size", 0, least=0)
    if shared:
        yield _tensor("mlp.shared_expert_gate", 1, h)
    else:
        number = next((n for key in SHARED_EXPERTS if (n := values.count(key, 0, least=0))), 0)
        wide = values.count("moe_shared_expert_intermediate_size", 0, least=0)
        shared = wide * (number or 1) or moe.intermediate * (number or family.shared_experts)
    if shared:
        for name in _inward(decoder):
            yield from _linear(f"mlp.shared_experts.{name}", shared, h)
        yield from _linear("mlp.shared_experts.down_proj", h, shared)


def _experts_beside(decoder: Decoder) -> Iterator[Weight]:
    """Experts beside the MLP of the same block (Gemma 4)."""
    moe, h = decoder.moe, decoder.hidden
    assert moe is not None
    for i in range(3):
        yield _tensor(f"moe_norm{i}", h)
    yield _tensor("router.proj", moe.experts, h)
    yield _tensor("router.scale", h)
    yield _tensor("router.per_expert_scale", moe.experts)
    yield from _routed(decoder, "experts")


def _drafts(decoder: Decoder) -> Iterator[Weight]:
    """Drafting layers: in the file, but not in memory unless speculative decoding asks for them."""
    h = decoder.hidden
    number = decoder.values.count("num_nextn_predict_layers", 0, least=0, most=LARGEST_DEPTH)
    for _ in range(number if "kv_lora_rank" in decoder.latent else 0):
        for weight in _block(decoder, decoder.layers, "mla"):
            yield replace(weight, role="mtp", linear=False)
        yield Weight("eh_proj", "mtp", (h, 2 * h))
        yield Weight("mtp_norms", "mtp", (3, h))
        yield Weight("mtp_embeddings", "mtp", (2 * decoder.vocabulary, h))


# -- from the tensors of a checkpoint
# --------------------------------------------------------------------------


def weights_from_tensors(
    tensors: Iterable[TensorInfo], config: Mapping[str, Any], blocks: int
) -> list[Weight]:
    """Weights from safetensors headers, so that bytes are those of the file.

    Args:
        blocks: of the decoder; later ones are drafting (MTP) layers.
    """
    layout, hidden = expert_layout(config), text_config(config).get("hidden_size")
    tensors = list(tensors)
    others = (t for t in tensors if _matrix(t) and ".experts." not in t.name)
    plain = built_plain((t.name.removesuffix(".weight") for t in others), config)
    decoder = decoder_list(tensors, config)
    weights = []
    for info in tensors:
        name, shape = info.name, tuple(info.shape) or (1,)
        if leftover(info):
            continue
        role = role_of(name, blocks, decoder)
        index = block_of(name) if role not in ("tower", "mtp") else None
        count = 1
        linear = _matrix(info) and no_linear(name, blocks, decoder) is None
        if len(shape) == 3 and role == "experts":  # all experts of a layer in one tensor
            count, linear = shape[0], True
            shape = fused_matrix(name, shape, layout, hidden) or shape[1:]
        elif linear and stored_transposed(config, name.removesuffix(".weight")):
            shape = shape[::-1]
        linear = linear and name.removesuffix(".weight") not in plain
        size = int(prod(info.shape) * DTYPE_BYTES.get(info.dtype, 2))
        layer = -1 if index is None else index
        weights.append(Weight(name, role, shape, linear, layer, count, size, info.dtype))
    return weights


def _matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.name.endswith(".weight")
