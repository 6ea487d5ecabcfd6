"""A job that was stopped anywhere goes on with the same command, and the bytes are those of an undisturbed
run."""

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

import pytest
import torch

from quant.errors import QuantError
from quant.pipeline import finishing
from quant.pipeline import units as module
from tests.helpers import ROOT, copy_model, files_of, quantize, short_text, weight_files


class Stopped(Exception):
    """What the tests stop a job with."""


def stop_after(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next job ends when it has finished this many units, in the middle of the one after."""
    write, count = module.write_unit, []

    def stopping(*args: Any) -> Any:
        if len(count) == units:
            raise Stopped
        count.append(1)
        return write(*args)

    monkeypatch.setattr(module, "write_unit", stopping)


JOBS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 32},
    "gptq, asymmetric, file order": {
        "method": "gptq",
        "group_size": 32,
        "symmetric": False,
        "act_order": "none",
    },
    "gptq as plain": {"method": "gptq", "group_size": 32, "bits": 3, "format": "plain"},
    "gptq in gptq's format": {"method": "gptq", "group_size": -1, "format": "gptq"},
    "gptq of one block": {"method": "gptq", "group_size": 32, "layers": "1"},
    "minmax": {"method": "minmax", "group_size": 32},
}


@pytest.mark.parametrize(
    ("job", "dtype"),
    [*((j, torch.bfloat16) for j in JOBS), ("gptq", torch.float16), ("gptq as plain", torch.float16)],
)
def test_a_job_stopped_after_any_unit_goes_on_to_the_same_bytes(
    job: str,
    dtype: torch.dtype,
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoints("llama", dtype=dtype, num_hidden_layers=3)
    wanted = quantize(source, tmp_path / "undisturbed", **JOBS[job])
    for units in (1, 2, 3):
        output = tmp_path / f"stopped{units}"
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(units, patch)
            quantize(source, output, **JOBS[job])
        assert not output.exists() and (tmp_path / f"{output.name}.work").exists()
        found = quantize(source, output, **JOBS[job])
        assert found["output_hash"] == wanted["output_hash"]
        assert weight_files(output) == weight_files(tmp_path / "undisturbed")
        assert [{k: v for k, v in x.items() if k != "seconds"} for x in found["layers"]] == [
            {k: v for k, v in x.items() if k != "seconds"} for x in wanted["layers"]
        ]
        assert not (tmp_path / f"{output.name}.work").exists()


def test_a_job_stopped_before_anything_was_finished_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(0, monkeypatch)
    with pytest.raises(Stopped):
        quantize(llama, tmp_path / "out", method="gptq", group_size=32)
    assert list(tmp_path.iterdir()) == []


def test_a_job_stopped_after_its_last_unit_only_finishes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = quantize(llama, tmp_path / "undisturbed", method="gptq", group_size=32)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(finishing, "write_rest", lambda *a: (_ for _ in ()).throw(Stopped))
        quantize(llama, tmp_path / "out", method="gptq", group_size=32)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_unit", lambda *a: pytest.fail("a finished unit was written again"))
        found = quantize(llama, tmp_path / "out", method="gptq", group_size=32)
    assert found["output_hash"] == wanted["output_hash"]


def test_a_job_killed_right_after_its_output_got_its_name_only_finishes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JOBS["gptq"]
    wanted = quantize(llama, tmp_path / "undisturbed", **job)
    rename = os.rename

    def killed(*paths: Any) -> None:
        rename(*paths)
        if paths[1] == tmp_path / "out":
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("quant.checkpoint.journal.os.rename", killed)
        quantize(llama, tmp_path / "out", **job)
    assert {"journal.jsonl", "lock"} < {f.name for f in (tmp_path / "out").iterdir()}
    with pytest.raises(QuantError, match="holds unfinished work of another job"):
        quantize(llama, tmp_path / "out", **job | {"bits": 8})
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_unit", lambda *a: pytest.fail("a finished unit was written again"))
        found = quantize(llama, tmp_path / "out", **job)
    assert found["output_hash"] == wanted["output_hash"]
    assert files_of(tmp_path / "out").keys() == files_of(tmp_path / "undisturbed").keys()
    assert not (tmp_path / "out.work").exists()


def test_a_folder_with_a_journal_of_its_own_is_left_as_it_is(llama: Path, tmp_path: Path) -> None:
    for text in ("", "monday\n", '{"entry": 1}\n', "[" * 5000):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine/journal.jsonl").write_text(text)
        with pytest.raises(QuantError, match="the output directory is not empty"):
            quantize(llama, tmp_path / "mine", **JOBS["minmax"])
        assert (tmp_path / "mine/journal.jsonl").read_text() == text and not (tmp_path / "mine.work").exists()


def test_two_runs_of_one_job_give_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for job in ("gptq", "minmax"):
        reports = [quantize(llama, tmp_path / f"{job}{i}", **JOBS[job]) for i in range(2)]
        assert reports[0]["output_hash"] == reports[1]["output_hash"]
        assert weight_files(tmp_path / f"{job}0") == weight_files(tmp_path / f"{job}1")


def test_another_seed_or_text_gives_another_hash(llama: Path, tmp_path: Path) -> None:
    hashes = {
        quantize(llama, tmp_path / str(i), method="gptq", group_size=32, shuffle=True, seed=seed)[
            "output_hash"
        ]
        for i, seed in enumerate((1, 2, 1))
    }
    assert len(hashes) == 2


@pytest.fixture
def unfinished(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source with a job of which two units are finished."""
    source = copy_model(llama, tmp_path / "source")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(2, patch)
        quantize(source, tmp_path / "out", **JOBS["gptq"])
    return source


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 8}, "--bits was not given, is 8"),
        ({"symmetric": False}, "--symmetric was"),
        ({"samples": 9}, r"--samples was \d+, is 9, the rows of calibration text are others"),
        ({"ignore": ["*.down_proj"]}, "--ignore was"),
        ({"damping": 0.02}, "--damping was"),
        ({"method": "minmax"}, "--method was 'gptq', is 'minmax'"),
    ],
)
def test_other_settings_are_refused_unless_fresh_is_asked(
    change: dict[str, Any], named: str, unfinished: Path, tmp_path: Path
) -> None:
    options = JOBS["gptq"] | change
    with pytest.raises(
        QuantError,
        match=rf"out.work: holds unfinished work of another job \(.*{named}.*run that job again to finish "
        rf"it, or use --fresh",
    ) as refused:
        quantize(unfinished, tmp_path / "out", **options)
    assert not re.search(r"[0-9a-f]{16}", str(refused.value))  # a hash says nothing to a reader
    report = quantize(unfinished, tmp_path / "out", fresh=True, **options)
    assert report["output_hash"] == quantize(unfinished, tmp_path / "again", **options)["output_hash"]


def test_a_source_that_changed_meanwhile_is_refused(unfinished: Path, tmp_path: Path) -> None:
    file = unfinished / "model.safetensors"
    os.utime(file, (1, 1))
    said = r"unfinished work of another job \(model.safetensors of the source has changed\)"
    with pytest.raises(QuantError, match=said):
        quantize(unfinished, tmp_path / "out", **JOBS["gptq"])


@pytest.mark.parametrize("damage", ["truncated", "removed", "header", "one byte"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_finished_shard_that_was_damaged_is_made_again(
    which: int, damage: str, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted((tmp_path / "out.work").glob("*.safetensors"))[which]
    raw = shard.read_bytes()
    middle = len(raw) // 2
    cut = {"truncated": raw[:-3], "one byte": raw[:middle] + bytes([raw[middle] ^ 4]) + raw[middle + 1 :]}
    shard.write_bytes(cut.get(damage, b"\xff" * 16 + raw[16:]))
    if damage == "removed":
        shard.unlink()
    write, written = module.write_unit, []
    monkeypatch.setattr(module, "write_unit", lambda unit, *a: written.append(unit.name) or write(unit, *a))
    found = quantize(unfinished, tmp_path / "out", **JOBS["gptq"])
    assert written == [["outside", "block 0"][which], "block 1"]
    assert (
        found["output_hash"] == quantize(unfinished, tmp_path / "undisturbed", **JOBS["gptq"])["output_hash"]
    )
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "undisturbed")


def test_a_journal_whose_last_line_was_cut_off_goes_on(unfinished: Path, tmp_path: Path) -> None:
    journal = tmp_path / "out.work" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-20])
    found = quantize(unfinished, tmp_path / "out", **JOBS["gptq"])
    assert (
        found["output_hash"] == quantize(unfinished, tmp_path / "undisturbed", **JOBS["gptq"])["output_hash"]
    )


def test_leftovers_of_a_killed_run_do_not_reach_the_output(unfinished: Path, tmp_path: Path) -> None:
    (tmp_path / "out.work" / "activations.bin").write_bytes(b"x" * 100)
    (tmp_path / "out.work" / "stray.py").write_text("x")
    quantize(unfinished, tmp_path / "out", **JOBS["gptq"])
    assert not {"activations.bin", "stray.py", "journal.jsonl", "lock"} & {
        f.name for f in (tmp_path / "out").iterdir()
    }


def command(source: Path, output: Path, **options: Any) -> list[str]:
    extra = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return [
        sys.executable,
        str(ROOT / "quantize.py"),
        "quantize",
        "-m",
        str(source),
        "-o",
        str(output),
        "--json",
        *extra,
    ]


def test_a_process_killed_in_the_middle_is_resumed_by_the_same_command_while_a_second_one_is_refused(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoints("llama", num_hidden_layers=8)
    options = {
        "method": "gptq",
        "group_size": 32,
        "samples": 64,
        "sequence_length": 128,
        "calibration_dataset": short_text(),
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command(source, tmp_path / "out", **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    journal = tmp_path / "out.work" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") > 4):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(QuantError, match="another run is working on this output"):
        quantize(source, tmp_path / "out", group_size=32)
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    assert not (tmp_path / "out").exists()
    assert 4 < journal.read_text().count("\n") < 10
    reports = []
    for output in ("out", "undisturbed"):
        done = subprocess.run(
            command(source, tmp_path / output, **options),
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        reports.append(json.loads(done.stdout))
        assert ("resuming: " in done.stderr) == (output == "out")
    assert reports[0]["output_hash"] == reports[1]["output_hash"]
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "line",
    [
        '{"unit": "block 0"}',
        "[3]",
        '{"unit": "block 0", "files": [3], "layers": {}, "folds": {}}',
        '{"unit": 1, "files": []}',
    ],
)
def test_a_journal_that_somebody_edited_is_no_traceback(line: str, unfinished: Path, tmp_path: Path) -> None:
    journal = tmp_path / "out.work" / "journal.jsonl"
    journal.write_text(journal.read_text().splitlines()[0] + "\n" + line + "\n")
    report = quantize(unfinished, tmp_path / "out", **JOBS["gptq"])
    assert report["output_hash"] == quantize(unfinished, tmp_path / "again", **JOBS["gptq"])["output_hash"]
