"""Whether vLLM can build a model's linears in a scheme, whole and shared out over ranks, and whether the
kernels of its CPU build take them."""

from __future__ import annotations

from collections.abc import Callable

from quant.hardware import Gpu
from quant.models.spec import ModelSpec, Weight
from quant.planning.storage import ForeignScheme, is_quantized, quantizable, source_schemes
from quant.schemes import UNQUANTIZED, Scheme
from quant.vllm.kernels import cpu_shape_problems, kernel_of
from quant.vllm.layers import Linear, layer_shapes, shape_problems


def parallel_problems(spec: ModelSpec, ranks: int) -> list[str]:
    """Why vLLM cannot cut this model, in 16 bits, into ``ranks``: empty when it can."""
    return shape_problems(
        [_linear(weight, UNQUANTIZED) for weight in spec.linear_kinds], ranks, spec.shared_heads
    )


def group_problems(
    spec: ModelSpec, scheme: Scheme | None, ranks: int, *, experts_whole: bool = False
) -> list[str]:
    """Why vLLM cannot build the model's linears in a scheme, or not over ``ranks``: groups and blocks that do
    not divide. A linear of the checkpoint that its own groups do not divide was left in 16 bits. With
    ``experts_whole`` ranks cut no expert."""
    stored = _stored(spec, scheme)
    cut = [w for w in spec.linear_kinds if not (experts_whole and w.role == "experts")]
    return shape_problems([_linear(w, stored(w)) for w in cut], ranks, spec.shared_heads)


def cpu_misfits(spec: ModelSpec, scheme: Scheme | None, cpu: Gpu) -> list[str]:
    """Why the kernels of vLLM's CPU build do not take the sizes of a model's linears in a scheme; empty on a
    GPU."""
    if cpu.platform != "cpu":
        return []
    stored = _stored(spec, scheme)
    linears = [_linear(w, stored(w)) for w in spec.linear_kinds if w.role != "experts"]
    quantized = [x for x in linears if x.scheme != UNQUANTIZED]
    return cpu_shape_problems((kernel_of(x.scheme), name, n, k) for name, x, n, k in layer_shapes(quantized))


def _stored(spec: ModelSpec, scheme: Scheme | None) -> Callable[[Weight], Scheme]:
    """What each linear is stored in: the scheme, or of a checkpoint as it is its own."""
    planned = scheme if is_quantized(scheme) else None
    own = source_schemes(spec)

    def stored(weight: Weight) -> Scheme:
        if planned is not None:
            return planned
        source = own(weight)
        if source is None or (isinstance(source, ForeignScheme) and source.padded):
            return UNQUANTIZED
        return source if quantizable(weight, source) else UNQUANTIZED

    return stored


def _linear(weight: Weight, scheme: Scheme) -> Linear:
    n, k = weight.shape
    return Linear(weight.tensor.removesuffix(".weight"), n, k, scheme.weights, scheme.activations)
