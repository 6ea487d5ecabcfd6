"""Every matrix of a text decoder, and what becomes of it: so that none stays in 16 bits unseen. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from quant.checkpoint.header import WIDE_FLOATS, TensorInfo
from quant.models.linears import LinearRef
from quant.models.place import decoder_list
from quant.models.roles import EXPERT, NUMBERS, OUTSIDE, SMALLEST_SIDE, block_of, role_of
from quant.vllm.config import block_count

#: Largest share of a decoder's weights that may stay as they are without having been asked to.
LARGEST_REST = 0.05
#: Parameters of recurrences and their convolutions, which multiply no vector of features.
_NO_MATRIX = re.compile(r"(^|\.)(A_log|A|D|dt_bias|\w*conv\w*(\.weight)?|\w+_decay|slope_rate)$")


@dataclass(frozen=True)
class DecoderWeight:
    """A tensor of two or three dimensions in the decoder's blocks: elements, and those that are quantized,
    that the job was asked to leave, and that it has no way to quantize."""

    name: str
    elements: int
    quantized: int
    asked: int

    @property
    def rest(self) -> int:
        return self.elements - self.quantized - self.asked


def decoder_matrices(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Floating tensors of two or three dimensions in the blocks of the text decoder, towers and prediction
    heads left out, as the file has them; embeddings and the head lie outside the blocks."""
    blocks, decoder = block_count(config), decoder_list(tensors.values(), config)
    return {
        name: info
        for name, info in tensors.items()
        if info.dtype in WIDE_FLOATS
        and len(info.shape) in (2, 3)
        and block_of(name) is not None
        and role_of(name, blocks, decoder) not in OUTSIDE
    }


def stacked_experts(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], refs: Collection[LinearRef]
) -> list[str]:
    """Tensors that hold all experts of a layer, in a way that no linear of ours stands for."""
    taken = {ref.tensor for ref in refs}
    return [
        name
        for name in decoder_matrices(tensors, config)
        if role_of(name) == "experts"
        and name not in taken
        and not name.endswith(".weight")
        and not NUMBERS.search(name.rpartition(".")[2])
        and not EXPERT.search(name)
    ]


def account(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    refs: Mapping[str, LinearRef],
    quantized: Collection[str],
    kept: Collection[str] = (),
) -> list[DecoderWeight]:
    """What becomes of each matrix.

    Args:
        refs: all linears that could be quantized; those that are not in ``quantized`` were asked to be left.
        kept: tensors that have no linears, and were asked to be left by name.
    """
    parts: dict[str, list[LinearRef]] = {}
    for ref in refs.values():
        parts.setdefault(ref.tensor, []).append(ref)
    weights = []
    for name, info in decoder_matrices(tensors, config).items():
        members, elements = parts.get(name, []), prod(info.shape)
        done = sum(r.n * r.k for r in members if r.name in quantized)
        asked = elements if name in kept else sum(r.n * r.k for r in members) - done
        weights.append(DecoderWeight(name, elements, done, asked))
    return weights


def rest_problems(weights: Collection[DecoderWeight], shapes: Mapping[str, TensorInfo]) -> list[str]:
    """Why a job must not run: too much of the decoder would stay in 16 bits without a word."""
    total = sum(w.elements for w in weights)
    rest = [
        w
        for w in weights
        if w.rest and min(shapes[w.name].shape[-2:]) >= SMALLEST_SIDE and not _NO_MATRIX.search(w.name)
    ]
    left = sum(w.rest for w in rest)
    if not total or left <= LARGEST_REST * total:
        return []
    largest = sorted(rest, key=lambda w: -w.rest)
    named = ", ".join(f"{w.name} {list(shapes[w.name].shape)}" for w in largest[:3])
    more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    return [
        f"{left / total:.0%} of the decoder's weights would stay in 16 bits, because no method here takes "
        f"them: {named}"
        f"{more}. A file of them would be hardly smaller, and vLLM may look for quantized ones: name them "
        "with --ignore "
        "to leave them on purpose"
    ]
