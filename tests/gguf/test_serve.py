"""A GGUF file served by llama.cpp's own server, started, asked and stopped by ``quant-deploy serve``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from quant.pipeline.gguf import export_gguf
from tests.gguf.conftest import LLAMA_VARIABLE
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served") / "tinylm.gguf"
    export_gguf(ROOT / "examples/tinylm-4m", made, "q8_0")
    return made


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get(LLAMA_VARIABLE)
    if not found or subprocess.run([found, "-c", "import xllamacpp"], capture_output=True).returncode:
        pytest.skip(f"{LLAMA_VARIABLE} names no Python with xllamacpp: make test builds one where it can")
    return found


def test_llama_cpp_serves_until_a_signal(file: Path, python: str) -> None:
    words = [sys.executable, "deploy_vllm.py", "serve", "-m", str(file.parent), "--engine", "llama.cpp"]
    words += ["--llama-python", python, "--port", "0", "--max-model-len", "256", "--max-num-seqs", "2"]
    words += ["--name", "tiny", "--api-key-env", "MODEL_KEY", "--json"]
    with subprocess.Popen(
        words, cwd=ROOT, env=os.environ | {"MODEL_KEY": "k3y"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        try:
            assert child.stdout is not None
            answer = ""
            while not answer.rstrip().endswith("}") or answer.count("{") != answer.count("}"):
                line = child.stdout.readline()
                assert line, child.stderr.read() if child.stderr else ""
                answer += line
            report = json.loads(answer)
            assert report["engine"] == "llama.cpp" and report["completion"]["tokens"] == 32
            # of each request, of two at a time
            assert report["max_model_len"] == 256 and report["model"] == "tiny"
            assert "k3y" not in " ".join(report["command"])
            request = urllib.request.Request(report["url"] + "/v1/completions", b"{}")
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=30)
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=60) == 0
        finally:
            child.terminate()  # a failure must not wait for a server that nobody ends
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(report["url"] + "/health", timeout=5)


def test_what_llama_cpp_does_not_load_is_told(file: Path, python: str, tmp_path: Path) -> None:
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(file.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamo"))
    words = [
        sys.executable,
        "deploy_vllm.py",
        "serve",
        "-m",
        str(odd),
        "--engine",
        "llama.cpp",
        "--port",
        "0",
    ]
    words += ["--llama-python", python, "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "before it was ready" in done.stderr and "llamo" in done.stderr
    refused = subprocess.run(
        [*words, "--", "--threads", "1"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2 and "--threads 1 cannot be passed on" in refused.stderr
