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
from dataclasses import asdict, dataclass
from typing import Any

from quant.hardware import Gpu
from quant.models.spec import ModelSpec
from quant.planning.accuracy import stated_error
from quant.planning.engine import Engine, Stage, stage_of
from quant.planning.kvcache import CacheLayout
from quant.planning.request import EngineRequest
from quant.planning.start import Start
from quant.schemes import UNQUANTIZED, Scheme
from quant.units import format_requests


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
    engine = Engine.of(spec, gpus, scheme, request)
    stages = [stage_of(engine, index) for index in range(request.pipeline_parallel)]
    tightest = min(stages, key=lambda s: (s.blocks if s.layout.bytes_per_block else 2**62, s.kv))
    return _judged(engine, tightest)


def _judged(engine: Engine, stage: Stage) -> MemoryPlan:
    """The plan of the stage that decides."""
    spec, rules, request, gpu = engine.spec, engine.rules, engine.request, engine.gpu
    start = Start(engine, stage)
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


def _fit_sentence(tokens: int, context: int, concurrency: float) -> str:
    return f"{tokens:,} tokens of KV cache: {format_requests(concurrency)} requests of {context:,} tokens"
