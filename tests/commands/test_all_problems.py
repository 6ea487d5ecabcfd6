"""Requests with several mistakes: each is named, all at once, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import copy_model, files_of, load_all, save_all, short_text


@pytest.fixture
def refused(llama: Path, tmp_path: Path, cli: Callable[..., Any]) -> Callable[..., list[str]]:
    """Runs a command that must fail; its problems. The output directory has a file in it, which is one of
    them, and nothing else may change."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("x")

    def call(
        command: str, *options: Any, model: Path = llama, code: int = 1, recipe: dict[str, Any] | None = None
    ) -> list[str]:
        if recipe is not None:
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            options = (*options, "--config", tmp_path / "recipe.yaml")
        before = files_of(tmp_path)
        result = cli(command, "-m", model, "-o", output, *options, "--json")
        assert result.code == code and "Traceback" not in result.err, result
        assert json.loads(result.out)["exit_code"] == code
        assert files_of(tmp_path) == before and not (tmp_path / "out.work").exists()
        lines = [x.partition(". ")[2] for x in result.err.splitlines() if x.strip()[:1].isdigit()]
        assert f"{len(lines)} problems:" in result.err, result.err
        assert sum("is not empty" in x for x in lines) == 1
        return [x for x in lines if "is not empty" not in x]

    return call


def test_every_scheme_that_the_gpu_cannot_run_is_named(refused: Callable[..., list[str]]) -> None:
    rules = [{"layers": "0", "scheme": "w8a8-fp8"}, {"layers": "*.down_proj", "scheme": "nvfp4a16"}]
    found = refused(
        "quantize",
        "--gpu",
        "V100-32GB",
        "--vllm-version",
        "0.6.0",
        recipe={"method": "minmax", "group_size": 32, "rules": rules},
    )
    for scheme in ("w4a16", "w8a8-fp8", "nvfp4a16"):
        assert (
            sum(f"vLLM has no kernel for {scheme} (" in p and "V100" in p and "is needed" in p for p in found)
            == 1
        ), found
    assert sum("--vllm-version is 0.6.0: format compressed-tensors is loaded from" in p for p in found) == 1
    assert len(found) == 4


def test_int8_activations_on_blackwell_are_refused_with_what_it_loads(
    refused: Callable[..., list[str]],
) -> None:
    (problem, *shapes) = refused(
        "quantize", "--method", "minmax", "--scheme", "w8a8-int8", "--gpu", "B200", "--tensor-parallel", "3"
    )
    assert "vLLM has no kernel for w8a8-int8" in problem and "It loads " in problem and "w8a8-fp8" in problem
    assert shapes and all("over --tensor-parallel 3 do not divide" in p for p in shapes)


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "gptq", "--group-size", "64"],
        ["--method", "awq", "--group-size", "64"],
        ["--method", "minmax", "--group-size", "64", "--outlier-suppression", "smooth_quant"],
        ["--method", "minmax", "--group-size", "64", "--kv-cache-scheme", "fp8"],
    ],
    ids=lambda x: " ".join(x[:2] + x[4:5]),
)  # fmt: skip
def test_text_that_says_nothing_is_named_with_the_rest(
    options: list[str], tmp_path: Path, refused: Callable[..., list[str]]
) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "none").mkdir()
    given = ["--calibration-dataset", tmp_path / "empty.txt"]
    (shape, text) = refused("quantize", *options, *given)
    assert "down_proj: 96 inputs do not divide into groups of 64" in shape
    assert (
        f"{tmp_path / 'empty.txt'}: the calibration text is empty: give some, or leave "
        "--calibration-dataset out" in text
    )
    (_, *texts) = refused(
        "quantize",
        *options,
        *given,
        "--calibration-dataset",
        tmp_path / "gone.txt",
        "--calibration-dataset",
        tmp_path / "none",
    )
    assert [p.rpartition(": ")[2].partition(" (")[0] for p in texts] == [
        "there is no such calibration text",
        "no file of a known kind in it",
    ]


@pytest.mark.parametrize("scheme", ["nvfp4", "w8a8-int8"])
def test_activations_that_are_calibrated_need_text_whatever_the_method(
    scheme: str, tmp_path: Path, refused: Callable[..., list[str]]
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    options = [
        "--method",
        "minmax",
        "--scheme",
        scheme,
        "--calibration-dataset",
        tmp_path / "empty.jsonl",
        "--format",
        "awq",
    ]
    (form, text) = refused(
        "quantize", *options, *(["--activations", "static"] if scheme == "w8a8-int8" else [])
    )
    assert (
        "an AWQ file holds integer weights and leaves activations alone" in form
        and "the calibration text is empty" in text
    )


def test_a_text_with_words_behind_an_empty_one_is_enough(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    texts = ["--calibration-dataset", tmp_path / "empty.txt", "--calibration-dataset", short_text()]
    small = ["--samples", "4", "--sequence-length", "32", "--group-size", "32", "--dry-run"]
    assert cli("quantize", "-m", llama, "-o", tmp_path / "out", "--method", "gptq", *texts, *small).code == 0


@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("scheme", ["w8a8-int8", "w8a8-fp8", "nvfp4", "mxfp8"])
def test_activation_schemes_in_a_format_of_weights_alone(
    form: str, scheme: str, refused: Callable[..., list[str]]
) -> None:
    found = refused(
        "quantize",
        "--method",
        "minmax",
        "--scheme",
        scheme,
        "--format",
        form,
        "--kv-cache-scheme",
        "fp8",
        "--ignore",
        "k_proj",
    )
    assert (
        sum(
            f"holds integer weights and leaves activations alone, not {scheme} (" in p
            and "use --format compressed-tensors" in p
            for p in found
        )
        == 1
    )
    assert (
        sum(f"--kv-cache-scheme: a {form} checkpoint has no place for the cache's scales" in p for p in found)
        == 1
    )
    assert sum("but k_proj would stay unquantized" in p for p in found) == 1
    assert len(found) == 3, found


def test_activations_for_a_scheme_that_has_none_are_a_mistake_of_the_request(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    result = cli(
        "quantize",
        "-m",
        llama,
        "-o",
        tmp_path / "out",
        "--method",
        "minmax",
        "--scheme",
        "w4a16",
        "--activations",
        "static",
    )
    assert (
        result.code == 2
        and "scheme w4a16 leaves activations as they are: --activations needs a scheme such as" in result.err
    )
    assert list(tmp_path.iterdir()) == []


def test_conflicts_inside_every_fused_layer_are_named_with_the_rest(
    refused: Callable[..., list[str]],
) -> None:
    rules = [
        {"layers": "*.k_proj", "scheme": "w8a16", "group_size": 32},
        {"layers": "*.up_proj", "skip": True},
        {"layers": "*.down_proj", "group_size": 64},
    ]
    found = refused(
        "quantize", recipe={"method": "minmax", "group_size": 32, "format": "gptq", "rules": rules}
    )
    assert (
        sum(
            "self_attn.qkv_proj: vLLM fuses k_proj, q_proj, v_proj into one layer, but they would become" in p
            for p in found
        )
        == 1
    )
    assert (
        sum(
            "mlp.gate_up_proj: vLLM fuses gate_proj, up_proj into one layer, but up_proj would stay "
            "unquantized" in p
            for p in found
        )
        == 1
    )
    assert sum("down_proj: 96 inputs do not divide into groups of 64" in p for p in found) == 1
    assert sum("the rules give several schemes; a gptq file holds one" in p for p in found) == 1
    assert len(found) == 4, found


def test_shards_that_would_have_numbers_of_their_own_are_named_too(refused: Callable[..., list[str]]) -> None:
    rules = [{"layers": "*.q_proj", "method": "gptq"}, {"layers": "*.gate_proj", "method": "gptq"}]
    found = refused("quantize", recipe={"method": "minmax", "scheme": "w8a8-fp8-tensor", "rules": rules})
    assert len(found) == 2 and all(
        "share one number in scheme" in p and "give them one method with one setting" in p for p in found
    )


def test_all_layers_that_are_not_there_are_named(refused: Callable[..., list[str]]) -> None:
    rules = [
        {"layers": "5", "scheme": "w8a16"},
        {"layers": "*.mlp.w1,*.w3", "scheme": "w8a16"},
        {"layers": "*.query_key_value", "skip": True},
        {"layers": "*.down_proj", "method": "gtpq"},
    ]
    recipe = {
        "method": "minmax",
        "group_size": 32,
        "format": "awq",
        "bits": 8,
        "ignore": ["*.w2", "re:(", "*.up_projection"],
        "rules": rules,
    }
    found = refused("quantize", code=2, recipe=recipe)
    for part in (
        "--ignore '*.w2' matches no linear", "--ignore 're:(': not a regular expression",
            "--ignore "
            "'*.up_projection' matches no linear",
        "rule 1: layers names block 5: the model has 2 blocks", "rule 2: layers '*.mlp.w1' matches no linear",
        "layers '*.w3' matches no linear",
        "rule 3: layers '*.query_key_value' matches no linear",
            "rule 4: method is 'gtpq': did you mean "
            "'gptq'?", "AWQ files hold 4 bits, not 8",
    ):  # fmt: skip
        assert sum(part in p for p in found) == 1, (part, found)
    assert len(found) == 8, found


def test_a_wrong_selection_does_not_hide_the_rest(tmp_path: Path, refused: Callable[..., list[str]]) -> None:
    (tmp_path / "empty.txt").write_text("")
    options = [
        "--layers",
        "7",
        "--ignore",
        "nothing",
        "--format",
        "gptq",
        "--asymmetric",
        "--calibration-dataset",
        tmp_path / "empty.txt",
    ]
    found = refused(
        "layer-wise", "--method", "gptq", *options, code=2, recipe={"rules": [{"layers": "9", "bits": 8}]}
    )
    for part in (
        "--layers names block 7", "--ignore 'nothing' matches no linear", "rule 1: layers names block 9",
        "vLLM refuses asymmetric GPTQ files",
        "the calibration text is empty",
    ):  # fmt: skip
        assert sum(part in p for p in found) == 1, (part, found)
    assert len(found) == 5, found


@pytest.mark.parametrize(
    ("options", "lost", "named"),
    [
        ({"scheme": "w8a8-fp8", "group_size": None}, "weight_scale", "weight_scale"),
        ({"scheme": "nvfp4a16", "group_size": None}, "weight_global_scale", "weight_global_scale"),
        ({"scheme": "w8a8-fp8-tensor", "format": "fp8", "group_size": None}, "weight_scale", "weight_scale"),
        ({"scheme": "w4a16-asym"}, "weight_zero_point", "weight_zero_point"),
        ({"format": "gptq"}, "qzeros", "qzeros"),
        ({"format": "awq"}, "scales", "scales"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_foreign_checkpoint_without_its_scales(
    options: dict[str, Any],
    lost: str,
    named: str,
    quantized: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., list[str]],
) -> None:
    source = copy_model(quantized(**options), tmp_path / "source")
    tensors = load_all(source)
    for file in source.glob("model*.safetensors*"):
        file.unlink()
    save_all(source, {n: t for n, t in tensors.items() if not n.endswith(f".{lost}")})
    found = refused("export-vllm", "--source", tmp_path / "gone", model=source)
    assert len(found) == 2 and "--source is" in found[0]
    assert (
        f"14 quantized linears have no {named} (model.layers.0." in found[1]
        and "…): the checkpoint is incomplete, fetch its files again" in found[1]
    )


def test_rows_that_hold_nothing_are_said_while_it_runs_at_its_end_and_in_the_report(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    text = short_text().read_text(encoding="utf-8").replace('"', '""')
    file = tmp_path / "a.csv"
    file.write_text(f'id,text\n1,\n2,"{text}"\n')
    small = ["--samples", "4", "--sequence-length", "32", "--group-size", "32", "--calibration-dataset", file]
    said = f"1 of the 2 rows read hold no text and were passed over (the first is {file}, line 2)"
    job = ["quantize", "-m", llama, "-o", tmp_path / "out", "--method", "gptq", *small]
    tried = cli(*job, "--dry-run")
    assert tried.code == 0 and f"warning: calibration text: {said}" in tried.err
    made = cli(*job)
    assert made.code == 0 and f"warning: calibration text: {said}" in made.err
    assert "1 of the 2 rows read hold no text" in made.out
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert report["calibration"]["notes"] == [said]
    measured = cli("evaluate", llama, "--text", file, "--length", "32", "--chunks", "2")
    assert measured.code == 0 and f"warning: evaluation text: {said}" in measured.err
    both = cli(
        "evaluate", tmp_path / "out", "--against", llama, "--text", file, "--length", "32", "--chunks", "2"
    )
    assert both.code == 0 and both.err.count("warning: evaluation text:") == 1


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"id,label\n1,x\n", "the columns are id, label: none is read. Read are text, messages"),
        ("a.jsonl", b'{"id": 1}\n', "its only row holds no text: the columns are id. Read are text"),
        ("a.json", b'[{"text": 3}]', 'line 1, row 1: "text" is a number (3): a string is needed there'),
        ("a.txt", "text".encode("utf-16"), "is UTF-16 text: convert it to UTF-8 first"),
        ("a.jsonl.zst", b"", "is compressed with Zstandard: unpack it first (zstd -d)"),
    ],
)
def test_a_text_that_is_not_read_is_named_with_the_rest(
    name: str, content: bytes, problem: str, tmp_path: Path, refused: Callable[..., list[str]]
) -> None:
    (tmp_path / name).write_bytes(content)
    options = ["--method", "gptq", "--group-size", "64", "--calibration-dataset", tmp_path / name]
    (shape, text) = refused("quantize", *options)
    assert "down_proj: 96 inputs do not divide" in shape
    assert text.startswith(str(tmp_path / name)) and problem in text
