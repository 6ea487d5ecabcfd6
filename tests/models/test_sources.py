"""What makes a linear's input is found by running a block; scaling that is moved there changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.evaluation.compare import compare
from quant.models.skeleton import Skeleton
from tests.helpers import FAMILIES, LATENT, copy_model, load_all, quantize, save_all, short_text
from tests.models.mixtures import save_mixture

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_found_is_what_the_rows_of_families_say(kind: str, checkpoints: Callable[..., Path]) -> None:
    skeleton = Skeleton(open_checkpoint(checkpoints(kind)), CPU)
    row = skeleton._row
    assert row is not None
    wanted = {g.linears: (g.source, row.norm_offset if "norm" in g.source else None) for g in row.groups}
    if kind == "phi3":  # its row says so too, and no fold is known for values inside a fused matrix
        wanted = {n: ("", None) if s == ("self_attn.qkv_proj", None) else s for n, s in wanted.items()}
        wanted[("mlp.down_proj",)] = ("", None)
    skeleton._row = None
    found = {g.linears: (g.source, g.norm_offset) for g in skeleton.sourced_groups(0)}
    assert found == wanted
    assert all(p.is_meta for p in skeleton.blocks[0].parameters())


def outliers(folder: Path) -> Path:
    """The model with a few features of each norm's output far larger than the rest."""
    tensors = load_all(folder)
    for name, tensor in tensors.items():
        if "norm" in name and tensor.ndim == 1:
            tensor[::13] *= 40
    save_all(folder, tensors)
    return folder


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_moe_fused", "mixtral"])
def test_a_mixture_that_is_scaled_computes_what_it_did(kind: str, tmp_path: Path) -> None:
    """The router reads what the experts read: it is scaled with them, exactly."""
    source = outliers(save_mixture(tmp_path / "model", kind))
    options: dict[str, Any] = {"calibration_dataset": [short_text()], "samples": 8, "sequence_length": 64}
    options |= {"method": "none", "format": "plain", "outlier_suppression": "awq"}
    report = quantize(source, tmp_path / "out", **options)
    assert report["function"]["preserved"] and report["function"]["kl"] < 1e-10
    scaled = {n for f in report["folds"].values() for n in f["linears"] if f["factors"] != [1.0, 1.0]}
    experts = {n for n in scaled if ".experts." in n}
    assert any(n.endswith(("gate_proj", "w1")) for n in experts)
    folded = {n for f in report["folds"].values() if f["kind"] == "linear" for n in f["linears"]}
    assert sum(n.endswith(("down_proj", "w2")) and ".experts." in n for n in folded) == 8
    assert any(n.endswith(".gate") for n in scaled), "the router"
    router = next(n for n in report["tensors"]["folded"] if n.endswith(".gate.weight"))
    before, after = load_all(source)[router], load_all(tmp_path / "out")[router]
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("deepseek_v3", LATENT), ("cohere", {}), ("gptj", {}), ("olmo2", {}), ("starcoder2", {})],
)
def test_families_without_a_row_are_scaled_where_it_is_proved(
    kind: str, changes: dict[str, Any], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = outliers(copy_model(checkpoints(kind, **changes), tmp_path / "model"))
    options: dict[str, Any] = {"calibration_dataset": [short_text()], "samples": 8, "sequence_length": 64}
    options |= {"method": "none", "format": "plain", "outlier_suppression": "awq"}
    report = quantize(source, tmp_path / "out", **options)
    assert report["function"]["preserved"]
    kinds = {f["kind"] for f in report["folds"].values()}
    assert "linear" in kinds and ("norm" in kinds) == (kind != "olmo2")  # whose norms make no input


def test_a_quantized_mixture_is_compared_without_its_scaling(tmp_path: Path) -> None:
    source = outliers(save_mixture(tmp_path / "model", "qwen3_moe"))
    report = quantize(
        source,
        tmp_path / "out",
        method="awq",
        group_size=32,
        calibration_dataset=[short_text()],
        samples=8,
        sequence_length=64,
    )
    assert report["verify"]["passed"]
    found = {t.name: t for t in compare(tmp_path / "out", source).tensors}
    router = found["model.layers.0.mlp.gate.weight"]
    assert router.equal and router.scaled
    assert all(t.snr_db is None or t.snr_db > 10 for t in found.values())
