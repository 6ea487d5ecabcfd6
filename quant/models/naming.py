"""What the matrices in the blocks of a family are called, compared with a file's. No torch.

Engines look for the names of the family that config.json states. Under other names a weight stays as it was
allocated, or the load stops. What a family calls them is in ``block_names.json``, which
``docs/make_names.py`` makes of transformers' classes: the matrices of a default config's blocks, as they are
in memory and as they are saved, and every attribute that the source of the blocks gives, of which other
configs make names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from quant.data import load_json
from quant.models.linears import expert_layout
from quant.models.roles import ADAPTER, NUMBERS, kind_of, role_of
from quant.vllm.architectures import has_class
from quant.vllm.config import parts, stated
from quant.vllm.layers import FUSIONS

#: The table: model type of a text decoder → local names of its blocks' matrices, 0 for every number.
TABLE = "block_names.json"
#: Roles of the matrices whose names are judged.
_JUDGED = ("attention", "mlp", "experts", "shared_experts", "router")
#: Model types whose config may ask for another family's blocks → the key that does, with its value, and that
#: family (DeepSeek-VL2 and DeepSeek-OCR: no latent attention).
_ASKED = {"deepseek_v2": ("use_mla", False, "deepseek_ocr2_text")}
#: Families that a message names before it says "…".
_NAMED = 3


def family_of(config: Mapping[str, Any]) -> str | None:
    """The model type of a config's text decoder; None where the table has no such family, or where engines
    run a class of the model's own (``auto_map``)."""
    if "auto_map" in config and not has_class(config):
        return None
    table = load_json(TABLE)
    kinds = (p.get("model_type") for p in parts(config))
    kind = next((k for k in kinds if isinstance(k, str) and k in table), None)
    if kind in _ASKED:
        key, value, other = _ASKED[kind]
        return other if stated(config, key) is value else kind
    return kind


def family_names(config: Mapping[str, Any], kind: str) -> frozenset[str]:
    """Names that a matrix in the blocks of a family may have: those of transformers, of what vLLM fuses, of
    experts that are taken apart.

    >>> "mlp.experts.0.gate_proj.weight" in family_names({"model_type": "qwen3_moe"}, "qwen3_moe")
    True
    """
    stated = load_json(TABLE)[kind]["names"]
    names = set(stated)
    for name in stated:
        module, _, last = name.removesuffix(".weight").rpartition(".")
        beside = {n.removesuffix(".weight").rpartition(".")[2] for n in names if n.startswith(f"{module}.")}
        names |= {
            f"{module}.{row.name}.weight"
            for row in FUSIONS
            if last in row.shards and beside.issuperset(row.beside) and len(beside & set(row.shards)) > 1
        }
    layout = expert_layout(config)
    for name in stated:
        module, _, last = name.removesuffix(".weight").rpartition(".")
        if module.endswith(layout.container[0]) and last in layout.tensors:
            numbered = module.removesuffix(layout.container[0]) + layout.container[1]
            names |= {f"{numbered}.0.{layout.names[p]}.weight" for p in layout.tensors[last]}
    return frozenset(names)


def name_problems(
    blocks: Mapping[int, Mapping[str, tuple[int, ...]]], config: Mapping[str, Any], decoder: str
) -> Iterator[tuple[str, str]]:
    """Matrices under names that the family of a config has not, and those that are in a file twice; each as a
    key that others of its kind have too, and a line.

    Args:
        blocks: by index, shapes by the names inside the block, quantized linears among them as weights.
        decoder: what stands before an index.
    """
    for index, shapes in blocks.items():
        names = {n for n, shape in shapes.items() if len(shape) > 1}
        yield from ((key, f"{decoder}{index}.{line}") for key, line in _twice(names, config))
    if (kind := family_of(config)) is None:
        return
    allowed, given = family_names(config, kind), set(load_json(TABLE)[kind]["parts"])
    strange: dict[str, tuple[int, str]] = {}
    for index, shapes in blocks.items():
        for name, shape in shapes.items():
            # a matrix that an adapter lies beside is the family's own
            local = kind_of(f"layers.0.{name}").removeprefix("layers.0.").replace(".base_layer.", ".")
            last = name.removesuffix(".weight").rpartition(".")[2]
            judged = len(shape) > 1 and not NUMBERS.search(last) and not ADAPTER.search(name)
            made = given.issuperset(p for p in local.removesuffix(".weight").split(".") if not p.isdigit())
            if judged and not made and local not in allowed and role_of(f"layers.0.{name}") in _JUDGED:
                strange.setdefault(local, (index, name))
    others = {local: _families(local) for local in strange}
    for local, (index, name) in strange.items():
        theirs = others[local]
        have = f", which {_listed(theirs)} have" if theirs else ""
        own = sorted(
            n
            for n in load_json(TABLE)[kind]["names"]
            if role_of(f"layers.0.{n}") == role_of(f"layers.0.{name}")
        )
        yield (
            # of one module one line
            f"name {local.rpartition('.')[0].rpartition('.')[0]}",
            f"{decoder}{index}.{name}: no matrix in a block of model_type {kind!r} has that name{have}"
            f"{f' (its own: {_listed(own)})' if own else ''}: config.json and the file belong to different "
            "models: set model_type and architectures to the model's own, or fetch its own file",
        )


def _twice(names: Collection[str], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Matrices that a block has by themselves and in a fused one."""
    modules: dict[str, set[str]] = {}
    for name in names:
        module, _, last = name.removesuffix(".weight").rpartition(".")
        modules.setdefault(module, set()).add(last)
    for module, lasts in modules.items():
        for row in FUSIONS:
            shards = [s for s in row.shards if s in lasts]
            if row.name in lasts and shards:
                yield (
                    f"twice {row.name}",
                    f"{module}.{row.name} is in the file beside {module}.{shards[0]}, which it holds too: "
                    "engines read whichever comes last: keep one of them",
                )
    layout = expert_layout(config)
    for module, lasts in modules.items():
        if not module.endswith(layout.container[0]):
            continue
        numbered = module.removesuffix(layout.container[0]) + layout.container[1]
        for last in sorted(lasts & set(layout.tensors)):
            alone = [
                f"{numbered}.0.{layout.names[p]}" for p in layout.tensors[last]
                if layout.names[p] in modules.get(f"{numbered}.0", ())
            ]  # fmt: skip
            if alone:
                yield (
                    f"twice {last}",
                    f"{module}.{last} holds all experts of the layer, and {alone[0]} is in the file by "
                    "itself: engines read whichever comes last: keep one of them",
                )


def _families(local: str) -> list[str]:
    """The model types of which a block has a matrix of that name."""
    return sorted(kind for kind, row in load_json(TABLE).items() if local in row["names"])


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:_NAMED]) + (", …" if len(words) > _NAMED else "")
