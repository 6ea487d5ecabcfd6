"""What decides the bytes of an output: unfinished work is gone on with where all of it is as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quant.accelerator import device_name
from quant.calibration.statistics import gram_for
from quant.calibration.text import Rows
from quant.checkpoint.reader import Checkpoint
from quant.models.products import bf16_is_slow
from quant.quantizers.products import onednn_is_faster


def fingerprint(
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    rows: Rows | None,
    device: torch.device,
    teacher: Checkpoint | None = None,
) -> dict[str, Any]:
    """A job's, as :class:`quant.checkpoint.journal.WorkFolder` compares it.

    Args:
        settings: those that decide bytes.
        rows: the text that is measured on; None: none is.
        teacher: a second checkpoint that is read.
    """
    return {
        "source": files_of(checkpoint),
        **({} if teacher is None else {"teacher": files_of(teacher)}),
        "settings": dict(settings),
        "calibration": None if rows is None else rows.digest,
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "instructions": instructions(device),
    }


def files_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a checkpoint is, and the size and time of each file that its values come from."""
    files = [*checkpoint.weight_files, checkpoint.path / "config.json"]
    return {
        "path": str(checkpoint.path.absolute()),
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
    }


def instructions(device: torch.device) -> str:
    """What decides the order of sums: the instructions of a CPU and the libraries that they go to, or the
    name of a device."""
    if device.type != "cpu":
        return device_name(device)
    return (
        f"{torch.backends.cpu.get_cpu_capability()}, {type(gram_for(1, device)).__name__}"
        f"{', oneDNN' if onednn_is_faster() else ''}{', bf16 by fp32' if bf16_is_slow() else ''}"
    )
