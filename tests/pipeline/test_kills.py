"""Jobs that are killed at random moments, whose files a power loss has damaged, or whose disk is full: the
program that does it hundreds of times (``benchmarks/kills.py``), a few times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, short_text

#: A mount namespace of one's own, which containers may not allow.
_MOUNTS = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]


def study(source: Path, *options: str) -> dict[str, Any]:
    words = [
        sys.executable,
        str(ROOT / "benchmarks/kills.py"),
        str(source),
        "--samples",
        "8",
        "--length",
        "64",
    ]
    words += ["--group-size", "32", "--calibration-dataset", str(short_text()), *options]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "gptq", "--kills", "10"),
        ("--method", "yaqa", "--kills", "6", "--damage"),
        ("--method", "yaqa", "--kills", "4", "--devices", "cpu,cpu"),
    ],
    ids=" ".join,
)
def test_a_killed_job_goes_on_to_the_bytes_of_an_undisturbed_one(
    options: tuple[str, ...], checkpoints: Callable[..., Path]
) -> None:
    found = study(checkpoints("llama", num_hidden_layers=4), *options)
    assert found["kills"] == int(options[3]) and 1 <= found["finished"] == found["identical"]


def test_a_full_disk_is_said_and_the_job_goes_on_once_there_is_room(checkpoints: Callable[..., Path]) -> None:
    try:
        allowed = subprocess.run(_MOUNTS, capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("no file system of its own can be mounted here")
    found = study(checkpoints("llama", num_hidden_layers=4), "--method", "gptq", "--disk-full", "4")
    assert found["full disks"] == found["said"] == found["identical"] == 4
