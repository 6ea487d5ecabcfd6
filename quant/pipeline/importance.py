"""llama.cpp's importance matrix from this project's calibration: E[x²] of each linear's input.

llama.cpp weighs the squared error of a column by it when it chooses scales (``quantize_row_*_impl``). It is
the diagonal of the Hessian that GPTQ uses; llama.cpp's own program gathers the same sums by running its
graph. Experts have sums of their own, of the tokens that were sent to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quant.models.adapter import InputGroup
from quant.models.experts import Routed
from quant.models.skeleton import Skeleton
from quant.pipeline.activation_store import ActivationStore, Batches, Calls
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.memory import give_back
from quant.pipeline.plan import plan_job
from quant.pipeline.staged import StagedForward, computed
from quant.progress import Event, Progress, silent
from quant.recipe import make_recipe

#: The expert that a linear belongs to.
_EXPERT = re.compile(r"\.(\d+)\.\w+$")


def importance(
    model_path: Path, scratch: Path, options: Mapping[str, Any] | None = None, progress: Progress = silent
) -> dict[str, torch.Tensor]:
    """fp32 [K] by linear, E[x²] of its input over the calibration rows; of an expert that no token was sent
    to, nothing.

    Args:
        scratch: what activations are spilled to beside memory; removed at the end. Its name must be free.
        options: of calibration, as :func:`quant.make_recipe` takes them.

    Raises:
        QuantError: no calibration text, or a model that cannot be run block by block.
    """
    values = {"method": "gptq", "target": "other", **(options or {})}
    recipe = make_recipe({**values, "model_path": model_path, "output_path": scratch})
    manager = QuantizationManager(plan_job(recipe), progress)
    rows, skeleton = manager.prepare()
    sums = _Sums()
    resident = manager.workspace.resident_bytes()
    store = ActivationStore(resident, scratch.with_name(f"{scratch.name}.activations"))
    try:
        tokens, _ = manager.workspace.batches(rows)
        calls = Calls(store)
        seen = tokens if rows.held_out is None else tokens[:-1]
        batches = Batches(store, skeleton.embedded(seen, calls.append))
        for index in range(skeleton.block_count):
            progress(Event("importance", index, skeleton.block_count))
            _observe(skeleton, index, batches, calls, store, sums)
            give_back()
    finally:
        store.close()
    return {name: total / count for name, (total, count) in sums.of.items() if count}


class _Sums:
    """Sums of squares by linear, fp32 [K], and tokens."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[torch.Tensor, int]] = {}

    def add(self, prefix: str, group: InputGroup, inputs: torch.Tensor | Routed) -> None:
        if isinstance(inputs, Routed):
            parts = inputs.rows[inputs.index].split(inputs.counts.tolist())
            for name in group.linears:
                match = _EXPERT.search(name)
                assert match is not None, name
                self._add(prefix + name, parts[int(match[1])])
            return
        flat = inputs.reshape(-1, inputs.shape[-1])
        for name in group.linears:
            self._add(prefix + name, flat)

    def _add(self, name: str, rows: torch.Tensor) -> None:
        total, count = self.of.get(name, (torch.zeros(rows.shape[-1]), 0))
        self.of[name] = total + rows.float().square().sum(0).cpu(), count + len(rows)


def _observe(
    skeleton: Skeleton, index: int, batches: Batches, calls: Calls, store: ActivationStore, sums: _Sums
) -> None:
    """Runs all batches through a block as it is."""
    block, prefix = skeleton.load_block(index), skeleton.block_prefix(index)
    modules = {n: x.module for n, x in skeleton.linears(index).items() if not x.shared}

    def observe(group: InputGroup, _: int, inputs: torch.Tensor | Routed) -> None:
        sums.add(prefix, group, inputs)

    last = index == skeleton.block_count - 1
    staged = StagedForward(
        block, index, list(skeleton.groups(index)), batches, calls, store, observe, not last, modules
    )
    with computed(block):
        staged.look_ahead()
    with computed(block):
        for _ in staged.stages():
            pass
    skeleton.free_block(index)
