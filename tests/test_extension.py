"""The extension guide: its code is the code that runs, its package installs, and its commands do what they
say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.forking import Forks, forks
from tests.helpers import ROOT, copy_model, load_all, save_all, short_text

GUIDE = (ROOT / "docs" / "extension_guide.md").read_text(encoding="utf-8")
#: Commands that the guide shows for installing; the test installs into a folder instead.
INSTALL = "pip install ./examples/extension"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, built and installed by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("extension")
    shutil.copytree(
        ROOT / "examples" / "extension",
        folder / "source",
        ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"),
    )
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", str(folder / "site")]
    install = [sys.executable, "-m", "pip", "install", *options, str(folder / "source")]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "source")
    return folder / "site"


@pytest.fixture(scope="module")
def installed(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Where the package is installed."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "OMP_NUM_THREADS": "1"}
    with forks(tmp_path_factory.mktemp("said"), environment) as process:
        yield process


@pytest.fixture
def run(installed: Forks, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``quant`` where the package is installed, in a folder that has what a checkout has."""
    for name in ("examples", "configs"):
        os.symlink(ROOT / name, tmp_path / name)

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return installed.run(ROOT / "quantize.py", *arguments, cwd=tmp_path)

    return call


def unwrapped(code: str) -> str:
    """Code without what depends on its indentation: where it is wrapped, and the comma before a bracket."""
    return "".join(code.split()).replace(",)", ")").replace(",]", "]").replace(",}", "}")


def test_every_block_of_the_guide_is_a_part_of_the_file_it_names() -> None:
    blocks = re.findall(r"(?:^`([^`\n]+)`:\n\n)?^```(python|toml)\n(.*?)^```", GUIDE, re.S | re.M)
    assert len(blocks) >= 14
    for file, _, code in blocks:
        assert file, f"a block names no file:\n{code}"
        whole = (ROOT / file).read_text(encoding="utf-8")
        assert unwrapped(code) in unwrapped(whole), f"{file} no longer has\n{code}"
    shown = "\n".join(code for file, _, code in blocks if file.startswith("examples/"))
    package = (ROOT / "examples" / "extension" / "pyproject.toml").read_text(encoding="utf-8")
    for line in re.search(r"^\[project\.entry-points.*?(?=^\[tool)", package, re.S | re.M)[0].splitlines():  # type: ignore[index]
        assert line in shown, f"the guide does not show {line!r}"


def test_the_commands_of_the_guide_run(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    lines = [
        line for block in re.findall(r"^```sh\n(.*?)^```", GUIDE, re.S | re.M) for line in block.splitlines()
    ]
    assert lines.count(INSTALL) == 1 and len(lines) == 8
    for line in lines:
        words = shlex.split(line)
        if line == INSTALL:
            continue
        assert words[0] == "quant"
        done = run(*words[1:], "--json")
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        result = json.loads(done.stdout)
        if words[1] == "recommend":
            assert result["recommended"]["scheme"] == words[words.index("--scheme") + 1]
        if words[1] == "quantize":
            assert result["verify"]["passed"] and result["method"] == words[words.index("--method") + 1]
            assert {x["method"] for x in result["layers"]} == {result["method"]}
    folds = json.loads((tmp_path / "out" / "root" / "quant_report.json").read_text())["folds"]
    assert {f["suppressor"] for f in folds.values()} == {"root"}
    assert (
        json.loads((tmp_path / "out" / "codes" / "config.json").read_text())["quantization_config"][
            "quant_method"
        ]
        == "codes"
    )


def test_the_foreign_method_does_what_its_name_says(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    kl = {}
    for method in ("minmax", "my-hqq"):
        options = ["--scheme", "w4a16-asym", "--group-size", "64", "--json"]
        assert (
            run("quantize", "-m", "examples/tinylm-4m", "-o", method, "--method", method, *options).returncode
            == 0
        )
        measured = run(
            "evaluate",
            method,
            "--against",
            "examples/tinylm-4m",
            "--chunks",
            "24",
            "--length",
            "128",
            "--json",
        )
        kl[method] = json.loads(measured.stdout)["kl"]["mean"]
    assert kl["my-hqq"] < 0.95 * kl["minmax"], kl


def test_a_foreign_method_has_settings_and_refusals_like_any_other(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    job = ["quantize", "-m", "examples/tinylm-4m", "-o", "out", "--method", "my-hqq", "--group-size", "64"]
    refused = run(*job, "--scheme", "w4a16")
    assert (
        refused.returncode == 2
        and "--method my-hqq: moves zero points, which W4 g64 symmetric has none of" in refused.stderr
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text("scheme: w4a16-asym\noptions: {norm: 0.5, iterations: 2}\n")
    assert run(*job, "--config", recipe).returncode == 0
    recipe.write_text("scheme: w4a16-asym\noptions: {nrom: 0.5}\n")
    shutil.rmtree(tmp_path / "out")
    refused = run(*job, "--config", recipe)
    assert (
        refused.returncode == 2
        and "--nrom is not an option of --method my-hqq: it has norm, penalty, iterations" in refused.stderr
    )


def test_the_foreign_format_is_read_back_verified_and_exported(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    source, other = "examples/tinylm-4m", ["--target", "other"]
    job = ["quantize", "-m", source, "--method", "minmax", "--scheme", "w8a16", "--group-size", "64"]
    for form in ("codes", "plain", "compressed-tensors"):
        done = run(*job, "-o", form, "--format", form, *other)
        assert done.returncode == 0, done.stderr
    # back to the values that it stands for, to a format of ours, and from there
    for made, form in (("codes", "plain"), ("codes", "compressed-tensors"), ("compressed-tensors", "codes")):
        done = run("export-vllm", "-m", made, "-o", f"{made}-{form}", "--format", form, *other)
        assert done.returncode == 0, done.stderr
        wanted, got = load_all(tmp_path / form), load_all(tmp_path / f"{made}-{form}")
        assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    # judged: whole, and refused by what it says of vLLM and for what its parts are
    good = run("verify", "codes", "--source", source, *other, "--json")
    assert good.returncode == 0 and json.loads(good.stdout)["passed"], good.stdout
    refused = run("verify", "codes", "--json")
    assert refused.returncode == 4 and "vLLM does not know it: use --target other" in refused.stdout
    tensors, name = load_all(tmp_path / "codes"), "model.layers.0.mlp.down_proj"
    for damaged in (lambda t: t[:-1], lambda t: t * 0):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        copy_model(tmp_path / "codes", tmp_path / "damaged")
        for file in (tmp_path / "damaged").glob("*.safetensors*"):
            file.unlink()
        save_all(tmp_path / "damaged", tensors | {f"{name}.scales": damaged(tensors[f"{name}.scales"])})
        found = run("verify", "damaged", *other, "--json")
        assert found.returncode == 4 and f"{name}.scales " in found.stdout
        assert "the contract is" in found.stdout or "zero scales" in found.stdout
    shutil.rmtree(tmp_path / "damaged")
    copy_model(tmp_path / "codes", tmp_path / "damaged")
    for file in (tmp_path / "damaged").glob("*.safetensors*"):
        file.unlink()
    save_all(tmp_path / "damaged", {n: t for n, t in tensors.items() if n != f"{name}.scales"})
    lost = run("export-vllm", "-m", "damaged", "-o", "no", "--format", "plain")
    assert lost.returncode == 1 and f"1 quantized linears have no scales ({name})" in lost.stderr
    # what vLLM does not know is advised to nobody
    plan = run("recommend", "-m", "codes", "--gpu", "L40S-48GB", "--scheme", "none", "--json")
    result = json.loads(plan.stdout)
    assert plan.returncode == 3 and result["recommended"] is None
    assert "vLLM does not know it" in str(result["plans"][0]), result


def test_the_foreign_scheme_is_planned_made_read_back_and_verified(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    ask = ["recommend", "-m", "examples/tinylm-4m", "--gpu", "L40S-48GB", "--scheme", "w8a16-channel"]
    plan = run(*ask, "--json")
    assert plan.returncode == 0, plan.stderr
    result = json.loads(plan.stdout)
    assert result["recommended"]["scheme"] == "w8a16-channel"
    (planned,) = result["plans"]
    command = shlex.split(result["recommended"]["commands"][0])
    assert command[:2] == ["quant", "quantize"] and "w8a16-channel" in command
    command[command.index("--output-path") + 1] = "made"
    made = run(*command[1:], "--json")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["scheme"]["name"] == "w8a16-channel" and report["scheme"]["weights"]["group_size"] == -1
    written = sum(f.stat().st_size for f in (tmp_path / "made").glob("*.safetensors"))
    assert planned["checkpoint_bytes"] == pytest.approx(written, rel=1e-3)  # the headers' lengths are guessed
    checked = run("verify", "made", "--source", "examples/tinylm-4m", "--json")
    assert checked.returncode == 0, checked.stdout
    # the same numbers as ours make with a group an output, read back to the same values
    ours = ["--method", "minmax", "--scheme", "w8a16", "--group-size", "-1", "--format", "plain"]
    assert run("quantize", "-m", "examples/tinylm-4m", "-o", "ours", *ours).returncode == 0
    assert run("export-vllm", "-m", "made", "-o", "back", "--format", "plain").returncode == 0
    wanted, got = load_all(tmp_path / "ours"), load_all(tmp_path / "back")
    assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    # in the format of the same package, and next to ours where names are listed
    both = ["--scheme", "w8a16-channel", "--format", "codes", "--target", "other", "--json"]
    made = run("quantize", "-m", "examples/tinylm-4m", "-o", "both", "--method", "minmax", *both)
    assert made.returncode == 0 and json.loads(made.stdout)["scheme"]["name"] == "w8a16-channel"
    assert "w8a16-channel" in run("quantize", "--help").stdout
    unknown = run("quantize", "-m", "examples/tinylm-4m", "-o", "no", "--scheme", "w8a16-chanel")
    assert unknown.returncode == 2 and "did you mean 'w8a16-channel'" in unknown.stderr


def test_the_foreign_family_is_the_one_that_its_checkpoints_get(
    run: Callable[..., subprocess.CompletedProcess[str]], checkpoints: Callable[..., Path]
) -> None:
    model = checkpoints("granite")
    assert json.loads(run("inspect", model, "--json").stdout)["adapter"] == "my-granite"
    options = [
        "--group-size",
        "32",
        "--samples",
        "4",
        "--sequence-length",
        "32",
        "--calibration-dataset",
        short_text(),
        "--json",
    ]
    done = run("quantize", "-m", model, "-o", "out", "--method", "gptq", *options)
    assert done.returncode == 0, done.stderr
    checked = run("verify", "out", "--source", model, "--json")
    assert checked.returncode == 0, checked.stdout
    back = run("export-vllm", "-m", "out", "-o", "back", "--format", "plain")
    assert back.returncode == 0, back.stderr
    plan = run("recommend", "-m", "out", "--gpu", "L40S-48GB", "--scheme", "none", "--json")
    assert plan.returncode == 0 and json.loads(plan.stdout)["recommended"]["scheme"] == "none", plan.stderr


def test_a_broken_package_stops_only_the_job_that_asks_for_it(
    run: Callable[..., subprocess.CompletedProcess[str]], site: Path, tmp_path: Path
) -> None:
    (site / "quant_broken.py").write_text("import a_module_that_is_not_there\n")
    info = site / "quant_broken-3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quant-broken\nVersion: 3\n")
    groups = ("quantizers", "outlier_suppression", "formats", "schemes", "models")
    (info / "entry_points.txt").write_text("".join(f"[quant.{g}]\nbroken = quant_broken:X\n" for g in groups))
    try:
        job = ["quantize", "-m", "examples/tinylm-4m", "--group-size", "64", "--symmetric"]
        done = run(*job, "-o", "out", "--method", "minmax", "--clip-search")
        assert done.returncode == 0 and "quant_broken" not in done.stderr
        for option in ("--method", "--format", "--outlier-suppression", "--scheme"):
            others = [] if option == "--method" else ["--method", "gptq"]
            refused = run(*job, "-o", "no", option, "broken", *others)
            assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
            assert (
                "quant_broken:X of the package quant-broken 3 cannot be loaded (ModuleNotFoundError"
                in refused.stderr
            )
    finally:
        shutil.rmtree(info)
        (site / "quant_broken.py").unlink()
