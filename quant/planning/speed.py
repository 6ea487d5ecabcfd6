"""Upper bounds of speed from the roofline: bytes over bandwidth while decoding, operations over rate while
reading the prompt, and the least time of a layer and of an all-reduce.

They are bounds, not forecasts: no kernel reaches them, and nothing here was fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from quant.hardware import Gpu
from quant.models.spec import ModelSpec, Weight
from quant.planning.memory import MemoryPlan
from quant.planning.storage import is_quantized, source_schemes
from quant.schemes import Scheme
from quant.vllm.kernels import formats_of, kernel_of

#: Seconds that the kernels of a decoder block take at least in a captured graph: about eight, two
#: microseconds each, however little they read.
LAYER_SECONDS = 16e-6
#: Seconds of one all-reduce of a few kilobytes, by how GPUs are linked; a block has two.
ALL_REDUCE_SECONDS = {"nvlink": 8e-6, "pcie": 25e-6}
#: Prompt tokens read for one generated: the use cases of arXiv 2411.02355 have two to eight.
PROMPT_TOKENS = 4


@dataclass(frozen=True)
class Speed:
    """Bounds in tokens a second: one sequence decoding, all sequences decoding together, reading the prompt,
    and generating with prompts of :data:`PROMPT_TOKENS` tokens for each generated one. None: not known."""

    decode_bound: float | None
    batch_decode_bound: float | None
    prefill_bound: float | None
    served_bound: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def speed_bounds(spec: ModelSpec, gpu: Gpu, plan: MemoryPlan, concurrency: int) -> Speed:
    """The bounds for one plan on its GPUs, with ``concurrency`` sequences of half the context."""
    if not gpu.bandwidth:
        return Speed(None, None, None)
    ranks = plan.tensor_parallel
    compute = _compute_seconds(spec, gpu, plan.scheme)

    def step(sequences: int) -> float:
        return step_seconds(spec, gpu, plan, sequences)

    batch = concurrency / step(concurrency)
    prefill = ranks / compute if compute else None
    served = 1 / (PROMPT_TOKENS / prefill + 1 / batch) if prefill else batch
    return Speed(1 / step(1), batch, prefill, served)


def step_seconds(spec: ModelSpec, gpu: Gpu, plan: MemoryPlan, sequences: int, tokens: int = 1) -> float:
    """The least seconds of one pass over ``tokens`` tokens of each of some sequences, each with half the
    planned context in its cache; for a GPU whose bandwidth is known."""
    ranks = plan.tensor_parallel
    cache = plan.kv_bytes_per_token * plan.context / 2
    reduced = 2 * spec.layers * ALL_REDUCE_SECONDS.get(gpu.link, 0.0) if ranks > 1 else 0.0
    compute = _compute_seconds(spec, gpu, plan.scheme) or 0.0
    experts = 1.0
    if spec.moe:  # a batch touches more experts: each token picks its own
        share = 1 - (1 - spec.moe.active / spec.moe.experts) ** (sequences * tokens)
        experts = share * spec.moe.experts / spec.moe.active
    read = (_bytes_read(spec, plan.scheme, experts) / ranks + sequences * cache) / gpu.bandwidth
    computed = sequences * tokens * compute / ranks
    return max(read, computed, spec.layers * LAYER_SECONDS) + reduced


def _read_weights(spec: ModelSpec) -> Iterator[Weight]:
    """The weights that a token's forward pass reads."""
    for weight in spec.weights:
        if weight.role not in ("tower", "mtp") and (weight.role != "embedding" or spec.tied):
            yield weight


def _stored(spec: ModelSpec, scheme: Scheme) -> Callable[[Weight], Scheme | None]:
    """How each weight is stored: as planned, or as the checkpoint itself has it; None: in 16 bits."""
    if is_quantized(scheme):
        return lambda weight: scheme if weight.linear else None
    return source_schemes(spec)


def _compute_seconds(spec: ModelSpec, gpu: Gpu, scheme: Scheme) -> float | None:
    """Seconds that one token's multiplications take on one GPU; None where its rates are not known.

    Without kernels for both operands, weights are unpacked and multiplied in 16 bits.
    """
    if not gpu.rates.get("fp16"):
        return None
    stored, formats, total = _stored(spec, scheme), formats_of(gpu), 0.0
    for weight in _read_weights(spec):
        own = stored(weight)
        native = own is not None and own.activations is not None and formats.get(kernel_of(own)) == "native"
        rate = (gpu.rates.get(own.compute_format) if native and own else None) or gpu.rates["fp16"]
        share = spec.moe.active / spec.moe.experts if spec.moe and weight.role == "experts" else 1.0
        total += 2 * weight.parameters * share / rate
    return total


def _bytes_read(spec: ModelSpec, scheme: Scheme, experts: float = 1.0) -> float:
    """Bytes of weights that one decoding step reads; ``experts`` times the active share of routed experts."""
    total, stored, planned = 0.0, _stored(spec, scheme), is_quantized(scheme)
    for weight in _read_weights(spec):
        share = (
            min(1.0, experts * spec.moe.active / spec.moe.experts)
            if spec.moe and weight.role == "experts"
            else 1.0
        )
        own = stored(weight)
        n, k = weight.shape[0], prod(weight.shape[1:])
        width = 2.0 if own is None else own.stored_bytes(n, k, 2) / (n * k)
        size = (
            weight.stored_bytes
            if not planned and spec.quantization and weight.stored_bytes
            else weight.parameters * width
        )
        total += size * share
    return total
