"""Sizes, durations and ranges of numbers as people write and read them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quant.errors import UsageError

MIB, GIB = 2**20, 2**30
_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": MIB, "GIB": GIB, "TIB": 2**40,
}  # fmt: skip

#: Larger than any memory or disk that will be met: a value beyond it is a typing error.
LARGEST = 2**60


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes from ``"80GiB"``, ``"512 MB"`` or a plain number of bytes.

    >>> parse_size("1.5 GiB")
    1610612736

    Raises:
        UsageError: not a size, negative, or larger than 1 EiB.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(
            f"{what} is {str(text)!r}: give bytes or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB, "
            "such as 48GiB"
        )
    value = float(match[1]) * _UNITS[match[2].upper()]
    if not math.isfinite(value) or value > LARGEST:
        raise UsageError(f"{what} is {str(text)!r}: more than 1 EiB, no machine has that; check the unit")
    return int(value)


class Tokens(int):
    """A number of tokens that was written with a k or M, which people mean in thousands as well as in 1024s.

    ``Tokens(131072)`` of ``128k`` has the ``least`` 128,000.
    """

    least: int


def parse_tokens(text: str | int, what: str = "tokens") -> Tokens:
    """A number of tokens from ``"32768"``, ``"32k"`` (of 1024) or ``"1M"`` (of 1024²).

    >>> parse_tokens("32k"), parse_tokens("1M"), parse_tokens("8_192")
    (32768, 1048576, 8192)

    Raises:
        UsageError: not a whole number of tokens.
    """
    match = re.fullmatch(r"\s*(-?\d[\d_,]*(?:\.\d+)?)\s*([kKmM]?)\s*", str(text))
    number = float(re.sub("[_,]", "", match[1])) if match else 0.5
    power = {"": 0, "k": 1, "m": 2}[match[2].lower()] if match else 0
    if not number * 1024**power == round(number * 1024**power):
        raise UsageError(
            f"{what} is {str(text)!r}: give a whole number of tokens, or one with k or M, such as 32k"
        )
    tokens = Tokens(number * 1024**power)
    tokens.least = int(number * 1000**power)
    return tokens


def meant_tokens(tokens: int, longest: int | None) -> int:
    """A number of tokens, or the longest context of a model where that is what was meant.

    >>> meant_tokens(parse_tokens("128k"), 128000), meant_tokens(parse_tokens("128k"), 40960)
    (128000, 131072)
    """
    if isinstance(tokens, Tokens) and longest is not None and tokens.least <= longest < tokens:
        return longest
    return int(tokens)


def format_size(count: float) -> str:
    """Binary units, three significant digits.

    >>> format_size(1610612736)
    '1.50 GiB'
    """
    sign, size = ("-", -count) if count < 0 else ("", count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return (
                f"{sign}{size:.0f} {unit}"
                if unit == "B"
                else f"{sign}{size:.{2 if size < 10 else 1 if size < 100 else 0}f} {unit}"
            )
        size /= 1024
    raise AssertionError


def format_count(count: float) -> str:
    """Decimal units, as parameters are counted.

    >>> format_count(7_615_616_512), format_count(4_196_608)
    ('7.62 B', '4.20 M')
    """
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def format_requests(count: float) -> str:
    """
    >>> format_requests(1.46), format_requests(6600.78)
    ('1.5', '6,600')
    """
    return f"{count:.1f}" if count < 100 else f"{math.floor(count):,}"


def format_share(share: float) -> str:
    """A share in percent with two decimals, or two digits where these would not show it.

    >>> format_share(0.0074), format_share(0.0000421), format_share(0.0), format_share(1e-9)
    ('0.74%', '0.0042%', '0.00%', '0.00%')
    """
    percent = 100 * share
    return f"{percent:.2f}%" if percent >= 0.05 or percent < 1e-4 else f"{percent:.2g}%"


def mean_and_error(value: Mapping[str, Any] | None, form: str) -> str:
    """``mean`` ± ``standard_error``, as far as they are known; ``form``: ``.5f`` or ``.2%``, more decimals
    where the error has no digit in those.

    >>> mean_and_error({"mean": 0.0034, "standard_error": 0.00006}, ".5f")
    '0.00340 ± 0.00006'
    >>> mean_and_error({"mean": 0.00023, "standard_error": 0.0000042}, ".5f")
    '0.000230 ± 0.000004'
    """
    if value is None:
        return "-"
    mean, error, digits, kind = value["mean"], value.get("standard_error"), int(form[1:-1]), form[-1]
    if not isinstance(error, (int, float)) or not math.isfinite(error):
        return f"{mean:{form}}"
    shown = error * (100 if kind == "%" else 1)
    if 0 < shown < 10.0**-digits:
        digits = min(-math.floor(math.log10(shown)), digits + 4)
    return f"{mean:.{digits}{kind}} ± {error:.{digits}{kind}}"


def two_digits(value: float, least: int) -> str:
    """A number with ``least`` decimals, and more where those would show less than two of its digits.

    >>> two_digits(1.23456, 3), two_digits(0.000072, 3), two_digits(0.0, 3)
    ('1.235', '0.000072', '0.000')
    """
    if not value or not math.isfinite(value):
        return f"{value:.{least}f}"
    return f"{value:.{max(least, 1 - math.floor(math.log10(abs(value))))}f}"


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as a line: runs as their ends.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def numbers(line: str) -> tuple[int, ...]:
    """The numbers of such a line.

    >>> numbers("0-2,5,7-8")
    (0, 1, 2, 5, 7, 8)

    Raises:
        ValueError: something else, which the message shows.
    """
    found: list[int] = []
    for part in line.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 16:
            raise ValueError(f"{part.strip()!r} is no number")
        end = int(last) if dash else int(first)
        if not int(first) <= end <= int(first) + 1_000_000:
            raise ValueError(f"{part.strip()} is no range")
        found += range(int(first), end + 1)
    return tuple(found)


def format_seconds(seconds: float) -> str:
    """
    >>> format_seconds(7.25), format_seconds(75), format_seconds(3700)
    ('7.2 s', '1 min 15 s', '1 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
