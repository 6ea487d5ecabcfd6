"""What a job may take is decided before it starts, and changes where things are, not what is made."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant import jobs
from quant.errors import QuantError
from quant.pipeline import budget
from quant.pipeline.activation_store import ActivationStore
from quant.units import MIB
from tests.helpers import quantize, recipe, weight_files

CALIBRATED: dict[str, Any] = {"method": "gptq", "group_size": 32, "samples": 64, "sequence_length": 64}


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' process has other things in memory than a job's."""
    monkeypatch.setattr(budget, "in_use", lambda: 0)


def _least(source: Path, output: Path, **options: Any) -> int:
    """Bytes that a refusal says would do."""
    with pytest.raises(QuantError, match="--max-memory is 1.00 MiB: .* give --max-memory") as refused:
        jobs.run(jobs.plan(recipe(source, output, max_memory=MIB, **options)))
    assert not output.exists() and not output.with_name(f"{output.name}.work").exists()
    found = re.search(r"give --max-memory (\d+)MiB", str(refused.value))
    assert found is not None
    return int(found[1]) * MIB


def test_the_least_that_a_refusal_names_does_and_what_waits_goes_to_disk(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoints("llama")
    whole = quantize(source, tmp_path / "whole", **CALIBRATED)
    assert whole["scratch_bytes"] == 0
    # half as many activations as wait have room
    placed = jobs.estimate(jobs.plan(recipe(source, tmp_path / "dry", max_memory=1 << 40, **CALIBRATED)))
    placement = placed["placement"]
    assert placement["resident_bytes"] == placement["waiting_bytes"] and not placement["spilled_bytes"]
    half = (placement["memory_bytes"] - placement["waiting_bytes"] // 2) / 0.95
    scratch = tmp_path / "not there yet" / "scratch"
    tight = quantize(source, tmp_path / "tight", max_memory=int(half), scratch_dir=scratch, **CALIBRATED)
    assert 0 < tight["scratch_bytes"] < placement["waiting_bytes"]
    assert weight_files(tmp_path / "tight") == weight_files(tmp_path / "whole")
    assert list(scratch.iterdir()) == []
    # and as much as the refusal says would do is enough, a row at a time
    least = _least(source, tmp_path / "least", **CALIBRATED)
    assert least < half
    small = quantize(source, tmp_path / "least", max_memory=least, **CALIBRATED)
    assert re.search(
        r"the budget of memory lets \d+ rows through a block together instead of 32",
        str(small["calibration"]["notes"]),
    )


def test_fewer_tensors_at_once_make_the_same_file(llama: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        job: dict[str, Any] = {"method": "minmax", "group_size": 32}
        quantize(llama, tmp_path / "whole", **job)
        least = _least(llama, tmp_path / "least", **job)
        value = jobs.estimate(jobs.plan(recipe(llama, tmp_path / "least", max_memory=least, **job)))
        assert value["placement"]["workers"] == 1
        quantize(llama, tmp_path / "least", max_memory=least, **job)
    finally:
        torch.set_num_threads(before)
    assert weight_files(tmp_path / "least") == weight_files(tmp_path / "whole")


def test_a_budget_is_no_setting_of_the_output(llama: Path, tmp_path: Path) -> None:
    plain = recipe(llama, tmp_path / "out", **CALIBRATED)
    bounded = recipe(llama, tmp_path / "out", max_memory="6GiB", scratch_dir=tmp_path, **CALIBRATED)
    assert bounded.max_memory == 6 << 30
    assert plain.settings() == bounded.settings() and plain.plain() == bounded.plain()


def test_a_folder_that_cannot_hold_scratch_is_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuantError, match=r"--scratch-dir .*file/scratch: .* cannot be written to"):
        quantize(llama, tmp_path / "out", scratch_dir=tmp_path / "file" / "scratch", **CALIBRATED)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads where a file descriptor points to")
def test_scratch_lies_where_it_is_asked_for(tmp_path: Path) -> None:
    store = ActivationStore(0, None, tmp_path)
    tensor = torch.arange(1000.0)
    back = store.put(tensor)
    assert (
        os.readlink(f"/proc/self/fd/{store._file}").startswith(str(tmp_path))
        and store.files.folder == tmp_path
    )
    back()
    assert torch.equal(tensor, torch.arange(1000.0))
    store.close()
