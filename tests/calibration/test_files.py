"""Files and folders as people have them: the same documents whatever the kind, and errors that name the file,
the place in it and the next step."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.calibration.files import documents, empty_texts
from quant.calibration.records import Tally, TextError

BOM = b"\xef\xbb\xbf"
DOCS = ['One; two, "three"\tfour é\n\nfive', "Six", "seven\neight"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(DOCS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def table(separator: str, columns: list[str], rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode()


CELLS = [[row["id"], row["text"]] for row in ROWS]
CSV = table(",", ["id", "text"], CELLS)
ARRAY = json.dumps(ROWS).encode()

SAME: list[tuple[str, bytes]] = [
    ("a.jsonl", LINES),
    ("a.ndjson", LINES),
    ("a.JSONL", LINES),
    ("a.jsonl", BOM + LINES),
    ("a.jsonl", BOM + LINES.splitlines(True)[0] + BOM + b"".join(LINES.splitlines(True)[1:])),
    ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
    ("a.jsonl", LINES.replace(b"\n", b"\r")),
    ("a.jsonl", b"\n \n" + LINES.replace(b"\n", b"\n\n")),
    ("a.jsonl", ARRAY),
    ("a.jsonl", json.dumps(ROWS, indent=2).encode()),
    ("a.jsonl", "".join(json.dumps(d) + "\n" for d in DOCS).encode()),
    ("a.json", LINES),
    ("a.json", ARRAY),
    ("a.json", BOM + ARRAY),
    ("a.json", json.dumps(ROWS, indent=2).encode()),
    ("a.json", b"[" + b",\n".join(LINES.splitlines()) + b"]"),
    ("a.json", json.dumps(DOCS).encode()),
    ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),
    ("a.json", json.dumps({"version": 1, "data": ROWS}).encode()),
    ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode()),
    ("a.json", json.dumps({"id": [1, 2, 3], "text": DOCS}).encode()),
    ("a.json", json.dumps({"text": dict(enumerate(DOCS)), "id": {0: 1, 1: 2, 2: 3}}).encode()),
    ("a.csv", CSV),
    ("a.csv", BOM + CSV),
    ("a.csv", CSV.replace(b"\n", b"\r\n")),
    ("a.csv", b"\n" + CSV),
    ("a.csv", table(";", ["id", "text"], CELLS)),
    ("a.csv", table("\t", ["Text", "id"], [c[::-1] for c in CELLS])),
    ("a.tsv", table("\t", ["id", "text"], CELLS)),
    ("a.csv", table(",", ["text"], [[d] for d in DOCS])),
    ("a.csv", table(",", ["id", "content"], CELLS)),
    ("a.jsonl.gz", gzip.compress(LINES)),
    ("a.JSONL.GZ", gzip.compress(BOM + LINES)),
    ("a.jsonl", gzip.compress(LINES)),
    ("a.json.gz", gzip.compress(ARRAY)),
    ("a.csv.gz", gzip.compress(CSV)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), SAME, ids=[f"{i} {n}" for i, (n, _) in enumerate(SAME)])
def test_every_kind_of_file_holds_the_same_documents(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    tally = Tally()
    assert list(documents([tmp_path / name], tally)) == DOCS
    assert tally.rows == 3 and not tally.notes()
    assert empty_texts([tmp_path / name]) == []


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a.text", "a.utf8", "a.txt.gz"])
@pytest.mark.parametrize("lead", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_plain_text_is_one_document(name: str, lead: bytes, end: bytes, tmp_path: Path) -> None:
    content = lead + "\n".join(DOCS * 20_000).encode().replace(b"\n", end)  # over many blocks
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    assert list(documents([tmp_path / name])) == ["\n".join(DOCS * 20_000)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(MESSAGES)),
        ("a.json", json.dumps([MESSAGES])),
        ("a.json", json.dumps({"messages": MESSAGES}, indent=1)),
        ("a.json", json.dumps({"messages": [MESSAGES], "id": [1]})),
        ("a.json", json.dumps({"messages": {"0": MESSAGES}, "id": {"0": 1}})),
        ("a.json", json.dumps({"dialog": ["Q", "A"]})),
        ("a.json", json.dumps({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]})),
        ("a.jsonl", json.dumps(MESSAGES)),
        ("a.jsonl", json.dumps({"conversations": MESSAGES})),
        ("a.csv", table(",", ["messages"], [[json.dumps(MESSAGES)]]).decode()),
        ("a.csv", "prompt,completion\nQ,A\n"),
        ("a.tsv", "instruction\tinput\toutput\nQ\t\tA\n"),
    ],
)
def test_a_file_of_one_conversation_is_one(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert list(documents([tmp_path / name])) == [MESSAGES]


def test_messages_written_flat_by_their_authors_are_rows_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"role": "prompter", "text": d} for d in DOCS]))
    assert list(documents([tmp_path / "a.json"])) == DOCS


def test_cells_of_any_length_are_read_and_the_limit_of_other_readers_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "word " * 100_000
    (tmp_path / "a.csv").write_text(f"text\n{long}\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long * 20}))
    assert list(documents([tmp_path / "a.csv"])) == [long]
    assert list(documents([tmp_path / "a.jsonl"])) == [long * 20]
    (tmp_path / "b.csv").write_text(f"{long}\n{long}\n")
    with pytest.raises(TextError, match=r"b.csv: the columns are word word .*…: none is read. Read are text"):
        list(documents([tmp_path / "b.csv"]))
    assert csv.field_size_limit() == before


def test_rows_that_hold_nothing_are_counted_with_the_place_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('id,text\n1,"a\nb"\n2,\n3\n\n4,c\n')
    tally = Tally()
    assert list(documents([file], tally)) == ["a\nb", "c"]
    assert tally.notes() == (
        f"2 of the 4 rows read hold no text and were passed over (the first is {file}, line 4)",
    )
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n\n{"text": "x"}\n{"id": 3}\n')
    tally = Tally()
    assert list(documents([tmp_path / "a.jsonl"], tally)) == ["x"]
    assert (tally.rows, tally.empty, tally.first_empty) == (4, 3, f"{tmp_path / 'a.jsonl'}, line 1")


UTF16 = "is UTF-16 text: convert it to UTF-8 first"
BROKEN: list[tuple[str, bytes, str]] = [
    # JSON
    ("a.jsonl", b'{"text": 3}', r'line 1: "text" is a number \(3\)'),
    ("a.jsonl", b'{"text": "x"}\n[1]\n', r"line 2, row 1: the row is a number \(1\)"),
    ("a.jsonl", b'{"text": "x"}\n3\n', r"line 2: the row is a number \(3\)"),
    ("a.jsonl", b'{"messages": []}', "its only row holds no text: the columns are messages. Read are "),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}', 'line 1: message 1 of "messages" has role'),
    ("a.jsonl", b'{"id": 1}\n{"id": 2, "label": 0}\n', "its 2 rows holds text: the columns are id, label"),
    ("a.jsonl", b'{"text": "x"}\n{"text', "line 2: not JSON"),
    ("a.jsonl", b'\n{"text": "x"\n{"text": "y"}', "line 2: not JSON"),
    ("a.jsonl", b"plain text\n", "line 1: not JSON .Expecting value at column 1.: give one JSON object"),
    ("a.jsonl", b"<!DOCTYPE html>\n<html>", "line 1: not JSON"),
    ("a.jsonl", b'[{"text": "x"},\n{"text": "y"},\n', "line 3: not JSON"),
    ("a.jsonl", b"[" * 200_000, "line 1: not JSON .nested too deeply"),
    ("a.jsonl", b'{"text": "x"}\n' + b'{"a":' * 200_000, "line 2: not JSON .nested too deeply"),
    ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: "),
    ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}', r"line 2: not UTF-8 text \(byte 27\)"),
    ("a.json", b'[\n {"text": "x"},\n {"text" 3}\n]', "line 3: not JSON .*':' delimiter at column 10"),
    ("a.json", b'[\n {"text": "x"},\n {"text": 3}\n]', r'row 2: "text" is a number \(3\)'),
    ("a.json", b'[\n {"text": "x"},\n', "line 3: not JSON"),
    ("a.json", b'{"text": {"en": "x"}, "id": 3}', '"text" is an object'),
    ("a.json", b'{"tokens": ["x", "y"], "id": 3}', "its only row holds no text: the columns are tokens, id"),
    ("a.json", b"3", r"the row is a number \(3\)"),
    ("a.json", "{}".encode("utf-16"), UTF16),
    # CSV
    ("a.csv", b"id,label\n1,x\n", "the columns are id, label: none is read. Read are text, messages"),
    ("a.csv", b"text\nHello, world\n", "line 2: has 2 cells, the first line names 1 columns: put text"),
    ("a.csv", b'text,id\nok,1\n"never closed,2\nmore,3\n', "line 3: begins a record that is not CSV"),
    ("a.csv", b'text,id\n"a" b,2\n', "line 2: begins a record that is not CSV"),
    ("a.csv", b"id,text\n1,\n2,\n", "none of its 2 rows holds text: the columns are id, text"),
    ("a.csv", b"text\ncaf\xe9\n", r"line 2: not UTF-8 text \(byte 8\): convert it first"),
    ("a.csv", "text\nx\n".encode("utf-16-le"), "bytes of zero"),
    ("a.csv", "text\nx\n".encode("utf-16"), UTF16),
    # text
    ("a.txt", b"abc\xff", r"line 1: not UTF-8 text \(byte 3\): convert it first"),
    ("a.txt", b"abc\n" * 30_000 + b"\xe9t\xe9", r"line 30001: not UTF-8 text \(byte 120000\)"),
    ("a.txt", b"abc\n" * 16_384 + b"\xe9", r"line 16385: not UTF-8 text \(byte 65536\): convert it first"),
    ("a.txt", b"x" * 65_535 + "é".encode()[:1], r"line 1: not UTF-8 text \(byte 65535\): convert it first"),
    ("a.txt", "text".encode("utf-16"), UTF16),
    ("a.txt", "text".encode("utf-16-be"), "holds bytes of zero: it is UTF-16 text without a byte order mark"),
    ("a.txt", "text".encode("utf-32"), "is UTF-32 text"),
    ("a.txt", lzma.compress(b"text"), "is compressed with xz: unpack it first"),
    ("a.txt", bz2.compress(b"text"), "is compressed with bzip2: unpack it first"),
    ("a.txt", b"PK\x03\x04 and more", "is a ZIP archive"),
    ("a.txt", b"%PDF-1.7", "is a PDF document"),
    ("a.json", b"PAR1....", "is a parquet file: name it .parquet"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a pointer of Git LFS"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a pointer of Git LFS"),
    # compressed
    ("a.txt.gz", b"no gzip", "cannot be read: Not a gzipped file"),
    ("a.txt.gz", gzip.compress(b"x" * 1000)[:-9], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(LINES * 1000)[:-40], "cannot be read"),
    ("a.txt.gz", gzip.compress(b"x")[:10] + b"\xff" * 40, "cannot be read"),
    ("a.txt.gz", gzip.compress(gzip.compress(b"x")), "is compressed with gzip twice"),
    ("a.txt.gz", gzip.compress("text".encode("utf-16")), UTF16),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", r"is compressed with Zstandard: unpack it first \(zstd -d\)"),
    ("a.jsonl.bz2", b"", "is compressed with bzip2: unpack it first"),
    ("a.tar.gz", b"", "is an archive: unpack it first"),
    ("a.parquet.gz", b"", "parquet files are compressed inside: unpack it first"),
    # other kinds
    ("a.docx", b"", "unknown kind of text: known are .txt, .md"),
    ("a.gz", b"", "unknown kind of text"),
    ("data", b"text", "unknown kind of text"),
    ("a.xlsx", b"", "is a spreadsheet: save it as CSV"),
    ("a.pkl", b"", "is a Python pickle, which is not loaded"),
    ("a.parquet", b"PAR1 not really", "is not a readable parquet file"),
    ("a.parquet", b"", "is not a readable parquet file"),
    ("a.arrow", b"not really", "is not a readable arrow file"),
    ("a.arrow", b"ARROW1 not really", "is not a readable arrow file"),
    ("a.arrow", b"", "is not a readable arrow file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    BROKEN,
    ids=[f"{i} {n} {m[:30]}" for i, (n, _, m) in enumerate(BROKEN)],
)
def test_broken_text_is_an_error_that_names_the_file(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    if name.startswith(("a.parquet", "a.arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as refused:
        list(documents([tmp_path / name]))
    assert str(tmp_path / name) in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text\n\n"),
        ("a.csv", ""),
        ("a.jsonl", "\n"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.txt", " \n"),
    ],
)
def test_a_file_without_rows_is_an_empty_text(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert [d for d in documents([tmp_path / name]) if str(d).strip()] == []
    (problem,) = empty_texts([tmp_path / name])
    assert problem.startswith(f"{tmp_path / name}: the calibration text is empty: give some")


# --- tables -----------------------------------------------------------------------------------------------


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)
    return path


def stream(path: Path, **columns: Any) -> Path:
    """As ``datasets`` writes it."""
    pyarrow = pytest.importorskip("pyarrow")
    made = pyarrow.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=2)
    return path


def feather(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    made = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=2)
    return path


TABLES = [(parquet, ".parquet"), (stream, ".arrow"), (feather, ".arrow")]


@pytest.mark.parametrize(("write", "end"), TABLES)
def test_tables_hold_the_same_documents(write: Callable[..., Path], end: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    assert list(documents([write(tmp_path / f"a{end}", id=[1, 2, 3], text=DOCS)])) == DOCS
    assert (
        list(documents([write(tmp_path / f"b{end}", Content=pyarrow.array(DOCS, pyarrow.large_string()))]))
        == DOCS
    )
    assert (
        list(documents([write(tmp_path / f"c{end}", text=pyarrow.array(DOCS).dictionary_encode())])) == DOCS
    )
    file = write(tmp_path / f"d{end}", messages=[MESSAGES, None], text=[None, "x"], id=[1, 2])
    assert list(documents([file])) == [MESSAGES, "x"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image", "text": None}]}]
    tally = Tally()
    assert list(documents([write(tmp_path / f"e{end}", messages=[parts])], tally)) == [
        [{"role": "user", "content": "Q"}]
    ]
    assert tally.notes() == ("parts of messages that are not text were left out: 1 image",)
    assert list(documents([write(tmp_path / f"f{end}", instruction=["Q"], input=[""], output=["A"])])) == [
        MESSAGES
    ]


@pytest.mark.parametrize(("write", "end"), TABLES)
def test_what_is_wrong_with_a_table_names_columns_and_row(
    write: Callable[..., Path], end: str, tmp_path: Path
) -> None:
    with pytest.raises(TextError, match="the columns are label, id: none is read. Read are text, messages"):
        list(documents([write(tmp_path / f"a{end}", label=["x"], id=[1])]))
    with pytest.raises(TextError, match=rf'b{end}, row 1: "text" is a number \(3\): a string is needed'):
        list(documents([write(tmp_path / f"b{end}", text=[3])]))
    with pytest.raises(TextError, match="none of its 2 rows holds text: the columns are text"):
        list(documents([write(tmp_path / f"c{end}", text=[None, ""], id=[1, 2])]))
    texts: list[Any] = ["x"] * 3000 + [None]
    file = write(tmp_path / f"d{end}", text=texts)
    tally = Tally()
    assert len(list(documents([file], tally))) == 3000
    assert (tally.empty, tally.first_empty) == (1, f"{file}, row 3001")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(TextError, match=r"is not a readable \w+ file"):
        list(documents([file]))


def test_offsets_outside_a_damaged_table_are_not_followed(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    offsets = pyarrow.py_buffer(b"".join(i.to_bytes(4, "little", signed=True) for i in (0, 1 << 30, 3)))
    damaged = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"abc"))
    file = stream(tmp_path / "a.arrow", text=damaged)
    with pytest.raises(TextError, match="a.arrow: is not a readable arrow file"):
        list(documents([file]))
    bad = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(bytes(4) + b"\1\0\0\0"), pyarrow.py_buffer(b"\xff")
    )
    for write, end in TABLES:
        with pytest.raises(TextError, match="is not a readable .* UTF8"):
            list(documents([write(tmp_path / f"b{end}", text=bad)]))


def test_without_pyarrow_tables_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "saved", data=DOCS)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TextError, match=r"reading parquet needs pyarrow: pip install 'quant\[parquet\]'"):
        list(documents([tmp_path / "a.parquet"]))
    with pytest.raises(
        TextError, match=r"arrow: reading arrow files \(datasets.save_to_disk\) needs pyarrow"
    ):
        list(documents([tmp_path / "saved"]))


# --- folders ----------------------------------------------------------------------------------------------


def saved(folder: Path, **splits: list[str]) -> Path:
    """A data set as ``save_to_disk`` leaves it: with one split without a folder for it, with several with one
    each."""
    if len(splits) > 1:
        folder.mkdir(parents=True)
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for split, texts in splits.items():
        place = folder / split if len(splits) > 1 else folder
        names = [f"data-0000{i}-of-00002.arrow" for i in (0, 1)]
        stream(place / names[0], text=texts[:1])
        stream(place / names[1], text=texts[1:])
        stream(place / "cache-1234.arrow", text=["a map's cache"])
        (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
        (place / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    return folder


def test_a_saved_data_set_is_read_in_its_order_and_of_its_splits_the_one_to_train_on(tmp_path: Path) -> None:
    tally = Tally()
    assert list(documents([saved(tmp_path / "one", data=DOCS)], tally)) == DOCS and not tally.notes()
    several = saved(tmp_path / "several", test=["t"] * 2, train=DOCS)
    assert list(documents([several], tally)) == DOCS
    assert tally.notes() == (
        f"{several}: the split train is read, test not: name a split's folder to read it",
    )
    assert list(documents([several / "test"])) == ["t", "t"]
    other = saved(tmp_path / "other", a=["1", "2"], b=["3", "4"])
    assert list(documents([other])) == ["1", "2", "3", "4"]
    assert list(documents([saved(tmp_path / "below/deeper", data=DOCS).parent])) == DOCS


@pytest.mark.parametrize("name", ["data-00000-of-00002.arrow", "../outside.arrow"])
def test_a_saved_data_set_that_is_not_whole_is_an_error(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", data=DOCS)
    stream(tmp_path / "outside.arrow", text=["x"])
    (folder / "data-00000-of-00002.arrow").unlink()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(
        TextError, match=f"one: its state.json names {name}, which is not there: copy or save"
    ):
        list(documents([folder]))


def test_files_of_a_directory_are_read_by_name_and_several_paths_as_given(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    for name, text in (
        ("b.txt", "two"), ("a.jsonl", '{"text": "one"}'), ("sub/c.txt", "three"), ("picture.png", "x"),
        ("z.md", "five"), (".cache/x.txt", "hidden"), ("y.csv", "text\nfour\n"), ("README.md", "about"),
        ("dataset_infos.json", "{}"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    tally = Tally()
    assert list(documents([tmp_path], tally)) == ["one", "two", "three", "four", "five"]
    assert tally.notes() == (f"{tmp_path}: passed over README.md, dataset_infos.json, picture.png",)
    assert list(documents([tmp_path / "b.txt", tmp_path / "a.jsonl", tmp_path / "b.txt"])) == [
        "two",
        "one",
        "two",
    ]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("all there is")
    assert list(documents([tmp_path / "docs"])) == ["all there is"]


def test_a_missing_path_and_a_directory_without_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="there is no such calibration text"):
        list(documents([tmp_path / "none.txt"]))
    with pytest.raises(
        TextError, match=r"no file of a known kind in it \(.txt, .*.csv.*; it holds no files\)"
    ):
        list(documents([tmp_path]))
    for name in ("a.png", "b.png", "c.jsonl.zst", "LICENSE"):
        (tmp_path / name).write_text("x")
    with pytest.raises(
        TextError, match=r"it holds 2 .png, 1 .zst, 1 LICENSE\)|it holds 2 .png, 1 LICENSE, 1 .zst\)"
    ):
        list(documents([tmp_path]))
