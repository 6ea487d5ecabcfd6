"""Experts that a quantized checkpoint names one by one, back in the fused tensors of an ordinary checkpoint
of their family: transformers reads some families fused alone, and gives experts of other names random
values. And the other way, to compare both."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import Checkpoint
from quant.models.linears import ExpertLayout, Slice, expert_layout, fused_tensors

if TYPE_CHECKING:
    import torch


def stacked(checkpoint: Checkpoint, like: Mapping[str, TensorInfo] | None = None) -> Checkpoint:
    """A checkpoint with the experts of each layer in fused tensors, computed in fp32 when they are read, one
    expert at a time. Layers of which an expert is missing are left as they are.

    Args:
        like: tensors of another checkpoint: those that it has fused are; None: those whose family's files
            are fused alone.
    """
    layout = expert_layout(checkpoint.config)
    if like is None and not layout.fused_only:
        return checkpoint
    tensors, computed = dict(checkpoint.tensors), dict(checkpoint.computed)
    parts = dict(checkpoint.computed_parts)
    for name, experts in _fused(checkpoint.tensors, layout).items():
        first = [checkpoint.info(n).shape for n in experts[0]]
        rows = sum(shape[0] for shape in first)
        turned = layout.transposed and len(first[0]) == 2
        shape = (len(experts), *((first[0][1], rows) if turned else (rows, *first[0][1:])))
        if like is not None and (name in checkpoint.tensors or name not in like or like[name].shape != shape):
            continue
        file = checkpoint.info(experts[0][0]).file
        for member in (n for expert in experts for n in expert):
            del tensors[member]
            computed.pop(member, None)
        tensors[name] = TensorInfo(name, "F32", shape, file, 0, 4 * prod(shape))
        parts[name] = partial(_expert, checkpoint, experts, layout.interleaved, turned)
        computed[name] = partial(_all, parts[name], len(experts))
    return replace(checkpoint, tensors=tensors, computed=computed, computed_parts=parts)


def apart(checkpoint: Checkpoint, like: Collection[str]) -> Checkpoint:
    """A checkpoint with those fused tensors of experts taken apart, when they are read, whose experts another
    one, of which ``like`` are the tensors, names one by one."""
    tensors, computed = dict(checkpoint.tensors), dict(checkpoint.computed)
    for name, refs in fused_tensors(checkpoint.tensors, checkpoint.config).items():
        info, parts = checkpoint.info(name), dict[str, tuple[Slice, tuple[int, ...]]]()
        for ref in refs:
            if ref.bias is not None and ref.bias.tensor == name:
                parts[f"{ref.name}.bias"] = ref.bias, (ref.n,)
            else:
                parts[f"{ref.name}.weight"] = ref.weight, (ref.n, ref.k)
        if not all(n in like for n in parts):
            continue
        del tensors[name]
        computed.pop(name, None)
        for part, (place, shape) in parts.items():
            tensors[part] = TensorInfo(part, info.dtype, shape, info.file, 0, info.nbytes // len(parts))
            computed[part] = partial(place.read, checkpoint)
    return replace(checkpoint, tensors=tensors, computed=computed)


def _fused(tensors: Mapping[str, TensorInfo], layout: ExpertLayout) -> dict[str, list[list[str]]]:
    """Fused tensors by name, and for each expert the tensors that its part is made of, in order."""
    home, numbered = layout.container
    projections = {name: projection for projection, name in layout.names.items()}
    pattern = re.compile(rf"(.*\.){re.escape(numbered)}\.(\d{{1,6}})\.(\w+)\.(weight|bias)")
    layers: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    for name in tensors:
        match = pattern.fullmatch(name)
        if match is not None and match[3] in projections:
            layers.setdefault((match[1], match[4]), {})[int(match[2]), projections[match[3]]] = name
    fused: dict[str, list[list[str]]] = {}
    for (prefix, kind), members in layers.items():
        count = 1 + max(expert for expert, _ in members)
        taken: set[str] = set()
        for last, wanted in layout.tensors.items():
            keys = [[(expert, p) for p in wanted] for expert in range(count)]
            if taken & set(wanted) or not all(key in members for row in keys for key in row):
                continue
            names = [[members[key] for key in row] for row in keys]
            if any([tensors[n].shape for n in row] != [tensors[n].shape for n in names[0]] for row in names):
                continue
            taken |= set(wanted)
            end = layout.ending if kind == "weight" else "_bias"
            fused[f"{prefix}{home}.{last}{end}"] = names
    return fused


def _expert(
    checkpoint: Checkpoint, experts: list[list[str]], interleaved: bool, turned: bool, expert: int
) -> torch.Tensor:
    import torch

    values = [checkpoint.read(name).float() for name in experts[expert]]
    value = torch.stack(values, 1).flatten(0, 1) if interleaved else torch.cat(values)
    return value.t().contiguous() if turned else value


def _all(part: Callable[[int], torch.Tensor], count: int) -> torch.Tensor:
    import torch

    return torch.stack([part(expert) for expert in range(count)])
