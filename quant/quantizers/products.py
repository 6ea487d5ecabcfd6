"""Products of fp32 matrices, by the faster of the two libraries that torch's CPU build brings.

torch multiplies fp32 matrices with MKL, which leaves AVX-512 alone on a CPU that is not Intel's: on an EPYC
of Zen 5 it makes 105 G operations a second a core, where oneDNN, which goes by what the CPU can do, makes 170
to 230 (``benchmarks/experts.py`` measures both).
"""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

import torch

#: Columns of the result, and numbers that each of its elements sums up, from which on oneDNN is faster in
#: spite of the copies that its call takes.
_LEAST = 64


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products on this machine's CPU are oneDNN's: they are part of what decides a job's
    bytes."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() not in ("GenuineIntel", "")
    )


def _vendor(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """The maker's name as the CPU says it; empty where nothing tells it."""
    try:
        found = re.search(r"^vendor_id\s*:\s*(\S+)", Path(cpuinfo).read_text(), re.MULTILINE)
    except OSError:
        found = re.search(r"GenuineIntel|AuthenticAMD", platform.processor())
        return found[0] if found else ""
    return found[1] if found else ""


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """fp32 [M, N] of fp32 [M, K] and [K, N], whichever way they lie in memory."""
    return _by_onednn(left, right) if _is_for_onednn(right) else left @ right


def add_product(to: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> None:
    """Adds ``alpha`` times the :func:`product` to ``to`` fp32 [M, N], in place."""
    if _is_for_onednn(right):
        to.add_(_by_onednn(left, right), alpha=alpha)
    else:
        to.addmm_(left, right, alpha=alpha)


def _is_for_onednn(right: torch.Tensor) -> bool:
    return right.device.type == "cpu" and min(right.shape) >= _LEAST and onednn_is_faster()


def _by_onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(*_operands(left, right), None, "none", [], "")


def _operands(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] and [N, K] as oneDNN takes them: rows with gaps between them go through its reference code, a
    hundred times slower."""
    columns = right.t().contiguous() if right.stride(0) == 1 else right.contiguous().t()
    # torch transposes in a cache's order only what has no gaps
    rows = left.t().contiguous().t() if left.stride(0) == 1 else left
    return rows.contiguous(), columns
