"""A minute of hostile input; ``python -m tests.fuzz --examples 100000`` goes on for longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytest.importorskip("hypothesis")


def test_no_hostile_file_makes_a_command_fail_in_another_way_than_by_a_message(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.fuzz", "--examples", "400", "--processes", "1", "--seed", "7"]
    done = subprocess.run(
        [*words, "--keep", str(tmp_path / "kept")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    said = json.loads(done.stdout[done.stdout.rindex("\n{\n") :])
    assert said["examples"] >= 400 and said["faults"] == {} and len(said["by file"]) > 30


def test_a_write_outside_a_traceback_and_a_silent_failure_are_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the program looks for, done by a command on purpose."""
    from tests.fuzz import running
    from tests.fuzz.mutations import damaged
    from tests.fuzz.targets import Target

    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds/file").write_text("x")
    monkeypatch.setattr(running, "WARM", ())
    monkeypatch.setenv("TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    runner = running.Runner(tmp_path / "seeds", tmp_path)
    target = Target("file", damaged, ())

    def unforeseen(command: object) -> None:
        import click

        from quant.commands.terminal import run

        @click.command
        def broken_command() -> None:
            raise KeyError("x")

        run(broken_command, "quant", [])

    def found(act: Callable[[object], None]) -> str:
        monkeypatch.setattr(running, "_call", act)
        fault = runner.run(target, b"y", ("command",))
        return "" if fault is None else fault.signature

    def outside(command: object) -> None:
        (tmp_path / "elsewhere").write_text("x")

    def inside(command: object) -> None:
        assert Path("file").read_text() == "y"
        Path("out").mkdir()
        Path("out/x").write_text("x")

    def silent(command: object) -> None:
        raise SystemExit(1)

    def other(command: object) -> None:
        raise SystemExit(70)

    def broken(command: object) -> None:
        raise KeyError("x")

    def waits(command: object) -> None:
        while True:
            pass

    monkeypatch.setattr(running, "_ENDED", (0.2, 60.0))
    assert found(inside) == "" and not (runner.box / "out").exists()
    assert found(outside).startswith("writes outside")
    assert found(silent).startswith("status 1 without a word")
    assert found(other) == "status 70"
    assert found(broken).startswith("KeyError")
    assert found(unforeseen).startswith("KeyError: commands/terminal.py, line ")
    assert found(waits).startswith("waits")
    assert (runner.box / "file").read_text() == "x"
