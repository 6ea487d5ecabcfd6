"""Which GPUs are here, through NVML, and what a GPU that is not here would be, from ``configs/gpus.json``.

Neither torch nor CUDA is initialised: asking costs no GPU memory, and works while another process holds all
of it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from quant.data import load_json
from quant.errors import UsageError
from quant.health import Health, read_health
from quant.parts import MOST, USABLE_SHARE, Part, find_part, named_row, plain, rows
from quant.units import GIB, LARGEST, format_size

#: what stands for a document where the table names none: the figure was entered from memory
UNCHECKED = "unchecked"
#: Kind of a GPU of which the memory alone is known.
UNNAMED = "unnamed"


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU. ``name`` is empty where the driver does not tell it (other users,
    containers)."""

    pid: int
    name: str
    used_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One GPU, one MIG slice, or the CPU when there is none.

    Sizes are bytes, ``bandwidth`` bytes a second, ``rates`` dense operations a second by number format (0:
    not native). ``sources`` says where each fact came from (``memory``, ``bandwidth``, ``capability``, each
    rate): ``nvml``, ``user``, or the document that the table names, ``unchecked`` where it names none.
    """

    name: str
    total_bytes: int
    free_bytes: int
    used_bytes: int = 0
    capability: tuple[int, int] | None = None
    architecture: str = ""
    platform: str = "cuda"
    bandwidth: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)
    link: str = "pcie"
    kind: str = ""
    index: int = 0
    uuid: str = ""
    driver: str = ""
    mig: str = ""
    processes: tuple[GpuProcess, ...] = ()
    torch_allocated_bytes: int | None = None
    torch_reserved_bytes: int | None = None
    #: a CPU's instruction sets, by Linux's names; None where they are not known
    instructions: frozenset[str] | None = None
    #: temperature, power, throttling; None of a GPU that is not here
    health: Health | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    #: what a name that fits several parts was taken for
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "index": self.index, "name": self.name, "uuid": self.uuid, "platform": self.platform,
            "kind": self.kind,
            "total_bytes": self.total_bytes, "used_bytes": self.used_bytes, "free_bytes": self.free_bytes,
            "capability": ".".join(map(str,
            self.capability)) if self.capability else self.architecture or None,
            "bandwidth_bytes_per_second": self.bandwidth or None, "operations_per_second": dict(self.rates),
            "link": self.link,
            "driver": self.driver or None, "mig": self.mig or None,
            "processes": [{"pid": p.pid, "name": p.name, "used_bytes": p.used_bytes} for p in self.processes],
            "torch_allocated_bytes": self.torch_allocated_bytes,
            "torch_reserved_bytes": self.torch_reserved_bytes,
            "instructions": None if self.instructions is None else sorted(self.instructions),
            "health": None if self.health is None else self.health.to_dict(),
            "sources": dict(self.sources), "note": self.note or None,
        }  # fmt: skip


@dataclass(frozen=True)
class Host:
    """The machine around the GPUs: bytes of RAM and of the disk that holds the current directory."""

    ram_total_bytes: int
    ram_available_bytes: int
    disk_total_bytes: int
    disk_free_bytes: int
    cpus: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Detection:
    """What :func:`detect` found. ``note`` says why there is no GPU, or what was left out."""

    gpus: tuple[Gpu, ...]
    host: Host
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "gpus": [g.to_dict() for g in self.gpus],
            "host": self.host.to_dict(),
            "note": self.note or None,
        }


# -- named GPUs ----------------------------------------------------------------------------------------------


def gpu_names() -> list[str]:
    """The names of all parts in the table, in its order."""
    return [row["name"] for row in rows()]


def _cited(row: Mapping[str, Any], fact: str) -> str:
    """The documents that a fact of a table row was read in, as a person would look them up."""
    known = load_json("gpus.json")["sources"]
    documents = [known[i] for i in row["sources"][fact]]
    return "; ".join(f"{s['what']}, {s['address']} ({s['version']})" for s in documents) or UNCHECKED


def _rate_sources(row: Mapping[str, Any]) -> dict[str, str]:
    return {number: _cited(row, number) for number in row["tflops"]}


def _memory_of(row: Mapping[str, Any]) -> tuple[int, dict[str, str]]:
    """The bytes that a program gets of a part, and where that is from."""
    if row["reported_gib"]:
        return int(row["reported_gib"] * GIB), {
            "memory": _cited(row, "reported"),
            "nominal_memory": _cited(row, "memory"),
        }
    share, of = USABLE_SHARE, "parts of this size"
    if (other := named_row(row.get("memory_like", ""))) is not None:
        share, of = other["reported_gib"] / other["memory_gib"], str(other["name"])
    return int(row["memory_gib"] * share * GIB), {
        "memory": f"estimated: {share:.1%} of the nominal size, as on {of}",
        "nominal_memory": _cited(row, "memory"),
    }


def named_gpu(name: str, total_bytes: int | None = None) -> Gpu:
    """A GPU that need not be here: ``L40S-48GB``, ``h100``, ``RTX 3070 Ti Laptop``; where the name says how
    many, one of them.

    Args:
        total_bytes: the memory that the driver reports, where it is not the table's (a modified card, a
            slice).

    Raises:
        UsageError: no such part (the nearest names are offered), or a memory size that no machine has.
    """
    return named_gpus(name, total_bytes)[0]


def named_gpus(name: str, total_bytes: int | None = None, count: int | None = None) -> list[Gpu]:
    """The GPUs of a name that may say how many they are: ``2xL4``; one where neither it nor ``count`` does.

    Args:
        count: how many, as another option says it.

    Raises:
        UsageError: as :func:`named_gpu`; or a number in the name that is not ``count``.
    """
    check_memory(total_bytes, "--gpu-memory")
    if plain(name) == "cpu":
        return [replace(cpu_device(total_bytes), index=i) for i in range(count or 1)]
    part = find_part(name)
    if count is not None and part.count not in (None, count):
        raise UsageError(f"--gpu {name} is {part.count} GPUs, and {count} are asked for: give one number")
    gpu = _gpu_of(part, total_bytes)
    return [replace(gpu, index=i) for i in range(count or part.count or 1)]


def count_in(name: str | None) -> int | None:
    """How many GPUs a name says; None where it says no number.

    Raises:
        UsageError: no such part.
    """
    return None if name is None or plain(name) == "cpu" else find_part(name).count


def _gpu_of(part: Part, total_bytes: int | None) -> Gpu:
    row = part.row
    reported, memory_sources = _memory_of(row)
    total = total_bytes or reported
    numbers = str(row["capability"])
    capability = tuple(map(int, numbers.split("."))) if not numbers.startswith("gfx") else None
    return Gpu(
        name=row["name"], total_bytes=total, free_bytes=total - idle_bytes(total),
        used_bytes=idle_bytes(total), capability=capability,  # type: ignore[arg-type]
        architecture=numbers if capability is None else "", platform="rocm" if capability is None else "cuda",
        bandwidth=row["bandwidth_gb_s"] * 1e9, rates={k: v * 1e12 for k, v in row["tflops"].items()},
        link=row["link"], kind=row["kind"], note=part.note,
        sources={
            **({"memory": "user"} if total_bytes else memory_sources), "bandwidth": _cited(row, "bandwidth"),
            "capability": _cited(row, "capability"), **_rate_sources(row),
        },
    )  # fmt: skip


def idle_bytes(total_bytes: int) -> int:
    """What the driver and the process's own CUDA context hold before vLLM's first look: 0.51 GiB of an idle
    H100's 79.19 in its logs, a third of a GiB on small cards."""
    return int(0.3 * GIB + 0.0027 * total_bytes)


def check_memory(total_bytes: int | None, what: str) -> None:
    """Refuses a memory size that no GPU has.

    Raises:
        UsageError: below 1 GiB or above 64 TiB.
    """
    if total_bytes is not None and not GIB <= total_bytes <= min(2**46, LARGEST):
        meant = f" (did you mean {total_bytes}GiB?)" if 1 <= total_bytes <= 1024 else ""
        raise UsageError(
            f"{what} is {total_bytes} bytes ({format_size(total_bytes)}): a GPU has from 1 GiB to 64 TiB; "
            f"check the unit{meant}"
        )


#: Of a CPU's instruction sets those that decide what a program computes with, by Linux's names.
_TOLD_INSTRUCTIONS = re.compile(r"(avx|amx)\w*|asimd|bf16|i8mm|sve2?")


def cpu_instructions(cpuinfo: str | Path = "/proc/cpuinfo") -> frozenset[str] | None:
    """The vector and matrix instruction sets of the host's CPU, by Linux's names (``avx2``, ``avx512_bf16``,
    ``amx_tile``; ``asimd`` on Arm).

    Args:
        cpuinfo: the kernel's table of processors; the first one's flags count.

    Returns:
        None where the system has no such table, or one without flags.
    """
    try:
        text = Path(cpuinfo).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    flags = re.search(r"^(?:flags|Features)[ \t]*:(.*)$", text, re.MULTILINE)
    if flags is None:
        return None
    return frozenset(filter(_TOLD_INSTRUCTIONS.fullmatch, flags[1].split()))


def cpu_device(total_bytes: int | None = None) -> Gpu:
    """The host's CPU as the device: what vLLM's CPU build would have. Needs psutil unless the memory is
    given."""
    if total_bytes is None:
        import psutil

        memory = psutil.virtual_memory()
        total, free = memory.total, memory.available
    else:
        total = free = total_bytes
    return Gpu(
        name="CPU", total_bytes=total, free_bytes=free, used_bytes=total - free, platform="cpu", link="none",
        kind="cpu", instructions=cpu_instructions(),
        sources={"memory": "user" if total_bytes else "psutil"},
    )  # fmt: skip


# -- the GPUs here -------------------------------------------------------------------------------------------


def detect(
    nvml: Any = None, environment: Mapping[str, str] | None = None, path: str | Path = "."
) -> Detection:
    """The GPUs that a process started now would see, and the host.

    Args:
        nvml: the NVML module, ``pynvml`` unless a test brings its own.
        environment: for ``CUDA_VISIBLE_DEVICES``, ``os.environ`` unless given.
        path: the directory whose disk is measured.

    Raises:
        UsageError: ``CUDA_VISIBLE_DEVICES`` names a device that is not here.
    """
    environment = os.environ if environment is None else environment
    host = _host(path)
    if nvml is None:
        try:
            import pynvml

            nvml = pynvml
        except ImportError:
            return Detection((), host, "no NVIDIA GPU: the nvidia-ml-py package is missing")
    try:
        nvml.nvmlInit()
    except Exception as error:
        if type(error).__name__.startswith("NVMLError"):
            return Detection((), host, f"no NVIDIA GPU: {error}")
        raise
    try:
        gpus = _read_all(nvml)
    finally:
        nvml.nvmlShutdown()
    visible, note = _visible(gpus, environment.get("CUDA_VISIBLE_DEVICES"))
    return Detection(tuple(_with_torch(g, i) for i, g in enumerate(visible)), host, note)


def _host(path: str | Path) -> Host:
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(path)
    return Host(memory.total, memory.available, disk.total, disk.free, os.cpu_count() or 1)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _ask(nvml: Any, function: str, *arguments: Any, default: Any = None) -> Any:
    """One NVML question; parts and drivers that do not answer it give the default."""
    ask = getattr(nvml, function, None)
    if ask is None:
        return default
    try:
        return ask(*arguments)
    except Exception as error:
        if type(error).__name__.startswith("NVMLError"):
            return default
        raise


def _read_all(nvml: Any) -> list[Gpu]:
    driver = _text(_ask(nvml, "nvmlSystemGetDriverVersion", default=""))
    gpus: list[Gpu] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = _ask(nvml, "nvmlDeviceGetHandleByIndex", index)
        if handle is None:  # fallen off the bus, or no permission
            continue
        whole = _read_one(nvml, handle, index, driver)
        mode = _ask(nvml, "nvmlDeviceGetMigMode", handle, default=(0, 0))
        slices = []
        if mode and mode[0]:
            for number in range(_ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle, default=0)):
                part = _ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
                if part is not None:
                    slices.append(_read_slice(nvml, part, whole, number))
        gpus.extend(slices or [whole])
    return gpus


def _read_one(nvml: Any, handle: Any, index: int, driver: str) -> Gpu:
    name = _text(nvml.nvmlDeviceGetName(handle))
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = _ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle)
    row = named_row(name)
    bandwidth = 0.0
    sources = {"memory": "nvml", "capability": "nvml"}
    if row:
        bandwidth = row["bandwidth_gb_s"] * 1e9
        sources |= {"bandwidth": _cited(row, "bandwidth"), **_rate_sources(row)}
    else:
        width = _ask(nvml, "nvmlDeviceGetMemoryBusWidth", handle, default=0)
        clock = _ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, getattr(nvml, "NVML_CLOCK_MEM", 2), default=0)
        if width and clock:  # double data rate: two transfers a clock
            bandwidth, sources["bandwidth"] = 2 * clock * 1e6 * width / 8, "nvml (bus width and memory clock)"
    return Gpu(
        name=name, total_bytes=int(memory.total), free_bytes=int(memory.free),
        used_bytes=int(memory.total) - int(memory.free),
        capability=tuple(capability) if capability else None, bandwidth=bandwidth,
        rates={k: v * 1e12 for k, v in row["tflops"].items()} if row else {},
        link=row["link"] if row else "pcie",
        kind=row["kind"] if row else "", index=index,
        uuid=_text(_ask(nvml, "nvmlDeviceGetUUID", handle, default="")), driver=driver,
        processes=_processes(nvml, handle), health=read_health(partial(_ask, nvml), handle), sources=sources,
    )  # fmt: skip


def _read_slice(nvml: Any, handle: Any, whole: Gpu, number: int) -> Gpu:
    """A MIG slice: its own memory; bandwidth and rates in proportion to it."""
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    share = memory.total / whole.total_bytes
    return replace(
        whole, total_bytes=int(memory.total), free_bytes=int(memory.free),
        used_bytes=int(memory.total) - int(memory.free),
        bandwidth=whole.bandwidth * share, rates={k: v * share for k, v in whole.rates.items()}, link="pcie",
        uuid=_text(_ask(nvml, "nvmlDeviceGetUUID", handle, default="")), processes=_processes(nvml, handle),
        mig=f"slice {number} of GPU {whole.index}", sources={**whole.sources, "bandwidth": "share of the "
            "whole GPU's, by memory"},
    )  # fmt: skip


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    processes = {}
    for question in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        for process in _ask(nvml, question, handle, default=None) or ():
            name = _ask(nvml, "nvmlSystemGetProcessName", process.pid, default="")
            processes[process.pid] = GpuProcess(process.pid, _text(name), int(process.usedGpuMemory or 0))
    return tuple(sorted(processes.values(), key=lambda p: -p.used_bytes))


def _visible(gpus: Sequence[Gpu], variable: str | None) -> tuple[list[Gpu], str]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, in its order. As in CUDA, the list ends at the first
    entry that names nothing; unlike in CUDA that is an error here, because a silent end costs an afternoon.
    """
    if variable is None:
        return list(gpus), "" if gpus else "the driver is here, but no GPU"
    entries = [e.strip() for e in variable.split(",") if e.strip()]
    if not entries or entries[0] in ("-1", "NoDevFiles"):
        return [], f"CUDA_VISIBLE_DEVICES is {variable!r}: all GPUs are hidden"
    chosen = []
    for entry in entries:
        if entry == "-1":
            break
        by_number = [g for g in gpus if entry.isdigit() and g.index == int(entry)]
        by_uuid = [g for g in gpus if not entry.isdigit() and g.uuid and g.uuid.startswith(entry)]
        match = by_number[:1] or by_uuid
        if len(match) != 1:
            known = ", ".join(f"{g.index} ({g.uuid or g.name})" for g in gpus) or "none"
            rule = "matches several GPUs" if match else "matches no GPU"
            raise UsageError(f"CUDA_VISIBLE_DEVICES is {variable!r}: {entry!r} {rule}. Here: {known}")
        if match[0] not in chosen:
            chosen.append(match[0])
    hidden = len(gpus) - len(chosen)
    return chosen, f"{hidden} more hidden by CUDA_VISIBLE_DEVICES" if hidden else ""


def _with_torch(gpu: Gpu, ordinal: int) -> Gpu:
    """Adds what this process's torch holds, if this process already uses torch on a GPU; never imports it."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized() or ordinal >= cuda.device_count():
        return gpu
    return replace(
        gpu,
        torch_allocated_bytes=int(cuda.memory_allocated(ordinal)),
        torch_reserved_bytes=int(cuda.memory_reserved(ordinal)),
    )


def resolve_gpus(
    name: str | None = None, count: int | None = None, total_bytes: int | None = None, nvml: Any = None
) -> list[Gpu]:
    """The GPUs to plan for: ``count`` of the named part, or those here; where there are none, ``count`` of
    ``total_bytes`` each, of which nothing else is known.

    Raises:
        UsageError: unknown name; a count beyond what is here, or another than the name's; neither name nor
            memory was given and there is no GPU.
    """
    if count is not None and not 1 <= count <= MOST:
        raise UsageError(f"--gpu-count is {count}: must be from 1 to {MOST}")
    if name:
        gpus = named_gpus(name, total_bytes, count)
        if gpus[0].platform == "cpu" and len(gpus) > 1:
            raise UsageError(
                f"--gpu-count is {len(gpus)}: --gpu cpu is the whole machine: leave --gpu-count out"
            )
        return gpus
    here = detect(nvml)
    if total_bytes is not None:
        check_memory(total_bytes, "--gpu-memory")
        if not here.gpus:
            return [replace(unnamed_gpu(total_bytes), index=i) for i in range(count or 1)]
        return [
            replace(g, total_bytes=total_bytes, free_bytes=min(g.free_bytes, total_bytes))
            for g in here.gpus[: count or None]
        ]
    if not here.gpus:
        raise UsageError(
            f"{here.note}. Name one to plan for (--gpu L40S-48GB; `quant detect --gpu list` shows all), give "
            "its memory alone (--gpu-memory 24GiB), or --gpu cpu"
        )
    if count and count > len(here.gpus):
        raise UsageError(
            f"--gpu-count is {count}, but {len(here.gpus)} here: name the part with --gpu to plan for more"
        )
    return list(here.gpus[: count or None])


def unnamed_gpu(total_bytes: int) -> Gpu:
    """A GPU of which the memory alone is known: no capability, no speed."""
    return Gpu(
        name="unnamed GPU", total_bytes=total_bytes,
        free_bytes=total_bytes - idle_bytes(total_bytes), used_bytes=idle_bytes(total_bytes), kind=UNNAMED,
        sources={"memory": "user"},
    )  # fmt: skip
