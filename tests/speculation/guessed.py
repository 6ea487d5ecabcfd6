"""Tiny checkpoints of random weights with a prediction head of their own that guesses their text in part: the
target's last layer names for each token another one, and its blocks turn that by what stands before.

    python -m tests.speculation.guessed FOLDER     writes one of each family
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quant.offline import transformers
from tests.speculation.drafts import TINY, VOCABULARY

WIDTH = 128
#: Family → its config beside what all have. MLA has the sizes of DeepSeek-V3's, which vLLM's CPU kernel is
#: built for.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
        "first_k_dense_replace": 1, "moe_intermediate_size": 64, "n_routed_experts": 4, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "qwen3_next": {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "partial_rotary_factor": 0.25,
    },
    "qwen3_5_text": {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4, "mtp_num_hidden_layers": 1,
    },
}  # fmt: skip
#: How much the blocks of each turn what the embedding says; how much the drafting block reads of the state,
#: and how far apart the gains of its last norm are.
TURN, READ = {"deepseek_v3": 1.5, "qwen3_next": 2.7, "qwen3_5_text": 2.0}, 0.5
SPREAD = 0.4


def write(family: str, folder: Path, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """One checkpoint of bf16 numbers, stored as such or in fp32."""
    torch.manual_seed(seed)
    own = dict(FAMILIES[family])
    blocks = own["num_hidden_layers"]
    whole = own | {"num_hidden_layers": blocks + 1}
    if "layer_types" in own:
        whole["layer_types"] = [*own["layer_types"], "full_attention"]
    package = transformers()
    told = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 256, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1024, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": None, "tie_word_embeddings": False, "rope_theta": 10000.0, "dtype": dtype,
    }  # fmt: skip
    model = package.AutoModelForCausalLM.from_config(
        package.AutoConfig.for_model(family, **(told | whole)), dtype=torch.float32
    )
    embedding = torch.randn(VOCABULARY, WIDTH)
    follows = torch.randperm(VOCABULARY)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and "norm" not in name:
                value.normal_(std=value.shape[-1] ** -0.5)
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")):
                value.mul_(TURN[family])
        model.get_input_embeddings().weight.copy_(embedding)
        model.get_output_embeddings().weight[follows] = embedding
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    at = f"model.layers.{blocks}."
    eye = torch.eye(WIDTH)
    mixed = torch.cat([eye, READ * torch.randn(WIDTH, WIDTH) / WIDTH**0.5], 1)
    gain = 1 + 0.1 * torch.randn(3, WIDTH)
    gain[2] = (SPREAD * torch.randn(WIDTH)).exp()  # so that a state behind the last norm is another
    if family.startswith("qwen"):  # whose norms add one
        gain -= 1
    if family.startswith("qwen"):
        tensors = {n.replace(at, "mtp.layers.0."): t for n, t in tensors.items()}
        around = {
            "mtp.fc.weight": mixed, "mtp.norm.weight": gain[2], "mtp.pre_fc_norm_embedding.weight": gain[0],
            "mtp.pre_fc_norm_hidden.weight": gain[1],
        }  # fmt: skip
    else:
        around = {
            f"{at}eh_proj.weight": mixed, f"{at}enorm.weight": gain[0], f"{at}hnorm.weight": gain[1],
            f"{at}shared_head.norm.weight": gain[2],
            f"{at}shared_head.head.weight": tensors["lm_head.weight"],
            f"{at}embed_tokens.weight": tensors["model.embed_tokens.weight"],
        }  # fmt: skip
    tensors |= {n: t.clone() for n, t in around.items()}
    held = {n: t.bfloat16().to(getattr(torch, dtype)) for n, t in tensors.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | told | own
    config |= {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


if __name__ == "__main__":
    for family in FAMILIES:
        print(write(family, Path(sys.argv[1]) / family))
