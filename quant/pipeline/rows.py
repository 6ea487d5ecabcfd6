"""The rows of text that a job calibrates with or measures a model on, as the model's tokenizer reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quant import defaults
from quant.calibration.files import bundled
from quant.calibration.records import TextError
from quant.calibration.text import Rows, calibration_rows
from quant.checkpoint.reader import Checkpoint
from quant.errors import UsageError
from quant.offline import load_tokenizer
from quant.pipeline.plan import JobPlan
from quant.progress import Event, Progress
from quant.vllm.config import vocabulary_size
from quant.vllm.context import context_length

#: Rows of text that a model is measured on, and tokens of each, where none are asked for.
ROWS, LENGTH = 16, 512


@dataclass(frozen=True)
class Measured:
    """The text that a model is measured on, as a recipe has it, and where: ``device`` None is the GPU if
    there is one."""

    calibration_dataset: Sequence[Path] = field(default_factory=list)
    samples: int = ROWS
    sequence_length: int | None = None
    shuffle: bool = False
    seed: int = defaults.SEED
    device: str | None = None


def measured_rows(checkpoint: Checkpoint, asked: Measured) -> Rows:
    """The text.

    Raises:
        UsageError: no rows, rows longer than the model's context, or a seed that generators do not take.
    """
    if asked.samples < 1:
        raise UsageError(f"--samples is {asked.samples}: at least one row is measured on")
    if not 0 <= asked.seed < 2**63:
        raise UsageError(f"--seed is {asked.seed}: a whole number from 0 to 2**63 - 1")
    return calibration_rows(
        load_tokenizer(checkpoint.path),
        list(asked.calibration_dataset) or [bundled("wikipedia")],
        asked.samples,
        _length(checkpoint, asked.sequence_length, LENGTH),
        vocabulary=vocabulary_size(checkpoint.config) or 2**31,
        shuffle=asked.shuffle,
        seed=asked.seed,
    )


def job_rows(plan: JobPlan) -> Rows:
    """
    Raises:
        QuantError, UsageError: too little text, or rows longer than the model's context.
    """
    recipe = plan.recipe
    rows = calibration_rows(samples=plan.rows, **_text(plan))
    asked = recipe.gradient_samples if plan.gradients else None
    if asked is not None and asked > recipe.samples:
        note = f"gradients take all {recipe.samples} rows, which --samples limits: {asked} were asked for"
    elif asked is None and "samples" in recipe.model_fields_set and plan.rows < recipe.samples:
        note = (
            f"the first {plan.rows} of {recipe.samples} rows are used, because gradients take three passes: "
            "--gradient-samples takes more"
        )
    else:
        return rows
    return replace(rows, notes=(*rows.notes, note))


def later_rows(plan: JobPlan, tokens: int) -> tuple[torch.Tensor, bool]:
    """Rows to judge on, int64 [rows, length], of so many tokens and four at the least: those of the same text
    behind the ones that the job is calibrated with. Whether there are any: where the text ends before, they
    are the job's own last ones."""
    given = _text(plan)
    wanted = max(4, tokens // given["length"])
    while wanted:
        try:
            rows = calibration_rows(samples=plan.recipe.samples + wanted, **given)
        except TextError:
            wanted //= 2
        else:
            return rows.tokens[plan.recipe.samples :], True
    rows = calibration_rows(samples=plan.rows, **given)
    return rows.tokens[-max(4, tokens // given["length"]) :], False


def _text(plan: JobPlan) -> Mapping[str, Any]:
    """Arguments of :func:`calibration_rows`, less the number of rows.

    Raises:
        UsageError: rows longer than the model's context.
    """
    recipe, checkpoint = plan.recipe, plan.checkpoint
    return {
        "tokenizer": load_tokenizer(checkpoint.path),
        "paths": recipe.calibration_dataset or [bundled("wikipedia")],
        "length": _length(checkpoint, recipe.sequence_length, defaults.SEQUENCE_LENGTH),
        "vocabulary": vocabulary_size(checkpoint.config) or 2**31,
        "shuffle": recipe.shuffle,
        "seed": recipe.seed,
        "chat_template": recipe.chat_template,
    }


def _length(checkpoint: Checkpoint, asked: int | None, usual: int) -> int:
    """Tokens of a row; ``usual`` of them, or the model's context, where none are asked for.

    Raises:
        UsageError: too few, or more than the model's context.
    """
    longest = context_length(checkpoint.config)
    length = min(usual, longest or usual) if asked is None else asked
    if length < 2:
        raise UsageError(f"--sequence-length is {length}: two tokens are the least")
    if longest is not None and length > longest:
        raise UsageError(f"--sequence-length is {length}: the model's longest context is {longest}")
    return length


def tell_notes(rows: Rows, progress: Progress) -> None:
    """Says what of the text was passed over."""
    for note in rows.notes:
        progress(Event("text", message=f"calibration text: {note}", warning=True))
