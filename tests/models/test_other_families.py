"""Families whose files and classes differ in ways of their own: transformers makes several parameters of one
tensor or several tensors of one module, a wrapper's names are not its decoder's, attention is called with its
mask by name. Their files are what their configs imply, and a block-by-block run gives the model's own
logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import QuantError
from quant.models.built import built_problems
from quant.models.implied import implied_problems
from quant.models.skeleton import Skeleton
from tests.helpers import SHAPE, add_tokenizer, quantize, randomize, read_config
from tests.models.test_skeleton import CPU, blockwise_logits

TOKENS = torch.randint(2, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
_SMALL = SHAPE | {"tie_word_embeddings": False, "head_dim": 16}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
_TOWER = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
#: Model type → class, and what its config says. Twelve experts: the tenth comes after the second.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": (  # calls its attention with the mask by name
        "AfmoeForCausalLM",
        _SMALL
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1}
        | {"sliding_window": 16},
    ),
    "aria_text": (  # experts of a layer in two tensors of their own names, inputs first
        "AriaTextForCausalLM",
        _SMALL | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 64},
    ),
    "aria": (
        "AriaForConditionalGeneration",
        {
            "text_config": _SMALL
            | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 64},
            "vision_config": {"model_type": "idefics3_vision", **_TOWER},
            "projector_patch_to_query_dict": {4: 4},
        },
    ),
    "inkling_text": (  # the router has a row for the shared expert, too
        "InklingForCausalLM",
        _SMALL | _ROUTED | {"num_local_experts": 4},
    ),
    "mistral4": (  # not listed as a causal language model
        "Mistral4ForCausalLM",
        {k: v for k, v in _SMALL.items() if k != "head_dim"} | _LATENT | _ROUTED,
    ),
    "step3p7": (  # the tower's queries, keys and values are one tensor of the file
        "Step3p7ForConditionalGeneration",
        {
            "text_config": _SMALL
            | _ROUTED
            | {"sliding_window": 16, "share_expert_dim": 32, "pad_token_id": 1},
            "vision_config": _TOWER,
        },
    ),
    "minimax_m3_vl": (  # renames what is in its decoder's blocks, which the decoder alone does not
        "MiniMaxM3SparseForConditionalGeneration",
        {
            "text_config": _SMALL | _ROUTED | {"num_local_experts": 4, "dense_intermediate_size": 96},
            "vision_config": _TOWER | {"projection_dim": 64},
        },
    ),
    "ernie4_5_vl_moe": (  # experts of two modules under one numbering
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": _SMALL
            | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
            | {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": [64, 32]}
            | {"moe_num_shared_experts": 1, "tie_word_embeddings": True},
            "vision_config": {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2},
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of these families, each made once."""
    import transformers

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            name, settings = OTHERS[kind]
            if not hasattr(transformers, name):
                pytest.skip(f"transformers {transformers.__version__} has no {name}")
            config = transformers.AutoConfig.for_model(kind, **settings)
            model: Any = getattr(transformers, name)._from_config(config, dtype=torch.float32)
            randomize(model)
            folder = tmp_path_factory.mktemp(kind) / "model"
            model.bfloat16().save_pretrained(folder)
            add_tokenizer(folder)
            made[kind] = folder
        return made[kind]

    return get


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_families_are_what_their_config_implies(
    kind: str, others: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(others(kind))
    assert implied_problems(checkpoint.tensors, checkpoint.config) == []
    assert built_problems(checkpoint) == []


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_run_block_by_block_as_the_whole_model(
    kind: str, others: Callable[[str], Path]
) -> None:
    import transformers

    folder = others(kind)
    model = getattr(transformers, OTHERS[kind][0]).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(input_ids=TOKENS).logits
    found = blockwise_logits(Skeleton(open_checkpoint(folder), CPU, torch.float32), [TOKENS])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "target"), [("afmoe", "vllm"), ("aria_text", "other"), ("mistral4", "vllm")]
)
def test_calibrated_methods_take_other_families(
    kind: str, target: str, others: Callable[[str], Path], tmp_path: Path
) -> None:
    source = others(kind)
    report = quantize(source, tmp_path / "out", method="gptq", group_size=32, target=target)
    assert report["verify"]["passed"] and not report["fallbacks"]
    assert any(".experts." in name for name in report["tensors"]["quantized"])


def test_experts_that_vllms_loader_would_lose_are_refused_and_may_be_left_out(
    others: Callable[[str], Path], tmp_path: Path
) -> None:
    source = others("aria")
    with pytest.raises(QuantError, match=r"leaves half of each empty.*--ignore '\*\.experts\.\*'"):
        quantize(source, tmp_path / "out", group_size=32)
    report = quantize(source, tmp_path / "out", group_size=32, ignore=["*.experts.*"])
    assert report["verify"]["passed"] and not any(".experts." in n for n in report["tensors"]["quantized"])
    # vLLM's own names of single experts are none of the mapper's
    ignored = read_config(tmp_path / "out")["quantization_config"]["ignore"]
    asked = "language_model.model.layers.0.mlp.experts.3.gate_proj"
    assert any(n.startswith("re:") and re.match(n[3:], asked) for n in ignored)
    report = quantize(source, tmp_path / "other", group_size=32, target="other")
    assert sum(".experts." in n for n in report["tensors"]["quantized"]) == 2 * 4 * 3
