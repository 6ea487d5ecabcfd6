"""``quant quantize --scheme q4_k_m``: a level of GGUF as the scheme of a job, whose output is one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.commands.terminal import Output, resumable
from quant.errors import UsageError, clipped
from quant.gguf.levels import LEVELS, OWN_LEVELS
from quant.levels import CALIBRATION, CHOSEN

#: What a method of ours takes besides.
_METHOD = (
    "damping", "act_order", "clip_search", "options", "moe_calibration", "device", "devices",
    "gradient_samples", "max_memory", "max_gpu_memory", "scratch_dir", "outlier_suppression", "alpha",
    "effort",
)  # fmt: skip


def is_level(scheme: object) -> bool:
    """Whether a scheme is a level of a GGUF file, in either case of letters.

    >>> is_level("Q4_K_M"), is_level("w4a16")
    (True, False)
    """
    return isinstance(scheme, str) and scheme.lower() in {**LEVELS, **OWN_LEVELS}


def run_level(out: Output, values: Mapping[str, Any], dry_run: bool, measure: bool) -> None:
    """Makes the file of a job of these recipe keys, and prints what was made.

    Raises:
        UsageError: an option that such a job does not take.
    """
    from quant.commands.render import results

    level = str(values["scheme"]).lower()
    method = values.get("method") or ("by effort" if "effort" in values else None)
    _check(values, level, method, dry_run, measure)
    with resumable(), out.progress() as progress:
        from quant.levels import make_level
        from quant.pipeline.memory import prepare_torch

        prepare_torch()
        made = make_level(values, method is not None, progress, out.outcome.command)
    out.result(made.to_dict(), lambda console: results.gguf_file(console, made))


def _check(values: Mapping[str, Any], level: str, method: str | None, dry_run: bool, measure: bool) -> None:
    if dry_run or measure:
        option = "--dry-run" if dry_run else "--evaluate"
        raise UsageError(
            f"{option} is for checkpoints: leave it out for --scheme {level}; quant evaluate FILE.gguf "
            "--against SOURCE measures what was made"
        )
    if "output_path" not in values or Path(values["output_path"]).suffix != ".gguf":
        raise UsageError(
            f"--scheme {level} makes one file: give --output-path a name that ends in .gguf, not "
            f"{clipped(str(values.get('output_path')))}"
        )
    if method is not None and level not in CHOSEN:
        why = "llama.cpp chooses its codes" if level in OWN_LEVELS else "its codes are rounded to the nearest"
        raise UsageError(
            f"--method {method} with --scheme {level}: {why}: leave --method out; methods choose the codes "
            f"of {', '.join(CHOSEN)}"
        )
    taken = {"model_path", "output_path", "scheme", "method", *CALIBRATION, *(_METHOD if method else ())}
    if wrong := sorted(set(values) - taken):
        raise UsageError(
            f"--{wrong[0].replace('_', '-')} has no meaning for --scheme {level}"
            f"{'' if method else ' without a --method'}: leave it out"
        )
