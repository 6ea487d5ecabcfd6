"""The command reference is what --help says, and every command has help with an example."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from deploy_vllm import cli as deploy
from quantize import cli as quant

ROOT = Path(__file__).resolve().parent.parent


def command_of(group: click.Group, name: str) -> click.Command:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return command


COMMANDS = [(g, n) for g in (quant, deploy) for n in g.list_commands(click.Context(g))]


def test_the_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/make_reference.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("group", "name"), COMMANDS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_command_has_help_with_an_example(group: click.Group, name: str) -> None:
    command = command_of(group, name)
    assert command.help and "\b" in command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} has no help"


def test_the_kinds_of_files_and_shapes_of_rows_are_those_that_are_read() -> None:
    from quant.calibration.files import KINDS
    from quant.calibration.records import SHAPES

    files, rows = (ROOT / "docs/calibration.md").read_text(encoding="utf-8").split("## Rows")
    assert [k for k in KINDS if f"`{k}`" not in files] == []
    shapes = [" + ".join(f"`{c}`" for c in s.columns) for s in SHAPES]
    assert [s for s in shapes if s not in rows] == []


def _help(command: str, option: str) -> str:
    return next(
        str(p.help)
        for p in command_of(quant, command).params
        if isinstance(p, click.Option) and option in p.opts
    )


def test_help_lists_what_the_registries_have() -> None:
    from quant.backends import BACKENDS
    from quant.formats import FormatRegistry
    from quant.outlier_suppression import OutlierSuppressionRegistry
    from quant.quantizers import QuantizerRegistry

    own = [
        (r, n) for r in (FormatRegistry, OutlierSuppressionRegistry, QuantizerRegistry) for n in r._entries
    ]
    assert len(own) >= 12
    options = {
        id(FormatRegistry): "--format",
        id(OutlierSuppressionRegistry): "--outlier-suppression",
        id(QuantizerRegistry): "--method",
    }
    for registry, name in own:
        for command in ("quantize", "layer-wise"):
            assert re.search(rf"\b{re.escape(name)}\b", _help(command, options[id(registry)])), (
                name,
                command,
            )
    for name in FormatRegistry._entries:
        assert re.search(rf"\b{re.escape(name)}\b", _help("export-vllm", "--format")), name
    for backend in BACKENDS:
        assert f"`--backend {backend}`" in (ROOT / "docs/backends.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_files_that_the_docs_name_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:quant|configs|docs|benchmarks|tests|examples)/[\w/.-]+)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_pages_count_what_the_tables_hold() -> None:
    def said(page: str) -> str:
        return " ".join((ROOT / page).read_text(encoding="utf-8").split())

    def table(name: str) -> dict[str, Any]:
        return dict(json.loads((ROOT / name).read_text(encoding="utf-8")))

    families = len(table("configs/block_names.json"))
    assert f"the {families} families in `configs/block_names.json`" in said("docs/formats.md")
    assert f"which of {len(table('docs/models.json'))} families, measured" in said("README.md")
    facts = [
        (name, ids) for row in table("configs/gpus.json")["gpus"] for name, ids in row["sources"].items()
    ]
    stated = [ids for name, ids in facts if ids or name != "reported"]
    named = sum(map(bool, stated))
    assert (
        f"Of the GPU table's {len(stated)} facts, {named} name the document or the log they were read in and "
        f"{len(stated) - named} are marked unchecked"
    ) in said("README.md")
