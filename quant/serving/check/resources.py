"""Memory of the GPUs, of the KV cache and of the disk, against what was planned."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from quant.errors import QuantError
from quant.hardware import Gpu, detect
from quant.serving.check.context import Context
from quant.serving.check.value import Check, Finding, Skip, judged, within
from quant.serving.server_metrics import cache_tokens
from quant.units import format_size


async def gpu_memory(context: Context) -> list[Finding]:
    if not context.endpoint.local:
        raise Skip("the endpoint is another machine's")
    gpus = detect().gpus
    if not gpus:
        raise Skip("no GPU is here")
    limit = context.profile.resources.gpu_memory_share
    return [_share(gpu, limit) for gpu in gpus if gpu.used_bytes]


def _share(gpu: Gpu, limit: float) -> Finding:
    share = gpu.used_bytes / gpu.total_bytes
    return judged(
        f"memory of GPU {gpu.index}",
        share <= limit,
        f"{format_size(gpu.used_bytes)} of {format_size(gpu.total_bytes)} of {gpu.name}",
        value=round(share, 4),
        threshold=limit,
        todo="a spike will not fit: lower --gpu-memory-utilization, or see what else is on that GPU",
    )


async def kv_tokens(context: Context) -> list[Finding]:
    reply = await context.send("GET", "/metrics")
    real = cache_tokens(reply.text) if reply.status == 200 else None
    if real is None:
        raise Skip("the endpoint does not tell the size of its KV cache (/metrics)")
    context.facts["kv_cache_tokens"] = real
    path, gpus = context.needs_checkpoint(), context.gpus
    if not gpus or gpus[0].platform == "cpu":
        raise Skip(f"{real:,} tokens; no GPU is known for which they were planned: name it with --gpu")
    planned = _planned(path, gpus, context.length)
    share = context.profile.resources.kv_tokens_share
    return [
        judged(
            "KV cache as planned",
            real >= share * planned,
            f"{real:,} tokens, planned on {gpus[0].name} were {planned:,}",
            value=real,
            threshold=round(share * planned),
            todo="fewer requests fit than planned: see what else takes the GPU's memory, and the arguments "
            "that the server was started with (quant-deploy plan)",
            otherwise="WARN",
        )
    ]


def _planned(path: Path, gpus: list[Gpu], length: int | None) -> int:
    """Tokens of KV cache that the planner expects.

    Raises:
        Skip: it cannot plan this model.
    """
    from quant.catalog import load_model
    from quant.planning.memory import plan
    from quant.planning.request import EngineRequest

    try:
        spec = load_model(path)
        context = None if length is None else min(length, spec.max_context)
        return plan(spec, gpus, None, EngineRequest(context=context)).kv_tokens
    except QuantError as error:
        raise Skip(f"it cannot be planned: {error}") from error


async def disk(context: Context) -> list[Finding]:
    if not context.endpoint.local:
        raise Skip("the endpoint is another machine's")
    limit = context.profile.resources.free_disk
    places = {"temporary files": Path(tempfile.gettempdir())}
    places |= {"the checkpoint": context.checkpoint} if context.checkpoint else {}
    places |= {"the log": context.log.absolute().parent} if context.log else {}
    findings = []
    for what, place in places.items():
        free = shutil.disk_usage(place).free
        findings.append(
            judged(
                f"disk room of {what}",
                free >= limit,
                f"{format_size(free)} are free at {place}",
                value=free,
                threshold=limit,
                todo="logs, compiled kernels and the next model will not fit: make room",
                otherwise="WARN" if free >= limit / 10 else "FAIL",
            )
        )
    return findings


CHECKS = (
    Check("memory of the GPUs", gpu_memory, within(60)),
    Check("KV cache as planned", kv_tokens, within(120)),
    Check("disk room", disk, within(30)),
)
