"""Which linears a job quantizes: all of the decoder, those of ``--layers``, less those of ``--ignore``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from quant.errors import UsageError
from quant.models.adapter import block_of


def blocks_of(spec: str, count: int) -> set[int] | None:
    """Block indices of ``0,1,2``, ``0-3,7``, ``first:2`` or ``last:2``; None when the spec is a glob over module names.

    >>> sorted(blocks_of("0-2,5", 6))
    [0, 1, 2, 5]

    Raises:
        UsageError: an index beyond the last block, a range that runs backwards, first:0.
    """
    ends = re.fullmatch(r"(first|last):(\d+)", spec)
    if ends:
        size = int(ends[2])
        if not 1 <= size <= count:
            raise UsageError(f"--layers is {spec!r}: the model has {count} blocks, give 1 to {count}")
        return set(range(size)) if ends[1] == "first" else set(range(count - size, count))
    if not re.fullmatch(r"\s*\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*\s*", spec):
        return None
    chosen: set[int] = set()
    for part in spec.split(","):
        low, _, high = part.strip().partition("-")
        first, last = int(low), int(high or low)
        if first > last:
            raise UsageError(f"--layers has the range {part.strip()!r}, which runs backwards")
        if last >= count:
            raise UsageError(f"--layers names block {last}: the model has {count} blocks, 0 to {count - 1}")
        chosen |= set(range(first, last + 1))
    return chosen


def select(linears: Sequence[str], layers: str | None, ignore: Sequence[str], blocks: int) -> list[str]:
    """The linears to quantize.

    Args:
        linears: module names of all linears of the decoder's blocks.
        layers: a spec of :func:`blocks_of` or globs over module names separated by commas; None for all.
        ignore: globs over module names, or ``re:`` followed by a regular expression that must match from the start.
        blocks: number of decoder blocks.

    Raises:
        UsageError: a spec or pattern that selects nothing, an invalid regular expression.
    """
    chosen = list(linears)
    if layers is not None:
        wanted = blocks_of(layers, blocks)
        if wanted is not None:
            chosen = [n for n in chosen if block_of(n + ".") in wanted]
        else:
            chosen = []
            for glob in (g.strip() for g in layers.split(",")):
                found = [n for n in linears if _glob(n, glob)]
                if not found:
                    raise UsageError(f"--layers {glob!r} matches no linear of the model: names look like {linears[0]!r}")
                chosen += [n for n in found if n not in chosen]
            chosen.sort(key=linears.index)
    for pattern in ignore:
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise UsageError(f"--ignore {pattern!r}: not a regular expression: {error}") from error
            dropped = [n for n in linears if expression.match(n)]
        else:
            dropped = [n for n in linears if _glob(n, pattern)]
        if not dropped and pattern != "lm_head":
            raise UsageError(f"--ignore {pattern!r} matches no linear of the model: names look like {linears[0]!r}, such as '*.down_proj'")
        chosen = [n for n in chosen if n not in set(dropped)]
    if not chosen:
        raise UsageError("no linear is left to quantize: change --layers or --ignore")
    return chosen


def _glob(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
