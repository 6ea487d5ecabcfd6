"""How a long command tells where it is: a line drawn over itself on a terminal, plain lines in a pipe, and no
silence in either."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quant.commands import terminal
from quant.commands.terminal import Output
from quant.progress import Event
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_REDRAWN", 0.01)
    monkeypatch.setattr(terminal, "_SILENT", 0.05)


def _wait(capsys: pytest.CaptureFixture[str], words: str) -> str:
    """What was printed until these words came."""
    text, until = "", time.monotonic() + 20
    while words not in text and time.monotonic() < until:
        time.sleep(0.02)
        text += capsys.readouterr().err
    return text


def test_a_pipe_gets_lines_while_the_library_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress() as progress:
        assert _wait(capsys, "\n").startswith("starting · ")  # before the first event
        progress(Event("quantize", 3, 10, detail="block 3"))
        progress(Event("quantize", detail="model.layers.3.mlp.up_proj"))
        text = _wait(capsys, "up_proj")
        assert "quantize · 3 of 10 · model.layers.3.mlp.up_proj · " in text and "of memory" in text
        progress(Event("quantize", 4, 10, message="block 3 written"))
        progress(Event("verify"))
        text = _wait(capsys, "verify · ")
        assert "block 3 written\n" in text
        assert "\r" not in text and "\033" not in text and "verify · 4 of 10" not in text
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""  # it ends with the command


def test_a_terminal_gets_one_line_that_is_drawn_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    with Output().progress() as progress:
        progress(Event("quantize", 5, 10, detail="a.very.long.name.of.a.linear.that.does.not.fit"))
        text = _wait(capsys, "██████████░░░░░░░░░░ 5 of 10")
    text += capsys.readouterr().err
    assert "\n" not in text and text.endswith("\r\033[2K")  # nothing of it stays
    assert all(len(line.removeprefix("\033[2K")) < 40 for line in text.split("\r"))


def test_the_time_left_is_that_of_units_of_one_kind_and_counts_down(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = terminal._Progress(Output(), "starting")
    progress.close()

    def left(event: Event, seconds: float) -> str:
        progress(event)
        now[0] += seconds
        return progress._left(progress.event).removeprefix(" · ").removesuffix(" left")

    assert left(Event("quantize", 1, 6), 30) == ""  # the embedding, done at once, says nothing of blocks
    assert left(Event("quantize", 2, 6), 0) == "2 min 0 s"
    assert left(Event("quantize", detail="model.layers.2.mlp.up_proj"), 20) == "1 min 40 s"
    now[0] += 60  # this block takes longer than the one before
    assert progress._left(progress.event) == " · 1 min 30 s left"
    assert left(Event("quantize", 6, 6), 0) == "" and left(Event("verify", 1, 3), 5) == ""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are told by Linux alone")
def test_the_memory_is_that_of_what_was_started_too() -> None:
    before = terminal._memory()
    held = "held = bytearray(200 * 2**20); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", held], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "\n"
        assert terminal._memory() - before > 190 * 2**20
        child.communicate("\n")
    assert terminal._memory() - before < 100 * 2**20


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are told by Linux alone")
def test_a_thread_that_ends_meanwhile_hides_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, opened, looked = os.listdir, open, list[str]()

    def noted(path: str) -> Any:
        looked.append(path)
        return opened(path)

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, text=True) as child:
        monkeypatch.setattr(os, "listdir", lambda path: ["0", *listed(path)])  # there is no thread 0
        monkeypatch.setattr(terminal, "open", noted, raising=False)
        terminal._memory()
        child.communicate("\n")
    assert f"/proc/{child.pid}/statm" in looked


@pytest.mark.parametrize("error", [AttributeError, ValueError, OSError])
def test_memory_that_cannot_be_told_is_none(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> int:
        raise error(name)

    monkeypatch.setattr(os, "sysconf", refused)
    assert terminal._memory() == 0


def test_quiet_is_silent_but_for_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(quiet=True).progress() as progress:
        progress(Event("quantize", 1, 2, message="block 0 written"))
        time.sleep(0.2)
        progress(Event("quantize", message="a layer fell back", warning=True))
    assert capsys.readouterr().err == "warning: a layer fell back\n"


def test_no_command_imports_what_takes_long_before_it_says_that_it_started() -> None:
    """What a command imports before its progress begins is silent: torch is not among it."""
    program = """
import sys
import deploy_vllm, quantize
from contextlib import contextmanager
from quant.commands.terminal import Output
@contextmanager
def begun(self, phase="starting"):
    print("torch" in sys.modules)
    sys.stdout.flush()
    raise SystemExit(0)
    yield
Output.progress = begun
(deploy_vllm if sys.argv[1] == "deploy" else quantize).main(sys.argv[2:])
"""
    model = str(ROOT / "examples" / "tinylm-4m")
    for words in (
        ["deploy", "speculate", model],
        ["quant", "quantize", "-m", model, "--method", "gptq", "--dry-run"],
        ["quant", "evaluate", model],
        ["quant", "verify", model],
        ["quant", "export-vllm", "-m", model, "-o", "never-written"],
        ["deploy", "check", "--checkpoint", model],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.stdout.strip() == "False", (words, done.stdout, done.stderr)
