"""Legacy engines: what is refused before anything runs, and what the real libraries make where their
environment is at hand."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quant
from quant.backends import BACKENDS
from quant.backends.run import legacy_config, plan_backend, probe
from quant.errors import Problems, QuantError, UsageError
from tests.helpers import TINYLM, load_all, quantize, short_text

#: Python of the environment that `make test` builds with `python -m quant.backends.environment`.
LEGACY = os.environ.get("QUANT_LEGACY_PYTHON")
needs_legacy = pytest.mark.skipif(
    LEGACY is None, reason="QUANT_LEGACY_PYTHON names no environment with the archived engines"
)
SMALL = {"samples": 16, "sequence_length": 128}


def options(**more: Any) -> list[str]:
    values = {
        "-m": TINYLM,
        "--calibration-dataset": short_text(),
        "--samples": 16,
        "--sequence-length": 128,
    } | more
    return [str(x) for pair in values.items() for x in pair]


def test_a_backend_brings_its_method_and_format() -> None:
    recipe = quant.make_recipe({"model_path": "m", "output_path": "o", "backend": "autoawq"})
    assert (recipe.method, recipe.format, recipe.resolved_scheme(recipe.method).name) == (
        "awq",
        "awq",
        "w4a16-asym",
    )
    recipe = quant.make_recipe(
        {"model_path": "m", "output_path": "o", "backend": "auto-gptq", "format": "compressed-tensors"}
    )
    assert (recipe.method, recipe.format) == ("gptq", "compressed-tensors")


def test_a_backend_python_without_a_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="--backend-python belongs to --backend"):
        quant.make_recipe({"model_path": "m", "output_path": "o", "method": "gptq", "backend_python": "p"})


def test_the_settings_are_the_librarys_own_words() -> None:
    values = {
        "model_path": "m",
        "output_path": "o",
        "backend": "auto-gptq",
        "bits": 8,
        "group_size": 64,
        "symmetric": False,
        "act_order": "none",
    }
    assert BACKENDS["auto-gptq"].settings(quant.make_recipe(values)) == {
        "bits": 8, "group_size": 64, "sym": False, "damp_percent": 0.01, "desc_act": False,
        "static_groups": False
    }  # fmt: skip
    awq = quant.make_recipe({"model_path": "m", "output_path": "o", "backend": "autoawq", "group_size": 64})
    assert BACKENDS["autoawq"].settings(awq) == {
        "w_bit": 4,
        "q_group_size": 64,
        "zero_point": True,
        "version": "GEMM",
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"--backend": "autoawq", "--method": "gptq"}, ["--method is 'gptq'", "has only awq"]),
        ({"--backend": "autoawq", "--scheme": "w4a16"}, ["w4a16-asym in groups"]),
        ({"--backend": "auto-gptq", "--scheme": "w8a8-int8"}, ["16-bit activations"]),
        (
            {"--backend": "autoawq", "--layers": "first:1", "--damping": "0.1"},
            ["--layers is not an option", "--damping is not an option"],
        ),
        ({"--backend": "awq"}, ["'awq' is not one of"]),
    ],
)
def test_what_a_backend_lacks_is_refused_with_everything_else(
    cli: Callable[..., Any], tmp_path: Path, given: dict[str, str], words: list[str]
) -> None:
    result = cli("quantize", *options(**given, **{"-o": tmp_path / "out"}))
    assert result.code == 2
    for word in words:
        assert word in result.err
    assert not (tmp_path / "out").exists()


def test_an_environment_without_the_library_is_told_how_to_get_one() -> None:
    for name, backend in BACKENDS.items():
        (problem,) = probe(backend, Path(sys.executable))
        assert f"python -m quant.backends.environment {name} DIR" in problem
        assert "archived" in problem and "--backend native" in problem


def test_a_python_that_is_none_is_named(tmp_path: Path) -> None:
    (problem,) = probe(BACKENDS["autoawq"], tmp_path / "nothing")
    assert str(tmp_path / "nothing") in problem and "is not a Python that runs" in problem


def test_a_library_job_with_a_backend_never_runs_natively(tmp_path: Path) -> None:
    recipe = quant.make_recipe(
        {"model_path": TINYLM, "output_path": tmp_path / "o", "backend": "autoawq"} | SMALL
    )
    with pytest.raises(Problems, match="awq cannot be imported"):
        quant.quantize(recipe)
    from quant.pipeline.plan import plan_job

    with pytest.raises(UsageError, match="quant.quantize runs the others"):
        quant.QuantizationManager(plan_job(recipe))


def test_rotary_embeddings_reach_transformers_4_under_their_old_names() -> None:
    config = {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
    }
    old = legacy_config(config)
    assert old["torch_dtype"] == "bfloat16" and old["rope_theta"] == 5e5
    assert old["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert "rope_scaling" not in legacy_config(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    )
    with pytest.raises(QuantError, match="differ by kind of layer"):
        legacy_config({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}})


def test_the_settings_given_reach_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.backends.run.probe", lambda backend, python: [])
    given = {"backend": "auto-gptq", "damping": 0.05, "act_order": "none", "group_size": 64}
    plan = plan_backend(
        quant.make_recipe({"model_path": TINYLM, "output_path": tmp_path / "o"} | given | SMALL)
    )
    found = BACKENDS["auto-gptq"].settings(plan.recipe)
    assert (found["damp_percent"], found["desc_act"], found["group_size"]) == (0.05, False, 64)
    assert {x.weights.group_size for x in plan.linears.values()} == {64}


@needs_legacy
def test_autogptq_says_that_it_needs_cuda(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli(
        "quantize", *options(**{"--backend": "auto-gptq", "--backend-python": LEGACY, "-o": tmp_path / "out"})
    )
    if result.code == 0:
        pytest.skip("there is a GPU here")
    assert "quantizes only on a CUDA GPU" in result.err and "--backend native --method gptq" in result.err
    assert not (tmp_path / "out").exists()


@needs_legacy
def test_autoawq_makes_a_checkpoint_like_any_other(cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli(
        "quantize", *options(**{"--backend": "autoawq", "--backend-python": LEGACY, "-o": out}), "--json"
    )
    assert result.code == 0, result.err
    report = json.loads(result.out)
    native = quantize(
        TINYLM, tmp_path / "native", method="awq", format="awq", calibration_dataset=[short_text()], **SMALL
    )
    assert set(native) - set(report) == set()
    assert report["backend"]["autoawq"] == BACKENDS["autoawq"].version and report["verify"]["passed"]
    assert (
        report["bits_per_weight"] == native["bits_per_weight"]
        and report["tensors"]["quantized"] == native["tensors"]["quantized"]
    )
    ours, theirs = load_all(tmp_path / "native"), load_all(out)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in (tmp_path / "native").iterdir())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (TINYLM / name).exists():
            assert (out / name).read_bytes() == (TINYLM / name).read_bytes()
    assert all(0 < x["error"] < 0.1 for x in report["layers"])
    assert not list(tmp_path.glob("out.*"))
    # without copies of the weights to go back to, the search on a CPU leaves its first candidate's scales in
    # them: several times worse than rounding
    rounded = quantize(TINYLM, tmp_path / "rounded", method="minmax", symmetric=False)
    kl = [
        quant.evaluate(p, against=TINYLM, chunks=8, length=256).kl.mean for p in (out, rounded["output_path"])
    ]
    assert kl[0] < 1.2 * kl[1]


#: Answers the probe as a good environment would: the worker is what fails.
GOOD_PROBE = 'case "$4" in *importlib*) echo \'{"module": "0", "cuda": true}\'; exit 0;; esac\n'


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("echo null\n", 2, "is not a Python that runs"),
        ("echo '[]'\n", 2, "is not a Python that runs"),
        ("printf '\\377\\376'\n", 2, "is not a Python that runs"),
        (GOOD_PROBE + "exit 0\n", 1, "the library failed (status 0)"),
        (GOOD_PROBE + "kill -9 $$\n", 1, "the library failed (status -9)"),
        (GOOD_PROBE + "echo '{\"versions\"'\n", 1, "the library failed (status 0)"),
        (GOOD_PROBE + "printf '\\377\\n'; exit 3\n", 1, "the library failed (status 3)"),
        (
            GOOD_PROBE + 'echo \'{"versions": {}, "seconds": 1, "notes": []}\'\n',
            1,
            "the library failed (status 0)",
        ),
    ],
)
def test_a_python_that_is_none_or_dies_is_an_error_and_leaves_nothing(
    body: str, code: int, said: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + body)
    python.chmod(0o755)
    chosen = options(**{"-o": tmp_path / "out", "--backend": "autoawq", "--backend-python": python})
    result = cli("quantize", *chosen, "--json")
    assert result.code == code and said in result.err and json.loads(result.out)["exit_code"] == code
    assert [f.name for f in tmp_path.iterdir()] == ["python"]
