"""Upper bounds of speed from the roofline: bytes over bandwidth while decoding, operations over rate while
reading the prompt, and the least time of a layer and of an all-reduce.

They are bounds: no kernel reaches them, and nothing here was fitted. What a plan's speed will be about is
:mod:`quant.planning.throughput`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from quant.hardware import Gpu
from quant.models.spec import ModelSpec, Weight
from quant.planning.memory import MemoryPlan
from quant.planning.storage import is_quantized, source_schemes
from quant.schemes import Scheme
from quant.vllm.kernels import formats_of, kernel_of

if TYPE_CHECKING:
    from quant.planning.throughput import Forecast

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
    #: what it will be about; None where nothing like it was fitted, which ``unknown`` says
    about: Forecast | None = None
    unknown: str = ""

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


def read_weights(spec: ModelSpec) -> Iterator[Weight]:
    """The weights that a token's forward pass reads."""
    for weight in spec.weights:
        if weight.role not in ("tower", "mtp") and (weight.role != "embedding" or spec.tied):
            yield weight


def stored_schemes(spec: ModelSpec, scheme: Scheme) -> Callable[[Weight], Scheme | None]:
    """How each weight is stored: as planned, or as the checkpoint itself has it; None: in 16 bits."""
    if is_quantized(scheme):
        return lambda weight: scheme if weight.linear else None
    return source_schemes(spec)


def computed_in(own: Scheme | None, gpu: Gpu, formats: Mapping[str, str]) -> tuple[str, float]:
    """How a weight stored in a scheme is multiplied (in ``16`` bits, natively in ``8`` or fewer, or from
    ``packed`` weights in 16 bits) and the GPU's operations a second at it.

    Args:
        formats: of :func:`quant.vllm.kernels.formats_of`.
    """
    if own is None:
        return "16", gpu.rates["fp16"]
    native = own.activations is not None and formats.get(kernel_of(own)) == "native"
    if native and (rate := gpu.rates.get(own.compute_format)):
        return "8", rate
    return "packed", gpu.rates["fp16"]


def bytes_of(spec: ModelSpec, weight: Weight, own: Scheme | None, planned: Scheme) -> float:
    """Bytes of a weight on the GPU: those of the file where it is served as it is, else the scheme's.

    Args:
        own: the scheme that it is stored in.
        planned: the plan's scheme.
    """
    if not is_quantized(planned) and spec.quantization and weight.stored_bytes:
        return weight.stored_bytes
    n, k = weight.shape[0], prod(weight.shape[1:])
    return weight.parameters * (2.0 if own is None else own.stored_bytes(n, k, 2) / (n * k))


def _compute_seconds(spec: ModelSpec, gpu: Gpu, scheme: Scheme) -> float | None:
    """Seconds that one token's multiplications take on one GPU; None where its rates are not known.

    Without kernels for both operands, weights are unpacked and multiplied in 16 bits.
    """
    if not gpu.rates.get("fp16"):
        return None
    stored, formats, total = stored_schemes(spec, scheme), formats_of(gpu), 0.0
    for weight in read_weights(spec):
        share = spec.moe.active / spec.moe.experts if spec.moe and weight.role == "experts" else 1.0
        total += 2 * weight.parameters * share / computed_in(stored(weight), gpu, formats)[1]
    return total


def _bytes_read(spec: ModelSpec, scheme: Scheme, experts: float = 1.0) -> float:
    """Bytes of weights that one decoding step reads; ``experts`` times the active share of routed experts."""
    total, stored = 0.0, stored_schemes(spec, scheme)
    for weight in read_weights(spec):
        routed = spec.moe is not None and weight.role == "experts"
        share = min(1.0, experts * spec.moe.active / spec.moe.experts) if spec.moe and routed else 1.0
        total += bytes_of(spec, weight, stored(weight), scheme) * share
    return total
