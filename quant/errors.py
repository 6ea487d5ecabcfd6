"""Errors a user can act on.

Each message names the thing, the value, the rule it broke and the next step. The command layer prints the
message without a traceback and exits with ``exit_code``; library callers catch :class:`QuantError`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence


class QuantError(Exception):
    """Something that the user can mend. Exit status 1. ``retryable``: the same request may succeed later with
    nothing mended."""

    exit_code = 1
    retryable = False


class UsageError(QuantError):
    """The request itself is wrong: an unknown name, a contradictory pair of options. Exit status 2."""

    exit_code = 2


class NoGradients(QuantError):
    """No gradients go through a model that a method needs; ``problem``: why."""

    def __init__(self, problem: str, method: str):
        super().__init__(f"{problem}: --method {method} needs gradients: use --method gptq")
        self.problem = problem


class NothingFits(QuantError):
    """No plan fits the GPU. Exit status 3."""

    exit_code = 3


class VerificationFailed(QuantError):
    """The checkpoint, the endpoint or the quality is not what was promised. Exit status 4."""

    exit_code = 4


class CheckpointError(QuantError):
    """A checkpoint directory that cannot be read as it claims to be."""


class SourceFault(CheckpointError):
    """What a job found in its source on the way: the same command would end there again, so that nothing of
    its work is kept."""


class NotFinite(SourceFault):
    """A tensor of a source that holds NaN or infinity."""

    def __init__(self, file: object, tensor: str):
        super().__init__(
            f"{file}: {tensor} holds NaN or infinity: the source is damaged, fetch it again; quant verify "
            "lists every such tensor"
        )


class DiskFull(QuantError):
    """The disk has no room for what is about to be written."""

    retryable = True


class DeviceMemoryExhausted(QuantError):
    """A GPU has no memory left, of which other programs may hold some."""

    retryable = True


class RankLost(QuantError):
    """A process among those that share a job has ended or says nothing. Exit status 75: run the same command
    again. ``ended``: which one, where that is known."""

    exit_code = 75
    retryable = True

    def __init__(self, rank: int, size: int, ended: str = ""):
        super().__init__(
            f"{ended or f'rank {rank} of {size} has lost the others'}: finished work is kept, the same "
            "command goes on from there, with as many ranks or with others"
        )
        self.rank, self.size = rank, size


class InUse(QuantError):
    """Another run is at work on the same output."""

    retryable = True


class Problems(QuantError):
    """Everything that is wrong with a job, listed together before any work starts.

    >>> print(Problems(["a is 3: must be even", "b is missing"]))
    2 problems:
      1. a is 3: must be even
      2. b is missing
    """

    def __init__(self, problems: Sequence[str], exit_code: int = 1):
        self.problems = tuple(problems)
        self.exit_code = exit_code
        lines = [f"{i}. {p}" for i, p in enumerate(self.problems, 1)]
        super().__init__(
            self.problems[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines])
        )


def clipped(value: object, most: int = 100) -> str:
    """A value as a message shows it: its beginning, never the whole of a long or endlessly nested one.

    >>> clipped("x" * 1000, 10)
    "'xxxx…"
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxstring, short.maxlong, short.maxother = (
        3,
        6,
        4 * most,
        60,
        4 * most,
    )
    shown = short.repr(value)
    return shown if len(shown) <= most else shown[: most // 2] + "…"


def first_line(error: BaseException, most: int = 300) -> str:
    """What a foreign error says first, or what it is where it says nothing.

    >>> first_line(ValueError("1 mistake:\\n  a is no number")), first_line(KeyError())
    ('1 mistake: a is no number', 'KeyError')
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # a heading: what is wrong comes below it
        lines = [" ".join(lines)]
    return (lines[0] if lines else type(error).__name__)[:most]


def any_of(names: Sequence[str]) -> str:
    """
    >>> any_of(["a"]), any_of(["a", "b", "c"])
    ('a', 'a, b or c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def one_of(what: str, value: object, allowed: Sequence[str]) -> UsageError:
    """The error for a name that is not in a list, with the nearest names first.

    >>> str(one_of("--method", "gtpq", ["gptq", "minmax"]))
    "--method is 'gtpq': did you mean 'gptq'? Known: gptq, minmax"
    """
    import difflib

    near = difflib.get_close_matches(str(value)[:100], allowed, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return UsageError(f"{what} is {clipped(str(value))}: {hint}Known: {', '.join(allowed)}")
