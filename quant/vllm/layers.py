"""The layers that vLLM builds of a checkpoint's linears: which of them it fuses, and how it cuts each over
ranks.

Source: the ``packed_modules_mapping`` of its model classes and the parallel linears they are made of.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quant.schemes import BLOCK, ActivationScheme, Scheme, WeightScheme, scheme_of
from quant.vllm.config import Heads, model_types, quantization_config, source_method, stated
from quant.vllm.kernels import GROUP_SIZES
from quant.vllm.names import RENAMED_PROJECTIONS


@dataclass(frozen=True)
class Linear:
    """A quantized linear as a format sees it: ``name`` without ``.weight``, N outputs, K inputs, the schemes
    of its weights and activations; ``transposed``: a tensor that is called ``<name>.weight`` is stored
    [K, N], see :data:`TRANSPOSED`."""

    name: str
    n: int
    k: int
    weights: WeightScheme
    activations: ActivationScheme | None = None
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of a tensor that is called ``<name>.weight``."""
        return (self.k, self.n) if self.transposed else (self.n, self.k)

    @property
    def scheme(self) -> Scheme:
        """Weights and activations together, under their name."""
        return scheme_of(self.weights, self.activations)


#: Model types whose blocks multiply by weights that their files store [K, N] (transformers' `Conv1D`), and
#: the linears that do. vLLM turns every tensor of theirs whose name ends in ``.weight`` as it loads
#: (`models/gpt2.py::_transpose_conv1d`), codes too; what a format calls otherwise it takes as it is.
TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def stored_transposed(config: Mapping[str, Any], module: str) -> bool:
    """Whether the files of a model store a linear's weight [K, N].

    >>> stored_transposed({"model_type": "gpt2"}, "h.0.attn.c_attn"), stored_transposed({}, "h.0.attn.c_attn")
    (True, False)
    """
    return str(config.get("model_type")) in TRANSPOSED and module.rpartition(".")[2] in _CONV1D


#: Model types whose classes read the size of a head from ``head_dim`` (`models/llama.py::LlamaAttention` and
#: what is made of it, `qwen3.py`, `gemma*.py` …); others divide hidden_size by num_attention_heads.
HEAD_SIZE_STATED = frozenset(
    {
        "llama", "mistral", "mixtral", "ministral3", "phi3", "granite", "qwen3", "qwen3_moe", "qwen3_next",
        "gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "glm4_moe", "gpt_oss", "exaone4", "cohere",
        "cohere2", "nemotron", "minimax_m2", "ernie4_5_moe",
    }
)  # fmt: skip


#: Model types whose ordinary files hold the experts of a layer as [E, K, N].
EXPERTS_TRANSPOSED = frozenset(
    {"llama4_text", "llama4", "gpt_oss", "qwen3_vl_moe_text", "qwen3_vl_moe", "aria_text", "aria"}
)  # fmt: skip


def experts_transposed(config: Mapping[str, Any]) -> bool:
    """Whether ordinary files of a model hold fused experts with the outputs last."""
    return not EXPERTS_TRANSPOSED.isdisjoint(model_types(config))


@dataclass(frozen=True)
class Fusion:
    """A layer that vLLM builds as one from several linears of a module.

    Attributes:
        name: the fused layer's last path component.
        shards: those of the linears, in vLLM's order; what a file lacks of them is left out.
        beside: components that the module must have as well; empty: any one of the shards tells.
        model_types: of a config, one of which there must be; empty: any family's.
    """

    name: str
    shards: tuple[str, ...]
    beside: tuple[str, ...] = ()
    model_types: frozenset[str] = frozenset()


_QKV = ("q_proj", "k_proj", "v_proj")
#: Every fusion of vLLM 0.32, found in the ``packed_modules_mapping``, ``hf_to_vllm_mapper`` and
#: ``stacked_params_mapping`` of its model classes (`model_executor/models`, `models/*`). The first row that
#: holds of a module decides.
FUSIONS = (
    Fusion(
        "in_proj_qkvbfg_a",
        (*_QKV, "b_proj", "f_a_proj", "g_a_proj"),
        ("b_proj", "f_a_proj"),
        frozenset({"glm5_next", "glm5_next_text"}),
    ),
    Fusion("in_proj_qkvgfab", (*_QKV, "g_proj", "f_a_proj", "b_proj"), ("b_proj", "f_a_proj")),
    Fusion("qkvb_proj", (*_QKV, "b_proj"), ("b_proj", "f_proj")),
    Fusion("in_proj_qkvg", (*_QKV, "g_proj"), ("a_proj", "b_proj", "g_proj")),
    Fusion("fused_qkv_a_g_proj", ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"), ("q_a_proj", "g_proj")),
    Fusion("qkv_proj", (*_QKV, "index_q_proj", "index_k_proj")),
    Fusion("merged_proj", ("gate_proj", "dense_h_to_4h"), ("gate_proj", "dense_h_to_4h")),
    Fusion("gate_up_proj", ("gate_proj", "up_proj")),
    Fusion("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    Fusion("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    Fusion("in_proj_ba", ("in_proj_b", "in_proj_a")),
    Fusion("w13", ("w1", "w3"), ("w1", "w3"), frozenset({"lfm2", "lfm2_moe", "inkling_model"})),
    Fusion("gate_up_proj", ("w1", "w3"), ("w1", "w3")),
    Fusion("gate_up_proj", ("c_fc_0", "c_fc_1")),
    Fusion("fused_wqa_wkv", ("wq_a", "wkv"), ("wq_a", "wkv")),
    Fusion("fused_wkv_wgate", ("wkv", "wgate"), ("wkv", "wgate")),
    Fusion("wk_weights_proj", ("wk", "weights_proj"), ("wk", "weights_proj")),
    Fusion("qkvr", ("wq_du", "wk_dv", "wv_dv", "wr_du")),
    Fusion("merged_qkv", ("wq", "wk", "wv"), ("wq", "wk", "wv")),
    Fusion("kv_proj", ("key_proj", "value_proj")),
    Fusion("qkv_proj", ("query", "key", "value"), ("query", "key", "value")),
    Fusion("qkv", ("q", "k", "v"), ("q", "k", "v")),
    Fusion("fc13", ("fc1", "fc3"), ("fc1", "fc3")),
)


def _fusion(last: str, beside: Collection[str], kinds: Collection[str]) -> Fusion | None:
    """The row of a linear that its module calls ``last``, with all that the module has."""
    for row in FUSIONS:
        if (
            last in row.shards
            and all(part in beside for part in row.beside)
            and (not row.model_types or not row.model_types.isdisjoint(kinds))
        ):
            return row
    return None


def fused_name(linear: str, beside: Collection[str] = (), kinds: Collection[str] = ()) -> str:
    """The name of the vLLM layer that a linear becomes a part of; its own where it stays alone.

    Args:
        beside: last path components of all linears of its module.
        kinds: the model types of the config and its parts.

    >>> fused_name("model.layers.0.self_attn.k_proj")
    'model.layers.0.self_attn.qkv_proj'
    >>> fused_name("model.layers.0.self_attn.k_proj", ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"))
    'model.layers.0.self_attn.in_proj_qkvgfab'
    """
    if ".experts." in linear:  # all routed experts of a layer become one fused layer
        return linear.split(".experts.")[0] + ".experts"
    head, _, last = linear.rpartition(".")
    row = _fusion(last, beside, kinds) if head else None
    return f"{head}.{row.name}" if row else linear


def _members(linears: Iterable[str]) -> dict[str, set[str]]:
    """By module, the last path components of its linears."""
    modules: dict[str, set[str]] = {}
    for name in linears:
        module, _, last = name.rpartition(".")
        modules.setdefault(module, set()).add(last)
    return modules


def fused_layers(linears: Iterable[str], kinds: Collection[str] = ()) -> dict[str, list[str]]:
    """The names of the layers that vLLM builds, each with the linears that become it, in the order given.

    >>> fused_layers(["a.q_proj", "a.o_proj", "a.k_proj"])
    {'a.qkv_proj': ['a.q_proj', 'a.k_proj'], 'a.o_proj': ['a.o_proj']}
    """
    linears = list(linears)
    modules = _members(linears)
    layers: dict[str, list[str]] = {}
    for name in linears:
        beside = modules[name.rpartition(".")[0]]
        layers.setdefault(fused_name(name, beside, kinds), []).append(name)
    return layers


def sharing_layers(linears: Iterable[str], kinds: Collection[str] = ()) -> list[list[str]]:
    """Linears of which vLLM keeps one number of a kind (a global scale, the scale of static activations): the
    shards of each fused layer, of routed experts the gate and up projection of each.

    >>> sharing_layers(["experts.3.up_proj", "mlp.experts.0.up_proj", "mlp.experts.0.gate_proj"])
    [['experts.3.up_proj'], ['mlp.experts.0.up_proj', 'mlp.experts.0.gate_proj']]
    """
    apart = {name.replace(".experts.", ".expert_"): name for name in linears}  # each is a module of its own
    return [[apart[n] for n in names] for names in fused_layers(apart, kinds).values()]


#: Last parts of the names of heads; and whole names of those that are called by a word which towers have too.
HEADS = ("lm_head", "embed_out")
OWN_HEADS = frozenset({"output", "head"})


def is_head(module: str) -> bool:
    """Whether vLLM builds a module as its output head (`ParallelLMHead`), which is no linear to it; InternLM
    2 calls its own ``output``, DeepSeek V4 ``head``.

    >>> is_head("model.language_model.lm_head")
    True
    """
    return module.rpartition(".")[2] in HEADS or module in OWN_HEADS


#: Model types of whose experts vLLM reads one form alone → that format, and its scheme. gpt-oss: MXFP4 as
#: published (`models/gpt_oss.py::_load_weights_mxfp4`). Its loader has names for others, too, of which none
#: computes right: of weight-only integers the kernel that takes a hidden size of 2880 leaves the biases out
#: (`experts/triton_moe.py::TritonWNA16Experts`; Marlin takes multiples of 128), FP8 is refused with biases
#: (`oracle/fp8.py`), and scales of INT8 get to the first rank alone (`GptOssRoutedExperts`).
ONE_FORM = {"gpt_oss": ("mxfp4", "mxfp4a16")}


def one_form_problem(model_type: str, scheme: Scheme) -> str | None:
    """Why vLLM serves no experts of a family in a scheme, where it reads one form of them alone; or None."""
    form, only = ONE_FORM.get(model_type, ("", scheme.name))
    if scheme.name == only:
        return None
    return (
        f"of model type {model_type!r} vLLM computes quantized experts right as --scheme {only} in --format "
        f"{form} alone (biases are left out or refused elsewhere)"
    )


def form_problem(model_type: str, form: str) -> str | None:
    """Why no file of a family is written in a format that is one family's alone, or None."""
    families = [kind for kind, (name, _) in ONE_FORM.items() if name == form]
    if not families or model_type in families:
        return None
    return (
        f"--format {form} is that of model type {', '.join(families)} alone: use --format compressed-tensors"
    )


def expert_problem(model_type: str, linears: Iterable[Linear], form: str) -> str | None:
    """What vLLM would read wrongly of a mixture's quantized experts, said of one of them; or None."""
    expert = next((x for x in linears if ".experts." in x.name), None)
    wanted = ONE_FORM.get(model_type)
    if expert is None or wanted is None:
        return None
    reason = one_form_problem(model_type, expert.scheme)
    if reason is None and form != wanted[0]:
        reason = f"of model type {model_type!r} vLLM reads quantized experts in --format {wanted[0]} alone"
    return None if reason is None else f"{expert.name}: {reason}"


#: Last path components of what vLLM builds as an embedding; and, besides those, of what has no matrix of
#: features.
_EMBEDDING = re.compile(r"(^|\.)(embed(?!\w*proj)\w*|wte|wpe|\w*_embeddings?)$")
_NORM = re.compile(r"(^|\.)\w*norm\w*$")


def module_class(module: str) -> str:
    """The part of its class's name by which vLLM tells what a module with a matrix is to a config's targets:
    ``Embedding`` (`VocabParallelEmbedding`), ``LMHead`` (`ParallelLMHead`) or ``Linear`` (`LinearBase`);
    empty of a norm.

    >>> module_class("model.embed_tokens"), module_class("model.embed_vision.embedding_projection")
    ('Embedding', 'Linear')
    """
    if is_head(module):
        return "LMHead"
    if _EMBEDDING.search(module):
        return "Embedding"
    return "" if _NORM.search(module) else "Linear"


def is_linear(module: str) -> bool:
    """Whether vLLM builds a module with a matrix as a linear (`LinearBase`): neither as a head nor as an
    embedding or a norm."""
    return module_class(module) == "Linear"


@dataclass(frozen=True)
class _Plain:
    """Linears that vLLM builds in 16 bits whatever a config says, because their class is given no
    quantization.

    Attributes:
        linears: their last path components.
        why: what they are, and where that was read.
        beside: components that their module must have as well.
        inside: that of their module; empty: any.
        widened: those of which the loader reads FP8 blocks all the same, and widens them.
    """

    linears: tuple[str, ...]
    why: str
    beside: tuple[str, ...] = ()
    inside: str = ""
    widened: tuple[str, ...] = ()


_PLAIN = (
    _Plain(
        ("in_proj", "x_proj", "dt_proj", "out_proj"),
        "vLLM's mixer of Mamba 1 takes no quantized projections (layers/mamba/mamba_mixer.py)",
        beside=("x_proj", "dt_proj"),
    ),
    _Plain(
        ("wk", "weights_proj"),
        "the indexer of sparse attention computes its keys and weights in 16 bits (models/deepseek_v2.py)",
        inside="indexer",
        widened=("wk",),
    ),
    _Plain(
        ("wkv", "wgate"),
        "the compressor of sparse attention computes in 16 bits (models/deepseek_v4/compressor.py)",
        inside="compressor",
    ),
    _Plain(
        ("self_attention_res_proj", "mlp_res_proj", "output_attn_res_proj"),
        "residual projections are built in 16 bits (models/kimi_k3)",
    ),
    _Plain(("hc_fn", "hc_head_fn"), "hyper-connections are built in 16 bits (models/hy_v4)"),
    _Plain(
        ("input_mix_weight_up", "input_mix_weight_down", "block_inject_weight"),
        "gated residuals are built in 16 bits (models/qwen4_exp)",
    ),
    _Plain(
        ("gate", "router", "shared_expert_gate", "wg"),
        "routers are built in 16 bits (layers/fused_moe/router/gate_linear.py)",
    ),
    _Plain(
        ("layer", "classifier", "proj", "gate"),
        "routers are built in 16 bits (layers/fused_moe/router/gate_linear.py)",
        inside="router",
    ),
)


#: Model types whose tower and projector are given no quantization by a compressed-tensors config, whatever it
#: lists, and the components by which those are told (`models/kimi_k25.py::_maybe_ignore_quant_config`).
_PLAIN_TOWERS = {"kimi_k25": ("vision_tower", "mm_projector")}
#: Model types whose blocks are mixers of Mamba 1 alone.
_MAMBA1 = frozenset({"mamba", "falcon_mamba"})


def _plain_towers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of a model's tower and projector begin with, where neither is quantized."""
    if source_method(quantization_config(config)) != "compressed-tensors":
        return ()
    return next((_PLAIN_TOWERS[k] for k in model_types(config) if k in _PLAIN_TOWERS), ())


def built_plain(
    linears: Iterable[str], config: Mapping[str, Any], fp8_blocks: bool = False
) -> dict[str, str]:
    """Linears that vLLM builds in 16 bits whatever ``quantization_config`` says, each with the reason: a
    quantized form of them stops the load.

    Args:
        linears: all of a model, or of a module: what stands beside a linear tells what it is.
        config: config.json, whose ``disable_quant_module`` names parts of LongCat's blocks.
        fp8_blocks: they are stored in FP8 with ``weight_scale_inv``, which some loaders widen.
    """
    linears = list(linears)
    modules = _members(linears)
    disabled = stated(config, "disable_quant_module")
    parts = {str(x) for x in disabled} if isinstance(disabled, (list, tuple)) else set()
    towers = _plain_towers(config)
    reasons: dict[str, str] = {}
    for name in linears:
        module, _, last = name.rpartition(".")
        row = next(
            (
                row
                for row in _PLAIN
                if last in row.linears
                and not (fp8_blocks and last in row.widened)
                and row.inside in ("", module.rpartition(".")[2])
                and all(part in modules[module] for part in row.beside)
            ),
            None,
        )
        if row is not None:
            reasons[name] = row.why
        elif named := next((part for part in name.split(".") if part in parts), None):
            reasons[name] = f"config.json has {named!r} in disable_quant_module (models/longcat_flash.py)"
        elif name.split(".")[0] in towers:
            reasons[name] = "of a compressed-tensors file its tower is built in 16 bits (models/kimi_k25.py)"
    return reasons


@dataclass(frozen=True)
class _Asked:
    """Modules of some families that vLLM looks up in a config's lists by another name than the file's: its
    loader renames their weights, and not the names that a config lists.

    Attributes:
        pattern: the file's names; ``name``: what takes their place, as :func:`re.sub` has it.
        model_types: of a config, one of which there must be.
    """

    pattern: re.Pattern[str]
    name: str
    model_types: frozenset[str]


_ASKED = (
    # all that stands outside the blocks is built in a decoder of its own (`models/gemma3n.py`)
    _Asked(
        re.compile(r"^(.*\.)?(per_layer_model_projection|altup_projections\.\d+)$"),
        r"\1self_decoder.\2",
        frozenset({"gemma3n", "gemma3n_text"}),
    ),
    # for compressed-tensors the tower's stored q/k/v go by another name (`models/glm4_1v.py`)
    _Asked(
        re.compile(r"^((?:.*\.)?visual\..*\.attn)\.qkv$"),
        r"\1.qkv_proj",
        frozenset({"glm4v", "glm4v_moe", "glm_ocr", "glm5_next"}),
    ),
    # run by transformers' modules, whose router is no `GateLinear` (`models/transformers/moe.py`)
    _Asked(re.compile(r"^(.*\.)block_sparse_moe\.gate$"), r"\1mlp.router", frozenset({"phimoe"})),
)


def asked_name(module: str, kinds: Collection[str]) -> str:
    """The name by which vLLM looks a module of the file up in a config's lists, as far as it is built alone.

    >>> asked_name("model.language_model.altup_projections.0", ("gemma3n_text", "gemma3n"))
    'model.language_model.self_decoder.altup_projections.0'
    """
    rows = (row for row in _ASKED if not row.model_types.isdisjoint(kinds))
    return next((row.pattern.sub(row.name, module) for row in rows if row.pattern.match(module)), module)


@dataclass(frozen=True)
class _Reordered:
    """Linears whose outputs a model's loader puts into another order, tensor by tensor as they are read.

    Attributes:
        linears: their last path components.
        model_types: of a config, one of which there must be.
        every: every tensor is reordered, so that each must have outputs for its first dimension. Otherwise
            those named ``weight``, ``weight_packed`` and ``weight_scale`` are, and no other may have outputs.
    """

    linears: tuple[str, ...]
    model_types: frozenset[str]
    every: bool

    def bears(self, scheme: Scheme, form: str) -> bool:
        """Whether the tensors of a scheme in a format come out in the right order."""
        weights = scheme.weights
        if form in ("gptq", "awq") or weights.strategy == "block":
            return False  # inputs come first, or blocks of outputs
        if self.every:  # neither numbers of the whole tensor nor `weight_shape`
            whole = weights.strategy in ("tensor", "tensor_group")
            return not whole and (weights.type == "float" or scheme.activations is not None)
        return weights.symmetric


_REORDERED = (
    # `models/bloom.py::_repack_qkv`
    _Reordered(("query_key_value",), frozenset({"bloom"}), every=True),
    # `models/llama4.py::permute_qk_weight_for_rotary`
    _Reordered(("q_proj", "k_proj"), frozenset({"llama4", "llama4_text"}), every=False),
)


def reordered(linear: str, scheme: Scheme, form: str, kinds: Collection[str]) -> bool:
    """Whether a model's loader reorders the outputs of a linear in a way that its quantized form does not
    bear: the load fails, or some of the tensors keep the old order without a word.

    Args:
        linear: its name, or the last path component.
        form: name of the format that holds it.
        kinds: the model types of the config and its parts.
    """
    last = linear.rpartition(".")[2]
    rows = (r for r in _REORDERED if last in r.linears and not r.model_types.isdisjoint(kinds))
    return any(not row.bears(scheme, form) for row in rows)


def family_problem(kinds: Collection[str], scheme: Scheme) -> str | None:
    """Why vLLM cannot serve a scheme of any model of a family in compressed-tensors, as far as its model
    types tell, or None."""
    if not _MAMBA1.isdisjoint(kinds):
        return f"vLLM builds every linear of model type {min(_MAMBA1.intersection(kinds))!r} in 16 bits"
    for row in _REORDERED:
        if not row.model_types.isdisjoint(kinds) and not row.bears(scheme, "compressed-tensors"):
            return (
                f"vLLM's loader of model type {min(row.model_types.intersection(kinds))!r} reorders the "
                f"outputs of {' and '.join(row.linears)}, which {scheme.name} does not bear"
            )
    return None


#: Model types whose class gives no shards for a fused layer of its tower, so that a config's lists must have
#: the fused layer's own name.
_UNRESOLVED = (
    (frozenset({"glm4v", "glm_ocr"}), re.compile(r"(^|.*\.)visual\..*\.(gate_up_proj|qkv_proj)$")),
)


@dataclass(frozen=True)
class BuiltLayer:
    """A layer that vLLM builds so that it may be quantized.

    Attributes:
        linears: those of the file that become it, quantized or not.
        by_name: vLLM compares a config's lists with the layer's own name alone, never with those of the file.
    """

    linears: tuple[str, ...]
    by_name: bool = False


def built_layers(linears: Iterable[str], config: Mapping[str, Any]) -> dict[str, BuiltLayer]:
    """The layers that vLLM builds so that they may be quantized, by the names under which it looks them up.

    Args:
        linears: of a whole model: what stands beside a linear tells what it is.

    >>> config = {"model_type": "gemma3n_text"}
    >>> built_layers(["model.per_layer_model_projection", "model.layers.0.mlp.gate"], config)
    {'model.self_decoder.per_layer_model_projection': \
BuiltLayer(linears=('model.per_layer_model_projection',), by_name=True)}
    """
    linears = list(linears)
    kinds, plain = model_types(config), built_plain(linears, config)
    # a router that has another name in vLLM is no gate, but a linear like others
    plain = {n: why for n, why in plain.items() if asked_name(n, kinds) == n}
    built = {}
    for fused, shards in fused_layers((n for n in linears if n not in plain), kinds).items():
        name = asked_name(fused, kinds) if shards == [fused] else fused
        unresolved = any(not types.isdisjoint(kinds) and row.match(name) for types, row in _UNRESOLVED)
        built[name] = BuiltLayer(tuple(shards), name != fused or (unresolved and shards != [fused]))
    return built


#: Path components that many parts of a model share, so that none of them tells one part from another.
_SHARED_ROOTS = frozenset({
    "model", "base_model", "language_model", "text_model", "llm", "thinker", "transformer", "backbone",
    "decoder",
})  # fmt: skip


#: Fused layers of decoder blocks that vLLM knows the shards of in every family, so that those are enough.
_RESOLVED = frozenset({"qkv_proj", "gate_up_proj", "fused_qkv_a_proj", "experts"})


def ignored_names(
    unquantized: Sequence[str],
    quantized: Collection[str],
    kinds: Collection[str] = (),
    patterns: bool = False,
) -> list[str]:
    """What a config must list so that vLLM builds these linears in 16 bits: their names, those by which vLLM
    asks for them, those of the layers that it fuses of them.

    Args:
        unquantized: linears of the file, of any part of the model.
        quantized: those that are quantized.
        patterns: add a regular expression (``re:``, as compressed-tensors has them) for each part of the
            model outside the decoder's blocks. Towers, projectors and prediction heads stay in 16 bits as a
            whole, and their classes rename and fuse as each likes.

    >>> ignored_names(["a.visual.qkv"], ["a.layers.0.q_proj"], patterns=True)[1]
    're:(.*\\\\.)?visual(\\\\..*)?$'
    """
    lists = _lists(quantized)
    names: dict[str, None] = dict.fromkeys(unquantized)
    names |= dict.fromkeys(asked_name(name, kinds) for name in unquantized)
    for fused, shards in fused_layers([*unquantized, *quantized], kinds).items():
        resolved = fused.rpartition(".")[2] in _RESOLVED and _root(fused, lists) is None
        if len(shards) > 1 and not resolved and not any(s in quantized for s in shards):
            names[fused] = None
    if patterns and not RENAMED_PROJECTIONS.keys().isdisjoint(kinds):
        heads = dict.fromkeys(n.split(".experts.")[0] for n in unquantized if ".experts." in n)
        names |= {rf"re:{re.escape(head)}\.experts\.\d+\.(gate|up|down)_proj$": None for head in heads}
    if patterns:
        taken = {*quantized, *fused_layers(quantized, kinds)}
        for root in dict.fromkeys(r for n in unquantized if (r := _root(n, lists)) is not None):
            pattern = rf"(.*\.)?{re.escape(root)}(\..*)?$"
            if not any(re.match(pattern, name) for name in taken):
                names[f"re:{pattern}"] = None
    return [name for name in names if name not in quantized]


def _lists(quantized: Iterable[str]) -> set[tuple[str, ...]]:
    """The path components of the lists of blocks that linears are in."""
    return {tuple(x.split(".")) for x in {re.split(r"\.\d+\.", name, maxsplit=1)[0] for name in quantized}}


def _root(module: str, lists: Collection[tuple[str, ...]]) -> str | None:
    """The path component by which a module's part of the model differs from the decoder's blocks, which are
    in ``lists``; None of a module inside them, and of a head."""
    path = tuple(module.split("."))
    if is_head(module) or any(path[: len(x)] == x for x in lists):
        return None
    shared = max((_shared(path, x) for x in lists), default=0)
    return next((part for part in path[shared:] if part not in _SHARED_ROOTS and not part.isdigit()), None)


def _shared(path: Sequence[str], other: Sequence[str]) -> int:
    """How many components two paths begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), len(other))


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
            "embeddings", *HEADS,
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
    module = name.removesuffix(".weight")
    parts = module.split(".")
    if parts[-1] == "output" or is_head(module):
        return "vocab"
    return next((_SPLITS[part] for p in reversed(parts) if (part := _SUFFIX.sub("", p)) in _SPLITS), "none")


#: Linears that the file already stores as one, which vLLM takes apart: queries, keys and values; gate and up.
_STORED_QKV = frozenset({"qkv_proj", "query_key_value", "Wqkv", "wqkv", "W_pack", "c_attn"})
_STORED_PAIRS = frozenset({"gate_up_proj", "input_linear"})
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


def _shards(linear: Linear, ranks: int, heads: Heads | None, followed: bool) -> list[_Shard]:
    """What vLLM makes of a linear's outputs; ``followed``: it is a shard of a layer that another follows."""
    last, kv = linear.name.rpartition(".")[2], min(ranks, heads.kv) if heads else ranks
    if last in _STORED_QKV and heads and linear.n % (heads.attention + 2 * heads.kv) == 0:
        width = linear.n // (heads.attention + 2 * heads.kv)
        keys = width * heads.kv
        return [_Shard(width * heads.attention, ranks, True), _Shard(keys, kv, True), _Shard(keys, kv, False)]
    if last in _STORED_PAIRS and linear.n % 2 == 0:
        return [_Shard(linear.n // 2, ranks, True), _Shard(linear.n // 2, ranks, False)]
    pieces = {"column": ranks, "kv": kv}.get(split_of(linear.name), 1)
    return [_Shard(linear.n, pieces, followed)]


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
    for shard in _shards(linear, ranks, heads, followed=False):
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
    modules = _members(linear.name for linear in linears)
    seen: dict[str, str] = {}
    judged = set()
    for linear in linears:
        kind = re.sub(r"\.\d+(?=\.)", ".*", linear.name)
        followed = _followed(linear.name, modules[linear.name.rpartition(".")[0]])
        key = (kind, linear.n, linear.k, linear.weights, followed)
        if kind in seen or key in judged:
            continue
        judged.add(key)
        if problem := _shape_problem(linear, ranks, heads, followed):
            seen[kind] = f"{kind}: {problem}"
    return problems + list(seen.values())


def _followed(linear: str, beside: Collection[str]) -> bool:
    """Whether another shard follows a linear in the layer that vLLM makes of both."""
    last = linear.rpartition(".")[2]
    row = _fusion(last, beside, ())
    return row is not None and any(s in beside for s in row.shards[row.shards.index(last) + 1 :])


def _shape_problem(linear: Linear, ranks: int, heads: Heads | None, followed: bool) -> str | None:
    """:func:`shape_problems` of one linear; ``followed``: as for :func:`_shards`."""
    g, block = linear.weights.group_size, linear.weights.strategy == "block"
    ignore = f"--ignore '{linear.name.rpartition('.')[2]}'"
    # of blocks too: the file may have a ragged last one, but vLLM's kernels quantize activations in whole
    # groups
    if g != -1 and linear.k % g:
        if linear.weights.type == "float":
            use = "--scheme w8a8-fp8"
        else:
            cut = ranks if split_of(linear.name) == "row" and linear.k % ranks == 0 else 1
            fits = [x for x in GROUP_SIZES[:0:-1] if linear.k // cut % x == 0 and x < g]
            use = f"--group-size {fits[0]} or -1" if fits else "--group-size -1"
        return f"{linear.k} inputs do not divide into groups of {g}: quantize with {use}, or {ignore}"
    ragged = next((s for s in _shards(linear, 1, heads, followed) if s.followed and s.outputs % BLOCK), None)
    if block and ragged:
        return (
            f"{ragged.outputs} outputs do not divide into blocks of {BLOCK}, which vLLM demands of all "
            f"shards of a fused layer but the last: quantize with --scheme w8a8-fp8, or {ignore}"
        )
    uncut = _uncut(linear, ranks, heads)
    if uncut is None:
        return None
    allowed = [t for t in DEGREES if not _uncut(linear, t, heads)]
    grouped = linear.weights.type == "int" and g != -1 and split_of(linear.name) == "row"
    smaller = [x for x in GROUP_SIZES[:0:-1] if grouped and x < g and linear.k % (ranks * x) == 0]
    return (
        f"{uncut[0]} over --tensor-parallel {ranks} do not divide{uncut[1]}: {_sizes(allowed)}"
        f"{f'; or quantize with --group-size {smaller[0]}' if smaller else ''}"
    )


def layer_shapes(
    linears: Iterable[Linear], kinds: Collection[str] = ()
) -> Iterator[tuple[str, Linear, int, int]]:
    """The layers that vLLM builds of linears, routed experts aside: name, one of its linears, outputs of all
    together, inputs."""
    by_name = {x.name: x for x in linears if ".experts." not in x.name}
    for name, members in fused_layers(by_name, kinds).items():
        first = by_name[members[0]]
        yield name, first, sum(by_name[m].n for m in members), first.k


def _sizes(allowed: list[int]) -> str:
    return f"tensor parallel sizes that do: {', '.join(map(str, allowed)) or 'none'}"
