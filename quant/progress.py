"""How a long job tells where it is. The library calls a function with :class:`Event`; who listens decides
what to draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """``done`` of ``total`` units of ``phase``; ``message`` is a finished line worth keeping, ``warning`` one
    that must be seen; ``detail`` is what is worked on now, such as a linear's name."""

    phase: str
    done: float = 0
    total: float = 0
    message: str = ""
    warning: bool = False
    detail: str = ""


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listens to nothing."""
