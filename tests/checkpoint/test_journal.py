"""The work folder: one run at a time, resumed only for the same job, and only from files that are whole."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.writer import ShardWriter, TensorSpec
from quant.errors import QuantError

JOB = {"source": "m", "settings": {"bits": 4, "path": ["a", "b"]}}


def finish(work: WorkFolder, unit: str, size: int = 4) -> Path:
    path = work.path / f"{unit}.safetensors"
    with ShardWriter(path, [TensorSpec("x", "F32", (size,))]) as writer:
        writer.write("x", torch.ones(size))
    work.finish_unit(unit, {path: writer.digest}, {"layers": {}})
    return path


def stopped(output: Path, *units: str) -> None:
    """A run that finished these units and was killed."""
    work = WorkFolder(output, JOB, fresh=False)
    for unit in units:
        finish(work, unit)
    work.release()


def resumed(output: Path, job: dict[str, Any] = JOB, fresh: bool = False) -> list[str]:
    work = WorkFolder(output, job, fresh)
    units = list(work.finished)
    work.release()
    return units


def test_finished_units_are_there_after_a_stop_in_their_order(tmp_path: Path) -> None:
    stopped(tmp_path / "out", "b", "a")
    assert resumed(tmp_path / "out") == ["b", "a"]


def test_a_first_unit_that_is_interrupted_while_it_is_noted_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, append = WorkFolder(tmp_path / "out", JOB, fresh=False), WorkFolder._append

    def interrupted(self: WorkFolder, entry: Any) -> None:
        append(self, entry)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(work, "a")
    work.release()
    monkeypatch.undo()
    assert resumed(tmp_path / "out") == ["a"]


def test_a_first_unit_that_could_not_be_noted_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: WorkFolder, entry: Any) -> None:
        raise OSError(28, "No space left on device")

    work = WorkFolder(tmp_path / "out", JOB, fresh=False)
    monkeypatch.setattr(WorkFolder, "_append", full)
    with pytest.raises(OSError):
        finish(work, "a")
    work.release()
    assert not work.path.exists()


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    stopped(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_on_the_same_output_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    first = WorkFolder(tmp_path / "out", JOB, fresh=False)
    for fresh in (False, True):
        with pytest.raises(
            QuantError,
            match=r"out.work: another run is working on this output: wait for it, or choose another",
        ):
            WorkFolder(tmp_path / "out", JOB, fresh)
    finish(first, "a")
    first.release()
    assert resumed(tmp_path / "out") == ["a"]


def test_work_of_another_job_is_refused_named_and_kept_until_fresh_is_asked(tmp_path: Path) -> None:
    stopped(tmp_path / "out", "a")
    for _ in range(2):  # the refusal itself must not hold the lock
        with pytest.raises(
            QuantError, match=r"unfinished work of another job \(source was 'm', is 'other'\): .*--fresh"
        ):
            resumed(tmp_path / "out", JOB | {"source": "other"})
    assert resumed(tmp_path / "out") == ["a"]
    assert resumed(tmp_path / "out", JOB | {"source": "other"}, fresh=True) == []
    assert not (tmp_path / "out.work").exists()


def test_a_last_line_cut_off_by_a_kill_is_forgotten_and_the_journal_goes_on(tmp_path: Path) -> None:
    stopped(tmp_path / "out", "a", "b")
    journal = tmp_path / "out.work" / "journal.jsonl"
    whole = journal.read_text()
    for cut in range(len(whole) - len(whole.splitlines()[-1]), len(whole) - 1):
        journal.write_text(whole[:cut])
        work = WorkFolder(tmp_path / "out", JOB, fresh=False)
        assert list(work.finished) == ["a"]
        finish(work, "b")
        work.release()
        assert [json.loads(line).get("unit") for line in journal.read_text().splitlines()] == [None, "a", "b"]
        assert resumed(tmp_path / "out") == ["a", "b"]


@pytest.mark.parametrize("content", ["", "\n", "{", "[]\n", '{"unit": "a"}\n', "3\n", "\x00\x01"])
def test_a_journal_without_its_first_line_starts_over(content: str, tmp_path: Path) -> None:
    stopped(tmp_path / "out", "a")
    (tmp_path / "out.work" / "journal.jsonl").write_text(content)
    assert resumed(tmp_path / "out") == []


@pytest.mark.parametrize(
    "damage",
    ["truncated", "emptied", "removed", "grown", "header", "one bit of data", "one letter of the header"],
)
def test_a_unit_whose_file_is_damaged_is_done_again(damage: str, tmp_path: Path) -> None:
    stopped(tmp_path / "out", "a", "b")
    file = tmp_path / "out.work" / "a.safetensors"
    raw = file.read_bytes()
    damaged = {
        "truncated": raw[:-1],
        "grown": raw + b"x",
        "header": b"\0" * len(raw),
        "one bit of data": raw[:-1] + bytes([raw[-1] ^ 1]),
        "one letter of the header": raw.replace(b'"format":"pt"', b'"format":"px"'),
    }
    file.write_bytes(damaged.get(damage, b""))
    assert file.read_bytes() != raw
    if damage == "removed":
        file.unlink()
    assert resumed(tmp_path / "out") == ["b"]


def test_a_journal_of_before_files_had_hashes_starts_over(tmp_path: Path) -> None:
    stopped(tmp_path / "out", "a")
    journal = tmp_path / "out.work" / "journal.jsonl"
    first, entry = map(json.loads, journal.read_text().splitlines())
    assert len(entry["files"][0].pop("digest")) == 64
    journal.write_text(f"{json.dumps(first)}\n{json.dumps(entry)}\n")
    assert resumed(tmp_path / "out") == []


def test_files_that_no_finished_unit_claims_are_removed_on_resume(tmp_path: Path) -> None:
    """Half a shard, activations of a killed run, side files: they would end up in the output."""
    stopped(tmp_path / "out", "a")
    work = tmp_path / "out.work"
    (work / "activations.bin").write_bytes(b"x")
    (work / "half.safetensors").write_bytes(b"x")
    (work / "code").mkdir()
    (work / "code" / "x.py").write_text("")
    again = WorkFolder(tmp_path / "out", JOB, fresh=False)
    assert sorted(f.name for f in work.iterdir()) == ["a.safetensors", "journal.jsonl", "lock"]
    again.publish()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a.safetensors"]


def test_publishing_renames_the_folder_and_takes_an_empty_target_along(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    work = WorkFolder(tmp_path / "out", JOB, fresh=False)
    finish(work, "a")
    work.publish()
    assert [f.relative_to(tmp_path).as_posix() for f in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/a.safetensors",
    ]


def test_an_interrupt_while_publishing_waits_until_nothing_of_the_work_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkFolder(tmp_path / "out", JOB, fresh=False)
    finish(work, "a")
    rename = os.rename

    def interrupted(before: Path, after: Path) -> None:
        rename(before, after)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "rename", interrupted)
    # a suite in the background starts with interrupts ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work.publish()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [f.relative_to(tmp_path).as_posix() for f in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/a.safetensors",
    ]


def test_a_target_that_filled_up_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out", JOB, fresh=False)
    finish(work, "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(QuantError, match="is not empty any more"):
        work.publish()
    work.release()
    assert (tmp_path / "out" / "precious").read_text() == "x"
    assert resumed(tmp_path / "out") == ["a"]
