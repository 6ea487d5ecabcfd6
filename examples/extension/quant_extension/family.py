"""Granite: a row that says which linears of a block read one input, and where that input comes from."""

from quant.models.adapter import InputGroup, ModelAdapter

granite = ModelAdapter(
    "my-granite",
    ("granite",),
    (
        InputGroup(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "input_layernorm",
            "self_attn.qkv_proj",
        ),
        InputGroup(("self_attn.o_proj",), "self_attn.v_proj"),
        InputGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp.gate_up_proj"),
        InputGroup(("mlp.down_proj",), "mlp.up_proj"),
    ),
)
