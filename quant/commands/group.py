"""A program's subcommands by name, each imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import click

#: Characters of a first sentence, which are all of it.
_WHOLE = 1000


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is run, completed or listed with its help.

    Args:
        subcommands: name → where its command is, as ``module:attribute``.
        implied: makes arguments that begin with an option, the original form of the program, into those of a
            subcommand.
    """

    def __init__(
        self,
        *args: Any,
        subcommands: Mapping[str, str],
        implied: Callable[[list[str]], list[str]],
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._subcommands, self._implied = subcommands, implied

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._subcommands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._subcommands:
            return None
        module, _, attribute = self._subcommands[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A sentence for each subcommand, wrapped where the line ends, never cut."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(n, c.get_short_help_str(_WHOLE)) for n, c in commands.items() if c is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version", "-h"):
            args = self._implied(args)
        return super().parse_args(ctx, args)
