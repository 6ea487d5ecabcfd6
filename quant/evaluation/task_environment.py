"""Builds the environment that lm-eval runs in: ``python -m quant.evaluation.task_environment DIR``.

lm-eval brings data sets and metrics with pins of their own, which are kept from this package. It needs no
torch: what the model thinks is computed here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

#: What the worker was tried with.
NEEDED = ("lm-eval==0.4.13", "transformers>=5")


def build(folder: Path) -> Path:
    """Makes (or completes) an environment; returns its Python.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *NEEDED], check=True)
    subprocess.run([str(python), "-c", "import lm_eval.evaluator"], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quant.evaluation.task_environment", description=str(__doc__)
    )
    parser.add_argument("folder", type=Path, help="where the environment goes; an existing one is completed")
    arguments = parser.parse_args()
    try:
        print(build(arguments.folder))
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{arguments.folder}: {' '.join(map(str, error.cmd))} failed with status {error.returncode}"
        ) from None


if __name__ == "__main__":
    main()
