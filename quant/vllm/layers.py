"""The layers that vLLM builds of a checkpoint's linears: which of them it fuses, and how it cuts each over
ranks.

Source: the ``packed_modules_mapping`` of its model classes and the parallel linears they are made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from quant.schemes import BLOCK, ActivationScheme, Scheme, WeightScheme, scheme_of
from quant.vllm.config import Heads
from quant.vllm.kernels import GROUP_SIZES


@dataclass(frozen=True)
class Linear:
    """A quantized linear as a format sees it: ``name`` without ``.weight``, N outputs, K inputs, the schemes
    of its weights and activations."""

    name: str
    n: int
    k: int
    weights: WeightScheme
    activations: ActivationScheme | None = None

    @property
    def scheme(self) -> Scheme:
        """Weights and activations together, under their name."""
        return scheme_of(self.weights, self.activations)


#: Layers that vLLM builds as one from several of the file's, for any family: last path component → name of
#: the fused layer.
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}  # fmt: skip


def fused_name(linear: str) -> str:
    """The name of the vLLM layer that a linear becomes a part of; its own where it stays alone.

    >>> fused_name("model.layers.0.self_attn.k_proj")
    'model.layers.0.self_attn.qkv_proj'
    """
    head, _, last = linear.rpartition(".")
    if ".experts." in linear:  # all routed experts of a layer become one fused layer
        return linear.split(".experts.")[0] + ".experts"
    return f"{head}.{_FUSED[last]}" if last in _FUSED and head else linear


def shared_name(linear: str) -> str:
    """The layer of which vLLM keeps one number of a kind (a global scale, the scale of static activations):
    the fused one, of routed experts the gate and up projection of each.

    >>> shared_name("model.layers.0.mlp.experts.3.up_proj")
    'model.layers.0.mlp.expert_3.gate_up_proj'
    """
    return fused_name(linear.replace(".experts.", ".expert_"))


def fused_layers(linears: Iterable[str]) -> dict[str, list[str]]:
    """The names of the layers that vLLM builds, each with the linears that become it, in the order given.

    >>> fused_layers(["a.q_proj", "a.o_proj", "a.k_proj"])
    {'a.qkv_proj': ['a.q_proj', 'a.k_proj'], 'a.o_proj': ['a.o_proj']}
    """
    layers: dict[str, list[str]] = {}
    for name in linears:
        layers.setdefault(fused_name(name), []).append(name)
    return layers


def is_head(module: str) -> bool:
    """Whether vLLM builds a module as its output head (`ParallelLMHead`), which is no linear to it; InternLM
    2 calls its own ``output``.

    >>> is_head("model.language_model.lm_head")
    True
    """
    return module.rpartition(".")[2] in ("lm_head", "embed_out") or module == "output"


#: Model types of whose experts vLLM 0.32 reads no quantized form that quant writes: its loader looks for the
#: two fused matrices of an expert under names of their own (`models/gpt_oss.py`).
UNREAD_EXPERTS = frozenset({"gpt_oss"})


def expert_problems(model_type: str, linears: Iterable[str]) -> list[str]:
    """What vLLM would leave unfilled of a mixture's quantized experts, named by one of them."""
    experts = [n for n in linears if ".experts." in n]
    if model_type not in UNREAD_EXPERTS or not experts:
        return []
    return [
        f"{experts[0]}: vLLM's loader of model type {model_type!r} looks for quantized experts under other "
        "names than those of any format written here, so they would stay empty: serve the published "
        "checkpoint, leave them out with --ignore '*.experts.*', or use --target other"
    ]


_NO_LINEAR = re.compile(r"(^|\.)(embed\w*|wte|wpe|\w*norm\w*|\w*_embeddings?)$")


def is_linear(module: str) -> bool:
    """Whether vLLM builds a module with a matrix as a linear (`LinearBase`): neither as a head nor as an
    embedding or a norm."""
    return not is_head(module) and _NO_LINEAR.search(module) is None


Split = Literal["column", "row", "kv", "vocab", "none"]

#: Part of a weight's name → how tensor parallelism cuts it; the last part that is listed here decides. What
#: is not listed is copied to every rank, as vLLM does with norms, routers, the down-projections of latent
#: attention (`q_a_proj`, `kv_a_proj_with_mqa`) and of gates (`f_a_proj`, `g_a_proj`), and sparse attention's
#: indexer.
_SPLITS: dict[str, Split] = {
    **dict.fromkeys(
        (
            "q_proj", "q_b_proj", "kv_b_proj", "qkv_proj", "query_key_value", "Wqkv", "wqkv", "W_pack",
            "c_attn", "in_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_z", "in_proj_ba", "in_proj_b",
            "in_proj_a", "dt_proj", "b_proj", "f_b_proj", "g_b_proj", "conv1d", "q_conv1d", "k_conv1d",
            "v_conv1d", "A_log", "dt_bias", "D", "sinks", "gate_proj", "up_proj", "gate_up_proj", "fc1",
            "fc_in", "c_fc", "dense_h_to_4h", "w1", "w3", "v1", "input_linear", "per_layer_model_projection",
        ),
        "column",
    ),
    **dict.fromkeys(
        (
            "o_proj", "out_proj", "dense", "wo", "x_proj", "down_proj", "fc2", "fc_out", "c_proj",
            "dense_4h_to_h", "w2", "output_linear",
        ),
        "row",
    ),
    **dict.fromkeys(("k_proj", "v_proj"), "kv"),
    **dict.fromkeys(
        (
            "embed_tokens", "embed_tokens_per_layer", "wte", "word_embeddings", "embed_in", "tok_embeddings",
            "embeddings", "lm_head", "embed_out",
        ),
        "vocab",
    ),
}  # fmt: skip
#: What follows the name of a weight in those of its quantized form (`gate_up_proj_blocks`).
_SUFFIX = re.compile(r"_(blocks|scales?|bias|packed)$")


def split_of(name: str) -> Split:
    """How tensor parallelism cuts a weight of the text decoder, by the name of its tensor or module.

    ``column``: along the outputs (first dimension); ``row``: along the inputs (second); ``kv``: along the
    outputs, but never finer than a head of keys or values; ``vocab``: along a vocabulary padded to 64 rows;
    ``none``: every rank has a copy.

    >>> split_of("model.layers.0.self_attn.kv_a_proj_with_mqa.weight"), split_of("mlp.experts.3.w2")
    ('none', 'row')
    """
    parts = name.removesuffix(".weight").split(".")
    if parts[-1] == "output":  # InternLM 2's head
        return "vocab"
    return next((_SPLITS[part] for p in reversed(parts) if (part := _SUFFIX.sub("", p)) in _SPLITS), "none")


#: Linears that the file already stores as one, which vLLM takes apart: queries, keys and values; gate and up.
_STORED_QKV = frozenset({"qkv_proj", "query_key_value", "Wqkv", "wqkv", "W_pack", "c_attn"})
_STORED_PAIRS = frozenset({"gate_up_proj", "input_linear"})
#: Shards of a fused layer that another one follows; of Mixtral's experts, w1 is the gate.
_FOLLOWED = frozenset({"q_proj", "k_proj", "gate_proj", "q_a_proj", "w1"})
#: Outputs that one word of packed codes or zero points holds: a rank takes whole words.
_WORD = 8
#: Degrees of tensor parallelism that a message offers.
DEGREES = (*range(1, 9), 12, 16, 32)


@dataclass(frozen=True)
class _Shard:
    """Outputs of a linear that tensor parallelism cuts into ``pieces``; ``followed``: by another shard of the
    same vLLM layer."""

    outputs: int
    pieces: int
    followed: bool


def _shards(linear: Linear, ranks: int, heads: Heads | None, fused: bool) -> list[_Shard]:
    """What vLLM makes of a linear's outputs; ``fused``: it becomes one layer with others."""
    last, kv = linear.name.rpartition(".")[2], min(ranks, heads.kv) if heads else ranks
    if last in _STORED_QKV and heads and linear.n % (heads.attention + 2 * heads.kv) == 0:
        width = linear.n // (heads.attention + 2 * heads.kv)
        keys = width * heads.kv
        return [_Shard(width * heads.attention, ranks, True), _Shard(keys, kv, True), _Shard(keys, kv, False)]
    if last in _STORED_PAIRS and linear.n % 2 == 0:
        return [_Shard(linear.n // 2, ranks, True), _Shard(linear.n // 2, ranks, False)]
    pieces = {"column": ranks, "kv": kv}.get(split_of(linear.name), 1)
    return [_Shard(linear.n, pieces, fused and last in _FOLLOWED)]


def _uncut(linear: Linear, ranks: int, heads: Heads | None) -> tuple[str, str] | None:
    """What of a linear ``ranks`` cannot share out, and the whole pieces that each would need; None where all
    can be.

    Source: `distributed/utils.py::divide` and `verify_group_size_divides_partition`,
    `quantization/utils/fp8_utils.py::validate_fp8_block_shape`.
    """
    weights = linear.weights
    if split_of(linear.name) == "row":
        unit = 1 if weights.group_size == -1 else weights.group_size
        uneven = linear.k % (ranks * unit) != 0
        return (f"{linear.k} inputs", "" if unit == 1 else f" into groups of {unit}") if uneven else None
    block = weights.strategy == "block"
    unit = BLOCK if block else 1 if weights.bits == 16 else _WORD
    what = "" if unit == 1 else f" into blocks of {BLOCK}" if block else f" into words of {_WORD}"
    for shard in _shards(linear, ranks, heads, fused=False):
        if shard.pieces > 1 and shard.outputs % (shard.pieces * unit):
            return f"{shard.outputs} outputs", what
    return None


def _uneven_heads(heads: Heads, ranks: int) -> str | None:
    """Heads that ``ranks`` cannot share out, or None. KV heads fewer than ranks are repeated.

    Source: the assertions of vLLM's attention classes (`models/llama.py::LlamaAttention`) and of its
    recurrent layers (`layers/mamba`).
    """
    if heads.attention % ranks:
        return f"{heads.attention} attention heads"
    if heads.kv % ranks and ranks % heads.kv:
        return f"{heads.kv} KV heads"
    uneven = next((n for n in heads.state if n % ranks), None)
    return None if uneven is None else f"{uneven} heads of recurrent layers"


def shape_problems(linears: Iterable[Linear], ranks: int = 1, heads: Heads | None = None) -> list[str]:
    """Why vLLM cannot build these linears, or not over ``ranks``: heads that do not divide; groups and blocks
    that do not, whole or for each rank. One line for each kind of layer.

    Args:
        linears: of the decoder's blocks, those in 16 bits (:data:`quant.schemes.UNQUANTIZED`) among them.
        ranks: the degree of tensor parallelism.
        heads: the model's; None where nothing is known of them.
    """
    problems = []
    if heads is not None and (uneven := _uneven_heads(heads, ranks)):
        allowed = [t for t in DEGREES if not _uneven_heads(heads, t)]
        problems.append(f"{uneven} over --tensor-parallel {ranks} do not divide: {_sizes(allowed)}")
        ranks = 1  # what of each linear a rank would get is no question any more
    linears = list(linears)
    members = fused_layers(linear.name for linear in linears)
    seen: dict[str, str] = {}
    judged = set()
    for linear in linears:
        kind = re.sub(r"\.\d+(?=\.)", ".*", linear.name)
        fused = members[fused_name(linear.name)] != [linear.name]
        key = (kind, linear.n, linear.k, linear.weights, fused)
        if kind in seen or key in judged:
            continue
        judged.add(key)
        if problem := _shape_problem(linear, ranks, heads, fused):
            seen[kind] = f"{kind}: {problem}"
    return problems + list(seen.values())


def _shape_problem(linear: Linear, ranks: int, heads: Heads | None, fused: bool) -> str | None:
    """:func:`shape_problems` of one linear; ``fused``: vLLM makes one layer of it and others."""
    g, block = linear.weights.group_size, linear.weights.strategy == "block"
    ignore = f"--ignore '{linear.name.rpartition('.')[2]}'"
    # of blocks too: the file may have a ragged last one, but vLLM's kernels quantize activations in whole
    # groups
    if g != -1 and linear.k % g:
        if linear.weights.type == "float":
            use = "--scheme w8a8-fp8"
        else:
            fits = [x for x in (128, 64, 32, 16, 8) if linear.k % x == 0 and x < g]
            use = f"--group-size {fits[0]} or -1" if fits else "--group-size -1"
        return f"{linear.k} inputs do not divide into groups of {g}: use {use}, or {ignore}"
    ragged = next((s for s in _shards(linear, 1, heads, fused) if s.followed and s.outputs % BLOCK), None)
    if block and ragged:
        return (
            f"{ragged.outputs} outputs do not divide into blocks of {BLOCK}, which vLLM demands of all "
            f"shards of a fused layer but the last: use --scheme w8a8-fp8, or {ignore}"
        )
    uncut = _uncut(linear, ranks, heads)
    if uncut is None:
        return None
    allowed = [t for t in DEGREES if not _uncut(linear, t, heads)]
    grouped = linear.weights.type == "int" and g != -1 and split_of(linear.name) == "row"
    smaller = [x for x in GROUP_SIZES[:0:-1] if grouped and x < g and linear.k % (ranks * x) == 0]
    return (
        f"{uncut[0]} over --tensor-parallel {ranks} do not divide{uncut[1]}: {_sizes(allowed)}"
        f"{f'; or --group-size {smaller[0]}' if smaller else ''}"
    )


def _sizes(allowed: list[int]) -> str:
    return f"tensor parallel sizes that do: {', '.join(map(str, allowed)) or 'none'}"
