"""Whether a file holds what its config.json says: one check for every command that works on a checkpoint. No
torch."""

from __future__ import annotations

from quant.checkpoint.reader import Checkpoint
from quant.errors import Problems, QuantError
from quant.formats import QuantizedLayers, find_format
from quant.models.implied import implied_problems


def file_problems(checkpoint: Checkpoint, layers: QuantizedLayers | None = None) -> list[str]:
    """What headers and config.json of a checkpoint say against each other, a line each; see
    :func:`quant.models.implied.implied_problems`.

    Args:
        layers: its quantized linears, where they have been found already.
    """
    if layers is None:
        try:
            layers = find_format(checkpoint.config, checkpoint.tensors)
        except QuantError:
            pass  # of a format that is not read here the other tensors can be judged all the same
    return implied_problems(checkpoint.tensors, checkpoint.config, layers.linears if layers else None)


def demand_agreement(*checkpoints: Checkpoint) -> None:
    """
    Raises:
        Problems: of any of these checkpoints, :func:`file_problems`.
    """
    problems = [f"{c.path}: {line}" for c in checkpoints for line in file_problems(c)]
    if problems:
        raise Problems(problems)
