"""Where every tensor of the output goes: units that are finished at once, their shards, and what each tensor
is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quant.checkpoint.header import FLOATS
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.writer import TensorSpec, file_bytes
from quant.formats import Format
from quant.models.account import stacked_experts
from quant.models.linears import LinearRef, Slice, holders
from quant.models.roles import block_of
from quant.vllm.layers import Linear, is_head, module_class

#: A shard is closed at this size, as transformers does.
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output and what it is made of.

    Attributes:
        linear: the quantized linear that it is a part of; None of other tensors.
        made: by calibration (a scale of the KV cache).
        part: of the source's tensor of another name, of which it is a copy.
        linears: quantized linears whose values replace parts of the source's tensor of this name, in a plain
            file that keeps the source's layout.
        rounded: the values of a tensor that the source stores quantized, rounded once.
        stack: the source's fused tensor of experts, of whose ``linears`` it holds codes or scales.
    """

    spec: TensorSpec
    linear: str | None = None
    made: bool = False
    part: Slice | None = None
    linears: tuple[str, ...] = ()
    rounded: bool = False
    stack: str = ""

    @property
    def copied(self) -> bool:
        """Whether it is the source's tensor of that name, byte for byte unless scaling is folded in."""
        made_anew = self.made or self.rounded or bool(self.linears)
        return self.linear is None and not made_anew and self.part is None


@dataclass(frozen=True)
class Shard:
    file: str
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        return file_bytes([t.spec for t in self.tensors])


@dataclass(frozen=True)
class Unit:
    """What is finished, synced and journalled at once: a decoder block, or what lies outside the blocks
    (``block`` None)."""

    name: str
    block: int | None
    shards: tuple[Shard, ...]

    @property
    def made(self) -> list[TensorSpec]:
        """Tensors that calibration makes."""
        return [t.spec for s in self.shards for t in s.tensors if t.made]


def lay_out(
    checkpoint: Checkpoint,
    linears: Mapping[str, Linear],
    form: Format,
    dtype: str,
    made: Mapping[int, Sequence[TensorSpec]] | None = None,
    refs: Mapping[str, LinearRef] | None = None,
) -> tuple[Unit, ...]:
    """Units in file order: what lies outside the blocks first, then block by block, each in shards of at most
    :data:`SHARD_BYTES`.

    Args:
        made: by block, tensors that the source does not have.
        refs: where linears are stored; None: each in a tensor of its own.
    """
    fused = holders((refs or {}).values())
    members: dict[int | None, list[OutputTensor]] = {None: []}
    for name in sorted(checkpoint.tensors, key=lambda n: (block_of(n) is None, block_of(n) or 0, n)):
        info = checkpoint.tensors[name]
        rounded = name in checkpoint.computed
        stored = dtype if rounded else info.dtype
        module = name.removesuffix(".weight")
        entry = members.setdefault(block_of(name), [])
        held = fused.get(name, [])
        if name.endswith(".weight") and module in linears:
            # values stay in the dtype that each tensor is stored in; scales have the model's
            own = stored if form.quant_method is None else dtype
            entry += [OutputTensor(spec, module) for spec in form.specs(linears[module], own)]
        elif not any(ref.name in linears for ref in held) or (form.stacked and held[0].tensor != name):
            entry.append(OutputTensor(TensorSpec(name, stored, info.shape), rounded=rounded))
        elif form.stacked:
            entry += _stacked(name, held, form)
        elif form.quant_method is None:
            kept = () if held[0].tensor != name else tuple(ref.name for ref in held if ref.name in linears)
            entry.append(OutputTensor(TensorSpec(name, stored, info.shape), linears=kept, rounded=rounded))
        else:
            entry += _unfused(name, stored, held, linears, form, dtype)
    for index, specs in (made or {}).items():
        members.setdefault(index, []).extend(OutputTensor(spec, made=True) for spec in specs)
    pieces: list[tuple[int | None, list[list[OutputTensor]]]] = []
    for block in sorted(members, key=lambda b: -1 if b is None else b):
        shards: list[list[OutputTensor]] = [[]]
        size = 0
        for tensor in members[block]:
            if (
                size + tensor.spec.nbytes > SHARD_BYTES
                and shards[-1]
                and not _same_linear(shards[-1][-1], tensor)
            ):
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.spec.nbytes
        if shards[0]:
            pieces.append((block, shards))
    total = sum(len(shards) for _, shards in pieces)
    units, number = [], 0
    for block, shards in pieces:
        files = []
        for tensors in shards:
            number += 1
            file = "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            files.append(Shard(file, tuple(tensors)))
        units.append(Unit("outside" if block is None else f"block {block}", block, tuple(files)))
    return tuple(units)


def _unfused(
    name: str, stored: str, held: Sequence[LinearRef], linears: Mapping[str, Linear], form: Format, dtype: str
) -> Iterator[OutputTensor]:
    """The tensors that a fused one is taken apart into: quantized linears, and the weights and biases that
    stay."""
    for ref in held:
        if ref.bias is not None and ref.bias.tensor == name:
            yield OutputTensor(TensorSpec(f"{ref.name}.bias", stored, (ref.n,)), part=ref.bias)
        elif ref.name in linears:
            yield from (OutputTensor(spec, ref.name) for spec in form.specs(linears[ref.name], dtype))
        else:
            yield OutputTensor(TensorSpec(f"{ref.name}.weight", stored, (ref.n, ref.k)), part=ref.weight)


def _stacked(name: str, held: Sequence[LinearRef], form: Format) -> Iterator[OutputTensor]:
    """The tensors that a format has in the place of a fused one."""
    rows = sum(ref.n for ref in held if ref.weight.expert == 0)
    experts = 1 + max(ref.weight.expert or 0 for ref in held)
    for spec in form.stack_specs(name, experts, rows, held[0].k):
        yield OutputTensor(spec, linears=tuple(ref.name for ref in held), stack=name)


def _same_linear(a: OutputTensor, b: OutputTensor) -> bool:
    """Whether two tensors are parts of one linear or stack, which one shard holds."""
    return (a.linear or a.stack or None) is not None and (a.linear, a.stack) == (b.linear, b.stack)


def weight_map(units: Iterable[Unit]) -> dict[str, str]:
    """Tensor names to files, for the index."""
    return {t.spec.name: s.file for u in units for s in u.shards for t in s.tensors}


def unquantized_linears(
    checkpoint: Checkpoint, linears: Mapping[str, Linear], refs: Mapping[str, LinearRef] | None = None
) -> list[str]:
    """Module names to list as ignored: linears of any part of the model that stay as they are; always the
    head, which may be tied, unless one is quantized."""
    heads = set() if any(is_head(name) for name in linears) else {"lm_head"}
    refs = refs or {}
    names = {*heads, *(n for n, ref in refs.items() if ref.fused)} - set(linears)
    names |= set(stacked_experts(checkpoint.tensors, checkpoint.config, refs.values()))
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if (
            module not in linears
            and name.endswith(".weight")
            and len(info.shape) == 2
            and info.dtype in FLOATS
        ):
            if module_class(module) in ("Linear", "LMHead"):
                names.add(module)
    return sorted(names, key=lambda n: (block_of(n + ".") is None, block_of(n + ".") or 0, n))
