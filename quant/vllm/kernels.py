"""Which number formats vLLM computes with on which device. The compute capabilities are those of 0.32's
sources: each scheme's ``get_min_capability``, and what a kernel says it can implement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant.hardware import UNNAMED, Gpu
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
#: Compute capabilities of the parts whose memory is the host's: Orin, Thor, GB10 (NVIDIA's table of compute
#: capabilities; vLLM asks the driver, ``is_integrated_gpu`` in `platforms/cuda.py`).
UNIFIED_CAPABILITIES = frozenset({(8, 7), (11, 0), (12, 1)})
#: Tokens of an attention block on a CPU.
CPU_BLOCK = 128

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


#: Compute capability that vLLM demands of a GPU for a checkpoint by its ``quant_method``, where no number
#: format above says it (``get_min_capability`` of each method's config).
METHOD_CAPABILITIES: Mapping[str, tuple[int, int]] = {
    "mxfp4": (8, 0),
    "fbgemm-fp8": (8, 0),
    "experts-int8": (8, 0),
    "torchao": (7, 5),
}
#: Generations with kernels of attention that selects its tokens by an indexer (DeepSeek V3.2, GLM 5): the
#: first number of a compute capability (``supports_compute_capability`` of the sparse backends in
#: `v1/attention/backends/mla`).
SELECTING_GENERATIONS = frozenset({9, 10, 12})


#: What torch calls AVX512, by Linux's names. vLLM loads one of three builds of its CPU kernels: for AVX2,
#: for AVX512, and for AVX512 with BF16 (`platforms/cpu.py::import_kernels`).
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_AVX512_BF16 = _AVX512 | {"avx512_bf16"}
#: Tiles: attention, latent attention and mixtures of experts have kernels of their own made of them.
_AMX = frozenset({"amx_tile"})
#: What a CPU is taken to have whose instruction sets are not known.
_ASSUMED = _AVX512_BF16 | {"avx2", "avx512_vnni"}


@dataclass(frozen=True)
class CpuFormat:
    """How vLLM's CPU build computes with a number format.

    Attributes:
        state: ``native`` or ``weight-only``.
        needs: sets of instruction sets of which the CPU must have one; none: it runs on every CPU.
        without: what happens on other CPUs.
        multiple: what a layer's outputs and inputs must be multiples of.
        fails: whether vLLM stops there; it computes wrongly otherwise.
    """

    state: str
    needs: tuple[frozenset[str], ...] = ()
    without: str = ""
    multiple: int = 1
    fails: bool = True


#: Number formats that vLLM's CPU build has; it has no others.
CPU_FORMATS: Mapping[str, CpuFormat] = {
    "fp16": CpuFormat("native"),
    "bf16": CpuFormat("native"),
    "fp8": CpuFormat("weight-only"),
    "int4-weights": CpuFormat(
        "weight-only",
        (_AVX512, frozenset({"asimd"})),
        "no AVX512, of which its kernels of 4-bit weights are made",
        multiple=32,  # `kernels/linear/mixed_precision/cpu.py::can_implement`
    ),
    # Without VNNI, oneDNN adds pairs of 8-bit products in 16 bits, which overflow for large codes (oneDNN's
    # documentation, "Nuances of int8 Computations"). With full-range weights vLLM's product came out 13 %
    # away from that of its own codes; with codes of 50 at most 0.3 %.
    "int8": CpuFormat(
        "native",
        (frozenset({"avx512_vnni"}), frozenset({"avx_vnni"}), frozenset({"asimd"})),
        "no VNNI, without which the int8 products of its kernel overflow, so that it computes wrongly with a "
        "sound checkpoint",
        fails=False,
    ),
}


#: The same of routed experts, of which other formats have no kernel on a CPU at all
#: (`layers/fused_moe/experts/cpu_moe.py`: each asks for tiles).
_TILES_FOR_EXPERTS = "no AMX, of which its kernels of quantized experts are made"
CPU_EXPERTS: Mapping[str, CpuFormat] = {
    "int4-weights": CpuFormat("weight-only", (_AMX,), _TILES_FOR_EXPERTS),
    "int8": CpuFormat("native", (_AMX, frozenset({"asimd"})), _TILES_FOR_EXPERTS),
    "fp8": CpuFormat("weight-only", (_AMX,), _TILES_FOR_EXPERTS),
}


@dataclass(frozen=True)
class CpuProblem:
    """Why a CPU does not serve what it is asked for. ``fails``: vLLM stops there; it computes wrongly
    otherwise."""

    text: str
    fails: bool = True


#: The rotary kernel of vLLM 0.32's CPU build (``rotary_embedding``) takes the step from head to head for that
#: from token to token where queries have three dimensions, as those of MLA have (``layers/mla.py``): compared
#: with its own torch code (``RotaryEmbedding.forward_native``), with which the same model's text is right.
CPU_LATENT = CpuProblem(
    "vLLM 0.32's build for CPUs turns other numbers than the queries of latent attention (MLA) by their "
    "positions: what it answers is not the model's text: serve it on a GPU",
    fails=False,
)


def cpu_problems(
    gpu: Gpu, kernels: Iterable[str], experts: Iterable[str] = (), cache_dtype: str = "auto"
) -> list[CpuProblem]:
    """What stands against serving a checkpoint on a CPU, because of its instruction sets.

    Args:
        kernels: number formats of its linears, by their names in :data:`FORMAT_CAPABILITIES`.
        experts: those of its routed experts.
        cache_dtype: vLLM's ``--kv-cache-dtype``.
    """
    problems = []
    for table, wanted in ((CPU_FORMATS, kernels), (CPU_EXPERTS, experts)):
        for kernel in sorted(set(wanted)):
            row = table.get(kernel)
            if row is None:
                problems.append(CpuProblem(f"vLLM's CPU build has no kernel for {kernel}: serve it on a GPU"))
            elif not cpu_has(gpu.instructions, *row.needs):
                problems.append(
                    CpuProblem(
                        f"this CPU has {row.without}: for {kernel} take a machine with another CPU, or a GPU",
                        row.fails,
                    )
                )
    if cache_dtype.startswith("fp8") and not has_fp8_cache(gpu):
        problems.append(
            CpuProblem(
                "this CPU has neither AVX512 nor AMX, one of which vLLM's FP8 KV cache takes there: "
                "--kv-cache-dtype auto keeps it in 16 bits"
            )
        )
    return problems


def cpu_shape_problems(layers: Iterable[tuple[str, str, int, int]]) -> list[str]:
    """Layers whose sizes the kernels of vLLM's CPU build do not take, one of each kind.

    Args:
        layers: number format, name, outputs (of a fused layer all), inputs.
    """
    problems: dict[str, str] = {}
    for kernel, name, n, k in layers:
        unit = CPU_FORMATS[kernel].multiple if kernel in CPU_FORMATS else 1
        if wrong := [f"{size} {what}" for size, what in ((n, "outputs"), (k, "inputs")) if size % unit]:
            last = name.rpartition(".")[2]
            problems.setdefault(
                last,
                f"{name} has {' and '.join(wrong)}, and vLLM's CPU kernel of {kernel} takes multiples of "
                f"{unit}: quantize it with --scheme w8a8-int8, or serve it on a GPU",
            )
    return list(problems.values())


def cpu_has(instructions: frozenset[str] | None, *needs: frozenset[str]) -> bool:
    """Whether a CPU has all of one of the sets of instruction sets; without any set, every CPU does."""
    here = _ASSUMED if instructions is None else instructions
    return not needs or any(need <= here for need in needs)


def kernel_of(scheme: Scheme) -> str:
    """The number format that a GPU must handle, by its name in :data:`FORMAT_CAPABILITIES`."""
    if scheme.weights.type == "int":
        zeros = "-asym" if scheme.weights.bits == 8 and not scheme.weights.symmetric else ""
        return f"int{scheme.weights.bits}-weights{zeros}" if scheme.activations is None else "int8"
    return {"U8": f"mxfp{scheme.weights.bits}", "F8_E4M3": "nvfp4"}.get(scheme.weights.scales, "fp8")


def formats_of(gpu: Gpu) -> dict[str, str]:
    """Number formats → how a GPU computes with them in vLLM: ``native``, ``weight-only`` (unpacked on the
    way), ``no``; ``unknown`` all of a GPU of which the memory alone is known."""
    if gpu.kind == UNNAMED:
        return dict.fromkeys(FORMAT_CAPABILITIES, "unknown")
    return number_formats(gpu.platform, gpu.capability, gpu.architecture, gpu.instructions)


def has_bfloat16(gpu: Gpu) -> bool:
    """Whether a GPU computes in bf16; one whose compute capability is not known counts as one that does."""
    return gpu.platform != "cuda" or gpu.capability is None or gpu.capability >= BF16_CAPABILITY


def build_note(gpu: Gpu) -> str:
    """What is to be said of the build of vLLM that a GPU needs; empty where the usual one does.

    The toolkit's release notes of CUDA 13.0: no code is compiled for Maxwell, Pascal and Volta any more.
    """
    if gpu.platform != "cuda" or gpu.capability is None or gpu.capability >= (7, 5):
        return ""
    number = ".".join(map(str, gpu.capability))
    return f"{gpu.name} ({number}): builds with CUDA 13 have no code for it; take a vLLM built with CUDA 12"


def has_fp8_cache(gpu: Gpu) -> bool:
    """Whether vLLM keeps a KV cache in FP8 on a GPU, or on a CPU (`v1/attention/backends/cpu_attn.py`); one
    of which the memory alone is known counts as one that does."""
    if gpu.platform == "cpu":
        return cpu_has(gpu.instructions, _AVX512, _AMX)
    if gpu.kind == UNNAMED:
        return True
    return gpu.platform != "cuda" or (gpu.capability or (0, 0)) >= FP8_CACHE_CAPABILITY


def shares_memory(gpu: Gpu) -> bool:
    """Whether ranks on such GPUs reduce through memory that NVLink shares, whose buffers are large."""
    return gpu.link == "nvlink" and (gpu.capability is None or gpu.capability >= SHARED_MEMORY_CAPABILITY)


def state_width(gpu: Gpu) -> int:
    """Bytes that each value of a recurrent state has at least. On CPUs with AVX512-BF16 vLLM keeps them in 32
    bits for its fast kernels, on others in the model's dtype.

    Source: `platforms/cpu.py::check_and_update_config`.
    """
    return 4 if gpu.platform == "cpu" and cpu_has(gpu.instructions, _AVX512_BF16) else 0


def has_unified_memory(gpu: Gpu) -> bool:
    """Whether a GPU's memory is the host's (Orin, Thor, GB10)."""
    return gpu.platform == "cuda" and gpu.capability in UNIFIED_CAPABILITIES


def serving_problem(gpu: Gpu, method: str | None, selects: bool) -> str | None:
    """Why a GPU does not serve a model at all, whatever scheme it is quantized to, or not as it is stored.

    Args:
        method: the ``quant_method`` of the checkpoint as it is; None where it is unquantized, or is planned
            in another scheme.
        selects: its attention selects tokens by an indexer.
    """
    if gpu.platform == "cpu" and selects:
        return "attention that selects its tokens by an indexer has no kernel on a CPU"
    if gpu.platform != "cuda" or gpu.capability is None:
        return None
    if selects and gpu.capability[0] not in SELECTING_GENERATIONS:
        return (
            "attention that selects its tokens by an indexer has kernels for compute capabilities "
            f"{', '.join(f'{n}.x' for n in sorted(SELECTING_GENERATIONS))} alone"
        )
    least = METHOD_CAPABILITIES.get(method or "")
    if least is not None and gpu.capability < least:
        return f"vLLM serves {method} checkpoints from compute capability {least[0]}.{least[1]} on"
    return None


def latent_block(gpu: Gpu) -> int:
    """Tokens of a block of latent attention's cache on a GPU or CPU."""
    if gpu.platform == "cpu":  # the kernel without tiles is compiled for one size
        return CPU_BLOCK if cpu_has(gpu.instructions, _AMX) else 16
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
    rows = (row for row in SchemeRegistry if formats.get(kernel_of(row.scheme), "no") != "no")
    loaded = ", ".join(row.name for row in rows) or "unquantized weights only"
    if gpu.platform != "cuda":
        reason = ""
        if gpu.platform == "cpu" and (cpu := CPU_FORMATS.get(kernel)) is not None:
            reason = f" ({cpu.without})"
        return (
            f"--gpu is {gpu.name} ({level}): vLLM has no kernel for {scheme} there{reason}. It loads {loaded}"
        )
    lowest = min(level for level in FORMAT_CAPABILITIES[kernel][:2] if level is not None) / 10
    end = FORMAT_CAPABILITIES[kernel][2]
    until = f" and below {end / 10}" if end is not None else ""
    return (
        f"--gpu is {gpu.name} ({level}): vLLM has no kernel for {scheme} there; compute capability "
        f"{lowest}{until} is needed. It loads {loaded}"
    )


#: Compute capabilities of parts that serve, oldest first, with names that people know them by (NVIDIA's table
#: of compute capabilities).
GPU_GENERATIONS: Mapping[tuple[int, int], str] = {
    (7, 5): "T4, RTX 20",
    (8, 0): "A100",
    (8, 6): "A10, RTX 30",
    (8, 9): "L4, L40S, RTX 40",
    (9, 0): "H100, H200",
    (10, 0): "B200",
    (12, 0): "RTX 50, RTX PRO 6000",
}


def parts_needed(kernel: str, native: bool) -> str:
    """The GPUs that compute with a number format, in words; empty where every generation that serves does.

    Args:
        native: whether unpacking the weights on the way does not count.

    >>> parts_needed("fp8", True), parts_needed("int4-weights", False)
    ('compute capability 8.9 on (L4, L40S, RTX 40)', '')
    """
    own, unpacked, until = FORMAT_CAPABILITIES[kernel]
    lowest = min(level for level in (own, None if native else unpacked) if level is not None)
    oldest = min(GPU_GENERATIONS)
    first = (max(lowest // 10, oldest[0]), lowest % 10)
    if first <= oldest and until is None:
        return ""
    end = f", below {until // 10}.{until % 10}" if until is not None else ""
    names = GPU_GENERATIONS.get(first)
    return f"compute capability {first[0]}.{first[1]} on{end}{f' ({names})' if names else ''}"


def number_formats(
    platform: str,
    capability: tuple[int, int] | None,
    architecture: str = "",
    instructions: frozenset[str] | None = None,
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
    if platform == "cpu":
        have = {f: r.state for f, r in CPU_FORMATS.items() if cpu_has(instructions, *r.needs)}
        return {f: have.get(f, "no") for f in FORMAT_CAPABILITIES}
    level = capability[0] * 10 + capability[1] if capability else 0
    formats = {}
    for name, (native_from, unpacked_from, until) in FORMAT_CAPABILITIES.items():
        if until is not None and level >= until:
            formats[name] = "no"
        elif native_from is not None and level >= native_from:
            formats[name] = "native"
        elif unpacked_from is not None and level >= unpacked_from:
            formats[name] = "weight-only"
        else:
            formats[name] = "no"
    return formats
