"""Kinds of values that options take, beyond click's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant.errors import QuantError
from quant.units import parse_size


class Size(click.ParamType):
    """A size such as ``48GiB``; the value is bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value, f"--{param.name.replace('_', '-')}" if param and param.name else "size")
        except QuantError as error:
            self.fail(str(error), param, ctx)


class PathType(click.Path):
    """A path that is not empty: ``-o "$UNSET"`` would mean the current directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty: give a path (. is the current directory)", param, ctx)
        return super().convert(value, param, ctx)


class Alpha(click.ParamType):
    """A number, or ``auto``."""

    name = "float|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        return "auto" if value == "auto" else float(click.FLOAT.convert(value, param, ctx))


PATH = PathType()
