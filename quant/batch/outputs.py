"""What stands where a job writes: nothing, its output, or something else. Sizes and reports are read, no
tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quant import defaults
from quant.batch.manifest import EvaluateGate, Job
from quant.checkpoint.journal import is_unpublished
from quant.errors import clipped
from quant.models.support import GRADIENTS
from quant.planning.target import best_inputs, best_options, method_for
from quant.recipe import UPLOAD, Recipe, make_recipe
from quant.report.files import load_evaluation
from quant.report.value import Report
from quant.units import format_size

#: Settings that :func:`quant.jobs.resolve` fills in where a recipe leaves them open.
_CHOSEN = {"method", "scheme", "group_size", "format", "outlier_suppression", "rules", "gradient_samples"}


@dataclass(frozen=True)
class Standing:
    """``todo``: nothing is there, or work that goes on; ``made``: the output is, gates are not passed;
    ``done``; ``refused``: what is there is not this job's, or not what it was.

    Attributes:
        message: why it is refused.
        facts: of the output, as :func:`facts_of` has them.
    """

    status: Literal["todo", "made", "done", "refused"]
    message: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def facts_of(job: Job) -> dict[str, Any] | None:
    """What an event says of a finished output, so that a change is noticed later; None where there is no
    report."""
    report = Report.load(job.output)
    if report is None:
        return None
    quantization = report.quantization
    return {
        "digest": job.digest,
        "settings": job.settings,
        "output_path": str(job.output),
        "output_hash": report.output_hash,
        "output_bytes": report.output_bytes,
        "source_bytes": report.source_bytes,
        "method": quantization.method if quantization is not None else "",
        "scheme": str(quantization.scheme.get("name", "")) if quantization is not None else "",
        "bits_per_weight": quantization.bits_per_weight if quantization is not None else None,
        "fallbacks": len(quantization.fallbacks) if quantization is not None else 0,
        "peak_rss_bytes": report.peak_rss_bytes,
        "peak_gpu_bytes": quantization.peak_gpu_bytes if quantization is not None else 0,
        "files": _sizes(job.output),
        "source": source_facts(job),
    }


def source_facts(job: Job) -> dict[str, list[int]]:
    """Size and time of change of each file that decides what the source is."""
    folder = job.source
    if folder is None or not folder.is_dir():
        return {}
    files = sorted(f for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "config.json")
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}


def _sizes(folder: Path) -> dict[str, int]:
    return {
        f.name: f.stat().st_size
        for f in sorted(folder.iterdir())
        if f.suffix == ".safetensors" or f.name == "config.json"
    }


def standing(job: Job, latest: Mapping[str, Any] | None) -> Standing:
    """What is to be done of a job.

    Args:
        latest: its last event.
    """
    known = latest if latest is not None and isinstance(latest.get("files"), dict) else None
    if not job.output.exists() or (job.output.is_dir() and not any(job.output.iterdir())):
        if latest is not None and latest.get("unneeded") and latest.get("digest") == job.digest:
            return Standing("done", facts=latest)
        return Standing("todo")
    if is_unpublished(job.output):
        return Standing("todo")
    facts = facts_of(job) if job.output.is_dir() else None
    if facts is None:
        return Standing(
            "refused",
            f"{job.output}: is there and was not made by quant: move it away, or choose another output",
        )
    if known is None or known.get("output_hash") != facts["output_hash"]:
        if difference := _difference(job):
            return Standing("refused", _others(job, difference))
    else:
        if known.get("digest") != job.digest:
            return Standing("refused", _others(job, _changed(known.get("settings"), job.settings)))
        if known["files"] != facts["files"]:
            return Standing("refused", _damaged(job, known["files"], facts["files"]))
        if known.get("source") != facts["source"]:
            return Standing(
                "refused",
                f"{job.output}: its source {job.model} has changed since it was made: move the output away "
                "to make it again",
            )
    if known is not None and latest is not None and latest.get("event") == "finished":
        if latest.get("gates") == gates_of(job):
            return Standing("done", facts=latest)
    if job.verify is None and job.evaluate is None:
        return Standing("done", facts=facts)
    return Standing("made", facts=facts)


def gates_of(job: Job) -> dict[str, Any]:
    """The gates that a job asks for, as JSON has them."""
    asked = {"verify": job.verify, "evaluate": job.evaluate}
    return {k: gate.model_dump(mode="json") for k, gate in asked.items() if gate is not None}


def _changed(before: object, now: Mapping[str, Any]) -> str:
    was = before if isinstance(before, dict) else {}
    keys = sorted(k for k in {*was, *now} if was.get(k) != now.get(k))
    return ", ".join(f"{k} was {clipped(was.get(k))}, is {clipped(now.get(k))}" for k in keys[:3])


def _others(job: Job, difference: str) -> str:
    return (
        f"{job.output}: was made with other settings ({difference}): move it away to make it again, or "
        "choose another output"
    )


def _damaged(job: Job, before: Mapping[str, Any], now: Mapping[str, int]) -> str:
    name = next(n for n in sorted({*before, *now}) if before.get(n) != now.get(n))
    sizes = [format_size(x[name]) if name in x else "not there" for x in (before, now)]
    return (
        f"{job.output}: is not any more what it was ({name} was {sizes[0]}, is {sizes[1]}): move it away to "
        "make it again"
    )


def _difference(job: Job) -> str:
    """In what an output, of which the ledger knows nothing, is not what the job would make; empty where it
    is: a batch was killed between the output and the event."""
    report = Report.load(job.output)
    if report is None or report.quantization is None:
        return "no quantization"
    source = job.source
    if source is None or os.path.realpath(report.source_path) != os.path.realpath(source):
        return f"model was {report.source_path}, is {job.model}"
    asked = make_recipe({"method": "gptq", **job.values})
    size = str((report.quantization.allocation or {}).get("target", "")).partition(" (")[0]
    if size != asked.size_asked:
        return f"it was made by {size or 'one scheme for all layers'}, not by {asked.size_asked or 'that'}"
    if difference := _other_effort(asked, report.quantization.settings, job):
        return difference
    if asked.effort == "best":
        named = asked.model_copy(
            update={"scheme": asked.scheme or report.quantization.settings.get("scheme")}
        )
        brought = best_inputs(named, named.resolved_scheme())
        if report.quantization.settings.get("method") in GRADIENTS:
            brought["options"] = best_options(asked)
        asked = asked.model_copy(update=brought)
    wanted = json.loads(json.dumps(asked.settings()))
    chosen = {k for k in _CHOSEN if k not in job.values}
    made = {k: v for k, v in report.quantization.settings.items() if k not in chosen}
    return _changed(made, {k: v for k, v in wanted.items() if k not in (*chosen, *UPLOAD)})


def _other_effort(asked: Recipe, made: Mapping[str, Any], job: Job) -> str:
    """In what an output was made by another effort, where the job leaves the method to one; empty, too, where
    it leaves the scheme to a recommendation."""
    if "method" in job.values or not job.values.keys() & {"scheme", "bits"} or job.source is None:
        return ""
    effort, method = asked.effort or defaults.EFFORT, made.get("method")
    wanted, _ = method_for(asked.resolved_scheme(), job.source, effort=effort)
    rows = asked.samples if effort == "best" and wanted in GRADIENTS else None
    if "gradient_samples" in job.values:
        rows = made.get("gradient_samples")
    if (method, made.get("gradient_samples")) == (wanted, rows):
        return ""
    return (
        f"it was made by {method}, and --effort {effort} takes {wanted}{f' with {rows} rows' if rows else ''}"
    )


def measured(job: Job, latest: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Numbers that the gate would measure and that an earlier attempt has measured; None where there are
    none, or of another text or output."""
    gates = {} if latest is None else latest.get("gates")
    before = gates.get("evaluate") if isinstance(gates, dict) else None
    report = Report.load(job.output)
    if job.evaluate is None or not isinstance(before, dict) or report is None or latest is None:
        return None
    now = job.evaluate.model_dump(mode="json")
    same = all(before.get(k) == now[k] for k in ("text", "chunks", "length"))
    value = load_evaluation(job.output)
    if not same or latest.get("output_hash") != report.output_hash or value is None or not value.get("kl"):
        return None
    return value


def judged(gate: EvaluateGate, value: Mapping[str, Any]) -> str:
    """Why an output fails the gate by its numbers; empty where it passes."""
    kl = value["kl"]["mean"]
    if gate.max_kl is not None and not kl <= gate.max_kl:
        return f"KL divergence is {kl:.5f} nats, the gate allows {gate.max_kl:g}"
    before, after = value.get("source_perplexity"), value.get("perplexity")
    if gate.max_perplexity_increase is not None and before and after:
        increase = after["mean"] / before["mean"] - 1
        if not increase <= gate.max_perplexity_increase:
            return f"perplexity rises by {increase:.2%}, the gate allows {gate.max_perplexity_increase:.2%}"
    return ""
