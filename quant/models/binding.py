"""Which tensors of a file fill which parameters of transformers' model, and where in a block each linear
lies.

File and model differ in three ways: a multimodal file keeps the decoder under a prefix of its own, families
store tensors under older names, and experts are stored one by one while the model holds them in one
parameter. The first is told by where the file's list of blocks is; the second by transformers' own table of
renamings (`conversion_mapping.py::get_model_conversion_mapping`); the third by :mod:`quant.models.linears`
and :mod:`quant.models.experts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from quant.checkpoint.reader import Checkpoint
from quant.models.experts import Experts, find_experts
from quant.models.linears import LinearRef, Slice, decoder_refs
from quant.models.roles import block_list, block_of

#: An expert of its own in a tensor's name: the module, the expert, the projection under any name, what of it.
_EXPERT = re.compile(r"^(.+)\.(\d{1,9})\.(\w+)\.(weight|bias)$")
#: Names of an expert's projections → ours.
_PROJECTIONS = {
    "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj",
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class BlockLinear:
    """A linear of a block in memory.

    Attributes:
        ref: the same in the file.
        parameter: the parameter inside the block that holds its weight.
        place: which part of it, or how it is laid out; None: the whole, [N, K] as ``nn.Linear`` has it.
    """

    ref: LinearRef
    parameter: str
    place: Slice | None = None

    @property
    def module(self) -> str:
        """The module inside the block whose parameter it is."""
        return self.parameter.rpartition(".")[0]

    @property
    def shared(self) -> bool:
        """Whether the parameter holds other linears as well."""
        return self.place is not None and self.place.expert is not None

    def get(self, block: nn.Module) -> torch.Tensor:
        """The weight [N, K] as a view."""
        value = block.get_parameter(self.parameter)
        return value if self.place is None else self.place.view(value)

    def set(self, block: nn.Module, value: torch.Tensor) -> None:
        """Puts another weight [N, K], in the dtype of the block, in its place."""
        if self.place is not None:
            self.place.view(block.get_parameter(self.parameter)).copy_(value)
        else:
            block.get_submodule(self.module).weight = nn.Parameter(value, requires_grad=False)


@dataclass(frozen=True)
class Conversion:
    """A parameter that transformers makes of several tensors of the file, or of one in another layout;
    ``first``: of several that it makes of them at once, that by which it calls them; ``sources``: by the
    pattern of its converter that each matches."""

    name: str
    converter: Any
    first: str
    sources: Mapping[str, tuple[str, ...]]

    def value(self, checkpoint: Checkpoint, model: nn.Module) -> torch.Tensor:
        """The parameter, computed by transformers' own operations."""
        converter = deepcopy(self.converter)
        for pattern, tensors in self.sources.items():
            for tensor in tensors:
                converter.add_tensor(self.first, tensor, pattern, partial(checkpoint.read, tensor))
        made = converter.convert(self.first, model=model, config=model.config)
        value = made[self.name]
        return value[0] if isinstance(value, list) else value


@dataclass(frozen=True)
class Binding:
    """Of a model and a checkpoint.

    Attributes:
        tensors: parameter or buffer of the model → the file tensor that is equal to it.
        experts: parameter of the model that holds experts → its linears, by (expert, projection), and those
            of its biases' parameter likewise.
        linears: by block, the linears by their names inside the block as the file has them.
        prefixes: by block, what comes before those names in the file.
        converted: parameters that transformers makes of several tensors; linears among them are left alone.
        unused: file tensors of the blocks that no parameter takes.
    """

    tensors: Mapping[str, str]
    experts: Mapping[str, Mapping[tuple[int, str], LinearRef]]
    linears: tuple[Mapping[str, BlockLinear], ...]
    prefixes: tuple[str, ...]
    converted: Mapping[str, Conversion] = field(default_factory=dict)
    unused: tuple[str, ...] = field(default=())

    @cached_property
    def modules(self) -> tuple[Mapping[str, str], ...]:
        """By block, module path of each plain linear → its name inside the block as the file has it."""
        return tuple({x.module: n for n, x in block.items() if not x.shared} for block in self.linears)


def bind(model: nn.Module, blocks_path: str, count: int, checkpoint: Checkpoint) -> Binding:
    """The binding of a model (its parameters may be on the meta device) whose ``count`` blocks lie at
    ``blocks_path``."""
    wanted = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    names = {**wanted, **buffers}
    renamed = renamings_of(model)
    blocks: nn.ModuleList = model.get_submodule(blocks_path)  # type: ignore[assignment]
    experts = {
        f"{blocks_path}.{i}.{e.path}": (i, e) for i, block in enumerate(blocks) for e in find_experts(block)
    }
    list_prefix = _list_prefix(checkpoint, blocks_path, renamed, names)
    refs = decoder_refs(checkpoint.tensors, checkpoint.config)
    by_tensor: dict[str, list[LinearRef]] = {}
    for ref in refs.values():
        by_tensor.setdefault(ref.tensor, []).append(ref)
    tensors: dict[str, str] = {}
    held: dict[str, dict[tuple[int, str], LinearRef]] = {}
    linears: list[dict[str, BlockLinear]] = [{} for _ in range(count)]
    unused = []
    converters, made_of = converters_of(model), dict[str, tuple[Any, str, dict[str, list[str]]]]()
    for tensor in checkpoint.tensors:
        own = _moved(tensor, list_prefix, f"{blocks_path}.")
        other = renamed(own)
        name = next(
            (n for n in (f"{getattr(model, 'base_model_prefix', '')}.{other}", other, own) if n in names),
            other,
        )
        parts = by_tensor.get(tensor, [])
        module, _, last = name.rpartition(".")
        index = block_of(tensor) if list_prefix is not None and block_list(tensor) == list_prefix else None
        expert = _EXPERT.match(name)
        if name in names and not any(r.fused for r in parts):
            tensors[name] = tensor
            kind = type(model.get_submodule(module)).__name__ if last == "weight" else ""
            plain = kind == "Conv1D" or (bool(kind) and isinstance(model.get_submodule(module), nn.Linear))
            if plain and index is not None and index < count and parts:
                local = parts[0].name.removeprefix(f"{list_prefix}{index}.")
                parameter = name.removeprefix(f"{blocks_path}.{index}.")
                place = Slice(parameter, transposed=True) if kind == "Conv1D" else None
                linears[index][local] = BlockLinear(parts[0], parameter, place)
        elif expert is not None and expert[1] in experts and expert[3] in _PROJECTIONS and parts:
            _hold(
                held,
                linears,
                experts[expert[1]],
                parts[0],
                int(expert[2]),
                _PROJECTIONS[expert[3]],
                list_prefix,
                blocks,
                blocks_path,
            )
        elif (
            parts
            and parts[0].fused
            and (home := next((p for p in (module, name.rpartition(".")[0]) if p in experts), None))
        ):
            for ref in parts:
                projection = _projection_of(ref)
                _hold(
                    held,
                    linears,
                    experts[home],
                    ref,
                    ref.weight.expert or 0,
                    projection,
                    list_prefix,
                    blocks,
                    blocks_path,
                )
        elif name in names:
            tensors[name] = tensor
        elif (match := converter_of(converters, name, names)) is not None:
            converter, first, pattern = match
            for target in made_with(converter, first):
                made_of.setdefault(target, (converter, first, {}))[2].setdefault(pattern, []).append(tensor)
        elif index is not None and index < count:
            unused.append(tensor)
    converted = {
        target: Conversion(
            target, converter, first, {p: tuple(sorted(t, key=_counted)) for p, t in sources.items()}
        )
        for target, (converter, first, sources) in made_of.items()
        if target in names
    }
    prefixes = tuple(f"{list_prefix or blocks_path + '.'}{i}." for i in range(count))
    return Binding(tensors, held, tuple(linears), prefixes, converted, tuple(unused))


def _hold(
    held: dict[str, dict[tuple[int, str], LinearRef]],
    linears: list[dict[str, BlockLinear]],
    home: tuple[int, Experts],
    ref: LinearRef,
    expert: int,
    projection: str,
    list_prefix: str | None,
    blocks: nn.ModuleList,
    blocks_path: str,
) -> None:
    """Notes that ``ref`` is a projection of an expert of the experts module ``home``."""
    index, experts = home
    if expert >= experts.count or projection not in (*experts.projections, "down_proj"):
        return
    parameter = experts.parameter(projection)
    held.setdefault(f"{blocks_path}.{index}.{parameter}", {})[expert, projection] = ref
    shape = blocks[index].get_parameter(parameter).shape
    local = ref.name.removeprefix(f"{list_prefix}{index}.")
    linears[index][local] = BlockLinear(ref, parameter, experts.place(projection, expert, shape))


def _projection_of(ref: LinearRef) -> str:
    return _PROJECTIONS.get(ref.name.rpartition(".")[2], "")


def renamings_of(model: nn.Module) -> Callable[[str], str]:
    """transformers' own way from a file's name to the model's."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # another release of transformers: names are taken as they are
        return lambda name: name
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]

    def renamed(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return renamed


def converters_of(model: nn.Module) -> list[Any]:
    """transformers' ways to make one parameter of several tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return []
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    return [t for t in transforms if isinstance(t, WeightConverter)]


def converter_of(
    converters: Sequence[Any], name: str, names: Mapping[str, object]
) -> tuple[Any, str, str] | None:
    """The converter that takes a tensor, the parameter that it makes, and the pattern that matched."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None and target in names:
            return converter, target, pattern
    return None


def _counted(tensor: str) -> list[tuple[int, str]]:
    """The order of tensors in which a second expert comes before a tenth."""
    return [(int(p), "") if p.isdigit() else (0, p) for p in tensor.split(".")]


def made_with(converter: Any, target: str) -> list[str]:
    """The parameters that a converter makes of the tensors of which it makes ``target``: of one fused tensor
    several, as queries, keys and values."""
    first, *others = converter.target_patterns
    return [target, *(target.replace(first, other) for other in others if first in target)]


def _moved(tensor: str, list_prefix: str | None, blocks_prefix: str) -> str:
    """The tensor's name with the decoder where the model has it: what surrounds the list of blocks moves
    along."""
    if list_prefix is None or list_prefix == blocks_prefix:
        return tensor
    theirs, ours = (p.removesuffix(".").rpartition(".")[0] for p in (list_prefix, blocks_prefix))
    if theirs == ours:
        return blocks_prefix + tensor.removeprefix(list_prefix) if tensor.startswith(list_prefix) else tensor
    if tensor.startswith(list_prefix):
        return blocks_prefix + tensor.removeprefix(list_prefix)
    if theirs and tensor.startswith(f"{theirs}."):
        return f"{ours}.{tensor.removeprefix(f'{theirs}.')}" if ours else tensor.removeprefix(f"{theirs}.")
    head = re.fullmatch(r"(?:.*\.)?(lm_head\.(?:weight|bias))", tensor)
    return head[1] if head else tensor


def _list_prefix(
    checkpoint: Checkpoint,
    blocks_path: str,
    renamed: Callable[[str], str],
    names: Mapping[str, object],
) -> str | None:
    """The prefix under which the file lists the decoder's blocks: of all lists the one whose tensors are the
    model's. A deep tower has many of the same names beside others, a prediction head few, but all of them."""
    lists: dict[str, list[str]] = {}
    for tensor in checkpoint.tensors:
        if (place := block_list(tensor)) is not None:
            lists.setdefault(place, []).append(tensor)

    def fitting(prefix: str) -> float:
        mine = [renamed(_moved(t, prefix, f"{blocks_path}.")) for t in lists[prefix]]
        # a numbered part of a block is an expert of it, a norm of a numbered block is none
        fit = sum(n in names or bool((e := _EXPERT.match(n)) and e[1] != blocks_path) for n in mine)
        return fit * fit / len(mine)

    return max(lists, key=fitting, default=None)
