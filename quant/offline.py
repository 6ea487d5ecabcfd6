"""The one door to transformers: no network, no remote code, no chatter; imported when first needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from quant.checkpoint.reader import read_json
from quant.errors import CheckpointError, clipped, first_line
from quant.hub import forbid_network

_MOST_LAYERS = 100_000


@cache
def transformers() -> ModuleType:
    """The transformers package, set to work from local files only."""
    forbid_network()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        CheckpointError: none there, or one that needs remote code; or config.json, which it is chosen by, is
            invalid.
    """
    load_config(path)  # a mistake there is not the tokenizer's
    try:
        made = transformers().AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        made("a", add_special_tokens=False)  # what it takes as it is loaded may still not be a number
        return made
    # transformers raises ValueError, OSError, KeyError, JSON and tokenizers' own errors here
    except Exception as error:
        raise CheckpointError(
            f"{path}: its tokenizer cannot be loaded ({first_line(error)}): tokenizer.json or "
            "tokenizer.model with tokenizer_config.json is needed"
        ) from error


def load_config(path: Path) -> Any:
    """transformers' config object of a model directory.

    Raises:
        CheckpointError: a model type that this transformers does not know, or invalid values.
    """
    config = read_json(path / "config.json", "the config")
    stated = config.get("num_hidden_layers")
    if isinstance(stated, int) and stated > _MOST_LAYERS:  # transformers makes lists of that length
        raise CheckpointError(
            f"{path / 'config.json'}: num_hidden_layers is {clipped(stated)}: no model has so many: repair "
            "it, or fetch it again"
        )
    try:
        return transformers().AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises ValueError, KeyError and validation errors of its own
        raise CheckpointError(
            f"{path / 'config.json'}: transformers cannot use it: {_reason(config, error)}: what needs no "
            "model in memory takes it all the same (quant verify; quant quantize --method minmax, fp8 or hqq)"
        ) from error


def _reason(config: Mapping[str, Any], error: Exception) -> str:
    """Why a config is refused, in words for what happens often."""
    kind, package = config.get("model_type"), transformers()
    if kind is None or (isinstance(kind, str) and kind in package.CONFIG_MAPPING):
        return first_line(error).rstrip(".")
    if "auto_map" in config:
        return f"model_type {clipped(kind)} is a class of the model's own (auto_map), which is never run here"
    return f"it knows no model_type {clipped(kind)} in release {package.__version__}"
