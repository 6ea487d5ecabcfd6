"""What a request comes to on a model and a GPU: the batch, the share of memory, the weights, and of every
pipeline stage the profile's peak, the graphs and what they leave for the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from quant.errors import one_of
from quant.hardware import Gpu
from quant.models.spec import DTYPE_BYTES, ModelSpec
from quant.planning.kvcache import KV_DTYPES, CacheLayout, layout
from quant.planning.profile import (
    Batch,
    Peak,
    graph_bytes,
    graph_sizes,
    other_memory,
    profile_peak,
)
from quant.planning.request import EngineRequest
from quant.planning.storage import is_quantized, loaded_bytes, stage_layers
from quant.schemes import Scheme
from quant.vllm.kernels import CPU_BLOCK, latent_block, state_width
from quant.vllm.releases import Rules, batch_sizes, rules_for


@dataclass(frozen=True)
class Engine:
    """What a request comes to on a model and a GPU: everything that is the same for all pipeline stages."""

    spec: ModelSpec
    scheme: Scheme
    request: EngineRequest
    rules: Rules
    gpu: Gpu
    width: int
    kv_width: float
    context: int
    tokens: int
    seqs: int
    utilization: float
    requested: int
    #: bytes of weights of every stage
    weights: tuple[int, ...]
    other: int
    block: int
    in_flight: int
    graph_sizes: int
    #: the cache of the whole model
    whole: CacheLayout

    @classmethod
    def of(cls, spec: ModelSpec, gpus: Sequence[Gpu], scheme: Scheme, request: EngineRequest) -> Engine:
        """Raises:
        UsageError: not a dtype, unknown release or source format.
        """
        world = request.ranks * request.pipeline_parallel
        gpu = min(gpus[:world], key=lambda g: (g.total_bytes, g.free_bytes))
        rules = model_rules(spec, gpu, request.vllm_version)
        width = activation_width(spec, request)
        kv_width = cache_width(spec, scheme, request, width)
        context = request.context or spec.max_context
        tokens, seqs = batch_defaults(gpu, rules, context, request, spec)
        asked = request.gpu_memory_utilization
        utilization = rules.utilization if asked is None else asked
        block = request.block_size or default_block(spec, gpu, rules)
        in_flight = rules.batches_in_flight if gpu.platform != "cpu" else 1
        eager = request.enforce_eager or gpu.platform == "cpu"
        return cls(
            spec=spec, scheme=scheme, request=request, rules=rules, gpu=gpu, width=width, kv_width=kv_width,
            context=context, tokens=tokens, seqs=seqs, utilization=utilization,
            requested=ceil(gpu.total_bytes * utilization),
            weights=tuple(
                loaded_bytes(
                    spec, scheme, request.ranks, request.pipeline_parallel, rules, width,
                    tower=request.mm_encoder_tp_mode if request.sees else "none",
                    experts_whole=request.enable_expert_parallel,
                )
            ),
            other=other_memory(rules, gpu, world, eager), block=block,
            in_flight=tokens * max(in_flight, request.pipeline_parallel),
            graph_sizes=0 if eager else graph_sizes(seqs, tokens, rules),
            whole=layout(spec, spec.cache, request.ranks, kv_width, rules, block, state_width(gpu)),
        )  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: its weights, the profile's peak, graphs, and what is left for its cache."""

    weights: int
    peak: Peak
    graphs: int
    kv: int
    blocks: int
    layout: CacheLayout


def stage_of(engine: Engine, index: int) -> Stage:
    spec, rules, request = engine.spec, engine.rules, engine.request
    parts = stage_layers(spec.layers, request.pipeline_parallel, rules)
    cache = engine.whole
    if len(parts) > 1:
        layers = [c for c in spec.cache if c.layer in parts[index]]
        cache = layout(
            spec, layers, request.ranks, engine.kv_width, rules, engine.block, state_width(engine.gpu)
        )
    batch = Batch(
        engine.tokens, engine.seqs, engine.width, request.ranks, engine.context,
        experts_whole=request.enable_expert_parallel, video=request.limit_mm_per_prompt.get("video") != 0,
    )  # fmt: skip
    peak = profile_peak(
        spec, rules, batch, first=index == 0, last=index == len(parts) - 1,
        eager=request.enforce_eager, vision=request.sees,
    )  # fmt: skip
    if rules.reserved_profile and request.ranks > 1:
        held = 2 * len(parts[index]) * engine.tokens * spec.hidden * engine.width
        peak = replace(peak, warm=peak.warm + held, cold=peak.cold + held)
    graphs = graph_bytes(spec, rules, engine.graph_sizes, request.ranks, len(parts[index]), engine.tokens)
    if engine.gpu.platform == "cpu":
        peak, graphs = Peak(0, 0, 0), 0
    taken = engine.weights[index] + engine.other + peak.cold + (graphs if rules.graphs_subtracted else 0)
    kv = engine.requested - taken
    if request.kv_cache_memory_bytes is not None:
        kv = request.kv_cache_memory_bytes
    blocks = kv // cache.bytes_per_block if cache.bytes_per_block and kv > 0 else 0
    return Stage(engine.weights[index], peak, graphs, kv, blocks, cache)


def batch_defaults(
    gpu: Gpu, rules: Rules, context: int, request: EngineRequest, spec: ModelSpec
) -> tuple[int, int]:
    """``max_num_batched_tokens`` and ``max_num_seqs`` as the server of that release would set them."""
    world = request.ranks * request.pipeline_parallel
    if gpu.platform == "cpu":
        tokens, seqs = 2048 * world, 128 * world
    elif rules.engine == "v0":
        chunked = (
            request.chunked_prefill
            if request.chunked_prefill is not None
            else context > 32768 and not spec.latent and not spec.vision
        )
        tokens = rules.chunk_tokens if chunked else max(context, 2048)
        seqs = 256
    else:
        tokens, seqs = batch_sizes(rules, gpu)
        if request.chunked_prefill is False:
            tokens = max(tokens, context)
    seqs_given = request.max_num_seqs
    seqs = seqs_given or seqs
    if request.max_num_batched_tokens is not None:
        tokens = request.max_num_batched_tokens
    elif rules.engine == "v1":
        tokens = min(tokens, seqs * context)
    if not seqs_given:
        seqs = min(seqs, tokens)
    return tokens, seqs


def model_rules(spec: ModelSpec, gpu: Gpu, vllm_version: str) -> Rules:
    """A release's accounting of such a model on such a GPU."""
    return rules_for(
        vllm_version, gpu.capability, spec.moe is not None, architecture=spec.architecture,
        recurrent=any(c.kind == "state" for c in spec.cache), platform=gpu.platform,
    )  # fmt: skip


def activation_width(spec: ModelSpec, request: EngineRequest) -> int:
    """Bytes of an activation's value.

    Raises:
        UsageError: not a dtype.
    """
    dtype = request.dtype or ("bfloat16" if spec.dtype in ("float32", "float64") else spec.dtype)
    if dtype not in DTYPE_BYTES:
        raise one_of("dtype", dtype, ["bfloat16", "float16", "float32"])
    return 2 if DTYPE_BYTES[dtype] == 1 else int(DTYPE_BYTES[dtype])


def cache_width(spec: ModelSpec, scheme: Scheme, request: EngineRequest, width: int) -> float:
    """Bytes of a cached value: as asked for, else 1 of a checkpoint with KV scales, which switches the cache
    to FP8 by itself, else those of an activation."""
    asked = KV_DTYPES[request.kv_cache_dtype]
    scaled = (spec.quantization or {}).get("kv_cache_scheme")
    if not asked and not is_quantized(scheme) and scaled:
        return 1
    return asked or width


def default_block(spec: ModelSpec, gpu: Gpu, rules: Rules) -> int:
    """Tokens of a block that the release chooses on that device."""
    if gpu.platform == "cpu":
        return latent_block(gpu) if any(c.kind == "mla" for c in spec.cache) else CPU_BLOCK
    return latent_block(gpu) if spec.latent and rules.mla else 16
