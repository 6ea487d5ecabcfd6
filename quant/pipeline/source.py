"""A source that is quantized already: what it was, what a job makes of it, and codes that are carried over
instead of being rounded anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError
from quant.formats import Format, QuantizedLayers, find_format
from quant.formats.base import Stack, StackSlice
from quant.formats.legacy import repaired
from quant.formats.reading import dequantized, read_linear
from quant.models.linears import fused_tensors
from quant.vllm.cache import cache_scale
from quant.vllm.config import quantization_config, source_method
from quant.vllm.layers import Linear

if TYPE_CHECKING:
    import torch

    from quant.tensors import QuantizedTensor


@dataclass(frozen=True)
class QuantizedSource:
    """The checkpoint as it is stored, and its quantized matrices.

    Attributes:
        method: its ``quant_method``, in vLLM's spelling.
    """

    checkpoint: Checkpoint
    layers: QuantizedLayers
    method: str

    @property
    def matrices(self) -> list[str]:
        """Names of the tensors that it stores quantized, as an ordinary checkpoint has them."""
        return [*(f"{n}.weight" for n in self.layers.linears), *self.layers.stacks]

    def summary(self, taken: Collection[str], kept: Collection[str]) -> dict[str, Any]:
        """What a report says of it.

        Args:
            taken: tensors of the ordinary checkpoint that the job quantizes.
            kept: linears whose codes are carried over.
        """
        anew = [n for n in self.matrices if n in taken]
        carried = {f"{n}.weight" for n in kept}
        wide = [n for n in self.matrices if n not in taken and n not in carried]
        return {
            "quant_method": self.method,
            "format": self.layers.format,
            "schemes": self.layers.schemes,
            "rounded_anew": len(anew),
            "kept": sorted(kept),
            "dequantized": wide,
        }

    @property
    def dropped(self) -> list[str]:
        """Tensors that say nothing of a weight: numbers of activations and of an FP8 KV cache."""
        form = self.layers.form
        numbers = {
            self.layers.tensor(f"{n}.{last}") for n in self.layers.linears for last in form.lasts("inputs")
        }
        return sorted(n for n in self.checkpoint.tensors if n in numbers or cache_scale(n) is not None)


def read_source(path: Path, apart: bool = False) -> tuple[Checkpoint, QuantizedSource | None, list[str]]:
    """A job's source with the values of its weights, and what it was where it is quantized; and what was
    found to be left over.

    Args:
        apart: experts that are quantized in one tensor become linears of their own, whose codes can be kept.

    Raises:
        CheckpointError: it cannot be read, or not in the way it is quantized.
    """
    stored, repairs = repaired(open_checkpoint(path))
    layers = find_format(stored.config, stored.tensors)
    if layers is None:
        return stored, None, []
    notes = [f"source: {x}" for x in repairs]
    method = source_method(quantization_config(stored.config)) or ""
    values = dequantized(stored, layers)
    if apart and layers.stacks:
        layers = taken_apart(layers, values)
        values = without_shared_biases(values, dequantized(stored, layers))
    if not layers.linears and not layers.stacks:
        where = stored.quantization_file or "config.json"
        return (
            replace(values, origin=None),
            None,
            [
                f"{where} says that the source is quantized ({method}), but no tensor of it is: taken as it "
                "is, and the output does not say so"
            ],
        )
    return values, QuantizedSource(stored, layers, method), notes


def taken_apart(layers: QuantizedLayers, values: Checkpoint) -> QuantizedLayers:
    """The same with the experts of stacks as linears of their own, wherever each has multipliers of its own.

    Args:
        values: the checkpoint dequantized, whose layout of fused experts tells what a stack holds.
    """
    refs = fused_tensors(values.tensors, values.config)
    linears, slices, whole = dict(layers.linears), dict[str, StackSlice](), dict[str, Stack]()
    for name, stack in layers.stacks.items():
        places = {
            ref.name: StackSlice(
                stack, ref.weight.expert or 0, ref.n, ref.k, ref.weight.first, ref.weight.step,
                ref.weight.transposed,
            )
            for ref in refs.get(name, [])
        }  # fmt: skip
        if not places or any(place.scheme is None for place in places.values()):
            whole[name] = stack
            continue
        slices |= places
        for module, place in places.items():
            assert place.scheme is not None
            linears[module] = Linear(module, place.n, place.k, place.scheme, stack.inputs)
    return replace(layers, linears=linears, stacks=whole, slices=slices)


def without_shared_biases(fused: Checkpoint, apart: Checkpoint) -> Checkpoint:
    """``apart``, in which experts are linears of their own, with their biases taken apart likewise.

    Args:
        fused: the same checkpoint with the experts in fused tensors.
    """
    tensors, computed = dict(apart.tensors), dict(apart.computed)
    for refs in fused_tensors(fused.tensors, fused.config).values():
        for ref in refs:
            if ref.bias is None or f"{ref.name}.weight" not in tensors:
                continue
            info = fused.info(ref.bias.tensor)
            tensors.pop(ref.bias.tensor, None)
            size = info.nbytes * ref.n // max(1, info.numel)
            tensors[f"{ref.name}.bias"] = TensorInfo(
                f"{ref.name}.bias", info.dtype, (ref.n,), info.file, 0, size
            )
            computed[f"{ref.name}.bias"] = partial(ref.bias.read, fused)
    return replace(apart, tensors=tensors, computed=computed)


def as_read(
    checkpoint: Checkpoint, layers: QuantizedLayers, names: Iterable[str]
) -> tuple[dict[str, Linear], set[str], dict[str, str]]:
    """Linears with what only their tensors tell: whether they have zero points, and the order of groups.

    Returns:
        the linears; those whose groups are in activation order; and by linear, why one cannot be read.
    """
    linears: dict[str, Linear] = {}
    ordered: set[str] = set()
    problems: dict[str, str] = {}
    shifted = False
    for name in names:
        linears[name] = layers.linears[name]
        try:
            tensor = read_linear(layers.form, layers, checkpoint, name)
        except CheckpointError as error:
            problems[name] = str(error)
            continue
        linears[name] = replace(linears[name], weights=tensor.scheme)
        shifted = shifted or (tensor.zeros is not None and bool(tensor.zeros.any()))
        if tensor.group_index is not None:
            ordered.add(name)
    # AWQ files always have zero points: those of symmetric weights are all in the middle
    if not shifted:
        linears = {n: replace(x, weights=replace(x.weights, symmetric=True)) for n, x in linears.items()}
    return linears, ordered, problems


def carried(tensor: QuantizedTensor, linear: Linear, dtype: torch.dtype) -> tuple[QuantizedTensor, bool]:
    """Codes and scales as another format stores them: scales of weight-only integers in the model's
    ``dtype``, no zero points where all are in the middle; and whether that changed a scale."""
    changed = False
    if linear.weights.scales == "model":
        scales = tensor.scales.to(dtype)
        changed = not bool((scales.float() == tensor.scales.float()).all())
        tensor = replace(tensor, scales=scales)
    if linear.weights.symmetric:
        tensor = replace(tensor, zeros=None, scheme=linear.weights)
    return tensor, changed


def keepable(
    source: QuantizedSource, names: Collection[str], form: Format, target: str
) -> tuple[dict[str, Linear], dict[str, str]]:
    """Which quantized linears a format can carry as they are, for the engine that shall load it; and why it
    cannot carry the others."""
    linears, ordered, unread = as_read(source.checkpoint, source.layers, names)
    kept: dict[str, Linear] = {}
    refused: dict[str, str] = {}
    for name, linear in linears.items():
        reason = unread.get(name) or form.refuse(linear.scheme, target)
        if reason is None and name in ordered and not form.keeps_order(target):
            reason = "its groups are in activation order, which has no place there"
        if reason is None:
            reason = next(iter(form.problems(linear)), None)
        if reason is None:
            kept[name] = linear
        else:
            refused[name] = reason
    refused |= {
        stack.name: f"--format {form.name} stores all experts of a layer in one tensor, which is made anew"
        if form.stacked
        else "its experts share multipliers with one another or between their projections"
        for stack in source.layers.stacks.values()
    }
    return kept, refused


def keep_notes(refused: Mapping[str, str]) -> list[str]:
    """A line for each reason why quantized matrices are not kept."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        by_reason.setdefault(reason, []).append(name)
    return [
        f"--keep-quantized: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} cannot be "
        f"kept, and {'is' if len(names) == 1 else 'are'} treated as the rest: {reason}"
        for reason, names in by_reason.items()
    ]
