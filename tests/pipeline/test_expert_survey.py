"""Schemes chosen for a size where layers are mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import quant
from quant.checkpoint.journal import WorkFolder
from quant.errors import QuantError
from quant.pipeline import mixing, survey
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.searching import search
from quant.progress import silent
from quant.quantizers.nearest import round_to_nearest
from quant.report.files import RECIPE
from tests.helpers import add_tokenizer, quantize, recipe, short_text, weight_files
from tests.models.mixtures import mixture
from tests.pipeline.test_expert_gradients import reference

TEXT: dict[str, Any] = {"samples": 8, "sequence_length": 64, "calibration_dataset": [short_text()]}


@pytest.mark.parametrize("method", ["minmax", "gptq", "yaqa"])
def test_the_experts_of_a_layer_are_chosen_for_together(
    method: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = checkpoints("mixtral"), tmp_path / "o"
    report = quantize(source, output, method=method, target_bits=6.0, **TEXT)
    chosen = report["allocation"]
    assert 5.3 < report["bits_per_weight"] <= 6.0
    # a router of random weights sends other tokens to other experts at the least error
    assert chosen["predicted"] == pytest.approx(chosen["measured"]["mean"], rel=0.6)
    kinds = {x["name"]: x["scheme"] for x in report["layers"]}
    for block in range(2):
        own = {kinds.get(n) for n in kinds if n.startswith(f"model.layers.{block}.") and ".experts." in n}
        assert len(own) == 1
    items = [x for x in chosen["layers"] if "experts" in x["name"]]
    assert len(items) == 2 and all(c["nats"] > 0 for x in items for c in x["choices"][:-1])
    values = yaml.safe_load((output / RECIPE).read_text())
    again = quant.quantize(quant.make_recipe({**values, "output_path": tmp_path / "again"}))
    assert again.output_hash == report["output_hash"] and weight_files(tmp_path / "again") == weight_files(
        output
    )


def test_a_mixture_is_searched(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """All its blocks: what is foretold is what was measured, of the same tensors that a job makes."""
    source = checkpoints("mixtral")
    job = recipe(source, tmp_path / "o", target_bits=6.0, gpu="H100", **TEXT)
    found = search(job, blocks=1, rows=8).to_dict()
    assert found["sampled_blocks"] == [1]
    assert any("rounded inputs of routed experts" in why for why in found["left_out"].values())
    rounded = [e for e in found["candidates"] if e["method"] == "minmax" and e["scheme"] != "mixed"]
    by_size = sorted(rounded, key=lambda e: e["output_bytes"])
    assert len(rounded) >= 3 and by_size[0]["kl"] > 4 * by_size[-1]["kl"] > 0
    whole = search(job, blocks=2, rows=8).to_dict()["candidates"]
    for few, all_ in zip(found["candidates"], whole, strict=True):
        assert all_["measured_share"] == 1 and few["measured_share"] < 0.9
        # a router of random weights sends other tokens to other experts at the least error
        assert few["kl"] == pytest.approx(all_["kl"], rel=0.8)


def test_losses_are_those_of_the_tokens_that_experts_are_sent(tmp_path: Path) -> None:
    """Against the formula written out, with inputs and gradients of autograd through the whole model."""
    folder = tmp_path / "m"
    mixture("mixtral").save_pretrained(folder)
    add_tokenizer(folder)
    job = recipe(folder, tmp_path / "o", target_bits=6.0, **(TEXT | {"samples": 7, "sequence_length": 32}))
    prepared = mixing.prepare(job)
    manager = QuantizationManager(prepared.plan)
    rows, skeleton = manager.prepare()
    work = WorkFolder(tmp_path / "w", {}, False)
    one = survey.Survey(manager, prepared.pool, prepared.items, work, silent)
    found = one.run(skeleton, rows.tokens[:1], None)  # a single batch, which all sums are of
    work.release()
    seen = iter(reference(folder, rows.tokens[:1], seed=0))
    checked = 0
    for index in (1, 0):
        block, places = skeleton.load_block(index), skeleton.linears(index)
        groups = sorted((g for g in skeleton.groups(index) if g.experts), key=lambda g: g.stage == "down")
        for group in groups:
            for expert in range(4):
                names = [n for n in group.linears if f".experts.{expert}." in n]
                x, g = (t.double() for t in next(seen))
                weight = torch.cat([places[n].get(block).float() for n in names])
                inputs = (x * g.norm(dim=1, keepdim=True)).t() @ (x * g.norm(dim=1, keepdim=True))
                outputs = (g * x.norm(dim=1, keepdim=True)).t() @ (g * x.norm(dim=1, keepdim=True))
                for number, candidate in enumerate(prepared.pool[:-1]):
                    assert candidate.assignment is not None
                    own = [found[f"model.layers.{index}.{n}"][number] for n in names]
                    if own[0] is None:
                        continue
                    made = round_to_nearest(weight, candidate.assignment.scheme.weights, torch.float32)
                    e = (weight - made.dequantize()).double()
                    wanted = float(torch.trace(outputs @ e @ inputs @ e.t())) if len(x) else 0.0
                    if len(x):  # means over its tokens, times its share of all
                        wanted /= 2 * float(inputs.trace()) * 32
                    assert sum(v or 0.0 for v in own) == pytest.approx(wanted, rel=0.02), (index, names)
                    checked += 1
        skeleton.free_block(index)
    assert checked >= 2 * 2 * 4 * 3


def test_rounded_inputs_of_experts_are_refused(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="rounded inputs of routed experts.*use --scheme, which needs none"):
        quantize(
            checkpoints("mixtral"), tmp_path / "o", method="minmax", scheme="nvfp4", target_bits=6.0,
            gpu="B200", **TEXT,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
