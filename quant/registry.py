"""One small registry class behind the three names of the design: models, quantizers, outlier suppressors (and formats).

An entry is a row added by the project itself, or one that another package declares as an entry point, so that an algorithm can be
added without touching this repository::

    [project.entry-points."quant.quantizers"]
    mine = "my_package:MyQuantizer"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from quant.errors import UsageError, one_of

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to things, with the names listed when an unknown one is asked for.

    >>> colours: Registry[int] = Registry("colour", "quant.example")
    >>> colours.add("red", 1)
    1
    >>> colours.get("red")
    1
    """

    def __init__(self, what: str, group: str):
        self.what, self.group = what, group
        self._entries: dict[str, T] = {}
        self._foreign: set[str] | None = None

    def add(self, name: str, entry: T) -> T:
        """Adds one entry. A name that is taken is refused: two packages must not silently shadow one another."""
        if name in self._entries:
            raise UsageError(f"{self.what} {name!r} is already registered: two packages offer it, uninstall one or rename it")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""
        return lambda entry: self.add(name, entry)

    def _load_foreign(self) -> None:
        if self._foreign is None:
            self._foreign = set()
            for point in entry_points(group=self.group):
                if point.name not in self._entries:
                    self.add(point.name, point.load())
                    self._foreign.add(point.name)

    def names(self) -> list[str]:
        self._load_foreign()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UsageError: no such name; the message lists the known ones.
        """
        if name not in self._entries:
            self._load_foreign()
        if name not in self._entries:
            raise one_of(self.what, name, self.names())
        return self._entries[name]

    def __iter__(self) -> Iterator[T]:
        self._load_foreign()
        return iter(self._entries.values())

    def __contains__(self, name: str) -> bool:
        self._load_foreign()
        return name in self._entries
