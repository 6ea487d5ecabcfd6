"""What messages show of values."""

from __future__ import annotations

import pytest

from quant.errors import clipped, one_of


@pytest.mark.parametrize(
    "value", ["x" * 10**6, [["x"] * 9] * 9, {str(i): "y" * 99 for i in range(999)}, 10**4000, b"z" * 9999]
)
def test_a_long_value_is_shown_by_its_beginning(value: object) -> None:
    assert len(clipped(value)) <= 100
    assert len(str(one_of("--method", value, ["gptq"]))) < 200


def test_short_values_are_shown_whole_and_endless_ones_end() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert (clipped("abc"), clipped(3.5), clipped(None)) == ("'abc'", "3.5", "None")
    assert len(clipped(endless)) < 100
