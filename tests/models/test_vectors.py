"""Biases and norms: those that a file has beyond its config, or lacks, are named by every command alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import open_checkpoint
from quant.errors import Problems
from quant.evaluation.agreement import demand_agreement, file_problems
from quant.evaluation.inspect import inspect
from quant.evaluation.verify import verify
from quant.models.implied import implied_problems
from quant.models.vectors import lost_bias
from quant.pipeline.plan import plan_job
from tests.helpers import FAMILIES, GENERIC, LATENT, copy_model, load_all, make_checkpoint, recipe, save_all


@pytest.mark.parametrize("kind", [*FAMILIES, *GENERIC])
def test_no_vector_of_a_family_is_too_many(kind: str, checkpoints: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(checkpoints(kind))
    assert implied_problems(checkpoint.tensors, checkpoint.config, is_zero=lambda name: False) == []


def vector(name: str, size: int) -> TensorInfo:
    return TensorInfo(name, "BF16", (size,), Path(), 0, 2 * size)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("llama", "self_attn.q_proj.bias", "attention_bias false"),
        ("llama", "mlp.down_proj.bias", "mlp_bias false"),
        ("llama", "self_attn.q_norm.weight", "no such parameter"),
        ("llama", "input_layernorm.bias", "no such parameter"),
        ("qwen2", "self_attn.o_proj.bias", "no such parameter"),
        ("qwen3", "self_attn.k_proj.bias", "attention_bias false"),
    ],
)
def test_a_vector_without_a_parameter(
    kind: str, name: str, said: str, checkpoints: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(checkpoints(kind))
    full = f"model.layers.1.{name}"
    headers = {**checkpoint.tensors, full: vector(full, 64)}
    (line,) = implied_problems(headers, checkpoint.config, is_zero=lambda name: False)
    assert full in line and said in line and "remove the tensor" in line
    # zeros change nothing, and where values cannot be read nothing is said
    for is_zero in (lambda name: name == full, None):
        assert implied_problems(headers, checkpoint.config, is_zero=is_zero) == []


def test_vllm_reads_switches_that_transformers_has_not(checkpoints: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(checkpoints("llama"))
    name = "model.layers.0.self_attn.q_proj.bias"
    headers = {**checkpoint.tensors, name: vector(name, 64)}
    config = {**checkpoint.config, "qkv_bias": True}
    assert implied_problems(headers, config, is_zero=lambda name: False) == []


@pytest.mark.parametrize(
    ("kind", "changes", "lost", "said"),
    [
        ("qwen2", {}, ".self_attn.k_proj.bias", "config.json implies it"),
        ("llama", {"attention_bias": True}, "", "config.json implies it"),
        ("phi", {}, ".self_attn.dense.bias", "'phi' has it"),
        ("qwen3", {}, "layers.1.self_attn.q_norm.weight", "'qwen3' has it"),
        ("llama", {}, "layers.0.post_attention_layernorm.weight", "'llama' has it"),
    ],
)
def test_a_vector_that_is_missing(
    kind: str, changes: dict[str, bool], lost: str, said: str, checkpoints: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(checkpoints(kind))
    headers = {n: i for n, i in checkpoint.tensors.items() if not lost or not n.endswith(lost)}
    problems = implied_problems(headers, {**checkpoint.config, **changes})
    assert problems and all("is not in the file" in line and said in line for line in problems)


def test_a_part_that_some_blocks_lack_takes_its_norms_along(tmp_path: Path) -> None:
    """Of GLM-5.2's blocks few have an indexer, and the others take over what it chose; attention of all has
    norms, though."""
    sizes = {**LATENT, "index_head_dim": 32, "index_n_heads": 2}
    model = make_checkpoint(
        tmp_path / "model", "glm_moe_dsa", num_hidden_layers=3, index_topk_freq=4, **sizes
    )
    checkpoint = open_checkpoint(model)
    norm = ".self_attn.indexer.k_norm.weight"
    assert sum(n.endswith(norm) for n in checkpoint.tensors) == 2
    assert file_problems(checkpoint, build=True) == []
    for lost in (f"layers.1{norm}", "layers.2.self_attn.q_a_layernorm.weight"):
        headers = {n: i for n, i in checkpoint.tensors.items() if not n.endswith(lost)}
        (line,) = implied_problems(headers, checkpoint.config)
        assert lost in line and "is not in the file" in line


def test_commands_alike(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    model = copy_model(checkpoints("llama"), tmp_path / "model")
    tensors = load_all(model)
    size = len(tensors["model.layers.0.self_attn.q_proj.weight"])
    for value, wrong in ((-0.0, False), (0.25, True)):
        save_all(model, {**tensors, name: torch.full((size,), value, dtype=torch.bfloat16)})
        checked = verify(model)
        assert checked.passed is not wrong and (name in str(checked.failed)) is wrong
        assert any(name in line for line in inspect(model)["disagreements"]) is wrong
        if wrong:
            with pytest.raises(Problems, match="attention_bias false"):
                demand_agreement(open_checkpoint(model), build=False)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("qwen3", "self_attn.o_proj.bias"), ("gemma", "self_attn.k_proj.bias")],
)
def test_biases_of_which_vllm_has_no_parameter(
    kind: str, name: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers computes with them, so only vLLM's readers are told."""
    model = copy_model(checkpoints(kind, attention_bias=True), tmp_path / "model")
    assert file_problems(open_checkpoint(model)) == []
    assert f"model.layers.0.{name}" in str(verify(model).failed) and verify(model, target="other").passed
    with pytest.raises(Problems, match="--target other"):
        plan_job(recipe(model, tmp_path / "output", method="fp8"))
    plan_job(recipe(model, tmp_path / "output", method="fp8", target="other"))
    save_all(model, {n: t * 0 if n.endswith(".bias") else t for n, t in load_all(model).items()})
    assert verify(model).passed


def test_biases_of_towers_are_of_no_account(checkpoints: Callable[..., Path]) -> None:
    """SigLIP's attention has biases beside a Gemma that has none."""
    checkpoint = open_checkpoint(checkpoints("gemma"))
    names = [f"vision_tower.encoder.layers.{i}.self_attn.q_proj.bias" for i in range(2)]
    tower = {n: vector(n, 64) for n in names} | {
        n.replace("bias", "weight"): replace(vector(n.replace("bias", "weight"), 64), shape=(64, 64))
        for n in names
    }
    headers = {
        f"language_model.{n}": replace(i, name=f"language_model.{n}") for n, i in checkpoint.tensors.items()
    }
    config = {"model_type": "paligemma", "text_config": checkpoint.config, "vision_config": {}}
    assert lost_bias({**tower, **headers}, config, lambda name: False) is None
    own = "language_model.model.layers.0.self_attn.q_proj.bias"
    found = lost_bias({**tower, **headers, own: vector(own, 64)}, config, lambda name: False)
    assert found is not None and own in found
