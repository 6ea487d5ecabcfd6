"""Tiny configs of every kind of cache, shared by the tests."""

BASE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024, "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}

TINY = {
    "gqa": {**BASE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "mha": {**BASE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4},
    "mqa-tied": {
        **BASE, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "mla-moe": {
        **BASE, **_EXPERTS, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
        "num_key_value_heads": 4,
        "q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
        "v_head_dim": 128, "n_routed_experts": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1,
        "topk_group": 1, "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "head_dim": 64,
    },
    "sliding": {**BASE, "model_type": "mistral", "architectures": ["MistralForCausalLM"],
    "sliding_window": 512},
    "hybrid-sliding": {
        **BASE, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7,
        "sliding_window": 256,
        "query_pre_attn_scalar": 64, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"],
    },
    "half-sliding": {
        **BASE, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 6,
        "sliding_window": 256,
        "query_pre_attn_scalar": 64, "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "moe": {
        **BASE, **_EXPERTS, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "recurrent": {
        **BASE, **_EXPERTS, "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"],
        "num_hidden_layers": 8, "num_experts": 8,
        "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_value_head_dim": 64, "shared_expert_intermediate_size": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [], "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
