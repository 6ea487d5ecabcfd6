"""How large a checkpoint may be so that GPUs hold it beside what requests need."""

from __future__ import annotations

from pathlib import Path

from quant.errors import NothingFits
from quant.planning.recommendation import MARGIN, recommend
from quant.planning.request import EngineRequest
from quant.planning.scheme_plans import needed_bytes
from quant.planning.storage import checkpoint_bytes, requantizable


def fitting_bytes(model: str | Path, gpu: str | None, request: EngineRequest, scheme: str) -> int:
    """Bytes of tensors that a checkpoint may have.

    The model is planned in a scheme; what that leaves on the GPU with the least room, less the margin that a
    recommendation keeps and what the plan may be off by, may go into weights on every GPU. Weights that ranks
    do not share out (keys and values of fewer heads than ranks) take of the margin.

    Args:
        gpu: a part's name and how many; None: those here.
        request: with the context and the requests to hold; what it leaves open is as a recommendation has it.

    Raises:
        NothingFits: not even the scheme leaves room.
        QuantError: no GPU is here, and none is named.

    >>> fitting_bytes("meta-llama/Llama-3.1-8B-Instruct", "RTX 4070-12GB", EngineRequest(), "w4a16") // 10**8
    83
    """
    found = recommend(model, gpu, request, scheme=scheme)
    planned, plans = found.plans[0].plan, found.plans[0]
    if planned is None or not plans.meets:
        raise NothingFits(found.reason)
    device = min(found.gpus, key=lambda g: (g.total_bytes, g.free_bytes))
    needed = needed_bytes(planned, found.request.concurrency)
    cache = planned.kv_cache_bytes - (needed - (planned.requested_bytes - planned.kv_cache_bytes))
    room = min(cache - planned.error_bytes, int(device.free_bytes * (1 - MARGIN)) - needed)
    if room < 0:
        raise NothingFits(
            f"{plans.label} leaves no margin on {device.name}: {plans.why}; --target-size asks for a size "
            "without one"
        )
    spec = requantizable(found.model) if found.model.quantization else found.model
    return checkpoint_bytes(spec, plans.stored) + room * planned.tensor_parallel * planned.pipeline_parallel
