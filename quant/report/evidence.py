"""Which layers of a quantized checkpoint lost most, by the two measures that its report holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: The report that ``quant quantize`` leaves in its output.
REPORT = "quant_report.json"
#: Why a layer has no relative output error.
NOT_CALIBRATED = "the job used no calibration text, so there is no input to measure it on"
NOT_HELD_OUT = "no calibration row was left to hold out"


def worst(layers: Sequence[Mapping[str, Any]], count: int = 5) -> dict[str, Any]:
    """The layers of largest relative output error and those of smallest signal-to-noise ratio of the weight,
    worst first.

    Args:
        layers: ``layers`` of a report: ``name``, ``error``, ``snr_db``, ``error_missing``.

    Returns:
        ``by_error`` and ``by_snr``: up to ``count`` of name, method, scheme, error and snr_db;
            ``error_missing``: why no layer has an error, or None.
    """

    def ranked(key: str, sign: int) -> list[dict[str, Any]]:
        known = [x for x in layers if _number(x.get(key))]
        chosen = sorted(known, key=lambda x: sign * x[key])[:count]
        return [{k: x.get(k) for k in ("name", "method", "scheme", "error", "snr_db")} for x in chosen]

    by_error = ranked("error", -1)
    missing = None if by_error else next((str(r) for x in layers if (r := x.get("error_missing"))), None)
    return {"by_error": by_error, "by_snr": ranked("snr_db", 1), "error_missing": missing}


def evidence_of(path: Path) -> dict[str, Any] | None:
    """:func:`worst` of the report in a checkpoint directory; None where there is none, or none that can be
    read."""
    try:
        layers = json.loads((path / REPORT).read_text(encoding="utf-8"))["layers"]
        return worst([x for x in layers if isinstance(x["name"], str)]) if layers else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
