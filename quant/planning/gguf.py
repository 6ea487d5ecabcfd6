"""How large a model is at each level of GGUF, which level fits a memory, and how many layers of it a GPU
holds. No torch.

Which type llama.cpp gives to which tensor of a K level is ``src/llama-quant.cpp`` (`llama_tensor_get_type`):
values, the down projection and the head get more bits than the rest, in some blocks. Types of our own levels
are those of :meth:`quant.gguf.levels.Level.type_of`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import QuantError
from quant.gguf.families import FAMILIES
from quant.gguf.header import Header
from quant.gguf.levels import LEVELS, Place, fits, row_bytes
from quant.gguf.llama_cpp import llama_python
from quant.hardware import Gpu
from quant.models.spec import ModelSpec, Weight
from quant.planning.storage import source_schemes
from quant.units import format_size
from quant.vllm.config import text_config

#: Type of most matrices of a level that llama.cpp makes.
_MOST = {
    "q6_k": "Q6_K", "q5_k_m": "Q5_K", "q4_k_m": "Q4_K", "iq4_xs": "IQ4_XS", "q3_k_m": "Q3_K", "q2_k": "Q2_K",
}  # fmt: skip
#: What takes the place of a type whose blocks of 256 do not fill a row.
_FALLBACK = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
#: The best level first; those that llama.cpp makes, and those that need nothing but the gguf package.
_BEST = ("q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
_PLAIN = ("q4_0",)
#: Bytes of a token in the file: its text, kind and score, and its share of merges.
_TOKEN_BYTES = 36
#: Tokens that llama.cpp computes at a time (``n_ubatch``): beyond its window a sliding block's cache has room
#: for them (``src/llama-kv-cache-iswa.cpp``).
_BATCH = 512
#: What llama.cpp takes besides weights and cache: buffers of a batch.
_COMPUTE = 512 << 20


@dataclass(frozen=True)
class LevelPlan:
    """A level for a machine.

    Attributes:
        file_bytes: of the file; ``memory_bytes``: with cache and buffers.
        gpu_layers: blocks that a GPU holds with their cache; 0 without one.
        tokens_per_second: upper bound for one user, of a memory whose bandwidth is known; None: it is not.
    """

    level: str
    file_bytes: int
    memory_bytes: int
    gpu_layers: int
    tokens_per_second: float | None
    command: str

    def __str__(self) -> str:
        layers = f", {self.gpu_layers} layers of it on the GPU" if self.gpu_layers else ""
        speed = f", up to {self.tokens_per_second:.0f} tokens/s" if self.tokens_per_second else ""
        sizes = f"{format_size(self.file_bytes)}, {format_size(self.memory_bytes)} with cache"
        return f"{self.level} ({sizes}{layers}{speed}): {self.command}"


def _more_bits(block: int, blocks: int) -> bool:
    """Whether a block is one of the first and last eighth, or every third between (`use_more_bits`)."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def _kind(name: str) -> str:
    """What llama.cpp goes by in a tensor's name."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return {
        "v_proj": "v", "down_proj": "down", "w2": "down", "o_proj": "o", "qkv_proj": "v", "k_proj": "k",
        "embed_tokens": "embedding", "lm_head": "head", "gate": "router", "shared_expert_gate": "router",
    }.get(last, "")  # fmt: skip


def tensor_type(
    level: str, weight: Weight, spec: ModelSpec, weighed: bool = True, coded: bool | None = None
) -> str:
    """ggml's name of the type of a tensor at a level.

    Args:
        weighed: whether an importance matrix is used.
        coded: as :meth:`quant.gguf.levels.Level.type_of`; of no matter to llama.cpp's levels, which are made
            of 16 bits.
    """
    kind, columns = _kind(weight.name), weight.shape[-1]
    vector = len(weight.shape) == 1 or kind == "router" or weight.role == "norm"
    if level in LEVELS:
        place: Place = "vector" if vector else "linear"
        if not vector and not coded and kind in ("head", "embedding"):
            place = "head" if kind == "head" else "embedding"
        return LEVELS[level].type_of(place, columns, tied=spec.tied, coded=coded)
    if vector:
        return "F32"
    type_ = _of_level(level, kind, weight.layer, spec, columns, weighed)
    if not fits(type_, columns):
        type_ = _FALLBACK.get(type_, type_)
    return type_ if fits(type_, columns) else "F16"


def _of_level(level: str, kind: str, block: int, spec: ModelSpec, columns: int, weighed: bool) -> str:
    """`llama_tensor_get_type` before its fallback."""
    most, more = _MOST[level], _more_bits(block, spec.layers)
    experts = spec.moe.experts if spec.moe is not None else 0
    shared = spec.heads // max(1, spec.kv_heads)
    if kind == "head" or (kind == "embedding" and spec.tied):
        return "Q6_K" if fits(most, columns) else "Q8_0"
    if kind == "v":
        type_ = {
            "q2_k": "Q4_K" if shared >= 4 else "Q3_K",
            "q3_k_m": "Q5_K" if block < 2 else "Q4_K",
            "iq4_xs": "Q5_K" if shared >= 4 else most,
        }.get(level, "Q6_K" if level in ("q4_k_m", "q5_k_m") and more else most)
        if spec.layers == 80 and type_ in ("Q3_K", "Q4_K"):
            type_ = "Q5_K"  # Llama's 70B, whose values are an eighth of its queries
        return "Q8_0" if experts == 8 else type_
    if kind == "k" and experts == 8:
        return "Q8_0"
    if kind == "down":
        type_ = {
            "q2_k": "Q3_K",
            "q3_k_m": "Q5_K" if block < spec.layers // 16 else "Q4_K",
            "iq4_xs": "Q5_K" if block < spec.layers // 8 and not weighed else most,
        }.get(level, "Q6_K" if level in ("q4_k_m", "q5_k_m") and more else most)
        return type_
    if kind == "o":
        if experts == 8:
            return "Q5_K" if level in ("q2_k", "q3_k_m", "q4_k_m", "iq4_xs") else most
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(level, most)
    return most


def _tensors(spec: ModelSpec, level: str, weighed: bool) -> Iterator[tuple[Weight, int]]:
    """The tensors of the text decoder, with their bytes."""
    own = source_schemes(spec) if spec.quantization else None
    for weight in spec.unpacked or spec.weights:
        if weight.role in ("tower", "mtp") or (spec.tied and _kind(weight.name) == "head"):
            continue
        coded = None if own is None else own(weight) is not None
        yield weight, row_bytes(tensor_type(level, weight, spec, weighed, coded), weight.parameters)


def level_bytes(spec: ModelSpec, level: str, weighed: bool = True) -> int:
    """Size of the file of a model at a level, its keys and tokenizer estimated.

    Raises:
        QuantError: the ``gguf`` package, which knows the sizes of blocks, is not installed.
        UsageError: the model is quantized already, in what way is not known.

    >>> from quant.catalog import load_model
    >>> round(level_bytes(load_model("Qwen2.5-7B-Instruct"), "q4_k_m") / 1e9, 2)
    4.68
    """
    data = sum(size for _, size in _tensors(spec, level, weighed))
    return data + spec.vocabulary * _TOKEN_BYTES


def cache_bytes(spec: ModelSpec, tokens: int) -> int:
    """What llama.cpp keeps of so many tokens: fp16 keys and values, or latents; of blocks with a sliding
    window no more than the window and a batch, where its graph of the family has windows; recurrent states in
    fp32."""
    family = FAMILIES.get(_decoder_type(spec))
    total = 0
    for layer in spec.cache:
        kept = tokens
        if layer.window and family is not None and family.window:
            kept = min(tokens, layer.window + _BATCH)
        total += 2 * kept * layer.kv_heads * (layer.key_dim + layer.value_dim)
        total += sum(4 * count for count, _ in layer.state)
    return total


def _decoder_type(spec: ModelSpec) -> str:
    return str(text_config(spec.config).get("model_type") or spec.model_type)


def plan_level(spec: ModelSpec, level: str, gpu: Gpu | None, tokens: int, model: str) -> LevelPlan:
    """A level on the CPU, or with the blocks that fit on a GPU there, each with its part of the cache."""
    size, cache = level_bytes(spec, level), cache_bytes(spec, tokens)
    layers = 0
    if gpu is not None and gpu.platform != "cpu":
        inside = sum(n for w, n in _tensors(spec, level, True) if w.layer >= 0)
        each = (inside + cache) / max(1, spec.layers)
        layers = max(0, min(spec.layers, int((gpu.free_bytes - _COMPUTE) / each)))
    bound = None
    if gpu is not None and gpu.bandwidth and (gpu.platform == "cpu" or layers == spec.layers):
        read = sum(
            n * (spec.moe.active / spec.moe.experts if spec.moe is not None and w.role == "experts" else 1)
            for w, n in _tensors(spec, level, True)
            if _kind(w.name) != "embedding" or spec.tied
        )
        bound = gpu.bandwidth / (read + cache / 2)
    name = f"{Path(model).name or 'model'}-{level}.gguf"
    command = shlex.join(["quant", "export-gguf", "-m", model, "-o", name, "--level", level])
    return LevelPlan(level, size, size + cache + _COMPUTE, layers, bound, command)


def best_level(
    spec: ModelSpec, memory: int | None, gpu: Gpu | None, tokens: int, model: str
) -> LevelPlan | str:
    """The level of 4 bits for a model, or the largest below that fits ``memory`` (bytes of the host; None:
    not known). Of levels that can be made here: those of llama.cpp take its library.

    Returns:
        the level, or why there is none.
    """
    if _decoder_type(spec) not in FAMILIES:
        return (
            f"{spec.model_type} is not written as GGUF here: convert_hf_to_gguf.py of llama.cpp may know it"
        )
    try:
        llama_python()
        levels: tuple[str, ...] = _BEST
    except QuantError:
        levels = _PLAIN
    try:
        plans = [plan_level(spec, level, gpu, tokens, model) for level in levels]
    except QuantError as error:
        return f"a level that cannot be told here: {error}"
    fitting = [p for p in plans if memory is None or p.memory_bytes <= memory]
    if fitting:
        return fitting[0]
    least = plans[-1]
    return f"even {least.level} takes {format_size(least.memory_bytes)}, there are {format_size(memory or 0)}"


@dataclass(frozen=True)
class Offload:
    """How much of a GGUF file a device holds.

    Attributes:
        whole: whether it is all of it.
        text: a sentence that says so, with the sizes.
    """

    whole: bool
    text: str


def file_cache_bytes(fields: Mapping[str, Any], tokens: int | None, requests: int = 1) -> int | None:
    """fp16 keys and values of all blocks of a file, by its keys (ggml's ``docs/gguf.md``); of a family read
    here no more than its window and a batch in blocks that slide.

    Args:
        tokens: of a request; None: the model's context.
        requests: that are served at once.

    Returns:
        None where the keys do not say it.
    """
    arch = fields.get("general.architecture")

    def number(key: str) -> Any:
        return fields.get(f"{arch}.{key}")

    def whole(value: Any) -> bool:
        return isinstance(value, int) and value > 0

    heads, blocks = number("attention.head_count"), number("block_count")
    heads = max(heads, default=0) if isinstance(heads, list) else heads
    tokens = tokens or number("context_length")
    if not (whole(blocks) and whole(heads) and whole(tokens)):
        return None
    shared = number("attention.head_count_kv")
    width, length = number("embedding_length"), number("attention.key_length")
    each = length if whole(length) else width // heads if whole(width) else 0
    values = number("attention.value_length")
    each += values if whole(values) else each
    kept = shared if isinstance(shared, list) else [shared or heads] * blocks if blocks < 2**16 else []
    if not each or len(kept) != blocks or not all(isinstance(n, int) and n >= 0 for n in kept):
        return None
    window, period = number("attention.sliding_window"), number("attention.sliding_window_pattern")
    usual = next((f.window for f in FAMILIES.values() if f.architecture == arch), None)
    period = period if whole(period) else usual
    positions = [int(tokens) * requests] * blocks
    if usual and period and whole(window):
        sliding = min(int(tokens) * requests, window * requests + _BATCH)
        positions = [n if i % period == period - 1 else sliding for i, n in enumerate(positions)]
    return 2 * each * sum(n * heads for n, heads in zip(positions, kept, strict=True))


def offload(header: Header, gpu: Gpu, count: int, tokens: int | None, requests: int = 1) -> Offload:
    """How much of a file some equal GPUs hold, with its part of an fp16 cache, or whether a machine's memory
    does. llama.cpp keeps the embedding on the CPU where another tensor is the head.

    Args:
        tokens, requests: as :func:`file_cache_bytes`.
    """
    size = sum(f.stat().st_size for f in header.files)
    cache = file_cache_bytes(header.fields, tokens, requests)
    blocks = header.fields.get(f"{header.fields.get('general.architecture')}.block_count")
    there = gpu.free_bytes * count
    on = f"{count} × {gpu.name}" if count > 1 else gpu.name
    has = f"{on} ({format_size(there)})"
    what = f"{format_size(size)} of weights"
    if cache is not None:
        what += f" and at most {format_size(cache)} of fp16 cache"
    need = size + (cache or 0) + _COMPUTE * count
    if need <= there:
        unknown = "" if cache is not None else "; its keys do not tell how large its cache is"
        return Offload(True, f"all of it fits on {has}: {what}{unknown}")
    if gpu.platform == "cpu" or cache is None or not isinstance(blocks, int):
        return Offload(False, f"it does not fit on {has} as a whole: {what}")
    inside = sum(e.nbytes for n, e in header.tensors.items() if n.startswith("blk."))
    each = max(1, (inside or size) + cache) / blocks
    layers = max(0, min(blocks, int((there - _COMPUTE * count) / each)))
    rest = "the head" if layers == blocks else "the rest"
    return Offload(
        False,
        f"{layers} of {blocks} blocks fit on {has}: {what}; {rest} stays in the host's memory and is "
        "computed by the CPU, which is slower: a smaller --max-model-len or level puts more on the GPU",
    )


def advised(spec: ModelSpec, gpu: Gpu, tokens: int) -> str:
    """What to say of the level for a CPU, or for a GPU with a host's memory behind it, which is not known:
    its size and the command that makes it, or why there is none."""
    memory = gpu.total_bytes if gpu.platform == "cpu" else None
    model = spec.source if spec.source and Path(spec.source).is_dir() else spec.hub or spec.name
    return str(best_level(spec, memory, gpu, tokens, model))
