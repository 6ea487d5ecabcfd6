"""What a plan may be off by: errors of the planned KV cache beside measured starts, by kind of device and of
model (``configs/planner_errors.json``, written by ``benchmarks/planner_accuracy.py --write``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quant.data import load_json
from quant.hardware import Gpu
from quant.models.spec import ModelSpec
from quant.units import GIB
from quant.vllm.kernels import has_unified_memory
from quant.vllm.releases import Rules

if TYPE_CHECKING:
    from quant.planning.request import EngineRequest


def kind_of(spec: ModelSpec, rules: Rules, gpu: Gpu, request: EngineRequest) -> str:
    """The row of the table that a start belongs to.

    What makes plans differ most comes first: unified memory, ROCm, then what the model is made of.
    """
    if gpu.platform == "cpu":
        return "cpu"
    if has_unified_memory(gpu):
        return "unified memory"
    if gpu.platform == "rocm":
        return "rocm mixture" if spec.moe else "rocm"
    if any(c.kind == "state" for c in spec.cache):
        return "recurrent"
    if spec.moe:
        return "mixture"
    if spec.vision and request.sees:
        return "vision"
    return "dense" if rules.engine == "v1" else "dense, engine V0"


def stated_error(spec: ModelSpec, rules: Rules, gpu: Gpu, request: EngineRequest, weights: int) -> int:
    """Bytes by which the room for the KV cache may be smaller or larger than planned: the kind's, and the
    share of the weights that their source leaves open."""
    rows = load_json("planner_errors.json")["kinds"]
    row = rows.get(kind_of(spec, rules, gpu, request), rows["all"])
    return int(row["error_gib"] * GIB + spec.uncertainty * weights)
