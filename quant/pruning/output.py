"""What both kinds of pruning share: the source that is opened, the text that is measured on, and the smaller
checkpoint that is written."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quant import defaults
from quant.calibration.files import bundled
from quant.calibration.text import Rows, calibration_rows
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError, Problems, QuantError, UsageError, VerificationFailed
from quant.evaluation.agreement import file_problems
from quant.evaluation.verify import verify
from quant.formats import FormatRegistry, find_format
from quant.models.skeleton import Skeleton
from quant.offline import load_config, load_tokenizer
from quant.pipeline.checks import output_problems
from quant.pipeline.layout import lay_out
from quant.pipeline.memory import peak_rss
from quant.pipeline.writing import write_rest, write_unit
from quant.progress import Event, Progress
from quant.report.files import write_report
from quant.report.value import Provenance, Pruning, Report
from quant.vllm.arguments import engine_arguments, vllm_config
from quant.vllm.config import block_count, quantization_config, vocabulary_size, without_quantization
from quant.vllm.context import context_length

#: Rows of text that blocks are measured on, and tokens of each, where none are asked for.
ROWS, LENGTH = 16, 512


@dataclass(frozen=True)
class Measured:
    """The text that is measured on, as a recipe has it, and where: ``device`` None is the GPU if there is
    one."""

    calibration_dataset: Sequence[Path] = field(default_factory=list)
    samples: int = ROWS
    sequence_length: int | None = None
    shuffle: bool = False
    seed: int = defaults.SEED
    device: str | None = None


def opened(model_path: str | Path, output: Path) -> Checkpoint:
    """A source that can be made smaller.

    Raises:
        Problems: what stands against it, all together.
    """
    checkpoint = open_checkpoint(model_path)
    layers = find_format(checkpoint.config, checkpoint.tensors)
    if layers is not None and not layers.linears and not layers.stacks:  # a file of an earlier life says so
        checkpoint = replace(checkpoint, config=without_quantization(checkpoint.config), quantization_file="")
    problems = [f"{checkpoint.path}: {line}" for line in file_problems(checkpoint, build=True)]
    if quantization_config(checkpoint.config) is not None:
        problems.append(
            f"{checkpoint.path}: is already quantized: prune first and quantize then, or turn it into plain "
            "weights with quant export-vllm --format plain"
        )
    problems += output_problems(checkpoint.path, output)
    if block_count(checkpoint.config) is None:
        problems.append(f"{checkpoint.path}: config.json does not say how many decoder blocks there are")
    if problems:
        raise Problems(problems)
    return checkpoint


def measured_rows(checkpoint: Checkpoint, asked: Measured) -> Rows:
    """The text.

    Raises:
        UsageError: rows longer than the model's context.
    """
    longest = context_length(checkpoint.config)
    length = asked.sequence_length or min(LENGTH, longest or LENGTH)
    if longest is not None and length > longest:
        raise UsageError(f"--sequence-length is {length}: the model's longest context is {longest}")
    return calibration_rows(
        load_tokenizer(checkpoint.path),
        list(asked.calibration_dataset) or [bundled("wikipedia")],
        asked.samples,
        length,
        vocabulary=vocabulary_size(checkpoint.config) or 2**31,
        shuffle=asked.shuffle,
        seed=asked.seed,
    )


@contextmanager
def with_config(cut: Checkpoint, without: str) -> Iterator[Checkpoint]:
    """The checkpoint at a folder that holds its config.json, which is in no file yet; errors name its own.

    Args:
        without: what it lacks, for messages.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(cut.config), encoding="utf-8")
        try:
            load_config(Path(folder))
            yield replace(cut, path=Path(folder))
        except QuantError as error:
            if folder not in str(error):
                raise
            said = str(error).replace(folder, str(cut.path))
            raise CheckpointError(f"{said} (without {without})") from error


def built(cut: Checkpoint, without: str) -> Skeleton:
    """The model that transformers makes of such a config.

    Raises:
        CheckpointError: it makes none, or one that the tensors do not fit.
    """
    with with_config(cut, without) as placed:
        return Skeleton(placed, torch.device("cpu"))


@dataclass(frozen=True)
class Times:
    """When a run started, and when all was measured, as ``time.perf_counter`` has it."""

    start: float
    measured: float


def write_smaller(
    cut: Checkpoint,
    source: Checkpoint,
    work: WorkFolder,
    output: Path,
    pruning: Pruning,
    times: Times,
    provenance: Provenance,
    progress: Progress,
    changed: Mapping[str, torch.Tensor] | None = None,
    scratch: str = "",
) -> Report:
    """Writes the smaller checkpoint into the work folder, checks it, and puts it in its place.

    Args:
        cut: its config and tensors, in the dtypes that they are written in.
        changed: those whose values are not the source's.
        scratch: pattern of the names of files that go when all is written.

    Raises:
        VerificationFailed: what was written is not what it should be.
    """
    form, dtype = FormatRegistry.get("plain"), cut.dtype
    units = lay_out(cut, {}, form, dtype)
    for number, unit in enumerate(units):
        if unit.name not in work.finished:
            files = write_unit(unit, work.path, cut, form, {}, {}, dtype, _nothing, changed)
            work.finish_unit(unit.name, files, {})
        progress(Event("write", number + 1, len(units)))
    arguments = engine_arguments(cut.config)
    dropped = write_rest(work.path, cut, units, form, cut.config, arguments)
    checked = verify(work.path, served=False)
    if checked.failed:
        raise VerificationFailed(
            f"{work.path}: the output failed its own verification: {'; '.join(checked.failed[:5])}. It was "
            "not published"
        )
    end = time.perf_counter()
    report = Report(
        output_path=str(output),
        source_path=str(source.path),
        format=form.name,
        source_bytes=source.nbytes,
        output_bytes=cut.nbytes,
        seconds={
            "measure": round(times.measured - times.start, 3),
            "write": round(end - times.measured, 3),
            "total": round(end - times.start, 3),
        },
        peak_rss_bytes=peak_rss(),
        side_files_dropped=tuple(dropped),
        vllm=vllm_config(arguments),
        verify=checked.to_dict() | {"path": str(output)},
        output_hash=checked.content_hash,
        pruning=pruning,
        provenance=provenance,
    )
    for file in work.path.glob(scratch) if scratch else ():
        file.unlink()
    write_report(work.path, report, source)
    work.publish()
    return report


def _nothing(name: str) -> Any:
    raise AssertionError(f"{name}: no linear of a checkpoint without blocks is made anew")
