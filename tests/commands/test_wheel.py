"""The wheel, built and installed outside the checkout, runs there: its recipes and its texts are in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".git", ".*", "*.work", "__pycache__", "build", "dist", "*.egg-info", "tests", "logs", "shared"
    )
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("quant-*.whl")
    site = folder / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    shutil.rmtree(folder / "source")
    return site


def python(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_every_data_file_of_the_checkout_is_in_the_wheel(installed: Path) -> None:
    for folder, target in (
        ("configs", "quant/configs"),
        ("quant/calibration/data", "quant/calibration/data"),
    ):
        wanted = {
            f.relative_to(ROOT / folder)
            for f in (ROOT / folder).rglob("*")
            if f.suffix in (".yaml", ".json", ".gz", ".md")
        }
        assert wanted and wanted <= {
            f.relative_to(installed / target) for f in (installed / target).rglob("*")
        }
    modules = {f.relative_to(ROOT) for f in (ROOT / "quant").rglob("*.py")}
    assert modules <= {f.relative_to(installed) for f in installed.rglob("*.py")}
    assert (installed / "quant" / "py.typed").exists()


def test_the_installed_command_quantizes_with_the_bundled_text_outside_the_checkout(
    installed: Path, llama: Path, tmp_path: Path
) -> None:
    (entry,) = [
        line
        for line in next(installed.glob("*.dist-info/entry_points.txt")).read_text().splitlines()
        if line.startswith("quant =")
    ]
    assert entry == "quant = quantize:main"
    run = "import quantize; quantize.main()"
    options = [
        "quantize",
        "-m",
        str(llama),
        "-o",
        str(tmp_path / "out"),
        "--method",
        "gptq",
        "--group-size",
        "32",
        "--samples",
        "4",
        "--sequence-length",
        "32",
    ]
    done = python(installed, tmp_path, "-c", run, *options, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verify"]["passed"]
    where = python(
        installed, tmp_path, "-c", "import quant, quantize; print(quant.__file__, quantize.__file__)"
    ).stdout.split()
    assert all(path.startswith(str(installed)) for path in where)
