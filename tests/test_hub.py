"""Models by Hub id, from a cache in the Hub's own layout; nothing here has a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, errors

from quant import hub
from quant.errors import CheckpointError
from quant.hub import local_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of org/tiny in a cache of its own, with blobs and links as the Hub's client makes them."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(llama.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return snapshot


def test_a_cached_model_is_found_by_id_branch_tag_and_commit(cached: Path) -> None:
    for name in ("org/tiny", "org/tiny@main", "org/tiny@v1", f"org/tiny@{COMMIT}"):
        assert local_model(name) == cached
    assert local_model("models") == Path("models") and local_model(cached) == cached


def test_a_directory_of_that_name_goes_first(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert local_model("org/tiny") == Path("org/tiny")


def test_a_name_below_a_directory_is_a_path(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "org"):
        (tmp_path / folder).mkdir()
    with pytest.raises(CheckpointError, match=f"out/nothing: there is no such directory in {tmp_path}/out"):
        local_model("out/nothing")
    assert local_model("org/tiny") == cached  # what the cache has is found all the same


def test_offline_says_where_was_looked_and_what_to_do(cached: Path) -> None:
    for name in ("org/other", "org/tiny@v2"):
        with pytest.raises(CheckpointError, match="not in the cache .*HF_HUB_OFFLINE.*hf download org/"):
            local_model(name)
    (cached / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only a part of it is in the cache"):
        local_model("org/tiny")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "access on request"),
        (errors.RepositoryNotFoundError, "no such model on the Hub"),
        (errors.RevisionNotFoundError, "has no revision"),
        (ConnectionError, "check the network"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(
    cached: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], said: str
) -> None:
    import huggingface_hub

    here, asked = huggingface_hub.snapshot_download, []

    def download(repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return here(repo, **options)
        asked.append((repo, options))
        raise kind.__new__(kind)  # the Hub's own take a response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError) as found:
        local_model("org/other@x")
    assert said in str(found.value) and "\n" not in str(found.value)
    assert asked[0][0] == "org/other" and asked[0][1]["revision"] == "x" and "*.bin" in hub._NOT_READ
    # a plan fetches nothing
    with pytest.raises(CheckpointError, match="plans fetch nothing"):
        local_model("org/other", download=False)
    assert len(asked) == 1


def test_commands_take_hub_ids(cached: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    job = ["--method", "minmax", "--group-size", "32"]
    made = cli("quantize", "-m", "org/tiny@v1", "-o", tmp_path / "out", *job, "--json")
    assert made.code == 0 and json.loads(made.out)["source_path"] == str(cached)
    assert "base_model:\n- org/tiny\n" in (tmp_path / "out" / "README.md").read_text()
    assert cli("inspect", "org/tiny").code == 0
    assert cli("verify", tmp_path / "out", "--source", "org/tiny").code == 0
    import deploy_vllm

    with pytest.raises(SystemExit) as stop:
        deploy_vllm.main(["plan", "-m", "org/tiny", "--gpu", "T4", "--json"])
    assert stop.value.code in (0, None)
    assert cli("recommend", "-m", "org/tiny", "--gpu", "T4", "--json").code == 0
    (tmp_path / "job.yaml").write_text(f"model_path: org/tiny\noutput_path: {tmp_path}/two\nmethod: minmax\n")
    assert cli("quantize", "--config", tmp_path / "job.yaml", "--group-size", "32").code == 0
    refused = cli("quantize", "-m", "org/none", "-o", tmp_path / "no", *job)
    assert refused.code == 1 and "Traceback" not in refused.err and "hf download org/none" in refused.err
