"""Relative output error of every linear, measured from outside: for checkpoints whose making was not observed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from quant.checkpoint.reader import open_checkpoint
from quant.devices import device_of
from quant.formats.reading import dequantized
from quant.models.skeleton import Skeleton


def output_errors(path: str | Path, against: str | Path, tokens: torch.Tensor, device: str | None = None) -> dict[str, float]:
    """Runs both checkpoints block by block in fp32 on the source's own inputs of each block, and compares what each linear puts out.

    Scales that were moved between layers do not matter to an output, except where a linear's own outputs were scaled for the next one (v for o,
    up for down under AWQ): those are compared at the factor per output that fits best.

    Args:
        path, against: checkpoint and its source; quantized ones are dequantized.
        tokens: token ids, int64 [B, T].

    Returns:
        by linear's name, ‖y' - y‖² / ‖y‖² over all tokens.

    Raises:
        CheckpointError: one of them cannot be read, or cannot be run block by block.
    """
    where = device_of(device)
    here, there = (Skeleton(dequantized(open_checkpoint(p)), where, torch.float32) for p in (path, against))
    (hidden,), calls = there.embed([tokens])
    _, own_calls = here.embed([tokens])
    errors: dict[str, float] = {}
    with torch.no_grad():
        for index in range(there.block_count):
            wanted: dict[str, torch.Tensor] = {}
            found: dict[str, torch.Tensor] = {}
            output = hidden
            for skeleton, call, seen in ((there, calls, wanted), (here, own_calls, found)):
                block = skeleton.load_block(index)
                with _outputs(block, seen):
                    result = block(hidden, *call[len(hidden)][index].args, **call[len(hidden)][index].kwargs)
                skeleton.free_block(index)
                if skeleton is there:
                    output = result[0] if isinstance(result, tuple) else result
            errors |= {there.block_prefix(index) + n: _relative(found[n], y) for n, y in wanted.items() if n in found}
            hidden = output
    return errors


@contextmanager
def _outputs(block: nn.Module, seen: dict[str, torch.Tensor]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Keeps what every linear of a block puts out, [B·T, N]."""
    handles = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):

            def keep(module: nn.Module, args: object, output: torch.Tensor, name: str = name) -> None:
                seen[name] = output.flatten(0, -2)

            handles.append(module.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Error of ``found`` [T, N] relative to ``wanted``, as it is or at the least-squares factor of each column, whichever is smaller by far."""
    energy = wanted.square().sum().clamp_min(1e-30)
    plain = float((found - wanted).square().sum() / energy)
    factor = (found * wanted).sum(0) / found.square().sum(0).clamp_min(1e-30)
    scaled = float((found * factor - wanted).square().sum() / energy)
    # a factor always helps a little; where scales were moved it helps by orders of magnitude
    return scaled if scaled < plain / 4 else plain
