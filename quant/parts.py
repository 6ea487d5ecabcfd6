"""GPU parts by the names that people, shops and drivers give them, looked up in ``configs/gpus.json``.

``RTX4090-24GB``, ``4090``, ``3090 Ti``, ``T4-16GB``, ``DGX Spark``, ``2xL4``, ``2 x H100``, ``a100_40gb``: a
name is a set of words, a memory size, and a number of parts. It fits a row of the table when all its words
are the row's, and what it leaves out is no more than a brand, a form factor or a generation; so ``4070`` is
no ``4070 Ti``. Where several rows fit, one is taken and said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant.data import load_json
from quant.errors import UsageError, any_of

Row = Mapping[str, Any]

#: Of a part whose driver's total is not known, its share of the nominal size; the known ones that keep no ECC
#: in it have 0.95 to 1.
USABLE_SHARE = 0.985
#: Most parts of one name.
MOST = 1024
#: Words that tell parts from one another nowhere in the table.
_NOISE = re.compile(
    r"\b(nvidia|geforce|amd|instinct|radeon|tesla|gpus?|graphics|generation|tensor core|hbm\d?e?|oam)\b"
)
#: Words of a row that a name may leave out: brands, form factors, generations.
_OPTIONAL = frozenset(
    {"rtx", "gtx", "rx", "quadro", "dgx", "gb10", "sxm", "pcie", "nvl", "ada", "pro", "blackwell"}
)
_LAPTOP = {"mobile": "laptop", "notebook": "laptop"}
_SIZE = re.compile(r"(?<![a-z\d.])(\d{1,3}(?:\.\d+)?) ?gi?b?\b")
#: Brands that are written together with the number, and what follows it without a blank.
_BRAND = re.compile(r"\b(rtx|gtx|rx|quadro|tesla|geforce|dgx)(?=[a-z]?\d)")
_SUFFIX = re.compile(
    r"(?<=\d)(ti|super|laptop|mobile|notebook|xtx|xt|ada|sxm\d?|pcie|nvl|pro)(?![\d])|(?<=\d{4})(d)\b"
)
#: How a number of parts is written: behind the name, or before it.
_COUNTS = (
    r"(?P<one>.+?)\s*[x×*:]\s*(?P<count>\d{1,20})",
    r"(?P<count>\d{1,20})\s*[x×*]\s*(?P<one>.+)",
    r"(?P<count>\d{1,20})\s+(?P<one>.+)",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What a name says.

    Attributes:
        row: of the table.
        count: how many, where the name says it.
        note: what was taken of several that the name fits; empty where it fits one.
    """

    row: Row
    count: int | None = None
    note: str = ""


@dataclass(frozen=True)
class _Name:
    """A name's words, and the memory in GB that it says."""

    words: frozenset[str]
    memory: float | None

    @classmethod
    def of(cls, text: str) -> _Name:
        lower = re.sub(r"[_\-:/,()+]", " ", text.lower())
        sizes = _SIZE.findall(lower)
        lower = re.sub(r"\brtxpro", "rtx pro ", _SIZE.sub(" ", lower))
        lower = _BRAND.sub(r"\1 ", lower)
        lower = re.sub(r"\b(\d{4})m\b", r"\1 laptop", lower)
        lower = re.sub(r"\bti(super|laptop)", r"ti \1", _SUFFIX.sub(r" \g<0>", lower))
        lower = re.sub(r"\bsxm\d\b", "sxm", _NOISE.sub(" ", lower))
        words = frozenset(_LAPTOP.get(word, word) for word in lower.split())
        return cls(words, float(sizes[-1]) if sizes else None)


def rows() -> list[Row]:
    """All parts of the table, in its order."""
    return list(load_json("gpus.json")["gpus"])


def plain(name: str) -> str:
    """A name for comparing letter by letter: ``NVIDIA GeForce RTX 4090`` and ``rtx-4090`` become the same.

    >>> plain("NVIDIA GeForce RTX 3070 Ti Laptop GPU")
    'rtx3070tilaptop'
    """
    text = re.sub(r"\bsxm\d?\b", " ", _NOISE.sub(" ", name.lower().replace("-", " ").replace("_", " ")))
    return re.sub(r"[^a-z0-9]", "", text)


def named_row(name: str) -> Row | None:
    """The row of a name as the table or a driver writes it; None where it fits no row to the letter."""
    wanted = plain(name)
    return next((r for r in rows() if wanted in {plain(n) for n in (r["name"], *r["aliases"])}), None)


def _has(row: Row, memory: float | None) -> bool:
    """Whether a row's memory is what a name says, as sold or as drivers report it."""
    reported = row["reported_gib"] or row["memory_gib"] * USABLE_SHARE
    return memory is None or math.floor(reported) <= memory <= row["memory_gib"]


def _fits(row: Row, words: frozenset[str]) -> bool:
    known = (_Name.of(n).words for n in (row["name"], *row["aliases"]))
    return any(words <= k and k - words <= _OPTIONAL for k in known)


def find_part(text: str, option: str = "--gpu") -> Part:
    """The part that a person names.

    Args:
        text: a name; it may say a memory size and a number.
        option: what it was given as, for errors.

    Raises:
        UsageError: no such part (the nearest names are offered), a memory size that it does not have, or a
            number that is none.

    >>> find_part("RTX4090-24GB").row["name"], find_part("2 x h100-sxm").count
    ('RTX-4090', 2)
    >>> find_part("A100 (40GB)").row["name"]
    'A100-40GB'
    """
    text = text.strip()
    if (part := _find(text, option)) is not None:
        return part
    for pattern in _COUNTS:
        match = re.fullmatch(pattern, text, re.IGNORECASE)
        if match and (part := _find(match["one"], option)) is not None:
            count = int(match["count"])
            if not 1 <= count <= MOST:
                raise UsageError(f"{option} is {text!r}: a number of GPUs is from 1 to {MOST}")
            return Part(part.row, count, part.note)
    if entry := _elsewhere(text):
        alone = "quant recommend --gpu-memory SIZE without --gpu plans by the memory alone; "
        raise UsageError(
            f"{option} is {text!r}: {entry['why']}. {alone if entry.get('by_memory', True) else ''}"
            "`quant detect --gpu list` shows the parts that are known"
        )
    near = _nearest(text)
    offered = f"; nearest: {', '.join(near)}. Give one of them" if near else ". Give the part nearest to it"
    raise UsageError(
        f"{option} is {text!r}: not in the table{offered}; `quant detect --gpu list` shows all, and quant "
        "recommend takes another memory for them with --gpu-memory"
    )


def _find(text: str, option: str) -> Part | None:
    """Of one part, without a number before or behind it."""
    exact, name = named_row(text), _Name.of(text)
    if exact is not None and plain(exact["name"]) == plain(text):
        return Part(exact)
    fitting = [r for r in rows() if name.words and _fits(r, name.words)]
    of_size = [r for r in fitting if _has(r, name.memory)]
    if not fitting and name.memory is None:  # a bare number behind the name may be its memory
        last = text.replace("-", " ").replace(":", " ").split()[-1:]
        words = name.words - set(last)
        if words and last and last[0].isdigit():
            of_size = [r for r in rows() if _fits(r, words) and _has(r, float(last[0]))]
    if exact is not None and exact not in of_size:  # a driver's name whose number is not the GPU's memory
        return Part(exact)
    if fitting and not of_size:
        sizes = ", ".join(f"{r['name']} {r['memory_gib']} GB" for r in fitting)
        raise UsageError(
            f"{option} is {text!r}: the table has no such part of {name.memory:g} GB, but {sizes}. Give one "
            f"of them; of a card that was changed, quant recommend takes --gpu-memory {name.memory:g}GiB"
        )
    if not of_size:
        return None
    taken = exact or min(of_size, key=lambda r: r["memory_gib"])
    others = [r["name"] for r in of_size if r is not taken]
    note = f"{option} {text} is taken as {taken['name']}; it may also mean {any_of(others)}" if others else ""
    return Part(taken, None, note)


def _elsewhere(text: str) -> Mapping[str, Any] | None:
    """Why a part that people have cannot be planned (``why``), and whether its memory can (``by_memory``);
    None of a name that the table does not know either."""
    words = re.sub(r"^\d+\s*[x×*]|[_\-:/,()+]", " ", text.lower())
    words = _BRAND.sub(r"\1 ", _SUFFIX.sub(r" \g<0>", words))
    for entry in load_json("gpus.json")["elsewhere"]:
        if re.search(entry["pattern"], words):
            return dict(entry)
    return None


def _nearest(text: str) -> list[str]:
    """The names that are most like one: those with its number first (of ``V100S`` the V100's, of ``RTX PRO
    4000`` the RTX 4000 Ada's), then by spelling."""
    import difflib

    def bare(name: str) -> str:
        """The words that tell parts apart, without brand and memory."""
        words = _Name.of(name).words
        return " ".join(sorted(words - _OPTIONAL) or sorted(words))

    def number(name: str) -> set[str]:
        return set(re.findall(r"\d{2,}", bare(name)))

    near: dict[str, list[str]] = {}
    for row in rows():
        near.setdefault(bare(row["name"]), []).append(row["name"])
    wanted = bare(text)
    same = [n for n in near if number(text) and number(n) == number(text)]
    alike = difflib.get_close_matches(wanted, list(near), n=8, cutoff=0.6)
    alike.sort(key=lambda n: re.sub(r"\d", "0", n) != re.sub(r"\d", "0", wanted))
    ranked = sorted(same, key=lambda n: -difflib.SequenceMatcher(None, n, wanted).ratio())
    return [name for n in dict.fromkeys([*ranked, *alike]) for name in near[n]][:4]
