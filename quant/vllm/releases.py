"""How each vLLM release accounts for memory. A release is a row of numbers that the planner reads; no code
elsewhere asks for a version.

Where each number is from: the sources of 0.13, 0.17.1, 0.19.1, 0.20, 0.22, 0.25, 0.27.1, 0.28, 0.29 and
0.32 (``v1/worker/gpu_worker.py``, ``utils/mem_utils.py``, ``v1/worker/gpu_model_runner.py`` and
``v1/worker/gpu/model_runner.py``, ``v1/core/kv_cache_utils.py``, ``config/compilation.py``, ``envs.py``), and
for what is older or not in them what vLLM printed at start in public threads. A change is dated to the first
of these releases that has it. Of vllm-project/vllm: #33538 brought the sampler's kernel, #30515 and #45178
tell of the graphs' estimate, #49224 and #50159 of the second model runner, #54122, #54383 and #54479 of the
first start's compilation, #50780 and #52872 of the graphs of recurrent models, #34094 of their states. The
sampler's peak is bytes for every pair of a sequence and a vocabulary entry:

* 39 while top-k and top-p were done by sorting: logits in 16 and 32 bits (2 + 4), sorted values and indices
  (4 + 8), probabilities, their running sum, the log-probabilities and the noise (4 each), the scattered
  result (4) and a mask (1);
* 16 with the Triton kernel that needs no sorting: 32-bit logits, probabilities, noise and one copy;
* 2 in the second model runner, whose profile run samples greedily from the 16-bit logits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant.errors import UsageError
from quant.units import GIB
from quant.vllm.kernels import BF16_CAPABILITY

if TYPE_CHECKING:
    from quant.hardware import Gpu

#: The release that is planned for and checked against where none is named.
VLLM_VERSION = "0.32"


@dataclass(frozen=True)
class Rules:
    """The accounting of one release on one kind of device. Bytes, tokens and shares."""

    version: tuple[int, int, int]
    #: ``v0`` or ``v1``: the engine
    engine: str
    #: default of gpu_memory_utilization
    utilization: float
    sampler_bytes: int
    #: CUDA-graph memory is taken from the KV cache, or comes on top of the requested memory
    graphs_subtracted: bool
    #: graphs of recurrent models: bytes for every batched token that the estimate's first decoding sample
    #: allocates and is charged with
    graph_token_bytes: int
    #: the first start compiles ahead of time inside the profile, and Inductor tunes the embedding's kernel on
    #: a table as large as the weight's (``VLLM_USE_AOT_COMPILE``, on with torch 2.10)
    compile_scratch: bool
    #: what other processes held at the start was taken for this one's: all use of the GPU but torch's counted
    held_counted: bool
    #: experts' buffers are the modular kernel's (rows of the larger of inner and hidden size, twice), not the
    #: fused function's two caches
    expert_workspace: bool
    #: and are kept for the next pass (``v1/worker/workspace.py``); before, each layer freed its own
    expert_buffers_kept: bool
    #: bytes appended to every row of an unquantized expert (``VLLM_ROCM_MOE_PADDING``)
    expert_padding: int
    #: the profile runs the vision encoder
    vision_profiled: bool
    #: the sampler runs once more after the graphs are captured, in memory that it must get anew: of its peak,
    #: the share beyond it that is needed, because its blocks come in other sizes than those torch kept
    sampler_warm_up: float
    #: graphs are captured for mixed batches and again for decoding (0.11 on)
    graph_modes: int
    #: the pool's null block is reserved before the check of the longest context
    null_block: bool
    #: blocks that one request holds in a group of recurrent layers: two when prefix caching keeps a state at
    #: a block's end
    state_blocks: int
    #: recurrent states: a block for every sequence that a captured decode graph may hold
    state_check: bool
    #: the profile counted what torch had reserved, in which the outputs of every all-reduce of the pass were
    #: still held
    reserved_profile: bool
    #: KV tokens printed: ``blocks`` (a share of all groups) or ``requests`` (concurrency × context)
    printed_tokens: str
    #: sliding-window layers give back blocks outside their window
    hybrid: bool
    #: batches whose tokens are not yet settled, for the window's bound
    batches_in_flight: int
    #: latent attention is cached as one latent; before, full keys and values padded to 256
    mla: bool
    #: bytes that an entry of the latent cache is padded to
    mla_alignment: int
    #: the last pipeline stage takes all remaining layers; False: they are spread over the middle stages
    last_stage_takes_rest: bool
    #: the context check compares the need of all stages with one stage's memory
    whole_model_check: bool
    #: smallest memory at which the larger batch defaults hold, and whether an A100 has it too
    large_gpu_bytes: int
    large_includes_a100: bool
    #: memory from which they are larger still; 0: in no such release
    largest_gpu_bytes: int
    #: default max_num_seqs below that memory (V1: raised to 1024 in 0.8.0, taken back in 0.8.4,
    #: vllm-project/vllm #16158)
    small_gpu_seqs: int
    #: tokens of a chunk of a prompt in V0, where chunks were asked for
    chunk_tokens: int
    #: captured batches grow with max_num_seqs, up to this size; False: up to 512 whatever it is
    graphs_follow_seqs: bool
    largest_graph: int
    #: what the inner size of an MXFP4 expert is padded to on each rank: 128 by Marlin, 64 by the Triton
    #: kernels
    mxfp4_inner: int
    #: bytes outside torch with one GPU, and with several (on NVLink, on PCIe), and on a GPU that shares the
    #: host's memory, where the processes' own memory and pages of the files count
    other_bytes: int
    other_bytes_nvlink: int
    other_bytes_pcie: int
    other_bytes_unified: int
    #: the same of several such machines, each of which holds the network's buffers too
    other_bytes_unified_ranks: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": ".".join(map(str, self.version)),
            "engine": self.engine,
            "utilization": self.utilization,
        }


#: Bytes of the sampler that sorts, for a sequence and a vocabulary entry.
_SORTING = 39
#: The gpt-oss builds of 0.10.1 carry FlashInfer, whose sampler V1 then took by itself: logits in 16 and 32
#: bits, no sorting.
_FLASHINFER_SAMPLER = 6

#: field → (first release with that value, value), newest last. Reads downwards: the last row not newer than
#: the release holds.
_HISTORY: dict[str, tuple[tuple[tuple[int, int, int], Any], ...]] = {
    "utilization": (((0, 0, 0), 0.9), ((0, 20, 0), 0.92)),
    "sampler_bytes": (((0, 0, 0), _SORTING), ((0, 17, 0), 16), ((0, 29, 0), 2)),
    "graphs_subtracted": (((0, 0, 0), False), ((0, 20, 0), True)),
    "graph_modes": (((0, 0, 0), 1), ((0, 11, 0), 2)),
    "null_block": (((0, 0, 0), False), ((0, 29, 0), True)),
    "printed_tokens": (((0, 0, 0), "blocks"), ((0, 22, 0), "requests")),
    "batches_in_flight": (((0, 0, 0), 1), ((0, 29, 0), 2)),
    "state_blocks": (((0, 0, 0), 1), ((0, 22, 0), 2)),
    # 0.17 and 0.18 fail in the kernel, 0.19 captures fewer graphs instead, from 0.20 on it is an error
    "state_check": (((0, 0, 0), False), ((0, 17, 0), True), ((0, 19, 0), False), ((0, 20, 0), True)),
    "compile_scratch": (((0, 0, 0), False), ((0, 17, 0), True)),
    "expert_workspace": (((0, 0, 0), False), ((0, 20, 0), True)),
    "expert_buffers_kept": (((0, 0, 0), False), ((0, 13, 0), True)),
    "reserved_profile": (((0, 0, 0), False), ((0, 2, 5), True), ((0, 4, 0), False)),
    "mla": (((0, 0, 0), False), ((0, 7, 1), True)),
    "last_stage_takes_rest": (((0, 0, 0), True), ((0, 7, 0), False)),
    "whole_model_check": (((0, 0, 0), False), ((0, 10, 0), True), ((0, 15, 0), False)),
    "small_gpu_seqs": (((0, 0, 0), 256), ((0, 8, 0), 1024), ((0, 8, 4), 256)),
    "large_includes_a100": (((0, 0, 0), True), ((0, 9, 1), False)),
    "largest_gpu_bytes": (((0, 0, 0), 0), ((0, 28, 0), 160 * GIB)),
    "chunk_tokens": (((0, 0, 0), 512), ((0, 6, 4), 2048)),
    "graphs_follow_seqs": (((0, 0, 0), False), ((0, 11, 0), True)),
}


def parse_version(text: str) -> tuple[int, int, int]:
    """``0.19``, ``v0.7.3.dev233+g…`` → three numbers.

    Raises:
        UsageError: not a version, or one outside 0.2 to 0.99.
    """
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", str(text).strip())
    if not match:
        raise UsageError(f"--vllm-version is {text!r}: give a release such as {VLLM_VERSION} or 0.19.0")
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    if not (0, 2, 0) <= version < (1, 0, 0):
        raise UsageError(f"--vllm-version is {text!r}: releases from 0.6 to {VLLM_VERSION} are known")
    return version


#: Mixtures that the second model runner served while the others were still left to the first
#: (``config/vllm.py``, DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES).
_EARLY_MIXTURES = {"DeepseekV2ForCausalLM", "Qwen2MoeForCausalLM", "GraniteMoeForCausalLM"}


def _second_runner(release: tuple[int, int, int], mixture: bool, architecture: str, recurrent: bool) -> bool:
    """Whether the second model runner serves such a model: from 0.25 on dense ones without recurrent layers
    and a few mixtures, from 0.29 on all."""
    if release >= (0, 29, 0):
        return True
    early = architecture in _EARLY_MIXTURES
    return release >= (0, 25, 0) and (early or not (mixture or recurrent))


def is_planned_release(text: str) -> bool:
    """Whether an installed vLLM is one of the release that is planned for where none is named.

    >>> is_planned_release(f"{VLLM_VERSION}.1+cpu"), is_planned_release("0.6.3"), is_planned_release("dev")
    (True, False, False)
    """
    try:
        return parse_version(text)[:2] == parse_version(VLLM_VERSION)[:2]
    except UsageError:
        return False


def rules_for(
    version: str = VLLM_VERSION,
    capability: tuple[int, int] | None = None,
    mixture: bool = True,
    *,
    architecture: str = "",
    recurrent: bool = False,
    platform: str = "cuda",
) -> Rules:
    """The accounting of a release on a GPU of that compute capability, for a mixture of experts or a dense
    model, with or without recurrent layers. 0.8 and 0.9 still ran the V0 engine below 8.0.

    >>> rules_for("0.19").sampler_bytes, rules_for("0.8.5", (7, 0)).engine
    (16, 'v0')
    """
    release = parse_version(version)
    values = {name: [v for first, v in rows if release >= first][-1] for name, rows in _HISTORY.items()}
    second = _second_runner(release, mixture, architecture, recurrent)
    if second and release < (0, 29, 0):  # it did not profile graphs yet
        values.update(sampler_bytes=2, graphs_subtracted=False)
    if "gptoss" in version:
        values["sampler_bytes"] = _FLASHINFER_SAMPLER
    old_part = capability is not None and capability < BF16_CAPABILITY
    generation = capability[0] if capability is not None else 0
    v1 = release >= (0, 10, 0) or (release >= (0, 8, 0) and not old_part)
    if not v1:
        values.update(whole_model_check=False, small_gpu_seqs=256)
    # NCCL's and the all-reduce's shared buffers; the graphs' estimate leaves more of them behind
    nvlink = 0.6 if release < (0, 15, 0) else 1.0 if release < (0, 18, 0) else 2.1
    return Rules(
        version=release, engine="v1" if v1 else "v0", hybrid=v1 and release >= (0, 9, 2),
        mla_alignment=256 if not v1 and values["mla"] else 1, large_gpu_bytes=70 * GIB,
        graph_token_bytes=128 * 1024 if recurrent and not second and release >= (0, 26, 0) else 0,
        held_counted=v1 and release < (0, 9, 0),
        expert_padding=256 if platform == "rocm" and v1 else 0,
        vision_profiled=(not second or release >= (0, 27, 0)) if v1 else release >= (0, 6, 0),
        # two starts of 72B in FP8 at utilization 0.95: the sorting sampler lacked 0.5 on two GPUs, and found
        # 0.55 on one
        sampler_warm_up=0.5 if v1 and values["sampler_bytes"] == _SORTING else 0.0,
        # ROCm loads code objects and hipBLASLt's workspaces into the process (a start on an MI300X)
        other_bytes=int((1.0 if platform == "rocm" else 0.25 if v1 else 0.06) * GIB),
        other_bytes_nvlink=int(nvlink * GIB),
        other_bytes_pcie=int((0.45 if v1 else 0.25) * GIB), other_bytes_unified=9 * GIB,
        # two DGX Spark at 0.29, TP 2 over their network: 15.6 and 15.4 (eugr/spark-vllm-docker #396)
        other_bytes_unified_ranks=int(15.5 * GIB),
        largest_graph=1024 if generation == 10 else 512,
        mxfp4_inner=64 if generation == 9 and release >= (0, 12, 0) else 128, **values,
    )  # fmt: skip


def batch_sizes(rules: Rules, gpu: Gpu) -> tuple[int, int]:
    """V1's defaults of ``max_num_batched_tokens`` and ``max_num_seqs`` on a GPU of that memory and name."""
    large = gpu.total_bytes >= rules.large_gpu_bytes
    if not large or not (rules.large_includes_a100 or "a100" not in gpu.name.lower()):
        return 2048, rules.small_gpu_seqs
    largest = rules.largest_gpu_bytes and gpu.total_bytes >= rules.largest_gpu_bytes
    return (16384 if largest else 8192), 1024


#: First release that loads a format, as far as the formats' contract is known: before it compressed-tensors
#: had no per-group format key.
FIRST_RELEASE = {"awq": (0, 2, 0), "compressed-tensors": (0, 6, 2), "gptq": (0, 2, 6)}


def loading_problem(form: str, vllm_version: str) -> str | None:
    """Why a release will not load a format, or None.

    Raises:
        UsageError: not a version.
    """
    first = FIRST_RELEASE.get(form)
    if first is None or parse_version(vllm_version) >= first:
        return None
    return f"--vllm-version is {vllm_version}: format {form} is loaded from {'.'.join(map(str, first))} on"
