"""What a job will make and take, before it starts: bytes exactly, memory and time as estimates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from quant.calibration.statistics import Accumulator
from quant.errors import QuantError
from quant.models.adapter import block_of
from quant.models.skeleton import Skeleton
from quant.pipeline.manager import RESIDENT_CPU, QuantizationManager, worker_count
from quant.pipeline.memory import freed_memory_kept, peak_rss
from quant.pipeline.plan import JobPlan, text_config
from quant.quantizers.rounding import SEARCH_STEPS
from quant.units import format_size

#: A matrix product large enough to run at full speed, small enough to time in a moment: [tokens, features] by [features, features].
_PROBE = (8192, 2048)
#: Memory for a batch on its way through a block, and what a heap under such use cannot give back.
_HEAP = 256 << 20
#: What reading and writing take where nothing else does.
_BUFFERS = 32 << 20
#: Tensor operations of GPTQ's column loop, each over one column of all stacked outputs, and what one costs at the least.
_COLUMN_OPERATIONS, _OPERATION_SECONDS = 7, 4e-6


def estimate(plan: JobPlan) -> dict[str, Any]:
    """The plan as a dict with ``output_bytes`` (exact), ``scratch_bytes``, ``peak_rss_bytes`` and ``seconds`` (estimates, from matrix products
    timed on this machine now).

    Everything that :meth:`QuantizationManager.run` checks is checked here: the model is built without weights and the text is read.

    Raises:
        QuantError: what would stop the job.
    """
    import psutil

    manager = QuantizationManager(plan)
    value = plan.to_dict()
    available = psutil.virtual_memory().available
    calibrated = bool(manager.needs)
    tokens, scratch = 0, 0
    largest = max((12 * x.n * x.k for x in plan.linears.values()), default=0)  # fp32, its rounding, and what a search compares
    seconds = 0.0
    if calibrated:
        start = time.perf_counter()
        rows, skeleton = manager.prepare()
        prepared = time.perf_counter() - start
        length = rows.tokens.shape[1]
        tokens = rows.tokens.numel()
        config = text_config(plan.checkpoint.config)
        width = int(config.get("hidden_size") or 0)
        item = skeleton.dtype.itemsize
        groups = _groups(plan, skeleton)
        block_bytes = max(sum(p.numel() for p in block.parameters()) for block in skeleton.blocks) * item
        widest = max(k for _, k in groups)
        # while a group is solved: its weights as fp32, their errors and codes, and the Hessian's factor; or before, the Hessian in two orders
        largest = max(max(9 * n * k + 4 * k * k, 4 * n * k + 8 * k * k) for n, k in groups) + block_bytes
        waiting = (width + widest) * (tokens + length) * item  # what a batch holds while it waits: the residual and a linear's input
        resident = min(RESIDENT_CPU, waiting) if manager.device.type == "cpu" else 0
        scratch = waiting - resident
        largest += resident + _HEAP
        peak = peak_rss() + largest  # before products are timed
        seconds = prepared + _seconds(plan, groups, tokens, manager.device, skeleton.dtype)
    else:
        peak = peak_rss() + largest * worker_count(torch.get_num_threads()) + _BUFFERS
        seconds = sum(x.n * x.k for x in plan.linears.values()) * 40 / 2e9 * (SEARCH_STEPS if plan.recipe.clip_search else 1)
    seconds += (plan.checkpoint.nbytes + 2 * plan.output_bytes) / 1e9
    if peak > psutil.virtual_memory().total:
        raise QuantError(
            f"the job needs about {format_size(peak)} of memory, the machine has {format_size(psutil.virtual_memory().total)}: "
            "use fewer --samples or a shorter --sequence-length"
        )
    value.update(
        scratch_bytes=scratch, peak_rss_bytes=peak, available_bytes=available, seconds=round(seconds, 1), calibration_tokens=tokens
    )
    return value


def _groups(plan: JobPlan, skeleton: Skeleton) -> list[tuple[int, int]]:
    """Stacked outputs and inputs (N, K) of every group of linears that is solved as one."""
    found = []
    for block in range(skeleton.block_count):
        for group in skeleton.adapter.groups:
            members = [x for n in group.linears if (x := plan.linears.get(skeleton.block_prefix(block) + n))]
            if members:
                found.append((sum(x.n for x in members), members[0].k))
    return found


def _seconds(plan: JobPlan, groups: list[tuple[int, int]], tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Forward pass, statistics and solves at the speed that matrix products have here now."""
    forward = 2 * tokens * sum(i.numel for n, i in plan.checkpoint.tensors.items() if block_of(n) is not None)
    products = sum(2 * tokens * k * k for _, k in groups)
    solve = sum(k**3 / 3 + n * k * k for n, k in groups)
    columns = sum(k * max(_OPERATION_SECONDS, n * 4e-10) for n, k in groups) * _COLUMN_OPERATIONS
    t, k = _PROBE
    x = torch.randn(t, k, device=device).to(dtype)
    w = torch.randn(k, k, device=device).to(dtype)
    y = torch.randn(k, k, device=device)

    def gram() -> None:
        accumulator = Accumulator(k, device, {"hessian"})
        accumulator.add(x)
        accumulator.finish()

    with freed_memory_kept():
        rate = {
            "forward": 2 * t * k * k / _timed(lambda: torch.nn.functional.linear(x, w)),
            "gram": 2 * t * k * k / _timed(gram),
            "solve": 2 * k**3 / _timed(lambda: y @ y),
        }
    return forward / rate["forward"] * 1.25 + products / rate["gram"] + solve / rate["solve"] + columns


def _timed(run: Callable[[], object]) -> float:
    """Least seconds of three calls after a first one, which loads kernels and claims memory."""
    seconds = []
    for _ in range(4):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
