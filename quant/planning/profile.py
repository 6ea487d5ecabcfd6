"""What vLLM's profile run takes on one GPU beside the weights: the forward pass, the sampler, the vision
encoder, the first start's compilation, the graphs, and memory outside torch.

Pure functions of a model, a release's :class:`~quant.vllm.releases.Rules` and the batch; bytes throughout.
The profile takes the largest of the passes, because each frees its own before the next
(``profile_run`` in vLLM's model runners).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from quant.hardware import Gpu
from quant.models.spec import ModelSpec
from quant.units import GIB, MIB
from quant.vllm.kernels import has_unified_memory, shares_memory
from quant.vllm.releases import Rules

#: resident memory of a worker of vLLM's CPU build that serves an 11 MB model: the interpreter and its
#: libraries
CPU_PROCESS_BYTES = int(0.63 * GIB)


@dataclass(frozen=True)
class Batch:
    """What the profile runs with: tokens and sequences of the largest batch, bytes of an activation's value,
    ranks of tensor parallelism, the context; ``experts_whole``: ranks hold whole experts (expert
    parallelism); ``video``: videos are allowed."""

    tokens: int
    seqs: int
    width: int
    ranks: int = 1
    context: int = 0
    experts_whole: bool = False
    video: bool = True


@dataclass(frozen=True)
class Peak:
    """The profile's peak, in bytes.

    Attributes:
        warm: of a start that finds its compiled graphs in the cache.
        cold: of the first one, which compiles them inside the profile.
        sampler: the sampler's part.
    """

    warm: int
    cold: int
    sampler: int


def profile_peak(
    spec: ModelSpec, rules: Rules, batch: Batch, *, first: bool = True, last: bool = True,
    eager: bool = False, vision: bool = True,
) -> Peak:  # fmt: skip
    """The largest of the profile's passes on one pipeline stage.

    Args:
        first, last: the stage holds the embeddings, the head.
        eager: nothing is compiled.
        vision: the vision encoder is loaded and profiled.
    """
    sampler = sampler_peak(spec, rules, batch) if last else 0
    passes = max(activation_peak(spec, rules, batch, sampler), vision_peak(spec, rules, batch) * vision)
    compiled = compile_peak(spec, rules, batch) if first and not eager else 0
    return Peak(int(passes), int(max(passes, compiled)), int(sampler))


def sampler_peak(spec: ModelSpec, rules: Rules, batch: Batch) -> int:
    """Bytes of the sampler's run over one token of every sequence."""
    return batch.seqs * spec.vocabulary * rules.sampler_bytes


def activation_peak(spec: ModelSpec, rules: Rules, batch: Batch, sampler: int) -> float:
    """Bytes at the peak of the text model's part: the larger of the forward pass and the sampler, with the
    experts' buffers on top of both where they are kept.

    The forward pass holds, for every token, the two inner projections and their product (3·I, cut by rank)
    and four vectors of the hidden size.
    """
    h, tokens, width, ranks = spec.hidden, batch.tokens, batch.width, batch.ranks
    inner = 0 if spec.moe and not any(w.role == "mlp" for w in spec.weights) else spec.intermediate
    dense = 3 * inner / ranks
    forward = tokens * (max(dense, _attention_values(spec, rules, ranks)) + 4 * h) * width
    workspace = 0.0
    if spec.moe:
        rows = min(tokens, 32768 if rules.engine == "v0" else tokens) * spec.moe.active
        of_expert = spec.moe.intermediate / (1 if batch.experts_whole else ranks)
        if rules.expert_workspace:  # TritonExperts.workspace_shapes; its output is one of the two
            workspace = rows * (max(of_expert, h) + max(2 * of_expert, h)) * width
        else:  # two caches (max(2·I, H) and I values a row, of which H dominates) and the output
            workspace = rows * (of_expert + h) * width + tokens * h * width
        if not rules.expert_buffers_kept:  # freed before the sampler runs
            routed = workspace + tokens * 4 * h * width + rows * 2 * of_expert * width
            forward, workspace = max(forward, routed), 0.0
    return max(forward, sampler) + workspace


def _attention_values(spec: ModelSpec, rules: Rules, ranks: int) -> float:
    """Values for every token that attention holds on one rank."""
    if not spec.latent:
        return (2 * spec.heads * spec.head_dim + 2 * spec.kv_heads * spec.head_dim) / ranks
    size = spec.latent.get("qk_nope_head_dim", 0) + spec.latent.get("qk_rope_head_dim", 0)
    if not rules.mla:
        return spec.heads / ranks * (3 * 256 + 2 * size)
    return spec.heads / ranks * (size + spec.latent.get("v_head_dim", 0)) * 2


def compile_peak(spec: ModelSpec, rules: Rules, batch: Batch) -> float:
    """Bytes that the first start's compilation takes inside the profile: Inductor tunes the kernel that reads
    the embeddings on a table of the weight's size, with four vectors of the hidden size for every token.

    Two GPUs with a table of 0.72 GiB each lose 0.47 GiB to it, one with a table of 2.37 GiB 2.5 GiB
    (vllm-project/vllm #54383, 1CatAI/1Cat-vLLM #518); the next start of the same shape does not.
    """
    if not rules.compile_scratch:
        return 0.0
    tables = [prod(w.shape) for w in spec.weights if w.role == "embedding" and len(w.shape) == 2]
    return (max(tables, default=0) / batch.ranks + 4 * batch.tokens * spec.hidden) * batch.width


def vision_peak(spec: ModelSpec, rules: Rules, batch: Batch) -> int:
    """Bytes at the peak of the vision tower's part of the profile run: items of the kind with the most
    tokens, image or video, worth the batch's tokens, one at least (``multimodal/encoder_budget.py``; of V0,
    ``worker/model_runner.py``). Where cross attention reads them, V0 gave every sequence one
    (``worker/enc_dec_model_runner.py``).

    Every patch holds the MLP's inner projections and four vectors of the tower's width; the outputs stay
    until the end.
    """
    shape = spec.vision_shape
    if not shape or not rules.vision_profiled:
        return 0
    longest = shape.get("frames", 1) if batch.video and rules.engine == "v1" else 1
    item = shape["tokens"] * min(longest, max(batch.context // shape["tokens"], 1))
    each = batch.seqs if rules.engine == "v0" and shape.get("crossed") else batch.tokens // item
    images = max(each, 1) * item
    patch = shape["projections"] * shape["inner"] + 4 * shape["hidden"]
    return images * shape["patches"] * patch * batch.width + images * spec.hidden * batch.width


# -- graphs --------------------------------------------------------------------------------------------------


def graph_sizes(seqs: int, tokens: int, rules: Rules) -> int:
    """How many batch sizes are captured as CUDA graphs."""
    if rules.engine == "v0":
        return 3 + sum(1 for s in range(8, 257, 8) if s <= max(8, seqs))
    largest = min(seqs * 2, rules.largest_graph) if rules.graphs_follow_seqs else 512
    largest = min(largest, tokens)
    sizes = [s for s in (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)) if s <= largest]
    return len(sizes)


def graph_bytes(spec: ModelSpec, rules: Rules, sizes: int, ranks: int, layers: int, tokens: int = 0) -> int:
    """Memory of the captured graphs: a first capture and a share for every further one, both growing with the
    layers.

    Calibrated on the estimates that vLLM printed for ten models with 102 graphs (51 sizes, two modes):
    0.55–1.82 GiB. With recurrent layers the estimate of some releases also counts a pass over ``tokens``
    (vllm-project/vllm #50780).
    """
    if not sizes:
        return 0
    share = sizes * rules.graph_modes / 102
    full = 0.35 * GIB + 12.3 * MIB * layers
    if spec.moe:
        full += 0.35 * GIB
    if ranks > 1:
        full += 0.4 * GIB
    return int(full * share + rules.graph_token_bytes * tokens / ranks)


# -- outside torch -------------------------------------------------------------------------------------------


def other_memory(rules: Rules, gpu: Gpu, world: int, eager: bool = False) -> int:
    """Bytes outside torch's allocator: the CUDA context's growth and libraries, NCCL and all-reduce buffers
    with several GPUs; on the CPU the process itself; what others held where the release counted that too."""
    if gpu.platform == "cpu":
        return CPU_PROCESS_BYTES
    held = gpu.total_bytes - gpu.free_bytes if rules.held_counted else 0
    if has_unified_memory(gpu):
        return (rules.other_bytes_unified if world == 1 else rules.other_bytes_unified_ranks) + held
    if world == 1:
        return rules.other_bytes + held
    if not shares_memory(gpu):
        return rules.other_bytes_pcie + held
    return (min(rules.other_bytes_nvlink, GIB) if eager else rules.other_bytes_nvlink) + held
