"""The program that measures how long commands are silent, on programs whose silence is known."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

import deploy_vllm
import quantize
from tests.helpers import ROOT

_SPEC = importlib.util.spec_from_file_location("silence", ROOT / "benchmarks" / "silence.py")
assert _SPEC is not None and _SPEC.loader is not None
silence = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = silence  # where its dataclass looks for its annotations
_SPEC.loader.exec_module(silence)

QUIET_THEN_LOUD = "import sys, time; print('begun', flush=True); time.sleep(0.8); print('done'); sys.exit(3)"
UNTIL_STOPPED = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
print("Ctrl-C stops it", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_the_longest_silence_and_what_was_said_before_it_are_found(terminal: bool) -> None:
    run = silence.watch([sys.executable, "-c", QUIET_THEN_LOUD], terminal, dict(os.environ))
    assert run.gap >= 0.7 and run.seconds >= run.gap and run.status == 3
    assert run.before in ("begun", "(nothing yet)")  # on a busy machine the interpreter's own start is longer


def test_a_server_is_interrupted_once_it_says_that_it_serves() -> None:
    run = silence.watch([sys.executable, "-c", UNTIL_STOPPED], True, dict(os.environ), "Ctrl-C stops it")
    assert run.status == 0 and run.seconds < 50


def test_what_is_measured_are_commands_that_there_are(tmp_path: Path) -> None:
    programs = {"quantize.py": quantize.SUBCOMMANDS, "deploy_vllm.py": deploy_vllm.SUBCOMMANDS}
    measured = silence.commands("examples/tinylm-4m", tmp_path, sys.executable)
    for name, (words, _) in measured.items():
        assert words[2] in programs[words[1]], name
    assert {words[2] for words, _ in measured.values()} >= {
        "quantize",
        "smooth",
        "verify",
        "evaluate",
        "serve",
    }
