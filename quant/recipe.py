"""A job in data: what the command line and a YAML file both become. Unknown keys are refused with the known ones listed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quant import defaults
from quant.errors import Problems, QuantError, UsageError, one_of
from quant.schemes import Scheme, resolve_scheme


class Recipe(BaseModel):
    """One quantization. Field names are the option names of ``quant quantize`` with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model_path: Path
    output_path: Path
    method: str
    scheme: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: Literal["none", "static"] | None = None
    damping: float | None = Field(None, gt=0, le=1)
    clip_search: bool | None = None
    format: str = "compressed-tensors"
    target: Literal["vllm", "other"] = "vllm"
    calibration_dataset: list[Path] = []
    samples: int = Field(defaults.SAMPLES, ge=1, le=100_000)
    sequence_length: int | None = Field(None, ge=8, le=10_000_000)
    shuffle: bool = False
    chat_template: bool | None = None
    layers: str | None = None
    ignore: list[str] = []
    seed: int = defaults.SEED
    device: str | None = None
    gpu: str | None = None
    tensor_parallel: int = Field(1, ge=1, le=1024)
    vllm_version: str = defaults.VLLM_VERSION
    fresh: bool = False

    def resolved_scheme(self) -> Scheme:
        return resolve_scheme(self.scheme, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def settings(self) -> dict[str, Any]:
        """What decides the output's bytes, for the fingerprint: everything but where it goes and whether it resumes."""
        skipped = {"output_path", "fresh", "model_path"}
        return {k: (v if not isinstance(v, (Path, list)) else str(v)) for k, v in self.model_dump().items() if k not in skipped}


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values.

    Raises:
        UsageError, Problems: unknown keys, missing ones, values out of range; all at once.
    """
    known = list(Recipe.model_fields)
    for key in values:
        if key not in known:
            raise one_of("recipe key", key, known)
    try:
        return Recipe(**values)
    except ValidationError as error:
        problems = []
        for e in error.errors():
            name = ".".join(str(p) for p in e["loc"])
            given = "" if e["type"] == "missing" else f" is {e['input']!r}"
            problems.append(f"{name}{given}: {e['msg'][0].lower()}{e['msg'][1:]}")
        raise Problems(problems, exit_code=2) from error


def read_recipe(path: Path) -> dict[str, Any]:
    """Plain values of a YAML recipe.

    Raises:
        QuantError, UsageError: unreadable, not a mapping, an unknown key.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise QuantError(f"{path}: the recipe cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of options to values, such as 'method: gptq'")
    for key in values:
        if key not in Recipe.model_fields:
            raise one_of(f"{path}: recipe key", key, list(Recipe.model_fields))
    return values
