"""Jobs on this machine: as many at once as memory and GPUs have room for by the jobs' own forecasts."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from quant.batch.attempt import GRACE, Outcome, work
from quant.batch.forecast import Forecast
from quant.batch.ledger import Ledger
from quant.batch.manifest import Job
from quant.hardware import Gpu
from quant.units import format_size


@dataclass(eq=False)
class Device:
    """A GPU: how a process names it to see it alone, and the bytes of it that jobs may take together."""

    name: str
    budget: int
    taken: int = 0
    jobs: int = 0


@dataclass(frozen=True)
class Slot:
    """What a job was given: bytes, and a GPU with its bytes, to be given back."""

    memory: int
    device: Device | None = None
    gpu: int = 0
    alone: bool = False


@dataclass
class Slots:
    """The room of a machine.

    Attributes:
        memory: bytes that jobs may take together.
        devices: the GPUs.
        most: jobs at once.
    """

    memory: int
    devices: list[Device] = field(default_factory=list)
    most: int = 1
    taken: int = 0
    slots: list[Slot] = field(default_factory=list)

    def never(self, job: Job, forecast: Forecast) -> str:
        """Why a job has no room even with nothing beside it; empty where it has."""
        if forecast.memory_bytes > self.memory:
            return (
                f"needs about {format_size(forecast.memory_bytes)} of memory, jobs may take "
                f"{format_size(self.memory)} together: raise --max-memory, or use fewer samples"
            )
        devices = self._devices(job)
        if devices and forecast.gpu_bytes > (most := max(d.budget for d in devices)):
            return (
                f"needs about {format_size(forecast.gpu_bytes)} of GPU memory, jobs may take "
                f"{format_size(most)}: use fewer samples, or device: cpu"
            )
        return ""

    def _devices(self, job: Job) -> list[Device]:
        """The GPUs that a job may have: those of its ``device``, all where it names none."""
        device = str(job.values.get("device") or ("cuda" if self.devices else "cpu"))
        kind, _, number = device.partition(":")
        if kind != "cuda":
            return []
        chosen = int(number) if number.isdigit() else None
        return self.devices if chosen is None else self.devices[chosen : chosen + 1]

    def take(self, job: Job, forecast: Forecast, share: float = 1.0) -> Slot | None:
        """Room for a job, or None for now. A job of unknown needs gets all there is.

        Args:
            share: of the forecast that is set aside; more than 1 after an attempt that memory was too short
                for.
        """
        if len(self.slots) >= self.most or any(s.alone for s in self.slots):
            return None
        if not forecast.known and self.slots:
            return None
        memory = min(int(forecast.memory_bytes * share), self.memory) if forecast.known else self.memory
        if self.taken + memory > self.memory:
            return None
        device, gpu = (
            None,
            min(int(forecast.gpu_bytes * share), max((d.budget for d in self.devices), default=0)),
        )
        if devices := self._devices(job):
            free = [d for d in devices if d.taken + min(gpu, d.budget) <= d.budget]
            if not free:
                return None
            device = min(free, key=lambda d: (d.jobs, d.taken))  # the idlest one
            gpu = min(gpu, device.budget) if forecast.known else device.budget
            device.taken += gpu
            device.jobs += 1
        slot = Slot(memory, device, gpu, not forecast.known)
        self.taken += memory
        self.slots.append(slot)
        return slot

    def give(self, slot: Slot) -> None:
        """Takes a job's room back."""
        self.slots.remove(slot)
        self.taken -= slot.memory
        if slot.device is not None:
            slot.device.taken -= slot.gpu
            slot.device.jobs -= 1


def devices_of(gpus: Sequence[Gpu], most: int | None = None) -> list[Device]:
    """The GPUs that processes may be given, each with what is free of it now.

    Args:
        gpus: those that this process sees.
        most: bytes of each that jobs may take.
    """
    return [
        Device(g.uuid or str(g.index), g.free_bytes if most is None else min(most, g.free_bytes))
        for g in gpus
    ]


class LocalExecutor:
    """Runs each job in a process of this machine, watched by a thread."""

    name = "local"

    def __init__(self, ledger: Ledger, slots: Slots, stop: threading.Event, grace: float = GRACE):
        self.ledger, self.slots, self.stop, self.grace = ledger, slots, stop, grace
        self._ended: SimpleQueue[tuple[str, Outcome]] = SimpleQueue()
        self._threads: dict[str, threading.Thread] = {}
        self._slots: dict[str, Slot] = {}

    def never(self, job: Job, forecast: Forecast) -> str:
        return self.slots.never(job, forecast)

    def start(self, job: Job, forecast: Forecast, attempt: int, retries: int, share: float) -> bool:
        """Starts an attempt where there is room for it."""
        slot = self.slots.take(job, forecast, share)
        if slot is None:
            return False
        self._slots[job.slug] = slot
        changes = _visible(job, slot.device)

        def attempted() -> None:
            try:
                outcome = work(job, self.ledger, attempt, changes, self.stop.is_set, retries, self.grace)
            except Exception as error:  # a fault of ours is this job's, and no reason to stop the others
                outcome = Outcome("failed", f"{type(error).__name__}: {error}")
            self._ended.put((job.slug, outcome))

        thread = threading.Thread(target=attempted, name=job.slug, daemon=True)
        self._threads[job.slug] = thread
        thread.start()
        return True

    def ended(self) -> list[tuple[str, Outcome]]:
        """Attempts that have ended since the last time."""
        found = []
        while not self._ended.empty():
            slug, outcome = self._ended.get()
            self._threads.pop(slug).join()
            self.slots.give(self._slots.pop(slug))
            found.append((slug, outcome))
        return found

    def close(self) -> None:
        """Waits for what still runs; ``stop`` must have been set."""
        for thread in list(self._threads.values()):
            thread.join()


def _visible(job: Job, device: Device | None) -> dict[str, str]:
    """What shows a process its GPU alone; one that names ``cuda:N`` itself sees all."""
    if device is None or ":" in str(job.values.get("device") or ""):
        return {}
    # NVML, which found them, counts by bus; torch would by speed
    return {"CUDA_VISIBLE_DEVICES": device.name, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(threads: int | None) -> int:
    """Threads of a job's process: those that it states, else as OMP_NUM_THREADS says, else all cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return threads or (int(said) if said.isdigit() and int(said) > 0 else _cores())


def default_jobs(threads: int | None, gpus: int) -> int:
    """Jobs at once where nobody says: so many as cores have threads for, and at least one for each GPU.

    Args:
        threads: that a job states.
    """
    return max(1, _cores() // threads_of(threads), gpus)
