"""Jobs on a Ray cluster: attempts are Ray tasks, each with what its dry run asks for.

Workers share the manifest's folders with the caller, and have this package. A task does what a thread of the
local executor does: it takes the job's claim in the ledger and runs its processes. So a worker that is lost,
with its machine or alone, leaves a claim that becomes stale and work that goes on elsewhere, and the logs are
where those of local jobs are. Ray only places tasks: it retries none by itself.
"""

from __future__ import annotations

import os
import signal
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quant
from quant.batch.attempt import Outcome, work
from quant.batch.forecast import Forecast
from quant.batch.ledger import Ledger
from quant.batch.local import threads_of
from quant.batch.manifest import Job
from quant.errors import QuantError, first_line
from quant.units import format_size

#: Tasks that wait in Ray at once: it keeps their order, so that priorities hold.
_MOST = 256


@dataclass(frozen=True)
class Need:
    """What one attempt asks of Ray: cores, GPUs, bytes of memory, and the kind of GPU."""

    cores: int
    gpus: int
    memory: int
    accelerator: str | None = None

    @classmethod
    def of(cls, job: Job, forecast: Forecast, share: float = 1.0) -> Need:
        """A GPU where the dry run used one, or the job names one."""
        on_gpu = forecast.gpu_bytes > 0 or str(job.values.get("device") or "").startswith("cuda")
        return cls(
            threads_of(job.threads),
            int(on_gpu or job.accelerator is not None),
            int(forecast.memory_bytes * share),
            job.accelerator,
        )

    def options(self) -> dict[str, Any]:
        """As a Ray task takes them."""
        return {
            "num_cpus": self.cores,
            "num_gpus": self.gpus,
            "memory": self.memory,
            **({} if self.accelerator is None else {"accelerator_type": self.accelerator}),
            "max_retries": 0,
        }


def _attempted(job: Job, folder: str, attempt: int, retries: int, threads: int, sign: str) -> Outcome:
    """What a task does.

    Args:
        sign: a file whose presence asks to stop.
    """
    with Ledger(Path(folder)) as ledger:
        changes = {"OMP_NUM_THREADS": str(threads)}
        return work(job, ledger, attempt, changes, lambda: os.path.exists(sign), retries)


class RayExecutor:
    """Runs each attempt as a task of a cluster.

    Args:
        address: of a running cluster (``auto``, ``HOST:PORT``, ``ray://…``); None: RAY_ADDRESS, else a
            cluster of this machine that ends with the batch.
        most: tasks at once.

    Raises:
        QuantError: Ray is not installed, or there is no such cluster.
    """

    name = "ray"

    def __init__(
        self, ledger: Ledger, stop: threading.Event, address: str | None = None, most: int | None = None
    ):
        try:
            import ray
        except ImportError as error:
            raise QuantError(
                f"--executor ray needs the package ray ({error}): pip install 'quant[ray]', or use "
                "--executor local"
            ) from error
        self.ray, self.ledger, self.stop, self.most = ray, ledger, stop, most or _MOST
        self._refs: dict[Any, str] = {}
        self._sign = ledger.folder / f".stop-{uuid.uuid4().hex[:8]}"
        root = str(Path(quant.__file__).resolve().parents[1])
        path = os.pathsep.join(dict.fromkeys([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        handlers = _handlers()
        try:
            ray.init(
                address=address, include_dashboard=None if address else False, log_to_driver=False,
                logging_level="error", runtime_env={"env_vars": {"PYTHONPATH": path.strip(os.pathsep)}},
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            where = f"--address {address}" if address else "a cluster of this machine"
            raise QuantError(f"{where}: Ray does not answer: {first_line(error)}") from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray puts its own in their place
        self._task = ray.remote(_attempted)

    def never(self, job: Job, forecast: Forecast) -> str:
        """Why no machine of the cluster as it is now has room for a job."""
        need = Need.of(job, forecast)
        machines = [n["Resources"] for n in self.ray.nodes() if n["Alive"]]
        most = {k: max((m.get(k, 0) for m in machines), default=0) for k in ("CPU", "GPU", "memory")}
        for what, asked, shown in (
            ("CPU", need.cores, f"{need.cores} cores"),
            ("GPU", need.gpus, "a GPU"),
            ("memory", need.memory, f"about {format_size(need.memory)} of memory"),
        ):
            if asked > most[what]:
                has = format_size(most[what]) if what == "memory" else f"{most[what]:g}"
                return f"needs {shown}, the largest machine of the Ray cluster has {has}"
        kinds = {k.removeprefix("accelerator_type:") for m in machines for k in m if "accelerator_type:" in k}
        if need.accelerator is not None and need.accelerator not in kinds:
            has = ", ".join(sorted(kinds)) or "none"
            return f"needs accelerator {need.accelerator}, the Ray cluster has {has}"
        return ""

    def start(self, job: Job, forecast: Forecast, attempt: int, retries: int, share: float) -> bool:
        """Hands an attempt to Ray, which waits for room in the order that they come."""
        if len(self._refs) >= self.most:
            return False
        need = Need.of(job, forecast, share)
        task = self._task.options(name=job.name, **need.options())
        ref = task.remote(job, str(self.ledger.folder), attempt, retries, need.cores, str(self._sign))
        self._refs[ref] = job.slug
        return True

    def ended(self) -> list[tuple[str, Outcome]]:
        """Attempts that have ended, by themselves or with their worker."""
        if self.stop.is_set() and not self._sign.exists():
            self._sign.touch()
            # what waits for room has nothing to keep
            for ref in self._refs:
                if not self._begun(ref):
                    self.ray.cancel(ref)
        if not self._refs:
            return []
        ready, _ = self.ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
        found = []
        for ref in ready:
            slug = self._refs.pop(ref)
            try:
                outcome = self.ray.get(ref)
            except self.ray.exceptions.TaskCancelledError:
                outcome = Outcome("interrupted", "interrupted: it had not begun")
            except self.ray.exceptions.RayTaskError as error:
                outcome = Outcome("failed", first_line(error.cause if error.cause else error))
            except self.ray.exceptions.RayError as error:  # the worker, its machine, or Ray's own memory
                outcome = Outcome("failed", f"its worker was lost: {first_line(error)}", True)
            found.append((slug, outcome))
        return found

    def _begun(self, ref: Any) -> bool:
        """Whether a task's job is at work: its claim is held."""
        return self.ledger.holder(self._refs[ref]) is not None

    def close(self) -> None:
        """Lets go of the cluster; one that this process started ends."""
        self._sign.unlink(missing_ok=True)
        self.ray.shutdown()


def _handlers() -> dict[signal.Signals, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    return {s: handler for s, handler in found.items() if handler is not None}
