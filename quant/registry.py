"""One small registry class behind five names: models, quantizers, outlier suppressors, formats and schemes.

An entry is a row added by the project itself, or one that another package declares as an entry point, so that
an algorithm can be added without touching this repository::

    [project.entry-points."quant.quantizers"]
    mine = "my_package:MyQuantizer"

A package is imported when a name of its is asked for, and what is wrong with it is said then: one that is
broken stands in nobody else's way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from quant.errors import UsageError, one_of

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Registry(Generic[T]):
    """Names to things, with the names listed when an unknown one is asked for.

    Args:
        what: an entry, in the words of an error.
        group: the entry points that other packages declare theirs under.
        wrong: why something is no entry, or None; asked of foreign ones only.
        defaults: attributes that a foreign class may leave out, with what they then are; ``name`` is then the
            entry point's.
        also: words that stand for an entry where one is asked for by a user; they are resolved before, and
            listed with the names here.
        named: whether an entry has a ``name`` of its own by which it is asked for later, so that it must be
            the one that it is declared under.

    >>> colours: Registry[int] = Registry("colour", "quant.example")
    >>> colours.add("red", 1)
    1
    >>> colours.get("red")
    1
    """

    def __init__(
        self,
        what: str,
        group: str,
        wrong: Callable[[Any], str | None] = lambda entry: None,
        defaults: Mapping[str, Any] | None = None,
        also: tuple[str, ...] = (),
        named: bool = False,
    ):
        self.what, self.group, self._also, self._named = what, group, also, named
        self._wrong, self._defaults = wrong, dict(defaults or {})
        self._entries: dict[str, T] = {}
        self._loaded: dict[str, T] = {}
        self._points: dict[str, list[EntryPoint]] | None = None
        self._skipped: set[str] = set()

    def add(self, name: str, entry: T) -> T:
        """Adds one entry. A name that is taken is refused: two packages must not silently shadow one
        another."""
        if name in self._entries:
            raise UsageError(
                f"{self.what} {name!r} is already registered: two packages offer it, uninstall one or "
                "rename it"
            )
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""
        return lambda entry: self.add(name, entry)

    def _declared(self) -> dict[str, list[EntryPoint]]:
        """By name, what other packages declare; nothing is imported."""
        if self._points is None:
            # only now: it takes a quarter of the time in which the program starts
            from importlib.metadata import entry_points

            self._points = {}
            for point in entry_points(group=self.group):
                self._points.setdefault(point.name, []).append(point)
        return self._points

    def _foreign(self, name: str) -> T:
        """The entry that a package declares under a name.

        Raises:
            UsageError: the name is taken, or the package cannot be imported, or what it declares is no entry.
        """
        if name in self._loaded:
            return self._loaded[name]
        points = self._declared()[name]
        packages = " and ".join(_package(p) for p in points)
        if name in self._entries:
            raise UsageError(
                f"{self.what} {name!r}: {packages} declares this name, which quant itself has: uninstall "
                f"{'it' if len(points) == 1 else 'them'}, "
                "or have it renamed there"
            )
        if len(points) > 1:
            raise UsageError(
                f"{self.what} {name!r}: {packages} both declare this name: uninstall all but one"
            )
        (point,) = points
        try:
            entry = point.load()
        except Exception as error:  # whatever a foreign module does while it is imported
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UsageError(
                f"{self.what} {name!r}: {point.value} of {packages} cannot be loaded ({reason}): repair or "
                "update that package, or uninstall it"
            ) from error
        fault = self._wrong(entry)
        if fault is None and self._named and entry.name != name:
            fault = f"it calls itself {entry.name!r}"
        if fault:
            raise UsageError(
                f"{self.what} {name!r}: {point.value} of {packages} is none: {fault}: "
                "docs/extension_guide.md says what one has; "
                "update that package, or uninstall it"
            )
        for attribute, value in ({"name": name} | self._defaults).items() if isinstance(entry, type) else ():
            if not hasattr(entry, attribute):
                setattr(entry, attribute, value)
        self._loaded[name] = entry
        return entry

    def names(self) -> list[str]:
        return sorted({*self._entries, *self._declared()})

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UsageError: no such name, and the message lists the known ones; or another package declares it and
                is at fault.
        """
        if name in self._declared():
            return self._foreign(name)
        if name not in self._entries:
            raise one_of(self.what, name, sorted([*self.names(), *self._also]))
        return self._entries[name]

    def __iter__(self) -> Iterator[T]:
        """The project's own entries, then those of other packages; of these, one that cannot be had is left
        out with a warning in the log."""
        yield from self._entries.values()
        for name in self._declared():
            if name in self._entries:
                continue
            try:
                entry = self._foreign(name)
            except UsageError as error:
                if name not in self._skipped:
                    self._skipped.add(name)
                    _log.warning("left out: %s", error)
                continue
            yield entry

    def loaded(self) -> list[T]:
        """The project's own entries, and those of other packages that were asked for so far; nothing is
        imported."""
        return [*self._entries.values(), *self._loaded.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._declared()


def _package(point: EntryPoint) -> str:
    return (
        f"the package {point.dist.name} {point.dist.version}"
        if point.dist is not None
        else f"the package of {point.value}"
    )


def lacks(entry: Any, *attributes: str) -> str | None:
    """Says which of these attributes a thing lacks, or None; what every class has from ``type``
    (``__call__``) must be its own."""
    places = (
        [vars(c) for c in entry.__mro__]
        if isinstance(entry, type)
        else [vars(c) for c in type(entry).__mro__] + [getattr(entry, "__dict__", {})]
    )
    missing = [a for a in attributes if not any(a in p for p in places)]
    return f"it has no {' and no '.join(missing)}" if missing else None


def no_class(entry: Any, **sets: frozenset[str]) -> str | None:
    """Why something is no class of methods, or None: instances must be callable, and each named attribute a
    set of some of these words."""
    if not isinstance(entry, type):
        return f"it is not a class but {type(entry).__name__}"
    if missing := lacks(entry, *sets, "__call__"):
        return missing
    for name, allowed in sets.items():
        member = getattr(entry, name)
        if not isinstance(member, (set, frozenset)) or not member <= allowed:
            return f"{name} is {member!r}: a set of {', '.join(sorted(allowed))}, or an empty one"
    return None
