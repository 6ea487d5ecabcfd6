"""gpt-oss' own MXFP4, written: the layout of the published files, read by transformers' code and ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import Problems
from quant.evaluation.verify import verify
from quant.formats.reading import dequantized
from quant.jobs import ResolvedJob, resolve
from quant.pipeline import units
from quant.pipeline.export import export
from quant.pipeline.plan import plan_job
from tests.formats.quantized_sources import publish
from tests.helpers import (
    change_config,
    copy_model,
    load_all,
    make_checkpoint,
    quantize,
    read_config,
    recipe,
    save_all,
    weight_files,
)
from tests.models.mixtures import FAMILIES

OURS: dict[str, Any] = {"scheme": "mxfp4a16", "format": "mxfp4"}
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss in bf16; groups of 32 divide both sides of its experts."""
    settings = FAMILIES["gpt_oss"] | {"intermediate_size": 96}
    return make_checkpoint(tmp_path_factory.mktemp("oss") / "source", "gpt_oss", **settings)


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    quantize(source, source.parent / "made", **OURS)
    return source.parent / "made"


def test_files_are_laid_out_as_published(source: Path, made: Path, tmp_path: Path) -> None:
    publish(source, tmp_path / "published", "mxfp4 experts")
    ours, published, before = load_all(made), load_all(tmp_path / "published"), load_all(source)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in published.items()
    }
    # biases, sinks and routers as they were
    assert all(torch.equal(ours[n], t) for n, t in before.items() if n in ours)
    stated = read_config(made)["quantization_config"]
    assert stated["quant_method"] == "mxfp4"
    assert {"model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"} == set(
        stated["modules_to_not_convert"]
    )
    assert verify(made, source=source).failed == []


def test_values_are_those_that_transformers_decodes(source: Path, made: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, values, before = load_all(made), dequantized(open_checkpoint(made)), load_all(source)
    for last in ("gate_up_proj", "down_proj"):
        name = f"{EXPERTS}.{last}"
        blocks, scales = (tensors[f"{name}_{part}"] for part in ("blocks", "scales"))
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(values.read(name), theirs)
        assert torch.equal(values.read_index(name, 2), theirs[2])
        error = (theirs - before[name].float()).norm() / before[name].float().norm()
        assert 0.05 < error < 0.13  # of 4 bits; gates and ups in each other's places would be 1.4


def test_what_is_mxfp4_already_is_not_rounded_further(made: Path, tmp_path: Path) -> None:
    quantize(made, tmp_path / "again", **OURS)
    before, after = load_all(made), load_all(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_plain_values_go_back_into_the_layout_of_the_source(source: Path, made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "plain", "plain")
    before, after = load_all(source), load_all(tmp_path / "plain")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    name = f"{EXPERTS}.gate_up_proj"
    assert torch.equal(after[name], dequantized(open_checkpoint(made)).read(name).to(torch.bfloat16))


def test_calibrated_and_stopped_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = OURS | {"method": "gptq", "samples": 8, "sequence_length": 64}
    report = quantize(source, tmp_path / "whole", **job)
    assert report["fallbacks"] == [] and len(report["experts"]) == 2
    write, done = units.write_unit, []

    def stopping(*args: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return write(*args)

    with monkeypatch.context() as patched:
        patched.setattr(units, "write_unit", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "stopped", **job)
    quantize(source, tmp_path / "stopped", **job)
    assert weight_files(tmp_path / "stopped") == weight_files(tmp_path / "whole")


def test_the_one_form_is_chosen_and_others_are_refused(source: Path, llama: Path, tmp_path: Path) -> None:
    request = {"model_path": source, "output_path": tmp_path / "out", "scheme": "mxfp4a16"}
    resolved = resolve(request)
    assert isinstance(resolved, ResolvedJob) and resolved.recipe.format == "mxfp4"
    assert any("'gpt_oss'" in note for note in resolved.notes)
    kept = resolve(request | {"target": "other"})
    assert isinstance(kept, ResolvedJob) and kept.recipe.format == "compressed-tensors"
    wrong: dict[str, tuple[Path, dict[str, Any]]] = {
        "as --scheme mxfp4a16 in --format mxfp4 alone": (source, {"group_size": 16}),
        "in --format mxfp4 alone": (source, {"scheme": "mxfp4a16"}),
        "that of model type gpt_oss alone": (llama, OURS),
        "use --scheme mxfp4a16": (source, {"format": "mxfp4", "group_size": 32}),
        "all of its experts in one tensor": (source, OURS | {"ignore": ["*.experts.3.*"], "target": "other"}),
    }
    for words, (model, options) in wrong.items():
        with pytest.raises(Problems, match=words):
            plan_job(recipe(model, tmp_path / "out", **options))


def test_experts_that_are_left_are_ignored_by_an_expression(source: Path, tmp_path: Path) -> None:
    """vLLM renames plain names that end in ``down_proj`` in the list, and asks for them by the old ones."""
    quantize(source, tmp_path / "out", group_size=32, ignore=["*.experts.*"])
    ignored = read_config(tmp_path / "out")["quantization_config"]["ignore"]
    expressions = [re.compile(x.removeprefix("re:")) for x in ignored if x.startswith("re:")]
    asked = [f"{EXPERTS}.0.{last}" for last in ("gate_proj", "up_proj", "down_proj")]
    assert all(any(e.match(name) for e in expressions) for name in asked)
    assert not any(e.match("model.layers.1.self_attn.q_proj") for e in expressions)


def test_foreign_files_in_other_forms_are_not_passed(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", group_size=32, target="other")
    assert any("in --format mxfp4 alone" in problem for problem in verify(tmp_path / "out").failed)
    assert verify(tmp_path / "out", target="other").failed == []


def test_a_damaged_file_is_not_passed(made: Path, tmp_path: Path) -> None:
    folder = copy_model(made, tmp_path / "damaged")
    tensors = load_all(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    tensors[f"{EXPERTS}.down_proj_scales"][1, 2, 0] = 0xFF  # E8M0's NaN
    save_all(folder, tensors)
    assert any("NaN" in problem for problem in verify(folder).failed)
    change_config(folder, num_local_experts=8)
    assert any("experts" in problem for problem in verify(folder).failed)
