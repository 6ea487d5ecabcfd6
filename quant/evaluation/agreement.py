"""Whether a file holds what its config.json says: one check for every command that works on a checkpoint.

What config.json states is compared without torch. Commands that run or quantize a model, which import torch
anyway, compare every parameter of transformers' class too.
"""

from __future__ import annotations

from quant.checkpoint.reader import Checkpoint
from quant.errors import Problems, QuantError
from quant.formats import QuantizedLayers, find_format
from quant.models.implied import implied_problems


def file_problems(
    checkpoint: Checkpoint, layers: QuantizedLayers | None = None, build: bool = False
) -> list[str]:
    """What headers and config.json of a checkpoint say against each other, a line each; see
    :func:`quant.models.implied.implied_problems`.

    Args:
        layers: its quantized linears, where they have been found already.
        build: where that finds nothing, compare what transformers builds of the config
            (:func:`quant.models.built.built_problems`). Imports torch.
    """
    readable = True
    if layers is None:
        try:
            layers = find_format(checkpoint.config, checkpoint.tensors)
        except QuantError:
            readable = False  # the other tensors can be judged all the same
    linears = layers.linears if layers else {}
    stacks = {n: (x.shape, x.tensors) for n, x in (layers.stacks if layers else {}).items()}
    problems = implied_problems(checkpoint.tensors, checkpoint.config, linears, stacks, checkpoint.is_zero)
    if problems or not build or not readable:
        return problems
    from quant.formats.reading import dequantized
    from quant.models.built import built_problems

    return built_problems(dequantized(checkpoint))


def demand_agreement(*checkpoints: Checkpoint, build: bool = True) -> None:
    """``build``: as in :func:`file_problems`.

    Raises:
        Problems: of any of these checkpoints, :func:`file_problems`.
    """
    problems = [f"{c.path}: {line}" for c in checkpoints for line in file_problems(c, build=build)]
    if problems:
        raise Problems(problems)
