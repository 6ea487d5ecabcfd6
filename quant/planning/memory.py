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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import Any

from quant.errors import Problems, UsageError, one_of
from quant.hardware import Gpu
from quant.models.spec import DTYPE_BYTES, ModelSpec
from quant.planning.accuracy import stated_error
from quant.planning.cuts import group_problems, parallel_problems
from quant.planning.kvcache import KV_DTYPES, CacheLayout, layout, longest_context
from quant.planning.profile import (
    Batch,
    Peak,
    graph_bytes,
    graph_sizes,
    other_memory,
    profile_peak,
)
from quant.planning.storage import (
    is_quantized,
    loaded_bytes,
    stage_layers,
)
from quant.schemes import UNQUANTIZED, Scheme
from quant.units import GIB, format_requests, format_size
from quant.vllm.arguments import TOWER_MODES
from quant.vllm.kernels import CPU_BLOCK, GROUP_SIZES, latent_block, state_width
from quant.vllm.layers import DEGREES
from quant.vllm.releases import VLLM_VERSION, Rules, batch_sizes, rules_for


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
    #: the vision tower is left out
    language_model_only: bool = False
    #: items of a kind that a prompt may have (``image``, ``video``); those not named as many as vLLM allows
    limit_mm_per_prompt: Mapping[str, int] = field(default_factory=dict)
    #: ``weights``: ranks share the vision tower; ``data``: every rank holds it whole
    mm_encoder_tp_mode: str = "weights"
    #: ranks hold whole experts
    enable_expert_parallel: bool = False

    @property
    def sees(self) -> bool:
        """Whether the vision tower is loaded: vLLM leaves it out where no image and no video is allowed."""
        none = all(self.limit_mm_per_prompt.get(kind) == 0 for kind in ("image", "video"))
        return not (self.language_model_only or none)

    @property
    def ranks(self) -> int:
        """The degree of tensor parallelism, 1 where it is left open."""
        return 1 if self.tensor_parallel is None else self.tensor_parallel

    def check(self, spec: ModelSpec, gpus: Sequence[Gpu]) -> None:
        """Everything wrong with the request, listed together.

        Raises:
            Problems: exit status 2.
        """
        problems: list[str] = []

        def whole(name: str, value: int | None, low: int, high: int) -> None:
            if value is not None and not low <= value <= high:
                problems.append(f"--{name} is {value}: must be from {low} to {high}")

        whole("context", self.context, 1, 2**31)
        whole("concurrency", self.concurrency, 1, 2**20)
        whole("max-num-seqs", self.max_num_seqs, 1, 2**20)
        whole("max-num-batched-tokens", self.max_num_batched_tokens, 1, 2**26)
        whole("tensor-parallel", self.tensor_parallel, 1, 1024)
        whole("pipeline-parallel", self.pipeline_parallel, 1, 1024)
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            problems.append(
                f"--gpu-memory-utilization is {self.gpu_memory_utilization}: a share of the GPU's whole "
                "memory, above 0 and at most 1"
            )
        if self.kv_cache_dtype not in KV_DTYPES:
            problems.append(str(one_of("--kv-cache-dtype", self.kv_cache_dtype, list(KV_DTYPES))))
        if self.context is not None and self.context > spec.max_context:
            problems.append(
                f"--context is {self.context}: {spec.name} has positions for {spec.max_context}; give at "
                "most that, or a checkpoint whose "
                "config.json extends it (rope scaling)"
            )
        if (
            self.max_num_seqs
            and self.max_num_batched_tokens
            and self.max_num_batched_tokens < self.max_num_seqs
        ):
            problems.append(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below --max-num-seqs "
                f"{self.max_num_seqs}: vLLM refuses to "
                "start; every sequence needs at least one token"
            )
        if self.max_num_seqs and self.concurrency > self.max_num_seqs:
            problems.append(
                f"--concurrency {self.concurrency} is above --max-num-seqs {self.max_num_seqs}: raise the "
                "latter or ask for less"
            )
        if self.mm_encoder_tp_mode not in TOWER_MODES:
            problems.append(str(one_of("--mm-encoder-tp-mode", self.mm_encoder_tp_mode, list(TOWER_MODES))))
        ranks = self.ranks
        if 1 <= ranks <= 1024:
            problems += parallel_problems(spec, ranks)
        if self.pipeline_parallel > spec.layers:
            problems.append(
                f"--pipeline-parallel is {self.pipeline_parallel}: {spec.name} has {spec.layers} layers, at "
                "most one stage each"
            )
        if ranks * self.pipeline_parallel > len(gpus) and gpus and gpus[0].platform == "cpu":
            problems.append(
                f"tensor parallel {ranks} × pipeline parallel {self.pipeline_parallel}: a machine's CPUs are "
                "planned as one device: leave --tensor-parallel and --pipeline-parallel out"
            )
        elif ranks * self.pipeline_parallel > len(gpus):
            needed = ranks * self.pipeline_parallel
            problems.append(
                f"tensor parallel {ranks} × pipeline parallel {self.pipeline_parallel} needs {needed} GPUs, "
                f"{len(gpus)} given (--gpu-count)"
            )
        if problems:
            raise Problems(problems, exit_code=2)


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
    #: what the weights and the profile leave for the cache; below zero where they take too much
    room_bytes: int = 0
    #: what that may be off by, from measured starts of the kind (:mod:`quant.planning.accuracy`)
    error_bytes: int = 0
    #: the start is within that error of its limit: what to lower so that it is certain; empty where it is not
    tight: str = ""
    #: the longest context that starts even where the plan is off by that error
    sure_context: int = 0
    #: it fails only because every sequence needs a block for its recurrent states
    lacks_states: bool = False
    #: ``max_num_seqs`` was asked for, not vLLM's default
    asks_sequences: bool = False
    #: of the activations, what only the first start takes: it compiles inside the profile
    compile_bytes: int = 0
    #: bytes of the GPU that nothing of this plan uses
    spare_bytes: int = 0
    layout: CacheLayout | None = None

    @property
    def verdict(self) -> str:
        """``fits``, ``tight`` (the plan's own error decides) or ``does not fit``."""
        return "tight" if self.tight else "fits" if self.fits else "does not fit"

    @property
    def sure(self) -> bool:
        """Whether it starts even where the plan is off by its stated error."""
        return self.fits and not self.tight

    def to_dict(self) -> dict[str, Any]:
        value = {
            k: v
            for k, v in asdict(self).items()
            if k not in ("layout", "weights_by_stage", "lacks_states", "asks_sequences")
        }
        value["scheme"], value["verdict"] = self.scheme.name, self.verdict
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
    engine = _Engine.of(spec, gpus, scheme, request)
    stages = [_stage(engine, index) for index in range(request.pipeline_parallel)]
    tightest = min(stages, key=lambda s: (s.blocks if s.layout.bytes_per_block else 2**62, s.kv))
    return _judged(engine, tightest)


@dataclass(frozen=True)
class _Engine:
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
    def of(cls, spec: ModelSpec, gpus: Sequence[Gpu], scheme: Scheme, request: EngineRequest) -> _Engine:
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
class _Stage:
    """One pipeline stage: its weights, the profile's peak, graphs, and what is left for its cache."""

    weights: int
    peak: Peak
    graphs: int
    kv: int
    blocks: int
    layout: CacheLayout


def _stage(engine: _Engine, index: int) -> _Stage:
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
    return _Stage(engine.weights[index], peak, graphs, kv, blocks, cache)


def _judged(engine: _Engine, stage: _Stage) -> MemoryPlan:
    """The plan of the stage that decides."""
    spec, rules, request, gpu = engine.spec, engine.rules, engine.request, engine.gpu
    start = _Start(engine, stage)
    why, remedy = start.verdict()
    if rules.printed_tokens == "requests":
        printed = int(start.concurrency * engine.context)
    else:
        printed = stage.blocks // max(len(stage.layout.groups), 1) * stage.layout.block
    error = stated_error(spec, rules, gpu, request, stage.weights)
    tight = "" if request.kv_cache_memory_bytes is not None else start.tightness(error)
    if spec.unknown_layers:
        tight = f"what its layers take is not known ({spec.unknown_layers})"
    spare = gpu.total_bytes - engine.requested - (0 if rules.graphs_subtracted else stage.graphs)
    cache = engine.whole if request.pipeline_parallel == 1 else stage.layout
    return MemoryPlan(
        scheme=engine.scheme, fits=not why, tight=tight, lacks_states=bool(why) and start.lacks_states,
        asks_sequences=request.max_num_seqs is not None,
        why=why or _fit_sentence(printed, engine.context, start.concurrency), remedy=remedy,
        weights_bytes=stage.weights, activation_bytes=stage.peak.cold,
        compile_bytes=stage.peak.cold - stage.peak.warm,
        cuda_graph_bytes=stage.graphs, other_bytes=engine.other, requested_bytes=engine.requested,
        total_bytes=gpu.total_bytes, kv_cache_bytes=max(stage.kv, 0), room_bytes=stage.kv, error_bytes=error,
        kv_bytes_per_token=cache.bytes_per_token(),
        kv_tokens=printed, kv_blocks=max(stage.blocks, 0), block_tokens=stage.layout.block,
        max_context=start.longest, sure_context=start.sure_context(error), context=engine.context,
        max_concurrency=round(start.concurrency, 4) if stage.kv > 0 else 0.0, max_num_seqs=engine.seqs,
        max_num_batched_tokens=engine.tokens, gpu_memory_utilization=engine.utilization,
        tensor_parallel=request.ranks, pipeline_parallel=request.pipeline_parallel,
        kv_cache_dtype=request.kv_cache_dtype, vllm_version=request.vllm_version,
        weights_by_stage=engine.weights, spare_bytes=spare, layout=stage.layout,
    )  # fmt: skip


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


def _fit_sentence(tokens: int, context: int, concurrency: float) -> str:
    return f"{tokens:,} tokens of KV cache: {format_requests(concurrency)} requests of {context:,} tokens"


@dataclass(frozen=True)
class _Start:
    """One start with everything that decides whether it succeeds; bytes of one GPU, blocks of the pool,
    lengths in tokens."""

    engine: _Engine
    stage: _Stage

    @property
    def usable(self) -> int:
        """Blocks of the pool that requests may hold."""
        return self.stage.blocks - (1 if self.engine.rules.null_block else 0)

    @cached_property
    def needed(self) -> int:
        """Blocks that one request of the whole context holds."""
        return self.stage.layout.blocks_for(self.engine.context, self.engine.in_flight)

    @cached_property
    def longest(self) -> int:
        """The longest context that the pool holds, up to the model's own."""
        limit = self.engine.spec.max_context
        if self.stage.kv <= 0:
            return 0
        return longest_context(self.stage.layout, self.usable, self.engine.in_flight, limit)

    @property
    def concurrency(self) -> float:
        """Requests of the whole context that the pool holds."""
        return self.stage.blocks / self.needed if self.needed else float(self.engine.seqs)

    def verdict(self) -> tuple[str, str]:
        """Why vLLM would not start, and the smallest change that would make it; two empty strings when it
        starts.

        The checks run in the order in which vLLM meets them: the cuts at load time, the free memory, the
        profile, the context, the states, the graphs and the sampler's second run.
        """
        for check in (self._cuts, self._free, self._room, self._context, self._states, self._beside):
            shortfall = check()
            if shortfall:
                return shortfall
        return "", ""

    def tightness(self, error: int) -> str:
        """What to lower so that the start is certain, where ``error`` bytes more or less would change the
        verdict; empty where they would not."""
        if self._cuts() or self._free():
            return ""
        less, more = self.after(-error), self.after(error)
        verdicts = [bool(start.verdict()[0]) for start in (less, more)]
        if verdicts[0] == verdicts[1]:
            return ""
        about = f"within the plan's error of {format_size(error)}"
        sure = less.longest // 256 * 256
        if sure and self.engine.spec.max_context >= sure and sure < self.engine.context:
            return f"{about}; --context {sure} certainly starts"
        remedy = less.verdict()[1]
        return f"{about}; to be sure: {remedy}"

    def sure_context(self, error: int) -> int:
        """The longest context with ``error`` bytes less; 0 where something else than the context fails."""
        less = self.after(-error)
        fails = any(check() for check in (less._cuts, less._free, less._room, less._states, less._beside))
        return 0 if fails else less.longest

    def after(self, change: int) -> _Start:
        """The same start with a cache that is larger by ``change`` bytes."""
        kv = self.stage.kv + change
        each = self.stage.layout.bytes_per_block
        blocks = kv // each if each and kv > 0 else 0
        return replace(self, stage=replace(self.stage, kv=kv, blocks=blocks))

    @property
    def _given(self) -> bool:
        return self.engine.request.kv_cache_memory_bytes is not None

    def _cuts(self) -> tuple[str, str] | None:
        e = self.engine
        whole = e.request.enable_expert_parallel
        if cuts := group_problems(e.spec, e.scheme, e.request.ranks, experts_whole=whole):
            if e.spec.moe and not group_problems(e.spec, e.scheme, e.request.ranks, experts_whole=True):
                return cuts[0], "--enable-expert-parallel, which cuts no expert"
            return cuts[0], self._uncut() or "--pipeline-parallel, which cuts no layer"
        if e.request.chunked_prefill is False and e.tokens < e.context and e.rules.engine == "v1":
            why = (
                f"max_num_batched_tokens {e.tokens} is below the context {e.context} without chunked prefill"
            )
            return why, f"--max-num-batched-tokens {e.context}"
        return None

    def _uncut(self) -> str:
        """What else would share the layers out: fewer or more ranks, or smaller groups; empty where neither
        does."""
        spec, ranks, scheme = self.engine.spec, self.engine.request.ranks, self.engine.scheme
        ways = []
        degrees = [t for t in DEGREES if not group_problems(spec, scheme, t)]
        if degrees:
            ways.append(f"--tensor-parallel {min(degrees, key=lambda t: (abs(t - ranks), t))}")
        if scheme is not None and scheme.weights.type == "int" and scheme.weights.strategy == "group":
            for group in (g for g in GROUP_SIZES[:0:-1] if g < scheme.weights.group_size):
                smaller = replace(scheme, weights=replace(scheme.weights, group_size=group))
                if not group_problems(spec, smaller, ranks):
                    ways.append(f"--group-size {group} when quantizing")
                    break
        return ", or ".join(ways)

    def _free(self) -> tuple[str, str] | None:
        gpu, requested = self.engine.gpu, self.engine.requested
        if gpu.platform == "cpu" or self._given or requested <= gpu.free_bytes:
            return None
        return (
            f"{format_size(gpu.free_bytes)} free at start, {format_size(requested)} asked for "
            f"(utilization {self.engine.utilization:g} of {format_size(gpu.total_bytes)}); "
            f"{format_size(gpu.total_bytes - gpu.free_bytes)} is held by others",
            f"--gpu-memory-utilization {largest_utilization(gpu):.2f}, or free the GPU",
        )

    def _room(self) -> tuple[str, str] | None:
        e, stage = self.engine, self.stage
        if stage.kv > 0 and not (e.whole.bytes_per_block and self.usable <= 0):
            return None
        graphs = stage.graphs if e.rules.graphs_subtracted else 0
        used = stage.weights + e.other + stage.peak.cold + graphs
        missing = -stage.kv
        if graphs > missing:
            remedy = "--enforce-eager"
        elif stage.weights + e.other < e.requested and e.seqs > 16 and stage.peak.cold > missing:
            remedy = (
                f"--max-num-seqs {max(16, _smaller(e.seqs))} --max-num-batched-tokens "
                f"{max(512, _smaller(e.tokens))}"
            )
        else:
            ranks = next(
                (t for t in (2, 4, 8, 16) if t > e.request.ranks and not parallel_problems(e.spec, t)), None
            )
            remedy = f"a smaller scheme, a larger GPU{f', or --tensor-parallel {ranks}' if ranks else ''}"
        return (
            f"no room for a KV cache: weights {format_size(stage.weights)} + activations "
            f"{format_size(stage.peak.cold)} + CUDA graphs "
            f"{format_size(graphs)} + other {format_size(e.other)} = {format_size(used)}, of "
            f"{format_size(e.requested)} requested",
            remedy,
        )

    def _context(self) -> tuple[str, str] | None:
        e, kv = self.engine, self.stage.kv
        if e.rules.whole_model_check and e.request.pipeline_parallel > 1:
            needed = e.whole.blocks_for(e.context, e.in_flight) * e.whole.bytes_per_block
            if needed > kv:
                release = ".".join(map(str, e.rules.version[:2]))
                return (
                    f"vLLM {release} compares the KV cache of all stages ({format_size(needed)}) with one "
                    f"stage's {format_size(kv)}",
                    f"--context {self.longest // e.request.pipeline_parallel}",
                )
        if self.needed > self.usable:
            return (
                f"one request of {e.context:,} tokens needs "
                f"{format_size(self.needed * self.stage.layout.bytes_per_block)} of KV cache, "
                f"{format_size(kv)} is there; the longest that fits is {self.longest:,}",
                f"--context {self.longest} (vLLM: --max-model-len {self.longest})"
                if self.longest
                else "a larger GPU or fewer bits",
            )
        return None

    @property
    def lacks_states(self) -> bool:
        """Whether the states are what fails first."""
        return not any(c() for c in (self._cuts, self._free, self._room, self._context)) and bool(
            self._states()
        )

    def _states(self) -> tuple[str, str] | None:
        e, blocks = self.engine, self.stage.blocks
        recurrent = any(g.kind == "state" for g in self.stage.layout.groups)
        if not (e.rules.state_check and self.stage.graphs and recurrent and blocks < e.seqs):
            return None
        return (
            f"{blocks} cache blocks for recurrent states, but max_num_seqs is {e.seqs}: every "
            "decoding sequence needs one when CUDA graphs are captured",
            f"--max-num-seqs {max(1, blocks)}, or --enforce-eager",
        )

    def _beside(self) -> tuple[str, str] | None:
        """What must fit beside the requested memory: graphs that were not taken out of it, and what the
        sampler's second run needs beyond its peak in the profile."""
        e, stage = self.engine, self.stage
        if e.gpu.platform == "cpu" or self._given:
            return None
        graphs = 0 if e.rules.graphs_subtracted else stage.graphs
        sampler = int(e.rules.sampler_warm_up * stage.peak.sampler)
        room = e.gpu.free_bytes - e.requested
        if graphs + sampler <= room + 0.25 * GIB:
            return None
        left = f"{format_size(room)} left outside utilization {e.utilization:g}"
        if graphs > room + 0.25 * GIB or not sampler:
            return (
                f"out of memory while capturing CUDA graphs: {format_size(graphs)} needed, {left}",
                "--enforce-eager, or a lower --gpu-memory-utilization",
            )
        return (
            f"out of memory when the sampler is warmed up with {e.seqs} sequences: CUDA graphs "
            f"{format_size(graphs)} + {format_size(sampler)} needed, {left}",
            f"--max-num-seqs {max(16, _smaller(e.seqs))}, or a lower --gpu-memory-utilization",
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
