"""What a check finds, and the row that says which function finds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from quant.errors import QuantError

if TYPE_CHECKING:
    from quant.serving.check.context import Context

Status = Literal["PASS", "WARN", "FAIL", "SKIP"]
STATUSES: tuple[Status, ...] = ("PASS", "WARN", "FAIL", "SKIP")


@dataclass(frozen=True)
class Finding:
    """One line of the checklist.

    Attributes:
        name: what was looked at.
        value, threshold: what was measured, and what it is held against; None where there is no such number.
        detail: the same in words; of a SKIP the reason.
        todo: what to do about a WARN or FAIL.
        group: the part of the checklist that it belongs to; set by the walk.
    """

    name: str
    status: Status
    detail: str
    value: Any = None
    threshold: Any = None
    todo: str = ""
    group: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judged(
    name: str,
    passed: bool,
    detail: str,
    *,
    value: Any = None,
    threshold: Any = None,
    todo: str = "",
    otherwise: Status = "FAIL",
) -> Finding:
    """A finding that passed, or is ``otherwise``; what to do stands in the latter alone."""
    if passed:
        return Finding(name, "PASS", detail, value, threshold)
    return Finding(name, otherwise, detail, value, threshold, todo)


def skipped(name: str, reason: str, value: Any = None) -> Finding:
    return Finding(name, "SKIP", reason, value)


class Skip(Exception):
    """Cannot be measured; the text is the reason."""


class Unexpected(QuantError):
    """The endpoint did not answer, or not as it must: a FAIL."""


@dataclass(frozen=True)
class Check:
    """A row of a group.

    Attributes:
        name: of its finding where the function gives none because it skipped, failed or did not end.
        seconds: after which it is ended and has failed.
    """

    name: str
    run: Callable[[Context], Awaitable[Sequence[Finding]]]
    seconds: Callable[[Context], float]


def within(seconds: float) -> Callable[[Context], float]:
    """A bound that is the same for every profile."""
    return lambda context: seconds


@dataclass(frozen=True)
class CheckReport:
    """The whole checklist of one endpoint."""

    url: str
    model: str
    profile: Mapping[str, Any]
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        seen = Counter(f.status for f in self.findings)
        return {status: seen[status] for status in STATUSES}

    @property
    def passed(self) -> bool:
        return not self.counts["FAIL"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "counts": self.counts,
            "url": self.url,
            "model": self.model,
            "profile": dict(self.profile),
            **self.facts,
            "findings": [f.to_dict() for f in self.findings],
        }
