"""Models by Hub id, from a cache in the Hub's own layout; nothing here has a network."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants, errors

from quant import hub
from quant.errors import CheckpointError
from quant.hub import local_model
from tests.helpers import ROOT
from tests.planning.tiny_models import TINY

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


class _Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for the config.json of one model, and refuses others as it refuses them."""

    config = b"{}"
    asked: ClassVar[list[str]] = []
    refusals: ClassVar[dict[str, tuple[int, str]]] = {
        "/acme/Gated": (403, "GatedRepo"),
        "/acme/Bare": (404, "EntryNotFound"),
        "/acme/Found-1B/resolve/v9": (404, "RevisionNotFound"),
        "/acme/Nobody": (404, "RepoNotFound"),
    }

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        status, code = next((r for p, r in self.refusals.items() if self.path.startswith(p)), (200, ""))
        body = b"" if code else self.config
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", '"0f"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """``quant recommend`` with a Hub of its own and an empty cache."""
    _Hub.config = json.dumps(TINY["gqa"] | {"max_position_embeddings": 65536}).encode()
    _Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "NO_COLOR": "1"}

    def recommend(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "quantize.py"), "recommend", "--gpu", "T4", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment | more, check=False)

    yield recommend
    server.shutdown()
    server.server_close()


def test_online_reads_the_config_of_a_hub_id_once(
    served: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert "--online" in served("--model", "acme/Found-1B").stderr and not _Hub.asked
    first = served("--model", "acme/Found-1B", "--online", "--context", "64k", "--scheme", "w4a16")
    assert first.returncode == 0 and "context 65,536" in first.stdout
    assert "hf download acme/Found-1B --local-dir Found-1B" in first.stdout
    assert any(a.startswith("GET /acme/Found-1B/resolve/main/config.json") for a in _Hub.asked)
    _Hub.asked.clear()
    for option in ("--model", "-m"):  # from the cache now
        again = served(option, "acme/Found-1B", "--context", "64k", HF_HUB_OFFLINE="1")
        assert again.returncode == 0 and "context 65,536" in again.stdout and not _Hub.asked


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("acme/Gated-1B", "access on request"),
        ("acme/Bare-1B", "no config.json"),
        ("acme/Found-1B@v9", "no revision 'v9'"),
        ("acme/Nobody-1B", "no such model on the Hub"),
    ],
)
def test_what_the_hub_refuses_a_plan_is_said(
    served: Callable[..., subprocess.CompletedProcess[str]], name: str, said: str
) -> None:
    refused = served("--model", name, "--online")
    assert refused.returncode == 1 and said in refused.stderr and "Traceback" not in refused.stderr


def test_no_network_is_said_at_once(served: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    refused = served("--model", "acme/Found-1B", "--online", HF_ENDPOINT=nobody)
    assert refused.returncode == 1 and "check the network" in refused.stderr
    assert "Retrying" not in refused.stderr, "the Hub's client tries five times, for half a minute"


def test_offline_wins_over_online(served: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    refused = served("--model", "acme/Found-1B", "--online", HF_HUB_OFFLINE="1")
    assert refused.returncode == 1 and "HF_HUB_OFFLINE forbids" in refused.stderr and not _Hub.asked
