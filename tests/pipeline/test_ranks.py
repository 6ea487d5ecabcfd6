"""Several processes at work on one job make the bytes that one makes, and none of them hangs when another
ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from quant import jobs
from quant.errors import QuantError, UsageError
from quant.pipeline.ranks import devices_of
from quant.torchrun import seat
from tests.helpers import ROOT, quantize, recipe, short_text, weight_files

TEXT: dict[str, Any] = {"samples": 11, "sequence_length": 32, "calibration_dataset": [short_text()]}
JOBS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 32, "kv_cache_scheme": "fp8", **TEXT},
    "awq": {"method": "awq", "group_size": 32, **TEXT},
    "nvfp4": {"method": "gptq", "scheme": "nvfp4", **TEXT},
    "fp8": {"method": "fp8"},
    # three blocks, of which the last to be made has a turn of its own
    "yaqa": {
        "method": "yaqa",
        "group_size": 32,
        "outlier_suppression": "awq",
        "kv_cache_scheme": "fp8",
        **TEXT,
    },
    # what one process solves by slices, which ranks have at other blocks
    "yaqa and gptq": {
        "method": "yaqa", "group_size": 32, "rules": [{"layers": "*.self_attn.*", "method": "gptq"}], **TEXT,
    },
}  # fmt: skip
#: Of a mixture of experts, whose tokens are exchanged.
MIXTURES: dict[str, dict[str, Any]] = {
    "blend": {"method": "gptq", "group_size": 32, **TEXT},
    # whose second products are scaled by rows of the first
    "scaled": {"method": "awq", "group_size": 32, **TEXT},
    "gradients": {"method": "yaqa", "group_size": 32, **TEXT},
    "gradients, smoothed": {
        "method": "yaqa", "group_size": 32, "outlier_suppression": "awq", "moe_calibration": "all", **TEXT,
    },
    "smoothed, all": {
        "scheme": "w8a8-int8", "outlier_suppression": "smooth_quant", "moe_calibration": "all", **TEXT,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def said(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in layer.items() if k != "seconds"} for layer in report["layers"]]


@pytest.mark.parametrize("job", [*JOBS, *MIXTURES])
def test_two_ranks_make_the_files_that_one_process_makes(
    job: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    llama = checkpoints("llama", num_hidden_layers=3 if "yaqa" in job else 2)
    if job in MIXTURES:
        llama = checkpoints("mixtral", num_local_experts=3)
    wanted = quantize(llama, tmp_path / "one", **(JOBS | MIXTURES)[job])
    found = quantize(llama, tmp_path / "two", devices="cpu,cpu", **(JOBS | MIXTURES)[job])
    assert weight_files(tmp_path / "two") == weight_files(tmp_path / "one")
    assert said(found) == said(wanted)
    assert list(found["folds"].items()) == list(wanted["folds"].items())
    assert not psutil.Process().children()[1:]  # none but multiprocessing's own tracker is left


def test_ranks_share_a_budget_and_keep_the_bytes(llama: Path, tmp_path: Path) -> None:
    job = JOBS["gptq"] | {"devices": "cpu,cpu"}
    with pytest.raises(QuantError, match="in 2 ranks: give --max-memory") as refused:
        quantize(llama, tmp_path / "two", max_memory=1 << 20, **job)
    assert not (tmp_path / "two.work").exists()
    least = int(re.findall(r"give --max-memory (\d+)MiB", str(refused.value))[0]) << 20
    placed = jobs.foreseen(recipe(llama, tmp_path / "dry", max_memory=4 * least, **job))["placement"]
    assert placed["memory_bytes"] <= 2 * least and placed["batch_rows"] == placed["usual_rows"] == 6
    found = quantize(llama, tmp_path / "two", max_memory=4 * least, scratch_dir=tmp_path / "s", **job)
    quantize(llama, tmp_path / "one", **JOBS["gptq"])
    assert weight_files(tmp_path / "two") == weight_files(tmp_path / "one")
    assert found["verify"]["passed"]


def command(model: Path, output: Path, *options: str) -> list[str]:
    text = ["--calibration-dataset", str(short_text()), "--samples", "16", "--sequence-length", "64"]
    job = ["--method", "gptq", "--group-size", "32", *text]
    return [str(ROOT / "quantize.py"), "quantize", "-m", str(model), "-o", str(output), *job, *options]


def test_a_rank_that_is_killed_ends_the_run_and_any_number_of_ranks_goes_on(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoints("llama", num_hidden_layers=5)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output, journal = tmp_path / "out", tmp_path / "out.work" / "journal.jsonl"
    process = subprocess.Popen(
        [sys.executable, *command(model, output, "--devices", "cpu,cpu,cpu")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not journal.exists() or len(journal.read_text().splitlines()) < 4:  # amid the third block
        assert process.poll() is None
        time.sleep(0.01)
    helpers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(helpers) == 2
    helpers[0].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in errors
    assert re.search(r"rank \d \(cpu\) ended by SIGKILL: finished work is kept", errors)
    assert not output.exists() and not [p for p in helpers if p.is_running() and p.status() != "zombie"]
    two = subprocess.run(
        [sys.executable, *command(model, output, "--devices", "cpu,cpu")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0 and "resuming" in two.stderr, two.stderr
    subprocess.run([sys.executable, *command(model, tmp_path / "one", "-q")], env=environment, check=True)
    assert weight_files(output) == weight_files(tmp_path / "one")


def test_torchrun_starts_ranks_of_which_one_speaks(llama: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launch, *command(llama, tmp_path / "two", "--device", "cpu", "--json")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output_path"] == str(tmp_path / "two")
    options = {"samples": 16, "sequence_length": 64}
    quantize(llama, tmp_path / "one", method="gptq", group_size=32, device="cpu", **options)
    assert weight_files(tmp_path / "two") == weight_files(tmp_path / "one")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"devices": "cpu,,cpu"}, "name devices between commas"),
        ({"devices": "cpu,tpu"}, "give cpu, cuda or cuda:N"),
        ({"devices": "0,1"}, "'0,1'.*no CUDA device is visible"),
        ({"devices": "cpu,cpu", "device": "cpu"}, "give one of the two"),
        ({"devices": "cpu,cpu,cpu", "method": "gptq", "samples": 2}, "3 ranks for 2 calibration rows: use 2"),
        ({"devices": ",".join(["cpu"] * 9), "method": "gptq", "samples": 20}, "9 ranks for 20 .*in 8 parts"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    options: dict[str, Any], problem: str, llama: Path, tmp_path: Path
) -> None:
    if "0,1" in str(options) and __import__("torch").cuda.is_available():
        pytest.skip("GPUs are here")
    with pytest.raises(QuantError, match=problem):
        jobs.foreseen(recipe(llama, tmp_path / "out", group_size=32, **options))
    assert not list(tmp_path.iterdir())


def test_a_mixture_without_text_is_divided_by_blocks(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoints("mixtral")
    options = {"method": "minmax", "group_size": 32, "devices": "cpu,cpu"}
    ranks = jobs.foreseen(recipe(model, tmp_path / "out", **options))["ranks"]
    assert ranks == {"count": 2, "devices": ["cpu", "cpu"], "divided": "whole blocks of the output"}


def test_a_gpu_stands_in_the_list_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = recipe(tmp_path, tmp_path / "out")
    assert [str(d) for d in devices_of(asked.model_copy(update={"devices": "0,1"}))] == ["cuda:0", "cuda:1"]
    for devices, problem in {
        "0,0": "cuda:0 stands twice",
        "cuda,0": "cuda:0 stands twice",
        "0,2": "torch sees 2 CUDA devices",
        "0,cpu": "must be of one kind",
    }.items():
        with pytest.raises(UsageError, match=problem):
            devices_of(asked.model_copy(update={"devices": devices}))


def test_half_of_what_torchrun_sets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert seat() is None
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="RANK is set and WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
        seat()
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    found = seat()
    assert found is not None and (found.rank, found.size, found.local) == (1, 2, 1)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UsageError, match="must be from 0 to 1"):
        seat()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(UsageError, match="--standalone"):
        seat()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UsageError, match="numbers are needed"):
        seat()
