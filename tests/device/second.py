"""The device of ``second.cpp`` as ``--device second``: torch's module of its kind, with the functions of
``torch.cuda`` that are used. Importing this builds it, with the compiler that is here, and registers it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load

#: Bytes of memory that it says it has, until it is told otherwise.
MEMORY = 8 << 30

inside: Any = load(
    "second_device", [str(Path(__file__).with_name("second.cpp"))], extra_cflags=["-O0", "-w"], verbose=False
)


class _Second(types.ModuleType):
    """What ``torch.cuda`` is to CUDA."""

    OutOfMemoryError = torch.OutOfMemoryError
    whole = 0

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """torch.manual_seed asks each kind of device; this one has no numbers of its own."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: object = None) -> None:
        """All is done as it is told."""

    def empty_cache(self) -> None:
        """Nothing is kept back."""

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return self._all() - inside.held(), self._all()

    def _all(self) -> int:
        """Bytes that it has, whatever the process may take of them."""
        self.whole = self.whole or min(inside.limit(), MEMORY)
        return self.whole

    def max_memory_allocated(self, device: object = None) -> int:
        return int(inside.most())

    def memory_allocated(self, device: object = None) -> int:
        return int(inside.held())

    def reset_peak_memory_stats(self, device: object = None) -> None:
        inside.forget_most()

    def set_per_process_memory_fraction(self, fraction: float, device: object = None) -> None:
        inside.set_limit(round(fraction * self._all()))

    def get_device_name(self, device: object = None) -> str:
        return "second device of the tests"


torch.utils.rename_privateuse1_backend("second")
inside.register_device()
torch._register_device_module("second", _Second("torch.second"))
torch.utils.generate_methods_for_privateuse1_backend()
