"""What both kinds of pruning share: the source that is opened, and the smaller checkpoint that is written."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError, Problems, QuantError
from quant.evaluation.agreement import file_problems
from quant.formats import find_format
from quant.models.skeleton import Skeleton
from quant.offline import load_config
from quant.pipeline.checks import output_problems
from quant.pipeline.memory import peak_rss
from quant.pipeline.plain import write_plain
from quant.progress import Progress
from quant.report.files import write_report
from quant.report.value import Provenance, Pruning, Report
from quant.vllm.config import block_count, quantization_config, without_quantization


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
    report = write_plain(cut, source, work, output, progress, changed)
    end = time.perf_counter()
    report = replace(
        report,
        seconds={
            "measure": round(times.measured - times.start, 3),
            "write": round(end - times.measured, 3),
            "total": round(end - times.start, 3),
        },
        peak_rss_bytes=peak_rss(),
        pruning=pruning,
        provenance=provenance,
    )
    for file in work.path.glob(scratch) if scratch else ():
        file.unlink()
    write_report(work.path, report, source)
    work.publish()
    return report
