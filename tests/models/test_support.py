"""What this build can run for a model, and that commands which are printed are ones that run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.catalog import catalogue, find_model
from quant.errors import QuantError, UsageError
from quant.jobs import ResolvedJob, resolve
from quant.models.adapter import ModelRegistry
from quant.models.spec import ModelSpec
from quant.models.support import (
    DATA_FREE,
    GRADIENTS,
    RUN,
    makeable_methods,
    method_problem,
    scheme_problem,
)
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.plan import plan_job
from quant.planning import EngineRequest, recommend
from quant.planning.target import choose, method_for
from quant.quantizers import QuantizerRegistry
from quant.schemes import PRESETS, SCHEMES, UNQUANTIZED, Scheme, WeightScheme
from quant.vllm.architectures import architecture_problem
from quant.vllm.config import stated
from tests import helpers
from tests.helpers import GENERIC as NEEDED
from tests.helpers import recipe, short_text

#: What tiny models of the families need beyond the shape, where they are not among the helpers'.
SETTINGS: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "cohere2": {"sliding_window": 16},
    "exaone4": {"sliding_window": 16},
    "falcon": {"new_decoder_architecture": False},
    "gemma": {"head_dim": 16},
    "glm4": {"head_dim": 16, "pad_token_id": 1},
    "gpt_bigcode": {"n_embd": 64, "n_head": 4, "n_layer": 2},
    "gemma3n_text": {
        "head_dim": 16,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 4096,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "laurel_rank": 32,
        "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "ministral": {"sliding_window": 16, "head_dim": 16},
    "ministral3": {"head_dim": 16},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1},
    "phi": {"pad_token_id": 1},
    "seed_oss": {"head_dim": 16},
    "smollm3": {"pad_token_id": 1},
}
HYBRID = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
}
MOE = {"num_experts_per_tok": 2, "head_dim": 16}
NUMBERED = MOE | {"num_experts": 4, "moe_intermediate_size": 32}
SHARED = NUMBERED | {"shared_expert_intermediate_size": 32}
LATENT = helpers.LATENT | {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
SETTINGS |= (
    {
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "qwen3_5_text": HYBRID,
        "gemma4_text": {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        "deepseek_v2": LATENT,
        "deepseek_v3": LATENT | {"n_group": 2, "topk_group": 1},
        "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
        "glm4_moe": MOE | {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1},
        "gpt_oss": MOE | {"num_local_experts": 4, "sliding_window": 16},
        "granitemoehybrid": MOE | {"num_local_experts": 4, "layer_types": ["attention"] * 2},
        "hunyuan_v1_moe": MOE | {"num_experts": 4, "moe_topk": 2},
        "llama4_text": MOE | {"num_local_experts": 4, "intermediate_size_mlp": 96},
        "nemotron_h": MOE
        | {
            "hybrid_override_pattern": "M*-E",
            "num_hidden_layers": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
        },
        "olmoe": MOE | {"num_experts": 4},
        "qwen2_moe": SHARED,
        "qwen3_moe": NUMBERED,
        "qwen3_5_moe_text": HYBRID | SHARED,
        "qwen3_next": HYBRID | SHARED,
    }
    | {
        "afmoe": NUMBERED
        | {"num_dense_layers": 1, "sliding_window": 16, "layer_types": ["full_attention"] * 2},
        "cohere2_moe": MOE | {"num_experts": 4},
        "cwm": {"head_dim": 16, "sliding_window": 16},
        "deepseek_v32": LATENT | {"n_group": 2, "topk_group": 1},
        "dots1": NUMBERED | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
        "falcon_h1": {
            "head_dim": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
        "flex_olmo": MOE | {"num_experts": 4, "pad_token_id": 1},
        "glm4_moe_lite": LATENT | {"n_group": 1, "topk_group": 1},
        "glm_moe_dsa": LATENT | {"n_group": 1, "topk_group": 1},
        "hy_v3": NUMBERED,
        "jais2": {"head_dim": 16},
        "jamba": MOE
        | {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
            "num_hidden_layers": 4,
        },
        "kimi_linear": LATENT
        | {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_expert_group": 1,
            "topk_group": 1,
            "linear_num_heads": 4,
            "linear_head_dim": 16,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
        "laguna": NUMBERED,
        "lfm2_moe": NUMBERED | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
        "mimo_v2_flash": MOE | {"n_routed_experts": 4, "moe_intermediate_size": 32},
        "minicpm3": {"num_key_value_heads": 4},
        "olmo_hybrid": HYBRID,
        "solar_open": MOE
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1},
        "vaultgemma": {"head_dim": 16, "sliding_window": 16, "pad_token_id": 1},
    }
    | dict.fromkeys(  # fmt: skip
        ("granitemoe", "granitemoeshared", "minimax_m2", "mixtral", "phimoe"), MOE | {"num_local_experts": 4}
    )
)
#: Wrappers: type of the whole → of its text decoder, and what that needs beyond the shape.
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 16}),
    "qwen2_vl": ("qwen2_vl_text", {"rope_parameters": ROTARY}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {"rope_parameters": ROTARY}),
    "qwen3_vl": ("qwen3_vl_text", {"rope_parameters": ROTARY, "head_dim": 16}),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", NUMBERED | {"rope_parameters": ROTARY}),
}


def prepared(model: Path, output: Path, **options: Any) -> None:
    """Everything that a job checks before its first block."""
    plan = plan_job(recipe(model, output, **options))
    QuantizationManager(plan).prepare()


@pytest.mark.parametrize("kind", sorted(RUN - {text for text, _ in WRAPPERS.values()}))
def test_families_that_are_known_to_be_run_without_a_row_are(
    kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoints(kind, **SETTINGS.get(kind, NEEDED.get(kind, {})))
    config = helpers.read_config(model)
    assert config["model_type"] == kind and not any(kind in a.model_types for a in ModelRegistry)
    # vLLM's loader of the one cannot reorder packed words, and takes the other's experts in MXFP4
    made = kind not in ("bloom", "gpt_oss")
    solved = ("gptq", "yaqa", "minmax") if stated(config, "experts") else ("yaqa", "gptq", "minmax")
    assert makeable_methods(config, PRESETS["w4a16"]) == (solved if made else ())
    target = "vllm" if made and architecture_problem(config) is None else "other"
    prepared(model, tmp_path / "out", method="gptq", group_size=32, target=target)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_decoders_inside_wrappers_are_run(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    text_type, text = WRAPPERS[kind]
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    vision |= {"embed_dim": 32, "hidden_size": 64} if kind == "qwen2_vl" else {}
    vision |= {"deepstack_visual_indexes": [0]} if kind.startswith("qwen3") else {}
    described = AutoConfig.for_model(kind, text_config=helpers.SHAPE | text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(described, dtype=torch.bfloat16)
    helpers.randomize(model)
    helpers.save_model(model, tmp_path / "model")
    config = helpers.read_config(tmp_path / "model")
    assert (config["model_type"], config["text_config"]["model_type"]) == (kind, text_type)
    solved = ("gptq", "yaqa", "minmax") if stated(config, "experts") else ("yaqa", "gptq", "minmax")
    assert makeable_methods(config, PRESETS["w4a16"]) == solved
    assert makeable_methods(config, PRESETS["w8a8-int8"])
    prepared(tmp_path / "model", tmp_path / "out", method="gptq", group_size=32)


def test_a_family_that_transformers_does_not_have_is_refused_as_it_says(llama: Path, tmp_path: Path) -> None:
    model = helpers.copy_model(llama, tmp_path / "model")
    helpers.change_config(model, model_type="martian")
    config = helpers.read_config(model)
    for scheme, methods in (("w4a16", ("minmax",)), ("w8a8-fp8", ("fp8",)), ("nvfp4", ()), ("w8a8-int8", ())):
        assert makeable_methods(config, PRESETS[scheme]) == methods, scheme
    assert makeable_methods(config, PRESETS["w8a8-int8"], {"outlier_suppression": "none"}) == ("minmax",)
    with pytest.raises(QuantError):
        prepared(model, tmp_path / "out", method="gptq", group_size=32)
    plan_job(recipe(model, tmp_path / "out", method="minmax", group_size=32))


def test_methods_that_need_no_data_are_those_without_statistics() -> None:
    assert DATA_FREE == {kind.name for kind in QuantizerRegistry if not kind.needs} | {"fp8"}


def test_reasons_name_what_stands_against_a_scheme() -> None:
    unknown = find_model("internlm/internlm2_5-7b-chat")
    assert "'internlm2' has no row" in str(method_problem(unknown, PRESETS["w4a16"], "gptq"))
    assert "activations of nvfp4 take" in str(scheme_problem(unknown, PRESETS["nvfp4"]))
    assert "--outlier-suppression smooth_quant" in str(scheme_problem(unknown, PRESETS["w8a8-int8"]))
    assert "no kernel" in str(scheme_problem(unknown, PRESETS["w2a16"]))
    assert scheme_problem(unknown, PRESETS["w4a16"]) is None
    granite = find_model("ibm-granite/granite-3.1-8b-instruct")
    assert makeable_methods(granite, PRESETS["w8a8-int8"]) == makeable_methods(
        {"model_type": "llama"}, PRESETS["w8a8-int8"]
    )
    unnamed = Scheme("novel", WeightScheme(4, 64, True, "float", "group", "U8"))
    assert makeable_methods(granite, unnamed) == makeable_methods(granite, UNQUANTIZED) == ()
    dense, mixture = find_model("google/gemma-4-E4B-it"), find_model("mistralai/Mixtral-8x7B-Instruct-v0.1")
    assert makeable_methods(dense, PRESETS["w4a16"]) == ("yaqa", "gptq", "minmax")
    assert makeable_methods(mixture, PRESETS["w4a16"]) == ("gptq", "yaqa", "minmax")


def test_experts_that_vllm_would_compute_wrongly_are_refused_for_it(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoints("gpt_oss", **SETTINGS["gpt_oss"])
    config = helpers.read_config(model)
    assert "--scheme mxfp4a16 in --format mxfp4" in str(scheme_problem(config, PRESETS["w4a16"]))
    assert makeable_methods(config, PRESETS["mxfp4a16"]) == ("gptq", "yaqa", "minmax")
    wanted = {"method": "minmax", "group_size": 32}
    with pytest.raises(QuantError, match=r"experts.*'gpt_oss'.*--ignore '\*\.experts\.\*'.*--target other"):
        plan_job(recipe(model, tmp_path / "out", **wanted))
    plan_job(recipe(model, tmp_path / "out", target="other", **wanted))
    plan_job(recipe(model, tmp_path / "out", ignore=["*.experts.*"], **wanted))


def test_a_spec_and_its_config_give_the_same_answer() -> None:
    for name, entry in catalogue().items():
        for scheme in ("w4a16", "w8a8-int8", "nvfp4"):
            answers = [makeable_methods(m, PRESETS[scheme]) for m in (find_model(name), entry["config"])]
            assert answers[0] == answers[1], (name, scheme)


# -- what is printed runs ------------------------------------------------------------------------------------


def words(command: str) -> dict[str, str]:
    """The options of a printed ``quant quantize``, as keys of a recipe."""
    given = shlex.split(command)[2:]
    return {k[2:].replace("-", "_"): v for k, v in zip(given[::2], given[1::2], strict=True)}


def check_commands(spec: ModelSpec, **options: Any) -> int:
    """How many `quant quantize` a recommendation prints; each must be one that can be made."""
    found = recommend(spec, "H100", gpu_count=8, **options)
    commands = [words(c) for c in found.commands if c.startswith("quant quantize")]
    for command in commands:
        methods = makeable_methods(spec, PRESETS[command["scheme"]])
        assert found.method == methods[0], spec.name
        taken = ("effort", "balanced") if found.method in GRADIENTS else ("method", found.method)
        assert command[taken[0]] == taken[1] and len(command.keys() & {"method", "effort"}) == 1
        assert command["scheme"] == found.recommended
    if found.recommended not in (None, "none") and not commands:
        assert found.method is None and "does not make" in found.notes[-1], spec.name
    return len(commands)


def test_commands_for_every_model_of_the_catalogue_are_ones_that_can_be_made() -> None:
    specs = [find_model(name) for name in catalogue()]
    assert sum(check_commands(spec, scheme="w4a16") for spec in specs) > 150
    one_of_each = {(spec.model_type, spec.moe is not None): spec for spec in specs}.values()
    for scheme in (None, "w8a8-fp8", "w8a8-int8", "nvfp4"):
        assert sum(check_commands(spec, scheme=scheme) for spec in one_of_each) > (scheme is not None)


@pytest.mark.parametrize("kind", ["llama", "granite", "mixtral", "qwen3_moe"])
def test_printed_commands_pass_every_check_of_the_job(
    kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    sides = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_attention_heads": 4}
    sides |= {"moe_intermediate_size": 128} if kind == "qwen3_moe" else {}
    model = checkpoints(kind, **SETTINGS.get(kind, {}) | sides)
    made = 0
    for name, row in SCHEMES.items():
        if not row.methods:
            continue
        output = tmp_path / name
        found = recommend(model, "H100", EngineRequest(), scheme=name, output_path=str(output))
        assert found.recommended == name, found.reason
        if not found.commands:
            assert kind != "llama" and scheme_problem(helpers.read_config(model), row.scheme)
            continue
        made += 1
        values: dict[str, Any] = words(found.commands[0])
        assert values.pop("model_path") == str(model) and values.pop("output_path") == str(output)
        if values.pop("effort", None):
            values["method"] = found.method
        calibrated = values["method"] not in DATA_FREE or values.get("outlier_suppression")
        if calibrated or row.scheme.activations and row.scheme.activations.calibrated:
            text = {"samples": 4, "sequence_length": 32, "calibration_dataset": [short_text()]}
            prepared(model, output, **values, **text)
        else:
            plan_job(recipe(model, output, **values))
    assert made >= 12


def test_a_scheme_without_a_method_takes_one_that_runs(
    checkpoints: Callable[..., Path], llama: Path, tmp_path: Path
) -> None:
    unknown = helpers.copy_model(llama, tmp_path / "model")
    helpers.change_config(unknown, model_type="martian")
    assert method_for(PRESETS["w4a16"], llama) == ("yaqa", "")
    assert method_for(PRESETS["w4a16"], llama, effort="fast") == ("gptq", "")
    assert method_for(PRESETS["w8a16"], llama, effort="best") == ("minmax", "")
    method, note = method_for(PRESETS["w4a16"], unknown)
    assert method == "minmax" and note.startswith("--method minmax instead of yaqa: ")
    assert method_for(PRESETS["w4a16"], unknown, effort="fast")[1].startswith(
        "--method minmax instead of gptq: "
    )
    with pytest.raises(UsageError, match="missing --method: --outlier-suppression smooth_quant"):
        method_for(PRESETS["w8a8-int8"], unknown)
    assert method_for(PRESETS["w8a8-int8"], unknown, {"outlier_suppression": "none"}) == ("minmax", "")
    # no kernel of vLLM reads it: it is made for other engines as four bits are
    assert method_for(PRESETS["w3a16"], llama) == ("yaqa", "")
    assert method_for(PRESETS["w2a16"], llama, effort="fast") == ("gptq", "")
    resolved = resolve({"model_path": unknown, "output_path": tmp_path / "out", "scheme": "w4a16"})
    assert isinstance(resolved, ResolvedJob) and (resolved.recipe.method, resolved.notes) == (method, (note,))


def test_a_mixture_is_recommended_a_scheme_that_is_made(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(catalogue()["mistralai/Mixtral-8x7B-v0.1"]["config"]))
    for gpu, scheme, method in (
        ("L40S-48GB", "w4a16", "gptq"),
        ("B200", "w8a8-fp8", "fp8"),
        ("A100-80GB", "w8a16", "minmax"),
    ):
        found = choose(file, tmp_path / "out", gpu=gpu, tensor_parallel=None, vllm_version="0.32")
        assert (found.recommended, found.method) == (scheme, method)
