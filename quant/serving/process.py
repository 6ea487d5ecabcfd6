"""A real server as a child process: started, watched, asked, and always gone afterwards. No torch.

It is vLLM, or another engine (:mod:`quant.serving.local`). vLLM runs in an environment of its own, named by
its Python; the server is ``vllm serve``, or the module behind it where that script does not run
(:mod:`quant.serving.installation`). It is the leader of its own process group, and its workers are killed
with it whatever happens; when this process is killed itself, a watcher (:mod:`quant.serving.watcher`) does
it.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from quant import defaults
from quant.engines import ENGINES, Engine
from quant.errors import QuantError
from quant.hardware import cpu_device
from quant.serving.client import api_key as key_of
from quant.serving.deployment import OFFLINE, Deployment, cpu_problems
from quant.serving.failures import Cause, diagnose, quote
from quant.serving.installation import MODULE, Installation, ServerError, clean_environment, find_vllm

PROMPT = "The capital of France is"
_KEPT_LINES = 2000
#: Seconds that vLLM has to stop by itself before its processes are killed.
GRACE = 20.0
#: Seconds of its ending after which it is said that it still does, and again.
_STILL = 2.0

Log = Callable[[str], None]


class Interrupted(QuantError):
    """A signal arrived before the server was ready; it has been stopped. Exit status 130."""

    exit_code = 130


@dataclass(frozen=True)
class Completion:
    """One answer of the server; ``tokens`` counts generated ones, ``seconds`` is from request to answer."""

    prompt: str
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def free_port(host: str) -> int:
    """A TCP port that is free now.

    Raises:
        ServerError: the address is not one of this machine's.
    """
    return _bind(host, 0)


def _bind(host: str, port: int) -> int:
    """Binds for a moment to learn whether a server could."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise ServerError(
            f"--host is {host!r}: not an address ({error.strerror}): use 127.0.0.1, or an address of this "
            "machine"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = (
                f"--port {port} of {host} is in use by another program: choose another --port, or 0 "
                "for a free one"
            )
            raise ServerError(message, Cause("port in use", message)) from error
        raise ServerError(
            f"--host {host}, --port {port}: {error.strerror}: use an address of this machine and a port "
            "from 1024"
        ) from error


class Server:
    """One server, vLLM's unless said otherwise. Use it as a context manager: leaving it ends every process of
    the server.

    Args:
        python: interpreter of the environment with vLLM.
        program: words of its command before the model; empty: vLLM's module.
        api_key: sent with every request, and given to the server through its environment.
        environment: variables set for the server on top of ours.
        engine: whose server it is: what it is called, told its key by and asked for its health.
        log: receives every line that the server prints, from another thread, until we ask it to end: what
            vLLM says then, tracebacks of its own processes among it, is of no fault. ``lines`` keeps it.
    """

    def __init__(
        self,
        model_path: Path,
        flags: Sequence[str],
        *,
        python: str,
        host: str,
        port: int,
        name: str,
        program: Sequence[str] = (),
        api_key: str | None = None,
        environment: Mapping[str, str] | None = None,
        engine: Engine = ENGINES["vllm"],
        log: Log = lambda line: None,
    ):
        self.host, self.port, self.name, self.python = host, port, name, python
        self.engine, self.title, key_variable = engine, engine.title, engine.key_variable
        self.command = [*(program or (python, *MODULE)), str(model_path), *flags]
        self.environment = (
            clean_environment(python) | OFFLINE | {"PYTHONUNBUFFERED": "1"} | dict(environment or {})
        )
        self.environment.pop("VLLM_PORT", None)  # vLLM would take its internal ports from there on
        if api_key is not None and key_variable:
            self.environment[key_variable] = api_key
        self.api_key = self.environment.get(key_variable) or None
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.load_seconds = 0.0
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._members: dict[int, psutil.Process] = {}
        #: told every two seconds of how long the server takes to end
        self.ending: Log = lambda line: None
        self._signal: int | None = None
        self._ending = False
        # no proxy of the environment stands between us and our own child
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    # --- life -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def interrupted(self) -> int | None:
        """The signal that asked for the end, if one did."""
        return self._signal

    def start(self, timeout: float = defaults.START_TIMEOUT) -> None:
        """Starts the server and waits until it is healthy.

        Raises:
            ServerError: the port is taken, the server ended, or it is not healthy after ``timeout`` seconds;
                with the end of its log.
            Interrupted: :meth:`interrupt` was called meanwhile.
        """
        _bind(self.host, self.port)
        begun, self._ending = time.monotonic(), False
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.environment,
            start_new_session=True,
        )
        self._watcher = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                str(Path(__file__).with_name("watcher.py")),
                str(self._process.pid),
                str(GRACE),
            ],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # not reached by what ends us
        )
        self._reader = threading.Thread(target=self._read, name="vllm-log", daemon=True)
        self._reader.start()
        while True:
            self._note_members()
            if self._signal is not None:
                raise Interrupted("interrupted before the server was ready: it has been stopped")
            if self._process.poll() is not None:
                raise self._failure(
                    f"{self.title} ended with status {self._process.returncode} before it was ready"
                )
            if self._healthy():
                break
            if time.monotonic() - begun > timeout:
                raise self._failure(
                    f"{self.title} was not ready after {timeout:g} s: give it longer with --timeout, or see "
                    "its log"
                )
            time.sleep(0.2)
        self.load_seconds = time.monotonic() - begun

    def wait(self) -> None:
        """Returns when the server is asked to end by a signal.

        Raises:
            ServerError: it ended by itself.
        """
        assert self._process is not None
        while self._signal is None:
            if self._process.poll() is not None and self._signal is None:
                raise self._failure(
                    f"{self.title} ended with status {self._process.returncode} while it was serving"
                )
            time.sleep(0.2)

    def interrupt(self, number: int) -> None:
        """Asks the server to end because a signal asked us; safe to call from a signal handler."""
        self._signal = number
        self.ask_to_end()

    def ask_to_end(self, first_alone: bool = False) -> None:
        """Sends SIGTERM and returns at once.

        Args:
            first_alone: to its first process alone, as a container's runtime does, which then ends the others
                in order; else to all, which is sooner.
        """
        if self._process is not None and self._process.poll() is None:
            self._ending = True
            if first_alone:
                self._process.terminate()
            else:
                self._send(signal.SIGTERM)

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def resident_bytes(self) -> int:
        """Memory of all its processes together; pages that they share count in each."""
        if self._process is None:
            return 0
        self._note_members()
        members = self._members.values()
        try:
            return resident_bytes([psutil.Process(self._process.pid), *members]) if self.alive else 0
        except psutil.NoSuchProcess:
            return 0

    def stop(self) -> None:
        """Ends every process of the server: asked first, killed after a while. Does nothing when none is
        left."""
        if self._process is None:
            return
        self._note_members()
        if self._process.poll() is None:
            self.ask_to_end()
            self._wait_for_its_end()
        self._send(signal.SIGKILL)  # whoever is left of the group, the leader included
        left = [p for p in self._members.values() if p.is_running()]
        for process in left:
            try:
                process.kill()  # a worker that left the group
            except psutil.NoSuchProcess:
                pass
        self._process.wait()
        psutil.wait_procs(left, timeout=GRACE)
        if self._watcher is not None:
            self._watcher.communicate(b"ended")
            self._watcher = None
        if self._reader is not None:
            self._reader.join(timeout=5)
        self._process = None

    def _wait_for_its_end(self) -> None:
        assert self._process is not None
        began = time.monotonic()
        while (left := GRACE - (time.monotonic() - began)) > 0:
            try:
                self._process.wait(min(left, _STILL))
                return
            except subprocess.TimeoutExpired:
                self.ending(f"{self.title} is still ending, {time.monotonic() - began:.0f} s")

    def _send(self, number: int) -> None:
        assert self._process is not None
        try:
            # its session's first process: group and process have one number
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass

    def _note_members(self) -> None:
        """Remembers the server's processes, so that one that leaves the group or loses its parent is still
        found."""
        assert self._process is not None
        try:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                self._members.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                line = line.rstrip()
                self.lines.append(line)
                if not self._ending:
                    self._log(line)

    def _failure(self, what: str) -> ServerError:
        assert self._process is not None
        if self._process.poll() is not None and self._reader is not None:
            self._reader.join(timeout=2)  # the last lines are still in the pipe
        log = list(self.lines)
        cause = diagnose(log) if self.engine.diagnosed else None
        return ServerError(
            f"{what}{f': {cause.text}' if cause else ''}\n{quote(log)}"
            if log
            else f"{what}, and printed nothing: {' '.join(self.command)}",
            cause,
        )

    # --- questions ------------------------------------------------------------------------------------------

    def _healthy(self) -> bool:
        try:
            with self._opener.open(self.url + self.engine.health, timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):  # not listening yet, or 503
            return False

    def request(
        self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 600.0
    ) -> dict[str, Any]:
        """GET, or POST of ``body`` as JSON.

        Raises:
            ServerError: no answer within ``timeout`` seconds, an error status, or an answer that is not JSON.
        """
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._opener.open(
                urllib.request.Request(self.url + path, data, headers), timeout=timeout
            ) as answer:
                value = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            detail = error.read(2000).decode(errors="replace")
            raise ServerError(f"{path} answered status {error.code}: {detail}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if self._signal is not None:
                raise Interrupted("interrupted: the server has been stopped") from error
            if self._process is not None and self._process.poll() is not None:
                raise self._failure(
                    f"{self.title} ended with status {self._process.returncode} during {path}"
                ) from error
            raise ServerError(
                f"{self.url}{path} did not answer: {error}\n{quote(list(self.lines))}"
            ) from error
        if not isinstance(value, dict):
            raise ServerError(f"{path} answered {str(value)[:200]}: a JSON object was expected")
        return value

    def text(self, path: str, timeout: float = 30.0) -> str:
        """GET of plain text.

        Raises:
            ServerError: no answer, or an error status.
        """
        try:
            with self._opener.open(self.url + path, timeout=timeout) as answer:
                return str(answer.read().decode(errors="replace"))
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url}{path} did not answer: {error}") from error

    def complete(self, prompt: str = PROMPT, max_tokens: int = 32) -> Completion:
        """One greedy completion."""
        begun = time.monotonic()
        answer = self.request(
            "/v1/completions",
            {"model": self.name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0},
        )
        seconds = time.monotonic() - begun
        try:
            return Completion(
                prompt, str(answer["choices"][0]["text"]), int(answer["usage"]["completion_tokens"]), seconds
            )
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"/v1/completions answered {str(answer)[:300]}: choices and usage are missing"
            ) from error

    def model_length(self) -> int:
        """Longest context that the server takes, in tokens."""
        models = self.request("/v1/models")
        try:
            return int(models["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"/v1/models answered {str(models)[:300]}: max_model_len is missing") from error

    def kv_cache_tokens(self) -> int | None:
        """Tokens that the KV cache holds, from the log; None where the log does not say."""
        for line in self.lines:
            if match := re.search(r"KV cache size: ([\d,]+) tokens", line):
                return int(match[1].replace(",", ""))
        return None


def resident_bytes(processes: Iterable[psutil.Process]) -> int:
    """Memory of some processes together, of those that are still there; pages that they share count in
    each."""
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total


@contextmanager
def signals_to(server: Server) -> Iterator[None]:
    """SIGINT and SIGTERM ask the server to end instead of interrupting us at any place; in other threads
    nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        server.interrupt(number)

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cpu_environment(*, exact: bool = False) -> dict[str, str]:
    """What vLLM's CPU build is told through its environment.

    Args:
        exact: keep the activations of 4-bit layers in 16 bits; on CPUs with AMX vLLM would round them to int8
            by itself.
    """
    # without it the cache takes its share of all memory of the machine
    environment = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE") or "1"}
    return environment | ({"VLLM_CPU_INT4_W4A8": "0"} if exact else {})


@contextmanager
def running(
    deployment: Deployment,
    *,
    python: str | Path | None = None,
    timeout: float = defaults.START_TIMEOUT,
    exact: bool = False,
    api_key: str | None = None,
    log: Log = lambda line: None,
) -> Iterator[tuple[Server, Installation]]:
    """A vLLM that serves a checkpoint while the body runs; afterwards no process of it is left.

    Args:
        python: interpreter of the environment with vLLM; see :func:`default_python`.
        timeout: seconds to wait for /health.
        exact: see :func:`cpu_environment`.
        api_key: the key it asks for, instead of the one that the deployment's variable holds.

    Raises:
        UsageError: see :meth:`Deployment.demand_trust`.
        ServerError: it did not start.
        Interrupted: a signal arrived before it was ready.
    """
    deployment.demand_trust()
    installation = find_vllm(python)
    if installation.cpu:
        _check_cpu(deployment, log)
    if installation.note:
        log(installation.note)
    port = deployment.port or free_port(deployment.host)
    server = Server(
        deployment.model_path,
        deployment.flags(port=port),
        python=installation.python,
        host=deployment.host,
        port=port,
        name=deployment.name,
        program=installation.program,
        api_key=api_key or key_of(deployment.api_key_env),
        environment=cpu_environment(exact=exact) if installation.cpu else {},
        log=log,
    )
    with signals_to(server), server:
        server.start(timeout)
        yield server, installation


def serve(
    deployment: Deployment,
    *,
    python: str | Path | None = None,
    timeout: float = defaults.START_TIMEOUT,
    check: bool = False,
    exact: bool = False,
    log: Log = lambda line: None,
    ready: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Starts vLLM on a checkpoint (:func:`running`), tries one completion and reports; then serves until
    SIGINT or SIGTERM, unless ``check``.

    Args:
        check: stop after the completion.
        ready: receives the report when the server is ready.

    Returns:
        the report: url, model, load_seconds, max_model_len, kv_cache_tokens, completion, vllm_version,
            command.

    Raises:
        ServerError: it did not start, or died. Whatever happens, no process of it is left.
        Interrupted: a signal arrived before it was ready.
    """
    with running(deployment, python=python, timeout=timeout, exact=exact, log=log) as (server, installation):
        return attended(
            server,
            deployment,
            lambda: {
                "vllm_version": installation.version,
                "max_model_len": server.model_length(),
                "kv_cache_tokens": server.kv_cache_tokens(),
            },
            check=check,
            log=log,
            ready=ready,
        )


def attended(
    server: Server,
    deployment: Deployment,
    facts: Callable[[], dict[str, Any]],
    *,
    check: bool,
    log: Log,
    ready: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Tries one completion of a server that is ready and reports; then waits for a signal, unless ``check``.

    Args:
        facts: what the report says of the engine, asked after the completion.

    Raises:
        ServerError: it did not answer, or died.
    """
    completion = server.complete()
    report = {
        "model_path": str(deployment.model_path),
        "model": server.name,
        "engine": deployment.engine.name,
        "url": server.url,
        "command": server.command,
        "load_seconds": round(server.load_seconds, 2),
        **facts(),
        "completion": {
            "prompt": completion.prompt,
            "text": completion.text,
            "tokens": completion.tokens,
            "seconds": round(completion.seconds, 3),
            "tokens_per_second": round(completion.tokens_per_second, 2),
        },
    }
    ready(report)
    if not check:
        server.wait()
        log(f"stopping {server.title}")  # which takes seconds, longer where requests are being answered
        server.ending = log
    return report


def _check_cpu(deployment: Deployment, log: Log) -> None:
    """Says what this machine's CPU makes of a checkpoint before vLLM takes its time to.

    Raises:
        ServerError: vLLM would stop.
    """
    flags = deployment.flags()
    cache = next((b for a, b in pairwise(flags) if a == "--kv-cache-dtype"), "auto")
    problems = cpu_problems(deployment.model_path, cpu_device(), cache)
    for problem in problems:
        if problem.fails:
            raise ServerError(
                f"{deployment.model_path}: {problem.text}", Cause("no kernel on this CPU", problem.text)
            )
        log(f"warning: {problem.text}")
