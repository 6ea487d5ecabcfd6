"""Status 75, and which failures a program may answer with the same command later."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant import jobs
from quant.errors import DeviceMemoryExhausted, DiskFull, InUse, QuantError


def test_a_job_that_gets_sigterm_ends_with_status_75(
    llama: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(jobs, "plan", asked)
    before = signal.getsignal(signal.SIGTERM)
    found = cli("quantize", "-m", llama, "-o", tmp_path / "out", "--method", "minmax", "--json")
    assert found.code == 75 and "finished work is kept, the same command goes on" in found.err
    value = json.loads(found.out)
    assert (value["exit_code"], value["retryable"]) == (75, True)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (DiskFull("x"), True),
        (DeviceMemoryExhausted("x"), True),
        (InUse("x"), True),
        (OSError(28, "No space left on device"), True),
        (OSError(13, "Permission denied"), False),
        (MemoryError(), True),
        (QuantError("x"), False),
    ],
)
def test_failures_that_may_pass_are_marked(
    error: Exception,
    retryable: bool,
    llama: Path,
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(jobs, "plan", fail)
    found = cli("quantize", "-m", llama, "-o", tmp_path / "out", "--method", "minmax", "--json")
    assert found.code == 1 and json.loads(found.out).get("retryable", False) is retryable
