"""Keys of config.json that transformers passes over though they change what a model computes are named, and
tensors that its model has no parameter for are no job's to lose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError
from quant.models.ignored_keys import ignored_note
from quant.models.skeleton import Skeleton
from quant.offline import load_config
from tests.helpers import change_config, copy_model, load_all, quantize, read_config, save_all


def test_a_model_type_that_is_no_name_is_refused_as_any_other(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "m")
    change_config(folder, model_type={"llama": 1})
    with pytest.raises(CheckpointError, match="cannot use it: it knows no model_type {'llama': 1}"):
        load_config(folder)


def note_of(folder: Path, **changes: Any) -> str | None:
    change_config(folder, **changes)
    return ignored_note(read_config(folder), load_config(folder))


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"embedding_multiplier": 12.0, "logits_scaling": 8}, ["embedding_multiplier (12.0)"]),
        ("llama", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping (30.0)"]),
        ("qwen3", {"clip_qkv": 8}, ["clip_qkv (8)"]),
        ("llama", {"hidden_activation": "gelu"}, ["hidden_activation ('gelu')"]),
        ("llama", {"layer_norm_epsilon": 1e-3}, ["layer_norm_epsilon (0.001)"]),
        ("gpt_neox", {"layer_norm_eps": 1e-3}, []),
        ("llama", {"hidden_activation": "silu", "clip_qkv": None, "logit_scale": 1.0, "alibi": False}, []),
        ("llama", {"note_of_the_author": 3.0}, []),
        # as files of transformers 4 have them
        ("llama", {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": None}, []),
        (
            "llama",
            {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            [],
        ),
        ("gpt_neox", {"rope_parameters": ..., "rotary_pct": 0.25, "rotary_emb_base": 1e4}, []),
        ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0}, []),
    ],
)
def test_what_changes_the_arithmetic_and_is_not_read_is_named(
    kind: str, changes: dict[str, Any], named: list[str], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    note = note_of(copy_model(checkpoints(kind), tmp_path / "m"), **changes)
    assert (note is not None) == bool(named)
    assert all(n in (note or "") for n in named)


def test_a_job_says_so_and_its_output_keeps_every_key(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "m")
    old = {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"}
    change_config(folder, scale_emb=12, **old)
    report = quantize(folder, tmp_path / "out", method="gptq", group_size=32, target="other")
    assert any("LlamaConfig reads no scale_emb (12)" in n for n in report["calibration"]["notes"])
    source, made = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    assert made.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert made == source


@pytest.mark.parametrize("name", ["q_proj.bias", "q_norm.weight"])
def test_a_vector_that_the_model_has_no_parameter_for_is_no_leftover(
    name: str, llama: Path, tmp_path: Path
) -> None:
    """Biases of a config without attention_bias, norms of another family: only zeros say nothing."""
    folder = copy_model(llama, tmp_path / "m")
    tensors = load_all(folder)
    whole = f"model.layers.1.self_attn.{name}"
    tensors[whole] = torch.zeros(64, dtype=torch.bfloat16)
    save_all(folder, tensors)
    Skeleton(open_checkpoint(folder), torch.device("cpu"))
    tensors[whole][3] = 0.5
    save_all(folder, tensors)
    with pytest.raises(CheckpointError, match=f"{whole} is in the file only.*--method minmax"):
        Skeleton(open_checkpoint(folder), torch.device("cpu"))
