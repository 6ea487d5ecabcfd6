"""The program that measures how long commands are silent, on programs whose silence is known."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_words_that_come_in_two_reads_end_a_server_too() -> None:
    halves = UNTIL_STOPPED.replace(
        'print("Ctrl-C stops it", flush=True)',
        'print("Ctrl-C st", end="", flush=True); time.sleep(0.5); print("ops it", flush=True)',
    )
    run = silence.watch([sys.executable, "-c", halves], False, dict(os.environ), "Ctrl-C stops it")
    assert run.status == 0 and run.seconds < 50


def test_what_is_measured_are_commands_that_there_are(tmp_path: Path) -> None:
    programs = {"quantize.py": quantize.SUBCOMMANDS, "deploy_vllm.py": deploy_vllm.SUBCOMMANDS}
    measured = silence.commands("examples/tinylm-4m", tmp_path, sys.executable)
    names = list(measured)
    for name, command in measured.items():
        assert command.words[2] in programs[command.words[1]], name
        assert all(names.index(other) < names.index(name) for other in command.needs)
    assert {command.words[2] for command in measured.values()} >= {
        "quantize", "smooth", "verify", "evaluate", "serve", "bench", "check", "speculate", "report",
    }  # fmt: skip
    assert any("--push-to-hub" in c.words and c.uploads for c in measured.values())


def test_one_command_alone_is_behind_what_it_needs(tmp_path: Path) -> None:
    measured = silence.commands("examples/tinylm-4m", tmp_path, None)
    assert silence.wanted(measured, ["report"]) == [
        ("quantize gptq", False), ("quantize awq", False), ("report", True),
    ]  # fmt: skip
    assert all(counts for _, counts in silence.wanted(measured, []))
    assert silence.wanted(measured, ["no such"]) == []


def test_a_command_that_does_not_end_as_it_should_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def program(code: str, *needs: str, statuses: tuple[int, ...] = (0,)) -> Any:
        return silence.Command([sys.executable, "-c", code], needs, statuses=statuses)

    measured = {
        "first": program("print('making'); raise SystemExit(3)"),
        "second": program("print('done')", "first"),
        "third": program("raise SystemExit(4)", statuses=(0, 4)),
    }
    _, failed = silence.measure(measured, [], False, dict(os.environ), "")
    assert failed == ["first (pipe): exit status 3, after: making"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(measured)
    _, failed = silence.measure(measured, ["second"], False, dict(os.environ), "")
    assert len(failed) == 1  # what it needs is judged, and not measured
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["second"]
    _, failed = silence.measure(measured, ["third"], False, dict(os.environ), "")
    assert not failed


def test_uploads_go_to_the_hub_that_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import os; print(os.environ['HF_ENDPOINT'])"
    measured = {"up": silence.Command([sys.executable, "-c", code], uploads=True)}
    _, failed = silence.measure(measured, [], False, dict(os.environ), "http://127.0.0.1:1")
    assert not failed and "up" in capsys.readouterr().out
    run = silence.watch(measured["up"].words, False, {"HF_ENDPOINT": "http://127.0.0.1:1"})
    assert run.last == "http://127.0.0.1:1"


def test_names_that_no_command_has_are_refused() -> None:
    words = [sys.executable, "benchmarks/silence.py", "--only", "no such command"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2 and "no command has that in its name" in done.stderr
