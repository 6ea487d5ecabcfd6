"""What config.json implies of a file's tensors: names, shapes and counts, compared with its headers.

Engines build a model from config.json and fill it from the file. Where the two belong to different models,
some refuse and some fill what fits: a quantized model with a block, a head or half its KV heads left as they
were allocated answers with noise. Judged are facts that a config states whatever the family (rows of the
embedding and the head, blocks, experts, heads), and of families that have a row every linear of every block.
No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quant.checkpoint.header import FLOATS, TensorInfo
from quant.errors import UsageError, clipped
from quant.models.decoder import Decoder
from quant.models.families import FAMILIES, WRAPPERS, Family
from quant.models.naming import name_problems
from quant.models.place import decoder_list
from quant.models.roles import EXPERT, block_list, block_of, leftover, role_of
from quant.models.shapes import SHARED_EXPERTS, decoder_weights
from quant.models.vectors import vector_problems
from quant.vllm.config import (
    HEAD_SIZES,
    HEADER_DTYPES,
    KEYS,
    KV_HEADS,
    TORCH_DTYPES,
    block_count,
    heads_of,
    parts,
    stated,
    text_path,
    whole_number,
)
from quant.vllm.layers import Linear, is_head

#: What programs that train or compile a model put before or into the names of its parameters.
_PREFIXES = {
    "module": "DistributedDataParallel and DeepSpeed",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
#: Last part of the module that holds the rows of tokens.
_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings", "embedding"}
)
#: Ends of the names of classes that end in a head over the vocabulary.
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
#: Tensors of a block that predicts further tokens.
_DRAFTING = re.compile(r"(^|\.)(eh_proj|enorm|hnorm|shared_head|embed_tokens)(\.|$)")
#: What to do where the two differ.
ANEW = "config.json and the file do not match one to one: fetch both again, or repair config.json"


@dataclass(frozen=True)
class _File:
    """A file beside its config.

    Attributes:
        shapes: of every float by its name, of quantized linears those of the weights that they stand for.
        infos: headers of the tensors that are not parts of quantized linears, codes of a format that is not
            read here among them.
        config: config.json.
        decoder: what stands before the number of a block of the decoder, as :func:`decoder_list` has it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    infos: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    decoder: str | None

    @cached_property
    def wrapper(self) -> bool:
        """Whether the text decoder is a part of a model of several."""
        other = any(k.endswith(("vision_config", "audio_config")) for p in parts(self.config) for k in p)
        return bool(text_path(self.config)) or other

    @cached_property
    def family(self) -> tuple[Family, bool]:
        """The row of the family, and whether it has one."""
        kind = str(stated(self.config, "model_type"))
        name = WRAPPERS.get(kind, kind)
        return FAMILIES.get(name, Family()), name in FAMILIES

    @cached_property
    def blocks(self) -> dict[int, dict[str, tuple[int, ...]]]:
        """By block of the decoder, shapes by the names inside it."""
        blocks: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.shapes.items():
            if self.decoder is not None and block_list(name) == self.decoder:
                index = block_of(name)
                assert index is not None
                blocks.setdefault(index, {})[name.removeprefix(f"{self.decoder}{index}.")] = shape
        return dict(sorted(blocks.items()))

    @cached_property
    def apart(self) -> set[int]:
        """Blocks that the config gives numbers of their own."""
        own = stated(self.config, "per_layer_config")
        return {int(k) for k in own if str(k).isdigit()} if isinstance(own, Mapping) else set()

    def all_stated(self, key: str) -> set[int]:
        """Every whole number that any part of the config states under a key."""
        return {n for p in parts(self.config) if (n := whole_number(p.get(key))) is not None}


def implied_problems(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    linears: Mapping[str, Linear] | None = None,
    stacks: Mapping[str, tuple[tuple[int, ...], Collection[str]]] | None = None,
    is_zero: Callable[[str], bool] | None = None,
) -> list[str]:
    """What a file has otherwise than its config.json implies, a line for each kind of difference, naming a
    tensor, its shape and what the config says; empty where they agree.

    Args:
        tensors: headers of the file.
        linears: its quantized linears, by name.
        stacks: its tensors of all experts of a layer that are quantized, by the names that they have in an
            ordinary file: the shape there, and the tensors that they are made of.
        is_zero: whether a tensor holds nothing but zeros; None where values cannot be read.
    """
    quantized, held = linears or {}, stacks or {}
    parts_of_stacks = {n for _, made_of in held.values() for n in made_of}
    infos = {
        n: i
        for n, i in tensors.items()
        if not (_part_of(n, quantized) or n in parts_of_stacks or leftover(i))
    }
    shapes = {n: i.shape for n, i in infos.items() if i.dtype in FLOATS}
    shapes |= {f"{n}.weight": (x.n, x.k) for n, x in quantized.items()}
    shapes |= {n: shape for n, (shape, _) in held.items()}
    if wrapped := _wrapped(tensors):
        return [wrapped]  # every other name would be wrong by it
    if stated(config, "is_encoder_decoder"):
        return []  # two stacks, of which the config states one
    file = _File(shapes, infos, config, decoder_list(tensors.values(), config))
    if file.decoder is None:
        return []
    problems = [
        *_dtype_problems(file),
        *_place_problems(file),
        *_table_problems(file),
        *_count_problems(file),
        *_expert_problems(file),
    ]
    if named := list(one_of_each(name_problems(file.blocks, config, file.decoder))):
        return [*problems, *named]  # what is missing and of what shape is a question of names
    known = list(_known_problems(file))
    problems += known or [*_size_problems(file), *_lost_problems(file)]
    return problems or list(_vector_problems(file, is_zero))


def _part_of(name: str, linears: Mapping[str, Linear]) -> bool:
    """Whether a tensor is a part of a quantized linear; its bias is none."""
    module, _, last = name.rpartition(".")
    return module in linears and last != "bias"


def one_of_each(keyed: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Lines, of those with one key the first with the number of the others."""
    lines: dict[str, list[str]] = {}
    for key, line in keyed:
        lines.setdefault(key, []).append(line)
    for same in lines.values():
        yield f"{same[0]}{f' (and {len(same) - 1} more like it)' if len(same) > 1 else ''}"


def _wrapped(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What a program that wrapped the model left in the names of its tensors."""
    for name in tensors:
        pieces = name.split(".")
        word = next((p for i, p in enumerate(pieces) if p in _PREFIXES and (p != "module" or i == 0)), None)
        if word is not None:
            good = ".".join(p for p in pieces if p != word)
            return (
                f"{name}: {word!r} in its name was put there by {_PREFIXES[word]}, and no engine looks for "
                f"it: save the model itself (the tensor is then {good})"
            )
    return None


def _dtype_problems(file: _File) -> Iterator[str]:
    """A dtype that torch has not, where transformers looks it up, or that no engine computes in."""
    stated_names = {
        p[k]: k for p in parts(file.config) for k in ("dtype", "torch_dtype") if isinstance(p.get(k), str)
    }
    for name, key in stated_names.items():
        if TORCH_DTYPES.fullmatch(name):
            continue
        sizes = dict.fromkeys(HEADER_DTYPES, 0)
        for own, header in HEADER_DTYPES.items():
            sizes[own] = sum(i.numel for i in file.infos.values() if i.dtype == header)
        most = max(sizes, key=lambda n: sizes[n])
        yield (
            f"{key} is {clipped(name)} in config.json, which is no dtype that engines run a model in: set "
            f"it to {most}{', which most weights are stored in' if sizes[most] else ''}"
        )


def _place_problems(file: _File) -> Iterator[str]:
    """The list of blocks under a name under which no engine looks for it."""
    family, known = file.family
    if known and not file.wrapper and file.decoder not in family.lists:
        yield (
            f"the blocks are named {file.decoder}0.…, those of a {stated(file.config, 'model_type')} model "
            f"{family.lists[0]}0.…: rename the tensors, or give config.json the wrapper that they belong to"
        )


def _near(names: Iterable[str], decoder: str) -> str | None:
    """Of several names the one that lies nearest to the decoder's blocks; None where none is beside them or
    above."""
    above = decoder.removesuffix(".").split(".")[:-1]

    def shared(name: str) -> int:
        pieces = name.split(".")
        return next((i for i, x in enumerate(above) if i >= len(pieces) or pieces[i] != x), len(above))

    fitting = [n for n in names if shared(n) or n.count(".") < 2]
    return max(fitting, key=lambda n: (shared(n), -len(n)), default=None)


def _table_problems(file: _File) -> Iterator[str]:
    """Rows and columns of the embedding and of the head, and a head that should be there."""
    assert file.decoder is not None
    family, _ = file.family
    rows = {n + e for n in (file.all_stated("vocab_size")) for e in (0, family.extra_rows)}
    rows |= file.all_stated("padded_vocab_size")
    widths = {
        n
        for k in (*KEYS["hidden_size"], "word_embed_proj_dim", "embedding_size", "emb_dim")
        for n in file.all_stated(k)
    }
    matrices = [n.removesuffix(".weight") for n, s in file.shapes.items() if len(s) == 2 and ".weight" in n]
    outside = [n for n in matrices if block_list(n) is None]
    tables = {
        "the embedding": _near((n for n in outside if n.rpartition(".")[2] in _EMBEDDINGS), file.decoder),
        "the head": _near((n for n in outside if is_head(n) or n.endswith("output_layer")), file.decoder),
    }
    for what, module in tables.items():
        if module is None:
            continue
        name = f"{module}.weight"
        shape = file.shapes[name]
        if rows and shape[0] not in rows:
            yield (
                f"{name} is {list(shape)} in the file, and {what} of a vocab_size of {_any(rows)} has as "
                f"many rows: {ANEW}"
            )
        if widths and shape[1] not in widths:
            yield (
                f"{name} is {list(shape)} in the file, and {what} of a hidden_size of {_any(widths)} has as "
                f"many columns: {ANEW}"
            )
    headless = tables["the head"] is None and not any(
        is_head(n.rpartition(".")[0]) or ".output_layer." in n for n in file.infos if not n.endswith(".bias")
    )
    if headless and tables["the embedding"] is not None and _untied(file):
        yield (
            "the file has no head (lm_head.weight), and config.json says that it is not the embedding "
            "(tie_word_embeddings false): fetch the missing tensor, or set tie_word_embeddings to true if "
            "the model was trained so"
        )


def _any(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _untied(file: _File) -> bool:
    """Whether the config demands a head of its own: it says so in some part and nowhere otherwise, and its
    class ends in one."""
    said = [p["tie_word_embeddings"] for p in parts(file.config) if "tie_word_embeddings" in p]
    text_part = next(parts(file.config))
    if file.family[0].tied and "tie_word_embeddings" not in text_part:
        return False
    classes = [a for p in parts(file.config) for a in p.get("architectures") or [] if isinstance(a, str)]
    return bool(said) and not any(said) and any(a.endswith(_WITH_HEAD) for a in classes)


def _count_problems(file: _File) -> Iterator[str]:
    """Blocks that are missing, and blocks that are too many."""
    count, config = block_count(file.config), file.config
    if count is None or "block_configs" in config:  # a pruned model's blocks may be empty
        return
    if "num_layers_per_stack" in config:  # HRM-text, whose num_hidden_layers counts a block at every run
        yield (
            f"model type {clipped(config.get('model_type'))} runs several stacks of num_layers_per_stack "
            "blocks in cycles, where quant knows models of one list of blocks: serve it as it is, with vllm "
            "serve"
        )
        return
    have = set(file.blocks)
    inside = sum(i < count for i in have)  # a count may be absurd: no list of that length
    key = "num_hidden_layers"
    if inside < count:
        first = next(i for i in range(count) if i not in have)
        more = f" (and {count - inside - 1} more)" if count - inside > 1 else ""
        yield (
            f"{key} is {count} in config.json, and the file has {inside} of those blocks: "
            f"{file.decoder}{first} is not there{more}: fetch the missing files, or repair config.json"
        )
    drafting = {i for i in have if any(_DRAFTING.search(f".{n}") for n in file.blocks[i])}
    if extra := sorted(i for i in have - drafting if i >= count):
        yield (
            f"the file has {file.decoder}{extra[0]}, which is no block that predicts further tokens, and "
            f"config.json states {count} blocks ({key}), beyond which engines read none: repair config.json"
        )
    if counted := sorted(i for i in drafting if i < count):
        yield (
            f"{file.decoder}{counted[0]} predicts further tokens, and config.json counts it among the "
            f"{count} blocks of the decoder ({key}): repair config.json"
        )


def _expert_problems(file: _File) -> Iterator[str]:
    """Experts of a block that are fewer or more than stated."""
    number = stated(file.config, "experts")
    wanted = whole_number(number)
    if wanted is None:
        return  # a number for each block, or none
    idle = whole_number(stated(file.config, "zero_expert_num")) or 0  # they compute nothing
    allowed = (wanted, wanted + idle)
    # some routers have a row for each shared expert too
    shared = {n for k in SHARED_EXPERTS for n in file.all_stated(k)}
    routed = {*allowed, *(wanted + n for n in shared)}
    chosen = stated(file.config, "active")
    routes = any(role_of(f"layers.0.{n}") in ("experts", "router") for b in file.blocks.values() for n in b)
    if routes and isinstance(chosen, (int, float)) and not 1 <= chosen <= max(allowed):
        yield (
            f"config.json states {chosen} experts a token of {max(allowed)} (num_experts_per_tok): repair it"
        )

    def counted() -> Iterator[tuple[str, str]]:
        for index, names in file.blocks.items():
            numbers = {int(m[1]) for n in names if (m := EXPERT.search(f".{n}"))}
            fused = {s[0] for n, s in names.items() if len(s) == 3 and role_of(f"layers.0.{n}") == "experts"}
            alone = {len(numbers)} if numbers else set()
            counts = sorted((alone | fused).difference(allowed))
            gap = bool(numbers) and max(numbers) >= len(numbers)
            if counts or gap:
                yield (
                    "experts",
                    f"{file.decoder}{index} has {counts[0] if counts else len(numbers)} experts in the file"
                    f"{', not numbered one after another' if gap else ''}, config.json states {wanted}: "
                    f"{ANEW}",
                )
            for name, shape in names.items():
                router = name.endswith(".weight") and len(shape) == 2 and "shared" not in name
                if router and role_of(f"layers.0.{name}") == "router" and shape[0] not in routed:
                    yield (
                        "router",
                        f"{file.decoder}{index}.{name} is {list(shape)} in the file, and the router of "
                        f"{wanted} experts has as many rows: {ANEW}",
                    )

    yield from one_of_each(counted())


def _known_problems(file: _File) -> Iterator[str]:
    """Linears of a family that has a row, whose shapes are computed."""
    if not file.family[1]:
        return
    try:
        decoder = Decoder(file.config, "config.json")
        weights = [w for w in decoder_weights(decoder) if w.layer >= 0 and w.role != "mtp"]
    except UsageError:
        return  # what is wrong with the config alone is said elsewhere
    # in a form that is not read here
    coded = {n.rpartition(".")[0] for n in file.infos if not n.endswith(".bias")}
    explained: dict[int, set[str]] = {}
    for weight in weights:
        explained.setdefault(weight.layer, set()).add(f"{weight.name}.weight")

    def of_another_kind(index: int) -> bool:
        """Whether a block has matrices that the row does not explain: it is then not what the row says, and
        nothing is missing from it."""
        return any(
            len(shape) == 2
            and local.endswith(".weight")
            and local not in explained[index]
            and role_of(f"layers.0.{local}") in ("attention", "mlp")
            for local, shape in file.blocks[index].items()
        )

    def compared() -> Iterator[tuple[str, str]]:
        for weight in weights:
            if weight.count != 1 or not (weight.linear or weight.name.endswith("_proj.bias")):
                continue
            local = weight.name if weight.name.endswith(".bias") else f"{weight.name}.weight"
            names = file.blocks.get(weight.layer)
            if names is None or weight.layer in file.apart:
                continue
            shape = names.get(local)
            module = f"{file.decoder}{weight.layer}.{local.rpartition('.')[0]}"
            above = local.removesuffix(".weight").rpartition(".")[0]
            named = any(n.startswith(f"{above}.") and n in explained[weight.layer] for n in names)
            if shape is None and (
                not named or of_another_kind(weight.layer) or (module in coded and local.endswith(".weight"))
            ):
                continue
            if shape is None:
                yield (
                    f"{local} missing",
                    f"{file.decoder}{weight.layer}.{local} {list(weight.shape)} is not in the file, and "
                    f"config.json implies it: {ANEW}",
                )
            elif shape != weight.shape:
                yield (
                    f"{local} {shape}",
                    f"{file.decoder}{weight.layer}.{local} is {list(shape)} in the file, "
                    f"{list(weight.shape)} by config.json{_by(decoder, local)}: {ANEW}",
                )

        yield from _expert_shapes(file, decoder)

    yield from one_of_each(compared())


def _expert_shapes(file: _File, decoder: Decoder) -> Iterator[tuple[str, str]]:
    """Matrices of routed experts that are stored one by one."""
    if decoder.moe is None:
        return
    inner, hidden = decoder.moe.intermediate, decoder.expert_width
    for index, names in file.blocks.items():
        for local, shape in names.items():
            last = local.split(".")[-2] if local.endswith(".weight") else ""
            wide = _EXPERT_SIDES.get(last)
            if wide is None or len(shape) != 2 or index in file.apart or not EXPERT.search(f".{local}"):
                continue
            wanted = (inner, hidden) if wide == 0 else (hidden, inner)
            if shape != wanted:
                yield (
                    f"expert {last} {shape}",
                    f"{file.decoder}{index}.{local} is {list(shape)} in the file, {list(wanted)} by "
                    f"config.json: {ANEW}",
                )


#: A projection of an expert → the side that is its inner width.
_EXPERT_SIDES = {"gate_proj": 0, "up_proj": 0, "w1": 0, "w3": 0, "down_proj": 1, "w2": 1}


def _by(decoder: Decoder, local: str) -> str:
    """The numbers that make a projection's rows or columns."""
    last = local.split(".")[-2]
    if last in ("q_proj", "o_proj"):
        return f" ({decoder.heads} heads of {decoder.head_dim})"
    if last in ("k_proj", "v_proj"):
        return f" ({decoder.kv_heads} KV heads of {decoder.head_dim})"
    return f" (intermediate_size {decoder.intermediate})" if local.startswith("mlp.") else ""


#: A projection of attention → which heads make its outputs; its module.
_PROJECTIONS = {
    "k_proj": "kv", "v_proj": "kv", "query_key_value": "qkv", "qkv_proj": "qkv", "Wqkv": "qkv", "wqkv": "qkv",
    "W_pack": "qkv",
}  # fmt: skip
_ATTENTION = re.compile(r"attn|attention|mixer")
#: A projection of an MLP → the side that is its inner width.
_INNER = {"gate_proj": 0, "up_proj": 0, "down_proj": 1, "fc1": 0, "fc2": 1, "dense_h_to_4h": 0,
          "dense_4h_to_h": 1}  # fmt: skip


def _size_problems(file: _File) -> Iterator[str]:
    """Projections whose size no number of the config explains, whatever the family: of attention, where the
    query projection is explained, and of MLPs. A projection that is explained in some block is not judged in
    blocks of other kinds."""
    fits: set[str] = set()
    keyed: list[tuple[str, str]] = []
    explain = (*_heads_explain(file), *_widths_explain(file))
    for index, names in file.blocks.items():
        for local, shape in names.items():
            if len(shape) != 2 or not local.endswith(".weight"):
                continue
            module, _, last = local.removesuffix(".weight").rpartition(".")
            for judge in explain:
                verdict = judge(module, last, shape, names)
                if verdict == "":
                    fits.add(local)
                elif verdict is not None and index not in file.apart:
                    name = f"{file.decoder}{index}.{local}"
                    keyed.append((local, f"{name} is {list(shape)} in the file, {verdict}: {ANEW}"))
    yield from one_of_each((local, line) for local, line in keyed if local not in fits)


#: Of a module, the last part of a name, its shape and the names beside it: what the config says against it,
#: the empty word where it explains the shape, None where it does not say.
_Judge = Callable[[str, str, tuple[int, ...], Mapping[str, tuple[int, ...]]], "str | None"]


def _heads_explain(file: _File) -> Iterator[_Judge]:
    """Outputs of the projections of attention."""
    heads = heads_of(file.config)
    if heads is None:
        return
    kv_heads = {heads.kv}.union(*(_numbers(file.config, {k}) for k in KV_HEADS))
    sizes = set(_numbers(file.config, set(HEAD_SIZES)))
    hidden = whole_number(stated(file.config, "hidden_size"))
    if hidden is not None and hidden % heads.attention == 0:
        sizes.add(hidden // heads.attention)
    layer_types = stated(file.config, "layer_types")
    mixed = isinstance(layer_types, list) and len({str(k) for k in layer_types}) > 1
    kept = {*kv_heads, heads.attention}  # families without grouped queries have no use for the number
    wanted = {
        "kv": {k * d for k in kept for d in sizes},
        "qkv": {(heads.attention + 2 * k) * d for k in kept for d in sizes},
    }
    plain = {heads.attention * d for d in sizes}

    def judge(
        module: str, last: str, shape: tuple[int, ...], names: Mapping[str, tuple[int, ...]]
    ) -> str | None:
        kind = _PROJECTIONS.get(last)
        if kind is None or (kind == "qkv" and mixed) or not _ATTENTION.search(module):
            return None
        query = names.get(f"{module}.q_proj.weight")
        if kind == "kv" and (query is None or query[0] not in plain):
            return None  # latent, gated, or of another kind
        if shape[0] in wanted[kind]:
            return ""
        return (
            f"whose outputs no number in config.json explains ({heads.attention} heads, {_any(kv_heads)} KV "
            f"heads of {_any(sizes)})"
        )

    yield judge


def _widths_explain(file: _File) -> Iterator[_Judge]:
    """Inner widths of MLPs, experts aside."""
    keys = {k for p in parts(file.config) for k in p if "intermediate_size" in k} | set(
        KEYS["intermediate_size"]
    )
    widths = set(_numbers(file.config, keys))
    shared = set(_numbers(file.config, SHARED_EXPERTS))
    wanted = {w * m for w in widths for m in (1, 2, *shared)}
    if stated(file.config, "model_type") == "recurrent_gemma":
        wanted |= {w // 2 for w in widths}  # whose number counts the gate's half and the other's
    if wanted:  # older families have four times the hidden size, whatever a config says besides
        wanted |= {4 * n for n in _numbers(file.config, KEYS["hidden_size"])}

    def judge(
        module: str, last: str, shape: tuple[int, ...], names: Mapping[str, tuple[int, ...]]
    ) -> str | None:
        side = _INNER.get(last)
        if side is None or ".experts." in f".{module}." or not wanted:
            return None
        if role_of(f"layers.0.{module}.{last}") == "attention":
            return None  # a gate of its heads
        what = "outputs" if side == 0 else "inputs"
        return "" if shape[side] in wanted else f"{_any(widths)} {what} by config.json (intermediate_size)"

    yield judge


def _lost_problems(file: _File) -> Iterator[str]:
    """A linear that a block lacks and that is all by which it differs from another."""
    if "block_configs" in file.config:
        return
    sets = {i: frozenset(names) for i, names in file.blocks.items()}
    kinds = {s: i for i, s in sets.items()}
    for index, names in sets.items():
        for other, whole in kinds.items():
            if len(other) != len(names) + 1 or not names < other:
                continue
            (local,) = other - names
            shape = file.blocks[whole][local]
            linear = len(shape) == 2 and role_of(f"layers.0.{local}") in ("attention", "mlp", "experts")
            module = f"{file.decoder}{index}.{local.removesuffix('.weight')}"
            coded = any(n.startswith(f"{module}.") and not n.endswith(".bias") for n in file.infos)
            # without values of their own, blocks use their keys
            if linear and not coded and not local.endswith("v_proj.weight"):
                yield (
                    f"{module}.weight {list(shape)} is not in the file, and {file.decoder}{whole}, which has "
                    f"all else that it has, has it: fetch the missing tensor"
                )


def _vector_problems(file: _File, is_zero: Callable[[str], bool] | None) -> Iterator[str]:
    """Biases and norms."""
    count = block_count(file.config)
    if count is None or "block_configs" in file.config or file.decoder is None:
        return
    coded = {n.rpartition(".")[0] for n in file.infos if not n.endswith((".weight", ".bias"))}
    ordinary = {i: b for i, b in file.blocks.items() if i < count and i not in file.apart}
    yield from one_of_each(vector_problems(ordinary, file.config, file.decoder, coded, is_zero))


def _numbers(part: Any, keys: Collection[str]) -> Iterator[int]:
    """Every whole number under one of ``keys``, at any depth of a config, towers' parts aside; of a list its
    members."""
    if isinstance(part, Mapping):
        for name, value in part.items():
            if name in keys:
                values = value if isinstance(value, list) else [value]
                yield from (n for v in values if (n := whole_number(v)) is not None)
            if isinstance(value, (Mapping, list)) and not name.endswith(("vision_config", "audio_config")):
                yield from _numbers(value, keys)
    elif isinstance(part, list):
        for value in part:
            yield from _numbers(value, keys)
