"""A recipe whose model is pruned before it is quantized: both steps in one command, and what each cost.

The pruned model stands beside the output until that is made, so that a killed run goes on where it was: with
pruning, or with what the pruned model becomes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from quant import defaults
from quant.checkpoint.journal import differences, is_unpublished, work_path
from quant.checkpoint.reader import open_checkpoint
from quant.checkpoint.writer import write_text
from quant.documents import read_document
from quant.errors import Problems, QuantError, UsageError, clipped
from quant.evaluation.quality import Source, evaluate
from quant.evaluation.texts import Sample
from quant.pipeline.checks import output_problems
from quant.pipeline.fingerprint import files_of
from quant.progress import Event, Progress, silent
from quant.pruning import Depth, Width, drop_blocks, narrow
from quant.recipe import MIXING, Recipe
from quant.report.files import write_report
from quant.report.value import Pruning, Report
from quant.units import numbers

#: Rows of the bundled text that each step's cost is measured on.
_CHUNKS = 8


def _line_of_blocks(value: Any) -> Any:
    """Blocks as an option has them (``20-23``); all else is left to be judged."""
    return numbers(value) if isinstance(value, str) else value


def _measure(value: str) -> str:
    if value not in defaults.IMPORTANCES:
        raise ValueError(" or ".join(defaults.IMPORTANCES))
    return value


#: A number of units that go or stay.
_Units = Annotated[int, Field(strict=True, ge=1, le=2**31)]


class PruneStep(BaseModel):
    """The keys under ``prune`` of a recipe: those of ``quant prune`` that make an ordinary smaller
    checkpoint. Blocks go first, then the others become narrower."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    drop_blocks: _Units | None = None
    blocks: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=0)], ...], BeforeValidator(_line_of_blocks)
    ] = ()
    importance: Annotated[str, AfterValidator(_measure)] = "kl"
    experts: _Units | None = None
    intermediate_size: _Units | None = None
    kv_heads: _Units | None = None
    multiple_of: Annotated[int, Field(strict=True, ge=1, le=65536)] = 128
    samples: int | None = Field(None, ge=1, le=100_000)
    sequence_length: int | None = Field(None, ge=8, le=10_000_000)


def prune_step(value: Any) -> PruneStep:
    """
    Raises:
        UsageError: something else than these keys, none that prunes, or one out of its range.
    """
    if not isinstance(value, Mapping):
        raise UsageError(f"prune is {clipped(value)}: a mapping of keys such as drop_blocks: 4 is needed")
    try:
        step = PruneStep.model_validate(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("prune", *first["loc"])))
        if first.get("type") == "extra_forbidden":
            raise UsageError(f"{key}: no such key: known are {', '.join(PruneStep.model_fields)}") from error
        said = str(first["msg"]).removeprefix("Value error, ")
        raise UsageError(f"{key} is {clipped(first.get('input'))}: {said[:1].lower()}{said[1:]}") from error
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
    """Prunes the model of a recipe into folders beside its output; what is there of an earlier run of the
    same step is taken.

    Args:
        values: the recipe's, whose text is measured on.

    Raises:
        QuantError: what is there was pruned otherwise, or from another source.
    """
    source, output, fresh = str(values["model_path"]), Path(values["output_path"]), bool(values.get("fresh"))
    text: dict[str, Any] = {k: values[k] for k in ("shuffle", "seed", "device") if values.get(k) is not None}
    datasets = values.get("calibration_dataset") or []
    text["calibration_dataset"] = [
        Path(d) for d in ([datasets] if isinstance(datasets, (str, Path)) else datasets)
    ]
    _claim(output, _facts(step, source, text), fresh)
    try:
        text |= {k: v for k in ("samples", "sequence_length") if (v := getattr(step, k)) is not None}
        return _pruned(step, source, output, text, int(values.get("tensor_parallel") or 1), fresh, progress)
    except BaseException:
        if not any(folder.exists() for f in _folders(output) for folder in (f, work_path(f))):
            _record(output).unlink()  # nothing was made that it would be of
        raise


def _pruned(
    step: PruneStep,
    source: str,
    output: Path,
    text: Mapping[str, Any],
    ranks: int,
    fresh: bool,
    progress: Progress,
) -> Pruned:
    blocks, widths = _folders(output)
    model, folders, done = source, list[Path](), Pruning()
    if step.drop_blocks is not None or step.blocks:
        depth = Depth(drop=step.drop_blocks or 0, blocks=step.blocks, measure=step.importance, **text)
        report = _made(blocks, model) or drop_blocks(model, blocks, depth, progress, fresh=fresh)
        assert report.pruning is not None
        model, done = str(blocks), report.pruning
        folders.append(blocks)
    if any(x is not None for x in (step.experts, step.intermediate_size, step.kv_heads)):
        width = Width(
            experts=step.experts,
            channels=step.intermediate_size,
            heads=step.kv_heads,
            multiple_of=step.multiple_of,
            tensor_parallel=ranks,
            **text,
        )
        report = _made(widths, model) or narrow(model, widths, width, progress, fresh=fresh)
        assert report.pruning is not None
        count = done.blocks or report.pruning.blocks
        done = replace(
            done, blocks=count, widths=report.pruning.widths, calibration=report.pruning.calibration
        )
        folders.append(widths)
    return Pruned(folders[-1], tuple(folders), source, done)


def _facts(step: PruneStep, source: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the pruned model."""
    files = [f for d in text["calibration_dataset"] for f in (sorted(d.rglob("*")) if d.is_dir() else [d])]
    return {
        "prune": step.model_dump(mode="json"),
        "settings": {k: text[k] for k in ("shuffle", "seed") if k in text},
        "source": files_of(open_checkpoint(source)),
        "text": {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()},
    }


def _claim(output: Path, facts: Mapping[str, Any], fresh: bool) -> None:
    """Notes beside an output, before anything is made, what its model is pruned by.

    Raises:
        QuantError: there is a model that was pruned otherwise.
    """
    record = _record(output)
    before = _read(record)
    if fresh and before:  # else what is there is somebody's
        for folder in (*_folders(output), output):
            report = Report.load(folder) if folder.is_dir() else None
            if report is not None and (_is_of(report, output) or (report.pruning and folder != output)):
                shutil.rmtree(folder)
    there = [f for f in _folders(output) if f.exists() or work_path(f).exists()]
    if there and not before:
        raise QuantError(
            f"{there[0]}: is there, and {record.name}, which would say of which steps it is, is not: move it "
            "away, or choose another --output-path"
        )
    if there and not fresh and (changed := differences(before.get("pruned", {}), facts)):
        raise QuantError(
            f"{there[0]}: holds a model that was pruned by other steps ({', '.join(changed[:3])}): give the "
            "same again to go on with it, or --fresh to start over"
        )
    _note(record, {**(before if there and not fresh else {}), "pruned": facts})


def check_output(output: Path, source: str) -> None:
    """
    Raises:
        Problems: the output cannot be written, and is none that an earlier run of these steps has quantized.
    """
    report = Report.load(output) if output.is_dir() else None
    if report is None or not _is_of(report, output):
        if problems := output_problems(Path(source), output):
            raise Problems(problems)


def quantized_already(pruned: Pruned, recipe: Recipe) -> Report | None:
    """The report of an output that an earlier run of this recipe made of the pruned model, and died before
    its steps were compared. None where it is still to be made: by what is noted, for the next run.

    Raises:
        QuantError: it was made by another recipe.
    """
    output = recipe.output_path
    settings = {**recipe.settings(), **{k: getattr(recipe, k) for k in MIXING}}
    # where it was computed changes nothing of what is compared with it
    facts = {"settings": json.loads(json.dumps({k: v for k, v in settings.items() if k != "device"}))}
    before, record = _read(_record(output)), _record(output)
    report = Report.load(output) if output.is_dir() else None
    if report is None or is_unpublished(output):
        _note(record, {**before, "quantized": facts})
        return None
    if changed := differences(before.get("quantized", {}), facts):
        raise QuantError(
            f"{output}: was made of {pruned.path} by another recipe ({', '.join(changed[:3])}): give the "
            "same again to have its steps compared, or --fresh to start over"
        )
    return report


def _folders(output: Path) -> tuple[Path, Path]:
    """Where a model is that lost blocks, and one that became narrower."""
    return output.with_name(f"{output.name}.blocks"), output.with_name(f"{output.name}.widths")


def _record(output: Path) -> Path:
    return output.with_name(f"{output.name}.steps.json")


def _read(record: Path) -> dict[str, Any]:
    """What is noted; empty where nothing is."""
    try:
        value = read_document(record)
    except (OSError, ValueError):
        return {}
    parts = value if isinstance(value, dict) else {}
    return {k: v for k, v in parts.items() if k in ("pruned", "quantized") and isinstance(v, dict)}


def _note(record: Path, value: Mapping[str, Any]) -> None:
    """Writes it as a whole or not at all."""
    record.parent.mkdir(parents=True, exist_ok=True)
    half = record.with_name(f"{record.name}.part")
    write_text(half, json.dumps(value))
    os.replace(half, record)


def _is_of(report: Report, output: Path) -> bool:
    """Whether an output was made of a model that was pruned for it."""
    return report.source_path in {str(f) for f in _folders(output)}


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
    _record(Path(report.output_path)).unlink(missing_ok=True)
    return whole
