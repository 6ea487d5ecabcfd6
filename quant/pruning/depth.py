"""A model without the decoder blocks that it needs least: an ordinary checkpoint with fewer of them, which
any engine serves.

Which blocks go is measured (:mod:`quant.pruning.importance`), one after another: when one is gone, what the
others count for is measured again, because blocks stand in for each other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from quant.accelerator import device_name, device_of
from quant.calibration.text import Rows
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError, UsageError, clipped
from quant.evaluation.quality import Runner
from quant.models.cutting import without_blocks
from quant.models.skeleton import Skeleton
from quant.pipeline.activation_store import ActivationStore
from quant.pipeline.checks import check_disk
from quant.pipeline.fingerprint import fingerprint
from quant.pipeline.rows import Measured, measured_rows
from quant.pipeline.workspace import RESIDENT_CPU
from quant.progress import Event, Progress, silent
from quant.pruning.importance import MEASURE
from quant.pruning.output import (
    Times,
    built,
    opened,
    write_smaller,
)
from quant.report.value import Provenance, Pruning, Report
from quant.vllm.config import block_count, text_config


@dataclass(frozen=True)
class Depth(Measured):
    """Which blocks go, and the text that they are measured on.

    Attributes:
        drop: how many; or
        blocks: which, by their numbers.
        measure: by what they are chosen: ``kl`` or ``angle``.
    """

    drop: int = 0
    blocks: tuple[int, ...] = ()
    measure: str = "kl"

    def problems(self, count: int) -> list[str]:
        """What is wrong with it for a model of so many blocks."""
        if bool(self.drop) == bool(self.blocks):
            return [
                "give --drop-blocks (how many go, chosen by measuring) or --blocks (which), one of the two"
            ]
        if strange := [b for b in self.blocks if not 0 <= b < count]:
            return [f"--blocks names {strange[0]}: the model has blocks 0 to {count - 1}"]
        if len(set(self.blocks)) < len(self.blocks):
            return [f"--blocks names a block twice: {clipped(list(self.blocks))}"]
        going = self.drop or len(self.blocks)
        if going >= count or self.drop < 0:
            return [f"{going} of {count} blocks cannot go: at least one goes, and at least one stays"]
        return []


def drop_blocks(
    model_path: str | Path,
    output_path: str | Path,
    depth: Depth,
    progress: Progress = silent,
    command: Sequence[str] | None = None,
    fresh: bool = False,
) -> Report:
    """Writes ``model_path`` without some of its decoder blocks.

    What was measured is kept, so that the same call goes on where one was killed.

    Raises:
        Problems, UsageError, QuantError: what stands against it, before anything is written where that can be
            told.
    """
    start = time.perf_counter()
    output = Path(output_path)
    checkpoint = opened(model_path, output)
    count = block_count(checkpoint.config)
    assert count is not None
    if wrong := depth.problems(count):
        raise UsageError(wrong[0])
    device = device_of(depth.device)
    runner = Runner(checkpoint, device)
    kinds = block_kinds(runner.skeleton)
    check_disk(output, checkpoint.nbytes)
    if depth.blocks:  # what cannot be written is told before anything is measured
        _checked(checkpoint, kinds, [i for i in range(count) if i not in depth.blocks])
    rows = None if depth.blocks else measured_rows(checkpoint, depth)
    settings = {
        "drop_blocks": depth.drop or None,
        "blocks": list(depth.blocks) or None,
        "importance": depth.measure,
    }
    work = WorkFolder(output.absolute(), fingerprint(checkpoint, settings, rows, device), fresh)
    try:
        kept, steps = _chosen(runner, depth, rows, kinds, work, progress)
        cut = _checked(checkpoint, kinds, kept)
        pruning = Pruning(
            blocks=count,
            dropped=tuple(i for i in range(count) if i not in kept),
            measure="" if depth.blocks else depth.measure,
            steps=tuple(steps),
            calibration=None if rows is None else rows.to_dict(),
        )
        times = Times(start, time.perf_counter())
        here = Provenance.here(command, device_name(device))
        return write_smaller(cut, checkpoint, work, output, pruning, times, here, progress)
    finally:
        work.release()


def _chosen(
    runner: Runner,
    depth: Depth,
    rows: Rows | None,
    kinds: Sequence[Mapping[str, Any]],
    work: WorkFolder,
    progress: Progress,
) -> tuple[list[int], list[dict[str, Any]]]:
    """The blocks that stay, and what was measured on the way, a step for each block that goes."""
    kept = list(range(runner.skeleton.block_count))
    if rows is None:
        return [i for i in kept if i not in depth.blocks], []
    steps: list[dict[str, Any]] = []
    for number in range(depth.drop):
        name = f"importance {number}"
        if (known := work.finished.get(name)) is not None:
            found = {int(k): float(v) for k, v in known["importance"].items()}
        else:
            store = ActivationStore(RESIDENT_CPU, work.path / "activations.bin")
            try:
                found = MEASURE[depth.measure](runner, rows.tokens, kept, store, progress)
            finally:
                store.close()
            work.finish_unit(name, {}, {"importance": {str(k): v for k, v in found.items()}})
        block = _least(runner.skeleton.checkpoint, kinds, kept, found)
        steps.append({"dropped": block, "importance": {str(k): v for k, v in found.items()}})
        progress(
            Event(
                "importance", message=f"block {block} goes: {found[block]:.4g} ({depth.measure}) without it"
            )
        )
        kept.remove(block)
    return kept, steps


def _least(
    checkpoint: Checkpoint,
    kinds: Sequence[Mapping[str, Any]],
    kept: Sequence[int],
    found: Mapping[int, float],
) -> int:
    """The block of the least importance without which a config.json still describes the others.

    Raises:
        CheckpointError: there is none.
    """
    problem = ""
    for block in sorted(found, key=lambda i: (found[i], i)):
        try:
            _checked(checkpoint, kinds, [i for i in kept if i != block])
        except CheckpointError as error:
            problem = problem or str(error)
            continue
        return block
    raise CheckpointError(problem)


def block_kinds(skeleton: Skeleton) -> list[dict[str, Any]]:
    """What the model's code makes of each block's place: the shapes of its parameters and every plain value
    that its modules hold, but its number."""
    listed = getattr(skeleton.config, "layer_types", None)
    kinds: list[dict[str, Any]] = []
    for index, block in enumerate(skeleton.blocks):
        kind: dict[str, Any] = {n: tuple(p.shape) for n, p in block.named_parameters()}
        for path, module in block.named_modules():
            kind |= {f"{path}.{k}": v for k, v in _plain_values(module).items()}
        if isinstance(listed, list) and index < len(listed):
            kind["layer_types"] = listed[index]
        kinds.append(kind)
    return kinds


def _plain_values(module: nn.Module) -> dict[str, Any]:
    values = {k: v for k, v in vars(module).items() if type(v) in (bool, int, float, str, type(None))}
    named = {k: v for k, v in values.items() if not k.startswith("_") and k not in _NUMBERS}
    return named | {"class": type(module).__name__}


#: What modules call the number of their block.
_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "training"})


def _checked(checkpoint: Checkpoint, kinds: Sequence[Mapping[str, Any]], kept: Sequence[int]) -> Checkpoint:
    """The checkpoint with these blocks alone, whose config makes of each what it was.

    Raises:
        CheckpointError: it would make something else of one.
    """
    cut = without_blocks(checkpoint, kept)
    for explicit in (False, True):
        if explicit:  # families whose config gives the kinds of blocks by a period take them as a list too
            cut = replace(cut, config=_with_kinds(cut.config, [kinds[i].get("layer_types") for i in kept]))
        made = block_kinds(built(cut, "the blocks that would go"))
        wrong = [
            (old, key)
            for new, old in enumerate(kept)
            for key in kinds[old]
            if kinds[old][key] != made[new].get(key)
        ]
        if not wrong:
            return cut
    block, key = wrong[0]
    raise CheckpointError(
        f"{checkpoint.path}: without blocks {clipped([i for i in range(len(kinds)) if i not in kept])} its "
        f"config.json cannot say what block {block} is ({key}): which kind a block is follows from its "
        "number in this family; name others with --blocks"
    )


def _with_kinds(config: Mapping[str, Any], kinds: Sequence[Any]) -> dict[str, Any]:
    text = text_config(config)
    if any(kind is None for kind in kinds):
        return dict(config)
    made = {**text, "layer_types": list(kinds)}
    return made if text is config else {k: made if v is text else v for k, v in config.items()}
