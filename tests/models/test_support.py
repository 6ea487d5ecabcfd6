"""What this build can run for a model, and that commands which are printed are ones that run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.architectures import ModelSpec
from quant.catalog import catalogue, find_model
from quant.errors import QuantError, UsageError
from quant.models.adapter import ModelRegistry
from quant.models.support import (
    DATA_FREE,
    GENERIC,
    TRANSPOSED,
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
MOE = {"num_experts_per_tok": 2, "head_dim": 16}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": MOE | {"num_local_experts": 4},
    "qwen3_moe": MOE | {"num_experts": 4, "moe_intermediate_size": 32},
    "gpt_oss": MOE | {"num_local_experts": 4, "sliding_window": 16},
}


def prepared(model: Path, output: Path, **options: Any) -> None:
    """Everything that a job checks before its first block."""
    plan = plan_job(recipe(model, output, **options))
    QuantizationManager(plan).prepare()


@pytest.mark.parametrize("kind", sorted(GENERIC))
def test_families_that_are_known_to_be_run_without_a_row_are(
    kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoints(kind, **SETTINGS.get(kind, NEEDED.get(kind, {})))
    config = helpers.read_config(model)
    assert config["model_type"] == kind and not any(kind in a.model_types for a in ModelRegistry)
    assert makeable_methods(config, PRESETS["w4a16"]) == ("gptq", "minmax")
    prepared(model, tmp_path / "out", method="gptq", group_size=32)


@pytest.mark.parametrize("kind", [*MIXTURES, "gpt_neox"])
def test_families_whose_blocks_are_not_run_are_refused_as_it_says(
    kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoints(kind, **MIXTURES.get(kind, {}))
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
    mixture, gpt2 = find_model("Qwen/Qwen3-30B-A3B"), {"model_type": "gpt2"}
    assert "experts of model type 'qwen3_moe'" in str(method_problem(mixture, PRESETS["w4a16"], "gptq"))
    assert "activations of nvfp4 take" in str(scheme_problem(mixture, PRESETS["nvfp4"]))
    assert "--outlier-suppression smooth_quant" in str(scheme_problem(mixture, PRESETS["w8a8-int8"]))
    assert "transposed" in str(scheme_problem(gpt2, PRESETS["w4a16"])) and "gpt2" in TRANSPOSED
    assert "no kernel" in str(scheme_problem(mixture, PRESETS["w2a16"]))
    assert scheme_problem(mixture, PRESETS["w4a16"]) is None
    granite = find_model("ibm-granite/granite-3.1-8b-instruct")
    assert "add a row" in str(scheme_problem(granite, PRESETS["w8a8-int8"]))
    unnamed = Scheme("novel", WeightScheme(4, 64, True, "float", "group", "U8"))
    assert makeable_methods(granite, unnamed) == makeable_methods(granite, UNQUANTIZED) == ()


def test_a_wrapper_is_not_taken_for_its_text_decoder() -> None:
    assert makeable_methods(find_model("google/gemma-3-1b-it"), PRESETS["w4a16"]) == ("gptq", "minmax")
    for wrapper in ("google/gemma-3-27b-it", "Qwen/Qwen2.5-VL-7B-Instruct"):
        assert makeable_methods(find_model(wrapper), PRESETS["w4a16"]) == ("minmax",)


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
        assert command["method"] == found.method == methods[0], spec.name
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


@pytest.mark.parametrize("kind", ["llama", "granite", *MIXTURES])
def test_printed_commands_pass_every_check_of_the_job(
    kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    sides = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_attention_heads": 4}
    sides |= {"moe_intermediate_size": 128} if kind == "qwen3_moe" else {}
    model = checkpoints(kind, **MIXTURES.get(kind, {}) | sides)
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
        calibrated = values["method"] not in DATA_FREE or values.get("outlier_suppression")
        if calibrated or row.scheme.activations and row.scheme.activations.calibrated:
            text = {"samples": 4, "sequence_length": 32, "calibration_dataset": [short_text()]}
            prepared(model, output, **values, **text)
        else:
            plan_job(recipe(model, output, **values))
    assert made >= 12


def test_a_scheme_without_a_method_takes_one_that_runs(checkpoints: Callable[..., Path], llama: Path) -> None:
    mixture = checkpoints("mixtral", **MIXTURES["mixtral"])
    assert method_for(PRESETS["w4a16"], llama) == ("gptq", "")
    method, note = method_for(PRESETS["w4a16"], mixture)
    assert method == "minmax" and note.startswith("--method minmax instead of gptq: ")
    with pytest.raises(UsageError, match="missing --method: --outlier-suppression smooth_quant"):
        method_for(PRESETS["w8a8-int8"], mixture)
    assert method_for(PRESETS["w8a8-int8"], mixture, {"outlier_suppression": "none"}) == ("minmax", "")
    with pytest.raises(UsageError, match="missing --method: scheme 'w3a16' has no default one"):
        method_for(PRESETS["w3a16"], llama)


def test_a_mixture_is_recommended_a_scheme_that_is_made(tmp_path: Path) -> None:
    mixtral = json.loads(json.dumps(catalogue()["mistralai/Mixtral-8x7B-v0.1"]["config"]))
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    file = tmp_path / "config.json"
    for gpu, schemes in (("L40S-48GB", "w4a16"), ("B200", "none"), ("A100-80GB", "w8a16")):
        found = choose(file, tmp_path / "out", gpu=gpu, tensor_parallel=None, vllm_version="0.32")
        assert found.recommended == schemes and (found.method == "minmax") == (schemes != "none")
        assert {p.scheme for p in found.plans} == {"none", "w8a8-fp8", "w8a16", "w4a16"}
