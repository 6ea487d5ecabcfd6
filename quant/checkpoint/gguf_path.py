"""Which GGUF file a path means: a rule of names alone, for all who are given one. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from quant.documents import read_document
from quant.errors import CheckpointError
from quant.hub import GGUF_MARK

#: The name that llama.cpp gives to a file of a split model: its stem, number and how many there are.
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def model_stem(file: Path) -> str:
    """The name of a file's model: without its ending, and the number of one of several.

    >>> model_stem(Path("a/Phi-4-Q4_K_M-00001-of-00003.gguf"))
    'Phi-4-Q4_K_M'
    """
    split = SPLIT.fullmatch(file.name)
    return split[1] if split else file.stem


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means; None: it means none.

    A file, though it may be missing, by its ending; of a folder without safetensors the only one, or the
    first of a split one; of a folder of the cache the one that it stands for. Files of towers (``mmproj``)
    are no models.

    Raises:
        CheckpointError: a folder has several, or that of a tower alone; the mark in the cache is damaged.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    if (mark := path / GGUF_MARK).is_file():
        return _marked(mark)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    there = sorted(f for f in path.glob("*.gguf") if not f.name.startswith("."))
    files = [f for f in there if not f.name.startswith("mmproj")]
    if there and not files:
        raise CheckpointError(
            f"{path}: holds {there[0].name} alone, the tower of a model that sees: fetch the file of its "
            "text decoder too"
        )
    later = [f for f in files if (split := SPLIT.fullmatch(f.name)) and int(split[2]) != 1]
    files = [f for f in files if f not in later] or files[:1]
    if len(files) > 1:
        raise CheckpointError(
            f"{path}: holds {len(files)} GGUF files ({', '.join(f.name for f in files[:3])}"
            f"{', …' if len(files) > 3 else ''}): give one of them"
        )
    return files[0] if files else None


def _marked(mark: Path) -> Path:
    try:
        return Path(str(read_document(mark)["file"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{mark}: does not say which GGUF file the folder stands for: remove the folder, it is made anew"
        ) from error
