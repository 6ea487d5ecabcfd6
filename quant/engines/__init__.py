"""The serving engines that a plan can be for: what each reads, on which hardware, and its words for what is
asked. No torch."""

from __future__ import annotations

from quant.engines.base import Engine, Flag, Reading, reading_problem
from quant.engines.table import ENGINES

__all__ = ["ENGINES", "Engine", "Flag", "Reading", "reading_problem"]
