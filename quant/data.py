"""Where the project's data files are: ``configs/`` at the top of a checkout, ``quant/configs`` once
installed."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def config_path(name: str) -> Path:
    """The path of a file of ``configs/``, such as ``gpus.json`` or ``scenarios/chat.yaml``.

    >>> config_path("gpus.json").name
    'gpus.json'
    """
    installed = _PACKAGE / "configs" / name
    return installed if installed.exists() else _PACKAGE.parent / "configs" / name


@lru_cache(maxsize=8)
def load_json(name: str) -> Any:
    """A JSON file of ``configs/``, read once."""
    return json.loads(config_path(name).read_text(encoding="utf-8"))
