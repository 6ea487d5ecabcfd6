"""Documents to rows of tokens, in order, and messages that say how much is missing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.calibration import files
from quant.calibration import text as text_module
from quant.calibration.files import bundled, documents
from quant.calibration.records import Streamed, TextError
from quant.calibration.text import calibration_rows, evaluation_rows, token_runs
from quant.offline import load_tokenizer
from tests.helpers import TINYLM

MESSAGES = [
    {"role": "user", "content": "What is a\nshard?"},
    {"role": "assistant", "content": "A part of a file."},
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINYLM)


@pytest.fixture
def chat(tokenizer: Any) -> Iterator[Any]:
    """The tokenizer with a chat template."""
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def rows_of(tokenizer: Any, *paths: Path, samples: int = 2, length: int = 8, **options: Any) -> Any:
    return calibration_rows(
        tokenizer, list(paths), samples, length, vocabulary=options.pop("vocabulary", 4096), **options
    )


def words(seed: int, count: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    names = ["river", "stone", "walks", "under", "green", "light", "seven", "often"]
    return " ".join(names[i] for i in torch.randint(0, 8, (count,), generator=generator).tolist())


def test_plain_text_is_one_document_cut_into_rows_in_order(tokenizer: Any, tmp_path: Path) -> None:
    text = words(0, 200)
    (tmp_path / "a.txt").write_text(text)
    ids = tokenizer(text)["input_ids"]
    rows = rows_of(tokenizer, tmp_path / "a.txt", samples=5, length=16)
    assert rows.tokens.dtype == torch.int64 and rows.tokens.shape == (5, 16)
    assert rows.tokens.flatten().tolist() == ids[:80]
    assert rows.held_out is not None and rows.held_out.flatten().tolist() == ids[80:96]


def test_conversations_go_through_the_chat_template_without_a_second_start_token(
    chat: Any, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES}) + "\n" + json.dumps({"text": "plain"}) + "\n")
    (first, second) = token_runs(chat, documents([file]), None)
    rendered = f"{chat.bos_token}<|user|>What is a\nshard?\n<|assistant|>A part of a file.\n"
    assert first == chat(rendered, add_special_tokens=False)["input_ids"]
    assert second == chat("plain")["input_ids"]
    (wrapped,) = list(token_runs(chat, iter(["plain"]), True))
    assert wrapped == chat(f"{chat.bos_token}<|user|>plain\n", add_special_tokens=False)["input_ids"]
    (joined, _) = token_runs(chat, documents([file]), False)
    assert joined == chat("What is a\nshard?\n\nA part of a file.")["input_ids"]


def test_messages_without_a_template_are_an_error_with_the_way_out(tokenizer: Any) -> None:
    for source, option in ((MESSAGES, None), ("text", True)):
        with pytest.raises(TextError, match="has no chat template: use --no-chat-template"):
            list(token_runs(tokenizer, iter([source]), option))


def test_a_template_that_refuses_the_messages_is_an_error_in_words(tokenizer: Any, chat: Any) -> None:
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TextError, match="chat template .*roles must alternate.*--no-chat-template"):
        list(token_runs(chat, iter([MESSAGES]), None))


def test_shuffled_rows_are_the_seeds_and_the_global_generator_is_left_alone(
    tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(words(2, 400))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    in_order = rows_of(tokenizer, tmp_path / "a.txt", samples=4)
    shuffled = [rows_of(tokenizer, tmp_path / "a.txt", samples=4, shuffle=True, seed=s) for s in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(shuffled[0].tokens, shuffled[1].tokens) and shuffled[0].digest == shuffled[1].digest
    assert not torch.equal(shuffled[0].tokens, shuffled[2].tokens) and not torch.equal(
        shuffled[0].tokens, in_order.tokens
    )
    ids = tokenizer(words(2, 400))["input_ids"]
    everything = [ids[i : i + 8] for i in range(0, len(ids) - 7, 8)]
    assert all(row in everything for row in shuffled[0].tokens.tolist())


def test_too_little_text_says_how_much_is_missing(tokenizer: Any, tmp_path: Path) -> None:
    text = words(3, 50)
    (tmp_path / "a.txt").write_text(text)
    have = len(tokenizer(text)["input_ids"])
    with pytest.raises(
        TextError,
        match=rf"has {have} tokens, 30 rows of 8 take 240: {240 - have} tokens, about [\d,]+ characters are "
        rf"missing. Give more",
    ):
        rows_of(tokenizer, tmp_path / "a.txt", samples=30)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(TextError, match=r"has \d tokens, 2 rows of 8 take 16: \d+ tokens.* are missing"):
        rows_of(tokenizer, tmp_path / "empty.txt")


def test_rows_that_use_up_the_text_leave_none_to_measure_errors_on(tokenizer: Any, tmp_path: Path) -> None:
    text = words(4, 60)
    (tmp_path / "a.txt").write_text(text)
    count = len(tokenizer(text)["input_ids"]) // 8
    assert rows_of(tokenizer, tmp_path / "a.txt", samples=count).held_out is None
    assert rows_of(tokenizer, tmp_path / "a.txt", samples=count - 1).held_out is not None


def test_tokens_that_the_model_does_not_have_are_an_error(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(5, 60))
    largest = int(rows_of(tokenizer, tmp_path / "a.txt").tokens.max())
    with pytest.raises(
        TextError,
        match=rf"the tokenizer gives token \d+, the model has {largest}: the tokenizer belongs to another "
        rf"model",
    ):
        rows_of(tokenizer, tmp_path / "a.txt", vocabulary=largest)


def test_the_digest_tells_texts_apart(tokenizer: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / f"{name}.txt").write_text(words(seed, 60))
    a, b, c = (rows_of(tokenizer, tmp_path / f"{n}.txt").digest for n in "abc")
    assert a == b != c


def test_a_long_text_is_tokenized_in_pieces_that_give_the_same_tokens(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant.calibration import text as module

    content = "\n".join(words(i, 20) for i in range(40)) + "\n"
    whole = [i for run in token_runs(tokenizer, iter([content]), None) for i in run]
    monkeypatch.setattr(module, "_PIECE", 500)
    runs = list(token_runs(tokenizer, iter([content]), None))
    assert len(runs) > 5 and [i for run in runs for i in run] == whole


@pytest.mark.parametrize("name", ["wikipedia", "wikitext-2-test"])
def test_the_bundled_texts_are_there_and_fill_the_default_rows(name: str) -> None:
    (text,) = documents([bundled(name)])
    assert isinstance(text, str) and len(text) > 1_200_000


def test_evaluation_rows_begin_with_the_start_token_and_follow_the_text(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = words(6, 100)
    (tmp_path / "a.txt").write_text(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = evaluation_rows(tokenizer, tmp_path / "a.txt", 16, 4)
    assert rows.tolist() == [[tokenizer.bos_token_id, *ids[i * 15 : (i + 1) * 15]] for i in range(4)]
    assert len(evaluation_rows(tokenizer, tmp_path / "a.txt", 16, 1000)) == len(ids) // 15
    with pytest.raises(
        TextError,
        match=r"has \d+ tokens, one chunk of 4096 takes 4,095: give more text, or a smaller --length",
    ):
        evaluation_rows(tokenizer, tmp_path / "a.txt", 4096, 4)

    class NoStart:
        bos_token_id = None

        def __call__(self, *args: Any, **options: Any) -> Any:
            return tokenizer(*args, **options)

    assert evaluation_rows(NoStart(), tmp_path / "a.txt", 16, 2).flatten().tolist() == ids[:32]


def test_a_long_text_without_lines_is_cut_before_words_or_anywhere(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant.calibration import text as module

    content = " ".join(words(i, 20) for i in range(40))
    whole = [i for run in token_runs(tokenizer, iter([content]), None) for i in run]
    monkeypatch.setattr(module, "_PIECE", 500)
    runs = list(token_runs(tokenizer, iter([content]), None))
    assert len(runs) > 4 and [i for run in runs for i in run] == whole
    runs = list(token_runs(tokenizer, iter(["x" * 3000]), None))
    assert len(runs) == 3 and tokenizer.decode([i for r in runs for i in r]).count("x") == 3000


def test_rows_say_what_of_the_text_was_passed_over(tokenizer: Any, tmp_path: Path) -> None:
    lines = [{"text": None}, {"text": words(7, 60)}, {"text": " "}, {"text": words(8, 60)}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    rows = rows_of(tokenizer, file)
    assert rows.notes == (
        f"1 of the 2 rows read hold no text and were passed over (the first is {file}, line 1)",
    )
    with pytest.raises(TextError, match=r"are missing\. Give more .*; 2 of the 4 rows read hold no text"):
        rows_of(tokenizer, file, samples=1000)
    heard: list[str] = []
    evaluation_rows(tokenizer, file, 16, 1000, heard.append)
    assert heard == [f"2 of the 4 rows read hold no text and were passed over (the first is {file}, line 1)"]
    (tmp_path / "b.txt").write_text(words(9, 60))
    assert rows_of(tokenizer, tmp_path / "b.txt").notes == ()


def test_messages_without_content_add_nothing_to_plain_text(tokenizer: Any) -> None:
    silent = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": []}, MESSAGES[1]]
    assert list(token_runs(tokenizer, [silent], False)) == list(token_runs(tokenizer, [MESSAGES], False))


def test_conversations_are_evaluated_through_the_template_where_there_is_one(
    tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES}))

    def tokens() -> list[int]:
        rows = evaluation_rows(tokenizer, file, 8, 100)
        return [i for row in rows.tolist() for i in row[1:]]

    joined = tokenizer("What is a\nshard?\n\nA part of a file.", add_special_tokens=False)["input_ids"]
    assert tokens() == joined[: len(joined) // 7 * 7]
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    try:
        rendered = tokenizer(
            "<|user|>What is a\nshard?\n<|assistant|>A part of a file.\n", add_special_tokens=False
        )["input_ids"]
        assert tokens() == rendered[: len(rendered) // 7 * 7]
        tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "{{ raise_exception('no') }}")
        with pytest.raises(TextError, match="chat template cannot take .*no.*evaluate on plain text"):
            tokens()
        tokenizer.chat_template = {f"k{i}": i for i in range(5000)}  # transformers names them all
        with pytest.raises(TextError, match="chat template cannot take") as refused:
            tokens()
        assert len(str(refused.value)) < 500
    finally:
        tokenizer.chat_template = None


def test_a_text_that_is_streamed_is_cut_where_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_PIECE", 50)
    generator = random.Random(0)
    for kinds in (["a", "bc", "\n", " ", "\n  ", "word"], ["x"], ["ab ", "c"], [" \n\n"]):
        whole = "".join(generator.choice(kinds) for _ in range(400))
        sizes = [generator.randrange(1, 180) for _ in range(2000)]

        def parts(whole: str = whole, sizes: list[int] = sizes) -> Iterator[str]:
            start = 0
            for size in sizes:
                yield whole[start : start + size]
                start += size

        cut = list(text_module._pieces(whole))
        assert "".join(cut) == whole and max(map(len, cut)) <= 101
        assert list(text_module._pieces(Streamed(parts))) == cut


def test_no_more_of_a_large_text_is_read_than_rows_need(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "The quick brown fox jumps over the lazy dog, again and again.\n"
    file = tmp_path / "large.txt"
    file.write_text(line * 400_000, encoding="utf-8")
    read = 0
    inner = files._blocks

    def blocks(path: Path) -> Iterator[str]:
        nonlocal read
        for block in inner(path):
            read += len(block)
            yield block

    monkeypatch.setattr(files, "_blocks", blocks)
    few = calibration_rows(tokenizer, [file], 4, 128, vocabulary=1 << 20)
    assert few.tokens.shape == (4, 128) and read < 3 << 20
    # tokens lie on a file beyond what memory is meant for, and are the same
    short = tmp_path / "short.txt"
    short.write_text(line * 2000, encoding="utf-8")
    drawn = calibration_rows(tokenizer, [short], 8, 64, vocabulary=1 << 20, shuffle=True, seed=3)
    monkeypatch.setattr(text_module._Tokens.__init__, "__defaults__", (64,))
    again = calibration_rows(tokenizer, [short], 8, 64, vocabulary=1 << 20, shuffle=True, seed=3)
    assert torch.equal(drawn.tokens, again.tokens) and drawn.digest == again.digest
