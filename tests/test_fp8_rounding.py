"""The program behind the FP8 table of docs/schemes.md: its rounding against enumerated numbers and the
project's own, and the table itself."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import pytest
import torch

from quant.quantizers.nearest import round_to_nearest
from quant.schemes import PRESETS
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def program() -> ModuleType:
    described = importlib.util.spec_from_file_location(
        "fp8_rounding", ROOT / "benchmarks" / "fp8_rounding.py"
    )
    assert described and described.loader
    module = importlib.util.module_from_spec(described)
    sys.modules["fp8_rounding"] = module  # dataclasses look their module up
    described.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def printed(program: ModuleType) -> list[list[str]]:
    return cells(program.table())


def cells(table: str) -> list[list[str]]:
    return [
        [c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


@pytest.mark.parametrize("number", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_become_the_nearest_number_of_the_format(program: ModuleType, number: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(number).double()
    every = every[every.isfinite()].unique()
    limit = torch.finfo(number).max
    x = torch.cat(
        [torch.tensor([limit]), torch.randn(500, generator=torch.Generator().manual_seed(1)) * limit / 8]
    ).clamp(-limit, limit)
    x = torch.cat([x, x / 2**14, x / 2**24])[None]  # down to where both formats have nothing left but 0
    found = program.rounded(x, number, (None, None))  # the largest is the limit: a scale of 1
    nearest = (x.double().mT - every).abs().amin(1)
    assert torch.equal((found.double() - x.double()).abs()[0], nearest)
    assert bool((found == 0).any())


def test_a_tile_has_the_largest_magnitude_that_is_in_it(program: ModuleType) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    for rows, columns in ((None, None), (1, None), (2, 3), (1, 4), (None, 2)):
        r, c = rows or 5, columns or 7
        found = program.largest(x, (rows, columns))
        for i in range(5):
            for j in range(7):
                tile = x[i // r * r : i // r * r + r, j // c * c : j // c * c + c]
                assert found[i, j] == tile.abs().max()


@pytest.mark.parametrize(
    ("place", "scheme"),
    [("tensor", "w8a8-fp8-tensor"), ("output channel", "w8a8-fp8"), ("128 × 128", "fp8-block")],
)
def test_e4m3_is_what_the_schemes_make(program: ModuleType, place: str, scheme: str) -> None:
    weights = PRESETS[scheme].weights
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(3))
    x[7] = 0
    ours = round_to_nearest(x, weights, torch.bfloat16).dequantize()
    assert torch.equal(program.rounded(x, torch.float8_e4m3fn, program.WEIGHTS[place]), ours)


def test_the_table_of_the_docs_is_what_the_program_prints(printed: list[list[str]]) -> None:
    text = (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8")
    start = text.index("| rounded |")
    documented = cells(text[start : text.index("\n\n", start)])
    assert [row[:2] for row in documented] == [row[:2] for row in printed]
    for ours, theirs in zip(documented, printed, strict=True):
        for a, b in zip(ours[2:], theirs[2:], strict=True):
            # sums in another order, on another processor, may move the last digit
            assert a == b or abs(_number(a) - _number(b)) <= 1.001 * _last_place(a), (ours, theirs)


def _number(cell: str) -> float:
    return float(cell.removeprefix("< ").removesuffix("%"))


def _last_place(cell: str) -> float:
    return 10.0 ** -len(re.sub(r"^[^.]*\.?|%", "", cell))


def test_the_table_shows_what_is_said_of_it(printed: list[list[str]]) -> None:
    rows = {(r[0], r[1]): [_number(c) for c in r[2:]] for r in printed[2:]}
    real = [v for (name, _), v in rows.items() if " of tinylm-4m" in name]
    assert len(real) == 6
    for e4m3, e5m2, *_ in real:
        assert e4m3 > e5m2 + 5
    assert all(v[3] <= v[2] for v in rows.values())
    whole, row = rows["Student t, 1 degree", "tensor"], rows["Student t, 1 degree", "row of 1024"]
    assert whole[2] > 50 > 5 > whole[3] and row[2] < 5
