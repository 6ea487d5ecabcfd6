"""Kinds of values that options take, beyond click's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from quant.errors import QuantError
from quant.units import parse_size, parse_tokens


class Size(click.ParamType):
    """A size such as ``48GiB``; the value is bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value, f"--{param.name.replace('_', '-')}" if param and param.name else "size")
        except QuantError as error:
            self.fail(str(error), param, ctx)


class TokenCount(click.ParamType):
    """A number of tokens such as ``32768``, ``32k`` or ``1M``; the value is a
    :class:`~quant.units.Tokens`."""

    name = "tokens"

    def __init__(self, least: int | None = None) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, int):
            return value
        try:
            tokens = parse_tokens(value, f"--{param.name.replace('_', '-')}" if param and param.name else "")
        except QuantError as error:
            self.fail(str(error), param, ctx)
        if self.least is not None and tokens < self.least:
            self.fail(f"{value} is less than {self.least}", param, ctx)
        return tokens


class FiniteRange(click.FloatRange):
    """click's range without what it lets pass: infinity, and NaN, which no bound is above."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


class ItemLimits(click.ParamType):
    """Items of each kind that a prompt may have, as vLLM writes them: ``image=2,video=0`` or a JSON object;
    the value is a dict."""

    name = "kind=number,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        import json

        try:
            said = (
                json.loads(value) if value.startswith("{") else dict(i.split("=") for i in value.split(","))
            )
            limits = {str(kind).strip(): int(number) for kind, number in said.items()}
        except (TypeError, ValueError):
            limits = {"": -1}
        if any(not kind or number < 0 for kind, number in limits.items()):
            self.fail(f"{value!r} is not such as image=2,video=0", param, ctx)
        return limits


class PathType(click.Path):
    """A path that is not empty: ``-o "$UNSET"`` would mean the current directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty: give a path (. is the current directory)", param, ctx)
        return super().convert(value, param, ctx)


class ModelType(PathType):
    """A checkpoint directory, ``org/name[@revision]`` of the Hub, or an address of storage (``s3://…``); the
    value is a directory.

    Args:
        download: whether a model that the cache lacks is fetched.
    """

    def __init__(self, download: bool = True) -> None:
        super().__init__()
        self.download = download

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from quant.remote import is_remote

        if isinstance(value, str) and is_remote(value):
            from quant.hub import local_model

            return value if ctx is not None and ctx.resilient_parsing else local_model(value, self.download)
        path = super().convert(value, param, ctx)
        if ctx is not None and ctx.resilient_parsing:  # a shell completes; nothing is run
            return path
        from quant.hub import config_of, local_model

        if not self.download and ctx is not None and ctx.params.get("online"):
            return config_of(path)
        return local_model(path, self.download)


class Alpha(click.ParamType):
    """A number, or ``auto``."""

    name = "float|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        return "auto" if value == "auto" else float(click.FLOAT.convert(value, param, ctx))


PATH = PathType()
MODEL = ModelType()
TOKENS = TokenCount()
