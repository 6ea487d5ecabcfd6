"""What the traces of a load test say: latencies, throughput and goodput as vLLM's ``bench serve`` defines
them, with the uncertainty of each. Pure functions of numbers.

Definitions (vLLM's own, ``vllm/benchmarks/serve.py``): TTFT is from sending to the first token; TPOT
(E2E - TTFT) / (n - 1) of each request with n > 1 output tokens; ITL the time between two pieces of an answer;
E2EL from sending to the last token; throughputs are totals over the time from the first request's start to
the last one's end. Here "sending" is the moment a request was scheduled for.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant.errors import UsageError
from quant.serving.client import Trace
from quant.units import parse_tokens

PERCENTILES = (50, 90, 95, 99)
#: Level of every interval that is given.
CONFIDENCE = 0.95
#: Metric → what it is, printed under the table.
FORMULAS = {
    "TTFT": "first token - scheduled send",
    "TPOT": "(last token - first token) / (output tokens - 1)",
    "ITL": "time between two pieces of one answer",
    "E2EL": "last token - scheduled send",
    "output tok/s": "output tokens of completed requests / (last end - first start)",
    "goodput": "requests per second that kept every stated limit",
}
#: Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond them the normal's.
_STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
            10: 2.228, 15: 2.131, 20: 2.086, 30: 2.042}  # fmt: skip


def student(degrees: int) -> float:
    """The factor of a 95 % interval of a mean with that many degrees of freedom, rounded up.

    >>> student(9), student(1000)
    (2.262, 2.042)
    """
    return _STUDENT[max(k for k in _STUDENT if k <= max(degrees, 1))]


def percentile_interval(n: int, percent: float) -> tuple[int, int] | None:
    """Ranks (from 0) of the ordered values that enclose a percentile with 95 % confidence, whatever their
    distribution: the binomial's bounds. None where ``n`` values are too few for it.

    >>> percentile_interval(100, 50), percentile_interval(100, 99)
    ((39, 60), None)
    """
    share = percent / 100
    # P(fewer than r values lie below the percentile); logarithms, for n may be large
    total, lower, upper = 0.0, None, None
    for k in range(n + 1):
        log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(log + k * math.log(share) + (n - k) * math.log1p(-share))
        if total <= (1 - CONFIDENCE) / 2:
            lower = k
        if upper is None and total >= 1 - (1 - CONFIDENCE) / 2:
            upper = k
            break
    if lower is None or upper is None or upper >= n:
        return None
    return lower, upper


@dataclass(frozen=True)
class Distribution:
    """Values in milliseconds, ordered."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution:
        return cls(tuple(sorted(1000 * s for s in seconds)))

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        return float(np.std(self.values)) if self.values else math.nan

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.values, percent)) if self.values else math.nan

    def interval(self, percent: float) -> tuple[float, float] | None:
        """The percentile's 95 % confidence interval; None where the values are too few."""
        ranks = percentile_interval(len(self.values), percent) if self.values else None
        return None if ranks is None else (self.values[ranks[0]], self.values[ranks[1]])

    def mean_interval(self) -> tuple[float, float] | None:
        n = len(self.values)
        if n < 2:
            return None
        half = student(n - 1) * self.deviation * math.sqrt(n / (n - 1)) / math.sqrt(n)
        return self.mean - half, self.mean + half

    def to_dict(self, name: str) -> dict[str, Any]:
        """Keys of ``vllm bench serve``, and under ``…_ci95`` the intervals."""
        keys: dict[str, Any] = {
            f"mean_{name}_ms": self.mean,
            f"std_{name}_ms": self.deviation,
            f"median_{name}_ms": self.percentile(50),
        }
        for p in PERCENTILES:
            keys[f"p{p}_{name}_ms"] = self.percentile(p)
        keys[f"{name}_ci95"] = {
            "mean": self.mean_interval(),
            **{f"p{p}": self.interval(p) for p in PERCENTILES},
        }
        return keys


def parse_limits(text: str) -> dict[str, float]:
    """Limits of goodput in milliseconds, as ``ttft:500,tpot:50``.

    >>> parse_limits("ttft:500,e2el:2000")
    {'ttft': 500.0, 'e2el': 2000.0}

    Raises:
        UsageError: another metric, or a limit that is no positive number.
    """
    limits = {}
    for part in text.split(","):
        name, _, value = part.strip().partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in ("ttft", "tpot", "e2el") or not 0 < limit < math.inf:
            raise UsageError(
                f"--goodput is {text!r}: give limits in milliseconds such as ttft:500,tpot:50,e2el:5000"
            )
        limits[name] = limit
    return limits


@dataclass(frozen=True)
class Summary:
    """A run's traces, summed up; all that failed are counted by kind and in no latency."""

    traces: tuple[Trace, ...]
    limits: Mapping[str, float]
    begun: float
    ended: float

    @classmethod
    def of(cls, traces: Sequence[Trace], limits: Mapping[str, float] | None = None) -> Summary:
        """
        Args:
            limits: of goodput, milliseconds by metric.
        """
        begun = min((t.scheduled for t in traces), default=0.0)
        return cls(tuple(traces), limits or {}, begun, max((t.ended for t in traces), default=0.0))

    @property
    def good(self) -> tuple[Trace, ...]:
        return tuple(t for t in self.traces if not t.error)

    @property
    def seconds(self) -> float:
        return max(self.ended - self.begun, 1e-9)

    @property
    def output_throughput(self) -> float:
        """Output tokens a second."""
        return sum(t.output_tokens for t in self.good) / self.seconds

    @property
    def held_back(self) -> bool:
        """Whether most answers came whole: something on the way holds the stream back, and no time within an
        answer is the server's."""
        return mostly_whole(sum(t.whole for t in self.good), len(self.good))

    @property
    def errors(self) -> dict[str, int]:
        return dict(Counter(t.error for t in self.traces if t.error).most_common())

    def kept(self, trace: Trace) -> bool:
        """Whether a completed request kept every limit; one token has no TPOT to break it with."""
        values = {"ttft": trace.ttft, "tpot": trace.tpot or 0.0, "e2el": trace.e2el}
        return all(1000 * values[name] <= limit for name, limit in self.limits.items())

    @property
    def goodput(self) -> float | None:
        """Requests a second that kept the limits; None without limits."""
        return sum(map(self.kept, self.good)) / self.seconds if self.limits else None

    def distributions(self) -> dict[str, Distribution]:
        good = self.good
        return {
            "ttft": Distribution.of([t.ttft for t in good]),
            "tpot": Distribution.of([t.tpot for t in good if t.tpot is not None]),
            "itl": Distribution.of([gap for t in good for gap in t.itl]),
            "e2el": Distribution.of([t.e2el for t in good]),
        }

    def throughput_interval(self, windows: int = 10) -> tuple[float, float] | None:
        """The 95 % interval of the output throughput, from the middle windows of equal length, in which the
        load neither starts nor drains (batch means)."""
        stamps = np.array([s for t in self.good for s in t.stamps])
        if self.seconds < 1 or len(stamps) < 10 * windows:
            return None
        per_stamp = sum(t.output_tokens for t in self.good) / len(stamps)
        counts, _ = np.histogram(stamps, bins=windows, range=(self.begun, self.ended))
        rates = counts[1:-1] * per_stamp / (self.seconds / windows)
        half = student(len(rates) - 1) * float(np.std(rates, ddof=1)) / math.sqrt(len(rates))
        return float(np.mean(rates)) - half, float(np.mean(rates)) + half

    def to_dict(self) -> dict[str, Any]:
        """Keys and definitions of ``vllm bench serve``'s result, with intervals and errors by kind beside."""
        good = self.good
        prompt, output = sum(t.prompt_tokens for t in good), sum(t.output_tokens for t in good)
        tokens_by_second, most_at_once = peaks(good)
        value: dict[str, Any] = {
            "duration": self.seconds,
            "num_prompts": len(self.traces),
            "completed": len(good),
            "failed": len(self.traces) - len(good),
            "errors": self.errors,
            "total_input_tokens": prompt,
            "total_output_tokens": output,
            "request_throughput": len(good) / self.seconds,
            "request_goodput": self.goodput,
            "goodput_limits_ms": dict(self.limits),
            "output_throughput": self.output_throughput,
            "output_throughput_ci95": self.throughput_interval(),
            "total_token_throughput": (prompt + output) / self.seconds,
            "max_output_tokens_per_s": tokens_by_second,
            "max_concurrent_requests": most_at_once,
            "came_whole": sum(t.whole for t in good),
            "output_tokens_counted_by_endpoint": all(t.counted for t in good) if good else None,
        }
        for name, values in self.distributions().items():
            value |= values.to_dict(name)
        return value


def mostly_whole(whole: int, completed: int) -> bool:
    """Whether more than half of some answers came whole.

    >>> mostly_whole(6, 12), mostly_whole(7, 12), mostly_whole(0, 0)
    (False, True, False)
    """
    return whole > completed / 2


def peaks(traces: Sequence[Trace]) -> tuple[float, int]:
    """The most pieces of answers in one second, and the most requests at one time."""
    if not traces:
        return 0.0, 0
    begun = min(t.scheduled for t in traces)
    by_second = Counter(int(s - begun) for t in traces for s in t.stamps)
    changes = sorted([(t.sent, 1) for t in traces] + [(t.ended, -1) for t in traces])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return float(max(by_second.values())), most


def knee(levels: Sequence[tuple[float, float]]) -> int | None:
    """Which of some load levels gives the most throughput for its latency: the largest quotient of the two
    (Kleinrock 1979, "Power and deterministic rules of thumb"). None where no level completed anything.

    Args:
        levels: throughput and mean latency of each; NaN where nothing was completed.

    >>> knee([(10, 1.0), (19, 1.1), (21, 4.0)])
    1
    """
    power = [t / latency if latency > 0 else 0.0 for t, latency in levels]
    power = [p if math.isfinite(p) else 0.0 for p in power]
    return max(range(len(power)), key=power.__getitem__) if any(power) else None


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: fixed, uniform between two, or log-normal around a median."""

    kind: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str, what: str) -> Lengths:
        """``512``, ``128-1024`` or ``lognormal:512:0.5`` (median, sigma of the logarithm).

        >>> Lengths.parse("128-1024", "--input-tokens")
        Lengths(kind='uniform', low=128.0, high=1024.0)

        Raises:
            UsageError: none of these, or no positive lengths.
        """
        try:
            if text.startswith("lognormal:"):
                _, median, sigma = text.split(":")
                made = cls("lognormal", float(parse_tokens(median)), float(sigma))
            else:
                first, _, last = text.partition("-")
                low, high = parse_tokens(first), parse_tokens(last or first)
                made = cls("uniform" if last else "fixed", float(low), float(high))
        except (ValueError, UsageError):
            made = cls("", 0, 0)
        sound = 1 <= made.low <= 1e7 and made.high <= 1e7
        if not sound or (made.kind != "lognormal" and made.high < made.low) or made.high <= 0:
            raise UsageError(
                f"{what} is {text!r}: give tokens as 512, a range as 128-1024, or lognormal:512:0.5 "
                "(median and sigma)"
            )
        return made

    def draw(self, generator: random.Random) -> int:
        if self.kind == "lognormal":
            return max(1, min(round(generator.lognormvariate(math.log(self.low), self.high)), 10_000_000))
        return generator.randint(int(self.low), int(self.high))
