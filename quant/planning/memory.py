"""The memory plan: what vLLM does with a GPU's memory when it starts, byte by byte, and whether it starts at
all.

::

    requested = ceil(total × gpu_memory_utilization)         must be free at start
    KV cache  = requested − weights − other (CUDA context, NCCL, libraries) − activation peak [− CUDA graphs]
    blocks    = KV cache // bytes per block                  the pipeline stage with the fewest decides

The activation peak is that of the profile run: one forward pass of ``max_num_batched_tokens`` tokens, then
the sampler over ``max_num_seqs`` rows of logits. Which of the two is larger depends on the release and on the
vocabulary, seldom on the model's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from quant.errors import Problems, UsageError, one_of
from quant.hardware import Gpu
from quant.models.spec import DTYPE_BYTES, ModelSpec, Weight
from quant.planning.kvcache import KV_DTYPES, CacheLayout, layout, longest_context
from quant.planning.storage import (
    ForeignScheme,
    is_quantized,
    loaded_bytes,
    quantizable,
    source_schemes,
    stage_layers,
)
from quant.schemes import UNQUANTIZED, Scheme
from quant.units import format_size
from quant.vllm.kernels import CPU_BLOCK, latent_block, shares_memory, state_width
from quant.vllm.layers import Linear, shape_problems
from quant.vllm.releases import VLLM_VERSION, Rules, batch_sizes, rules_for

GIB = 2**30
#: resident memory of a worker of vLLM's CPU build that serves an 11 MB model: the interpreter and its
#: libraries
CPU_PROCESS_BYTES = int(0.63 * GIB)
MIB = 2**20


@dataclass(frozen=True)
class EngineRequest:
    """vLLM's arguments as asked for; None leaves vLLM's default. Lengths are tokens."""

    context: int | None = None
    concurrency: int = 1
    kv_cache_dtype: str = "auto"
    #: None: one GPU, or for a recommendation as many as there are
    tensor_parallel: int | None = None
    pipeline_parallel: int = 1
    gpu_memory_utilization: float | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enforce_eager: bool = False
    block_size: int | None = None
    vllm_version: str = VLLM_VERSION
    chunked_prefill: bool | None = None
    #: bytes of KV cache given outright: no profiling, utilization ignored
    kv_cache_memory_bytes: int | None = None
    dtype: str | None = None

    @property
    def ranks(self) -> int:
        """The degree of tensor parallelism, 1 where it is left open."""
        return 1 if self.tensor_parallel is None else self.tensor_parallel

    def check(self, spec: ModelSpec, gpus: Sequence[Gpu]) -> None:
        """Everything wrong with the request, listed together.

        Raises:
            Problems: exit status 2.
        """
        found: list[str] = []

        def whole(name: str, value: int | None, low: int, high: int) -> None:
            if value is not None and not low <= value <= high:
                found.append(f"--{name} is {value}: must be from {low} to {high}")

        whole("context", self.context, 1, 2**31)
        whole("concurrency", self.concurrency, 1, 2**20)
        whole("max-num-seqs", self.max_num_seqs, 1, 2**20)
        whole("max-num-batched-tokens", self.max_num_batched_tokens, 1, 2**26)
        whole("tensor-parallel", self.tensor_parallel, 1, 1024)
        whole("pipeline-parallel", self.pipeline_parallel, 1, 1024)
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            found.append(
                f"--gpu-memory-utilization is {self.gpu_memory_utilization}: a share of the GPU's whole "
                "memory, above 0 and at most 1"
            )
        if self.kv_cache_dtype not in KV_DTYPES:
            found.append(str(one_of("--kv-cache-dtype", self.kv_cache_dtype, list(KV_DTYPES))))
        if self.context is not None and self.context > spec.max_context:
            found.append(
                f"--context is {self.context}: {spec.name} has positions for {spec.max_context}; give at "
                "most that, or a checkpoint whose "
                "config.json extends it (rope scaling)"
            )
        if (
            self.max_num_seqs
            and self.max_num_batched_tokens
            and self.max_num_batched_tokens < self.max_num_seqs
        ):
            found.append(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below --max-num-seqs "
                f"{self.max_num_seqs}: vLLM refuses to "
                "start; every sequence needs at least one token"
            )
        if self.max_num_seqs and self.concurrency > self.max_num_seqs:
            found.append(
                f"--concurrency {self.concurrency} is above --max-num-seqs {self.max_num_seqs}: raise the "
                "latter or ask for less"
            )
        ranks = self.ranks
        if 1 <= ranks <= 1024:
            found += parallel_problems(spec, ranks)
        if self.pipeline_parallel > spec.layers:
            found.append(
                f"--pipeline-parallel is {self.pipeline_parallel}: {spec.name} has {spec.layers} layers, at "
                "most one stage each"
            )
        if ranks * self.pipeline_parallel > len(gpus):
            needed = ranks * self.pipeline_parallel
            found.append(
                f"tensor parallel {ranks} × pipeline parallel {self.pipeline_parallel} needs {needed} GPUs, "
                f"{len(gpus)} given (--gpu-count)"
            )
        if found:
            raise Problems(found, exit_code=2)


def parallel_problems(spec: ModelSpec, ranks: int) -> list[str]:
    """Why vLLM cannot cut this model, in 16 bits, into ``ranks``: empty when it can."""
    return shape_problems(
        [_linear(weight, UNQUANTIZED) for weight in spec.linear_kinds], ranks, spec.shared_heads
    )


def group_problems(spec: ModelSpec, scheme: Scheme | None, ranks: int) -> list[str]:
    """Why vLLM cannot build the model's linears in a scheme, or not over ``ranks``: groups and blocks that do
    not divide. A linear of the checkpoint that its own groups do not divide was left in 16 bits."""
    planned = scheme if is_quantized(scheme) else None
    own = source_schemes(spec)

    def stored(weight: Weight) -> Scheme:
        if planned is not None:
            return planned
        source = own(weight)
        if source is None or (isinstance(source, ForeignScheme) and source.padded):
            return UNQUANTIZED
        return source if quantizable(weight, source) else UNQUANTIZED

    linears = [_linear(weight, stored(weight)) for weight in spec.linear_kinds]
    return shape_problems(linears, ranks, spec.shared_heads)


def _linear(weight: Weight, scheme: Scheme) -> Linear:
    n, k = weight.shape
    return Linear(weight.tensor.removesuffix(".weight"), n, k, scheme.weights, scheme.activations)


@dataclass(frozen=True)
class MemoryPlan:
    """What one start would give. All bytes are those of one GPU: the one in the stage that decides.

    ``fits``: vLLM starts with these arguments. ``why`` says why not, ``remedy`` the smallest change that
    would make it.
    """

    #: :data:`quant.schemes.UNQUANTIZED`: the checkpoint as it is
    scheme: Scheme
    fits: bool
    why: str
    remedy: str
    weights_bytes: int
    activation_bytes: int
    cuda_graph_bytes: int
    other_bytes: int
    requested_bytes: int
    total_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: float
    kv_tokens: int
    kv_blocks: int
    block_tokens: int
    max_context: int
    context: int
    max_concurrency: float
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    tensor_parallel: int
    pipeline_parallel: int
    kv_cache_dtype: str
    vllm_version: str
    weights_by_stage: tuple[int, ...] = ()
    #: bytes of the GPU that nothing of this plan uses
    spare_bytes: int = 0
    layout: CacheLayout | None = None

    def to_dict(self) -> dict[str, Any]:
        value = {k: v for k, v in asdict(self).items() if k not in ("layout", "weights_by_stage")}
        value["scheme"] = self.scheme.name
        value["weights_by_stage_bytes"] = list(self.weights_by_stage)
        value["layout"] = self.layout.to_dict() if self.layout else None
        if float(self.kv_bytes_per_token).is_integer():
            value["kv_bytes_per_token"] = int(self.kv_bytes_per_token)
        return value


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


def activation_peak(
    spec: ModelSpec, rules: Rules, tokens: int, seqs: int, ranks: int, width: int, last_stage: bool = True
) -> int:
    """Bytes at the peak of the profile run: the larger of the forward pass and the sampler, with the experts'
    workspace on top.

    The forward pass holds, for every token, the two inner projections and their product (3·I, cut by rank)
    and four vectors of the hidden size; the sampler ``rules.sampler_bytes`` for every sequence and vocabulary
    entry.
    """
    h = spec.hidden
    inner = 0 if spec.moe and not any(w.role == "mlp" for w in spec.weights) else spec.intermediate
    dense = 3 * inner / ranks
    attention = (2 * spec.heads * spec.head_dim + 2 * spec.kv_heads * spec.head_dim) / ranks
    if spec.latent:
        size = spec.latent.get("qk_nope_head_dim", 0) + spec.latent.get("qk_rope_head_dim", 0)
        attention = spec.heads / ranks * (size + spec.latent.get("v_head_dim", 0)) * 2
        if not rules.mla:
            attention = spec.heads / ranks * (3 * 256 + 2 * size)
    forward = tokens * (max(dense, attention) + 4 * h) * width
    workspace = 0.0
    if spec.moe:
        rows = min(tokens, 32768 if rules.engine == "v0" else tokens) * spec.moe.active
        workspace = rows * (spec.moe.intermediate / ranks + h) * width + tokens * h * width
        if rules.engine == "v0":  # freed before the sampler runs
            forward, workspace = (
                max(
                    forward,
                    workspace + tokens * 4 * h * width + rows * 2 * spec.moe.intermediate / ranks * width,
                ),
                0.0,
            )
    sampler = seqs * spec.vocabulary * rules.sampler_bytes if last_stage else 0
    return int(max(forward, sampler) + workspace)


def graph_sizes(seqs: int, tokens: int, rules: Rules) -> int:
    """How many batch sizes are captured as CUDA graphs."""
    if rules.engine == "v0":
        return 3 + sum(1 for s in range(8, 257, 8) if s <= max(8, seqs))
    largest = min(seqs * 2, rules.largest_graph) if rules.graphs_follow_seqs else 512
    largest = min(largest, tokens)
    sizes = [s for s in (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)) if s <= largest]
    return len(sizes)


def graph_bytes(spec: ModelSpec, rules: Rules, sizes: int, ranks: int, layers: int) -> int:
    """Memory of the captured graphs: a first capture and a share for every further one, both growing with the
    layers.

    Calibrated on the estimates that vLLM printed for ten models with 102 graphs (51 sizes, two modes):
    0.55–1.82 GiB.
    """
    if not sizes:
        return 0
    share = sizes * rules.graph_modes / 102
    full = 0.35 * GIB + 12.3 * MIB * layers
    if spec.moe:
        full += 0.35 * GIB
    if ranks > 1:
        full += 0.4 * GIB
    return int(full * share)


def other_memory(rules: Rules, gpu: Gpu, world: int) -> int:
    """Bytes outside torch's allocator: the CUDA context's growth and libraries, NCCL and all-reduce buffers
    with several GPUs; on the CPU the process itself."""
    if gpu.platform == "cpu":
        return CPU_PROCESS_BYTES
    if world == 1:
        return rules.other_bytes
    return rules.other_bytes_nvlink if shares_memory(gpu) else rules.other_bytes_pcie


def multimodal_peak(spec: ModelSpec, rules: Rules, tokens: int, width: int) -> int:
    """Bytes at the peak of the vision tower's part of the profile run: images worth the batch's tokens, one
    at least.

    Every patch holds the MLP's inner projections and four vectors of the tower's width; the outputs stay
    until the end.
    """
    shape = spec.vision_shape
    if not shape or rules.engine != "v1":
        return 0
    images = max(tokens // shape["tokens"], 1) * shape["tokens"]
    patch = shape["projections"] * shape["inner"] + 4 * shape["hidden"]
    return images * shape["patches"] * patch * width + images * spec.hidden * width


def plan(
    spec: ModelSpec,
    gpus: Sequence[Gpu],
    scheme: Scheme | None = None,
    request: EngineRequest | None = None,
) -> MemoryPlan:
    """What vLLM would do with this model, stored in this scheme, on these GPUs.

    Args:
        gpus: the GPUs at hand; the first ``tensor × pipeline`` are used, and the one with the least memory
            decides.
        scheme: None, or :data:`quant.schemes.UNQUANTIZED`, for the checkpoint as it is.

    Raises:
        Problems: the request is impossible for this model and these GPUs (exit status 2).
        UsageError: unknown release or source format.
    """
    scheme = scheme or UNQUANTIZED
    request = request or EngineRequest()
    request.check(spec, gpus)
    world = request.ranks * request.pipeline_parallel
    used = list(gpus[:world])
    gpu = min(used, key=lambda g: (g.total_bytes, g.free_bytes))
    rules = rules_for(request.vllm_version, gpu.capability, spec.moe is not None)
    ranks, stages = request.ranks, request.pipeline_parallel
    dtype = request.dtype or ("bfloat16" if spec.dtype in ("float32", "float64") else spec.dtype)
    if dtype not in DTYPE_BYTES:
        raise one_of("dtype", dtype, ["bfloat16", "float16", "float32"])
    width = 2 if DTYPE_BYTES[dtype] == 1 else int(DTYPE_BYTES[dtype])
    context = request.context or spec.max_context
    tokens, seqs = batch_defaults(gpu, rules, context, request, spec)
    utilization = (
        request.gpu_memory_utilization if request.gpu_memory_utilization is not None else rules.utilization
    )
    requested = ceil(gpu.total_bytes * utilization)
    kv_width = KV_DTYPES[request.kv_cache_dtype] or width
    if (
        request.kv_cache_dtype == "auto"
        and not is_quantized(scheme)
        and (spec.quantization or {}).get("kv_cache_scheme")
    ):
        kv_width = 1  # a checkpoint with KV scales switches the cache to FP8 by itself

    weights = loaded_bytes(spec, scheme, ranks, stages, rules, width)
    other = other_memory(rules, gpu, world)
    parts = stage_layers(spec.layers, stages, rules)
    block = request.block_size or default_block(spec, gpu, rules)
    in_flight = tokens * max(rules.batches_in_flight if gpu.platform != "cpu" else 1, stages)
    sizes = 0 if request.enforce_eager or gpu.platform == "cpu" else graph_sizes(seqs, tokens, rules)
    whole = layout(spec, spec.cache, ranks, kv_width, rules, block, state_width(gpu))

    best: tuple[int, int, int, int, int, CacheLayout] | None = None
    for stage in range(stages):
        stage_layout = (
            layout(
                spec,
                [c for c in spec.cache if c.layer in parts[stage]],
                ranks,
                kv_width,
                rules,
                block,
                state_width(gpu),
            )
            if stages > 1
            else whole
        )
        activation = activation_peak(spec, rules, tokens, seqs, ranks, width, stage == stages - 1)
        if rules.reserved_profile and ranks > 1:
            activation += 2 * len(parts[stage]) * tokens * spec.hidden * width
        activation = max(activation, multimodal_peak(spec, rules, tokens, width) if stage == 0 else 0)
        graphs = graph_bytes(spec, rules, sizes, ranks, len(parts[stage]))
        if gpu.platform == "cpu":
            activation = graphs = 0
        kv = requested - weights[stage] - other - activation - (graphs if rules.graphs_subtracted else 0)
        if request.kv_cache_memory_bytes is not None:
            kv = request.kv_cache_memory_bytes
        blocks = kv // stage_layout.bytes_per_block if stage_layout.bytes_per_block and kv > 0 else 0
        candidate = (
            blocks if stage_layout.bytes_per_block else 2**62,
            kv,
            stage,
            activation,
            graphs,
            stage_layout,
        )
        if best is None or candidate[:2] < best[:2]:
            best = candidate
    assert best is not None
    blocks, kv, stage, activation, graphs, chosen = best

    usable = blocks - (1 if rules.null_block else 0)
    longest = longest_context(chosen, usable, in_flight, spec.max_context) if kv > 0 else 0
    needed = chosen.blocks_for(context, in_flight)
    if rules.printed_tokens == "requests":
        concurrency = blocks / needed if needed else float(seqs)
        printed = int(concurrency * context)
    else:
        printed = blocks // max(len(chosen.groups), 1) * chosen.block
        concurrency = blocks / needed if needed else float(seqs)
    why, remedy = _Start(
        spec=spec, scheme=scheme, request=request, rules=rules, gpu=gpu, utilization=utilization,
        requested=requested,
        weights=weights[stage], other=other, activation=activation, graphs=graphs, kv=kv, blocks=blocks,
        usable=usable, needed=needed,
        longest=longest, context=context, tokens=tokens, seqs=seqs, layout=chosen, whole=whole,
        in_flight=in_flight,
    ).verdict()  # fmt: skip
    spare = gpu.total_bytes - requested - (0 if rules.graphs_subtracted else graphs)
    return MemoryPlan(
        scheme=scheme, fits=not why, why=why or _fit_sentence(printed, context, concurrency), remedy=remedy,
        weights_bytes=weights[stage],
        activation_bytes=activation, cuda_graph_bytes=graphs, other_bytes=other, requested_bytes=requested,
        total_bytes=gpu.total_bytes,
        kv_cache_bytes=max(kv, 0), kv_bytes_per_token=(whole if stages == 1 else chosen).bytes_per_token(),
        kv_tokens=printed,
        kv_blocks=max(blocks, 0), block_tokens=chosen.block, max_context=longest, context=context,
        max_concurrency=round(concurrency, 4) if kv > 0 else 0.0, max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        gpu_memory_utilization=utilization, tensor_parallel=ranks, pipeline_parallel=stages,
        kv_cache_dtype=request.kv_cache_dtype,
        vllm_version=request.vllm_version,
        weights_by_stage=tuple(weights), spare_bytes=spare, layout=chosen,
    )  # fmt: skip


def default_block(spec: ModelSpec, gpu: Gpu, rules: Rules) -> int:
    """Tokens of a block that the release chooses on that device."""
    if gpu.platform == "cpu":
        return latent_block(gpu) if any(c.kind == "mla" for c in spec.cache) else CPU_BLOCK
    return latent_block(gpu) if spec.latent and rules.mla else 16


def _fit_sentence(tokens: int, context: int, concurrency: float) -> str:
    return f"{tokens:,} tokens of KV cache: {concurrency:.1f} requests of {context:,} tokens"


@dataclass(frozen=True)
class _Start:
    """One start with everything that decides whether it succeeds; bytes of one GPU, blocks of the pool,
    lengths in tokens."""

    spec: ModelSpec
    scheme: Scheme
    request: EngineRequest
    rules: Rules
    gpu: Gpu
    utilization: float
    requested: int
    weights: int
    other: int
    activation: int
    graphs: int
    kv: int
    blocks: int
    usable: int
    needed: int
    longest: int
    context: int
    tokens: int
    seqs: int
    layout: CacheLayout
    whole: CacheLayout
    in_flight: int

    def verdict(self) -> tuple[str, str]:
        """Why vLLM would not start, and the smallest change that would make it; two empty strings when it
        starts.

        The checks run in the order in which vLLM meets them: the cuts at load time, the free memory, the
        profile, the context, the graphs.
        """
        for check in (self._cuts, self._free, self._room, self._context, self._states, self._graphs):
            found = check()
            if found:
                return found
        return "", ""

    @property
    def _given(self) -> bool:
        return self.request.kv_cache_memory_bytes is not None

    def _cuts(self) -> tuple[str, str] | None:
        cuts = group_problems(self.spec, self.scheme, self.request.ranks)
        if cuts:
            return cuts[0], "another tensor parallel degree, or a smaller group size when quantizing"
        if self.request.chunked_prefill is False and self.tokens < self.context and self.rules.engine == "v1":
            why = (
                f"max_num_batched_tokens {self.tokens} is below the context {self.context} without "
                "chunked prefill"
            )
            return why, f"--max-num-batched-tokens {self.context}"
        return None

    def _free(self) -> tuple[str, str] | None:
        if self.gpu.platform == "cpu" or self._given or self.requested <= self.gpu.free_bytes:
            return None
        held = self.gpu.total_bytes - self.gpu.free_bytes
        return (
            f"{format_size(self.gpu.free_bytes)} free at start, {format_size(self.requested)} asked for "
            f"(utilization {self.utilization:g} "
            f"of {format_size(self.gpu.total_bytes)}); {format_size(held)} is held by others",
            f"--gpu-memory-utilization {largest_utilization(self.gpu):.2f}, or free the GPU",
        )

    def _room(self) -> tuple[str, str] | None:
        if self.kv > 0 and not (self.whole.bytes_per_block and self.usable <= 0):
            return None
        graphs = self.graphs if self.rules.graphs_subtracted else 0
        used = self.weights + self.other + self.activation + graphs
        missing = used - self.requested
        if graphs > missing:
            remedy = "--enforce-eager"
        elif self.weights + self.other < self.requested and self.seqs > 16 and self.activation > missing:
            remedy = (
                f"--max-num-seqs {max(16, _smaller(self.seqs))} --max-num-batched-tokens "
                f"{max(512, _smaller(self.tokens))}"
            )
        else:
            ranks = next(
                (t for t in (2, 4, 8, 16) if t > self.request.ranks and not parallel_problems(self.spec, t)),
                None,
            )
            remedy = f"a smaller scheme, a larger GPU{f', or --tensor-parallel {ranks}' if ranks else ''}"
        return (
            f"no room for a KV cache: weights {format_size(self.weights)} + activations "
            f"{format_size(self.activation)} + CUDA graphs "
            f"{format_size(graphs)} + other {format_size(self.other)} = {format_size(used)}, of "
            f"{format_size(self.requested)} requested",
            remedy,
        )

    def _context(self) -> tuple[str, str] | None:
        if self.rules.whole_model_check and self.request.pipeline_parallel > 1:
            needed = self.whole.blocks_for(self.context, self.in_flight) * self.whole.bytes_per_block
            if needed > self.kv:
                release = ".".join(map(str, self.rules.version[:2]))
                return (
                    f"vLLM {release} compares the KV cache of all stages ({format_size(needed)}) with one "
                    f"stage's {format_size(self.kv)}",
                    f"--context {self.longest // self.request.pipeline_parallel}",
                )
        if self.needed > self.usable:
            return (
                f"one request of {self.context:,} tokens needs "
                f"{format_size(self.needed * self.layout.bytes_per_block)} of KV cache, "
                f"{format_size(self.kv)} is there; the longest that fits is {self.longest:,}",
                f"--context {self.longest} (vLLM: --max-model-len {self.longest})"
                if self.longest
                else "a larger GPU or fewer bits",
            )
        return None

    def _states(self) -> tuple[str, str] | None:
        recurrent = any(g.kind == "state" for g in self.layout.groups)
        if not (self.rules.state_check and self.graphs and recurrent and self.blocks < self.seqs):
            return None
        return (
            f"{self.blocks} cache blocks for recurrent states, but max_num_seqs is {self.seqs}: every "
            "decoding sequence needs one when "
            "CUDA graphs are captured",
            f"--max-num-seqs {max(1, self.blocks)}, or --enforce-eager",
        )

    def _graphs(self) -> tuple[str, str] | None:
        if self.rules.graphs_subtracted or not self.graphs or self._given:
            return None
        room = self.gpu.free_bytes - self.requested
        if self.graphs <= room + 0.25 * GIB:
            return None
        return (
            f"out of memory while capturing CUDA graphs: {format_size(self.graphs)} needed, "
            f"{format_size(room)} left outside "
            f"utilization {self.utilization:g}",
            "--enforce-eager, or a lower --gpu-memory-utilization",
        )


def _smaller(value: int) -> int:
    return max(1, value // 4)


def largest_utilization(gpu: Gpu) -> float:
    """The largest share of the GPU that can be asked for while others hold what they hold now, rounded down
    to a percent."""
    return max(0.01, int(gpu.free_bytes / gpu.total_bytes * 100) / 100)


def at_context(request: EngineRequest, context: int) -> EngineRequest:
    """The same request with another context."""
    if context < 1:
        raise UsageError(f"context is {context}: must be at least 1")
    return replace(request, context=context)
