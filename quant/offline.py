"""The one door to transformers: no network, no remote code, no chatter; imported when first needed."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from quant.errors import CheckpointError


@cache
def transformers() -> ModuleType:
    """The transformers package, set to work from local files only."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        CheckpointError: none there, or one that needs remote code.
    """
    try:
        return transformers().AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises ValueError, OSError, KeyError, JSON and tokenizers' own errors here
        raise CheckpointError(
            f"{path}: its tokenizer cannot be loaded ({_first_line(error)}): tokenizer.json or tokenizer.model with tokenizer_config.json is needed"
        ) from error


def load_config(path: Path) -> Any:
    """transformers' config object of a model directory.

    Raises:
        CheckpointError: a model type that this transformers does not know, or invalid values.
    """
    try:
        return transformers().AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises ValueError, KeyError and validation errors of its own
        raise CheckpointError(f"{path / 'config.json'}: transformers cannot use it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
