"""GPUs through a fake NVML, named GPUs through the table."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quant.data import load_json
from quant.errors import UsageError
from quant.hardware import cpu_device, cpu_instructions, detect, gpu_names, named_gpu, resolve_gpus
from quant.health import Health
from quant.vllm.kernels import formats_of, has_fp8_cache, latent_block, number_formats, state_width

GIB = 2**30


class NVMLError(Exception):
    """Named as the real module's: what matters is the name."""


class NVMLError_NotSupported(NVMLError):
    pass


class FakeNvml:
    """A machine with the given boards. A board: name, total and used GiB, capability, optional MIG slices in
    GiB, processes."""

    NVML_CLOCK_MEM = 2

    def __init__(self, *boards: dict[str, Any], broken: bool = False):
        self.boards, self.broken, self.open = boards, broken, False

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("Driver Not Loaded")
        self.open = True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if self.boards[index].get("lost"):
            raise NVMLError("GPU is lost")
        return self.boards[index]

    def nvmlDeviceGetName(self, board: dict[str, Any]) -> str:
        return board["name"]

    def nvmlDeviceGetMemoryInfo(self, board: dict[str, Any]) -> SimpleNamespace:
        total, used = int(board["total"] * GIB), int(board.get("used", 0) * GIB)
        return SimpleNamespace(total=total, used=used, free=total - used)

    def nvmlDeviceGetCudaComputeCapability(self, board: dict[str, Any]) -> tuple[int, int]:
        return board.get("capability", (8, 0))

    def nvmlDeviceGetUUID(self, board: dict[str, Any]) -> str:
        return board.get("uuid", "")

    def nvmlDeviceGetMemoryBusWidth(self, board: dict[str, Any]) -> int:
        return 384

    def nvmlDeviceGetMaxClockInfo(self, board: dict[str, Any], kind: int) -> int:
        return 10000

    def nvmlDeviceGetMigMode(self, board: dict[str, Any]) -> tuple[int, int]:
        if "slices" not in board:
            raise NVMLError_NotSupported("Not Supported")
        return (1, 1)

    def nvmlDeviceGetMaxMigDeviceCount(self, board: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, board: dict[str, Any], number: int) -> dict[str, Any]:
        if number >= len(board["slices"]):
            raise NVMLError("Not QuantizedLayers")
        return {"name": board["name"], "total": board["slices"][number], "uuid": f"MIG-{number}"}

    def nvmlDeviceGetComputeRunningProcesses(self, board: dict[str, Any]) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=p, usedGpuMemory=int(g * GIB)) for p, g in board.get("processes", ())]

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        if pid == 13:
            raise NVMLError("No Permission")
        return f"/usr/bin/p{pid}"

    def nvmlDeviceGetTemperature(self, board: dict[str, Any], sensor: int) -> int:
        return board["temperature"] if sensor == 0 and "temperature" in board else self._untold()

    def nvmlDeviceGetTemperatureThreshold(self, board: dict[str, Any], kind: int) -> int:
        return board["slowdown"] if kind == 1 and "slowdown" in board else self._untold()

    def nvmlDeviceGetPowerUsage(self, board: dict[str, Any]) -> int:
        return board["power"] if "power" in board else self._untold()

    def nvmlDeviceGetEnforcedPowerLimit(self, board: dict[str, Any]) -> int:
        return 700_000 if "power" in board else self._untold()

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, board: dict[str, Any]) -> int:
        return board["reasons"] if "reasons" in board else self._untold()

    def _untold(self) -> int:
        raise NVMLError_NotSupported("Not Supported")


H100 = {"name": "NVIDIA H100 80GB HBM3", "total": 79.6, "used": 3, "capability": (9, 0), "uuid": "GPU-aa11"}
L40S = {"name": "NVIDIA L40S", "total": 44.9, "capability": (8, 9), "uuid": "GPU-bb22"}
UNKNOWN = {"name": "NVIDIA Prototype", "total": 24, "capability": (8, 6), "uuid": "GPU-cc33"}


def test_every_gpu_is_listed_with_memory_capability_bandwidth_and_driver() -> None:
    found = detect(FakeNvml(H100, L40S), environment={})
    first, second = found.gpus
    assert (first.name, first.capability, first.driver) == (H100["name"], (9, 0), "580.65")
    assert first.used_bytes == 3 * GIB and first.free_bytes == first.total_bytes - 3 * GIB
    assert first.bandwidth == 3350e9 and second.bandwidth == 864e9
    assert (
        first.sources["memory"] == first.sources["capability"] == "nvml"
        and "https://" in first.sources["bandwidth"]
    )
    assert formats_of(first)["fp8"] == "native" and formats_of(first)["nvfp4"] == "weight-only"
    assert found.host.ram_total_bytes > 0 and found.host.disk_free_bytes > 0 and not found.note


def test_a_part_that_the_table_lacks_gets_its_bandwidth_from_bus_and_clock() -> None:
    (gpu,) = detect(FakeNvml(UNKNOWN), environment={}).gpus
    assert gpu.bandwidth == 2 * 10000e6 * 384 / 8
    assert "nvml" in gpu.sources["bandwidth"]


def test_processes_are_listed_largest_first_even_where_their_names_are_hidden() -> None:
    (gpu,) = detect(FakeNvml({**H100, "processes": [(7, 1), (13, 2)]}), environment={}).gpus
    assert [(p.pid, p.name) for p in gpu.processes] == [(13, ""), (7, "/usr/bin/p7")]


def test_mig_slices_take_the_place_of_their_gpu_with_their_share_of_bandwidth() -> None:
    found = detect(FakeNvml({**H100, "slices": [19.9, 39.8]}), environment={}).gpus
    assert [round(g.total_bytes / GIB, 1) for g in found] == [19.9, 39.8]
    assert found[1].bandwidth == pytest.approx(3350e9 / 2)
    assert found[0].mig == "slice 0 of GPU 0"


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        ("1", ["NVIDIA L40S"]),
        ("1,0", ["NVIDIA L40S", "NVIDIA H100 80GB HBM3"]),
        ("GPU-bb", ["NVIDIA L40S"]),
        ("-1", []),
        ("", []),
        ("0,-1,1", [H100["name"]]),
    ],
)
def test_cuda_visible_devices_is_honoured(variable: str, names: list[str]) -> None:
    found = detect(FakeNvml(H100, L40S), environment={"CUDA_VISIBLE_DEVICES": variable})
    assert [g.name for g in found.gpus] == names
    assert bool(found.note) is (len(names) < 2)


@pytest.mark.parametrize("variable", ["7", "GPU-zz", "GPU-"])
def test_a_visible_device_that_is_not_here_is_refused(variable: str) -> None:
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES"):
        detect(FakeNvml(H100, L40S), environment={"CUDA_VISIBLE_DEVICES": variable})


def test_without_a_driver_the_reason_is_told_and_a_lost_gpu_is_left_out() -> None:
    assert detect(FakeNvml(broken=True), environment={}).note == "no NVIDIA GPU: Driver Not Loaded"
    assert [g.name for g in detect(FakeNvml({**H100, "lost": True}, L40S), environment={}).gpus] == [
        "NVIDIA L40S"
    ]


def test_nvml_is_shut_down_after_the_look() -> None:
    nvml = FakeNvml(L40S)
    detect(nvml, environment={})
    assert not nvml.open


def test_torch_figures_are_added_only_where_this_process_already_uses_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 1,
        memory_allocated=lambda i: 5,
        memory_reserved=lambda i: 8,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    first, second = detect(FakeNvml(H100, L40S), environment={}).gpus
    assert (first.torch_allocated_bytes, first.torch_reserved_bytes) == (5, 8)
    assert second.torch_allocated_bytes is None


FORMATS = ("fp16", "int8", "fp8", "fp4")
FACTS = {"memory", "reported", "bandwidth", "capability", *FORMATS}
TABLE = load_json("gpus.json")
each_part = pytest.mark.parametrize("row", TABLE["gpus"], ids=lambda row: row["name"])


def test_the_table_has_the_parts_people_own() -> None:
    wanted = {
        "T4", "V100-32GB", "A10", "A100-40GB", "A100-80GB", "L4", "L40S-48GB", "H20-96GB", "H100-80GB",
        "H200-141GB", "B200-180GB", "MI300X",
        "RTX-2080", "RTX-3090", "RTX-4090", "RTX-5090", "RTX-A6000", "RTX-6000-Ada", "RTX-3070-Ti-Laptop-8GB",
    }  # fmt: skip
    assert wanted <= set(gpu_names()) and len(gpu_names()) >= 60
    assert {row["kind"] for row in TABLE["gpus"]} == {"datacenter", "workstation", "laptop", "consumer"}
    assert named_gpu("RTX 3070 Ti Laptop 8 GB").kind == "laptop"


def test_every_source_says_what_it_is_and_is_used() -> None:
    for name, source in TABLE["sources"].items():
        assert set(source) == {"address", "what", "version"} and all(source.values()), name
        assert source["address"].startswith(("https://", "a file of a public repository")), name
    assert {i for row in TABLE["gpus"] for ids in row["sources"].values() for i in ids} == set(
        TABLE["sources"]
    )


@each_part
def test_every_fact_of_a_part_names_its_documents(row: dict[str, Any]) -> None:
    assert set(row["sources"]) == FACTS and set(row["tflops"]) == set(FORMATS)
    assert all(row["sources"][fact] for fact in ("memory", "bandwidth", "capability")), (
        "a part without these is not worth a row"
    )
    assert row["reported_gib"] or not row["sources"]["reported"]


def test_what_is_unchecked_is_little() -> None:
    row_of = {row["name"]: row for row in TABLE["gpus"]}
    unchecked = [
        (row["name"], fact) for row in TABLE["gpus"] for fact, ids in row["sources"].items() if not ids
    ]
    rates = sorted({name for name, fact in unchecked if fact != "reported"})
    assert rates == ["A10G", "DGX-Spark-GB10", "GTX-1660-Super", "RX-7900-XTX"]
    assert all(fact != "reported" or row_of[name]["reported_gib"] is None for name, fact in unchecked), (
        "an unseen total is estimated, not entered"
    )
    assert len([x for x in unchecked if x[1] != "reported"]) <= 8


@each_part
def test_a_total_that_was_not_seen_is_estimated_like_a_part_that_was(row: dict[str, Any]) -> None:
    if row["reported_gib"] is None:
        other = next(x for x in TABLE["gpus"] if x["name"] == row["memory_like"])
        assert other["reported_gib"] and other["sources"]["reported"] and other["kind"] == row["kind"]
        found = named_gpu(row["name"])
        assert found.total_bytes / row["memory_gib"] == pytest.approx(
            other["reported_gib"] * 2**30 / other["memory_gib"], rel=1e-6
        )
        assert found.sources["memory"].startswith("estimated") and other["name"] in found.sources["memory"]
    else:
        assert "memory_like" not in row


@each_part
def test_the_facts_of_a_part_fit_together(row: dict[str, Any]) -> None:
    rates, number = row["tflops"], row["capability"]
    assert 4 <= row["memory_gib"] <= 512 and 150 <= row["bandwidth_gb_s"] <= 8000
    if row["reported_gib"]:  # ECC within GDDR takes a sixteenth, the driver the rest
        assert 0.91 <= row["reported_gib"] / row["memory_gib"] <= 1
    assert 0 < rates["fp16"] and rates["int8"] < 5 * rates["fp16"] and rates["fp4"] <= 8.1 * rates["fp16"]
    assert 10 <= rates["fp16"] * 1000 / row["bandwidth_gb_s"] <= 500, "operations a byte"
    if number.startswith("gfx"):
        assert bool(rates["fp8"]) is (number in ("gfx942", "gfx950")) and bool(rates["fp4"]) is (
            number == "gfx950"
        )
        return
    level = tuple(map(int, number.split(".")))
    assert bool(rates["fp8"]) is (level >= (8, 9)) and bool(rates["fp4"]) is (level >= (10, 0))
    assert bool(rates["int8"]) is (level >= (7, 5))
    assert rates["fp8"] in (0, pytest.approx(2 * rates["fp16"], rel=0.02)), (
        "8 bits run at twice the rate of 16 on every part"
    )


def test_a_named_part_says_where_each_fact_came_from() -> None:
    found = named_gpu("L40S").to_dict()["sources"]
    assert set(found) == {"memory", "nominal_memory", "bandwidth", "capability", *FORMATS}
    assert all("https://" in text for text in found.values())
    assert (
        named_gpu("A10G").sources["int8"] == "unchecked" and "http" in named_gpu("A10G").sources["bandwidth"]
    )
    assert named_gpu("GH200-144GB").sources["memory"].startswith("estimated")
    given = named_gpu("L40S", 20 * GIB).sources
    assert given["memory"] == "user" and "nominal_memory" not in given


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("l40s", "L40S-48GB"), ("NVIDIA GeForce RTX 4090", "RTX-4090"), ("A100-SXM4-40GB", "A100-40GB"),
        ("H100", "H100-80GB"),
        ("rtx 4060 ti 16gb", "RTX-4060-Ti-16GB"), ("NVIDIA H20", "H20-96GB"), ("Tesla T4", "T4"),
        ("amd instinct mi300x", "MI300X"),
        ("B200-192GB", "B200-180GB"), ("NVIDIA GB200", "GB200-186GB"),
        ("NVIDIA GH200 144G HBM3e", "GH200-141GB"), ("RTX4090-24GB", "RTX-4090"), ("T4-16GB", "T4"),
        ("4090", "RTX-4090"), ("3090 Ti", "RTX-3090-Ti"), ("4070TiSuper", "RTX-4070-Ti-Super"),
        ("DGX Spark", "DGX-Spark-GB10"), ("2xL4", "L4"), ("A100 40GB", "A100-40GB"),
        ("a100_40gb", "A100-40GB"), ("h100-sxm", "H100-80GB"), ("RTX PRO 6000", "RTX-PRO-6000-Blackwell"),
        ("4090 laptop", "RTX-4090-Laptop-16GB"), ("L40S-44GB", "L40S-48GB"), ("A100-40", "A100-40GB"),
        ("7900 XTX", "RX-7900-XTX"), ("6000 Ada", "RTX-6000-Ada"), ("H100:8", "H100-80GB"),
        ("V100S", "V100S-32GB"), ("v100s-pcie-32gb", "V100S-32GB"), ("V100", "V100-32GB"),
        ("4090D", "RTX-4090-D"), ("RTX 4090 D", "RTX-4090-D"), ("h100 pcie 80g", "H100-80GB-PCIe"),
        ("nvidia a100-sxm4-40gb", "A100-40GB"), ("A800 80GB PCIe", "A800-80GB-PCIe"),
        ("3080 12GB", "RTX-3080-12GB"), ("3080", "RTX-3080"), ("Titan RTX", "TITAN-RTX"),
        ("RTX PRO 4000", "RTX-PRO-4000-Blackwell"), ("RTX PRO 5000", "RTX-PRO-5000-Blackwell-48GB"),
        ("RTXPRO6000", "RTX-PRO-6000-Blackwell"), ("RTX PRO 5000 72GB", "RTX-PRO-5000-Blackwell-72GB"),
        ("RTX PRO 6000 Max-Q", "RTX-PRO-6000-Blackwell-Max-Q"), ("H200-NVL", "H200-NVL-141GB"),
        ("H200NVL", "H200-NVL-141GB"), ("5060 Ti 8GB", "RTX-5060-Ti-8GB"), ("RTX 5050", "RTX-5050"),
        ("3050", "RTX-3050"), ("RTX 2000 Ada", "RTX-2000-Ada"),
        ("2070 Super", "RTX-2070-Super"),
        ("RTX PRO 4500", "RTX-PRO-4500-Blackwell"), ("RTX 4500 Ada", "RTX-4500-Ada"), ("MI350X", "MI350X"),
    ],
)  # fmt: skip
def test_names_are_found_however_they_are_written(written: str, meant: str) -> None:
    assert named_gpu(written).name == meant


def test_every_name_and_alias_of_the_table_leads_to_its_own_row() -> None:
    for row in load_json("gpus.json")["gpus"]:
        for name in (row["name"], *row["aliases"]):
            assert named_gpu(name).name == row["name"], name


@pytest.mark.parametrize(
    ("written", "count", "name"),
    [
        ("2xL4", 2, "L4"), ("2 x H100", 2, "H100-80GB"), ("8 H100", 8, "H100-80GB"),
        ("H200x8", 8, "H200-141GB"),
        ("4*A100-80GB", 4, "A100-80GB"), ("2x 3090", 2, "RTX-3090"), ("RX 7900 XTX", 1, "RX-7900-XTX"),
        ("L4:2", 2, "L4"), ("8xA100 40GB", 8, "A100-40GB"),
    ],
)  # fmt: skip
def test_a_name_may_say_how_many(written: str, count: int, name: str) -> None:
    assert [g.name for g in resolve_gpus(written)] == [name] * count
    assert [g.index for g in resolve_gpus(written)] == list(range(count))


def test_a_number_that_another_option_contradicts_is_refused() -> None:
    assert len(resolve_gpus("2xL4", 2)) == 2
    with pytest.raises(UsageError, match="--gpu 2xL4 is 2 GPUs, and 4 are asked for"):
        resolve_gpus("2xL4", 4)


@pytest.mark.parametrize(
    ("written", "taken", "others"),
    [
        ("A100", "A100-80GB", "A100-40GB"),
        ("4060 Ti", "RTX-4060-Ti-8GB", "RTX-4060-Ti-16GB"),
        ("RTX 6000", "Quadro-RTX-6000", "RTX-6000-Ada"),
        ("A100-80GB", "A100-80GB", ""),
        ("H100 SXM", "H100-80GB", ""),
        ("4090", "RTX-4090", ""),
    ],
)
def test_a_name_of_several_parts_says_which_it_took(written: str, taken: str, others: str) -> None:
    gpu = named_gpu(written)
    assert gpu.name == taken
    assert (f"is taken as {taken}" in gpu.note and others in gpu.note) if others else not gpu.note


@pytest.mark.parametrize("written", ["4090 48GB", "RTX 4090 E", "RTX 4070 Ti Max", "RTX", "24GB", "", "xtx"])
def test_a_name_that_says_more_than_the_table_knows_is_no_part(written: str) -> None:
    with pytest.raises(UsageError, match="--gpu-memory"):
        named_gpu(written)


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("RTX 4099", "RTX-4090"), ("V100X", "V100-16GB, V100-32GB"), ("MI300A", "MI300X"),
        ("RTX 4050", "RTX-4050-Laptop-6GB"), ("RX 7900 XT", "RX-7900-XTX"), ("RTX 3090 Super", "RTX-3090-Ti"),
        ("5090D", "RTX-5090"),
    ],
)  # fmt: skip
def test_an_unknown_gpu_offers_the_nearest_names(written: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"'{written}': not in the table; nearest: {nearest}"):
        named_gpu(written)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("Jetson AGX Orin 64GB", "Jetson"), ("Jetson Thor", "Jetson"), ("Arc B580", "Intel"),
        ("arc-a770", "Intel"), ("Gaudi 3", "Intel"), ("2xGaudi2", "Intel"), ("TPU v5e", "plugin"),
        ("M3 Max", "Apple"), ("Apple M4 Pro", "Apple"), ("Ascend 910B", "plugin"),
        ("Strix Halo", "host's memory"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_says_why_and_how_to_plan_its_memory(written: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"{why}.*--gpu-memory SIZE without --gpu") as raised:
        named_gpu(written)
    assert "nearest" not in str(raised.value)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("P100", "compute capability below 7.0"), ("GTX 1080 Ti", "compute capability below 7.0"),
        ("1080ti", "compute capability below 7.0"), ("A100 3g.40gb", "--gpu A100-80GB --gpu-memory 40GiB"),
    ],
)  # fmt: skip
def test_no_plan_of_its_memory_is_offered_where_that_would_not_run(written: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as raised:
        named_gpu(written)
    assert "without --gpu" not in str(raised.value)


def test_nothing_that_the_table_has_is_said_to_be_elsewhere() -> None:
    from quant.parts import _elsewhere

    assert [n for row in TABLE["gpus"] for n in (row["name"], *row["aliases"]) if _elsewhere(n)] == []


@pytest.mark.parametrize("size", [-1, 0, 10**30, 2**20])
def test_absurd_memory_sizes_are_refused(size: int) -> None:
    with pytest.raises(UsageError, match="--gpu-memory"):
        named_gpu("L40S", size)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), {"fp16": "native", "bf16": "no", "fp8": "no", "int4-weights": "no"}),
        ((7, 5), {"int8": "native", "fp8": "weight-only", "int4-weights": "weight-only"}),
        ((8, 9), {"fp8": "native", "nvfp4": "weight-only"}),
        ((10, 0), {"nvfp4": "native", "mxfp4": "native", "int8": "no"}),
        ((12, 0), {"nvfp4": "native", "int8": "no"}),
    ],
)
def test_number_formats_follow_the_compute_capability(
    capability: tuple[int, int], expected: dict[str, str]
) -> None:
    formats = number_formats("cuda", capability)
    assert {k: formats[k] for k in expected} == expected


def test_rocm_and_cpu_have_their_own_formats() -> None:
    assert (
        formats_of(named_gpu("MI300X"))["fp8"] == "native" and formats_of(named_gpu("MI210"))["fp8"] == "no"
    )
    assert formats_of(cpu_device(64 * GIB))["int8-weights"] == "no"


#: Flags as Linux tells them of an EPYC 7763, an EPYC 9654, a Xeon of Cascade Lake, a Core i5-12600, a Xeon of
#: Sapphire Rapids and a Graviton 3.
ZEN3 = "fpu sse4_2 avx avx2 fma"
ZEN4 = f"{ZEN3} avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vnni"
CASCADE = f"{ZEN3} avx512f avx512dq avx512bw avx512vl avx512_vnni"
ALDER = f"{ZEN3} avx_vnni"
SAPPHIRE = f"{ZEN4} avx_vnni amx_bf16 amx_tile amx_int8"
GRAVITON = "fp asimd sve bf16 i8mm"


@pytest.mark.parametrize(
    ("flags", "int4", "int8", "fp8_cache", "state", "latent"),
    [
        (ZEN3, "no", "no", False, 0, 16),
        (ZEN4, "weight-only", "native", True, 4, 16),
        (CASCADE, "weight-only", "native", True, 0, 16),
        (ALDER, "no", "native", False, 0, 16),
        (SAPPHIRE, "weight-only", "native", True, 4, 128),
        (GRAVITON, "weight-only", "native", False, 0, 16),
        (None, "weight-only", "native", True, 4, 16),
    ],
    ids=["zen3", "zen4", "cascade-lake", "alder-lake", "sapphire-rapids", "graviton3", "unknown"],
)
def test_a_cpu_has_the_kernels_of_its_instruction_sets(
    tmp_path: Path, flags: str | None, int4: str, int8: str, fp8_cache: bool, state: int, latent: int
) -> None:
    table = tmp_path / "cpuinfo"
    if flags is not None:
        name = "Features" if "asimd" in flags else "flags"
        lines = ["processor\t: 0", f"{name}\t\t: {flags}", "bugs\t\t: avx512_bf16", "flags : amx_tile"]
        table.write_text("\n".join(lines))
    cpu = replace(cpu_device(64 * GIB), instructions=cpu_instructions(table))
    formats = formats_of(cpu)
    assert (formats["int4-weights"], formats["int8"]) == (int4, int8)
    assert formats["bf16"] == "native" and formats["fp8"] == "weight-only"
    assert (has_fp8_cache(cpu), state_width(cpu), latent_block(cpu)) == (fp8_cache, state, latent)


def test_the_host_tells_its_own_instruction_sets() -> None:
    here = cpu_device(64 * GIB).to_dict()["instructions"]
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("no /proc/cpuinfo on this system")
    torch = pytest.importorskip("torch")
    assert ("avx512_vnni" in here) == torch.cpu._is_vnni_supported()
    assert ("avx2" in here) == torch.cpu._is_avx2_supported()


def test_planning_without_a_gpu_asks_for_a_name() -> None:
    with pytest.raises(UsageError, match="--gpu L40S-48GB"):
        resolve_gpus(nvml=FakeNvml(broken=True))
    with pytest.raises(UsageError, match="--gpu-count is 3"):
        resolve_gpus(count=3, nvml=FakeNvml(H100, H100))
    assert len(resolve_gpus("L40S", 4)) == 4


def test_neither_torch_nor_transformers_is_imported() -> None:
    heavy = ("torch", "transformers", "rich", "yaml", "pydantic")
    program = (
        f"import json, sys, quant.hardware as h; h.detect(); print(json.dumps([m for m in {heavy} if "
        "m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_health_is_what_the_driver_tells_and_heat_and_throttling_are_warned_of() -> None:
    told = {"temperature": 84, "slowdown": 87, "power": 651_300, "reasons": 0x1 | 0x4 | 0x40}
    hot, silent, cool = detect(
        FakeNvml({**H100, **told}, L40S, {**L40S, "temperature": 84, "reasons": 0x1}), environment={}
    ).gpus
    assert hot.health == Health(84, 87, 651.3, 700.0, ("the power limit", "heat (the hardware)"))
    assert hot.to_dict()["health"]["throttled_by"] == ["the power limit", "heat (the hardware)"]
    heat, clocks = hot.health.warnings()
    assert "84 °C is hot (from 82, it slows down at 87)" in heat and "the power limit and heat" in clocks
    assert silent.health is None and named_gpu("L40S").health is None
    # without a threshold of the driver's the margin is fixed, and one that is asked for goes before both
    assert cool.health is not None and cool.health.warnings() == [] and cool.health.throttled_by == ()
    assert "from 80" in cool.health.warnings(80)[0] and len(hot.health.warnings(90)) == 1
