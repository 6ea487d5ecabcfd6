"""Where tensors live: the name a user gives, checked."""

from __future__ import annotations

import torch

from quant.errors import UsageError


def device_of(name: str | None) -> torch.device:
    """The device of ``--device``: as asked, or the first GPU where there is one.

    Raises:
        UsageError: no such kind of device, or none of that number here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is {name!r}: give cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device is {name!r}: no CUDA device is visible to torch; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device is {name!r}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    return device
