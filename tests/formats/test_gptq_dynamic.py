"""GPTQModel's per-layer rules: read as it means them, and judged as vLLM asks for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, Problems
from quant.evaluation.compare import compare
from quant.evaluation.verify import verify
from quant.formats import FormatRegistry, QuantizedLayers, find_format
from quant.formats.gptq import dynamic_rule
from quant.formats.reading import read_linear
from quant.pipeline.export import export
from tests.helpers import ROOT, TINYLM, change_config, copy_model, load_all, read_config, save_all

PEER = ROOT / "tests" / "fixtures" / "peers" / "gptqmodel-dynamic"
SOURCE = PEER.parent / "source"
#: What the rules of the fixture make: bits and group size; None where a layer is left out.
WANTED: dict[str, tuple[int, int] | None] = {
    **{f"model.layers.{b}.self_attn.{x}_proj": (8, 32) for b in range(2) for x in "qkv"},
    **{f"model.layers.{b}.self_attn.o_proj": (4, 32) for b in range(2)},
    **{f"model.layers.0.mlp.{x}_proj": None for x in ("gate", "up", "down")},
    **{f"model.layers.1.mlp.{x}_proj": (4, 32) for x in ("gate", "up")},
    "model.layers.1.mlp.down_proj": (8, 64),
}


def found_in(path: Path) -> QuantizedLayers:
    checkpoint = open_checkpoint(path)
    found = find_format(checkpoint.config, checkpoint.tensors)
    assert found is not None
    return found


def rewritten(target: Path, change: Any = None, **config: Any) -> Path:
    """The fixture with other tensors or another config, in config.json and beside it."""
    copy_model(PEER, target)
    tensors = load_all(target)
    save_all(target, change(tensors) if change else tensors)
    stated = read_config(target)["quantization_config"] | config
    change_config(target, quantization_config=stated)
    (target / "quantize_config.json").write_text(json.dumps(stated))
    return target


def without_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """vLLM needs no g_idx, and some programs leave it out: bits are then known from the rules alone."""
    return {n: t for n, t in tensors.items() if not n.endswith(".g_idx")}


def slow_values(tensors: dict[str, torch.Tensor], name: str, bits: int, group: int) -> torch.Tensor:
    """fp32 [N, K] by the definition: zero points are stored less one, both kinds of words from the lowest
    bits up."""

    def field(words: torch.Tensor, index: int) -> torch.Tensor:
        per = 32 // bits
        return (words[index // per].long() >> bits * (index % per)) & (2**bits - 1)

    words, zeros, scales = (tensors[f"{name}.{x}"] for x in ("qweight", "qzeros", "scales"))
    n, k = words.shape[1], words.shape[0] * 32 // bits
    zero = torch.stack([field(zeros.t(), i) for i in range(n)], 1) + 1  # [groups, N]
    return torch.stack(
        [scales[c // group].float() * (field(words, c) - zero[c // group]) for c in range(k)], 1
    )


@pytest.mark.parametrize("order", [True, False], ids=["g_idx", "no g_idx"])
def test_each_layer_has_the_numbers_of_its_rule_and_the_values_of_the_definition(
    order: bool, tmp_path: Path
) -> None:
    path = PEER if order else rewritten(tmp_path / "m", without_order)
    found, checkpoint, tensors = found_in(path), open_checkpoint(path), load_all(path)
    assert {n: (x.weights.bits, x.weights.group_size) for n, x in found.linears.items()} == {
        n: w for n, w in WANTED.items() if w
    }
    source = load_all(SOURCE)
    for name, wanted in WANTED.items():
        if wanted is None:
            assert torch.equal(
                tensors[f"{name}.weight"].float(),
                source[f"{name}.weight"].to(tensors[f"{name}.weight"].dtype).float(),
            )
            continue
        made = read_linear(FormatRegistry.get("gptq"), found, checkpoint, name)
        assert torch.equal(made.dequantize(), slow_values(tensors, name, *wanted)) and made.scheme.symmetric
        exact = source[f"{name}.weight"].float()
        snr = 10 * float(torch.log10(exact.square().sum() / (made.dequantize() - exact).square().sum()))
        assert snr > (38 if wanted[0] == 8 else 15), (name, snr)


def test_without_rules_and_order_the_words_contradict_the_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit together"):
        found_in(rewritten(tmp_path / "m", without_order, dynamic=None))


def test_vllm_asks_by_fused_names_and_verify_says_where_it_would_go_wrong(tmp_path: Path) -> None:
    """The rule for q, k and v does not match `qkv_proj`: vLLM builds 4 bits and meets words of 8."""
    (failed,) = verify(PEER).failed
    for block in range(2):
        assert (
            f"model.layers.{block}.self_attn.qkv_proj has bits 8, the config gives it 4 under that name, by "
            "which vLLM asks" in failed
        )
    rules = dict(read_config(PEER)["quantization_config"]["dynamic"])
    rules[r".*\.self_attn\.(q|k|v|qkv)_proj"] = {"bits": 8}
    assert verify(rewritten(tmp_path / "good", dynamic=rules)).passed
    skipped = verify(rewritten(tmp_path / "skipped", dynamic={r"-:.*v_proj": {}, **rules})).failed
    assert any("self_attn.qkv_proj is quantized, but a rule of dynamic leaves it out" in p for p in skipped)
    other = verify(rewritten(tmp_path / "group", dynamic={**rules, r"+:.*\.down_proj": {"bits": 8}})).failed
    assert any("model.layers.1.mlp.down_proj has group_size 64, the config gives it 32" in p for p in other)
    long = verify(rewritten(tmp_path / "long", group_size=[0] * 50_000)).failed
    assert any("the config gives it [0, 0" in p for p in long) and sum(map(len, long)) < 20_000
    order = verify(
        rewritten(
            tmp_path / "order",
            dynamic={**rules, r"+:.*\.down_proj": {"bits": 8, "group_size": 64, "desc_act": True}},
        )
    ).failed
    assert any("has desc_act with groups: vLLM refuses it" in p for p in order)


def test_bits_that_the_config_gives_no_layer_are_found_without_rules_too(tmp_path: Path) -> None:
    failed = verify(rewritten(tmp_path / "m", dynamic=None)).failed
    assert any("down_proj has bits 8, the config gives it 4" in p for p in failed)


@pytest.mark.parametrize("form", ["compressed-tensors", "plain"])
def test_export_carries_every_layer_over(form: str, tmp_path: Path) -> None:
    report = export(PEER, tmp_path / "out", form, source=TINYLM).to_dict()
    assert report["verify"]["passed"] and report["linears"] == 11 and verify(tmp_path / "out").passed
    assert all(t.equal or (t.snr_db or 0) > 45 for t in compare(tmp_path / "out", PEER).tensors)
    if form == "plain":
        return
    quantization = read_config(tmp_path / "out")["quantization_config"]
    numbers = {
        target: (group["weights"]["num_bits"], group["weights"]["group_size"])
        for group in quantization["config_groups"].values()
        for target in group["targets"]
    }
    assert numbers == {n: w for n, w in WANTED.items() if w}
    assert set(quantization["ignore"]) == {"lm_head", *(n for n, w in WANTED.items() if w is None)}
    assert "quantize_config.json" not in {f.name for f in (tmp_path / "out").iterdir()}


def test_several_schemes_do_not_go_into_a_gptq_file_of_ours(tmp_path: Path) -> None:
    with pytest.raises(
        Problems,
        match="the linears have several schemes; a gptq file of ours holds one: use --format "
        "compressed-tensors",
    ):
        export(PEER, tmp_path / "out", "gptq")
    assert list(tmp_path.iterdir()) == []


def test_rules_that_only_leave_layers_out_go_into_one(tmp_path: Path) -> None:
    """vLLM sees from the tensors which layers are not quantized, whatever the rules say."""

    def four_bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        eight = [n for n, w in WANTED.items() if w and w[0] == 8]
        kept = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in eight}
        return kept | {f"{n}.weight": load_all(SOURCE)[f"{n}.weight"] for n in eight}

    path = rewritten(
        tmp_path / "m", four_bits, dynamic={r"-:.*(q|k|v|down)_proj": {}, r"-:.*\.layers\.0\.mlp": {}}
    )
    report = export(path, tmp_path / "out", "gptq").to_dict()
    assert (
        report["linears"] == 4
        and report["verify"]["passed"]
        and "dynamic" not in read_config(tmp_path / "out")["quantization_config"]
    )
    assert all(t.equal or (t.snr_db or 0) > 45 for t in compare(tmp_path / "out", path).tensors)


RULES = {
    r"-:a\.b": {},
    r"+:a\.": {"bits": 8},
    r".*\.c$": {"bits": 2, "sym": False},
    "-:z": {},
    "z": {"bits": 3},
}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a.b.c", None),
        ("a.c", {"bits": 8}),
        ("x.c", {"bits": 2, "sym": False}),
        ("x.c.d", {}),
        ("x.a.b", {}),
        ("zebra", None),
        ("y", {}),
    ],
)
def test_the_first_rule_that_matches_from_the_start_counts(name: str, wanted: dict[str, Any] | None) -> None:
    assert dynamic_rule({"dynamic": RULES}, name) == wanted
    slow: dict[str, Any] | None = {}
    for key, value in RULES.items():  # as the writer's own documentation has it
        if re.match(key.removeprefix("-:").removeprefix("+:"), name):
            slow = None if key.startswith("-:") else dict(value)
            break
    assert slow == wanted
    assert dynamic_rule({}, name) == dynamic_rule({"dynamic": None}, name) == {}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([".*"], r"GPTQ dynamic is \"\['\.\*'\]\": an object of patterns"),
        ({".*q_proj": 8}, "GPTQ dynamic is .*each with the keys that it replaces"),
        ({"(": {"bits": 8}}, "cannot be understood"),
        (
            {".*o_proj": {"format": "marlin"}},
            "o_proj: a rule of GPTQ's dynamic gives it format 'marlin': read is one layout for all layers",
        ),
        ({".*o_proj": {"method": "qqq"}}, "gives it method 'qqq'"),
    ],
)
def test_rules_that_are_not_understood_are_refused_by_name(rules: Any, said: str, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "m", dynamic=rules)
    with pytest.raises(CheckpointError, match=said):
        found_in(path)
    assert not verify(path).passed
    with pytest.raises((CheckpointError, Problems), match=said):
        export(path, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
