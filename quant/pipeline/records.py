"""What a job notes down while it runs: seconds by phase, and what became of each linear."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quant.errors import QuantError
from quant.pipeline.plan import JobPlan
from quant.progress import Event, Progress
from quant.quantizers import Quantized
from quant.quantizers.rounding import small_scales
from quant.report.value import NOT_CALIBRATED, NOT_HELD_OUT, FoldResult, LayerResult, without_numbers


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


@dataclass
class Records:
    """What the report says of each linear and each fold. ``layers`` are by the linear's name, ``folds`` by
    those that share the folded input."""

    plan: JobPlan
    progress: Progress
    layers: dict[str, LayerResult] = field(default_factory=dict)
    folds: dict[str, FoldResult] = field(default_factory=dict)
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def add(
        self,
        name: str,
        result: Quantized,
        noise: float,
        signal: float,
        error: float | None,
        tokens: int,
        seconds: float,
        missing: str = NOT_HELD_OUT,
    ) -> None:
        """Notes what a linear became.

        Args:
            noise, signal: energy of what rounding changed, and of the weight.
            error: relative output error on held-out text, or None.
            tokens: those that its statistics are of.
            missing: why there is no error where there are tokens.
        """
        self.layers[name] = LayerResult(
            name=name,
            method=self.plan.assignments[name].method,
            scheme=str(self.plan.linears[name].scheme),
            error=error,
            error_missing=None if error is not None else missing if tokens else NOT_CALIBRATED,
            snr_db=round(10 * float(torch.log10(torch.tensor(signal / max(noise, 1e-30)))), 2)
            if signal
            else None,
            tokens=tokens,
            seconds=round(seconds, 3),
            fallback="; ".join(result.fallbacks) or None,
            notes=(*result.notes, *_small(result)),
        )
        self.progress(Event("quantize", detail=name))
        for fallback in result.fallbacks:
            if (kind := without_numbers(fallback)) not in self._told:  # the last lines name all
                self._told.add(kind)
                self.progress(Event("quantize", message=f"{name}: {fallback}", warning=True))

    def of(self, unit: str, names: Collection[str]) -> dict[str, Any]:
        """What the journal keeps of a unit with these linears."""
        for name in names:
            self.layers[name] = replace(self.layers[name], unit=unit)
        folds = {k: f.to_dict() for k, f in self.folds.items() if set(f.linears) & set(names)}
        modules = {m: c for m, c in self.experts.items() if any(n.startswith(f"{m}.") for n in names)}
        return {
            "layers": {n: self.layers[n].to_dict() for n in names},
            "folds": folds,
            "experts": modules,
        }

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Takes back what :meth:`of` gave to an earlier run's journal.

        Raises:
            QuantError: it is damaged.
        """
        self.layers |= {n: LayerResult.from_dict(x) for n, x in entry["layers"].items()}
        for key, value in entry["folds"].items():
            fold = FoldResult.from_dict(value)
            if fold is None:
                raise QuantError(
                    f"the journal of unfinished work does not say how {key} was scaled: it is damaged, use "
                    "--fresh to start over"
                )
            self.folds[key] = fold
        self.experts |= entry["experts"]


def _small(result: Quantized) -> tuple[str, ...]:
    """What to say of scales that their dtype holds with fewer digits than others."""
    count, share = small_scales(result.tensor.scales)
    if not count:
        return ()
    return (
        f"{count} of {result.tensor.scales.numel()} scales lie below 6.1e-05, the smallest normal number of "
        f"fp16, and are rounded by up to {min(share, 1.0):.1%}: a config.json that states bfloat16 gives "
        "them all their digits",
    )
