"""Every matrix of the decoder is accounted for: none stays in 16 bits unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import QuantError
from quant.models.account import account, decoder_matrices, rest_problems
from quant.models.linears import decoder_refs
from tests.helpers import change_config, load_all, quantize, read_config, save_all
from tests.models.mixtures import save_mixture


def _with_odd_experts(folder: Path) -> Path:
    """A mixture whose experts lie in one matrix under a name that no row knows, as DBRX's do."""
    save_mixture(folder, "qwen3_moe_fused")
    tensors = {}
    for name, value in load_all(folder).items():
        if name.endswith("experts.gate_up_proj"):
            tensors[name.replace("gate_up_proj", "mlp.w1")] = value.flatten(0, 1)
        else:
            tensors[name] = value
    save_all(folder, tensors)
    # a class of the model's own, of whose names nothing is known
    change_config(folder, architectures=["M"], auto_map={"AutoModelForCausalLM": "m.M"})
    return folder


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_fused", "gpt_oss"])
def test_a_mixture_is_quantized_whole(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_mixture(tmp_path / "m", family))
    refs = decoder_refs(checkpoint.tensors, checkpoint.config)
    weights = account(checkpoint.tensors, checkpoint.config, refs, refs)
    total = sum(w.elements for w in weights)
    assert total == sum(i.numel for i in decoder_matrices(checkpoint.tensors, checkpoint.config).values())
    assert sum(w.quantized for w in weights) == sum(r.n * r.k for r in refs.values())
    assert all(w.rest >= 0 and w.asked == 0 for w in weights)
    assert {w.name.rsplit(".layers.", 1)[1][2:] for w in weights if w.rest} <= {
        "mlp.gate.weight",
        "mlp.router.weight",
        "mlp.experts.gate_up_proj_bias",
        "mlp.experts.down_proj_bias",
    }
    assert rest_problems(weights, checkpoint.tensors) == []


def test_experts_that_no_method_takes_stop_the_job_and_ignore_lets_it_run(tmp_path: Path) -> None:
    folder = _with_odd_experts(tmp_path / "m")
    with pytest.raises(
        QuantError, match=r"% of the decoder's weights would stay in 16 bits.*mlp\.w1 \[256, 64\].*--ignore"
    ):
        quantize(folder, tmp_path / "out", group_size=32)
    assert not (tmp_path / "out").exists()
    report = quantize(folder, tmp_path / "out", group_size=32, ignore=["*.experts.mlp.w1"], target="other")
    assert torch.equal(
        load_all(tmp_path / "out")["model.layers.0.mlp.experts.mlp.w1"],
        load_all(folder)["model.layers.0.mlp.experts.mlp.w1"],
    )
    assert report["bits_per_weight"] > 8, "what stays counts"
    stacks = {f"model.layers.{i}.mlp.experts.mlp.w1" for i in (0, 1)}
    assert stacks <= set(report["unquantized_linears"])
    assert stacks <= set(read_config(tmp_path / "out")["quantization_config"]["ignore"])


def test_layers_that_the_job_leaves_are_asked_for(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path / "m", "qwen3_moe")
    report = quantize(folder, tmp_path / "out", group_size=32, layers="first:1")
    whole = quantize(folder, tmp_path / "whole", group_size=32)
    stored = sum(
        t.nbytes for n, t in load_all(tmp_path / "whole").items() if ".layers." in n and "norm" not in n
    )
    elements = sum(t.numel() for n, t in load_all(folder).items() if ".layers." in n and t.ndim == 2)
    assert whole["bits_per_weight"] == pytest.approx(8 * stored / elements, rel=0.01)
    assert 10 < report["bits_per_weight"] < 11, "half of it in 4 bits and scales, half in 16"
