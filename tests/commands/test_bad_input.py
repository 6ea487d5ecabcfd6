"""Whatever is wrong with what a user gives: one line that names it, the right exit status, and nothing left
behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import change_config, copy_model, load_all, raw_safetensors, save_all, short_text


def nan_weight(m: Path) -> None:
    tensors = load_all(m)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_all(m, tensors)


def overflowing_norm(m: Path) -> None:
    tensors = load_all(m)
    tensors["model.layers.1.input_layernorm.weight"].fill_(3e38)
    save_all(m, tensors)


def with_tensors(**made: torch.Tensor) -> Callable[[Path], None]:
    """Puts tensors of the first block in, or over those of the same name."""

    def change(m: Path) -> None:
        save_all(
            m, load_all(m) | {f"model.layers.0.self_attn.{k.replace('__', '.')}": v for k, v in made.items()}
        )

    return change


def half_a_pair(m: Path) -> None:
    file = m / "config.json"
    file.write_text(file.read_text().rstrip().rstrip("}") + ', "x": "\\ud800"}')


def change_text(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def outside_index(m: Path) -> None:
    (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')


def missing_shard(m: Path) -> None:
    (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')


def nothing(m: Path) -> None:
    pass


GPTQ = ["--method", "gptq", "--group-size", "32", "--samples", "4", "--sequence-length", "32"]
MINMAX = ["--method", "minmax", "--group-size", "32"]
#: What is done to the model, the options, the exit status, what the message says.
CASES: dict[str, tuple[Callable[[Path], Any], list[str], int, list[str]]] = {
    "truncated": (lambda m: os.truncate(m / "model.safetensors", 9000), MINMAX, 1,
    ["model.safetensors", "it is truncated", "again"]),
    "thousands of sides": (lambda m: raw_safetensors(m / "model.safetensors",
        {"x": {"dtype": "F32", "shape": [2**62] * 5000, "data_offsets": [0, 0]}}), MINMAX, 1, ["64 sides"]),
    "a name of megabytes": (lambda m: raw_safetensors(m / "model.safetensors",
        {"x" * 2**22: {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}), MINMAX, 1,
        ["its offsets hold 8"]),
    "a number of thousands of digits": (lambda m: change_text(m / "config.json", '"hidden_size": 64',
        '"hidden_size": ' + "9" * 400), MINMAX, 1, ["config is not JSON", "400 digits"]),
    "lists within lists": (lambda m: change_text(m / "config.json", '"hidden_size": 64',
        '"x": ' + "[" * 300 + "]" * 300), MINMAX, 1, ["config is not JSON", "nested too deeply"]),
    "a config that is a pipe": (
        lambda m: [(m / "config.json").unlink(), os.mkfifo(m / "config.json")], MINMAX, 1,
        ["config.json", "a pipe or a device"]),
    "a tokenizer of gigabytes": (lambda m: os.truncate(m / "tokenizer_config.json", 1 << 32), GPTQ, 1,
        ["tokenizer_config.json", "4096 MiB"]),
    "weights that are a pipe": (
        lambda m: [(m / "model.safetensors").unlink(), os.mkfifo(m / "model.safetensors")], MINMAX, 1,
        ["model.safetensors", "a pipe or a device"]),
    "emptied": (lambda m: os.truncate(m / "model.safetensors", 0), MINMAX, 1, ["0 bytes, fewer than the 8"]),
    "a hostile header": (lambda m: raw_safetensors(m / "model.safetensors", b"{}", b"", 2**60), GPTQ, 1,
    ["the header claims"]),
    "an index that leaves its folder": (outside_index, GPTQ, 1, ["'../x.safetensors'",
        "inside the model's "
        "folder"]),
    "an index that names a missing file": (missing_shard, MINMAX, 1,
    ["'gone.safetensors'", "fetch that file"]),
    "pickles": (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), MINMAX, 1,
    ["only pickled weights"]),
    "no config": (lambda m: (m / "config.json").unlink(), MINMAX, 1, ["has no config.json"]),
    "a broken config": (lambda m: (m / "config.json").write_text("{"), MINMAX, 1, [
        "config.json: the config "
        "is not JSON"]),
    "a config without a model type": (lambda m: change_config(m, model_type=...), GPTQ, 1, [
        "config.json: "
        "transformers cannot use it"]),
    "an unknown architecture": (lambda m: change_config(m, model_type="martian"), GPTQ, 1,
    ["martian", "config.json"]),
    "a config of another shape": (lambda m: change_config(m, intermediate_size=128), GPTQ, 1,
    ["mlp.gate_proj.weight is [96, 64] in the file, [128, 64] by config.json", "do not match one to one"]),
    "a vocabulary that is text": (lambda m: change_config(m, vocab_size="x"), GPTQ, 1, ["vocab_size"]),
    "no tokenizer": (lambda m: [(m / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], GPTQ,
    1, ["tokenizer cannot be loaded"]),
    "a broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{"), GPTQ, 1, [
        "tokenizer cannot be "
        "loaded"]),
    "a tokenizer's length that is text": (
        lambda m: change_text(m / "tokenizer_config.json", 'length": 1024', 'length": "many"'), GPTQ, 1,
        ["tokenizer cannot be loaded", "int"]),
    "a dtype that is none": (lambda m: change_config(m, dtype=..., torch_dtype="auto"), MINMAX, 1,
    ["torch_dtype is 'auto'", "set it to bfloat16, which most weights are stored in"]),
    "NaN weights": (nan_weight, MINMAX, 1, ["up_proj.weight holds NaN or infinity", "fetch it again"]),
    "NaN weights with data": (nan_weight, GPTQ, 1, ["up_proj.weight holds NaN or infinity"]),
    "NaN inputs": (overflowing_norm, GPTQ, 1,
    ["model.layers.1.self_attn", "its inputs hold NaN or infinity", "quant evaluate"]),
    "codes without a config": (
        with_tensors(q_proj__weight=torch.ones(64, 64, dtype=torch.int8)), MINMAX, 1,
        ["self_attn.q_proj.weight is stored as I8", "the file is quantized", "says how: fetch config.json"],
    ),
    "scales without a config": (with_tensors(q_proj__weight_scale=torch.ones(64, 1)), MINMAX, 1,
    ["q_proj.weight_scale is there already"]),
    "words without a config": (
        with_tensors(q_proj__weight_packed=torch.ones(64, 8, dtype=torch.int32)), MINMAX, 1,
        ["holds packed words (model.layers.0.self_attn.q_proj.weight_packed)", "fetch that file"]
    ),
    "a weight without outputs": (
        with_tensors(q_proj__weight=torch.ones(0, 64, dtype=torch.bfloat16)), MINMAX, 1,
        ["self_attn.q_proj.weight is empty"]
    ),
    "no architectures": (lambda m: change_config(m, architectures=None), MINMAX, 1,
    ["architectures is None", "LlamaForCausalLM"]),
    "layers beyond reason": (lambda m: change_config(m, num_hidden_layers=10**9), GPTQ, 1,
    ["num_hidden_layers is 1000000000"]),
    "a size that is text": (lambda m: change_config(m, hidden_size="64"), GPTQ, 1, [
        "config.json: "
        "transformers cannot use it", "hidden_size", "64"]),
    "a config that is no text": (half_a_pair, MINMAX, 1, [
        "config.json: the config holds half of a "
        "surrogate pair"]),
    "a seed beyond 63 bits": (nothing, [*GPTQ, "--shuffle", "--seed", str(2**64)], 2, [
        "seed is "
        "18446744073709551616"]),
    "an unknown setting's type": (nothing, [*GPTQ, "--option", "damping=[1, 2]"], 2, [
        "damping is [1, 2]: "
        "must be a valid number"]),
    "a setting twice": (nothing, [*GPTQ, "--option", "damping=0.1", "--option", "damping=0.2"], 2,
    ["--option damping is given twice"]),
    "several options for method none": (
        nothing, ["--method", "none", "--format", "plain", "--bits", "4", "--group-size", "32"], 2,
        ["leave --bits, --group-size out"]
    ),
    "a group size that does not divide": (nothing, ["--method", "minmax"], 1,
    ["groups of 128", "--group-size 32 or -1"]),
    "a group size of 3": (nothing, ["--method", "minmax", "--group-size", "3"], 2,
    ["group size is 3", "multiple of 8"]),
    "a group size of 0": (nothing, ["--method", "minmax", "--group-size", "0"], 2, ["group size is 0"]),
    "bits that nothing has": (nothing, [*MINMAX, "--bits", "5"], 2, ["bits is 5", "2, 3, 4, 8"]),
    "bits that are text": (nothing, [*MINMAX, "--bits", "four"], 2, ["'four' is not a valid integer"]),
    "bits against the scheme": (nothing, [*MINMAX, "--bits", "8", "--scheme", "w4a16"], 2, [
        "scheme w4a16 "
        "has 4 bits, --bits says 8"]),
    "symmetry against the scheme": (nothing, [*MINMAX, "--symmetric", "--scheme", "w4a16-asym"], 2,
    ["--symmetric contradicts it"]),
    "an unknown scheme": (nothing, [*MINMAX, "--scheme", "w4a61"], 2, ["'w4a61'", "did you mean 'w4a16'"]),
    "an unknown method": (nothing, ["--method", "gtpq"], 2, ["'gtpq'", "did you mean 'gptq'?",
        "Known: awq, "
        "fp8, gptq, hqq, magnitude, minmax, none, sparsegpt, wanda, yaqa"]),
    "an unknown format": (nothing, [*MINMAX, "--format", "compresed-tensors"], 2, [
        "did you mean "
        "'compressed-tensors'"]),
    "an unknown option": (nothing, [*MINMAX, "--grup-size", "32"], 2, ["--grup-size", "--group-size"]),
    "an order for a method that has none": (nothing, [*MINMAX, "--act-order", "static"], 2, [
        "--act-order "
        "is not an option of --method minmax"]),
    "damping for a method that has none": (nothing, [*MINMAX, "--damping", "0.1"], 2, [
        "--damping is not an "
        "option of --method minmax"]),
    "gradients for a method that takes none": (nothing, [*MINMAX, "--gradient-samples", "4"], 2,
    ["--gradient-samples belongs to --method yaqa"]),
    "a share for no suppressor": (nothing, [*MINMAX, "--alpha", "0.4"], 2,
    ["--alpha belongs to --outlier-suppression smooth_quant"]),
    "a cache for a format without a place": (
        nothing, [*GPTQ, "--kv-cache-scheme", "fp8", "--format", "gptq"], 2,
        ["a gptq checkpoint has no place for the cache's scales"],
    ),
    "a scheme for a format that holds others": (
        nothing, ["--method", "minmax", "--scheme", "w8a8-int8", "--format", "gptq"], 2,
        ["in format gptq", "use --format compressed-tensors"],
    ),
    "more GPUs than there are": (nothing, [*MINMAX, "--gpu", "999999xH100"], 2,
    ["--gpu is '999999xH100': a number of GPUs is from 1 to 1024"]),
    "damping beyond measure": (nothing, [*GPTQ, "--damping", "7"], 2, ["damping is 7",
        "less than or equal "
        "to 1"]),
    "a layer that is not there": (nothing, [*MINMAX, "--layers", "7"], 2, [
        "--layers names block 7: the "
        "model has 2 blocks, 0 to 1"]),
    "an ignore that matches nothing": (nothing, [*MINMAX, "--ignore", "*.k_projection"], 2, [
        "--ignore "
        "'*.k_projection' matches no linear"]),
    "half of a fused layer": (nothing, [*MINMAX, "--ignore", "k_proj"], 1, [
        "vLLM fuses k_proj, q_proj, "
        "v_proj"]),
    "no samples": (nothing, [*GPTQ, "--samples", "0"], 2, ["samples is 0", "greater than or equal to 1"]),
    "absurdly many samples": (nothing, [*GPTQ, "--samples", "99999999999"], 2, ["samples is 99999999999"]),
    "a row beyond the context": (nothing, [*GPTQ, "--sequence-length", "512"], 2, [
        "--sequence-length is "
        "512: the model's longest context is 256"]),
    "a row of one token": (nothing, [*GPTQ, "--sequence-length", "1"], 2, ["sequence_length is 1"]),
    "too little text": (nothing, [*GPTQ, "--samples", "90000", "--sequence-length", "256"], 1,
    ["tokens", "are missing", "fewer --samples"]),
    "a text that is not there": (nothing, [*GPTQ, "--calibration-dataset", "none.txt"], 1, [
        "none.txt: "
        "there is no such calibration text"]),
    "text of an unknown kind": (nothing, [*GPTQ, "--calibration-dataset", __file__], 1, [
        "unknown kind of "
        "text"]),
    "a template that the tokenizer lacks": (nothing, [*GPTQ, "--chat-template"], 1, [
        "--chat-template: the "
        "tokenizer has no chat template: use --no-chat-template"]),
    "a device that is not there": (nothing, [*GPTQ, "--device", "cuda:99"], 2, ["--device is 'cuda:99'"]),
    "a device that is none": (nothing, [*MINMAX, "--device", "toaster"], 2, [
        "--device is 'toaster': give "
        "cpu, cuda or cuda:N"]),
    "no ranks": (nothing, [*MINMAX, "--tensor-parallel", "0"], 2,
    ["--tensor-parallel': 0 is not in the range"]),
    "ranks that do not divide": (nothing, [*MINMAX, "--tensor-parallel", "2"], 1, [
        "--tensor-parallel 2 do "
        "not divide"]),
    "3 bits for vLLM": (nothing, [*MINMAX, "--bits", "3"], 2, ["use --format plain"]),
    "asymmetric gptq for vLLM": (nothing, [*MINMAX, "--format", "gptq", "--asymmetric"], 2, [
        "vLLM refuses "
        "asymmetric GPTQ files"]),
    "a recipe that is not there": (nothing, [*MINMAX, "--config", "none.yaml"], 1, [
        "none.yaml: the recipe "
        "cannot be read"]),
    "no method": (nothing, [], 2, ["--method"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_thing_and_nothing_is_left_behind(
    case: str, llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    damage, options, code, parts = CASES[case]
    source = copy_model(llama, tmp_path / "source")
    damage(source)
    before = sorted(f.name for f in source.iterdir())
    if (
        "--method" in options
        and "gptq" in options
        and "--calibration-dataset" not in options
        and "90000" not in options
    ):
        options = [*options, "--calibration-dataset", str(short_text())]
    for extra in ([], ["--json"]):
        result = cli("quantize", "-m", source, "-o", tmp_path / "out", *options, *extra)
        assert result.code == code, result
        for part in parts:
            assert part in result.err, result.err
        assert "Traceback" not in result.err
        message = result.err.split("rror: ", 1)[1].strip()
        assert len(message.splitlines()) <= 2 or "problems:" in message, message
        if extra:
            assert json.loads(result.out)["exit_code"] == code
        else:
            assert result.out == ""
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()
    assert sorted(f.name for f in source.iterdir()) == before


@pytest.mark.parametrize("command", ["inspect", "verify", "evaluate"])
@pytest.mark.parametrize(
    "damage", ["missing", "a file", "truncated", "no config", "quantized beyond understanding"]
)
def test_commands_that_read_refuse_broken_checkpoints_in_one_line(
    command: str, damage: str, llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    source = tmp_path / "source"
    if damage == "a file":
        source.write_text("x")
    elif damage != "missing":
        copy_model(llama, source)
    if damage == "truncated":
        os.truncate(source / "model.safetensors", 5000)
    elif damage == "no config":
        (source / "config.json").unlink()
    elif damage == "quantized beyond understanding":
        change_config(source, quantization_config={"quant_method": "gptq", "bits": "x"})
    result = cli(
        command, source, "--json", *(["--length", "32", "--chunks", "2"] if command == "evaluate" else [])
    )
    assert result.code in (1, 4) and "Traceback" not in result.err
    assert isinstance(json.loads(result.out), dict)
    assert str(source) in result.err or "GPTQ" in result.err


BOMB = "".join(
    f"- &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES: dict[str, tuple[str, int, str]] = {
    "unknown key": (
        "method: gptq\ngruop_size: 32\n",
        2,
        "recipe key is 'gruop_size': did you mean 'group_size'",
    ),
    "not YAML": ("a: [", 2, "is not YAML"),
    "a list": ("- a\n", 2, "a recipe is a mapping of options to values"),
    "empty": ("", 2, "a recipe is a mapping of options to values"),
    "wrong types": ("method: minmax\nbits: many\nsamples: -3\n", 2, "2 problems:"),
    "a date": ("method: 2020-01-01\n", 2, "method is"),
    "nested without end": ("a: " + "[" * 3000, 2, "is not YAML"),
    "aliases that stand for billions": (
        "method: minmax\nignore:\n- &a [x,x,x,x,x,x,x,x,x]\n" + BOMB,
        2,
        "aliases (*name) that stand for more than",
    ),
    "an alias of itself": ("method: minmax\noptions: &a {x: *a}\n", 2, "aliases (*name)"),
    "a number too long": (f"bits: {'9' * 5000}\n", 2, "is not YAML"),
    "a key twice": ("method: minmax\nmethod: gptq\n", 2, "the key 'method' stands twice"),
    "several unknown keys": ("metod: gptq\n2: 3\n", 2, "2 problems:"),
    "a number where a text is needed": (
        "method: minmax\nvllm_version: 0.10\n",
        2,
        "vllm_version is 0.1: input should be a valid string, in quotes",
    ),
    "a GPU that is a number, no method": ("gpu: 3\n", 2, "gpu is 3"),
    "ranks that are text, no method": (
        "gpu: L40S-48GB\ntensor_parallel: abc\nmodel_path: [1]\n",
        2,
        "tensor_parallel is 'abc'",
    ),
    "an alpha that is text": (
        "method: minmax\nalpha: foo\n",
        2,
        "error: alpha is 'foo': input should be a number from 0 to 1, or auto",
    ),
    "a seed beyond 63 bits": (
        f"method: minmax\nseed: {2**63}\n",
        2,
        "seed is 9223372036854775808: input should be less than",
    ),
    "a rule of method none": (
        "method: minmax\nrules: [{layers: '0', method: none}]\n",
        2,
        "skip: true leaves layers unquantized",
    ),
    "a value that is not what its tag says": ("method: !!bool perhaps\n", 2, "is not YAML"),
    "a date that is none": ("seed: !!timestamp x\n", 2, "is not YAML"),
    "a number without digits": ("seed: !!int ''\n", 2, "is not YAML"),
    "megabytes": ("# " + "x" * (1 << 22), 1, "larger than the 4 MiB"),
    "a tag that makes objects": ("method: !!python/object/apply:os.system ['true']\n", 2, "is not YAML"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_with_a_mistake_is_refused_by_name(
    case: str, llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    text, code, message = RECIPES[case]
    (tmp_path / "r.yaml").write_text(text)
    result = cli("quantize", "-m", llama, "-o", tmp_path / "out", "--config", tmp_path / "r.yaml")
    assert (result.code, result.out) == (code, "")
    assert message in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_a_full_output_directory_is_left_as_it_is(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    result = cli("quantize", "-m", llama, "-o", tmp_path / "out", *MINMAX)
    assert (
        result.code == 1
        and "the output directory is not empty: choose another --output-path, or remove it" in result.err
    )
    assert (tmp_path / "out" / "mine").read_text() == "x" and not (tmp_path / "out.work").exists()


def test_an_output_below_a_file_is_an_error_in_one_line(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "file").write_text("")
    result = cli("quantize", "-m", llama, "-o", tmp_path / "file" / "out", *MINMAX)
    assert result.code == 1 and "Traceback" not in result.err and str(tmp_path / "file") in result.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_folders_without_permission_are_errors_in_one_line(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = cli("quantize", "-m", llama, "-o", locked / "out", *MINMAX)
    assert result.code == 1 and "Permission denied" in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    "arguments",
    [["inspect", ""], ["verify", "-m", ""], ["evaluate", "x", "--text", ""], ["recommend", "--model", ""],
    ["detect", "--gpu", ""],
     ["quantize", "-m", "x", "-o", ""], ["quantize", "-m", "x", "-o", "y", "--calibration-dataset", ""]],
    ids=" ".join,
)  # fmt: skip
def test_an_empty_path_or_name_is_not_the_current_directory(
    arguments: list[str], cli: Callable[..., Any]
) -> None:
    result = cli(*arguments)
    assert result.code == 2 and ("empty" in result.err or "--gpu is ''" in result.err), result.err
