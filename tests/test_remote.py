"""A checkpoint on object storage is read range by range, through fsspec's file system in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors

from quant import remote
from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError
from quant.hub import local_model, named
from tests.helpers import load_all, quantize, short_text, weight_files

URL = "memory://bucket/models/llama"


class _Counted:
    """What was asked of the storage."""

    def __init__(self) -> None:
        self.data = self.failures = 0


@pytest.fixture
def stored(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Counted]:
    """The checkpoint at :data:`URL`, of which every byte that is fetched is counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(remote, "_CHUNK", 4096)
    system, counted = fsspec.filesystem("memory"), _Counted()
    system.put(f"{llama}/", "/bucket/models/llama/", recursive=True)
    inner = type(system).cat_file

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **more: Any) -> Any:
        if counted.failures:
            counted.failures -= 1
            raise ConnectionResetError("the storage hung up")
        data = inner(self, path, start=start, end=end, **more)
        counted.data += len(data) if path.endswith(".safetensors") else 0
        return data

    monkeypatch.setattr(type(system), "cat_file", cat_file)
    yield counted
    monkeypatch.undo()
    system.rm("/bucket", recursive=True)
    remote._storage.cache_clear()


def test_a_job_from_storage_makes_the_same_file_and_fetches_a_block_once(
    llama: Path, stored: _Counted, tmp_path: Path
) -> None:
    job: dict[str, Any] = {
        "method": "gptq", "group_size": 32, "samples": 4, "sequence_length": 32,
        "calibration_dataset": [short_text()],
    }  # fmt: skip
    quantize(llama, tmp_path / "here", **job)
    folder = local_model(URL)
    headers = stored.data
    assert open_checkpoint(folder).nbytes and stored.data == headers  # a plan fetches nothing more
    stored.failures = 2  # of which a job hears nothing
    report = quantize(folder, tmp_path / "there", **job)
    assert weight_files(tmp_path / "there") == weight_files(tmp_path / "here")
    assert report["verify"]["passed"]
    nbytes = open_checkpoint(llama).nbytes
    assert nbytes <= stored.data < 3.5 * nbytes
    assert named(folder) == URL


def test_what_stands_for_a_weight_file_is_none_to_others(llama: Path, stored: _Counted) -> None:
    folder = local_model(URL)
    with pytest.raises(safetensors.SafetensorError):
        load_all(folder)
    (file,) = open_checkpoint(folder).weight_files
    assert file.stat().st_size == (llama / file.name).stat().st_size


def test_what_changes_there_is_seen(llama: Path, stored: _Counted) -> None:
    folder, system = local_model(URL), fsspec.filesystem("memory")
    before = {f.name: f.stat().st_mtime_ns for f in open_checkpoint(folder).weight_files}
    config = json.loads((llama / "config.json").read_text()) | {"rope_theta": 77777.0}
    system.pipe_file("/bucket/models/llama/config.json", json.dumps(config).encode())
    assert local_model(URL) == folder
    assert open_checkpoint(folder).config["rope_theta"] == 77777.0
    assert before == {f.name: f.stat().st_mtime_ns for f in open_checkpoint(folder).weight_files}


def test_storage_that_cannot_be_read_says_why(
    stored: _Counted, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url, says in (
        ("memory://bucket/none", "memory://bucket/none: there is no such folder"),
        ("memory://bucket/models", "has no config.json: give the folder of a checkpoint"),
        ("nowhere://bucket/model", "fsspec knows no storage of the kind nowhere://"),
    ):
        with pytest.raises(CheckpointError, match=says):
            local_model(url)
    stored.failures = 3
    with pytest.raises(CheckpointError, match="ConnectionResetError: the storage hung up.*run the same"):
        local_model(URL)

    def missing(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    done = cli("inspect", "s3://bucket/model")
    assert done.code == 1 and "s3://bucket/model: reading s3:// needs s3fs: pip install s3fs" in done.err
