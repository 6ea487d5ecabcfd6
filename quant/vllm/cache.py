"""Scales of an FP8 KV cache: their names in a file, and what vLLM asks of ``kv_cache_scheme``.

Source: vLLM 0.32 `model_loader/weight_utils.py::maybe_remap_kv_scale_name`, `quantization/kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.checkpoint.header import WIDE_FLOATS, TensorInfo
from quant.errors import clipped

#: Last parts of the names of an FP8 KV cache's scales.
CACHE_SCALES = ("k_scale", "v_scale", "q_scale")
#: Projections that K and V come from, beside which the scales of their cache stand.
CACHE_PROJECTIONS = ("k_proj", "qkv_proj", "kv_a_proj_with_mqa")
#: Of a cache whose K and V have one calibrated scale a layer; with it vLLM's `--kv-cache-dtype auto` means
#: FP8.
KV_CACHE: dict[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor",
    "dynamic": False,
}


def cache_scale(name: str) -> str | None:
    """The name that a number of an engine's FP8 KV cache has in our files, from any of the names that vLLM
    knows; None of other tensors.

    >>> cache_scale("model.layers.0.self_attn.k_proj.output_scale")
    'model.layers.0.self_attn.k_scale'
    """
    module, _, last = name.rpartition(".")
    layer, _, part = module.rpartition(".")
    if last == "output_scale" and part in ("k_proj", "v_proj"):
        return f"{layer}.{part[0]}_scale"
    if last not in CACHE_SCALES:
        return None
    inner = part in ("q_proj", "k_proj", "v_proj") or (
        part == "attn" and layer.endswith(("attn", "attention"))
    )
    return ".".join(filter(None, (layer if inner else module, last)))


def cache_problems(tensors: Mapping[str, TensorInfo], scheme: object) -> list[str]:
    """Scales that ``kv_cache_scheme`` promises. vLLM takes 1.0 for a missing one without a word."""
    if not isinstance(scheme, dict):
        return [f"kv_cache_scheme is not an object but {str(scheme)[:60]!r}"]
    strategy = scheme.get("strategy", "tensor")
    problems = [
        f"kv_cache_scheme has {k} {clipped(scheme.get(k, v))}: vLLM takes {v!r}"
        for k, v in KV_CACHE.items()
        if k != "strategy" and scheme.get(k, v) != v
    ]
    if strategy not in ("tensor", "attn_head"):
        problems.append(f"kv_cache_scheme has strategy {clipped(strategy)}: vLLM takes tensor or attn_head")
    modules = [n.rpartition(".")[0] for n in tensors]
    layers = dict.fromkeys(m.rpartition(".")[0] for m in modules if m.rpartition(".")[2] in CACHE_PROJECTIONS)
    if not layers and not any(n.endswith(CACHE_SCALES[:2]) for n in tensors):
        problems.append(
            f"no layer has any of {', '.join(CACHE_PROJECTIONS)}, nor scales of a cache: vLLM would take 1.0"
        )
    for layer in layers:
        for last in CACHE_SCALES[:2]:
            projection = f"{layer}.{last[0]}_proj"
            places = (
                f"{layer}.{last}",
                f"{layer}.attn.{last}",
                f"{projection}.{last}",
                f"{projection}.output_scale",
            )
            held = next((tensors[p] for p in places if p in tensors), None)
            if held is None:
                problems.append(f"{layer}.{last} is missing: vLLM would take 1.0")
            elif held.dtype not in WIDE_FLOATS or (strategy == "tensor" and held.shape not in ((), (1,))):
                problems.append(f"{held.name} is {held.dtype} {held.shape}, the contract is F32 (1,)")
    return problems
