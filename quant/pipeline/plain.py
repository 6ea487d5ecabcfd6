"""A checkpoint that is written as it is, but for tensors with new values: what pruning and teaching leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint
from quant.errors import VerificationFailed
from quant.evaluation.verify import verify
from quant.formats import FormatRegistry
from quant.pipeline.layout import lay_out
from quant.pipeline.writing import write_rest, write_unit
from quant.progress import Event, Progress
from quant.report.value import Report
from quant.vllm.arguments import engine_arguments, vllm_config


def write_plain(
    checkpoint: Checkpoint,
    source: Checkpoint,
    work: WorkFolder,
    output: Path,
    progress: Progress,
    changed: Mapping[str, torch.Tensor] | None = None,
    target: str = "vllm",
) -> Report:
    """Writes a checkpoint into the work folder of an output and checks it; units that an earlier run has
    written stay.

    Args:
        checkpoint: its config and tensors, in the dtypes that they are written in.
        source: what it was made from.
        changed: new values of some tensors, in their dtypes and shapes.
        target: who must load it: ``vllm`` or ``other``.

    Returns:
        what a report says of it, so far.

    Raises:
        VerificationFailed: what was written is not what it should be.
    """
    form, dtype = FormatRegistry.get("plain"), checkpoint.dtype
    units = lay_out(checkpoint, {}, form, dtype)
    for number, unit in enumerate(units):
        if unit.name not in work.finished:
            files = write_unit(unit, work.path, checkpoint, form, {}, {}, dtype, _nothing, changed)
            work.finish_unit(unit.name, files, {})
        progress(Event("write", number + 1, len(units)))
    arguments = engine_arguments(checkpoint.config)
    dropped = write_rest(work.path, checkpoint, units, form, checkpoint.config, arguments)
    checked = verify(work.path, served=False, target=target)
    if checked.failed:
        raise VerificationFailed(
            f"{work.path}: the output failed its own verification: {'; '.join(checked.failed[:5])}. It was "
            "not published; --fresh makes it anew"
        )
    return Report(
        output_path=str(output),
        source_path=str(source.path),
        format=form.name,
        source_bytes=source.nbytes,
        output_bytes=checkpoint.nbytes,
        side_files_dropped=tuple(dropped),
        vllm=vllm_config(arguments),
        verify=checked.to_dict() | {"path": str(output)},
        output_hash=checked.content_hash,
    )


def _nothing(name: str) -> Any:
    raise AssertionError(f"{name}: no linear of a checkpoint without quantized blocks is made anew")
