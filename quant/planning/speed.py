"""Upper bounds of speed from the roofline: bytes over bandwidth while decoding, operations over rate while
reading the prompt.

They are bounds, not forecasts: no kernel reaches them, and nothing here was fitted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from quant.architectures import ModelSpec
from quant.hardware import Gpu
from quant.planning.memory import MemoryPlan
from quant.planning.storage import QUANTIZED_ROLES, source_storage, storage_of
from quant.vllm.kernels import formats_of

#: scheme → the number format in which the GPU multiplies, and the one that it must have kernels for; others
#: unpack weights and multiply in 16 bits
COMPUTE = {
    "w8a8-fp8": ("fp8", "fp8"), "w8a8-fp8-tensor": ("fp8", "fp8"), "fp8": ("fp8", "fp8"),
    "fp8-block": ("fp8", "fp8"),
    "w8a8-int8": ("int8", "int8"), "nvfp4": ("fp4", "nvfp4"), "mxfp4": ("fp4", "mxfp4"),
    "mxfp8": ("fp8", "mxfp8"),
}  # fmt: skip


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
    number, kernel = COMPUTE.get(plan.scheme, ("", ""))
    native = formats_of(gpu).get(kernel) == "native"
    rate = gpu.rates.get(number if native else "fp16", 0.0)
    prefill = rate * ranks / (2 * spec.active_parameters) if rate else None
    return Speed(one, batch, prefill)


def _bytes_read(spec: ModelSpec, scheme: str, experts: float = 1.0) -> float:
    """Bytes of weights that one decoding step reads; ``experts`` times the active share of routed experts."""
    total = 0.0
    own, covered = source_storage(spec)
    storage = own if scheme == "none" else storage_of(scheme)
    for weight in spec.weights:
        if weight.role in ("vision", "mtp") or (weight.role == "embedding" and not spec.tied):
            continue
        share = (
            min(1.0, experts * spec.moe.active / spec.moe.experts)
            if spec.moe and weight.role == "experts"
            else 1.0
        )
        packed = covered(weight) if scheme == "none" else weight.linear and weight.role in QUANTIZED_ROLES
        n, k = weight.shape[0], prod(weight.shape[1:])
        width = storage.bytes(n, k, 2) / (n * k) if packed else 2.0
        size = (
            weight.stored_bytes
            if scheme == "none" and spec.quantization and weight.stored_bytes
            else weight.parameters * width
        )
        total += size * share
    return total
