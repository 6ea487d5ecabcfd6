"""What a batch shows while it runs, on a terminal and piped, and what it says in the end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quant.batch.forecast import Forecast
from quant.batch.manifest import read_manifest
from quant.batch.run import State
from quant.batch.session import Batch
from quant.commands.render import batch as render
from quant.commands.terminal import Output
from quant.units import MIB


@pytest.fixture
def states(tmp_path: Path) -> list[State]:
    (tmp_path / "config.json").write_text("{}")
    names = ("runs", "waits", "done", "bad", "away", "a-name-that-goes-on-" * 6)
    lines = [f"- {{model: ., output: ../o/{n}, name: {n}, overrides: {{method: gptq}}}}\n" for n in names]
    (tmp_path / "m.yaml").write_text("jobs:\n" + "".join(lines))
    found = [State(j, status="running") for j in read_manifest(tmp_path / "m.yaml")]
    found[0].log = tmp_path / "log"
    found[0].log.write_text("block 1 written\nquantize · 3 of 14 · " + "long " * 60 + "\n")
    found[0].attempts = 1
    found[1].status, found[1].forecast = "waiting", Forecast(memory_bytes=300 * MIB, seconds=75)
    found[2].status = "done"
    found[2].facts = {"output_bytes": MIB, "bits_per_weight": 4.1, "kl": 0.0123, "seconds": 75.0}
    found[3].status, found[3].message, found[3].log = "failed", "what it said last", tmp_path / "bad.log"
    found[4].status, found[4].where = "elsewhere", "host b, process 7"
    return found


def drawn(value: Any, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(value)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 120])
def test_the_live_table_has_a_line_for_each_job_that_runs_and_one_for_the_rest(
    width: int, states: list[State]
) -> None:
    board = render.Board(Output())
    board.watch(states)
    lines = drawn(board._table(), width).splitlines()
    assert len(lines) == 4 and all(len(line) <= width for line in lines)
    assert lines[0].startswith("1 of 6 done · 2 running · 1 elsewhere · 1 waiting · 1 failed"[: width - 1])
    if width > 100:
        assert lines[1].startswith("runs ") and "quantize · 3 of 14" in lines[1]
        assert "on host b, process 7" in lines[2]


def test_a_piped_batch_says_each_change_in_a_line(
    states: list[State], capsys: pytest.CaptureFixture[str]
) -> None:
    with render.Board(Output()) as board:
        board.watch(states)
        for kind, state in zip(
            ("started", "planned", "finished", "failed", "elsewhere"), states, strict=False
        ):
            board.told(kind, state)
    assert capsys.readouterr().err.splitlines() == [
        "runs: started",
        "done: done in 1 min 15 s: 1.00 MiB, 4.100 bits a weight, KL 0.01230 nats",
        "warning: bad: failed: what it said last",
        "away: host b, process 7 has it",
    ]
    with render.Board(Output(quiet=True)) as board:
        board.told("started", states[0])
    assert capsys.readouterr().err == ""


def test_the_summary_says_what_failed_why_and_where_its_log_is(states: list[State], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=150)
    render.summary(console, Batch(tuple(states[:5]), tmp_path, tmp_path / "report.html"), False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "5 jobs: 1 done, 1 elsewhere, 1 failed, 1 running, 1 to run" in text
    assert f"bad: what it said last; its log: {tmp_path}/bad.log" in " ".join(text.split())
    (row,) = (line for line in text.splitlines() if line.startswith("done "))
    assert row.split() == ["done", "done", "4.100", "1.00", "MiB", "0.01230", "1", "min", "15", "s"]
    console = Console(file=io.StringIO(), width=150)
    render.summary(console, Batch((states[1],), tmp_path), True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "300 MiB" in text and "1 min 15 s" in text and "1 job: 1 to run" in text
