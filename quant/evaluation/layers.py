"""Relative output error of every linear, measured from outside: for checkpoints whose making was not
observed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from quant.accelerator import device_of
from quant.checkpoint.reader import open_checkpoint
from quant.formats.reading import dequantized
from quant.models.calls import call_block
from quant.models.skeleton import Skeleton


def output_errors(
    path: str | Path,
    against: str | Path,
    tokens: torch.Tensor,
    *,
    scaled: bool = False,
) -> dict[str, float]:
    """Runs both checkpoints block by block in fp32 on the source's own inputs of each block, and compares
    what each linear puts out.

    Args:
        path, against: checkpoint and its source; quantized ones are dequantized.
        tokens: token ids, int64 [B, T].
        scaled: the checkpoint may have scales moved between layers. Those in a norm do not matter to an
            output; linears that make the input of another one (v of o, up of down) have scaled outputs, and
            are compared at the factor of each output that fits best.

    Returns:
        by linear's name, ‖y' - y‖² / ‖y‖² over all tokens.

    Raises:
        CheckpointError: one of them cannot be read, or cannot be run block by block.
    """
    where = device_of(None)
    here, there = (Skeleton(dequantized(open_checkpoint(p)), where, torch.float32) for p in (path, against))
    (hidden,), calls = there.embed([tokens])
    _, own_calls = here.embed([tokens])
    errors: dict[str, float] = {}
    sources = {g.source for i in range(there.block_count) for g in there.groups(i)} if scaled else set()
    with torch.no_grad():
        for index in range(there.block_count):
            wanted: dict[str, torch.Tensor] = {}
            inputs: dict[str, torch.Tensor] = {}
            output = hidden
            for skeleton, (call,), seen in ((there, calls, wanted), (here, own_calls, inputs)):
                block = skeleton.load_block(index)
                with _outputs(block, seen):
                    result = call_block(block, hidden, call[index])
                skeleton.free_block(index)
                if skeleton is there:
                    output = result
            prefix = there.block_prefix(index)
            errors |= {
                prefix + n: _relative(inputs[n], y, n in sources) for n, y in wanted.items() if n in inputs
            }
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


def _relative(got: torch.Tensor, wanted: torch.Tensor, scaled: bool) -> float:
    """Error of ``found`` [T, N] relative to ``wanted``; ``scaled``: at the least-squares factor of each
    column."""
    if scaled:
        got = got * ((got * wanted).sum(0) / got.square().sum(0).clamp_min(1e-30))
    return float((got - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30))
