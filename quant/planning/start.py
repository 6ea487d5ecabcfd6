"""Whether one start of vLLM succeeds: its checks in the order in which vLLM meets them, each with the
smallest change that would pass it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from quant.hardware import Gpu
from quant.planning.cuts import group_problems, parallel_problems
from quant.planning.engine import Engine, Stage
from quant.planning.kvcache import longest_context
from quant.units import GIB, format_size
from quant.vllm.kernels import GROUP_SIZES, has_unified_memory
from quant.vllm.layers import DEGREES


@dataclass(frozen=True)
class Start:
    """One start with everything that decides whether it succeeds; bytes of one GPU, blocks of the pool,
    lengths in tokens."""

    engine: Engine
    stage: Stage

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
        limit = max(self.engine.spec.max_context, self.engine.context)
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

    def after(self, change: int) -> Start:
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
            own, beside = stage.weights * e.request.ranks, e.other + stage.peak.cold + graphs
            enough = (t for t in (2, 4, 8, 16) if t > e.request.ranks and own / t + beside < e.requested)
            ranks = next((t for t in enough if not parallel_problems(e.spec, t)), None)
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


#: Share of a GPU that shares the host's memory which is asked for unless another is named: how much more is
#: free at the start differs from machine to machine (vllm-project/recipes #632 needs it,
#: MiaAI-Lab/GLM-5.3-Flash-EXL3-2x-DGX-Sparks #47 starts no higher than 0.83 to 0.87).
UNIFIED_UTILIZATION = 0.85


def usual_utilization(gpu: Gpu, default: float) -> float:
    """The share to ask for where none is named: the release's default, less where the host's own programs or
    others hold memory."""
    usual = min(default, UNIFIED_UTILIZATION) if has_unified_memory(gpu) else default
    return min(usual, largest_utilization(gpu)) if gpu.total_bytes * usual > gpu.free_bytes else usual


def why_utilization(gpu: Gpu, default: float) -> str:
    """Why :func:`usual_utilization` is not the default."""
    if gpu.total_bytes * default > gpu.free_bytes:
        return f"{format_size(gpu.total_bytes - gpu.free_bytes)} of {gpu.name} is held by others"
    return f"{gpu.name} shares its memory with the host"


def largest_utilization(gpu: Gpu) -> float:
    """The largest share of the GPU that can be asked for while others hold what they hold now, rounded down
    to a percent."""
    return max(0.01, int(gpu.free_bytes / gpu.total_bytes * 100) / 100)
