"""Output errors measured from outside: scales that were moved do not count, damage does."""

from __future__ import annotations

from pathlib import Path

import torch

from quant.evaluation.layers import output_errors
from tests.helpers import copy_model, load_all, save_all

TOKENS = torch.randint(2, 4000, (1, 48), generator=torch.Generator().manual_seed(0))
BLOCK = "model.layers.1."


def changed(llama: Path, folder: Path, damage: str = "") -> Path:
    """The model with the outputs of ``up`` scaled and ``down`` making up for it; and one row of a linear
    doubled."""
    copy = copy_model(llama, folder)
    tensors = {k: v.float() for k, v in load_all(copy).items()}
    factors = torch.exp2(torch.arange(96) % 5 - 2.0)
    tensors[f"{BLOCK}mlp.up_proj.weight"] *= factors[:, None]
    tensors[f"{BLOCK}mlp.down_proj.weight"] /= factors
    if damage:
        tensors[f"{BLOCK}{damage}.weight"][3] *= 2
    save_all(copy, {k: v.bfloat16() for k, v in tensors.items()})
    return copy


def test_scales_moved_between_linears_count_only_where_none_may_be(llama: Path, tmp_path: Path) -> None:
    path = changed(llama, tmp_path / "model")
    moved = output_errors(path, llama, TOKENS, scaled=True)
    assert len(moved) == 14 and max(moved.values()) < 1e-6
    plain = output_errors(path, llama, TOKENS)
    assert plain[f"{BLOCK}mlp.up_proj"] > 0.1
    assert max(e for n, e in plain.items() if n != f"{BLOCK}mlp.up_proj") < 1e-6


def test_damage_is_seen_whatever_was_moved(llama: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("mlp.gate_proj", "self_attn.k_proj", "mlp.down_proj")):
        found = output_errors(changed(llama, tmp_path / str(number), name), llama, TOKENS, scaled=True)
        assert found[f"{BLOCK}{name}"] > 1e-3, name
        assert max(e for n, e in found.items() if not n.startswith(BLOCK)) < 1e-6
