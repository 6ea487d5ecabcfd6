"""What commands print at 80, 120 and 200 columns, in a terminal and piped: kept as text in ``screens.txt``,
which ``pytest tests/commands/test_screens.py --rewrite-screens`` writes anew; and what holds at any width."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quant.commands.render import prose
from quant.commands.render.results import comparison
from quant.commands.render.tables import Column, draw
from tests.helpers import ROOT, TINYLM

SCREENS = Path(__file__).with_name("screens.txt")
WIDTHS = (80, 120, 200)
#: What each screen shows: commands whose words depend on no machine and on no accounting of memory; "end of"
#: one that worked for long is drawn from the report that it wrote.
COMMANDS = (
    ["list", "methods"], ["list", "formats"], ["list", "gpus", "L4"], ["list", "scenarios", "low-lat"],
    ["detect", "--gpu", "L40S-48GB"],
    ["recommend", "--model", "Qwen2.5-7B-Instruct", "--gpu", "T4", "--policy", "rule-of-thumb"],
    ["end of", "quantize", "out/w4a16"], ["end of", "evaluate", "out/w4a16"],
    ["inspect", "out/w4a16"], ["inspect", "model"], ["verify", "out/fp8", "--source", "model", "-q"],
    ["report", "out/w4a16", "out/fp8"], ["deploy", "plan", "-m", "out/fp8"],
)  # fmt: skip
PLANNED = ["recommend", "--model", "Qwen2.5-32B-Instruct", "--gpu", "L40S-48GB", "--context", "16384"]
_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import deploy_vllm, quantize
from quant.commands.render import results
from quant.commands.terminal import console
from quant.report.files import load_evaluation
from quant.report.value import Report
for words in json.loads(sys.argv[2]):
    print("$", *(["quant"] if words[0] != "end of" else []), *words, flush=True)
    try:
        if words[:2] == ["end of", "quantize"]: results.quantization(console(), Report.load(words[2]))
        elif words[0] == "end of": results.evaluation(console(), load_evaluation(words[2]))
        elif words[0] == "deploy": deploy_vllm.main(words[1:])
        else: quantize.main(words)
    except SystemExit: pass
    sys.stdout.flush()
    sys.stderr.flush()
"""
#: What varies between machines and runs, and what is kept of it.
_VARIES = (
    (r"\d+\.\d s\b", "# s"),
    (r"(peak memory +)\S+ \S+", r"\1# MiB"),
    (r"(\d\.\d\d)\d+(?= ±|%| ± | *\n| nats| to )", r"\1#"),
    (r"(± \d\.\d\d)\d+", r"\1#"),
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two outputs of it, and what one of them lost."""
    folder = tmp_path_factory.mktemp("screens")
    (folder / "model").symlink_to(TINYLM)
    jobs = [
        ["quantize", "-m", "model", "-o", "out/w4a16", "--method", "minmax", "-q"],
        ["quantize", "-m", "model", "-o", "out/fp8", "--method", "fp8", "-q"],
        ["evaluate", "out/w4a16", "--against", "model", "--chunks", "2", "--length", "64", "--save", "-q"],
    ]
    shown(jobs, 80, False, folder)
    return folder


def shown(commands: Any, width: int, terminal: bool, folder: Path) -> str:
    """What the commands print on a terminal of that width; or into pipes that are read at it."""
    words = [sys.executable, "-c", _PROGRAM, str(ROOT), json.dumps(commands)]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm", "COLORTERM": "truecolor"}
    if not terminal:
        environment["COLUMNS"] = str(width)
        run = subprocess.run(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )
        assert run.returncode == 0
        return run.stdout
    environment["NO_COLOR"] = "1"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    process = subprocess.Popen(words, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder)
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(pieces).decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def screens(workshop: Path) -> dict[tuple[int, bool], str]:
    return {(w, t): shown([*COMMANDS, PLANNED], w, t, workshop) for w in WIDTHS for t in (False, True)}


def test_screens_are_those_that_are_kept(
    screens: dict[tuple[int, bool], str], request: pytest.FixtureRequest, workshop: Path
) -> None:
    text = "".join(
        f"==== {width} columns, {'a terminal' if terminal else 'piped'}\n{_kept(printed, workshop)}"
        for (width, terminal), printed in screens.items()
    )
    if request.config.getoption("--rewrite-screens"):
        SCREENS.write_text(text, encoding="utf-8")
    assert text == SCREENS.read_text(encoding="utf-8"), "--rewrite-screens keeps these, if they are right"


def _kept(printed: str, folder: Path) -> str:
    """All but the plan, whose numbers change with the accounting, and but what varies; without how a terminal
    shows letters, and without blanks at a terminal's line ends, which are not seen."""
    before = printed[: printed.index(f"$ quant {' '.join(PLANNED)}")].replace(str(folder), "/job")
    before = re.sub(r"\x1b\[[0-9;]*[mK]|\r", "", before)
    for pattern, kept in _VARIES:
        before = re.sub(pattern, kept, before)
    return "".join(line.rstrip() + "\n" for line in before.splitlines())


#: Lines to copy, which are whole whatever the width: commands, and the script that a deployment is.
_COPIED = re.compile(r"\$ |  (vllm|quant|hf) |serve it: |measure it: |#|export |exec ")


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_printed_fits_its_width_and_has_colours_on_a_terminal_alone(
    screens: dict[tuple[int, bool], str], width: int
) -> None:
    piped, terminal = screens[width, False], screens[width, True]
    assert "\x1b" not in piped and "\r" not in piped
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-7]|4[0-7]|38|9[0-7])\b[0-9;]*m", terminal)  # NO_COLOR
    for printed in (piped, re.sub(r"\x1b\[[0-9;]*[mK]", "", terminal)):
        long = [x for x in printed.splitlines() if len(x) > width and not _COPIED.match(x)]
        assert not [x for x in long if not x.startswith(("error: ", "  1. ", "  2. "))], long
    assert not [line for line in piped.splitlines() if line != line.rstrip()]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("terminal", [False, True], ids=["piped", "terminal"])
def test_a_plan_fits_its_width_and_cuts_no_number(
    screens: dict[tuple[int, bool], str], width: int, terminal: bool, cli: Callable[..., Any]
) -> None:
    printed = screens[width, terminal]
    plan = re.sub(r"\x1b\[[0-9;]*m", "", printed[printed.index(f"$ quant {' '.join(PLANNED)}") :])
    head = plan.index("   scheme")
    table = plan[head : plan.index("\n\n", head)]
    assert all(len(line) <= width for line in table.splitlines()) and "…" not in plan
    value = json.loads(cli(*PLANNED, "--json").out)
    for one in value["plans"]:
        assert ("bf16" if one["scheme"] == "none" else one["scheme"]) in table
        if one["kv_tokens"] and "KV tokens" in table:
            assert f"{one['kv_tokens']:,}" in table
    assert ("prefill" in table.splitlines()[0]) == (width > 80)
    assert ("Wider terminals" in table) == (width == 80)
    # a command to copy is one line whatever the width, as a terminal's own wrapping leaves it
    assert f"  {value['recommended']['commands'][-1]}\n" in plan or all(
        f"  {c}\n" in plan for c in value["recommended"]["commands"]
    )


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120, 200])
def test_no_cell_is_cut_at_any_width(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["short", "a-much-longer-name-than-fits"]
    numbers = ["1,234,567,890", "9"]
    notes = ["words " * 12, "one [i]word[/]"]
    draw(
        Console(width=width, no_color=True),
        [
            Column("name", names),
            Column("left out first", numbers, 2, True),
            Column("tokens", numbers, 1, True),
            Column("kept", ["1.5 GiB", "22 GiB"], 0, True),
        ],
        Column("why", notes),
    )
    text = capsys.readouterr().out
    assert all(len(line) <= max(width, 34) for line in text.splitlines())
    assert (
        all(x in text for x in (*names, "1.5 GiB", "22 GiB", "one [i]word[/]")) and text.count("words") == 12
    )
    if "left out first" in text.splitlines()[0]:
        assert "1,234,567,890" in text
    assert not [x for x in re.findall(r"[\d,]{5,}", text) if x != "1,234,567,890"]


def test_an_evaluation_of_several_keeps_its_numbers_at_eighty_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = {"mean": 12.3456, "standard_error": 0.1234}
    one = {
        "path": "out/a-checkpoint-with-a-name", "against": "models/source", "text": "t.txt", "chunks": 3,
        "tokens": 99, "scheme": "w4a16 (W4 g128 symmetric)", "bits_per_weight": 4.126, "total_bytes": 2**30,
        "perplexity": measured, "source_perplexity": measured, "kl": measured, "top1": measured,
    }  # fmt: skip
    comparison(Console(width=80, no_color=True), [one])
    text = capsys.readouterr().out
    assert "12.3456 ± 0.1234" in text and "12.34560 ± 0.12340" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_number_stays_with_its_unit_where_lines_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.commands.terminal.unseen", lambda: False)
    text = "33.9 GiB of weights leave 5.20 GiB for 68,112 tokens, within 1 % of the loss (± 65%) at 17 t/s"
    for width in range(20, 60):
        console = Console(width=width, record=True, file=io.StringIO())
        prose(console, text)
        lines = console.export_text().splitlines()
        assert " ".join(lines) == text and all(line == line.rstrip() for line in lines)
        assert not [x for x in lines[1:] if re.match(r"(GiB|tokens|%|t/s|65)", x)], (width, lines)
