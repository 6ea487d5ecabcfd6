"""What a tensor is for, which block it is in, and which tensors are linears of the text decoder: by name,
shape and dtype alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.checkpoint.header import TensorInfo
from quant.models.linears import decoder_refs
from quant.models.place import decoder_list
from quant.models.roles import block_of, leftover, leftovers_note, not_quantizable, role_of


def info(name: str, *shape: int, dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, dtype, shape or (64, 64), Path("m.safetensors"), 0, 0)


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "attention",
            "model.layers.0.self_attn.q_proj.bias model.layers.1.self_attn.kv_a_proj_with_mqa.weight "
            "model.layers.0.self_attn.indexer.wq_b.weight model.layers.0.self_attn.sinks "
            "h.0.attn.c_proj.weight "
            "gpt_neox.layers.3.attention.dense.weight transformer.h.0.self_attention.query_key_value.weight "
            "model.layers.0.linear_attn.A_log backbone.layers.0.mixer.in_proj.weight "
            "backbone.layers.0.mixer.D "
            "backbone.layers.7.mixer.q_proj.weight model.layers.0.conv.in_proj.weight "
            "model.layers.0.self_attn.rotary_emb.inv_freq",
        ),
        (
            "mlp",
            "model.layers.0.mlp.gate_proj.weight transformer.h.0.mlp.c_proj.weight "
            "model.layers.0.mlp.fc1.bias "
            "model.decoder.layers.0.fc2.weight model.layers.0.feed_forward.w2.weight "
            "transformer.blocks.0.ffn.up_proj.weight backbone.layers.1.mixer.down_proj.weight",
        ),
        (
            "experts",
            "model.layers.0.mlp.experts.3.up_proj.weight model.layers.0.mlp.experts.gate_up_proj_blocks "
            "model.layers.0.block_sparse_moe.experts.0.w1.weight model.layers.0.experts.down_proj "
            "model.layers.0.block_sparse_moe.input_linear.weight",
        ),
        (
            "shared_experts",
            "model.layers.1.mlp.shared_experts.up_proj.weight "
            "model.layers.1.mlp.shared_expert.down_proj.weight model.layers.1.shared_mlp.input_linear.weight "
            "backbone.layers.1.mixer.shared_experts.up_proj.weight",
        ),
        (
            "router",
            "model.layers.0.mlp.gate.weight model.layers.0.mlp.gate.e_score_correction_bias "
            "model.layers.0.mlp.shared_expert_gate.weight model.layers.0.router.per_expert_scale "
            "model.layers.0.feed_forward.router.weight model.layers.0.block_sparse_moe.gate.weight",
        ),
        (
            "norm",
            "model.norm.weight model.layers.0.self_attn.q_norm.weight transformer.h.0.ln_1.bias "
            "model.layers.0.post_attention_layernorm.weight transformer.ln_f.weight "
            "transformer.norm_f.weight "
            "transformer.word_embeddings_layernorm.weight model.layers.0.linear_attn.norm.weight",
        ),
        (
            "embedding",
            "model.embed_tokens.weight transformer.wpe.weight transformer.word_embeddings.weight "
            "backbone.embeddings.weight model.embed_tokens_per_layer.weight gpt_neox.embed_in.weight",
        ),
        (
            "head",
            "lm_head.weight embed_out.weight output.weight head.weight language_model.lm_head.bias "
            "lm_head.qweight",
        ),
        (
            "tower",
            "model.visual.blocks.0.attn.qkv.weight vision_tower.vision_model.encoder.layers.0.fc1.weight "
            "audio_tower.layers.0.fc1.weight multi_modal_projector.linear_1.weight "
            "vpm.encoder.layers.0.x.weight "
            "model.sam_model.blocks.0.attn.qkv.weight model.embed_vision.embedding_projection.weight "
            "visual_tokenizer.head.0.weight mlp1.1.weight model.image_newline resampler.kv_proj.weight",
        ),
        (
            "mtp",
            "mtp.layers.0.self_attn.q_proj.weight model.layers.61.eh_proj.weight model.layers.4.mlp.x.weight",
        ),
        (
            "other",
            "x model.layers.0.layer_scalar model.layers.0.unheard.of.weight "
            "model.per_layer_projection.weight",
        ),
    ],
)
def test_roles_are_told_from_names(role: str, names: str) -> None:
    assert {name: role_of(name, 4 if role == "mtp" else None) for name in names.split()} == dict.fromkeys(
        names.split(), role
    )


def test_blocks_beyond_those_of_the_decoder_predict_further_tokens_and_towers_do_not() -> None:
    assert [role_of(f"model.layers.{i}.mlp.up_proj.weight", 2) for i in (0, 1, 2)] == ["mlp", "mlp", "mtp"]
    assert role_of("visual.blocks.31.mlp.up_proj.weight", 2) == "tower"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.7.gate_proj.weight",
        "model.layers.1.block_sparse_moe.experts.0.w1.weight",
        "model.language_model.layers.1.mlp.gate_proj.weight",
        "language_model.model.layers.0.self_attn.o_proj.weight",
        "transformer.h.0.mlp.dense_h_to_4h.weight",
        "model.layers.1.mlp.shared_expert.up_proj.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
        "transformer.encoder.layers.0.self_attention.query_key_value.weight",
    ],
)
def test_linears_of_decoder_blocks_are_quantizable(name: str) -> None:
    assert not_quantizable(info(name), 2) is None


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (64,), "not a linear's weight"),
        ("model.layers.0.input_layernorm.weight", (64,), "1-dimensional"),
        ("model.layers.0.self_attn.q_norm.weight", (4, 16), "a norm"),
        ("model.layers.0.conv.weight", (4, 1, 4), "3-dimensional"),
        ("model.layers.0.mlp.gate.weight", (8, 64), "a router"),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 64), "a router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), "a router"),
        ("model.layers.0.feed_forward.router.weight", (8, 64), "a router"),
        (
            "model.layers.2.mlp.up_proj.weight",
            (64, 64),
            "in block 2, beyond the 2 decoder blocks: a prediction head",
        ),
        ("model.embed_tokens.weight", (64, 64), "part of embed_tokens"),
        ("lm_head.weight", (64, 64), "part of lm_head"),
        ("model.norm.weight", (64, 64), "outside the decoder blocks"),
        ("model.visual.blocks.0.attn.qkv.weight", (64, 64), "part of visual"),
        (
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
            (64, 64),
            "part of vision_tower",
        ),
        ("audio_tower.layers.0.fc1.weight", (64, 64), "part of audio_tower"),
        ("model.sam_model.blocks.0.mlp.lin1.weight", (64, 64), "part of sam_model"),
        ("vpm.encoder.layers.0.self_attn.q_proj.weight", (64, 64), "part of vpm"),
        ("model.encoder.layers.0.self_attn.q_proj.weight", (64, 64), "part of encoder"),
        ("multi_modal_projector.linear_1.weight", (64, 64), "part of multi_modal_projector"),
    ],
)
def test_everything_else_is_left_with_a_reason(name: str, shape: tuple[int, ...], reason: str) -> None:
    assert not_quantizable(info(name, *shape), 2) == reason


def test_integers_are_no_weights() -> None:
    assert not_quantizable(info("model.layers.0.mlp.up_proj.weight", dtype="I32"), 2) == "stored as I32"


def test_blocks_are_found_in_any_familys_names() -> None:
    assert [
        block_of(n)
        for n in (
            "model.layers.12.x",
            "transformer.h.3.x",
            "gpt_neox.layers.0.x",
            "model.norm.weight",
            "layers.x.1.y",
        )
    ] == [12, 3, 0, None, None]


def test_linears_are_sorted_by_block_number_not_by_text() -> None:
    names = [f"model.layers.{i}.mlp.{p}_proj.weight" for i in (10, 2, 0) for p in ("up", "down")]
    refs = decoder_refs({n: info(n) for n in names}, {"num_hidden_layers": 12})
    assert [n.removeprefix("model.layers.") for n in refs] == [
        f"{i}.mlp.{p}_proj" for i in (0, 2, 10) for p in ("down", "up")
    ]


def listed(**lists: tuple[int, int]) -> dict[str, TensorInfo]:
    """Files of several lists: name (with _ for a point) → blocks, width."""
    found = [
        info(f"{name.replace('_', '.')}.{i}.{last}.weight", width, width)
        for name, (count, width) in lists.items()
        for i in range(count)
        for last in ("self_attn.q_proj", "mlp.up_proj")
    ]
    return {x.name: x for x in found}


@pytest.mark.parametrize(
    ("lists", "decoder"),
    [
        (
            {"ear_layers": (2, 64), "mouth_model_layers": (2, 32), "mind_model_layers": (2, 128)},
            "mind.model.",
        ),
        ({"ear_layers": (3, 128), "mind_layers": (2, 128)}, "mind."),  # as wide: by the number of blocks
        ({"vision_blocks": (2, 128), "mind_layers": (2, 128)}, "mind."),  # a tie: by what they are called
        ({"mtp_layers": (1, 128), "mind_layers": (3, 128)}, "mind."),  # a drafting block in the list
        ({"transformer_encoder_layers": (2, 128), "vision_layers": (2, 64)}, "transformer.encoder."),
    ],
)
def test_the_decoder_is_told_by_where_its_blocks_are(lists: dict[str, tuple[int, int]], decoder: str) -> None:
    headers = listed(**lists)
    config = {
        "vision_config": {"num_hidden_layers": 2, "hidden_size": 64},
        "text_config": {"num_hidden_layers": 2, "hidden_size": 128, "num_nextn_predict_layers": 1},
    }
    place = decoder_list(headers.values(), config)
    assert place == f"{decoder}layers."
    assert {n.partition("layers.")[0] for n in decoder_refs(headers, config)} == {decoder}
    others = {n: role_of(n, 2, place) for n in headers if not n.startswith(decoder)}
    assert set(others.values()) <= {"tower", "mtp"}


def test_a_file_of_towers_alone_has_no_decoder() -> None:
    headers = listed(visual_blocks=(4, 64))
    assert decoder_list(headers.values(), {"num_hidden_layers": 2, "hidden_size": 128}) is None


def test_buffers_that_older_saves_hold_are_no_weights() -> None:
    """A mask is told from a bias of the same name by its dimensions."""
    buffers = [
        info("gpt_neox.layers.0.attention.bias", 1, 1, 8, 8, dtype="BOOL"),
        TensorInfo("gpt_neox.layers.0.attention.masked_bias", "F16", (), Path("m"), 0, 0),
        info("model.layers.0.self_attn.rotary_emb.inv_freq", 16, dtype="F32"),
        info("model.layers.0.self_attn.rotary_emb.cos_cached", 1, 1, 512, 32),
    ]
    weights = [info("h.0.attention.bias", 64), info("model.layers.0.self_attn.q_proj.bias", 64)]
    assert [leftover(x) for x in buffers] == [True] * 4
    assert not any(leftover(x) for x in weights)
    note = leftovers_note([*weights, *buffers])
    assert note is not None and note.startswith("4 leftover buffers (bias, cos_cached, inv_freq, masked_bias")
    assert leftovers_note(weights) is None


def test_an_adapter_that_is_a_part_of_a_model_is_not_quantized() -> None:
    assert "an adapter" in str(not_quantizable(info("model.layers.0.qkv_proj.lora_A.vision.weight"), 2))
    assert not_quantizable(info("model.layers.0.self_attn.qkv_proj.base_layer.weight"), 2) is None
