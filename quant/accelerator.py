"""The one door to ``torch.cuda`` and to what stands in for it: where tensors live, what memory is there, and
when a device has done what it was told.

A device other than the CPU is reached through torch's module of its kind (``torch.get_device_module``), so
that whatever registers itself with torch as CUDA does is used as CUDA is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from quant.errors import UsageError

T = TypeVar("T")
#: Kinds of device whose products of two 16-bit matrices torch gives back in fp32, unrounded (``out_dtype``).
_FP32_PRODUCTS = ("cuda",)
#: What a kind of device must offer to be computed on, under torch's names for CUDA's.
_NEEDED = (
    "is_available",
    "device_count",
    "synchronize",
    "mem_get_info",
    "max_memory_allocated",
    "reset_peak_memory_stats",
    "empty_cache",
    "get_device_name",
)


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
    if device is None or device.type not in ("cpu", "cuda", _registered()):
        raise UsageError(f"--device is {name!r}: give cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    module, kind = _module(device), device.type.upper()
    if not module.is_available():
        raise UsageError(f"--device is {name!r}: no {kind} device is visible to torch; use --device cpu")
    if (device.index or 0) >= module.device_count():
        raise UsageError(
            f"--device is {name!r}: torch sees {module.device_count()} {kind} devices, counted from 0"
        )
    return device


def _registered() -> str:
    """The kind of device that another package has registered with torch (its "PrivateUse1"); empty where
    there is none that can be computed on."""
    name = torch.utils.backend_registration._get_privateuse1_backend_name()
    module = getattr(torch, name, None)
    return name if module is not None and all(hasattr(module, n) for n in _NEEDED) else ""


def _module(device: torch.device) -> Any:
    """torch's module of a device's kind: ``torch.cuda``, or what has the same functions."""
    return torch.get_device_module(device)


def on_accelerator(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in a device's own memory and computed there: few large operations are wanted, not
    pieces that a CPU's cache holds."""
    return tensor.device.type != "cpu"


def launching_on(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """While it lasts, kernels that are not torch's own are launched where a tensor is: Triton launches on the
    current device, which is the first one unless said otherwise."""
    return _module(tensor.device).device_of(tensor) if tensor.is_cuda else nullcontext()


def of_kind(table: Mapping[str, T], device: torch.device) -> T:
    """What a table says of ``cpu`` or of ``accelerator``."""
    return table["cpu" if device.type == "cpu" else "accelerator"]


def fp32_products(x: torch.Tensor) -> bool:
    """Whether the device of ``x``, 16-bit floats, gives the sums of its products in fp32."""
    return x.device.type in _FP32_PRODUCTS and x.dtype in (torch.bfloat16, torch.float16)


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all that it was told; a CPU always has."""
    if device.type != "cpu":
        _module(device).synchronize(device)


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes of a device's own memory: free, and all."""
    free, total = _module(device).mem_get_info(device)
    return int(free), int(total)


def limit_memory(device: torch.device, size: int | None) -> None:
    """Lets this process's tensors take so many bytes of a device's own memory and no more: what asks for more
    gets torch's error of a device that is out of memory. None: all there is.

    Raises:
        UsageError: torch's module of this kind of device has no limit.
    """
    if device.type == "cpu":
        return
    limit = getattr(_module(device), "set_per_process_memory_fraction", None)
    if limit is None:
        if size is not None:
            raise UsageError(f"--max-gpu-memory: {device} has no limit on its memory: leave it out")
        return
    limit(1.0 if size is None else min(size / memory_of(device)[1], 1.0), device)


def peak_bytes(device: torch.device) -> int:
    """The most bytes of a device's own memory that tensors of this process took at once; 0 of a CPU, whose
    memory is the process's."""
    return 0 if device.type == "cpu" else int(_module(device).max_memory_allocated(device))


def forget_peak(device: torch.device) -> None:
    """Lets :func:`peak_bytes` begin anew."""
    if device.type != "cpu":
        _module(device).reset_peak_memory_stats(device)


def give_back(device: torch.device) -> None:
    """Returns the memory that no tensor takes to the device."""
    if device.type != "cpu":
        _module(device).empty_cache()


def device_name(device: torch.device) -> str:
    """What a device calls itself; empty of a CPU."""
    return "" if device.type == "cpu" else str(_module(device).get_device_name(device))
