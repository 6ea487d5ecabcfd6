"""A recipe whose model is pruned before it is quantized: both steps in one command, and what each cost.

The pruned model stands beside the output until that is made, so that a killed run goes on where it was: with
pruning, or with what the pruned model becomes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from quant.checkpoint.reader import open_checkpoint
from quant.errors import Problems, UsageError, clipped
from quant.evaluation.quality import Source, evaluate
from quant.evaluation.texts import Sample
from quant.pipeline.checks import output_problems
from quant.progress import Event, Progress, silent
from quant.pruning import Depth, Width, drop_blocks, narrow
from quant.report.files import write_report
from quant.report.value import Pruning, Report

#: Rows of the bundled text that each step's cost is measured on.
_CHUNKS = 8


class PruneStep(BaseModel):
    """The keys under ``prune`` of a recipe: those of ``quant prune`` that make an ordinary smaller
    checkpoint. Blocks go first, then the others become narrower."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    drop_blocks: int | None = None
    blocks: tuple[int, ...] = ()
    importance: str = "kl"
    experts: int | None = None
    intermediate_size: int | None = None
    kv_heads: int | None = None
    multiple_of: int = 128
    samples: int | None = None
    sequence_length: int | None = None


def prune_step(value: Any) -> PruneStep:
    """
    Raises:
        UsageError: something else than these keys, or none that prunes.
    """
    try:
        step = PruneStep(**value) if isinstance(value, Mapping) else None
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        key = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"prune.{key}: {str(first['msg']).lower()}: known are {', '.join(PruneStep.model_fields)}"
        ) from error
    if step is None:
        raise UsageError(f"prune is {clipped(value)}: a mapping of keys such as drop_blocks: 4 is needed")
    if step.importance not in ("kl", "angle"):
        raise UsageError(f"prune.importance is {step.importance!r}: kl or angle")
    widths = (step.experts, step.intermediate_size, step.kv_heads)
    if step.drop_blocks is None and not step.blocks and widths == (None, None, None):
        raise UsageError(
            "prune: names nothing to prune: drop_blocks, blocks, experts, intermediate_size, kv_heads"
        )
    return step


@dataclass(frozen=True)
class Pruned:
    """What was pruned: where it is, the folders that go when the output is made, and its reports joined."""

    path: Path
    folders: tuple[Path, ...]
    source: str
    pruning: Pruning


def prune_first(step: PruneStep, values: Mapping[str, Any], progress: Progress = silent) -> Pruned:
    """Prunes the model of a recipe into folders beside its output; what is there of an earlier run is taken.

    Args:
        values: the recipe's, whose text is measured on.
    """
    source, output = str(values["model_path"]), Path(values["output_path"])
    text: dict[str, Any] = {k: values[k] for k in ("shuffle", "seed", "device") if values.get(k) is not None}
    datasets = values.get("calibration_dataset") or []
    text["calibration_dataset"] = [
        Path(d) for d in ([datasets] if isinstance(datasets, (str, Path)) else datasets)
    ]
    text |= {k: v for k in ("samples", "sequence_length") if (v := getattr(step, k)) is not None}
    model, folders, done = source, list[Path](), Pruning()
    if step.drop_blocks is not None or step.blocks:
        depth = Depth(drop=step.drop_blocks or 0, blocks=step.blocks, measure=step.importance, **text)
        folder = _beside(output, "blocks")
        report = _made(folder, model) or drop_blocks(model, folder, depth, progress)
        assert report.pruning is not None
        model, done = str(folder), report.pruning
        folders.append(folder)
    if any(x is not None for x in (step.experts, step.intermediate_size, step.kv_heads)):
        width = Width(
            experts=step.experts,
            channels=step.intermediate_size,
            heads=step.kv_heads,
            multiple_of=step.multiple_of,
            tensor_parallel=int(values.get("tensor_parallel") or 1),
            **text,
        )
        folder = _beside(output, "widths")
        report = _made(folder, model) or narrow(model, folder, width, progress)
        assert report.pruning is not None
        blocks = done.blocks or report.pruning.blocks
        done = replace(
            done, blocks=blocks, widths=report.pruning.widths, calibration=report.pruning.calibration
        )
        folders.append(folder)
    return Pruned(folders[-1], tuple(folders), source, done)


def check_output(output: Path, source: str) -> None:
    """
    Raises:
        Problems: the output cannot be written, and is none that an earlier run of these steps has quantized.
    """
    mine = {str(_beside(output, what)) for what in ("blocks", "widths")}
    report = Report.load(output) if output.is_dir() else None
    if report is None or report.source_path not in mine:
        if problems := output_problems(Path(source), output):
            raise Problems(problems)


def quantized_already(output: Path, pruned: Pruned) -> Report | None:
    """The report of an output that an earlier run made of this pruned model, and died before its steps were
    compared; or None."""
    report = Report.load(output) if output.is_dir() else None
    return report if report is not None and report.source_path == str(pruned.path) else None


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}.{what}")


def _made(folder: Path, source: str) -> Report | None:
    """The report of an earlier run's folder; None where there is none, or the folder is of something else,
    which whoever writes there tells."""
    report = Report.load(folder) if folder.is_dir() else None
    if report is None or report.pruning is None or Path(report.source_path) != Path(source):
        return None
    return report


def finish(pruned: Pruned, report: Report, progress: Progress = silent, device: str | None = None) -> Report:
    """The output's report with the pruning in it, and what each step cost; the folders beside it go."""
    source = Source(pruned.source, Sample(chunks=_CHUNKS), device=device, progress=progress)
    costs = []
    steps = [(f"prune, {f.suffix.removeprefix('.')}", f) for f in pruned.folders]
    for name, folder in [*steps, ("quantize", Path(report.output_path))]:
        progress(Event("cost", detail=name))
        found = evaluate(folder, against=source, device=device, progress=progress)
        assert found.kl is not None
        costs.append({"step": name, "kl": found.kl.mean, "standard_error": found.kl.standard_error})
    origin = open_checkpoint(pruned.source)
    made = [r for r in map(Report.load, pruned.folders) if r is not None]
    pruning = sum(r.seconds.get("total", 0.0) for r in made)
    # the folders' own reports were left out too, which tells nobody anything
    dropped = {d["file"]: d for r in (*made, report) for d in r.side_files_dropped}
    whole = replace(
        report,
        source_path=pruned.source,
        source_bytes=origin.nbytes,
        seconds={**report.seconds, "pruning": pruning, "total": report.seconds.get("total", 0.0) + pruning},
        side_files_dropped=tuple(d for name, d in dropped.items() if (origin.path / name).exists()),
        pruning=replace(pruned.pruning, costs=tuple(costs)),
    )
    write_report(Path(report.output_path), whole, origin)
    for folder in pruned.folders:
        shutil.rmtree(folder)
    return whole
