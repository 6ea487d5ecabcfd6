"""Biases and norms in the blocks of a family, compared with a file's. No torch.

A vector for which the model of a config has no parameter is passed over by some engines and stops others, and
one that the file lacks stays as it was allocated: in both cases a model answers that is not the one that was
trained. Which vectors a family has, and which switch of its config brings them, is in ``block_names.json``
(``docs/make_names.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from quant.checkpoint.header import TensorInfo
from quant.data import load_json
from quant.models.naming import TABLE, family_of
from quant.models.place import decoder_list
from quant.models.roles import ADAPTER, block_list, kind_of
from quant.vllm.config import model_types, parts, stated, whole_number
from quant.vllm.names import passed_over_bias

#: Shapes of a block's tensors by their names in it.
Block = Mapping[str, tuple[int, ...]]
#: Keys of a config that give linears biases.
_BIAS = re.compile(r"bias")
#: Vectors that belong to codes of one format or another, whatever the family.
_OF_CODES = re.compile(r"scale|zero|g_idx|absmax|quant|amax|shape")


def vectors_of(config: Mapping[str, Any], kind: str) -> tuple[dict[str, str], dict[str, str]]:
    """Vectors that blocks of a family have under a config → which places have them (every ``block``, every
    block with the matrix beside it, ``linear``, or ``some``); and those that they would have under another →
    the switch that says no, with what it says.

    >>> have, could = vectors_of({"model_type": "llama", "mlp_bias": False, "attention_bias": True}, "llama")
    >>> have["self_attn.q_proj.bias"], could["mlp.up_proj.bias"]
    ('linear', 'mlp_bias false')
    """
    row = load_json(TABLE)[kind]
    have, could = dict(row.get("vectors", {})), {}
    for key, switch in row.get("switched", {}).items():
        value = stated(config, key)
        value = value if isinstance(value, bool) else switch["default"]
        for name in switch[str(not value).lower()]:
            have.pop(name, None)
            could[name] = f"{key} {str(value).lower()}"
        have |= switch[str(value).lower()]
    return have, {n: why for n, why in could.items() if n not in have}


def vector_problems(
    blocks: Mapping[int, Block],
    config: Mapping[str, Any],
    decoder: str,
    coded: Collection[str] = (),
    is_zero: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, str]]:
    """Vectors of a file for which the model of its config has no parameter, and those that it lacks; each as
    a key that others of its kind have too, and a line.

    Args:
        blocks: by index, shapes by the names inside the block, quantized linears among them as weights;
            without those that predict further tokens.
        decoder: what stands before an index.
        coded: modules whose weights are in a form that is not read here.
        is_zero: whether a tensor of the file holds nothing but zeros, which change no output: files of GPTQ
            have such biases beside every linear. None: that cannot be told, and no vector is too many.
    """
    kind = family_of(config)
    if kind is None or "vectors" not in load_json(TABLE)[kind]:
        return
    have, _ = vectors_of(config, kind)
    if is_zero is not None:
        yield from _too_many(blocks, config, decoder, kind, is_zero)
    unknown = False in _other_switches(config, kind)
    # the last layers read the keys and values of an earlier one (Gemma 3n and 4) and make none
    sharing = max(blocks, default=-1) + 1 - (whole_number(stated(config, "num_kv_shared_layers")) or 0)
    for index, block in blocks.items():
        names = {_local(n): n for n in block}
        for name, places in have.items():
            module, _, last = name.rpartition(".")
            if name in names or places == "some" or last not in ("weight", "bias"):
                continue
            if index >= sharing and module.rpartition(".")[2].startswith(("k_", "v_")):
                continue
            if places == "linear":
                matrix = names.get(f"{module}.weight", "").removesuffix(".weight")
                if not matrix or unknown or f"{decoder}{index}.{matrix}" in coded:
                    continue
            else:
                above = _owner(module, load_json(TABLE)[kind]["names"])
                # a block of another kind, or without this part, as most of GLM-5.2's have no indexer; or it
                # may be there under another name
                if not any(n.startswith(above) for n in names) or not any(
                    name in map(_local, other) for other in blocks.values()
                ):
                    continue
            yield (
                f"vector {name}",
                f"{decoder}{index}.{name} is not in the file, and model_type {kind!r} has it"
                f"{_switch(config, kind, name)}: engines would leave it as they allocate it: fetch the "
                "missing tensor, or repair config.json",
            )


def _other_switches(config: Mapping[str, Any], kind: str) -> set[bool]:
    """What a config states of biases under keys that transformers' class of the family has not, as vLLM's
    Llama reads ``qkv_bias``."""
    known = load_json(TABLE)[kind].get("switched", {})
    return {
        value
        for part in parts(config)
        for key, value in part.items()
        if isinstance(value, bool) and _BIAS.search(key) and key not in known
    }


def _too_many(
    blocks: Mapping[int, Block],
    config: Mapping[str, Any],
    decoder: str,
    kind: str,
    is_zero: Callable[[str], bool],
) -> Iterator[tuple[str, str]]:
    row = load_json(TABLE)[kind]
    have, could = vectors_of(config, kind)
    given, unknown = set(row["parts"]), True in _other_switches(config, kind)
    matrices = {n.removesuffix(".weight") for n in row["names"]}
    modules = {n.rpartition(".")[0] for n in (*row["vectors"], *could)}
    found: set[str] = set()
    for index, block in blocks.items():
        for name, shape in block.items():
            local = _local(name)
            module, _, last = local.rpartition(".")
            if len(shape) != 1 or local in have or local in found or last not in ("weight", "bias"):
                continue
            if _OF_CODES.search(local) or ADAPTER.search(name):
                continue
            if module in matrices:
                if last != "bias" or unknown:
                    continue
            # other values of the config may bring a norm that the source of the family names
            elif local in could or given.issuperset(p for p in module.split(".") if not p.isdigit()):
                if last == "weight" or local in could or module not in modules:
                    continue
            elif last == "bias":
                continue  # what is wrong with its matrix's name is said of that
            if is_zero(f"{decoder}{index}.{name}"):
                continue
            found.add(local)
            advice = f" ({could[local]} in config.json): set it" if local in could else ": repair config.json"
            yield (
                f"vector {module}",
                f"{decoder}{index}.{name} holds numbers other than zero, and a block of model_type {kind!r} "
                f"has no such parameter{advice} if the model was trained with it, or remove the tensor: "
                "engines pass it over or stop at it",
            )


def lost_bias(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], is_zero: Callable[[str], bool]
) -> str | None:
    """:func:`~quant.vllm.names.passed_over_bias` of the blocks of a text decoder: towers have classes of
    their own."""
    decoder = decoder_list(tensors.values(), config)
    inside = (n for n in tensors if n.endswith(".bias") and block_list(n) == decoder)
    return passed_over_bias(model_types(config), inside, is_zero)


def _owner(module: str, names: Collection[str]) -> str:
    """What names of the part of a block begin with that a vector's module belongs to: the innermost one that
    has ``names`` of weights; empty of the block itself.

    >>> weights = ["self_attn.q_proj.weight", "self_attn.indexer.wk.weight"]
    >>> _owner("self_attn.indexer.k_norm", weights), _owner("self_attn.norms.0", weights)
    ('self_attn.indexer.', 'self_attn.')
    """
    while module := module.rpartition(".")[0]:
        if any(n.startswith(f"{module}.") for n in names):
            return f"{module}."
    return ""


def _local(name: str) -> str:
    """A name in a block with 0 for every number, as the table has it."""
    return kind_of(f"layers.0.{name}").removeprefix("layers.0.").replace(".base_layer.", ".")


def _switch(config: Mapping[str, Any], kind: str, name: str) -> str:
    """The switch that gives a block a vector, in parentheses; empty where it always has it."""
    for key, switch in load_json(TABLE)[kind].get("switched", {}).items():
        value = next((v for v in ("true", "false") if name in switch[v]), None)
        if value is not None:
            return f" ({key} {value})"
    return ""
