"""Limits of the checklist, from ``configs/checks/*.yaml`` or a file of the user's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from quant.data import config_path
from quant.documents import LONGEST_WRITTEN, read_text
from quant.errors import Problems, QuantError, UsageError, clipped, one_of
from quant.recipe import read_yaml
from quant.units import parse_size


def _size(value: Any) -> Any:
    try:
        return parse_size(value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError(str(error)) from error


Size = Annotated[int, BeforeValidator(_size)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Performance(_Section):
    """Load, and limits of what it gives; None: not judged."""

    input_tokens: int = Field(default=512, ge=1)
    output_tokens: int = Field(default=128, ge=2)
    requests: int = Field(default=100, ge=1)
    concurrency: int = Field(default=8, ge=1)
    seconds: float = Field(default=120.0, gt=0)
    ttft_p95_ms: float | None = Field(default=None, gt=0)
    ttft_p99_ms: float | None = Field(default=None, gt=0)
    stream_tokens_per_second: float | None = Field(default=None, gt=0)
    tokens_per_second: float | None = Field(default=None, gt=0)
    sustained_concurrency: int | None = Field(default=None, ge=1)
    long_prompts: dict[Annotated[int, Field(gt=0)], Annotated[float, Field(gt=0)]] = {}


class Fidelity(_Section):
    concurrency: int = Field(default=32, ge=1, le=1024)
    repeats: int = Field(default=4, ge=2, le=100)


class Resources(_Section):
    gpu_memory_share: float = Field(default=0.98, gt=0, le=1)
    kv_tokens_share: float = Field(default=0.9, gt=0)
    free_disk: Size = 0


class Security(_Section):
    certificate_days: float = Field(default=30.0, ge=0)
    rate_limit_requests: int = Field(default=200, ge=1, le=100_000)


class Operation(_Section):
    restart_seconds: float = Field(default=600.0, gt=0)
    drain_seconds: float = Field(default=60.0, gt=0)
    growth_per_hour: Size = 256 * 2**20


class Profile(_Section):
    """Thresholds by group of checks."""

    title: str = ""
    performance: Performance = Performance()
    fidelity: Fidelity = Fidelity()
    resources: Resources = Resources()
    security: Security = Security()
    operation: Operation = Operation()


def profile_names() -> list[str]:
    """The profiles that come along."""
    return sorted(p.stem for p in config_path("checks").glob("*.yaml"))


def read_profile(given: str) -> Profile:
    """A profile by its name, or from a file.

    Raises:
        UsageError, Problems: neither, no YAML, unknown keys, values of another type or out of range; all of
            them at once.
    """
    names = profile_names()
    if given not in names and not Path(given).is_file():
        raise UsageError(f"{one_of('--profile', given, names)}; or the path of a YAML file")
    path = config_path(f"checks/{given}.yaml") if given in names else Path(given)
    try:
        text = read_text(path, LONGEST_WRITTEN)
    except (OSError, ValueError) as error:
        raise QuantError(f"{path}: the profile cannot be read: {error}") from error
    values = read_yaml(text, f"{path}:")
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a profile is a mapping of groups to limits, such as performance: {{…}}")
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise Problems([_problem(path, e) for e in error.errors()], exit_code=2) from error


def _problem(path: Path, error: Any) -> str:
    where = [str(p) for p in error["loc"]]
    if error["type"] == "extra_forbidden":
        section = Profile.model_fields[where[0]].annotation if len(where) > 1 else Profile
        known = list(section.model_fields) if isinstance(section, type(BaseModel)) else []
        return str(one_of(f"{path}: {' '.join(where[:-1])} key".replace("  ", " "), where[-1], known))
    said = error["msg"].removeprefix("Value error, ")
    return f"{path}: {'.'.join(where)} is {clipped(error['input'])}: {said[0].lower()}{said[1:]}"


def parse_duration(text: str, what: str) -> float:
    """Seconds of a duration such as ``30s``, ``10m``, ``2h``.

    >>> parse_duration("10m", "--soak"), parse_duration("1.5h", "--soak")
    (600.0, 5400.0)

    Raises:
        UsageError: not one, or longer than a week.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?", text.strip())
    seconds = (
        float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[match[2] or "s"] if match else 0
    )
    if not 0 < seconds <= 7 * 86400:
        raise UsageError(f"{what} is {text!r}: give a duration such as 30s, 10m or 2h, at most 7d")
    return seconds
