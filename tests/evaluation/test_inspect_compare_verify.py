"""inspect's numbers, compare's differences, and what verify finds in checkpoints damaged one way each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import INDEX
from quant.evaluation.compare import compare
from quant.evaluation.inspect import inspect
from quant.evaluation.verify import verify
from quant.planning import recommend
from tests.helpers import ROOT, change_config, copy_model, load_all, quantize, read_config, save_all
from tests.models.mixtures import save_mixture


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "plain"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inspect_counts_quantized_parameters_as_the_weights_they_stand_for(
    form: str, symmetric: bool, llama: Path, quantized: Callable[..., Path]
) -> None:
    folder = quantized(format=form, symmetric=symmetric, target="other")
    before, after = inspect(llama), inspect(folder)
    source, tensors = load_all(llama), load_all(folder)
    assert before["parameters"] == after["parameters"] == sum(t.numel() for t in source.values())
    assert before["parameters_by_role"] == after["parameters_by_role"]
    attention = sum(t.numel() for n, t in source.items() if "self_attn" in n)
    assert before["parameters_by_role"] | {} == {
        "attention": attention,
        "embedding": 4096 * 64,
        "head": 4096 * 64,
        "mlp": 2 * 3 * 64 * 96,
        "norm": 5 * 64,
    }
    assert after["total_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(after["bytes_by_dtype"].values()) == after["total_bytes"] and after["tensors"] == len(tensors)
    assert (after["format"], after["blocks"], after["adapter"], after["tied_head"]) == (
        form,
        2,
        "llama",
        False,
    )
    scheme = f"W4 g32 {'symmetric' if symmetric else 'asymmetric'}"
    assert after["schemes"] == ({} if form == "plain" else {scheme: 14}) and after["quantized_linears"] == (
        0 if form == "plain" else 14
    )
    assert {f["name"]: f["file_bytes"] for f in after["files"]} == {
        f.name: f.stat().st_size for f in folder.glob("*.safetensors")
    }


def test_compare_says_which_tensors_differ_and_by_how_much(
    llama: Path, quantized: Callable[..., Path]
) -> None:
    found = compare(quantized(), llama)
    assert len(found.tensors) == 21 and (found.only_here, found.only_there) == ((), ())
    different = {t.name: t for t in found.tensors if not t.equal}
    assert len(different) == 14
    from quant.checkpoint.reader import open_checkpoint
    from quant.formats.reading import dequantized

    back, source = dequantized(open_checkpoint(quantized())), load_all(llama)
    for name, difference in different.items():
        wanted, got = source[name].double(), back.read(name).double()
        assert difference.snr_db == pytest.approx(
            10 * float(torch.log10(wanted.square().sum() / (wanted - got).square().sum())), abs=1e-3
        )
        assert difference.largest == pytest.approx(float((wanted - got).abs().max()), rel=1e-6)
    assert all(t.equal for t in compare(llama, llama).tensors)


def gathered(folder: Path, target: Path) -> Path:
    """The checkpoint as one file, to be damaged."""
    copy_model(folder, target)
    tensors = load_all(target)
    for file in [*target.glob("*.safetensors"), target / INDEX]:
        file.unlink()
    save_all(target, tensors)
    return target


Q = "model.layers.0.self_attn.q_proj"


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda t: t.pop(name)


def setting(
    name: str, value: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda t: t.update({name: value(t[name])})


def poked(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def poke(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t.view(-1)[3] = value
        return t

    return poke


DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a lost scale": ("compressed-tensors", without(f"{Q}.weight_scale"), "has no tensor"),
    "a lost shape": ("compressed-tensors", without(f"{Q}.weight_shape"), "q_proj.weight_shape is missing"),
    "a wrong shape": ("compressed-tensors", setting(f"{Q}.weight_shape", lambda t: t * 2),
    r"says \(128, 128\), the tensors \(64, 64\)"),
    "NaN in a scale": ("compressed-tensors", setting(f"{Q}.weight_scale", poked(torch.nan)),
        "holds 1 NaN "
        "or infinite values"),
    "a zero scale": ("compressed-tensors", setting(f"{Q}.weight_scale", poked(0.0)), "holds 1 zero scales"),
    "an infinite norm": ("compressed-tensors", setting("model.norm.weight", poked(torch.inf)),
    "model.norm.weight holds 1 NaN or infinite"),
    "whole numbers for scales": ("compressed-tensors", setting(f"{Q}.weight_scale", lambda t: t.int() + 1),
    "is I32, the contract is BF16"),
    "a weight left beside": ("compressed-tensors", lambda t: t.update({f"{Q}.weight": torch.ones(64, 64)}),
    "is left beside its quantized form"),
    "too few scales": ("compressed-tensors", setting(f"{Q}.weight_scale", lambda t: t[:, :1]),
    "weight_packed has shape|says"),
    "a shard unquantized": (
        "compressed-tensors",
        lambda t: [t.pop(f"{Q}.{s}") for s in ("weight_packed", "weight_scale",
        "weight_shape")] and t.update({f"{Q}.weight": torch.ones(64, 64)}),
        "qkv_proj: its shards are unquantized, w4a16 .W4 g32 symmetric.",
    ),
    "zero points of v2": (
        "gptq",
        setting(f"{Q}.qzeros", lambda t: torch.full_like(t, 0x77777777 + 0x11111111 - 2**32)),
        "is not the constant 0x77777777",
    ),
    "a reordered index": ("gptq", setting(f"{Q}.g_idx", lambda t: t.flip(0)),
        "is reordered: vLLM drops it "
        "and reads wrong values"),
    "a quantized tensor lost": ("gptq", without(f"{Q}.qweight"), "is not quantized|is lost|its shards are"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_verify_finds_the_damage_and_names_the_tensor(
    case: str, llama: Path, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    form, damage, message = DAMAGES[case]
    folder = gathered(quantized(format=form), tmp_path / "m")
    assert verify(folder, source=llama).passed
    tensors = load_all(folder)
    damage(tensors)
    save_all(folder, tensors)
    result = verify(folder, source=llama)
    assert not result.passed
    assert any(re.search(message, problem) for problem in result.failed), result.failed


CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "an unknown key": ("compressed-tensors",
    lambda q: q["config_groups"]["group_0"]["weights"].update(note=1),
    "has the keys note, which vLLM refuses"),
    "activation order": ("compressed-tensors",
    lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"),
        "activation order 'group', "
        "which vLLM refuses"),
    "sparsity": ("compressed-tensors", lambda q: q.update(sparsity_config={"format": "x"}),
    "sparsity_config is not empty"),
    "an ignore list that hits": ("compressed-tensors", lambda q: q.update(ignore=[r"re:.*v_proj$"]),
    "ignore list hits"),
    "desc_act": ("gptq", lambda q: q.update(desc_act=True), "desc_act is true with groups: vLLM refuses it"),
    "sym": ("gptq", lambda q: q.update(sym=False), "sym is false: vLLM refuses it"),
    "v2": ("gptq", lambda q: q.update(checkpoint_format="gptq_v2"), "vLLM reads zero points as v1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_verify_finds_what_vllm_refuses_in_the_config(
    case: str, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    form, change, message = CONFIGS[case]
    folder = copy_model(quantized(format=form), tmp_path / "m")
    config = read_config(folder)["quantization_config"]
    change(config)
    change_config(folder, quantization_config=config)
    assert any(message in problem for problem in verify(folder).failed)


def test_verify_accounts_for_every_tensor_and_side_file_of_the_source(
    llama: Path, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    folder = gathered(quantized(), tmp_path / "m")
    tensors = load_all(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    del tensors["model.layers.1.input_layernorm.weight"]
    tensors["stray"] = torch.ones(2)
    save_all(folder, tensors)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    problems = "; ".join(verify(folder, source=llama).failed)
    for part in (
        "model.norm.weight differs from the source although it is not quantized",
        "model.layers.1.input_layernorm.weight of the source is lost",
        "stray is not in the source", "tokenizer.json differs", "generation_config.json is missing",
    ):  # fmt: skip
        assert part in problems


def test_side_files_of_another_program_must_say_the_same(tmp_path: Path) -> None:
    """They load and save them anew: other words of bookkeeping, defaults left out."""
    source = copy_model(ROOT / "tests/fixtures/peers/source", tmp_path / "source")
    made = copy_model(ROOT / "tests/fixtures/peers/llmc", tmp_path / "made")
    stated = json.loads((source / "generation_config.json").read_text())
    for there, here, same in (
        ({}, None, True),
        ({"temperature": 0.6, "top_k": 50}, {"temperature": 0.6, "transformers_version": "4.1"}, True),
        ({"temperature": 0.6}, {"top_p": 0.9}, False),
        ({"eos_token_id": [1, 2]}, None, False),
    ):
        (source / "generation_config.json").write_text(json.dumps({**stated, **there}))
        (made / "generation_config.json").unlink(missing_ok=True)
        if here is not None:
            (made / "generation_config.json").write_text(json.dumps(here))
        assert not verify(made, source=source).failed or not same, there
        assert same or "generation_config.json" in verify(made, source=source).failed[0]


@pytest.mark.parametrize(
    ("listed", "hit"), [(["mlp.gate"], "gate_up_proj"), (["v_proj"], "v_proj"), (["lm_head"], ""), ([], "")]
)
def test_an_awq_list_that_is_a_part_of_a_quantized_name_is_named(
    listed: list[str], hit: str, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM looks for its entries inside names, those of fused layers included."""
    folder = copy_model(quantized(format="awq", scheme="w4a16-asym"), tmp_path / "m")
    config = read_config(folder)["quantization_config"]
    change_config(folder, quantization_config={**config, "modules_to_not_convert": listed})
    failed = "; ".join(verify(folder).failed)
    assert bool(failed) == bool(hit) and hit in failed


def test_fused_experts_that_stay_in_16_bits_must_be_ignored(tmp_path: Path) -> None:
    """vLLM builds experts quantized unless the config lists them, in whatever form they are stored."""
    source = save_mixture(tmp_path / "model", "qwen3_moe_fused")
    quantize(source, tmp_path / "out", group_size=32, ignore=["*.experts.*"])
    assert not verify(tmp_path / "out", source=source).failed
    config = read_config(tmp_path / "out")["quantization_config"]
    config["ignore"] = [n for n in config["ignore"] if ".experts." not in n]
    change_config(tmp_path / "out", quantization_config=config)
    (failed,) = verify(tmp_path / "out").failed
    assert "model.layers.0.mlp.experts.0.down_proj is not quantized, but neither ignored" in failed


def test_a_class_that_the_checkpoint_brings_along_is_not_called_one_of_vllms(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_model(quantized(), tmp_path / "m")
    change_config(folder, architectures=["XForCausalLM"], auto_map={"AutoModelForCausalLM": "x.X"})
    (judged,) = [c for c in verify(folder).checks if c.name == "model class"]
    assert judged.passed and judged.detail.startswith("vLLM has no class XForCausalLM: it starts with")
    found = recommend(folder, "L4")
    assert any("--trust-remote-code" in note for note in found.notes)


def test_the_content_hash_is_of_every_byte(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_model(quantized(), tmp_path / "m")
    before = verify(folder).content_hash
    assert (
        before
        == verify(quantized()).content_hash
        == json.loads((folder / "quant_report.json").read_text())["output_hash"]
    )
    file = sorted(folder.glob("*.safetensors"))[1]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert verify(folder).content_hash != before


@pytest.mark.parametrize(("degree", "passes"), [(1, True), (2, False), (4, False)])
def test_tensor_parallel_degrees_are_checked(
    degree: int, passes: bool, quantized: Callable[..., Path]
) -> None:
    assert verify(quantized(), tensor_parallel=degree).passed == passes


def test_scales_of_another_float_type_load_and_are_mentioned(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    folder = gathered(quantized(format="compressed-tensors"), tmp_path / "m")
    tensors = load_all(folder)
    save_all(folder, {n: t.half() if n.endswith("weight_scale") else t for n, t in tensors.items()})
    result = verify(folder)
    assert result.passed
    assert any("scales are F16, which vLLM rounds to the model's BF16" in c.detail for c in result.checks)


def test_advice_says_whose_options_it_names() -> None:
    from quant.evaluation.verify import Verification

    result = Verification("x")
    result.add("shapes", ["320 inputs: quantize with --scheme w8a8-fp8, or --ignore 'down_proj'"], "good")
    result.add("ranks", ["6 heads over --tensor-parallel 4 do not divide"], "good")
    shapes, ranks = result.checks
    assert shapes.detail.endswith("(--scheme, --ignore: of quant quantize and quant export-vllm)")
    assert ranks.detail.endswith("do not divide")  # verify's own option
