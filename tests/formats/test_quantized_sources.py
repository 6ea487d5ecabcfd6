"""Checkpoints that other programs have quantized: the values that they stand for, what is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError
from quant.evaluation.inspect import inspect
from quant.formats import find_format
from quant.formats.reading import dequantized
from quant.models.stacking import stacked
from quant.serving.deployment import DeploymentRequest, plan
from quant.vllm.arguments import engine_arguments
from quant.vllm.names import unread_spellings
from tests.formats.quantized_sources import KINDS, publish
from tests.helpers import SHAPE, add_tokenizer, change_config, load_all, randomize, read_config, save_all
from tests.models.mixtures import FAMILIES

#: Kinds with fused experts → the family that publishes them.
MIXTURES = {
    "mxfp4 experts": "gpt_oss", "fp8 experts": "qwen3_moe_fused", "fbgemm experts": "llama4_text",
    "fp8 experts wide": "qwen3_moe_fused_wide", "modelopt nvfp4 experts": "llama4_text",
    "modelopt nvfp4 rows": "gpt_oss",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An ordinary checkpoint that a kind is made of."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        family = MIXTURES.get(kind)
        if family is None:
            return llama
        if family not in made:
            # a block of 32 divides both sides of the experts; of 128 each projection, or not
            wide = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 4}
            changes = {
                "gpt_oss": {"intermediate_size": 96},
                "qwen3_moe_fused_wide": {**wide, "moe_intermediate_size": 128},
                "qwen3_moe_fused": {**wide, "moe_intermediate_size": 96},
            }
            known = family.removesuffix("_wide")
            config = AutoConfig.for_model(
                known.removesuffix("_fused"), **{**SHAPE, **FAMILIES[known], **changes.get(family, {})}
            )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            randomize(model)
            made[family] = tmp_path_factory.mktemp(family) / "model"
            fused = {"save_original_format": False} if known.endswith("_fused") else {}
            model.save_pretrained(made[family], **fused)
            add_tokenizer(made[family])
        return made[family]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_the_value_that_the_file_stands_for(
    kind: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    values = publish(source(kind), tmp_path / "published", kind)
    stored = open_checkpoint(tmp_path / "published")
    seen = dequantized(stored)
    assert set(seen.tensors) == set(values)
    assert seen.dtype == "BF16" and seen.nbytes == stored.nbytes
    assert "quantization_config" not in seen.config
    assert len(seen.computed) >= 2
    for name, value in values.items():
        read = seen.read(name).float()
        assert tuple(read.shape) == seen.info(name).shape == tuple(value.shape)
        # a divisor has been stored as a multiplier
        assert torch.equal(read, value) or (
            "nvfp4" in kind and torch.allclose(read, value, rtol=3e-7, atol=0.0)
        ), name
        if value.ndim == 3:
            assert torch.equal(seen.read_index(name, 1).float(), read[1])
            assert torch.equal(torch.cat(list(seen.read_rows(name, 2))).float(), read)
    with pytest.raises(CheckpointError, match="computed from quantized tensors"):
        next(iter(seen.read_bytes(next(iter(seen.computed)))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_rounds_the_values_that_the_file_stands_for(
    kind: str, source: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """As it rounds them from an ordinary fp32 checkpoint; of the source's quantization nothing is left."""
    values = publish(source(kind), tmp_path / "published", kind)
    ordinary = tmp_path / "ordinary"
    publish(source(kind), ordinary, kind)
    save_all(ordinary, values)
    change_config(ordinary, quantization_config=...)
    (ordinary / "hf_quant_config.json").unlink(missing_ok=True)
    made = {}
    for folder in (tmp_path / "published", ordinary):
        options = ["--method", "minmax", "--scheme", "w8a16", "--group-size", "16", "--target", "other"]
        done = cli("quantize", "-m", folder, "-o", f"{folder}-out", *options, "--json")
        assert done.code == 0, done.err
        made[folder.name] = json.loads(done.out), load_all(Path(f"{folder}-out"))
    report, tensors = made["published"]
    _, wanted = made["ordinary"]
    assert tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        if "nvfp4" in kind:
            assert torch.allclose(tensors[name].float(), value.float(), rtol=0.01), name
        else:
            assert torch.equal(tensors[name].float(), value.to(tensors[name].dtype).float()), name
    config = read_config(Path(f"{tmp_path / 'published'}-out"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not (Path(f"{tmp_path / 'published'}-out") / "hf_quant_config.json").exists()
    was = report["source"]
    assert was["rounded_anew"] == len(dequantized(open_checkpoint(tmp_path / "published")).computed)
    assert was["dequantized"] == was["kept"] == []
    wide = {n for n, t in tensors.items() if n.endswith(".weight") and t.ndim == 2}
    assert all("embed" in n or "lm_head" in n or "router" in n or ".gate." in n for n in wide)


@pytest.mark.parametrize("kind", ["fp8 block .scale", "modelopt old", "mxfp4 experts"])
def test_calibrated_methods_start_from_it_and_the_result_is_near_its_values(
    kind: str, source: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    from tests.helpers import short_text

    publish(source(kind), tmp_path / "published", kind)
    options = ["--method", "gptq", "--scheme", "w4a16", "--group-size", "16", "--target", "other"]
    text = ["--calibration-dataset", short_text(), "--samples", "8", "--sequence-length", "64"]
    done = cli("quantize", "-m", tmp_path / "published", "-o", tmp_path / "out", *options, *text, "--json")
    assert done.code == 0, done.err
    layers = json.loads(done.out)["layers"]
    errors = [x["error"] for x in layers if x["error"] is not None]
    assert errors and max(errors) < 0.05
    compared = cli("verify", "-m", tmp_path / "out", "--against", tmp_path / "published", "--json")
    assert json.loads(compared.out)


def test_linears_that_are_left_alone_keep_their_codes_where_asked(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """One layer is rounded anew, the other carried over with the bytes that it had; without the option it is
    stored in 16 bits, and the report names it."""
    publish(llama, tmp_path / "published", "modelopt channel")
    common = ["-m", tmp_path / "published", "--method", "minmax", "--scheme", "w4a16", "--group-size", "16"]
    common += ["--target", "other", "--json"]
    kept = cli("quantize", *common, "-o", tmp_path / "kept", "--layers", "0", "--keep-quantized")
    assert kept.code == 0, kept.err
    report, there = json.loads(kept.out), load_all(tmp_path / "kept")
    name = "model.layers.1.mlp.up_proj"
    before = load_all(tmp_path / "published")
    assert torch.equal(there[f"{name}.weight"].view(torch.uint8), before[f"{name}.weight"].view(torch.uint8))
    assert torch.equal(there[f"{name}.weight_scale"].flatten(), before[f"{name}.weight_scale"])
    assert "model.layers.0.mlp.up_proj.weight_packed" in there
    assert len(report["source"]["kept"]) == 7 == report["source"]["rounded_anew"]
    assert len(report["tensors"]["kept"]) == 7
    groups = read_config(tmp_path / "kept")["quantization_config"]["config_groups"].values()
    assert sorted(g["format"] for g in groups) == ["float-quantized", "pack-quantized"]
    wide = cli("quantize", *common, "-o", tmp_path / "wide", "--layers", "0")
    assert wide.code == 0, wide.err
    assert f"{name}.weight" in json.loads(wide.out)["source"]["dequantized"]
    assert load_all(tmp_path / "wide")[f"{name}.weight"].dtype == torch.bfloat16
    nothing = cli("quantize", *common, "-o", tmp_path / "none", "--keep-quantized")
    assert nothing.code == 1 and "leaves nothing to quantize" in nothing.err
    ordinary = ["-m", llama, "-o", tmp_path / "x", "--method", "minmax", "--group-size", "16"]
    assert "there is nothing to keep" in cli("quantize", *ordinary, "--keep-quantized").err


@pytest.mark.parametrize("kind", ["modelopt fp8", "fbgemm", "fp8 scalar", "modelopt nvfp4"])
def test_foreign_codes_go_into_a_format_of_ours_unchanged(
    kind: str, llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    values = publish(llama, tmp_path / "published", kind)
    done = cli(
        "export-vllm", "-m", tmp_path / "published", "-o", tmp_path / "out", "--target", "other", "--json"
    )
    assert done.code == 0, done.err
    seen = dequantized(open_checkpoint(tmp_path / "out"))
    assert set(seen.tensors) == set(values)
    for name, value in values.items():
        assert torch.allclose(seen.read(name).float(), value, rtol=1e-6, atol=0.0), name
    names = {n.rpartition(".")[2] for n in load_all(tmp_path / "out")}
    assert not names & {"activation_scale", "weight_scale_2", "weight_scale_inv"}


@pytest.mark.parametrize("kind", [k for k in MIXTURES if k != "fp8 experts"])
def test_codes_of_experts_in_one_tensor_are_kept_one_expert_a_name(
    kind: str, source: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """By export, and by a job that rounds the first block anew: the values are those of the file, bit for bit
    where the second multiplier is not a divisor now."""
    values = publish(source(kind), tmp_path / "published", kind)
    common = ["-m", tmp_path / "published", "--target", "other", "--format", "compressed-tensors", "--json"]
    scheme = ["--method", "minmax", "--scheme", "w8a16", "--group-size", "16"]
    for name, command in (
        ("exported", ["export-vllm"]),
        ("kept", ["quantize", *scheme, "--keep-quantized", "--layers", "0"]),
    ):
        done = cli(*command, *common, "-o", tmp_path / name)
        assert done.code == 0, done.err
        made = load_all(tmp_path / name)
        assert not any(t.ndim == 3 for t in made.values())
        seen = stacked(dequantized(open_checkpoint(tmp_path / name)), open_checkpoint(source(kind)).tensors)
        experts = [n for n, v in values.items() if v.ndim == 3 and (name == "exported" or ".1." in n)]
        assert experts
        for expert in experts:
            read = seen.read(expert).float()
            assert torch.equal(read, values[expert]) or (
                "nvfp4" in kind and torch.allclose(read, values[expert], rtol=3e-7, atol=0.0)
            ), expert
    assert len(json.loads(done.out)["source"]["kept"]) >= 2


@pytest.mark.parametrize(
    ("scheme", "joint"), [("w4a16", "_"), ("w4a16-asym", "."), ("w8a8-fp8", "."), ("nvfp4a16", "_")]
)
def test_stacked_experts_of_compressed_tensors_are_taken_apart_as_they_are(
    scheme: str, joint: str, source: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """What was stacked from a file of ours becomes that file again; packed, vLLM cannot read it."""
    options = ["--method", "minmax", "--scheme", scheme]
    made = cli("quantize", "-m", source("fp8 experts wide"), "-o", tmp_path / "made", *options)
    assert made.code == 0, made.err
    wanted = load_all(tmp_path / "made")
    stacked_file, rows = {}, dict[str, dict[str, list[torch.Tensor]]]()
    for name in sorted(wanted):
        module, mark, rest = name.partition(".experts.")
        if not mark:
            stacked_file[name] = wanted[name]
            continue
        _, projection, part = rest.split(".")
        rows.setdefault(f"{module}.experts|{part}", {}).setdefault(projection, []).append(wanted[name])
    for key, parts in rows.items():
        module, part = key.split("|")
        end = f".{part}" if joint == "." else part.removeprefix("weight")
        whole = {p: torch.stack([t.view(torch.uint8) if "F8" in str(t.dtype).upper() else t for t in ts])
                 for p, ts in parts.items()}  # fmt: skip
        dtype = parts["down_proj"][0].dtype
        if part == "weight_shape":
            continue
        both = [whole["gate_proj"], whole["up_proj"]]
        one = part == "weight_global_scale"  # gate and up share it
        gate_up = both[0] if one else torch.cat(both, 1)
        for last, value in (("gate_up_proj", gate_up), ("down_proj", whole["down_proj"])):
            stacked_file[f"{module}.{last}{end}"] = value.view(dtype) if value.dtype != dtype else value
    weights = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(tmp_path / "made", tmp_path / "stacked", ignore=weights)
    save_all(tmp_path / "stacked", stacked_file)
    done = cli("verify", tmp_path / "stacked")
    assert (done.code == 4 and "one expert a name" in done.err) == any("packed" in n for n in stacked_file)
    done = cli("export-vllm", "-m", tmp_path / "stacked", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    out = load_all(tmp_path / "out")
    assert out.keys() == wanted.keys()
    assert all(torch.equal(out[n].view(torch.uint8), wanted[n].view(torch.uint8)) for n in wanted)


def test_a_form_that_is_one_familys_alone_is_written_as_it_was_and_in_no_other(
    source: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    publish(source("mxfp4 experts"), tmp_path / "published", "mxfp4 experts")
    done = cli("export-vllm", "-m", tmp_path / "published", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    before, after = load_all(tmp_path / "published"), load_all(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    other = ["--format", "compressed-tensors"]
    done = cli("export-vllm", "-m", tmp_path / "published", "-o", tmp_path / "other", *other)
    assert done.code == 1 and "in --format mxfp4 alone" in done.err
    assert not (tmp_path / "other.work").exists()


def test_zero_multipliers_of_experts_in_one_tensor_are_told(
    source: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    publish(source("fp8 experts wide"), tmp_path / "published", "fp8 experts wide")
    tensors = load_all(tmp_path / "published")
    tensors["model.layers.0.mlp.experts.down_proj_scale_inv"][1] = 0
    save_all(tmp_path / "published", tensors)
    done = cli("verify", tmp_path / "published")
    assert done.code == 4 and "down_proj_scale_inv holds 1 zero scales" in done.err, done.err


def test_multipliers_that_projections_share_are_not_kept(
    source: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Gate and up in one block of 128 outputs: said why, and rounded anew with the rest."""
    publish(source("fp8 experts"), tmp_path / "published", "fp8 experts")
    done = cli("export-vllm", "-m", tmp_path / "published", "-o", tmp_path / "exported")
    assert done.code == 1 and "experts.gate_up_proj: its experts share multipliers" in done.err
    options = ["--method", "minmax", "--group-size", "16", "--target", "other", "--keep-quantized"]
    done = cli("quantize", "-m", tmp_path / "published", "-o", tmp_path / "kept", *options)
    assert done.code == 0 and "gate_up_proj and 1 more cannot be kept" in done.err, done.err
    assert "share multipliers" in done.err
    assert "model.layers.0.mlp.experts.3.up_proj.weight_packed" in load_all(tmp_path / "kept")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"weight_scale_inv": None}, {}, "has no tensor 'model.layers.0.self_attn.q_proj.weight_scale_inv'"),
        ({"weight_scale_inv": (3, 1)}, {}, r"weight_scale_inv is F32 \(3, 1\), the contract for a weight"),
        ({}, {"weight_block_size": [48, 48]}, "the contract for a weight"),
        ({}, {"weight_block_size": [128]}, r"weight_block_size is \[128\]: rows and columns of a block"),
        ({}, {"quant_method": "quark"}, "quant_method 'quark', which is not read here"),
        (
            {},
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            "quant_algo 'W4A8_AWQ' is not read here",
        ),
    ],
)
def test_what_contradicts_itself_or_is_not_known_is_named(
    change: dict[str, Any], config: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    publish(llama, tmp_path / "published", "fp8 block")
    tensors = load_all(tmp_path / "published")
    for last, shape in change.items():
        name = f"model.layers.0.self_attn.q_proj.{last}"
        tensors.pop(name)
        if shape is not None:
            tensors[name] = torch.ones(shape)
    save_all(tmp_path / "published", tensors)
    stated = read_config(tmp_path / "published")["quantization_config"]
    change_config(tmp_path / "published", quantization_config={**stated, **config})
    checkpoint = open_checkpoint(tmp_path / "published")
    with pytest.raises(CheckpointError, match=message):
        find_format(checkpoint.config, checkpoint.tensors)


def test_a_method_that_is_not_read_is_not_said_to_be_unservable(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """vLLM loads Quark's checkpoints, and has no bitsandbytes."""
    publish(llama, tmp_path / "published", "fp8 tensor")
    change_config(tmp_path / "published", quantization_config={"quant_method": "quark"})
    checked = cli("verify", "-m", tmp_path / "published", "--json")
    said = {c["name"]: c for c in json.loads(checked.out)["checks"]}
    assert checked.code == 0 and "not checked" in said["format"]["detail"]
    planned = cli("recommend", "-m", tmp_path / "published", "--gpu", "L40S-48GB")
    assert planned.code == 0, planned.err
    change_config(tmp_path / "published", quantization_config={"quant_method": "bitsandbytes"})
    refused = cli("verify", "-m", tmp_path / "published")
    assert refused.code == 4 and "has no quant_method 'bitsandbytes'" in refused.err


def test_a_config_in_a_file_of_its_own_is_read_and_verify_says_that_vllm_does_not(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    """As AutoGPTQ wrote it; a job reads it all the same, and a plain folder with such a file stays plain."""
    folder = Path(__file__).parents[1] / "fixtures" / "peers" / "auto-gptq"
    found = inspect(folder)
    assert found["format"] == "gptq" and found["quantized_linears"] == 14
    checked = cli("verify", "-m", folder)
    assert checked.code == 4 and "vLLM reads config.json alone: quant export-vllm" in checked.err
    options = ["--method", "minmax", "--scheme", "w8a16", "--group-size", "32", "--target", "other"]
    done = cli("quantize", "-m", folder, "-o", tmp_path / "out", *options, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["source"]["rounded_anew"] == 14


def test_what_vllm_asks_of_foreign_files_is_asked_here(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Seen in vLLM's own loader: FBGEMM's method needs a flag, ModelOpt's head must be left out by name, and
    a Llama knows no names of scales but its own."""
    published = {k: tmp_path / k for k in ("fbgemm", "modelopt fp8", "fp8 scalar")}
    for kind, folder in published.items():
        publish(llama, folder, kind)
    planned = cli("verify", "-m", published["fbgemm"])
    assert planned.code == 0, planned.err
    config = read_config(published["fbgemm"])
    flags = [w for a in engine_arguments(config) for w in a.words]
    assert flags.count("--allow-deprecated-quantization") == 1 and "True" not in flags
    assert cli("verify", "-m", published["modelopt fp8"]).code == 0
    stated = read_config(published["modelopt fp8"])["quantization_config"]
    change_config(published["modelopt fp8"], quantization_config={**stated, "ignore": []})
    unlisted = cli("verify", "-m", published["modelopt fp8"])
    assert unlisted.code == 4 and "lm_head is not quantized, but the list" in unlisted.err
    spelled = cli("verify", "-m", published["fp8 scalar"])
    assert spelled.code == 4 and "weight_scale_inv is what vLLM calls weight_scale" in spelled.err
    advised = cli("recommend", "-m", published["fp8 scalar"], "--gpu", "L4", "--json")
    plans = {p["scheme"]: p for p in json.loads(advised.out)["plans"]}
    assert not plans["none"]["fits"] and "what vLLM calls weight_scale" in plans["none"]["why"]
    sound = cli("recommend", "-m", published["fbgemm"], "--gpu", "L4", "--json")
    assert next(p for p in json.loads(sound.out)["plans"] if p["scheme"] == "none")["fits"], sound.err
    change_config(published["fp8 scalar"], model_type="mistral3")
    config = {**read_config(published["fp8 scalar"]), "model_type": "mistral3"}
    tensors = open_checkpoint(published["fp8 scalar"]).tensors
    found = find_format(config, tensors)
    assert found is not None and unread_spellings("mistral3", found.stored) == []
    assert len(unread_spellings("llama", found.stored)) == 28


@pytest.mark.parametrize("kind", ["fp8 block 32", "modelopt nvfp4", *MIXTURES])
def test_inspect_counts_what_the_codes_stand_for(
    kind: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    publish(source(kind), tmp_path / "published", kind)
    here, there = inspect(tmp_path / "published"), inspect(source(kind))
    assert here["parameters_by_role"] == there["parameters_by_role"]
    assert sum(here["schemes"].values()) == here["quantized_linears"] >= 8


def test_a_config_that_is_left_over_is_no_quantization(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """ModelOpt's file beside ordinary weights: vLLM would read it, so verify fails; a job starts from the
    weights, and the output does not have it."""
    values = publish(llama, tmp_path / "left", "modelopt old")
    save_all(tmp_path / "left", {n: v.bfloat16() for n, v in values.items()})
    checked = cli("verify", "-m", tmp_path / "left")
    assert checked.code == 4 and "hf_quant_config.json says quantized, but no tensor is" in checked.err
    options = ["--method", "minmax", "--scheme", "w8a16", "--group-size", "16", "--target", "other"]
    done = cli("quantize", "-m", tmp_path / "left", "-o", tmp_path / "out", *options)
    assert done.code == 0 and "taken as it is" in done.err, done.err
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    exported = cli("export-vllm", "-m", tmp_path / "left", "-o", tmp_path / "plain", "--format", "plain")
    assert exported.code == 0, exported.err
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    assert "quantization_config" not in read_config(tmp_path / "plain")


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("modelopt fp8", "quant_method modelopt is read from config.json"),
        ("modelopt old", "quant_method modelopt follows from hf_quant_config.json, which vLLM reads"),
    ],
)
def test_a_plan_names_the_file_that_the_quantization_is_read_from(
    kind: str, read: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    publish(source(kind), tmp_path / "published", kind)
    made = plan(tmp_path / "published", DeploymentRequest())
    dtype = next(a for a in made.arguments if a.name == "dtype")
    assert dtype.reason.endswith(read)


def test_groups_that_do_not_divide_are_advised_to_nobody(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """As ``verify`` and ``plan`` refuse them."""
    path = tmp_path / "published"
    publish(llama, path, "fp8 block")
    assert cli("verify", "-m", path).code == 4
    advised = cli("recommend", "-m", path, "--gpu", "H100", "--json")
    plans = {p["scheme"]: p for p in json.loads(advised.out)["plans"]}
    assert not plans["none"]["fits"] and "do not divide into groups of 128" in plans["none"]["why"]
