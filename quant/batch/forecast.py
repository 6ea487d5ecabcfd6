"""What each job will take, from its own dry run: what executors pack and reserve by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from quant.batch.attempt import command, run, variables, write_recipe
from quant.batch.ledger import Ledger
from quant.batch.manifest import Job
from quant.units import GIB

#: Memory of a dry run beside the weights that it may hold at once, which are no more than the source's.
_BESIDE = 2 * GIB


@dataclass(frozen=True)
class Forecast:
    """What a dry run says.

    Attributes:
        problem: why the job cannot be done; empty where it can.
        known: whether memory is predicted, which that of the legacy engines is not, nor that of a job whose
            dry run failed for a reason that may pass.
        unneeded: the unquantized model fits as asked, so that there is nothing to make.
        memory_bytes, gpu_bytes: largest resident memory, and memory of the GPU.
        seconds: of the quantization.
    """

    problem: str = ""
    known: bool = True
    unneeded: bool = False
    method: str = ""
    scheme: str = ""
    bits_per_weight: float | None = None
    memory_bytes: int = 0
    gpu_bytes: int = 0
    seconds: float = 0.0
    output_bytes: int = 0
    scratch_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Forecast:
        return cls(**{f.name: value[f.name] for f in fields(cls) if f.name in value})

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Forecast:
        """Of the JSON that ``quant quantize --dry-run`` prints."""
        if "plans" in value and value.get("recommended") == "none":
            return cls(unneeded=True)
        scheme = value.get("scheme")
        return cls(
            known="peak_rss_bytes" in value,
            method=str(value.get("method", "")),
            scheme=str(scheme.get("name", "")) if isinstance(scheme, dict) else "",
            bits_per_weight=value.get("bits_per_weight"),
            memory_bytes=int(value.get("peak_rss_bytes") or 0),
            gpu_bytes=int(value.get("peak_gpu_bytes") or 0),
            seconds=float(value.get("seconds") or 0.0),
            output_bytes=int(value.get("output_bytes") or 0),
            scratch_bytes=int(value.get("scratch_bytes") or 0),
        )


def _trial_bytes(job: Job) -> int:
    """Memory that a dry run takes at the most, before anything is known of it."""
    source = job.source
    weights = (
        0 if source is None else sum(f.stat().st_size for f in source.glob("*.safetensors") if f.exists())
    )
    return weights + _BESIDE


def forecasts(
    jobs: Sequence[Job],
    made: Sequence[Job],
    ledger: Ledger,
    kind: str,
    at_once: int,
    memory: int,
    stop: Callable[[], bool],
    told: Callable[[Job, Forecast], None] = lambda job, forecast: None,
) -> dict[str, Forecast]:
    """Forecasts by the jobs' slugs. Those that the ledger has are taken from it, for the same settings on the
    same ``kind`` of device; the others come from dry runs, of which so many run at once as the memory allows.

    Args:
        made: jobs whose output is there, of which no dry run is possible any more.
        at_once: most dry runs at once.
        memory: bytes that they may take together.
        told: hears of each, in any thread.
    """
    ledger.refresh()
    found: dict[str, Forecast] = {}
    missing: list[Job] = []
    there = {job.slug for job in made}
    for job in (*jobs, *made):
        if (known := ledger.forecast(f"{job.digest}-{kind}")) is not None:
            found[job.slug] = Forecast.from_dict(known)
            told(job, found[job.slug])
        elif job.slug not in there:
            missing.append(job)

    def dry(job: Job) -> None:
        if stop():
            return
        forecast = _dry_run(job, ledger.folder / "jobs" / job.slug, stop)
        if forecast is None:
            return
        found[job.slug] = forecast
        if forecast.known and not forecast.problem:
            ledger.record("planned", job.slug, digest=f"{job.digest}-{kind}", **forecast.to_dict())
        told(job, forecast)

    largest = max(map(_trial_bytes, missing), default=1)
    with ThreadPoolExecutor(max(1, min(at_once, memory // largest))) as pool:
        list(pool.map(dry, missing))
    return found


def _dry_run(job: Job, folder: Path, stop: Callable[[], bool]) -> Forecast | None:
    """The forecast of one job; None where we were to stop."""
    folder.mkdir(parents=True, exist_ok=True)
    words = command("quantize", "--config", str(write_recipe(job, folder)), "--dry-run", "--json")
    ended = run(words, folder, folder / "plan.log", variables(job), stop)
    if ended.status is None:
        return None
    if ended.status == 0:
        return Forecast.of(ended.result)
    # what may pass is the job's own to try again: alone, since nothing is known of it
    return Forecast(known=False) if ended.retryable else Forecast(problem=ended.message)
