"""The commands as a user runs them: results, exit statuses, one JSON object on stdout and nothing else
there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from tests.helpers import ROOT, change_config, copy_model, files_of, read_config, short_text, weight_files

FAST = ["--samples", "4", "--sequence-length", "64", "--group-size", "32"]


def text() -> list[str]:
    return ["--calibration-dataset", str(short_text())]


def test_quantize_makes_a_checkpoint_that_the_other_commands_read(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    made = cli("quantize", "-m", llama, "-o", tmp_path / "out", "--method", "gptq", *FAST, *text(), "--json")
    assert made.code == 0
    report = json.loads(made.out)
    assert (report["method"], report["scheme"]["name"], report["format"]) == (
        "gptq",
        "w4a16",
        "compressed-tensors",
    )
    for command, key in (("inspect", "schemes"), ("verify", "checks"), ("evaluate", "perplexity")):
        extra = ["--against", llama, "--length", "32", "--chunks", "2"] if command == "evaluate" else []
        result = cli(command, tmp_path / "out", *extra, "--json")
        assert result.code == 0 and key in json.loads(result.out)
        shown = cli(command, "-m", tmp_path / "out", *extra, "-q")
        assert shown.code == 0 and len(shown.out.splitlines()) >= 3 and shown.err == ""
    assert cli("verify", tmp_path / "out", "--against", llama).code == 0


def test_the_original_one_command_form_works(llama: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    old = cli(
        "--model-path",
        llama,
        "--output-path",
        tmp_path / "old",
        "--method",
        "gptq",
        "--layer-wise",
        "--layers",
        "0,1",
        *FAST,
        *text(),
    )
    new = cli(
        "layer-wise",
        "-m",
        llama,
        "-o",
        tmp_path / "new",
        "--method",
        "gptq",
        "--layers",
        "0-1",
        *FAST,
        *text(),
    )
    assert (old.code, new.code) == (0, 0)
    assert weight_files(tmp_path / "old") == weight_files(tmp_path / "new")
    assert (
        cli(
            "--model-path",
            llama,
            "--output-path",
            tmp_path / "plain",
            "--method",
            "minmax",
            "--group-size",
            "32",
        ).code
        == 0
    )


def test_layer_wise_needs_layers_from_somewhere(llama: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "r.yaml").write_text("method: minmax\ngroup_size: 32\n")
    result = cli("layer-wise", "-m", llama, "-o", tmp_path / "out", "--config", tmp_path / "r.yaml")
    assert result.code == 2 and "missing --layers" in result.err
    (tmp_path / "r.yaml").write_text("method: minmax\ngroup_size: 32\nlayers: first:1\n")
    result = cli("layer-wise", "-m", llama, "-o", tmp_path / "out", "--config", tmp_path / "r.yaml", "--json")
    assert len(json.loads(result.out)["layers"]) == 7


def test_a_recipe_is_the_same_as_its_options_and_options_win(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "r.yaml").write_text(
        "method: minmax\ngroup_size: 32\nbits: 4\nignore: [o_proj]\nsymmetric: false\n"
    )
    cli(
        "quantize",
        "-m",
        llama,
        "-o",
        tmp_path / "a",
        "--config",
        tmp_path / "r.yaml",
        "--bits",
        "8",
        "--symmetric",
    )
    cli(
        "quantize",
        "-m",
        llama,
        "-o",
        tmp_path / "b",
        "--method",
        "minmax",
        "--bits",
        "8",
        "--group-size",
        "32",
        "--ignore",
        "o_proj",
    )
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")


def test_a_dry_run_prints_a_prediction_and_writes_nothing(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    result = cli(
        "quantize",
        "-m",
        llama,
        "-o",
        tmp_path / "out",
        "--method",
        "gptq",
        *FAST,
        *text(),
        "--dry-run",
        "--json",
    )
    value = json.loads(result.out)
    assert result.code == 0 and value["output_bytes"] > 0 and list(tmp_path.iterdir()) == []
    made = json.loads(
        cli("quantize", "-m", llama, "-o", tmp_path / "out", "--method", "gptq", *FAST, *text(), "--json").out
    )
    assert made["output_bytes"] == value["output_bytes"]


def test_a_dry_run_needs_no_output_path_and_says_that_there_is_none(
    llama: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = ["quantize", "-m", llama, "--method", "minmax", "--group-size", "32"]
    tried = cli(*job, "--dry-run", "--json")
    value = json.loads(tried.out)
    assert tried.code == 0 and value["output_path"] is None and value["output_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(llama)  # where no output may go
    assert cli(*job, "--dry-run").code == 0
    assert cli(*job).code == 2  # without it nothing is made


def test_the_last_line_serves_the_output_from_any_folder(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    output = tmp_path / "an [i]output[/] of mine"
    made = cli("quantize", "-m", llama, "-o", output, "--method", "minmax", "--group-size", "32")
    command = made.out.splitlines()[-1].partition(": ")[2]
    assert shlex.split(command) == ["quant-deploy", "serve", "-m", str(output)]
    assert "[i]output[/]" in made.out  # a path is no markup
    assert shlex.split(command)[1:] == _parsed(shlex.split(command)[1:])


def _parsed(words: list[str]) -> list[str]:
    """A command of quant-deploy as click understands it: its name, and the model that it was given."""
    import deploy_vllm

    context = click.Context(deploy_vllm.cli)
    name, command, rest = deploy_vllm.cli.resolve_command(context, words)
    assert name is not None and command is not None
    return [name, "-m", str(command.make_context(name, rest, parent=context).params["model_path"])]


def test_progress_and_results_go_to_their_own_streams(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    loud = cli("quantize", "-m", llama, "-o", tmp_path / "a", "--method", "minmax", "--group-size", "32")
    assert "block 1 written in" in loud.err and "Quantized" in loud.out and "written in" not in loud.out
    quiet = cli(
        "quantize",
        "-m",
        llama,
        "-o",
        tmp_path / "b",
        "--method",
        "minmax",
        "--group-size",
        "32",
        "-q",
        "--json",
    )
    assert quiet.err == "" and json.loads(quiet.out)["verify"]["passed"]


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "plain"])
@pytest.mark.parametrize("made", ["compressed-tensors", "gptq"])
def test_export_carries_values_over_from_format_to_format(
    made: str, form: str, quantized: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    from quant.evaluation.compare import compare

    result = cli(
        "export-vllm", "-m", quantized(format=made), "-o", tmp_path / "out", "--format", form, "--json"
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["format"] == form
    differences = [t for t in compare(tmp_path / "out", quantized(format=made)).tensors if not t.equal]
    assert all(form == "plain" and t.snr_db is not None and t.snr_db > 45 for t in differences)
    assert cli("verify", tmp_path / "out").code == 0
    before, after = files_of(quantized(format=made)), files_of(tmp_path / "out")
    assert after["tokenizer.json"] == before["tokenizer.json"]


def test_export_repairs_missing_side_files_and_refuses_what_is_not_quantized(
    llama: Path, quantized: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    bare = copy_model(quantized(), tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert (
        cli(
            "export-vllm", "-m", bare, "-o", tmp_path / "out", "--source", llama, "--max-model-len", "128"
        ).code
        == 0
    )
    assert files_of(tmp_path / "out")["tokenizer.json"] == files_of(llama)["tokenizer.json"]
    assert json.loads((tmp_path / "out" / "vllm_config.json").read_text())["max-model-len"] == 128
    refused = cli("export-vllm", "-m", llama, "-o", tmp_path / "no", "--format", "gptq")
    assert (
        refused.code == 2 and "is not quantized: quant quantize makes a gptq checkpoint of it" in refused.err
    )
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.work").exists()


@pytest.mark.parametrize("stated", ["float32", "float16", "bfloat16"])
def test_export_stores_scales_in_the_dtype_that_config_states(
    stated: str, quantized: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    source = copy_model(quantized(format="gptq"), tmp_path / "source")
    change_config(source, dtype=stated)
    result = cli("export-vllm", "-m", source, "-o", tmp_path / "out", "--format", "compressed-tensors")
    assert result.code == 0, result.err


def test_a_failed_verification_exits_with_4_and_one_json_object(
    quantized: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    broken = copy_model(quantized(), tmp_path / "m")
    config = read_config(broken)["quantization_config"]
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    change_config(broken, quantization_config=config)
    result = cli("verify", broken, "--json")
    assert result.code == 4
    value = json.loads(result.out)
    assert value["passed"] is False and "activation order" in result.err


def test_a_rise_of_perplexity_beyond_the_limit_exits_with_4_and_one_json_object(
    llama: Path, quantized: Callable[..., Path], cli: Callable[..., Any]
) -> None:
    asked = ["--against", llama, "--length", "32", "--chunks", "2", "--json"]
    result = cli("evaluate", quantized(bits=2, format="plain"), *asked, "--max-perplexity-increase", "-0.99")
    assert result.code == 4 and "perplexity rose by" in result.err
    assert json.loads(result.out)["perplexity"]["mean"] > 0
    missing = cli("evaluate", llama, "--max-perplexity-increase", "0.1")
    assert missing.code == 2 and "--max-perplexity-increase needs --against" in missing.err


def test_numbers_that_json_lacks_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quant.commands.terminal import Output

    Output(json=True).result({"a": [float("nan"), 1.5, float("inf")], "b": (float("-inf"),)}, lambda c: None)
    assert json.loads(capsys.readouterr().out, parse_constant=lambda c: pytest.fail(c)) == {
        "a": [None, 1.5, None],
        "b": [None],
    }


def test_an_interrupt_exits_with_130_and_keeps_finished_work(
    llama: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant.pipeline import units

    write, count = units.write_unit, []

    def interrupted(*args: Any) -> Any:
        if count:
            raise KeyboardInterrupt
        count.append(1)
        return write(*args)

    monkeypatch.setattr(units, "write_unit", interrupted)
    result = cli("quantize", "-m", llama, "-o", tmp_path / "out", "--method", "minmax", "--group-size", "32")
    assert result.code == 130 and "interrupted: finished work is kept" in result.err
    monkeypatch.undo()
    result = cli("quantize", "-m", llama, "-o", tmp_path / "out", "--method", "minmax", "--group-size", "32")
    assert result.code == 0 and "resuming: 1 of 3 units are finished" in result.err


@pytest.mark.parametrize(
    "command", ["quantize", "layer-wise", "export-vllm", "verify", "evaluate", "inspect"]
)
def test_every_command_has_help_with_an_example(command: str, cli: Callable[..., Any]) -> None:
    result = cli(command, "--help")
    assert result.code == 0 and f"quant {command} " in result.out and "--json" in result.out


def test_one_path_is_needed_by_argument_or_option(llama: Path, cli: Callable[..., Any]) -> None:
    for arguments in ([], [llama, "-m", llama]):
        result = cli("inspect", *arguments)
        assert result.code == 2 and "give one checkpoint directory" in result.err


def test_calibration_options_that_nothing_uses_are_said(
    cli: Callable[..., Any], llama: Path, tmp_path: Path
) -> None:
    given = [
        "-m",
        llama,
        "--group-size",
        "32",
        "--samples",
        "4",
        "--sequence-length",
        "32",
        "--calibration-dataset",
        short_text(),
    ]
    result = cli("quantize", *given, "-o", tmp_path / "minmax", "--method", "minmax")
    assert result.code == 0 and "--calibration-dataset, --samples, --sequence-length: not used" in result.err
    result = cli("quantize", *given, "-o", tmp_path / "gptq", "--method", "gptq")
    assert result.code == 0 and "not used" not in result.err


def test_the_public_names_are_listed_without_importing_what_they_stand_for() -> None:
    code = "import sys, quant; names = dir(quant); assert set(quant.__all__) <= set(names), names; "
    code += "assert 'torch' not in sys.modules and 'importlib' not in names; "
    code += "assert all(getattr(quant, n) is not None for n in quant.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
