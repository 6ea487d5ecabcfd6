"""What the program imports and how long it takes to say something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import REFERENCE, ROOT, cpu_seconds

HEAVY = ("torch", "transformers", "rich", "pydantic", "numpy", "safetensors", "tokenizers")


def imported(arguments: list[str]) -> tuple[int, set[str]]:
    """Exit status of a run of ``quant``, and the heavy packages that it imported."""
    code = (
        f"import sys, json; sys.path.insert(0, {str(ROOT)!r}); import quantize\n"
        f"try: quantize.main({arguments!r})\n"
        "except SystemExit as stop: status = stop.code or 0\n"
        "print('\\n' + json.dumps([status, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, modules = json.loads(done.stdout.splitlines()[-1])
    return status, {name.partition(".")[0] for name in modules} & set(HEAVY)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["quantize", "--help"], ["--version"], ["verify", "--help"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        pytest.importorskip("importlib.metadata")
        try:
            __import__("importlib.metadata").metadata.version("quant")
        except Exception:
            pytest.skip("the package is not installed here, so it has no version to tell")
    assert imported(arguments) == (0, set())


def test_wrong_options_are_refused_before_anything_heavy_is_imported() -> None:
    status, packages = imported(["quantize", "--no-such-option"])
    assert (status, packages) == (2, set())


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_commands_that_read_files_never_import_torch(
    command: str, form: str, quantized: Callable[..., Path]
) -> None:
    status, packages = imported([command, str(quantized(format=form)), "--json"])
    assert status == 0 and not packages & {"torch", "transformers", "tokenizers"}


@pytest.mark.parametrize("kind", ["schemes", "methods", "formats", "models", "gpus", "scenarios"])
def test_lists_never_import_torch(kind: str) -> None:
    status, packages = imported(["list", kind, "--json"])
    assert status == 0 and not packages & {"torch", "transformers", "tokenizers"}


def test_importing_the_package_is_free_of_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import quant; quant.Scheme; quant.verify; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_takes_little_more_than_importing_click_and_rich() -> None:
    """At most half of that more: 60 ms where it takes 120."""
    assert cpu_seconds([sys.executable, str(ROOT / "quantize.py"), "--help"]) < 1.5 * cpu_seconds(REFERENCE)
