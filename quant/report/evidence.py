"""Which layers of a quantized checkpoint lost most, by the two measures that its report holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant.report.value import LayerResult, Report


def worst(layers: Sequence[LayerResult], count: int = 5) -> dict[str, Any]:
    """The layers of largest relative output error and those of smallest signal-to-noise ratio of the weight,
    worst first.

    Returns:
        ``by_error`` and ``by_snr``: up to ``count`` of name, method, scheme, error and snr_db;
            ``error_missing``: why no layer has an error, or None.
    """

    def ranked(key: str, sign: int) -> list[dict[str, Any]]:
        known = [x for x in layers if (value := getattr(x, key)) is not None and math.isfinite(value)]
        chosen = sorted(known, key=lambda x: sign * getattr(x, key))[:count]
        return [{k: getattr(x, k) for k in ("name", "method", "scheme", "error", "snr_db")} for x in chosen]

    by_error = ranked("error", -1)
    missing = None if by_error else next((x.error_missing for x in layers if x.error_missing), None)
    return {"by_error": by_error, "by_snr": ranked("snr_db", 1), "error_missing": missing}


def evidence_of(path: Path) -> dict[str, Any] | None:
    """:func:`worst` of the report in a checkpoint directory; None where there is none, or none that can be
    read."""
    report = Report.load(path)
    if report is None or report.quantization is None or not report.quantization.layers:
        return None
    return worst(report.quantization.layers)
