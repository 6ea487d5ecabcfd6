"""Rows in every shape that people publish them in: to text or messages, to nothing that is counted, or to an
error that says what was found."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from quant.calibration.records import SHAPES, Tally, TextError, document, documents_of


def read(row: Any) -> Any:
    return document(row, "file, row 1", Tally())


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


TALK = [user("Q"), assistant("A")]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]

READ: list[tuple[str, Any, Any]] = [
    ("text", {"text": "A", "id": 3}, "A"),
    ("a string", "A", "A"),
    ("bytes of a table", {"text": "é".encode()}, "é"),
    ("names in other case", {" Text ": "A"}, "A"),
    ("text before all else", {"messages": TALK, "text": "T"}, "T"),
    ("empty text beside messages", {"text": "", "messages": TALK}, TALK),
    ("null text beside messages", {"text": None, "messages": TALK}, TALK),
    ("NaN beside messages", {"text": math.nan, "messages": TALK}, TALK),
    ("blank text beside a pair", {"text": " ", "prompt": "Q", "completion": "A"}, TALK),
    ("empty messages beside text", {"text": "T", "messages": []}, "T"),
    ("messages", {"messages": TALK}, TALK),
    ("JSON of messages in a cell", {"messages": json.dumps(TALK)}, TALK),
    ("messages alone", TALK, TALK),
    ("messages with a system column", {"system": "S", "messages": TALK}, [system("S"), *TALK]),
    ("a system column and a system's message", {"system": "S", "messages": [system("T"), *TALK]},
     [system("T"), *TALK]),
    ("fields that a table fills with null", {"messages": [user("Q", tool_calls=None)]}, [user("Q")]),
    ("other fields of a message", {"messages": [user("Q", name="Ann")]}, [user("Q", name="Ann")]),
    ("parts", {"messages": [user([{"type": "text", "text": "Q"}, {"type": "text", "text": "more"}])]},
     [user("Q\nmore")]),
    ("parts of strings", {"messages": [user(["Q", "more"])]}, [user("Q\nmore")]),
    ("parts of the Responses API", {"messages": [user([{"type": "input_text", "text": "Q"}])]}, [user("Q")]),
    ("parts without types", {"messages": [user([{"text": "Q", "image": None}])]}, [user("Q")]),
    ("one part", {"messages": [user({"type": "text", "text": "Q"})]}, [user("Q")]),
    ("parts under their own name", {"messages": [{"role": "user", "parts": [{"text": "Q"}]}]}, [user("Q")]),
    ("null content", {"messages": [user("Q"), assistant(None, tool_calls=CALL)]},
     [user("Q"), assistant("", tool_calls=CALL)]),
    ("a call without content", {"messages": [user("Q"), {"role": "assistant", "tool_calls": CALL}]},
     [user("Q"), assistant("", tool_calls=CALL)]),
    ("ShareGPT", {"conversations": SHAREGPT}, TALK),
    ("ShareGPT with a system's message", {"conversations": [{"from": "system", "value": "S"}, *SHAREGPT]},
     [system("S"), *TALK]),
    ("ShareGPT with a system column", {"conversations": SHAREGPT, "system": "S"}, [system("S"), *TALK]),
    ("ShareGPT with tools",
     {"conversations": [{"from": "function_call", "value": "f"}, {"from": "observation", "value": "1"}]},
     [assistant("f"), {"role": "tool", "content": "1"}]),
    ("ShareGPT's messages under role and content", {"conversations": TALK}, TALK),
    ("ShareGPT's messages under messages", {"messages": SHAREGPT}, TALK),
    ("a conversation", {"conversation": TALK}, TALK),
    ("strings in turn", {"dialog": ["Q", "A"]}, TALK),
    ("Alpaca", {"instruction": "Q", "input": "", "output": "A"}, TALK),
    ("Alpaca with an input", {"instruction": "Q", "input": "I", "output": "A"},
     [user("Q\n\nI"), assistant("A")]),
    ("Alpaca without an input", {"instruction": "Q", "output": "A"}, TALK),
    ("Alpaca with a history", {"instruction": "Q", "output": "A", "history": [["P", "B"]], "system": "S"},
     [system("S"), user("P"), assistant("B"), *TALK]),
    ("Alpaca without an answer", {"instruction": "Q", "input": "", "output": None}, [user("Q")]),
    ("Dolly", {"instruction": "Q", "context": "I", "response": "A", "category": "x"},
     [user("Q\n\nI"), assistant("A")]),
    ("prompt and completion", {"prompt": "Q", "completion": "A"}, TALK),
    ("prompt and completion as messages", {"prompt": [user("Q")], "completion": [assistant("A")]}, TALK),
    ("a preference", {"prompt": "Q", "chosen": "A", "rejected": "B"}, TALK),
    ("a preference with whole conversations", {"prompt": "Q", "chosen": TALK, "rejected": TALK}, TALK),
    ("a preference without a prompt", {"chosen": "Human: Q", "rejected": "B"}, "Human: Q"),
    ("question and answer", {"question": "Q", "answer": "A"}, TALK),
    ("OpenOrca", {"system_prompt": "S", "question": "Q", "response": "A"}, [system("S"), *TALK]),
    ("query and response", {"query": "Q", "response": "A"}, TALK),
    ("problem and solution", {"problem": "Q", "solution": "A"}, TALK),
    ("input and output", {"input": "Q", "output": "A"}, TALK),
    ("a prompt alone", {"prompt": "Q"}, [user("Q")]),
    ("an instruction alone", {"instruction": "Q"}, [user("Q")]),
    ("another name for text", {"article": "A", "summary": "B"}, "A"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), [r[1:] for r in READ], ids=[r[0] for r in READ])
def test_a_row_of_each_shape_is_read(row: Any, expected: Any) -> None:
    assert read(row) == expected


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: " + ".join(s.columns))
def test_every_shape_of_the_table_reads_strings_or_messages(shape: Any) -> None:
    for values in (["Q", "A"], [TALK, TALK]):
        row = dict(zip(shape.columns, values, strict=False))
        try:
            read(row)
        except TextError:
            continue
        document = read(row)
        assert document in ("Q", TALK, [user("Q")], [*TALK, *TALK])
        return
    raise AssertionError(shape)


EMPTY: list[Any] = [
    None, "", " \n", math.nan, {}, {"text": None}, {"text": ""}, {"text": " ", "messages": None},
    {"messages": []}, {"messages": [user(""), assistant(None)]}, {"messages": [user([{"type": "image"}])]},
    {"conversations": ""}, {"instruction": "", "input": None, "output": ""}, {"prompt": [], "completion": []},
    {"id": 3, "label": "x"}, {"text": None, "id": 3},
]  # fmt: skip


@pytest.mark.parametrize("row", EMPTY, ids=str)
def test_a_row_that_holds_nothing_is_none(row: Any) -> None:
    assert read(row) is None


WRONG: list[tuple[Any, str]] = [
    (3, r"the row is a number \(3\): an object is needed"),
    (True, "the row is a boolean"),
    ([1, 2], "the row is a list"),
    ({"text": 3}, r'"text" is a number \(3\): a string is needed'),
    ({"text": ["a", "b"]}, '"text" is a list: a string is needed'),
    ({"text": {"en": "a"}}, '"text" is an object: a string'),
    ({"text": b"\xff"}, '"text" is not UTF-8 text'),
    ({"text": "\ud800"}, "half of a surrogate pair"),
    ({"messages": [user("\ud800")]}, "half of a surrogate pair"),
    ({"messages": 3}, r'"messages" is a number \(3\): a list of messages'),
    ({"messages": {"role": "user"}}, '"messages" is an object: a list of messages'),
    ({"messages": "[{'role': 'user'}]"}, '"messages" is a string that is not JSON'),
    ({"messages": "[" * 100_000}, '"messages" is a string that is not JSON'),
    ({"messages": ["Q", 3]}, r'message 2 of "messages" is a number \(3\): role and content'),
    ({"messages": [{"role": "user"}]}, 'message 1 of "messages" has role: role and content, or from'),
    ({"messages": [{"human": "Q", "bot": "A"}]}, 'message 1 of "messages" has human, bot: role and content'),
    ({"messages": [{}]}, 'message 1 of "messages" has nothing: role and content'),
    ({"messages": [{"role": None, "content": "x"}]}, '"role" of message 1 of "messages" is null: a string'),
    ({"messages": [user(3)]}, r'the content of message 1 of "messages" is a number \(3\): a string'),
    ({"messages": [user([3])]}, r'a part of message 1 of "messages" is a number \(3\): text'),
    ({"messages": [user([{"type": "text", "text": 3}])]}, 'the text of a part of message 1 of "messages" is'),
    ({"conversations": [{"from": "human", "value": 3}]}, r'message 1 of "conversations" is a number \(3\)'),
    ({"instruction": 3, "output": "x"}, '"instruction" is a number'),
    ({"instruction": "Q", "output": "A", "history": "x"}, '"history" is not a list of pairs'),
    ({"prompt": "Q", "completion": ["x", "y"]}, '"completion" is a list: a string'),
    ({"system": 3, "messages": TALK}, '"system" is a number'),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_a_value_of_another_type_is_an_error_that_says_where_and_what(row: Any, message: str) -> None:
    with pytest.raises(TextError, match=rf"^file, row 1: .*{message}"):
        read(row)


def test_what_is_passed_over_is_counted() -> None:
    rows: list[Any] = [
        {"text": None},
        {"messages": [user([{"type": "image", "url": "x"}, {"type": "text", "text": "Q"}, {"image": "y"}])]},
        {"messages": [user([{"type": "video"}])]},
        {"messages": TALK, "tools": [{"name": "f"}]},
        {"messages": TALK, "tools": []},
    ]
    tally = Tally()
    located = [(f"f, row {i}", row) for i, row in enumerate(rows, 1)]
    assert list(documents_of(located, "f", tally)) == [[user("Q")], TALK, TALK]
    assert (tally.rows, tally.empty) == (5, 2)
    assert tally.notes() == (
        "2 of the 5 rows read hold no text and were passed over (the first is f, row 1)",
        "parts of messages that are not text were left out: 2 image, 1 video",
        "the definitions of tools of 1 row were left out",
    )
    assert Tally(rows=5).notes() == ()


def test_a_file_of_which_no_row_holds_text_is_an_error_that_names_the_columns() -> None:
    rows = [("f, row 1", {"id": 1, "review": "good"}), ("f, row 2", {"id": 2, "stars": 3, "text": None})]
    with pytest.raises(
        TextError,
        match="f: none of its 2 rows holds text: the columns are id, review, stars, text. Read are text, ",
    ):
        list(documents_of(rows, "f", Tally()))
    with pytest.raises(TextError, match="its only row holds no text: they have no columns"):
        list(documents_of([("f", None)], "f", Tally()))
    wide = {f"column {i}": "x" for i in range(30)} | {"y" * 1000: 1}
    with pytest.raises(TextError, match="column 11 and 19 more. Read") as refused:
        list(documents_of([("f", wide)], "f", Tally()))
    assert len(str(refused.value)) < 1000
    assert list(documents_of([], "f", Tally())) == []
