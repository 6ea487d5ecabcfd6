"""One rule of tensor parallelism: what the planner refuses is what `quantize`, `verify` and deployment
refuse, for every architecture of the catalogue."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.catalog import catalogue, find_model
from quant.checkpoint.header import TensorInfo
from quant.errors import Problems, VerificationFailed
from quant.evaluation.verify import verify
from quant.hardware import named_gpu
from quant.models.linears import built_linears, decoder_refs
from quant.pipeline.plan import plan_job
from quant.planning.cuts import group_problems, parallel_problems
from quant.planning.memory import plan
from quant.planning.request import EngineRequest
from quant.recipe import Recipe
from quant.schemes import PRESETS, WeightScheme
from quant.serving.deployment import DeploymentRequest
from quant.serving.deployment import plan as plan_deployment
from quant.vllm.config import Heads, heads_of
from quant.vllm.layers import Linear, shape_problems, split_of

DEGREES = range(1, 17)
#: Schemes that vLLM loads, one of each grid of groups, blocks and words; others are cut as one of these is.
SCHEMES = ("w4a16", "w8a16", "w8a8-int8", "w8a8-fp8", "fp8-block", "nvfp4", "mxfp4", "mxfp8")


def headers(name: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config of a catalogue's model, and the tensors of a block of each kind as a file's header lists
    them; of experts the first."""
    blocks: dict[int, dict[str, tuple[int, ...]]] = {}
    for weight in find_model(name).weights:
        if weight.layer >= 0 and weight.role != "mtp":
            blocks.setdefault(weight.layer, {})[weight.name] = weight.shape
    infos = {}
    for layer, block in {str(block): (layer, block) for layer, block in blocks.items()}.values():
        for part, shape in block.items():
            suffix = "" if part.endswith((".weight", ".bias")) else ".weight"
            tensor = f"model.layers.{layer}.{re.sub(r'(?<![^.])experts[.]', 'experts.0.', part)}{suffix}"
            infos[tensor] = TensorInfo(tensor, "BF16", shape, Path("m.safetensors"), 0, 0)
    return catalogue()[name]["config"], infos


def architectures() -> list[str]:
    """One model of the catalogue for each set of linears and heads."""
    names: dict[Any, str] = {}
    for name in catalogue():
        spec = find_model(name)
        names.setdefault((frozenset((w.name, w.shape) for w in spec.linear_kinds), spec.shared_heads), name)
    return list(names.values())


@pytest.mark.parametrize("name", architectures())
def test_the_planner_refuses_what_verify_quantize_and_deployment_refuse(name: str) -> None:
    spec, (config, tensors) = find_model(name), headers(name)
    heads, names = heads_of(config), list(decoder_refs(tensors, config))
    for ranks in DEGREES:
        refused = shape_problems(built_linears(tensors, config, {}), ranks, heads)
        assert bool(parallel_problems(spec, ranks)) == bool(refused), (ranks, refused)
    for scheme in SCHEMES:
        preset = PRESETS[scheme]
        quantized = {n: Linear(n, *tensors[f"{n}.weight"].shape, preset.weights) for n in names}
        linears = built_linears(tensors, config, quantized)
        for ranks in DEGREES:
            refused = shape_problems(linears, ranks, heads)
            assert bool(group_problems(spec, preset, ranks)) == bool(refused), (scheme, ranks, refused)


def test_schemes_left_out_are_cut_as_one_of_those_tested() -> None:
    def cuts(weights: WeightScheme) -> tuple[object, ...]:
        return weights.group_size, weights.strategy == "block", weights.bits < 16

    assert {cuts(s.weights) for s in PRESETS.values()} == {cuts(PRESETS[s].weights) for s in SCHEMES}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        # its own blocks: 128 heads, experts of 2048; the projections into latents are copied to every rank
        ("deepseek-ai/DeepSeek-V3", [1, 2, 4, 8, 16]),
        ("Qwen/Qwen3-30B-A3B-FP8", [1, 2]),  # experts of 768: 6 blocks, 32 heads
        ("openai/gpt-oss-120b", [1, 2, 4, 8, 16]),  # its experts' groups are padded for each rank
    ],
)
def test_quantized_sources_are_accepted_at_the_degrees_at_which_vllm_serves_them(
    name: str, allowed: list[int]
) -> None:
    spec = find_model(name)
    assert spec.quantization
    assert [t for t in DEGREES if not group_problems(spec, None, t)] == allowed


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "column"), ("model.layers.0.self_attn.k_proj.bias", "kv"),
        ("model.layers.0.self_attn.o_proj.weight_packed", "row"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa", "none"),
        ("model.layers.3.self_attn.q_a_proj", "none"),
        ("model.layers.3.self_attn.kv_b_proj", "column"), ("model.layers.3.self_attn.indexer.wq_b", "none"),
        ("model.layers.0.self_attn.f_a_proj", "none"), ("model.layers.0.self_attn.f_b_proj", "column"),
        ("model.layers.0.mlp.gate.weight", "none"), ("model.layers.0.mlp.shared_expert_gate.weight", "none"),
        ("model.layers.0.mlp.experts.down_proj_blocks", "row"),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", "row"),
        ("model.layers.0.block_sparse_moe.experts.3.w3.weight", "column"),
        ("gpt_neox.layers.0.attention.dense.weight", "row"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "column"),
        ("transformer.h.0.attn.c_attn.weight", "column"), ("transformer.h.0.mlp.c_proj.weight", "row"),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", "column"), ("backbone.layers.0.mixer.D", "column"),
        ("model.layers.0.input_layernorm.weight", "none"), ("model.layers.0.unheard.of.weight", "none"),
        ("model.embed_tokens.weight", "vocab"), ("lm_head.weight", "vocab"), ("output.weight", "vocab"),
        ("transformer.wpe.weight", "none"),
    ],
)  # fmt: skip
def test_a_weight_is_cut_as_vllms_layer_of_that_name_cuts_it(name: str, split: str) -> None:
    assert split_of(name) == split


def test_fewer_kv_heads_than_ranks_are_repeated_and_never_cut() -> None:
    heads = Heads(attention=32, kv=4)

    def problems(last: str, outputs: int, ranks: int) -> list[str]:
        linear = Linear(f"model.layers.0.self_attn.{last}", outputs, 4096, PRESETS["fp8-block"].weights)
        return shape_problems([linear], ranks, heads)

    for ranks in (4, 8, 16):  # four heads of 128, however many ranks
        assert problems("k_proj", 512, ranks) == [] == problems("qkv_proj", 4096 + 2 * 512, ranks)
    assert problems("k_proj", 256, 2) == []
    (cut,) = problems("k_proj", 256, 4)
    assert "256 outputs over --tensor-parallel 4 do not divide into blocks of 128" in cut
    (cut,) = problems("qkv_proj", 2048 + 2 * 256, 4)  # stored as one, taken apart when it is loaded
    assert "256 outputs over --tensor-parallel 4 do not divide into blocks of 128" in cut


def test_heads_that_ranks_cannot_share_are_named_with_the_degrees_that_can() -> None:
    assert shape_problems([], 3, Heads(4, 2)) == [
        "4 attention heads over --tensor-parallel 3 do not divide: tensor parallel sizes that do: 1, 2, 4"
    ]
    (kv,) = shape_problems([], 4, Heads(24, 6))
    assert kv.startswith(
        "6 KV heads over --tensor-parallel 4 do not divide: tensor parallel sizes that do: 1, 2"
    )
    (state,) = shape_problems([], 8, Heads(8, 8, (16, 4)))
    assert state.startswith("4 heads of recurrent layers over --tensor-parallel 8 do not divide")


def test_every_command_refuses_ranks_that_do_not_divide_the_heads(
    llama: Path, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    assert json.loads((llama / "config.json").read_text())["num_attention_heads"] == 4
    said = "4 attention heads over --tensor-parallel 3 do not divide: tensor parallel sizes that do: 1, 2, 4"
    for folder in (llama, quantized()):  # 16 bits, and 4
        assert any(said in failed for failed in verify(folder, tensor_parallel=3).failed)
        with pytest.raises(VerificationFailed, match="4 attention heads over --tensor-parallel 3"):
            plan_deployment(folder, DeploymentRequest(tensor_parallel=3))
    assert verify(llama, tensor_parallel=2).passed
    recipe = Recipe(
        model_path=llama, output_path=tmp_path / "out", method="minmax", group_size=32, tensor_parallel=3
    )
    with pytest.raises(Problems) as refused:
        plan_job(recipe)
    assert said in refused.value.problems


@pytest.mark.parametrize(("gpu", "remedy"), [("H200-141GB", ", or --tensor-parallel 8"), ("L40S-48GB", "")])
def test_ranks_are_advised_where_they_would_be_enough(gpu: str, remedy: str) -> None:
    """DeepSeek-V3's 629 GiB in FP8; sixteen L40S do not hold it."""
    made = plan(find_model("deepseek-ai/DeepSeek-V3"), [named_gpu(gpu)], None, EngineRequest())
    assert "no room for a KV cache" in made.why
    assert made.remedy == f"a smaller scheme, a larger GPU{remedy}"


def test_a_degree_that_does_not_divide_is_answered_with_what_does() -> None:
    """Another degree, and smaller groups where they divide; never where none does."""
    spec = find_model("meta-llama/Llama-2-7b-hf")  # 11008 inputs: 86 groups of 128
    gpus = [named_gpu("L40S-48GB")] * 8
    four, eight = (plan(spec, gpus[:n], PRESETS["w4a16"], EngineRequest(tensor_parallel=n)) for n in (4, 8))
    assert "groups of 128" in four.why
    assert four.remedy == "--tensor-parallel 2, or --group-size 64 when quantizing"
    assert eight.remedy == "--tensor-parallel 2, or --group-size 32 when quantizing"
    sixteen = shape_problems([Linear("x.down_proj", 64, 11008, PRESETS["w4a16"].weights)], 16)
    assert "--group-size" not in sixteen[0]
