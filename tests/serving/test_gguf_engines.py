"""GGUF files planned for llama.cpp and Ollama: what is refused, how much fits, the Modelfile, the script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quant.errors import CheckpointError, UsageError, VerificationFailed
from quant.planning.gguf import file_cache_bytes
from quant.serving.artefacts import artefact
from quant.serving.deployment import DeploymentRequest
from quant.serving.engines import plan
from quant.serving.installation import ServerError
from quant.serving.local import find_llama_cpp, serve_file
from quant.serving.process import free_port
from tests.gguf_files import ONE, write_gguf

GIB = 2**30
#: Llama-3-8B's keys.
KEYS = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.context_length": 8192,
    "llama.embedding_length": 4096,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
}
BLOCKS = tuple((f"blk.{i}.ffn_up.weight", 2, (4096, 56_888), 131_072_000) for i in range(32))


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "a model.gguf")


def test_what_llama_cpp_may_know_is_planned_and_what_is_broken_is_refused(gguf: Path, tmp_path: Path) -> None:
    assert plan(gguf, DeploymentRequest(), "llama.cpp").model_path == gguf
    # an architecture and a type that are not known here
    odd = write_gguf(tmp_path / "odd.gguf", tensors=(*ONE, ("x.weight", 99, (64, 2), 0)))
    for engine in ("llama.cpp", "ollama"):
        assert plan(odd, DeploymentRequest(), engine).checkpoint_bytes == odd.stat().st_size
    for engine in ("vllm", "sglang", "tgi"):
        with pytest.raises(VerificationFailed, match="--engine llama.cpp or --engine ollama"):
            plan(gguf, DeploymentRequest(), engine)
    whole = gguf.read_bytes()
    for data, said in (
        (whole[:-64], "it is truncated"),
        (whole[:40], "left of the file"),
        (whole[:16] + b"\xff" * 8 + whole[24:], "keys takes"),
        (b"PK\x03\x04" + whole[4:], "not with b'GGUF'|zip"),
        (b"", "not with b'GGUF'"),
    ):
        gguf.write_bytes(data)
        with pytest.raises(CheckpointError, match=said):
            plan(gguf, DeploymentRequest(), "llama.cpp")
    with pytest.raises(CheckpointError, match="cannot be read"):
        plan(tmp_path / "none.gguf", DeploymentRequest(), "llama.cpp")
    with pytest.raises(CheckpointError):
        plan(tmp_path / "none", DeploymentRequest(), "llama.cpp")


def test_a_folder_or_any_part_of_a_split_file_means_the_first(gguf: Path, tmp_path: Path) -> None:
    assert plan(gguf.parent, DeploymentRequest(), "llama.cpp").model_path == gguf
    folder = tmp_path / "split"
    folder.mkdir()
    parts = [folder / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for number, part in enumerate(parts):
        tensors = ((f"blk.{number}.x", 0, (8, 4), 128),)
        write_gguf(part, {"split.count": 2, "split.no": number, "split.tensors.count": 2}, tensors)
    for path in (folder, *parts):
        made = plan(path, DeploymentRequest(), "llama.cpp")
        assert made.model_path == parts[0] and made.name == "m"
        assert made.checkpoint_bytes == sum(p.stat().st_size for p in parts)
    with pytest.raises(VerificationFailed, match="llama-gguf-split --merge"):
        plan(folder, DeploymentRequest(), "ollama")
    write_gguf(folder / "other.gguf")
    with pytest.raises(CheckpointError, match="give one of them"):
        plan(folder, DeploymentRequest(), "llama.cpp")
    (folder / "other.gguf").unlink()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="is not beside it"):
        plan(parts[0], DeploymentRequest(), "llama.cpp")


def test_how_much_of_a_file_fits_a_gpu_is_said(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", KEYS, BLOCKS)  # 3.9 GiB, sparse
    # 8192 tokens of 32 blocks with 8 heads of 128 numbers, keys and values in 2 bytes each
    assert file_cache_bytes(KEYS, None) == GIB and file_cache_bytes(KEYS, 4096) == GIB // 2
    assert file_cache_bytes(KEYS | {"llama.attention.key_length": 64}, None) == GIB // 2
    assert file_cache_bytes({"general.architecture": "mamba", "mamba.block_count": 4}, 1) is None
    whole = plan(file, DeploymentRequest(gpu="T4"), "llama.cpp")
    assert any("all of it fits on T4" in n and "1.00 GiB of fp16 cache" in n for n in whole.notes)
    assert not whole.warnings and "all of it fits on T4" in artefact(whole, "shell")
    long = DeploymentRequest(gpu="T4", max_model_len=32768, max_num_seqs=4)  # 16 GiB of cache
    (part,) = plan(file, long, "llama.cpp").warnings
    # (14.4 - 0.5) / ((3.9 + 16) / 32)
    assert part.startswith("22 of 32 blocks fit on T4") and "16.0 GiB of fp16 cache" in part
    two = plan(file, DeploymentRequest(gpu="2xT4", max_model_len=32768, max_num_seqs=4), "llama.cpp")
    assert "fits on 2 × T4" in two.notes[0]
    unheard = write_gguf(tmp_path / "x.gguf", size=40 * GIB)
    assert "does not fit on T4" in plan(unheard, DeploymentRequest(gpu="T4"), "llama.cpp").warnings[0]


def test_ollama_is_told_by_variables_and_a_modelfile(gguf: Path) -> None:
    asked = DeploymentRequest(max_model_len=2048, max_num_seqs=3, port=9001, host="::1")
    made = plan(gguf, asked, "ollama")
    assert made.name == "a-model" and made.command == ["ollama", "serve"]
    assert made.environment["OLLAMA_NUM_PARALLEL"] == "3" and made.environment["OLLAMA_HOST"] == "[::1]:9001"
    text = artefact(made, "modelfile")
    assert text.startswith(f"FROM {gguf}\n") and "PARAMETER num_ctx 2048\n" in text
    assert made.to_dict()["modelfile"] == text
    with pytest.raises(UsageError, match="of Ollama alone"):
        artefact(plan(gguf, DeploymentRequest(), "llama.cpp"), "modelfile")
    with pytest.raises(UsageError, match="shell, modelfile"):
        artefact(made, "compose")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tensor_parallel": 2}, "OLLAMA_SCHED_SPREAD"),
        ({"kv_cache_dtype": "fp8"}, "OLLAMA_KV_CACHE_TYPE=q8_0"),
        ({"gpu_memory_utilization": 0.5}, "OLLAMA_GPU_OVERHEAD"),
        ({"api_key_env": "KEY"}, "checks no key"),
        ({"extra": ("--verbose",)}, "takes no arguments"),
        ({"name": "a+b"}, "letters, digits"),
    ],
)
def test_what_ollama_cannot_be_asked_is_refused(asked: dict[str, Any], said: str, gguf: Path) -> None:
    with pytest.raises(UsageError, match=said):
        plan(gguf, DeploymentRequest(**asked), "ollama")


#: What the script and ``serve`` ask of Ollama, where the real one is not installed: it answers once it runs,
#: is told a model by a Modelfile, and completes with that model alone.
STAND_IN = """#!{python}
import http.server, json, os, pathlib, sys
folder = pathlib.Path(__file__).parent
if sys.argv[1:] == ["--version"]:
    print("ollama version is 0.20.3")
elif sys.argv[1] == "list":
    sys.exit(0 if (folder / "up").exists() else 1)
elif sys.argv[1] == "create":
    assert (folder / "up").exists() and sys.argv[3] == "-f"
    (folder / "model").write_text(sys.argv[2])
    (folder / "Modelfile").write_text(pathlib.Path(sys.argv[4]).read_text())
elif sys.argv[1:] == ["serve"]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, "Ollama is running")
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = (folder / "model").exists() and body["model"] == (folder / "model").read_text()
            self.answer(200 if known else 404, json.dumps(
                {{"choices": [{{"text": " told"}}], "usage": {{"completion_tokens": 1}}}}))
        def answer(self, status, text):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())
    host, port = os.environ["OLLAMA_HOST"].rsplit(":", 1)
    server = http.server.HTTPServer((host, int(port)), Handler)
    (folder / "up").write_text("")
    server.serve_forever()
"""


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ollama").write_text(STAND_IN.format(python=sys.executable))
    (folder / "ollama").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_ollamas_script_starts_it_and_makes_the_model_known(gguf: Path, ollama: Path) -> None:
    made = plan(gguf, DeploymentRequest(port=free_port("127.0.0.1")), "ollama")
    script = artefact(made, "shell")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    # the last line waits for the server: here it is ended instead
    done = subprocess.run(["sh", "-s"], input=script.replace('wait "$server"\n', ""), text=True, timeout=60)
    assert done.returncode == 0 and (ollama / "model").read_text() == "a-model"
    assert (ollama / "Modelfile").read_text() == made.modelfile.text


def test_serve_starts_ollama_and_says_what_to_install(
    gguf: Path, ollama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(gguf, DeploymentRequest(port=0, max_model_len=512), "ollama")
    report = serve_file(made, check=True, timeout=60)
    assert report["completion"]["text"] == " told" and report["max_model_len"] == 512
    assert report["engine_version"] == "0.20.3" and (ollama / "Modelfile").read_text() == made.modelfile.text
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ServerError, match="ollama is not on PATH: install it"):
        serve_file(made, check=True)
    monkeypatch.delenv("QUANT_LLAMA_PYTHON", raising=False)
    with pytest.raises(ServerError, match="pip install xllamacpp"):
        find_llama_cpp()
    with pytest.raises(UsageError, match="--llama-python is '/none'"):
        find_llama_cpp("/none")
