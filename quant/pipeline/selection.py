"""Which linears a job quantizes: all of the decoder, those of ``--layers``, less those of ``--ignore``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from quant.errors import UsageError, clipped
from quant.models.roles import block_of


def blocks_of(spec: str, count: int) -> set[int] | None:
    """Block indices of ``0,1,2``, ``0-3,7``, ``first:2`` or ``last:2``; None when the spec is a glob over
    module names.

    >>> sorted(blocks_of("0-2,5", 6))
    [0, 1, 2, 5]

    Raises:
        UsageError: an index beyond the last block, a range that runs backwards, first:0.
    """
    ends = re.fullmatch(r"(first|last):(\d{1,18})", spec)
    if ends:
        size = int(ends[2])
        if not 1 <= size <= count:
            raise UsageError(f"--layers is {spec!r}: the model has {count} blocks, give 1 to {count}")
        return set(range(size)) if ends[1] == "first" else set(range(count - size, count))
    if not re.fullmatch(r"\s*\d{1,18}(-\d{1,18})?(\s*,\s*\d{1,18}(-\d{1,18})?)*\s*", spec):
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
        ignore: globs over module names, or ``re:`` followed by a regular expression that must match from the
            start.
        blocks: number of decoder blocks.

    Raises:
        UsageError: a spec or pattern that selects nothing, an invalid regular expression; all of them.
    """
    chosen, problems = selected(linears, layers, ignore, blocks)
    if problems:
        raise UsageError("; ".join(problems))
    return chosen


def selected(
    linears: Sequence[str],
    layers: str | None,
    ignore: Sequence[str],
    blocks: int,
    others: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """:func:`select` that goes on after a mistake: what is left to quantize, and every mistake. ``others``:
    modules that are no linears, which patterns of ``ignore`` may name without being a mistake."""
    chosen, problems = list(linears), []
    if layers is not None:
        try:
            wanted = blocks_of(layers, blocks)
        except UsageError as error:
            return [], [str(error), *_ignored(linears, ignore, others)[1]]
        if wanted is not None:
            chosen = [n for n in chosen if block_of(n + ".") in wanted]
        else:
            chosen = []
            for glob in (g.strip() for g in layers.split(",")):
                matched = [n for n in linears if _glob(n, glob)]
                if not matched:
                    problems.append(
                        f"--layers {clipped(glob)} matches no linear of the model: names look like "
                        f"{linears[0]!r}"
                    )
                chosen += [n for n in matched if n not in chosen]
            chosen.sort(key=linears.index)
    dropped, wrong = _ignored(linears, ignore, others)
    problems += wrong
    chosen = [n for n in chosen if n not in dropped]
    if not chosen and not problems:
        problems.append("no linear is left to quantize: change --layers or --ignore")
    return chosen, problems


def _ignored(
    linears: Sequence[str], ignore: Sequence[str], others: Collection[str]
) -> tuple[set[str], list[str]]:
    """The linears that the patterns name, and the patterns that name none."""
    dropped: set[str] = set()
    problems = []
    for pattern in ignore:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            problems.append(f"--ignore {pattern!r}: not a regular expression: {error}")
            continue
        named = {n for n in linears if matches(n, pattern)}
        if not named and pattern != "lm_head" and not any(matches(n, pattern) for n in others):
            problems.append(
                f"--ignore {pattern!r} matches no linear of the model: names look like {linears[0]!r}, such "
                "as '*.down_proj'"
            )
        dropped |= named
    return dropped, problems


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of ``--ignore`` names a module; no pattern that is no regular expression names
    any."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error:
            return False
    return _glob(name, pattern)


def _glob(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
