"""What a checkpoint holds, by what its tensors are for."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from quant.checkpoint.reader import Checkpoint
from quant.formats import find_format
from quant.formats.reading import quantized_tensors
from quant.models.place import decoder_list
from quant.models.roles import Role, role_of
from quant.vllm.config import block_count


@dataclass
class Share:
    """Of a role: weights, quantized ones counted as those that they stand for; and bytes, those of scales,
    zero points and all else included."""

    weights: int = 0
    stored: int = 0


def contents(checkpoint: Checkpoint) -> dict[Role, Share]:
    """What a checkpoint holds for each role. Reads headers only.

    Raises:
        CheckpointError: quantized in a way that is not read here.
    """
    layers = find_format(checkpoint.config, checkpoint.tensors)
    blocks = block_count(checkpoint.config)
    decoder = decoder_list(checkpoint.tensors.values(), checkpoint.config)
    owners = {} if layers is None else quantized_tensors(checkpoint, layers)
    shares: dict[Role, Share] = {}

    def share(name: str) -> Share:
        return shares.setdefault(role_of(name, blocks, decoder), Share())

    for name, info in checkpoint.tensors.items():
        whole = owners.get(name)
        share(whole or name).stored += info.nbytes
        if whole is None:
            share(name).weights += info.numel
    if layers is not None:
        for linear in layers.linears.values():
            share(f"{linear.name}.weight").weights += linear.n * linear.k
        for stack in layers.stacks.values():
            share(stack.name).weights += prod(stack.shape)
    return shares
