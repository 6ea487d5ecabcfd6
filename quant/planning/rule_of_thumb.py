"""The original design's rule of thumb, kept as the policy ``rule-of-thumb``: simple, and wrong where the docs
say.

Every checkpoint is taken as 32-bit, so that a size follows from the file's alone: ``file / (32 / bits) ×
overhead``; a scheme fits when that is within 90 % of the free memory and the GPU's total reaches the scheme's
minimum. No KV cache, no activations, no context. A bf16 checkpoint, as most are today, is thereby halved once
too often.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quant.errors import UsageError
from quant.units import LARGEST

GB = 1e9

#: what a scheme needs beyond its weights, as a factor
OVERHEADS = {"none": 1.3, "fp16": 1.2, "int8": 1.15, "int4": 1.1}
BITS = {"none": 32, "fp16": 16, "int8": 8, "int4": 4}
#: smallest total memory of a GPU, in GB, for which a scheme is considered
MINIMUM_MEMORY = {"none": 16, "fp16": 8, "int8": 6, "int4": 3}
MARGIN = 0.10


@dataclass(frozen=True)
class ThumbPlan:
    """One scheme under the rule: bytes needed, and whether the rule lets it pass."""

    scheme: str
    needed_bytes: int
    fits: bool
    why: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rule_of_thumb(
    file_bytes: int, total_bytes: int, free_bytes: int | None = None
) -> tuple[str | None, list[ThumbPlan]]:
    """The first scheme that passes, from the most precise down, and all plans.

    Args:
        file_bytes: the checkpoint's size, taken as 32-bit weights.
        total_bytes: the GPU's memory; ``free_bytes`` what of it is free (all, unless given).

    Raises:
        UsageError: a size that is not one.

    >>> rule_of_thumb(5_750_000_000, 8_000_000_000)[0]
    'fp16'
    """
    for name, value in (("file size", file_bytes), ("GPU memory", total_bytes)):
        if not 0 < value <= LARGEST:
            raise UsageError(f"{name} is {value} bytes: must be above 0 and at most 1 EiB")
    safe = (total_bytes if free_bytes is None else free_bytes) * (1 - MARGIN)
    plans = []
    for scheme, bits in BITS.items():
        needed = file_bytes * bits / 32 * OVERHEADS[scheme]
        minimum = MINIMUM_MEMORY[scheme] * GB
        if needed > safe:
            why = f"needs {needed / GB:.2f} GB, {safe / GB:.2f} GB are safe"
        elif total_bytes < minimum:
            why = f"wants a GPU of {MINIMUM_MEMORY[scheme]} GB, this one has {total_bytes / GB:.1f}"
        else:
            why = f"needs {needed / GB:.2f} of {safe / GB:.2f} GB"
        plans.append(ThumbPlan(scheme, int(needed), needed <= safe and total_bytes >= minimum, why))
    return next((p.scheme for p in plans if p.fits), None), plans
