"""A device's memory that ends: what is said of it, and work that goes on with smaller batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from quant.accelerator import give_back
from quant.errors import DeviceMemoryExhausted

if TYPE_CHECKING:
    from quant.pipeline.manager import QuantizationManager

T = TypeVar("T")


@contextmanager
def memory_exhausted(device: torch.device, more: str = "") -> Iterator[None]:
    """Turns a GPU's lack of memory into a :class:`DeviceMemoryExhausted` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryExhausted(
            f"{device}: out of memory ({str(error).splitlines()[0][:160]}): use fewer --samples, a shorter "
            f"--sequence-length, or --device cpu{more}"
        ) from error


def in_smaller_batches(
    make: Callable[[int | None], QuantizationManager], work: Callable[[QuantizationManager], T]
) -> T:
    """What ``work`` does with a manager. Where it runs out of a device's memory, it is begun again with
    batches of half as many calibration tokens, down to one row.

    Args:
        make: a manager whose batches have so many tokens; None, at first: as many as suit the device.

    Raises:
        DeviceMemoryExhausted: not even one row's are held, or the memory is not taken by rows.
    """
    tokens: int | None = None
    while True:
        manager = make(tokens)
        try:
            return work(manager)
        except DeviceMemoryExhausted:
            # the others of several processes would not know
            tokens = manager.workspace.smaller_batch() if manager.ranks.size == 1 else None
            if tokens is None:
                raise
        device = manager.device
        del manager
        gc.collect()  # what the failed pass held, before the device is asked for memory again
        give_back(device)
