"""Values of a config.json, checked as they are read: a wrong one is refused by its key, never met as a
traceback."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from quant.errors import UsageError, clipped
from quant.vllm.config import KEYS, parts, stated

#: A dimension beyond this is a typing error in the config, not a model; so are more layers than the second.
LARGEST_DIMENSION, LARGEST_DEPTH = 2**31, 2**14
_LARGEST = sys.float_info.max


class Values:
    """One part of a config.json, or several of which the first that states a key holds.

    Args:
        where: what is read, in the words of an error.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self._config, self.where = config, where

    def get(self, key: str, default: Any = None) -> Any:
        """What the config states of ``key``, under any of its names, whatever it is."""
        value = stated(self._config, key)
        return default if value is None else value

    def named(self, starts: tuple[str, ...]) -> list[str]:
        """Keys of the config's parts that begin so and state something."""
        return sorted({k for p in parts(self._config) for k, v in p.items() if k.startswith(starts) and v})

    def count(
        self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST_DIMENSION
    ) -> int:
        """A whole number from ``least`` to ``most``.

        Raises:
            UsageError: the key is missing and has no default, or its value is not a possible size.
        """
        value = self.get(key, default)
        if value is None:
            names = " or ".join(KEYS.get(key, (key,)))
            raise UsageError(f"{self.where} lacks {names}: it is needed to plan; give a complete config.json")
        if not (is_number(value) and value == int(value) and least <= value <= most):
            raise self._wrong(key, value, f"a whole number from {least} to {most:,}")
        return int(value)

    def number(self, key: str, default: float) -> float:
        """A finite number above 0.

        Raises:
            UsageError: it is not one.
        """
        value = self.get(key, default)
        if not (is_number(value) and value > 0):
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def text(self, key: str) -> str:
        """A word; empty where nothing is stated.

        Raises:
            UsageError: it is not one.
        """
        value = self.get(key, "")
        if not isinstance(value, str):
            raise self._wrong(key, value, "a word")
        return value

    def items(self, key: str) -> Sequence[Any]:
        """A list; empty where nothing is stated.

        Raises:
            UsageError: it is not one.
        """
        value = self.get(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list")
        return value

    def part(self, key: str) -> Values:
        """The values of an object inside; empty where nothing is stated.

        Raises:
            UsageError: it is not one.
        """
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return Values(value, f"{self.where}: {key}")

    def _wrong(self, key: str, value: Any, rule: str) -> UsageError:
        return UsageError(f"{self.where}: {key} is {clipped(value)}: must be {rule}; repair config.json")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that floats reach."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
