"""Files of text to documents: the name says what a file holds, and first bytes that contradict it are
an error.

Plain text is one document a file. JSON, CSV, parquet and arrow files hold rows, which
:mod:`quant.calibration.records` reads. A text may start with a byte order mark and be compressed with gzip.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

from quant.calibration.records import (
    COLUMNS,
    CONVERSATIONS,
    READ,
    Document,
    Streamed,
    Tally,
    TextError,
    columns_named,
    documents_of,
    has_shape,
    is_conversation,
)

#: A row and where it is, as an error names it.
Located = tuple[str, Any]

_BLOCK = 1 << 16
#: Rows of a table that become Python objects at a time.
_BATCH = 1024

_LFS = b"version https://git-lfs.github.com/spec/"
_POINTER = "is a pointer of Git LFS, the file itself is missing: fetch it (git lfs pull)"
_UTF16 = "is UTF-16 text: convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)"
#: First bytes of files that hold no UTF-8 text, whatever their name; of two that begin alike
#: the longer first.
_NO_TEXT: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xfe\0\0", "is UTF-32 text: convert it to UTF-8 first (iconv -f UTF-32 -t UTF-8)"),
    (b"\0\0\xfe\xff", "is UTF-32 text: convert it to UTF-8 first (iconv -f UTF-32 -t UTF-8)"),
    (codecs.BOM_UTF16_LE, _UTF16),
    (codecs.BOM_UTF16_BE, _UTF16),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard: unpack it first (zstd -d)"),
    (b"BZh", "is compressed with bzip2: unpack it first (bunzip2)"),
    (b"\xfd7zXZ\0", "is compressed with xz: unpack it first (unxz)"),
    (b"\x1f\x8b", "is compressed with gzip twice: unpack it first (gunzip)"),
    (b"PK\x03\x04", "is a ZIP archive (or an Office document): unpack it, or save it as text, first"),
    (b"PAR1", "is a parquet file: name it .parquet"),
    (b"ARROW1", "is an arrow file: name it .arrow"),
    (b"%PDF", "is a PDF document: save it as text first"),
    (b"SQLite format 3\0", "is an SQLite database: export its text as CSV or JSON lines first"),
    (b"\x80\x04\x95", "is a Python pickle, which is not loaded: write its text as JSON lines"),
    (_LFS, _POINTER),
)
#: Kinds that are known and not read, with the next step.
_REFUSED = {
    ".zst": "compressed with Zstandard: unpack it first (zstd -d)",
    ".bz2": "compressed with bzip2: unpack it first (bunzip2)",
    ".xz": "compressed with xz: unpack it first (unxz)",
    ".lz4": "compressed with LZ4: unpack it first (lz4 -d)",
    ".zip": "an archive: unpack it first, and give its folder",
    ".7z": "an archive: unpack it first, and give its folder",
    ".tar": "an archive: unpack it first, and give its folder",
    ".tgz": "an archive: unpack it first, and give its folder",
    ".xlsx": "a spreadsheet: save it as CSV",
    ".xls": "a spreadsheet: save it as CSV",
    ".pdf": "a document with pages: save its text as .txt",
    ".pkl": "a Python pickle, which is not loaded: write its text as JSON lines",
    ".pickle": "a Python pickle, which is not loaded: write its text as JSON lines",
    ".npy": "an array: write its text as JSON lines",
    ".npz": "an array: write its text as JSON lines",
}


# --- bytes to text ------------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a UTF-8 text, unpacked, from behind its byte order mark.

    Raises:
        TextError: the first bytes say that it is something else.
    """
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b" or path.suffix.lower() == ".gz"
    with cast(IO[bytes], gzip.open(path, "rb") if packed else path.open("rb")) as stream:
        head = stream.read(4096)
        if wrong := next((says for magic, says in _NO_TEXT if head.startswith(magic)), None):
            raise TextError(f"{path}: {wrong}")
        if head.count(0) * 4 > len(head):
            raise TextError(
                f"{path}: holds bytes of zero: it is UTF-16 text without a byte order mark, or no text: "
                "convert it to UTF-8 first (iconv -f UTF-16LE -t UTF-8)"
            )
        stream.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield stream


def _not_utf8(path: Path, line: int, byte: int) -> TextError:
    return TextError(
        f"{path}, line {line}: not UTF-8 text (byte {byte}): convert it first (iconv -f LATIN1 -t UTF-8, "
        "or from the encoding that it has)"
    )


def _blocks(path: Path) -> Iterator[str]:
    """A text in pieces, line ends as ``\\n``."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    with _open(path) as stream:
        lines = 0
        while True:
            block = stream.read(_BLOCK)
            lines += block.count(b"\n")
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # its object ends where the block does
                rest = error.object
                at = stream.tell() - len(rest) + error.start
                raise _not_utf8(path, lines - rest.count(b"\n", error.start) + 1, at) from error
            if not block:
                return


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, without their ends; only a line feed or a carriage return ends one."""
    number = 0
    with _open(path) as stream:
        position = stream.tell()
        for ended in stream:
            for raw in ended.splitlines(keepends=True):
                number += 1
                try:
                    yield number, raw.rstrip(b"\r\n").decode().removeprefix("\ufeff")
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, number, position + error.start) from error
                position += len(raw)


# --- files to rows ------------------------------------------------------------------------------------------


def _json(path: Path) -> Iterator[Located]:
    """JSON lines, or JSON over several lines: an array of rows, or one row behind the other."""
    first: Located | None = None
    alone = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if first is None:
                yield from _whole_json(path, line, where, error)
                return
            raise TextError(f"{where}: not JSON ({_why(error)}): give one JSON object a line") from error
        if first is None:
            first = (where, value)
            continue
        if alone:
            yield from _rows(*first)
        alone = False
        yield from _rows(where, value)
    if first is not None and alone:
        yield from _table(*first)


def _whole_json(path: Path, first: str, where: str, error: Exception) -> Iterator[Located]:
    """A file whose first line is not JSON by itself, for ``error``."""
    text, values, position, decoder = "".join(_blocks(path)), [], 0, json.JSONDecoder()
    try:
        while (position := _behind_space(text, position)) < len(text):
            value, position = decoder.raw_decode(text, position)
            values.append(value)
    except (ValueError, RecursionError) as whole:
        by_lines = _kind(path) != ".json" and first.strip() != "{" and not first.lstrip().startswith("[")
        if not by_lines and isinstance(whole, json.JSONDecodeError):
            where, error = f"{path}, line {whole.lineno}", whole
        raise TextError(
            f"{where}: not JSON ({_why(error)}): give one JSON object a line, or an array"
        ) from whole
    if len(values) == 1:
        yield from _table(str(path), values[0])
        return
    for number, value in enumerate(values, 1):
        yield from _rows(f"{path}, row {number}", value)


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _behind_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _rows(where: str, value: Any) -> Iterator[Located]:
    """A row; or those of an array, which is one row where it is a conversation."""
    if isinstance(value, list) and not is_conversation(value):
        for number, row in enumerate(value, 1):
            yield f"{where}, row {number}", row
    else:
        yield where, value


#: Names of the list of rows in an object that is the whole file.
_WRAPPERS = ("data", "rows", "train", "examples", "instances", "records", "samples", "items", "documents")


def _table(where: str, value: Any) -> Iterator[Located]:
    """The only value of a file: a row, an object around a list of rows, or a table by columns (pandas)."""
    if not isinstance(value, dict):
        yield from _rows(where, value)
        return
    lists = [x for k, x in value.items() if isinstance(x, list) and str(k).lower() in _WRAPPERS]
    columns = {k: list(x.values()) if isinstance(x, dict) else x for k, x in value.items()}
    if not has_shape(value) and len(lists) == 1:
        yield from _rows(where, lists[0])
    elif len(lengths := {len(c) if _is_column(k, c) else 0 for k, c in columns.items()}) == 1 and any(
        lengths
    ):
        cells = zip(*columns.values(), strict=True)
        yield from _rows(where, [dict(zip(columns, row, strict=True)) for row in cells])
    else:
        yield where, value


def _is_column(name: str, cells: Any) -> bool:
    """Whether a value is the column of a table rather than the conversation of one row."""
    if name.strip().lower() in CONVERSATIONS:
        return isinstance(cells, list) and all(isinstance(c, list) for c in cells)
    return isinstance(cells, list) and not is_conversation(cells)


def _csv(path: Path) -> Iterator[Located]:
    """Records of a file whose first line names its columns; the separator is the one that makes known columns
    of that line."""
    header = next((line for _, line in _lines(path) if line.strip()), "")
    separators = "\t,;|" if _kind(path) == ".tsv" else ",;\t|"
    limit = csv.field_size_limit(2**31 - 1)  # of all readers of the process: 128 KiB, less than a long text
    names: list[str] = []
    line = 1
    try:
        known = (s for s in separators if has_shape(next(csv.reader([header], delimiter=s), [])))
        records = csv.reader(
            (f"{text}\n" for _, text in _lines(path)), delimiter=next(known, separators[0]), strict=True
        )
        for record in records:
            where, line = f"{path}, line {line}", records.line_num + 1
            if not record or not (names or any(cell.strip() for cell in record)):
                continue
            if not names:
                names = record
                _check_columns(path, names)
                continue
            if len(record) > len(names):
                raise TextError(
                    f"{where}: has {len(record)} cells, the first line names {len(names)} columns: put text "
                    "that holds the separator between double quotes"
                )
            yield where, dict(zip(names, record, strict=False))
    except csv.Error as error:
        raise TextError(
            f"{path}, line {line}: begins a record that is not CSV ({error}): put text that holds quotes "
            "between double quotes, and double those within"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if not has_shape(names):
        raise TextError(f"{path}: {columns_named(names)}: none is read. Read are {READ}: rename one")


def _pyarrow(path: Path, what: str) -> ModuleType:
    try:
        import pyarrow
    except ImportError as error:
        raise TextError(f"{path}: reading {what} needs pyarrow: pip install 'quant[parquet]'") from error
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise TextError(f"{path}: {_POINTER}")
    module: ModuleType = pyarrow
    return module


def _cells(path: Path, batches: Iterable[Any]) -> Iterator[Located]:
    """Rows of batches of an arrow table, of the columns that are read."""
    start = 1
    for batch in batches:
        for first in range(0, batch.num_rows, _BATCH):
            columns = {}
            for i, name in enumerate(batch.schema.names):
                if name.strip().lower() in COLUMNS:
                    column = batch.column(i).slice(first, _BATCH)
                    column.validate(full=True)  # what is read of a damaged one may lie outside the file
                    columns[name] = column.to_pylist()
            for number, cells in enumerate(zip(*columns.values(), strict=True), start + first):
                yield f"{path}, row {number}", dict(zip(columns, cells, strict=True))
        start += batch.num_rows


def _parquet(path: Path) -> Iterator[Located]:
    pyarrow = _pyarrow(path, "parquet")
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        _check_columns(path, names)
        chosen = [n for n in names if n.strip().lower() in COLUMNS]
        yield from _cells(path, file.iter_batches(columns=chosen, batch_size=_BATCH))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise TextError(f"{path}: is not a readable parquet file: {error}") from error


def _arrow(path: Path) -> Iterator[Located]:
    """A stream of record batches, as ``save_to_disk`` writes it, or a file of them (Feather)."""
    pyarrow = _pyarrow(path, "arrow files (datasets.save_to_disk)")
    from pyarrow import ipc

    try:
        with pyarrow.OSFile(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = ipc.open_file(source)
                names, batches = file.schema.names, map(file.get_batch, range(file.num_record_batches))
            else:
                source.seek(0)
                names, batches = (stream := ipc.open_stream(source)).schema.names, iter(stream)
            _check_columns(path, names)
            yield from _cells(path, batches)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise TextError(f"{path}: is not a readable arrow file: {error}") from error


#: Plain text, one document a file.
_PLAIN = (".txt", ".md", ".text", ".utf8")
#: Readers of files that hold rows, by the kind of file.
_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _json, ".ndjson": _json, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    ".arrow": _arrow,
}  # fmt: skip
#: Kinds that are compressed inside.
_BINARY = (".parquet", ".arrow")
KINDS = (*_PLAIN, *_READERS)


# --- paths to documents -------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """The end of a name that says what a file holds, without ``.gz``."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


#: Names that stand beside data in a repository or a saved data set and are no data.
_BESIDE = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
    | {
        f"{n}{end}"
        for n in ("readme", "license", "notice", "changelog", "citation")
        for end in (".md", ".txt")
    }
)


def _saved(folder: Path, name: str) -> dict[str, Any]:
    """A file that ``datasets`` describes a saved data set with; empty where there is none."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _in_folder(folder: Path, tally: Tally, others: list[Path]) -> list[Path]:
    """Files of a known kind in a folder and those below, by name; others are put into ``others``. Of what
    ``datasets`` saved the files are those that it names, of several splits the one to train on.

    Raises:
        TextError: a file of a saved data set is missing.
    """
    splits = _saved(folder, "dataset_dict.json").get("splits")
    if isinstance(splits, list) and "train" in splits and (folder / "train").is_dir():
        if left := [str(s) for s in splits if s != "train"]:
            tally.files.append(
                f"{folder}: the split train is read, {', '.join(left)} not: name a split's folder to read it"
            )
        return _in_folder(folder / "train", tally, others)
    parts = _saved(folder, "state.json").get("_data_files")
    if isinstance(parts, list):
        named = [str(p.get("filename")) if isinstance(p, dict) else str(p) for p in parts]
        for name in named:
            if Path(name).name != name or not (folder / name).is_file():
                raise TextError(
                    f"{folder}: its state.json names {name}, which is not there: copy or save the data set "
                    "again"
                )
        return [folder / name for name in named]
    files: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            files += [] if entry.is_symlink() else _in_folder(entry, tally, others)
        elif entry.is_file():
            (files if _kind(entry) in KINDS else others).append(entry)
    return files


def _files(path: Path, tally: Tally) -> list[Path]:
    if path.is_dir():
        others: list[Path] = []
        files = _in_folder(path, tally, others)
        beside = [f for f in files if f.name.lower() in _BESIDE]
        if len(beside) < len(files):
            files = [f for f in files if f not in beside]
            others = [*beside, *others]
        if not files:
            held = ", ".join(
                f"{n} {s}" for s, n in Counter(f.suffix or f.name for f in others).most_common(6)
            )
            raise TextError(
                f"{path}: no file of a known kind in it ({', '.join(KINDS)}; it holds {held or 'no files'})"
            )
        if others:
            names = ", ".join(f.name for f in others[:3])
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            tally.files.append(f"{path}: passed over {names}{more}")
        return files
    if not path.exists():
        raise TextError(f"{path}: there is no such calibration text")
    if not path.is_file():
        raise TextError(f"{path}: is neither a regular file nor a directory: write the text to a file first")
    kind = _kind(path)
    if kind in _REFUSED:
        raise TextError(f"{path}: is {_REFUSED[kind]}")
    if kind not in KINDS:
        raise TextError(f"{path}: unknown kind of text: known are {', '.join(KINDS)}, each also as .gz")
    return [path]


def documents(
    paths: Sequence[Path], tally: Tally | None = None, plain: Callable[[Path], Iterator[str]] | None = None
) -> Iterator[Document]:
    """Texts and conversations of files and directories (sorted by name), in order.

    Args:
        tally: counts what is passed over.
        plain: reads a file of plain text; as one document unless given.

    Raises:
        TextError: a path that does not exist, an unknown kind of file, a directory without known files,
            invalid content, a file whose rows hold no text.
    """
    tally = Tally() if tally is None else tally
    for path in paths:
        try:
            files = _files(path, tally)
        except OSError as error:
            raise TextError(f"{path}: cannot be read: {error}") from error
        for file in files:
            kind = _kind(file)
            if kind in _BINARY and kind != file.suffix.lower():
                raise TextError(f"{file}: {kind[1:]} files are compressed inside: unpack it first (gunzip)")
            try:
                if kind in _PLAIN:
                    yield from ["".join(_blocks(file))] if plain is None else plain(file)
                else:
                    yield from documents_of(_READERS[kind](file), str(file), tally)
            except (OSError, EOFError, zlib.error) as error:
                raise TextError(f"{file}: cannot be read: {error}") from error


def streamed(paths: Sequence[Path], tally: Tally | None = None) -> Iterator[Document | Streamed]:
    """:func:`documents` of which files of plain text are read as their text is asked for, and no further.

    Raises:
        TextError: as :func:`documents`, of a plain text while it is read.
    """

    def later(file: Path) -> Iterator[Any]:
        yield Streamed(lambda: _told(file))

    return documents(paths, tally, later)


def _told(file: Path) -> Iterator[str]:
    try:
        yield from _blocks(file)
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"{file}: cannot be read: {error}") from error


def bundled(name: str) -> Path:
    """Path of a text that ships with the package: ``wikipedia`` or ``wikitext-2-test``, or another by the
    name of its file."""
    file = name if Path(name).suffix else f"{name}.txt.gz"
    return Path(str(resources.files("quant.calibration.data") / file))


def empty_texts(paths: Sequence[Path]) -> list[str]:
    """What is wrong with texts before any of it is tokenized: each that is not there, of no known kind or not
    readable; or that all of them together hold nothing. Each is read until it says something."""
    problems, empty = [], True
    for path in paths:
        try:
            texts = documents([path], plain=_blocks)
            empty = not any(not isinstance(d, str) or d.strip() for d in texts) and empty
        except TextError as error:
            problems.append(str(error))
            empty = False
    if empty:
        problems.append(
            f"{', '.join(map(str, paths))}: the calibration text is empty: give some, or leave "
            "--calibration-dataset out for the bundled one"
        )
    return problems
