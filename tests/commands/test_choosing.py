"""What helps a user to choose and to begin: lists, the doctor, a first recipe, completion in a shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant import defaults, doctor
from quant.hardware import detect, named_gpu
from quant.health import Health
from quant.listing import KINDS, listing
from quant.recipe import make_recipe, read_recipe
from tests.helpers import ROOT, short_text


def test_lists_have_what_the_programs_take() -> None:
    from quant.formats import FormatRegistry
    from quant.quantizers import QuantizerRegistry
    from quant.schemes import SchemeRegistry

    names = {kind: [item["name"] for item in listing(kind)] for kind in KINDS}
    assert set(names["methods"]) == {*QuantizerRegistry.names(), "fp8"} == set(defaults.METHODS)
    assert sorted(names["schemes"]) == SchemeRegistry.names()
    assert sorted(names["formats"]) == FormatRegistry.names()
    assert {"T4", "L40S-48GB"} <= set(names["gpus"]) and "Qwen/Qwen3-8B" in names["models"]
    assert "chat" in names["scenarios"] and all(item["about"] for item in listing("formats"))
    # part of a name, whatever the marks between
    assert [x["name"] for x in listing("models", "qwen3 8b")] == ["Qwen/Qwen3-8B"]


@pytest.mark.parametrize("name", [n for n in defaults.METHODS if n not in ("fp8", "none")])
def test_what_a_list_says_of_calibration_is_so(name: str) -> None:
    from quant.quantizers import QuantizerRegistry

    own = QuantizerRegistry.get(name)
    assert defaults.METHODS[name].calibration == bool(own.needs or own.suppressor), name


def test_list_prints_rows_and_one_json_object(cli: Callable[..., Any]) -> None:
    counts = json.loads(cli("list", "--json").out)
    for kind in KINDS:
        shown, value = cli("list", kind), json.loads(cli("list", kind, "--json").out)
        assert shown.code == 0 and len(value["items"]) == counts[kind] > 0
        assert all(item["name"] in shown.out for item in value["items"])
    assert "shows all" in cli("list", "gpus", "no-such-part").out
    assert cli("list", "colours").code == 2


def findings(**options: Any) -> dict[str, doctor.Finding]:
    return {f.name: f for f in doctor.examine(environment={}, **options)}


def test_the_doctor_sees_what_does_not_fit_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    hot = replace(named_gpu("L40S"), driver="550.1", health=Health(temperature=91, slowdown_temperature=92))
    here = replace(detect(), gpus=(hot,), note="")
    monkeypatch.setattr(doctor, "_torch_build", lambda: ("2.13.0", None, None))
    found = findings(detection=here)
    assert found["torch"].state == "warning" and "CUDA build" in found["torch"].next
    assert found["gpu 0"].state == "warning" and "91 °C is hot" in found["gpu 0"].found
    monkeypatch.setattr(doctor, "_torch_build", lambda: ("2.13.0", "13.0", None))
    monkeypatch.setattr(doctor, "_driver_cuda", lambda: (12, 4))
    assert findings(detection=here)["torch"].state == "problem"
    monkeypatch.setattr(doctor, "_driver_cuda", lambda: (13, 1))
    assert findings(detection=here)["torch"].state == "ok"
    # a package that is too old, and one that is missing, with the command that mends both
    needed = ["click>=99", "no-such-package>=1", "rich>=13", "pyarrow>=14 ; extra == 'parquet'"]
    monkeypatch.setattr(doctor, "requires", lambda name: needed)
    wrong = findings()["packages"]
    assert wrong.state == "problem" and wrong.next == "pip install 'click>=99' 'no-such-package>=1'"
    assert cli("doctor", "--json").code == 1
    assert findings(vllm_python=tmp_path / "none")["vllm"].state == "problem"


def test_the_doctor_finds_vllm_and_the_cache_where_they_are(tmp_path: Path) -> None:
    for version, state in (("0.32.1+cpu", "ok"), ("0.19.0", "warning")):
        site = tmp_path / version
        (site / "vllm").mkdir(parents=True)
        (site / "vllm" / "__init__.py").write_text("raise SystemExit('it is never imported')")
        (site / f"vllm-{version}.dist-info").mkdir()
        (site / f"vllm-{version}.dist-info" / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
        python = site / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        found = findings(vllm_python=python)["vllm"]
        assert (found.state, version in found.found) == (state, True)
    (tmp_path / "hub" / "models--org--name").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "quantize.py"), "doctor", "--json"],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    shown = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert f"{tmp_path / 'hub'}: 1 model, " in shown["hub cache"]["found"]
    assert "offline" in shown["hub"]["found"]


@pytest.mark.parametrize("asked", [["--scheme", "w8a8-int8"], ["--gpu", "T4"], ["--method", "hqq"]])
def test_a_first_recipe_is_one_that_quantize_takes(
    asked: list[str], llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    file = tmp_path / "job.yaml"
    assert cli("recipe", "init", "-m", llama, *asked, "--output", file, "-o", tmp_path / "out").code == 0
    text = file.read_text(encoding="utf-8")
    recipe = make_recipe(read_recipe(file))
    assert recipe.model_path == llama and recipe.output_path == tmp_path / "out"
    assert cli("recipe", "init", "-m", llama, *asked, "--output", file).code == 2  # never overwritten
    # every key that is commented out is one, with the value that holds without it
    keys = text[text.index("model_path:") :]
    lines = [x[2:] for x in keys.splitlines() if x.startswith("# ") and x[2:].split(":")[0].isidentifier()]
    written = tmp_path / "whole.yaml"
    written.write_text(text + "\n".join(x for x in lines if x.partition("#")[0].rstrip()[-1] != ":"))
    whole = make_recipe(read_recipe(written))
    assert len(lines) >= 18
    assert whole.resolved_scheme(whole.method) == recipe.resolved_scheme(recipe.method)
    assert {k: v for k, v in whole.settings().items() if k in ("samples", "format", "seed")} == {
        k: v for k, v in recipe.settings().items() if k in ("samples", "format", "seed")
    }
    made = cli("quantize", "--config", file, "--group-size", "32", "--calibration-dataset", short_text(),
               "--samples", "4", "--sequence-length", "32", "--dry-run")  # fmt: skip
    assert (made.code == 0) == (asked[0] != "--scheme"), made.err  # w8a8 has no groups


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_a_shell_completes_commands_options_and_names(tmp_path: Path) -> None:
    program = tmp_path / "quant"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/quantize.py" "$@"\n')
    program.chmod(0o755)
    script = """
eval "$(_QUANT_COMPLETE=bash_source quant)"
try() {
COMPREPLY=(); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _quant_completion quant; echo "${COMPREPLY[*]}"; }
try quant qu
try quant quantize --scheme w4
try quant detect --gpu L40S
try quant list sc
try quant recipe in
"""
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["quantize", "w4a16 w4a16-asym", "L40S-48GB"]
    assert lines[3:] == ["schemes scenarios", "init"]
