"""What the log of a vLLM says of the kernels that it chose at its start."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

#: vLLM's line about a kernel of linears ("Selected X for Y", "Using X for Y", `model_executor/kernels/linear`
#: and the schemes of `layers/quantization`), and about the kernels of routed experts.
_CHOSEN = re.compile(
    r"(?:Selected|Using) (\w*Kernel\w*) for ([\w-]+(?: linear| GEMM)?)"
    r"|(?:Selected|Using) '?(\w+)'? ((?:\w+ )?MoE backend)"
)
#: A kernel that computes with FP8, NVFP4 or MX weights and leaves activations in 16 bits, on hardware without
#: such numbers.
_WEIGHT_ONLY = re.compile(
    r"(Selected|Using) (Marlin(FP8|NvFp4|MxFp4|Mxfp8)\w*|\w*NvFp4W4A16\w*|CPUFp8(Block|PerTensor)Scaled\w*) "
    r"for "
)


@dataclass(frozen=True)
class ChosenKernel:
    """A kernel by vLLM's name and what it was chosen for; ``emulated``: it computes in 16 bits what the
    device lacks."""

    name: str
    purpose: str

    @property
    def emulated(self) -> bool:
        return "emulat" in self.name.lower()


def chosen_kernels(log: Iterable[str]) -> list[ChosenKernel]:
    """Each kernel that a log names, once.

    >>> chosen_kernels(["INFO Using MarlinLinearKernel for CompressedTensorsWNA16"])[0].name
    'MarlinLinearKernel'
    """
    matches = [match for line in log if (match := _CHOSEN.search(line))]
    return list(dict.fromkeys(ChosenKernel(m[1] or m[3], m[2] or m[4]) for m in matches))


def weight_only(log: Iterable[str]) -> bool:
    """Whether a kernel was chosen that leaves activations in 16 bits although the scheme rounds them."""
    return any(_WEIGHT_ONLY.search(line) for line in log)


def on_cpu(log: Iterable[str]) -> bool:
    """Whether the log is of vLLM's CPU build."""
    return any("device_config=cpu" in line for line in log)
