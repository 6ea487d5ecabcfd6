"""A GGUF file served on this machine by llama.cpp or Ollama, like vLLM's checkpoints. No torch.

llama.cpp's server is ``llama-server`` where it is on PATH; else the one that the Python package ``xllamacpp``
brings, run by :mod:`quant.serving.llama_worker` in that package's environment. Ollama is the program
``ollama``, which is told the model by its Modelfile once it runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant import defaults
from quant.errors import UsageError, first_line
from quant.gguf.llama_cpp import PYTHON_VARIABLE
from quant.serving.client import api_key
from quant.serving.deployment import Deployment
from quant.serving.installation import ServerError, clean_environment
from quant.serving.process import Interrupted, Log, Server, attended, free_port, signals_to

_PROBE = """
import importlib.metadata as m
try:
    print(m.version("xllamacpp"))
except m.PackageNotFoundError:
    print()
"""


@dataclass(frozen=True)
class Program:
    """What starts a server.

    Attributes:
        words: of its command, before the model.
        python: whose environment it runs in.
        bound: whether it is llama.cpp's server in a Python package, which takes the planned flags alone.
    """

    words: tuple[str, ...]
    version: str
    python: str = sys.executable
    bound: bool = False


def find_llama_cpp(python: str | Path | None = None) -> Program:
    """llama.cpp's server: that of a Python that is named, else ``llama-server``, else that of the Python that
    QUANT_LLAMA_PYTHON names, or of this one.

    Raises:
        UsageError: there is no such interpreter.
        ServerError: there is none.
    """
    if python is None and (found := shutil.which("llama-server")):
        return Program((found, "--model"), _version([found, "--version"]))
    chosen = str(python or os.environ.get(PYTHON_VARIABLE) or sys.executable)
    try:
        done = subprocess.run(
            [chosen, "-c", _PROBE], capture_output=True, text=True, timeout=60, env=clean_environment(chosen)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(
            f"--llama-python is {chosen!r}: it does not run ({first_line(error)}): give the Python of the "
            "environment with xllamacpp"
        ) from error
    version = done.stdout.strip()
    if done.returncode or not version:
        where = f"{chosen} has no xllamacpp" if python else "llama-server is not on PATH, nor xllamacpp here"
        raise ServerError(
            f"{where}: install llama.cpp, or pip install xllamacpp, which has its server, and name that "
            f"environment's Python with --llama-python or {PYTHON_VARIABLE}"
        )
    worker = Path(__file__).with_name("llama_worker.py")
    return Program((chosen, str(worker), "--model"), f"of xllamacpp {version}", chosen, bound=True)


def find_ollama() -> Program:
    """
    Raises:
        ServerError: ``ollama`` is not on PATH.
    """
    found = shutil.which("ollama")
    if found is None:
        raise ServerError(
            "ollama is not on PATH: install it (ollama.com/download), or serve the file with --engine "
            "llama.cpp"
        )
    return Program((found, "serve"), _version([found, "--version"]))


def _version(words: list[str]) -> str:
    """The number in what a program says of itself, on either stream; empty: none."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"version:? (?:is )?(\S+)", done.stdout + done.stderr)
    return found[1] if found else ""


def serve_file(
    deployment: Deployment,
    *,
    python: str | Path | None = None,
    timeout: float = defaults.START_TIMEOUT,
    check: bool = False,
    log: Log = lambda line: None,
    ready: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Starts llama.cpp or Ollama on a GGUF file, tries one completion and reports; then serves until SIGINT
    or SIGTERM, unless ``check``.

    Args:
        python: of the environment with xllamacpp.
        check: stop after the completion.
        ready: receives the report when the server is ready.

    Returns:
        the report: as :func:`quant.serving.process.serve`, with engine_version; max_model_len is of one
            request; without kv_cache_tokens.

    Raises:
        UsageError: arguments that are passed on to what takes none.
        ServerError: there is no such program, it did not start, or died. Whatever happens, no process of it
            is left.
        Interrupted: a signal arrived before it was ready.
    """
    engine = deployment.engine
    ollama = engine.by_variables
    program = find_ollama() if ollama else find_llama_cpp(python)
    if program.bound and deployment.extra:
        raise UsageError(
            f"{' '.join(deployment.extra)} cannot be passed on to the server of xllamacpp: install "
            "llama.cpp, whose llama-server takes it"
        )
    port = deployment.port or free_port(deployment.host)
    placed = replace(deployment, port=port).environment
    server = Server(
        deployment.model_path,
        deployment.flags(port=port),
        python=program.python,
        host=deployment.host,
        port=port,
        name=deployment.name,
        program=program.words,
        api_key=api_key(deployment.api_key_env),
        environment=placed,
        engine=engine,
        log=log,
    )
    if ollama:
        server.command = list(program.words)
    with signals_to(server), server:
        server.start(timeout)
        if ollama:
            _make_known(deployment, server, program.words[0], timeout)

        def facts() -> dict[str, Any]:
            length = deployment.modelfile.context if ollama else _context(server)
            return {"engine_version": program.version, "max_model_len": length}

        return attended(server, deployment, facts, check=check, log=log, ready=ready)


def _make_known(deployment: Deployment, server: Server, ollama: str, timeout: float) -> None:
    """``ollama create``, which copies the file into Ollama's folder.

    Raises:
        ServerError: it did not.
        Interrupted: a signal arrived meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="quant-ollama-") as folder:
        file = Path(folder) / "Modelfile"
        file.write_text(deployment.modelfile.text, encoding="utf-8")
        words = [ollama, "create", deployment.name, "-f", str(file)]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, errors="replace", timeout=timeout,
                env=server.environment, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ServerError(
                f"ollama create was not done after {timeout:g} s: give it longer with --timeout"
            ) from error
    if server.interrupted is not None:
        raise Interrupted("interrupted before the server was ready: it has been stopped")
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ServerError(f"ollama create failed: {said[-1][-500:] if said else 'it said nothing'}")


def _context(server: Server) -> int | None:
    """Tokens of context that one request of llama.cpp's server has; None where it does not say."""
    settings = server.request("/props").get("default_generation_settings")
    length = settings.get("n_ctx") if isinstance(settings, dict) else None
    return length if isinstance(length, int) else None
