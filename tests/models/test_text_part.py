"""A wrapper's config says the same of its text decoder to planner, formats, verification and deployment,
under whatever key the decoder's part stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.catalog import model_from_directory
from quant.checkpoint.reader import open_checkpoint
from quant.evaluation.inspect import inspect
from quant.evaluation.texts import chunk_length
from quant.evaluation.verify import verify
from quant.formats import find_format
from quant.pipeline.plan import plan_job
from quant.recipe import Recipe
from quant.serving.deployment import DeploymentRequest, plan
from quant.vllm.config import head_size, heads_of, stated_dtype

PATHS = ((), ("text_config",), ("llm_config",), ("language_config",), ("thinker_config", "text_config"))


def wrapped(source: Path, folder: Path, path: tuple[str, ...], **changes: Any) -> Path:
    """The checkpoint with its config, all but the architecture, under the keys of ``path``."""
    config = json.loads((source / "config.json").read_text()) | changes
    architectures = config.pop("architectures")
    for key in reversed(path):
        config = {key: config}
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name not in ("config.json", "vllm_config.json"):
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    return folder


@pytest.mark.parametrize("path", PATHS, ids=lambda p: ".".join(p) or "the whole")
def test_context_dtype_and_quantization_are_those_of_the_text_part(
    path: tuple[str, ...], quantized: Callable[..., Path], llama: Path, tmp_path: Path
) -> None:
    folder = wrapped(quantized(), tmp_path / "wrapper", path, dtype="float16", max_position_embeddings=192)
    spec, checkpoint = model_from_directory(folder), open_checkpoint(folder)
    layers = find_format(checkpoint.config, checkpoint.tensors)
    assert layers is not None and layers.format == "compressed-tensors" and len(layers.linears) == 14
    assert spec.quantization is not None and spec.quantization["quant_method"] == "compressed-tensors"
    assert (spec.max_context, spec.dtype, stated_dtype(checkpoint.config)) == (192, "float16", "F16")
    arguments = {a.name: a.value for a in plan(folder, DeploymentRequest()).arguments}
    assert (arguments["max-model-len"], arguments["dtype"]) == (192, "float16")
    assert chunk_length(None, checkpoint) == 192 and head_size(checkpoint.config) == spec.head_dim
    assert heads_of(checkpoint.config) == spec.shared_heads
    assert verify(folder).passed and inspect(folder)["schemes"] == {"W4 g32 symmetric": 14}


@pytest.mark.parametrize("path", PATHS, ids=lambda p: ".".join(p) or "the whole")
def test_a_source_is_quantized_alike_under_whatever_key_its_text_part_stands(
    path: tuple[str, ...], llama: Path, tmp_path: Path
) -> None:
    folder = wrapped(llama, tmp_path / "wrapper", path, dtype="float16")
    recipe = Recipe(model_path=folder, output_path=tmp_path / "out", method="minmax", group_size=32)
    job = plan_job(recipe)
    assert len(job.linears) == 14 and job.dtype == "F16"
    stored = [t.spec for u in job.units for s in u.shards for t in s.tensors]
    assert {s.dtype for s in stored if s.name.endswith("weight_scale")} == {"F16"}
