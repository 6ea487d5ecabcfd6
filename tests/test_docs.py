"""The command reference is what --help says, and every command has help with an example."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

from deploy_vllm import cli as deploy
from quantize import cli as quant

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [(g, n) for g in (quant, deploy) for n in g.commands]


def test_the_reference_is_current() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs/make_reference.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("group", "name"), COMMANDS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_command_has_help_with_an_example(group: click.Group, name: str) -> None:
    command = group.commands[name]
    assert command.help and "\b" in command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} has no help"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_files_that_the_docs_name_exist(page: Path) -> None:
    import re

    for name in re.findall(r"`((?:quant|configs|docs|benchmarks|tests|examples)/[\w/.-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
