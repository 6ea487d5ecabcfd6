"""Changes of files that keep what they are, so that they reach the code behind the parser: a value of another
type, a number without bounds, a name that leaves its folder; and changes of bytes, which do not."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

#: JSON that Python's own writer cannot write: put in as text.
RAW = {
    "overflow": "1e999",
    "underflow": "-1e-999",
    "NaN": "NaN",
    "negative infinity": "-Infinity",
    "4301 digits": "9" * 4301,
    "400 digits": "9" * 400,
    "nested lists": "[" * 4000 + "]" * 4000,
    "deep lists": "[" * 200_000,
    "nested objects": '{"a":' * 3000 + "1" + "}" * 3000,
    "twice": '{"a": 1, "a": 2}',
    "half a pair": '"\\ud800"',
    "cut": '"',
    "a long list": "[" + "0," * 50_000 + "0]",
    "many keys": "{" + ",".join(f'"k{i}":{i}' for i in range(5000)) + "}",
}
#: Values of JSON that a reader may not expect.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 64, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 63, 1 << 64,
    10**30, -(1 << 63), 0.0, -0.0, 0.5, 1e308, 1e-308, 3.0, "", " ", "0", "1", "none", "null", "auto",
    "float32", "int4", "x" * 10_000, "é", "\0", "\n", "a/b", "../model", "../../x", "/etc/passwd", "..", ".",
    "~", "\u202e", "\U0001f600", "\x1b[31m", "re:(", "re:(a+)+$", "*", "[", "{x", "%s", "{0}", "[]", "{}",
    [], {}, [None], [[]], [{}], [0], [-1], [""], ["x"], [1, 2, 3, 4], {"": 0}, {"x": None}, {"a": {"a": {}}},
]  # fmt: skip
#: What may stand in a recipe or a manifest beyond JSON's values.
YAML_TEXTS = [
    "&a [*a]", "*missing", "!!python/object/apply:os.system ['true']", "!!binary aGk=", "!!set {a, b}",
    "2024-02-30", "2024-01-01", "0o17", "0x10", "1_000", "12:30:45", ".inf", ".nan", "~", "<<", "=", "? [a]",
    "{<<: [1]}", "{<<: *x}", "{[a]: 1}", "{1: 2}", "{null: 1}", "|\n    text", "'", '"', "%", "@", "`", "\t",
    "[" * 500, "{" * 500, "- " * 300, "!!int x", "!!float x", "!!timestamp x", "!!str", "!<x> 1", "---\n...",
    "&a [0,0,0,0,0,0,0,0,0]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n"
    "f: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]",
    "9" * 5000, "1e999", "-.inf", "!!null x", "\ufeff", "\u2028", "\x07",
]  # fmt: skip
_MARK = "@raw:"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside, itself first; of long lists the beginning."""
    yield path
    inside: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inside = enumerate(value[:20])
    for key, part in inside:
        yield from places(part, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def documents(draw: st.DrawFn, value: Any, raw: tuple[str, ...] = tuple(RAW), most: int = 3) -> Any:
    """The document with one to ``most`` changes: a value replaced, removed, moved, renamed or made larger.
    Texts that begin with ``@raw:`` stand for what :func:`as_json` writes in their place."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(places(value))[:400]))
        if not path:
            if draw(st.integers(0, 19)) == 0:
                value = draw(st.sampled_from(VALUES))
            elif isinstance(value, dict):
                key = draw(st.sampled_from(["x", "", "\ud800", "__class__", "a" * 5000, "é", "\0"]))
                value[key] = draw(st.sampled_from(VALUES))
            continue
        parent, key = _at(value, path[:-1]), path[-1]
        kind = draw(st.sampled_from(["value", "value", "value", "raw", "scale", "remove", "swap", "rename"]))
        if kind == "value":
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif kind == "raw" and raw:
            parent[key] = _MARK + draw(st.sampled_from(raw))
        elif kind == "scale" and isinstance(parent[key], (int, float)):
            parent[key] = draw(st.sampled_from([-1, 0.5, 2, 3, 1000, 1 << 40])) * parent[key]
        elif kind == "remove":
            del parent[key]
        elif kind == "swap":
            parent[key] = copy.deepcopy(_at(value, draw(st.sampled_from(list(places(value))[:400]))))
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", key + "s", str(key).upper(), "", "\ud800"]))] = parent.pop(key)
        else:
            parent[key] = [parent[key]]
    return value


def as_json(value: Any) -> str:
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(_MARK + name), raw)
    return text


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes, cut, flipped, doubled or filled, as a bad copy or a lost sync leaves them."""
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.sampled_from([1, 1, 2, 7, 64, 4096]))
        kind = draw(st.sampled_from(["cut", "drop", "zero", "ones", "flip", "twice", "put", "bom"]))
        head, part, tail = data[:start], data[start : start + size], data[start + size :]
        data = {
            "cut": head,
            "drop": head + tail,
            "zero": head + b"\0" * len(part) + tail,
            "ones": head + b"\xff" * len(part) + tail,
            "flip": head + bytes(b ^ 0x10 for b in part) + tail,
            "twice": head + part + part + tail,
            "put": head + draw(st.binary(max_size=8)) + part + tail,
            "bom": draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PK\3\4"])) + data,
        }[kind]
    return data


@st.composite
def json_files(draw: st.DrawFn, data: bytes) -> bytes:
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged(data))
    return as_json(draw(documents(json.loads(data)))).encode()


@st.composite
def line_files(draw: st.DrawFn, data: bytes) -> bytes:
    """JSON lines: one is changed, repeated, dropped or damaged."""
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged(data))
    lines = data.decode().splitlines()
    i = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(["document", "document", "document", "twice", "drop", "text"]))
    if kind == "document":
        lines[i] = as_json(draw(documents(json.loads(lines[i]))))
    elif kind == "twice":
        lines.insert(draw(st.integers(0, len(lines))), lines[i])
    elif kind == "drop":
        del lines[i]
    else:
        lines[i] = draw(st.sampled_from(["", "null", "[]", "3", '"x"', "{", "{}", "\0", "NaN", "x" * 70_000]))
    return "\n".join([*lines, ""]).encode()


@st.composite
def yaml_files(draw: st.DrawFn, data: bytes) -> bytes:
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(damaged(data))
    value = draw(documents(yaml.safe_load(data), raw=()))
    text = yaml.dump(value, Dumper=_Plain, allow_unicode=True)
    if kind < 3:  # a value that only YAML has
        lines = text.splitlines()
        i = draw(st.integers(0, len(lines)))
        more = draw(st.sampled_from(YAML_TEXTS))
        if i < len(lines) and ": " in lines[i]:
            lines[i] = lines[i].split(": ", 1)[0] + ": " + more
        else:
            lines.insert(i, draw(st.sampled_from(["", "x: ", "- ", "method: "])) + more)
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


class _Plain(yaml.SafeDumper):
    """Writes what comes twice twice: anchors are put in on purpose alone."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


#: Dtypes of equal size.
_DTYPES = (
    ["U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"],
    ["F16", "BF16", "I16", "U16"],
    ["F32", "I32", "U32"],
    ["F64", "I64", "U64"],
)


@st.composite
def safetensors_files(draw: st.DrawFn, data: bytes) -> bytes:
    """The header changed, its length right or not; or bytes of the file."""
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged(data))
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [n for n in header if n != "__metadata__"]
    kind = draw(st.sampled_from(["document", "document", "reshape", "dtype", "rename", "fill", "length"]))
    if kind == "document":
        header = draw(documents(header))
    elif names:
        name = draw(st.sampled_from(names))
        entry = header[name]
        start, end = entry["data_offsets"]
        if kind == "reshape":
            total = 1
            for n in entry["shape"]:
                total *= n
            shapes = [
                [total],
                [1, total],
                [total, 1],
                [*entry["shape"], 1],
                entry["shape"][::-1],
                [2, total // 2],
            ]
            entry["shape"] = draw(st.sampled_from(shapes))
        elif kind == "dtype":
            alike = next(names for names in _DTYPES if entry["dtype"] in names)
            entry["dtype"] = draw(st.sampled_from(alike))
        elif kind == "rename":
            others = [name.replace("layers.0", f"layers.{n}") for n in ("99", "00", "-1", "\u0661")]
            new = draw(st.sampled_from([*others, name + "x", "lm_head.weight", "", "x" * 3000]))
            header[new] = header.pop(name)
        else:
            fill = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\x7c\x7c"]))
            rest = rest[:start] + (fill * (end - start))[: end - start] + rest[end:]
    text = as_json(header).encode()
    size = len(text)
    if kind == "length":
        size = draw(st.sampled_from([0, 1, size - 1, size + 1, 1 << 31, 1 << 63, (1 << 64) - 1, len(data)]))
    return struct.pack("<Q", size) + text + rest


#: What stands in a file's place where it is no file.
ODD = ("gone", "folder", "loop", "dangling", "empty", "huge", "fifo")


def put_odd(file: Path, kind: str) -> None:
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "dangling":
        file.symlink_to("nowhere")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "huge":  # takes no room on the disk
        with file.open("wb") as stream:
            stream.truncate(4 << 30)
    elif kind == "fifo":
        import os

        os.mkfifo(file)
