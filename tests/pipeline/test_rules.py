"""Recipes with several schemes and methods, from the YAML to the files: what is given, what is refused, what
is reported."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import quant
from quant.errors import Problems, QuantError, UsageError
from quant.evaluation.compare import compare
from quant.evaluation.verify import verify
from quant.pipeline.assigning import assign
from quant.pipeline.plan import plan_job
from quant.recipe import make_recipe
from tests.helpers import load_all, quantize, read_config, recipe, short_text

LINEARS = [
    f"model.layers.{b}.{n}"
    for b, n in itertools.product(
        range(4),
        [
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        ],
    )
]
CALIBRATED: dict[str, Any] = {"samples": 4, "sequence_length": 32, "calibration_dataset": [short_text()]}


def assigned(rules: list[dict[str, Any]], **job: Any) -> dict[str, str]:
    """Linear → method and scheme, of a recipe over four blocks."""
    made = make_recipe(
        {"model_path": "m", "output_path": "o", "method": "minmax", "group_size": 32, **job, "rules": rules}
    )
    found, problems = assign(made, LINEARS, 4)
    assert problems == []
    return {n: f"{a.method} {a.scheme.weights}" for n, a in found.items()}


def mistakes(rules: list[dict[str, Any]], **job: Any) -> list[str]:
    made = make_recipe(
        {"model_path": "m", "output_path": "o", "method": "minmax", "group_size": 32, **job, "rules": rules}
    )
    return assign(made, LINEARS, 4)[1]


def test_the_first_rule_that_names_a_linear_counts_and_the_rest_is_the_jobs() -> None:
    found = assigned(
        [
            {"layers": "first:1", "method": "hqq", "scheme": "w8a16-asym"},
            {"layers": "*.down_proj", "scheme": "w8a16", "group_size": 32},
            {"layers": "3", "skip": True},
        ]
    )
    for name in LINEARS:
        block = int(name.split(".")[2])
        if block == 0:
            assert found[name] == "hqq W8 g128 asymmetric"
        elif name.endswith("down_proj"):
            assert found[name] == "minmax W8 g32 symmetric"
        elif block == 3:
            assert name not in found
        else:
            assert found[name] == "minmax W4 g32 symmetric"
    assert list(found) == [n for n in LINEARS if n in found]


def test_rules_choose_among_what_layers_and_ignore_leave() -> None:
    found = assigned([{"layers": "first:2", "scheme": "w8a16"}], layers="1-2", ignore=["o_proj"])
    assert {n.split(".")[2] for n in found} == {"1", "2"} and not any(n.endswith("o_proj") for n in found)
    assert all((v == "minmax W8 g128 symmetric") == (".1." in n) for n, v in found.items())


@pytest.mark.parametrize(
    ("job", "rule", "wanted"),
    [
        ({}, {"group_size": 64}, "minmax W4 g64 symmetric"),
        ({"symmetric": False}, {"method": "hqq"}, "hqq W4 g32 asymmetric"),
        ({}, {"bits": 8}, "minmax W8 g128 symmetric"),
        ({"method": "gptq", "damping": 0.1}, {"method": "minmax"}, "minmax W4 g32 symmetric"),
        ({"scheme": "w4a16-asym"}, {"scheme": "w8a16-fp8"}, "minmax FP8 channel"),
        ({}, {"method": "fp8"}, "minmax FP8 channel"),
        ({"scheme": "fp8-block", "group_size": None}, {"method": "fp8"}, "minmax FP8 block"),
        ({"method": "awq"}, {"method": "gptq"}, "gptq W4 g32 asymmetric"),
        ({"method": "awq"}, {"method": "gptq", "symmetric": True}, "gptq W4 g32 symmetric"),
        ({"method": "gptq"}, {"method": "awq"}, "awq W4 g32 symmetric"),
        ({"method": "none", "group_size": None}, {"method": "awq"}, "awq W4 g128 asymmetric"),
        ({"scheme": "w4a16"}, {"method": "fp8", "scheme": "fp8-block"}, "minmax FP8 block"),
        ({"method": "fp8", "group_size": None}, {"method": "gptq"}, "gptq FP8 channel"),
        ({"method": "fp8", "scheme": "fp8-block", "group_size": None}, {"method": "gptq"}, "gptq FP8 block"),
        (
            {"method": "fp8", "group_size": None},
            {"method": "gptq", "scheme": "w4a16"},
            "gptq W4 g128 symmetric",
        ),
    ],
)
def test_what_a_rule_leaves_out_is_as_the_job_has_it(
    job: dict[str, Any], rule: dict[str, Any], wanted: str
) -> None:
    assert assigned([{"layers": "1", **rule}], **job)["model.layers.1.mlp.up_proj"] == wanted


def test_settings_of_a_method_stay_with_it() -> None:
    values = {"model_path": "m", "output_path": "o", "method": "gptq", "damping": 0.1, "act_order": "none"}
    rules = [
        {"layers": "0", "damping": 0.2},
        {"layers": "1", "method": "gptq"},
        {"layers": "2", "method": "hqq", "options": {"norm": 0.5}},
    ]
    found = assign(make_recipe({**values, "rules": rules}), LINEARS, 4)[0]
    options = [dict(found[f"model.layers.{b}.mlp.up_proj"].options) for b in range(4)]
    assert options == [
        {"damping": 0.2, "act_order": "none"},
        {},
        {"norm": 0.5},
        {"damping": 0.1, "act_order": "none"},
    ]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([{"layers": "9"}], "rule 1: layers names block 9: the model has 4 blocks"),
        ([{"layers": "*.nope", "scheme": "w8a16"}], "rule 1: layers '*.nope' matches no linear of the model"),
        ([{"layers": "first:0"}], "rule 1: layers is 'first:0'"),
        (
            [{"layers": "0"}, {"layers": "*.layers.0.*", "skip": True}],
            "rule 2: layers '*.layers.0.*' names only linears that rules before it name",
        ),
        ([{"layers": "0", "method": "gtpq"}], "rule 1: method is 'gtpq': did you mean 'gptq'?"),
        ([{"layers": "0", "scheme": "w5a16"}], "rule 1: scheme is 'w5a16'"),
        ([{"layers": "0", "damping": 0.5}], "rule 1: --damping is not an option of --method minmax"),
        ([{"layers": "0", "method": "hqq", "options": {"norm": 7}}], "rule 1: --method hqq: norm is 7"),
        ([{"layers": "0", "method": "fp8", "bits": 4}], "rule 1: --method fp8 rounds to FP8, scheme w4a16"),
        ([{"layers": "0-3", "skip": True}], "no linear is left to quantize: every one is skipped by a rule"),
    ],
)
def test_a_mistake_in_a_rule_names_the_rule(rules: list[dict[str, Any]], said: str) -> None:
    (found,) = mistakes(rules)
    assert found.startswith(said), found


def test_a_rule_beyond_what_layers_select_is_a_mistake() -> None:
    assert mistakes([{"layers": "3", "scheme": "w8a16"}], layers="0-1") == [
        "rule 1: layers '3' names no linear that is quantized: change it, or --layers and --ignore"
    ]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            {"layers": "0", "grup_size": 3},
            "rules.0 key is 'grup_size': did you mean 'group_size'? Known: scheme, bits, group_size",
        ),
        ({"scheme": "w8a16"}, "rules.0.layers: field required"),
        (
            {"layers": "0", "skip": True, "bits": 8},
            "skip leaves the layers as they are, and bits would change them: give one of the two",
        ),
        ({"layers": "0", "model_path": "x"}, "rules.0 key is 'model_path'"),
        ("0", "rules.0 is '0'"),
    ],
)
def test_a_rule_of_other_keys_is_refused_with_the_known_ones(rule: Any, said: str) -> None:
    with pytest.raises(Problems) as refused:
        make_recipe({"model_path": "m", "output_path": "o", "method": "minmax", "rules": [rule]})
    assert any(said in p for p in refused.value.problems), refused.value
    assert refused.value.exit_code == 2


def test_mistakes_of_rules_are_listed_with_all_other_problems(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    rules = [
        {"layers": "7"},
        {"layers": "*.up_proj", "method": "nope"},
        {"layers": "*.down_proj", "group_size": 64},
    ]
    with pytest.raises(Problems) as refused:
        plan_job(recipe(llama, tmp_path / "out", group_size=32, bits=3, rules=rules))
    problems = "\n".join(refused.value.problems)
    for part in (
        "is not empty",
        "rule 1: layers names block 7",
        "rule 2: method is 'nope'",
        "3: use --format plain",
        "down_proj: 96 inputs do not divide",
    ):
        assert part in problems, problems
    assert refused.value.exit_code == 2


def test_a_wrong_layers_is_listed_with_an_output_that_is_there(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(Problems) as refused:
        plan_job(recipe(llama, tmp_path / "out", layers="9"))
    assert len(refused.value.problems) == 2 and "is not empty" in refused.value.problems[0]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"layers": "*.k_proj", "scheme": "w8a16", "group_size": 32},
            "qkv_proj: vLLM fuses .*q_proj.* into "
            "one layer, but they would become .*w8a16.*one scheme"),
        ({"layers": "*.up_proj", "group_size": -1}, "gate_up_proj: vLLM fuses"),
        ({"layers": "*.v_proj", "skip": True}, "but v_proj would stay unquantized"),
    ],
)  # fmt: skip
def test_a_conflict_inside_a_fused_layer_is_refused(
    rule: dict[str, Any], said: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(QuantError, match=said):
        plan_job(recipe(llama, tmp_path / "out", group_size=32, rules=[rule]))
    plan_job(recipe(llama, tmp_path / "out", group_size=32, rules=[rule], target="other"))


def test_shards_that_share_one_number_are_made_by_one_method(llama: Path, tmp_path: Path) -> None:
    rules = [{"layers": "*.q_proj", "method": "gptq"}]
    with pytest.raises(
        QuantError,
        match="q_proj, v_proj share one number in scheme .*, but are made by minmax and gptq: give them one "
        "method with one setting",
    ):
        plan_job(recipe(llama, tmp_path / "out", scheme="w8a8-fp8-tensor", rules=rules, **CALIBRATED))
    plan_job(recipe(llama, tmp_path / "out", scheme="w8a8-fp8", rules=rules, **CALIBRATED))


@pytest.mark.parametrize("form", ["gptq", "awq", "fp8"])
def test_a_format_of_one_scheme_refuses_several(form: str, llama: Path, tmp_path: Path) -> None:
    rules = [{"layers": "0", "bits": 8, "group_size": 32}]
    with pytest.raises(
        QuantError,
        match=f"the rules give several schemes; a {form} file holds one: use --format compressed-tensors",
    ):
        plan_job(recipe(llama, tmp_path / "out", group_size=32, format=form, rules=rules))


RULES: list[dict[str, Any]] = [
    {"layers": "first:1", "method": "minmax", "scheme": "w8a16", "group_size": 32},
    {"layers": "*.o_proj", "skip": True},
    {"layers": "*.down_proj", "method": "hqq", "scheme": "w4a16-asym", "group_size": 32},
]


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[..., Path]
) -> tuple[Path, Path, dict[str, Any]]:
    """Source, output and report of a job of three methods and three schemes."""
    source = checkpoints("llama", num_hidden_layers=3)
    output = tmp_path_factory.mktemp("mixed") / "out"
    return source, output, quantize(source, output, method="gptq", scheme="w4a16", group_size=32, rules=RULES)


def wanted_of(name: str) -> tuple[str, str] | None:
    if ".layers.0." in name:
        return "minmax", "w8a16 (W8 g32 symmetric)"
    if name.endswith("o_proj"):
        return None
    return (
        ("hqq", "w4a16-asym (W4 g32 asymmetric)")
        if name.endswith("down_proj")
        else ("gptq", "w4a16 (W4 g32 symmetric)")
    )


def test_the_report_lists_each_layers_method_and_scheme_and_what_was_left(
    mixed: tuple[Path, Path, dict[str, Any]],
) -> None:
    source, _, report = mixed
    linears = [
        n.removesuffix(".weight") for n, t in load_all(source).items() if ".layers." in n and t.ndim == 2
    ]
    found = {x["name"]: (x["method"], x["scheme"]) for x in report["layers"]}
    assert found == {n: w for n in linears if (w := wanted_of(n)) is not None}
    assert {n for n in linears if n not in found} | {"lm_head"} == set(report["unquantized_linears"])
    assert (
        set(report["methods"]) == {"gptq", "minmax", "hqq"}
        and report["method"] == "gptq"
        and report["scheme"]["name"] == "mixed"
    )
    assert {p["name"] for p in report["scheme"]["parts"]} == {"w4a16", "w8a16", "w4a16-asym"}
    assert set(report["tensors"]["copied"]) >= {f"{n}.weight" for n in linears if n not in found}
    assert report["verify"]["passed"] and verify(mixed[1], source=source).failed == []


def test_config_groups_name_each_linear_once_under_its_numbers(
    mixed: tuple[Path, Path, dict[str, Any]],
) -> None:
    source, output, report = mixed
    quantization = read_config(output)["quantization_config"]
    groups = quantization["config_groups"]
    assert len(groups) == 3
    seen: dict[str, str] = {}
    for group in groups.values():
        for target in group["targets"]:
            assert not target.startswith("re:") and target not in seen
            weights = group["weights"]
            seen[target] = (
                f"W{weights['num_bits']} g{weights['group_size']} "
                f"{'symmetric' if weights['symmetric'] else 'asymmetric'}"
            )
    assert {n: f"({s})" for n, s in seen.items()} == {
        x["name"]: x["scheme"].partition(" ")[2] for x in report["layers"]
    }
    assert set(quantization["ignore"]) == set(report["unquantized_linears"])


def test_each_linear_is_what_its_own_method_makes_alone(
    mixed: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The data-free parts bit for bit; what was left untouched, byte for byte."""
    source, output, _ = mixed
    after, before = load_all(output), load_all(source)
    quantize(source, tmp_path / "w8", method="minmax", scheme="w8a16", group_size=32)
    quantize(source, tmp_path / "hqq", method="hqq", scheme="w4a16-asym", group_size=32)
    alone = {"minmax": load_all(tmp_path / "w8"), "hqq": load_all(tmp_path / "hqq")}
    compared = 0
    for name, tensor in after.items():
        module = name.rpartition(".")[0]
        wanted = wanted_of(module) if ".layers." in name and "norm" not in name else None
        if wanted is None:
            assert torch.equal(tensor, before[name]), name
        elif wanted[0] in alone:
            assert torch.equal(tensor, alone[wanted[0]][name]), name
            compared += 1
    assert compared == 7 * 3 + 2 * 4
    assert {t.name for t in compare(output, source).tensors if not t.equal} == {
        f"{n}.weight" for n in map(str, _quantized(mixed))
    }


def _quantized(mixed: tuple[Path, Path, dict[str, Any]]) -> list[str]:
    return [x["name"] for x in mixed[2]["layers"]]


def test_a_stopped_job_of_several_schemes_goes_on_to_the_same_bytes(
    mixed: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.pipeline.test_resume import Stopped, stop_after

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(2, patch)
        quantize(mixed[0], tmp_path / "out", method="gptq", scheme="w4a16", group_size=32, rules=RULES)
    found = quantize(mixed[0], tmp_path / "out", method="gptq", scheme="w4a16", group_size=32, rules=RULES)
    assert found["output_hash"] == mixed[2]["output_hash"]
    with pytest.raises(Problems, match="is not empty"):
        quantize(mixed[0], tmp_path / "out", method="gptq", scheme="w4a16", group_size=32, rules=RULES[:2])


def test_weights_of_two_kinds_of_numbers_go_into_one_file(llama: Path, tmp_path: Path) -> None:
    rules = [{"layers": "*.down_proj", "method": "fp8"}, {"layers": "0", "scheme": "w8a8-int8"}]
    job = {"method": "minmax", "group_size": 32, "outlier_suppression": "none"}
    report = quantize(llama, tmp_path / "out", rules=rules, **job)
    quantization = read_config(tmp_path / "out")["quantization_config"]
    assert quantization["format"] == "mixed-precision" and all(
        g["format"] for g in quantization["config_groups"].values()
    )
    assert report["verify"]["passed"] and len(report["scheme"]["parts"]) == 3
    assert quant.inspect(tmp_path / "out")["quantized_linears"] == 14


def test_the_layer_wise_command_takes_rules_from_a_recipe(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "method": "minmax",
                "group_size": 32,
                "rules": [{"layers": "*.down_proj", "scheme": "w8a16", "group_size": 32}],
            }
        )
    )
    result = cli(
        "layer-wise", "-m", llama, "-o", tmp_path / "out", "--config", file, "--layers", "last:1", "--json"
    )
    assert result.code == 0, result.err
    report = json.loads(result.out)
    schemes = {x["name"]: x["scheme"] for x in report["layers"]}
    assert len(schemes) == 7 and all(".1." in n for n in schemes)
    assert all(("W8" in s) == n.endswith("down_proj") for n, s in schemes.items())
    assert len(report["unquantized_linears"]) == 8
    text = cli("layer-wise", "-m", llama, "-o", tmp_path / "text", "--config", file, "--layers", "last:1")
    assert (
        re.search(r"W4 g32 symmetric.*W8 g32 symmetric|W8 g32 symmetric.*W4 g32 symmetric", text.out)
        and "7 linears: model.layers.0." in text.out
        and "and 2 more in quant_report.json" in text.out
    ), text.out


def test_a_wrong_rule_exits_with_2_and_no_output(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("method: minmax\ngroup_size: 32\nrules:\n  - layers: '*.nothing'\n    scheme: w8a16\n")
    result = cli("quantize", "-m", llama, "-o", tmp_path / "out", "--config", file)
    assert (
        result.code == 2
        and "rule 1: layers '*.nothing' matches no linear" in result.err
        and "Traceback" not in result.err
    )
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_of_the_job_is_a_mistake_of_the_request(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="method is 'nope'"):
        plan_job(recipe(llama, tmp_path / "out", method="nope"))
