"""llama.cpp's own quantization, in a process of its own: its assertions end the process that they fail in. No
torch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quant.errors import QuantError
from quant.progress import Event, Progress

if TYPE_CHECKING:
    import numpy as np

#: Names the Python of an environment with llama-cpp-py-sync, where that is not this one.
PYTHON_VARIABLE = "QUANT_LLAMA_PYTHON"
_PACKAGE = "llama_cpp_py_sync"
_COUNTED = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")


def llama_python() -> str:
    """The Python that has llama.cpp's library.

    Raises:
        QuantError: none is known.
    """
    if named := os.environ.get(PYTHON_VARIABLE):
        return named
    if importlib.util.find_spec(_PACKAGE) is not None:
        return sys.executable
    raise QuantError(
        "K levels and iq4_xs are made by llama.cpp itself, which is not here: pip install llama-cpp-py-sync, "
        f"or name the Python of an environment that has it in {PYTHON_VARIABLE}"
    )


def quantize(
    source: Path,
    target: Path,
    file_type: int,
    importance: Mapping[str, np.ndarray] | None,
    threads: int,
    progress: Progress,
) -> None:
    """Makes ``target`` of a 16-bit GGUF file.

    Args:
        file_type: llama.cpp's number of the level.
        importance: by tensor, fp32 of E[x²], one number an input, those of several experts one after the
            other.

    Raises:
        QuantError: llama.cpp does not load, or fails.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="quant-gguf-") as folder:
        words = [llama_python(), str(Path(__file__).with_name("worker.py")), str(source), str(target)]
        words += [str(file_type), str(threads)]
        if importance:
            np.savez(Path(folder) / "importance.npz", **importance)  # type: ignore[arg-type]
            words.append(str(Path(folder) / "importance.npz"))
        errors = Path(folder) / "errors"
        said: list[str] = []
        with errors.open("wb") as stream:
            with subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=stream, text=True, errors="replace"
            ) as child:
                assert child.stdout is not None
                try:
                    for line in child.stdout:
                        said.append(line.rstrip())
                        if match := _COUNTED.search(line):
                            progress(Event("llama.cpp", int(match[1]), int(match[2]), detail=match[3]))
                except BaseException:
                    child.kill()
                    raise
            code = child.returncode
        if code:
            told = errors.read_text(errors="replace").strip().splitlines()
            last = [x for x in (*said[-3:], *told[-1:]) if x]
            raise QuantError(f"{source}: llama.cpp did not quantize it: {' '.join(last)[-500:]}")
