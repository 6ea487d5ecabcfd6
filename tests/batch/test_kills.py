"""Real jobs of a batch that is killed, and whose jobs are: every output is byte for byte what the job makes
alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from tests.helpers import ROOT, left_alive, quantize, short_text, weight_files

OPTIONS = {
    "group_size": 32,
    "samples": 48,
    "sequence_length": 128,
    "calibration_dataset": [str(short_text())],
}


def journalled(work: Path) -> int:
    """Units that a job has finished; -1 where it has not begun."""
    try:
        return (work / "journal.jsonl").read_text().count("\n") - 1
    except OSError:
        return -1


def wait_for(condition: Callable[[], object], batch: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        assert batch is None or batch.poll() is None, "the batch ended before it could be disturbed"
        time.sleep(0.005)


def job_process(batch: subprocess.Popen[str]) -> psutil.Process:
    """The process of the job that runs."""
    found = [c for c in psutil.Process(batch.pid).children() if "quantize" in c.cmdline()]
    assert len(found) == 1
    return found[0]


def test_an_output_is_that_of_an_undisturbed_job_whatever_is_killed(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoints("llama", num_hidden_layers=8)
    job = {"model": str(source), "output": "out", "overrides": {"method": "gptq", **OPTIONS}}
    value = {"defaults": {"threads": torch.get_num_threads(), "retry_delay": 0.0}, "jobs": [job]}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(value))
    words = [sys.executable, str(ROOT / "quantize.py"), "batch", "m.yaml", "-q", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    batch = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    work = tmp_path / "out.work"
    before = []
    try:
        # the job is asked to end, then it is killed, then the batch is
        for units, number in ((1, signal.SIGTERM), (3, signal.SIGKILL), (5, None)):
            wait_for(lambda n=units: journalled(work) >= n, batch)  # type: ignore[misc]
            process = job_process(batch)
            process.send_signal(number) if number is not None else batch.kill()
            assert left_alive([process], 60) == []  # that of a killed batch is asked to end by its watcher
            before.append(journalled(work))
    finally:
        batch.kill()
        batch.communicate()
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in done.stdout.splitlines()]
    assert (lines[-1]["done"], lines[-1]["failed"]) == (1, 0) and Path(lines[-1]["page"]).is_file()
    wanted = quantize(source, tmp_path / "alone", method="gptq", **OPTIONS)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "alone")
    assert [x["output_hash"] for x in lines if x["event"] == "finished"] == [wanted["output_hash"]]
    logs = sorted((tmp_path / "m.batch/jobs").glob("*/[0-9]*.log"))
    said = [text for log in logs if "resuming: " in (text := log.read_text())]
    # nothing that was finished is done again
    assert [int(text.split("resuming: ")[1].split()[0]) for text in said] == before
    events = [
        json.loads(x) for f in (tmp_path / "m.batch/events").iterdir() for x in f.read_text().splitlines()
    ]
    assert sorted(x["status"] for x in events if x["event"] == "failed") == [-9, 75]
    again = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    kinds = [json.loads(x)["event"] for x in again.stdout.splitlines()]
    assert again.returncode == 0 and kinds == ["skipped", "summary"]


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    os.symlink(ROOT / "examples", tmp_path / "examples")
    for name in ("batch.yaml", "fp8.yaml"):
        (tmp_path / "configs" / name).write_text((ROOT / "configs" / name).read_text())
    return tmp_path


def test_the_example_manifest_runs_as_its_first_line_says(configs: Path, cli: Callable[..., Any]) -> None:
    file = configs / "configs/batch.yaml"
    assert file.read_text().splitlines()[0] == "# quant batch configs/batch.yaml"
    name = "out/batch/tinylm-4m-gptq-w4a16"
    found = cli("batch", file, "--job", name, "--json")
    assert found.code == 0, found.err
    lines = [json.loads(line) for line in found.out.splitlines()]
    assert [x["event"] for x in lines] == ["planned", "started", "finished", "summary"]
    made = lines[2]
    assert 0 < made["kl"] < 0.2 and 4 < made["bits_per_weight"] < 4.3
    assert abs(made["predicted"]["output_bytes"] - made["output_bytes"]) == 0
    assert (configs / name / "quant_evaluation.json").is_file()
    assert "tinylm-4m-gptq-w4a16" in Path(lines[3]["page"]).read_text()
