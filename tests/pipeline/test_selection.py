"""--layers and --ignore."""

from __future__ import annotations

import pytest

from quant.errors import UsageError
from quant.pipeline.selection import blocks_of, select

LINEARS = [
    f"model.layers.{b}.{m}" for b in range(12) for m in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")
]


@pytest.mark.parametrize(
    ("spec", "blocks"),
    [
        ("0", {0}),
        ("0,1,2", {0, 1, 2}),
        ("0-3,7", {0, 1, 2, 3, 7}),
        (" 1 , 3-4 ", {1, 3, 4}),
        ("first:2", {0, 1}),
        ("last:2", {10, 11}),
        ("last:12", set(range(12))),
        ("5,5", {5}),
    ],
)
def test_specs_of_blocks(spec: str, blocks: set[int]) -> None:
    assert blocks_of(spec, 12) == blocks
    assert {int(n.split(".")[2]) for n in select(LINEARS, spec, [], 12)} == blocks


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("12", "--layers names block 12: the model has 12 blocks, 0 to 11"),
        ("0-99999999999999", "names block 99999999999999"),
        ("3-1", "the range '3-1', which runs backwards"),
        ("first:0", "the model has 12 blocks, give 1 to 12"),
        ("last:13", "give 1 to 12"),
        ("9" * 5000, "matches no linear of the model"),
        ("last:" + "9" * 5000, "matches no linear of the model"),
        ("", "--layers '' matches no linear of the model"),
        ("-1", "--layers '-1' matches no linear"),
        ("1,", "matches no linear"),
        (
            "*.k_proj",
            r"--layers '\*.k_proj' matches no linear of the model: names look like "
            r"'model.layers.0.mlp.down_proj'",
        ),
    ],
)
def test_specs_that_mean_nothing_are_refused_with_what_is_there(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(LINEARS, spec, [], 12)


def test_globs_choose_by_name_in_the_models_order() -> None:
    assert select(LINEARS, "*.1.mlp.*,down_proj", [], 12) == [
        n for n in LINEARS if n.endswith("down_proj") or ".1.mlp." in n
    ]


@pytest.mark.parametrize(
    ("pattern", "dropped"),
    [
        ("*.down_proj", "down_proj"),
        ("down_proj", "down_proj"),
        (r"re:.*\.up_proj$", "up_proj"),
        ("*self_attn*", "q_proj"),
    ],
)
def test_ignored_linears_are_left_out(pattern: str, dropped: str) -> None:
    assert select(LINEARS, None, [pattern], 12) == [n for n in LINEARS if not n.endswith(dropped)]


def test_the_head_may_be_ignored_although_it_never_is_quantized() -> None:
    assert select(LINEARS, None, ["lm_head"], 12) == LINEARS


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (["*.k_proj"], r"--ignore '\*.k_proj' matches no linear of the model: .*such as '\*.down_proj'"),
        (["re:up_proj"], "--ignore 're:up_proj' matches no linear"),
        (["re:("], r"--ignore 're:\(': not a regular expression: missing \)"),
        ([""], "--ignore '' matches no linear"),
        (["*"], "no linear is left to quantize: change --layers or --ignore"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(ignore: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(LINEARS, None, ignore, 12)
