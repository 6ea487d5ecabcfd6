"""Builds the environment that a legacy backend runs in: ``python -m quant.backends.environment autoawq DIR``.

Both libraries are installed without their dependencies: those they name are older than the torch they run on,
or pull CUDA builds on machines without a GPU. One directory can hold both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from quant.backends import BACKENDS

#: What both were found to work with: the newest torch that this package is tested with, the last transformers
#: that both import on.
TORCH = "torch==2.13.0"
NEEDED = (
    "setuptools", "wheel", "transformers==4.51.3", "peft==0.13.2", "accelerate", "datasets", "sentencepiece",
    "rouge", "gekko", "zstandard",
)  # fmt: skip


def build(folder: Path, names: list[str], torch: str = TORCH) -> Path:
    """Makes (or completes) an environment; returns its Python.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    environment = {**os.environ, "BUILD_CUDA_EXT": "0"}  # AutoGPTQ's own kernels are not needed to quantize
    subprocess.run([*install, torch], check=True)
    subprocess.run([*install, *NEEDED], check=True)
    libraries = [f"{BACKENDS[n].name}=={BACKENDS[n].version}" for n in names]
    subprocess.run([*install, "--no-deps", "--no-build-isolation", *libraries], check=True, env=environment)
    for name in names:
        command = [str(python), "-c", f"import {BACKENDS[name].module}"]
        # both greet with pages of deprecation warnings
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m quant.backends.environment", description=str(__doc__))
    parser.add_argument("backend", nargs="+", choices=list(BACKENDS))
    parser.add_argument("folder", type=Path, help="where the environment goes; an existing one is completed")
    parser.add_argument(
        "--torch", default=TORCH, metavar="REQUIREMENT", help="the torch to install  [default: %(default)s]"
    )
    arguments = parser.parse_args()
    try:
        print(build(arguments.folder, arguments.backend, arguments.torch))
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{arguments.folder}: {' '.join(map(str, error.cmd))} failed with status {error.returncode}"
        ) from None


if __name__ == "__main__":
    main()
