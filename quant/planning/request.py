"""vLLM's arguments as they are asked for, and what is wrong with them for a model on given GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from quant.errors import Problems, UsageError, one_of
from quant.hardware import Gpu
from quant.models.spec import ModelSpec
from quant.planning.cuts import parallel_problems
from quant.planning.kvcache import KV_DTYPES
from quant.vllm.arguments import TOWER_MODES
from quant.vllm.context import LONGEST, context_problem
from quant.vllm.releases import VLLM_VERSION


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

        whole("context", self.context, 1, LONGEST)
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
        if self.context is not None and (
            beyond := context_problem("--context", self.context, spec.max_context, spec.name)
        ):
            problems.append(beyond)
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


def at_context(request: EngineRequest, context: int) -> EngineRequest:
    """The same request with another context."""
    if context < 1:
        raise UsageError(f"context is {context}: must be at least 1")
    return replace(request, context=context)
