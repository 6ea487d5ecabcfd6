"""Which number formats vLLM computes with on which device. The compute capabilities are those of 0.32's
sources: each scheme's ``get_min_capability``, and what a kernel says it can implement."""

from __future__ import annotations

from typing import Any

from quant.hardware import Gpu
from quant.schemes import Scheme, SchemeRegistry

#: Group sizes of 4- and 8-bit integers that every kernel from compute capability 7.5 up takes; others run on
#: single kernels only (Marlin, `quantization/utils/marlin_utils.py`).
GROUP_SIZES = (-1, 32, 64, 128)
#: Layouts of OCP's microscaling numbers. vLLM's weight-only kernels of them exist for bf16 alone
#: (`csrc/quantization/marlin/generate_kernels.py`).
BF16_LAYOUTS = frozenset({"mxfp4-pack-quantized", "mxfp8-quantized"})
#: Number formats whose weight-only kernels take bf16 alone; see :data:`BF16_LAYOUTS`.
BF16_FORMATS = frozenset({"mxfp4", "mxfp8"})
#: First compute capability with bf16, and with an FP8 KV cache.
BF16_CAPABILITY, FP8_CACHE_CAPABILITY = (8, 0), (8, 9)
#: First compute capability whose ranks reduce through memory that NVLink shares, and whose kernels of latent
#: attention take larger blocks.
SHARED_MEMORY_CAPABILITY, LARGE_BLOCK_CAPABILITY = (9, 0), (10, 0)

#: lowest compute capability (CUDA) at which vLLM 0.32 computes a scheme: (natively, by unpacking weights on
#: the way). vLLM's sources, the ``get_min_capability`` of each scheme; None = never. A third number is the
#: first capability at which the kernels are missing again.
FORMAT_CAPABILITIES: dict[str, tuple[int | None, int | None, int | None]] = {
    "fp16": (70, None, None),
    "bf16": (80, None, None),
    "int8": (75, None, 100),  # no int8 kernel for Blackwell in 0.32 (vLLM issue #54311)
    "fp8": (89, 75, None),
    "int4-weights": (None, 75, None),
    "int8-weights": (None, 75, None),
    "int8-weights-asym": (None, 90, 100),  # with zero points Machete alone, which is for 9.0
    "nvfp4": (100, 75, None),
    "mxfp4": (100, 80, None),
    "mxfp8": (100, 75, None),
}


def kernel_of(scheme: Scheme) -> str:
    """The number format that a GPU must handle, by its name in :data:`FORMAT_CAPABILITIES`."""
    if scheme.weights.type == "int":
        zeros = "-asym" if scheme.weights.bits == 8 and not scheme.weights.symmetric else ""
        return f"int{scheme.weights.bits}-weights{zeros}" if scheme.activations is None else "int8"
    return {"U8": f"mxfp{scheme.weights.bits}", "F8_E4M3": "nvfp4"}.get(scheme.weights.scales, "fp8")


def formats_of(gpu: Gpu) -> dict[str, str]:
    """Number formats → how a GPU computes with them in vLLM: ``native``, ``weight-only`` (unpacked on the
    way), ``no``."""
    return number_formats(gpu.platform, gpu.capability, gpu.architecture)


def has_bfloat16(gpu: Gpu) -> bool:
    """Whether a GPU computes in bf16; one whose compute capability is not known counts as one that does."""
    return gpu.platform != "cuda" or gpu.capability is None or gpu.capability >= BF16_CAPABILITY


def has_fp8_cache(gpu: Gpu) -> bool:
    """Whether vLLM keeps a KV cache in FP8 on a GPU."""
    return gpu.platform != "cuda" or (gpu.capability or (0, 0)) >= FP8_CACHE_CAPABILITY


def shares_memory(gpu: Gpu) -> bool:
    """Whether ranks on such GPUs reduce through memory that NVLink shares, whose buffers are large."""
    return gpu.link == "nvlink" and (gpu.capability is None or gpu.capability >= SHARED_MEMORY_CAPABILITY)


def latent_block(gpu: Gpu) -> int:
    """Tokens of a block of latent attention's cache on a GPU."""
    return 64 if gpu.capability is not None and gpu.capability >= LARGE_BLOCK_CAPABILITY else 16


def gpu_dict(gpu: Gpu) -> dict[str, Any]:
    """A GPU's facts with what vLLM computes on it."""
    return gpu.to_dict() | {"formats": formats_of(gpu)}


def kernel_problem(scheme: Scheme, gpu: Gpu) -> str | None:
    """Why a GPU has no kernel for a scheme, or None."""
    formats, kernel = formats_of(gpu), kernel_of(scheme)
    if formats.get(kernel, "no") != "no":
        return None
    level = ".".join(map(str, gpu.capability)) if gpu.capability else gpu.architecture or gpu.platform
    lowest = min(level for level in FORMAT_CAPABILITIES[kernel][:2] if level is not None) / 10
    end = FORMAT_CAPABILITIES[kernel][2]
    until = f" and below {end / 10}" if end is not None else ""
    rows = (row for row in SchemeRegistry if formats.get(kernel_of(row.scheme), "no") != "no")
    loaded = ", ".join(row.name for row in rows)
    return (
        f"--gpu is {gpu.name} ({level}): vLLM has no kernel for {scheme} there; compute capability "
        f"{lowest}{until} is "
        f"needed. It loads {loaded or 'unquantized weights only'}"
    )


def number_formats(
    platform: str, capability: tuple[int, int] | None, architecture: str = ""
) -> dict[str, str]:
    """How a GPU handles every number format.

    >>> number_formats("cuda", (8, 6))["fp8"], number_formats("cuda", (9, 0))["fp8"]
    ('weight-only', 'native')
    """
    if platform == "rocm":
        fp8 = (
            architecture >= "gfx942"
            and not architecture.startswith("gfx9")
            or architecture in ("gfx942", "gfx950")
        )
        native = (
            {"fp16", "bf16", "int8"}
            | ({"fp8"} if fp8 else set())
            | ({"mxfp4", "mxfp8"} if architecture == "gfx950" else set())
        )
        return {
            f: "native" if f in native else "weight-only" if f in ("int4-weights", "int8-weights") else "no"
            for f in FORMAT_CAPABILITIES
        }
    if platform == "cpu":  # vLLM's x86 build with AVX512
        can = {
            "fp16": "native",
            "bf16": "native",
            "int8": "native",
            "fp8": "weight-only",
            "int4-weights": "weight-only",
        }
        return {f: can.get(f, "no") for f in FORMAT_CAPABILITIES}
    level = capability[0] * 10 + capability[1] if capability else 0
    found = {}
    for name, (native_from, unpacked_from, until) in FORMAT_CAPABILITIES.items():
        if until is not None and level >= until:
            found[name] = "no"
        elif native_from is not None and level >= native_from:
            found[name] = "native"
        elif unpacked_from is not None and level >= unpacked_from:
            found[name] = "weight-only"
        else:
            found[name] = "no"
    return found
