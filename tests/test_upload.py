"""Uploads to a Hub of the test's own on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from quant import hub as ours
from tests import helpers, hub_server
from tests.hub_server import Hub, Repository

JOB = ("--method", "minmax", "--group-size", "32")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.running() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(ours, "_forbidden_here", False)
        monkeypatch.setenv("HF_TOKEN", "good")
        yield state


def test_a_job_is_uploaded_in_one_commit_by_a_process_of_its_own(llama: Path, tmp_path: Path) -> None:
    with hub_server.running() as state:
        # what transformers is told, no network, must not reach the upload
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
            "HF_ENDPOINT": state.url, "HF_TOKEN": "good", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        words = ["quantize", "-m", llama, "-o", tmp_path / "out", "--method", "gptq", "--samples", "4"]
        words += ["--sequence-length", "64", "--group-size", "32", "--push-to-hub", "lab/tiny", "--private"]
        words += ["--commit-message", "First", "--calibration-dataset", helpers.short_text(), "--json"]
        done = subprocess.run(
            [sys.executable, str(helpers.ROOT / "quantize.py"), *map(str, words)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    made = state.repositories["lab/tiny"]
    files = made.branches["main"]
    assert made.private and [c["summary"] for c in made.commits["main"]] == ["First"]
    assert value["hub"]["url"] == f"{state.url}/lab/tiny" and value["hub"]["commit"] == made.sha("main")
    local = helpers.files_of(tmp_path / "out")
    assert files.keys() == local.keys() and "uploaded to lab/tiny" in done.stderr
    described = {"README.md", "quant_report.json", "quant_report.html"}
    assert {n for n in files if files[n] != local[n]} == described
    assert b"vllm serve lab/tiny " in files["README.md"]
    # no place on this machine goes out
    assert not [n for n in files if str(tmp_path).encode() in files[n] or str(llama).encode() in files[n]]


def test_what_stands_against_an_upload_is_said_before_the_work(
    hub: Hub, llama: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["lab/taken"] = Repository(branches={"main": {"model.safetensors": b"x"}})
    hub.tokens |= {
        "reader": {"role": "read", "displayName": "eyes"},
        "narrow": {
            "role": "fineGrained",
            "displayName": "narrow",
            "fineGrained": {"scoped": [{"entity": {"name": "other"}, "permissions": ["repo.write"]}]},
        },
    }
    output = tmp_path / "out"

    def refused(to: str, said: str, token: str = "good", *more: str) -> None:
        monkeypatch.setenv("HF_TOKEN", token)
        result = cli("quantize", "-m", llama, "-o", output, *JOB, "--push-to-hub", to, *more)
        assert result.code in (1, 2) and said in result.err and "Traceback" not in result.err, result.err
        assert not output.exists() and not list(tmp_path.iterdir())

    refused("tiny", "ORG/NAME is needed")
    refused("lab/a--b..c", "no name of a repository")
    refused("bob/tiny", "'bob' is not you, nor an organization that you are in: alice, lab, readers")
    refused("readers/tiny", "in readers you may only read")
    refused("lab/tiny", "the token 'eyes' may only read", "reader")
    refused("lab/tiny", "may write other, not lab", "narrow")
    refused("lab/tiny", "the Hub does not take the token", "unknown")
    refused("lab/taken", "it holds a model already (model.safetensors)")
    refused("lab/taken", "the repository is public", "good", "--replace-on-hub", "--private")
    assert "/commit/" not in str(hub.asked) and "create" not in str(hub.asked)
    # with what is wrong with the job itself, in one list
    result = cli("quantize", "-m", llama, "-o", llama / "in", *JOB, "--push-to-hub", "lab/taken")
    assert result.code == 1 and "2 problems" in result.err and "holds a model" in result.err
    result = cli("quantize", "-m", llama, "-o", output, *JOB, "--private")
    assert result.code == 2 and "--private: nothing is uploaded without --push-to-hub" in result.err
    hub.refused.append(("whoami", 429))
    refused("lab/tiny", "too many requests")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("lab/tiny", "the Hub is not reached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(ours, "_forbidden_here", False)
    refused("lab/tiny", "HF_HUB_OFFLINE forbids the network")


def test_a_broken_upload_loses_nothing_and_the_same_command_goes_on(
    hub: Hub, llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    output = tmp_path / "out"
    words = ["quantize", "-m", llama, "-o", output, *JOB, "--push-to-hub", "lab/tiny@w4a16"]
    hub.repositories["lab/tiny"] = Repository(
        branches={"main": {"model.safetensors": b"other", ".gitignore": b"*.safetensors"}}
    )
    hub.refused.append(("/commit/", 403))
    result = cli(*words)
    assert result.code == 1 and "nothing is lost: the same command uploads it alone" in result.err
    assert "refused for a test" in result.err and "Quantized" in result.out
    assert cli("verify", output, "--source", llama).code == 0
    hub.refused.clear()
    before, times, large = helpers.files_of(output), len(hub.asked), len(hub.large)
    again = cli(*words)
    assert again.code == 0 and "made already" in again.err and "uploading it" in again.err
    assert helpers.files_of(output) == before and len(hub.large) == large
    assert not [a for a in hub.asked[times:] if a.startswith("PUT")]  # what was sent is not sent again
    tiny = hub.repositories["lab/tiny"]
    # a new branch has the output alone; main is as it was
    assert tiny.branches["main"].keys() == {"model.safetensors", ".gitignore"}
    assert tiny.branches["w4a16"].keys() == {*before, ".gitignore"}
    assert "on the Hub:" in again.out and "/lab/tiny, w4a16 at " in again.out
    third = cli(*words)
    assert third.code == 0 and "it held all files already" in third.err
    assert len(tiny.commits["w4a16"]) == 1
    # another job's output is not uploaded as this one's
    other = cli(*words, "--scheme", "w8a16")
    assert other.code == 1 and "not empty" in other.err
    # nor one that has changed
    file = output / "model.safetensors" if (output / "model.safetensors").exists() else None
    file = file or sorted(output.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = cli(*words)
    assert changed.code == 1 and "is not any more what its report was written of" in changed.err


def test_an_export_replaces_what_the_repository_holds_when_asked(
    hub: Hub, quantized: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(quantized(), source)
    hub.lfs = False
    hub.repositories["alice/tiny"] = Repository(
        branches={"main": {"old.safetensors": b"x", "notes.txt": b"y", ".gitattributes": b"z"}}
    )
    words = ["export-vllm", "-m", source, "-o", output, "--format", "plain", "--push-to-hub", "alice/tiny"]
    refused = cli(*words)
    assert refused.code == 1 and "holds a model already (old.safetensors)" in refused.err
    assert not output.exists()
    hub.refused.append(("/preupload/", 413))
    broken = cli(*words, "--replace-on-hub")
    assert broken.code == 1 and "the Hub answers 413" in broken.err and (output / "config.json").exists()
    hub.refused.clear()
    done = cli(*words, "--replace-on-hub", "--json")
    assert done.code == 0 and "made already" in done.err and json.loads(done.out)["hub"]["changed"]
    held = hub.repositories["alice/tiny"].branches["main"]
    assert held.keys() == {*helpers.files_of(output), ".gitattributes"}
    assert cli(*words).code == 0  # the same files are no other model
