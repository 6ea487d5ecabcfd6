"""Upper bounds of speed from the roofline: bytes over bandwidth while decoding, operations over rate while
reading the prompt.

They are bounds, not forecasts: no kernel reaches them, and nothing here was fitted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from quant.hardware import Gpu
from quant.models.spec import ModelSpec
from quant.planning.memory import MemoryPlan
from quant.planning.storage import is_quantized, source_schemes
from quant.schemes import Scheme
from quant.vllm.kernels import formats_of, kernel_of


@dataclass(frozen=True)
class Speed:
    """Bounds in tokens a second: one sequence decoding, all sequences decoding together, and reading the
    prompt. None: not known."""

    decode_bound: float | None
    batch_decode_bound: float | None
    prefill_bound: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def speed_bounds(spec: ModelSpec, gpu: Gpu, plan: MemoryPlan, concurrency: int) -> Speed:
    """The bounds for one plan on its GPUs, with ``concurrency`` sequences of half the context."""
    if not gpu.bandwidth:
        return Speed(None, None, None)
    ranks = plan.tensor_parallel
    read = _bytes_read(spec, plan.scheme) / ranks
    cache = plan.kv_bytes_per_token * plan.context / 2
    one = gpu.bandwidth / (read + cache)
    experts = 1.0
    if spec.moe:  # a batch touches more experts: each token picks its own
        share = 1 - (1 - spec.moe.active / spec.moe.experts) ** concurrency
        experts = share * spec.moe.experts / spec.moe.active
    all_read = _bytes_read(spec, plan.scheme, experts) / ranks
    batch = concurrency * gpu.bandwidth / (all_read + concurrency * cache)
    # without kernels for both, weights are unpacked and multiplied in 16 bits
    native = is_quantized(plan.scheme) and formats_of(gpu).get(kernel_of(plan.scheme)) == "native"
    rate = gpu.rates.get(plan.scheme.compute_format if native else "fp16", 0.0)
    prefill = rate * ranks / (2 * spec.active_parameters) if rate else None
    return Speed(one, batch, prefill)


def _bytes_read(spec: ModelSpec, scheme: Scheme, experts: float = 1.0) -> float:
    """Bytes of weights that one decoding step reads; ``experts`` times the active share of routed experts."""
    total = 0.0
    own, planned = source_schemes(spec), scheme if is_quantized(scheme) else None
    for weight in spec.weights:
        if weight.role in ("tower", "mtp") or (weight.role == "embedding" and not spec.tied):
            continue
        share = (
            min(1.0, experts * spec.moe.active / spec.moe.experts)
            if spec.moe and weight.role == "experts"
            else 1.0
        )
        if planned is None:
            stored = own(weight)
        else:
            stored = planned if weight.linear else None
        n, k = weight.shape[0], prod(weight.shape[1:])
        width = 2.0 if stored is None else stored.stored_bytes(n, k, 2) / (n * k)
        size = (
            weight.stored_bytes
            if planned is None and spec.quantization and weight.stored_bytes
            else weight.parameters * width
        )
        total += size * share
    return total
