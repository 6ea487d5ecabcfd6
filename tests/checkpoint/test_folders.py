"""Folders and files that are no checkpoint of safetensors: named, with a step that works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError
from tests.helpers import copy_model, load_all, save_all

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n"


CASES: list[tuple[str, dict[str, bytes], list[str]]] = [
    (
        "adapter",
        {
            "adapter_config.json": json.dumps({"base_model_name_or_path": "org/base"}).encode(),
            "adapter_model.safetensors": b"",
        },
        ["is an adapter (LoRA) of org/base", "merge_and_unload", "--enable-lora"],
    ),
    (
        "adapter with a config",
        {"adapter_config.json": b"{}", "adapter_model.safetensors": b"", "config.json": b"{}"},
        ["is an adapter (LoRA):"],
    ),
    (
        "GGUF",
        {"m.Q4_K_M.gguf": b"GGUF", "config.json": b"{}"},
        ["m.Q4_K_M.gguf: not a valid GGUF file", "Download or copy it again"],
    ),
    (
        "raw Mistral",
        {"consolidated.safetensors": b"", "params.json": b"{}"},
        ["its maker's own layout (consolidated.safetensors)", "model-….safetensors"],
    ),
    ("raw Mistral with a config", {"consolidated.00.pth": b"", "config.json": b"{}"}, ["maker's own layout"]),
    (
        "pickles",
        {"pytorch_model.bin": b"", "config.json": b"{}"},
        ["pickled weights", "(pytorch_model.bin)", "save_pretrained('NEW')"],
    ),
    ("a training", {"trainer_state.json": b"{}", "optimizer.pt": b"", "config.json": b"{}"}, ["a training"]),
    (
        "TensorFlow",
        {"tf_model.h5": b"", "config.json": b"{}"},
        ["weights of another framework (tf_model.h5)"],
    ),
    (
        "pointers",
        {"model.safetensors": POINTER, "config.json": b"{}"},
        ["pointer of Git LFS", "git lfs pull"],
    ),
    ("a pointer for a config", {"model.safetensors": b"", "config.json": POINTER}, ["pointer of Git LFS"]),
    (
        "a page",
        {"model.safetensors": b"<!DOCTYPE html><html>" + b" " * 60, "config.json": b"{}"},
        ["web page"],
    ),
]


@pytest.mark.parametrize(("case", "files", "said"), CASES, ids=[c[0] for c in CASES])
def test_what_it_is_and_the_next_step_are_said(
    case: str, files: dict[str, bytes], said: list[str], tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    for part in said:
        assert part in str(refused.value), part


def test_a_file_and_a_folder_above_a_model_are_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="not a valid GGUF file"):
        open_checkpoint(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="is one file of a model: give its folder"):
        open_checkpoint(llama / "model.safetensors")
    (tmp_path / "model.gguf").unlink()
    copy_model(llama, tmp_path / "checkpoint-500")
    with pytest.raises(CheckpointError, match=r"one lies in .*checkpoint-500: give that folder"):
        open_checkpoint(tmp_path)


def test_matrices_of_an_adapter_and_an_optimizer_are_no_model(llama: Path, tmp_path: Path) -> None:
    """Unless the adapter is a part of the model, whose own matrices are then called base_layer."""
    folder = copy_model(llama, tmp_path / "model")
    tensors = load_all(folder)
    name = "model.layers.0.self_attn.q_proj"
    save_all(folder, {**tensors, f"{name}.lora_A.weight": torch.ones(4, 64)})
    with pytest.raises(
        CheckpointError, match=r"matrices of an adapter \(model.layers.0.self_attn.q_proj.lora_A"
    ):
        open_checkpoint(folder)
    whole = {
        **tensors,
        f"{name}.lora_A.v.weight": torch.ones(4, 64),
        f"{name}.base_layer.weight": torch.ones(4, 4),
    }
    save_all(folder, whole)
    assert len(open_checkpoint(folder).tensors) == len(whole)
    save_all(folder, {**tensors, f"{name}.exp_avg": torch.ones(4)})
    with pytest.raises(CheckpointError, match="holds the state of an optimizer"):
        open_checkpoint(folder)


def test_an_adapter_beside_a_model_is_not_the_model(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert [f.name for f in open_checkpoint(folder).weight_files] == ["pytorch_model.safetensors"]
