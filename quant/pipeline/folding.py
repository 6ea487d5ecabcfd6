"""Where the factors of an outlier suppressor go: into a norm's gain, or into the rows of the linear that
makes the input.

Two rules keep the fold from costing precision. A norm's new gain is rounded to its stored dtype first and the
factors are taken from what it became, so weights are multiplied by exactly what the norm lost. A linear that
is quantized already takes only powers of two, which its scales hold exactly; no code changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from quant.checkpoint.reader import Checkpoint
from quant.models.adapter import InputGroup
from quant.models.linears import LinearRef
from quant.models.sources import shared_heads
from quant.outlier_suppression.base import Place, norm_factors
from quant.report.value import FoldResult
from quant.tensors import QuantizedTensor

#: No factor moves more than this power of two: beyond it, half-precision scales would leave their range.
_LARGEST = 2.0**12


@dataclass(frozen=True)
class Fold:
    """A fold that can be made: of the input of ``group``, whose file names start with ``prefix``.

    Attributes:
        place: what factors must obey.
        norm_offset: of norms, see :class:`quant.models.adapter.ModelAdapter`.
    """

    group: InputGroup
    prefix: str
    place: Place
    norm_offset: float

    @property
    def source(self) -> str:
        return self.prefix + self.group.source


def find_fold(
    group: InputGroup,
    whole: InputGroup,
    prefix: str,
    checkpoint: Checkpoint,
    norm_offset: float,
    head_size: int,
    exact: bool,
    device: torch.device,
) -> Fold | str:
    """The fold of a group's input, or why there is none.

    Args:
        group: the linears that will be scaled alike.
        whole: all that read the same input, in several groups where there are more.
        head_size: features of an attention head, to match heads with the KV heads they share.
        exact: factors of norms must be powers of two as well, as they must where matrices that stay in 16
            bits read the input.
    """
    if not group.source:
        return "the model's adapter does not say what makes the input"
    if set(group.linears) != set(whole.linears):
        others = ", ".join(sorted(set(whole.linears) - set(group.linears)))
        return f"{others} reads the same input and is not scaled with it"
    weight = checkpoint.tensors.get(f"{prefix}{group.source}.weight")
    if weight is None:
        return f"the file has no {prefix}{group.source}.weight"
    if len(weight.shape) == 1:
        return Fold(group, prefix, Place("norm", exact or bool(group.readers)), norm_offset)
    inputs = checkpoint.info(f"{prefix}{group.linears[0]}.weight").shape[1]
    outputs = weight.shape[0]
    if outputs == inputs:
        return Fold(group, prefix, Place("linear", True), 0.0)
    if not group.source.endswith("v_proj") or outputs % head_size or inputs % outputs:
        return f"{group.source} makes {outputs} outputs for {inputs} inputs in a way that is not known"
    return Fold(group, prefix, Place("linear", True, shared_heads(inputs, outputs, head_size, device)), 0.0)


def fold_norm(
    fold: Fold, factors: torch.Tensor, checkpoint: Checkpoint
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The factors as they can be folded, fp32 [K], and the norm's new tensors by file name."""
    name = f"{fold.source}.weight"
    old = checkpoint.read(name).to(factors.device)
    wanted = factors.clamp(1 / _LARGEST, _LARGEST)
    new = ((old.float() + fold.norm_offset) / wanted - fold.norm_offset).to(old.dtype)
    gain = new.float() + fold.norm_offset
    usable = torch.isfinite(gain) & (gain != 0) & (old.float() + fold.norm_offset != 0)
    new = torch.where(usable, new, old)
    changed = {name: new}
    exact = norm_factors(old, new, fold.norm_offset)
    bias = f"{fold.source}.bias"
    if bias in checkpoint.tensors:
        value = checkpoint.read(bias).to(factors.device)
        changed[bias] = (value.float() / exact).to(value.dtype)
    for reader in fold.group.readers:  # factors are powers of two
        value = checkpoint.read(f"{fold.prefix}{reader}.weight").to(factors.device)
        changed[f"{fold.prefix}{reader}.weight"] = (value.float() * exact).to(value.dtype)
    return exact, changed


def fold_linear(
    fold: Fold, factors: torch.Tensor, checkpoint: Checkpoint, done: dict[str, QuantizedTensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The factors (powers of two) as the source can take them, fp32 [K], and what changes in the file; a
    quantized source is replaced in ``done``. Outputs whose scales would leave the range of their dtype keep a
    factor of 1."""
    factors = fold.place.fit(factors.clamp(1 / _LARGEST, _LARGEST))
    quantized = done.get(fold.source)
    outputs = (
        len(quantized.scales) if quantized is not None else checkpoint.info(f"{fold.source}.weight").shape[0]
    )
    rows = torch.ones(outputs, device=factors.device)
    index = (
        fold.place.tied if fold.place.tied is not None else torch.arange(len(factors), device=factors.device)
    )
    rows[index] = factors
    changed = {}
    if quantized is not None:
        rows, scaled = _divided(quantized.scales, rows)
        done[fold.source] = replace(quantized, scales=scaled)
    else:
        stored = checkpoint.read(f"{fold.source}.weight").to(factors.device)
        rows, changed[f"{fold.source}.weight"] = _divided(stored, rows)
    bias = f"{fold.source}.bias"
    if bias in checkpoint.tensors:
        value = checkpoint.read(bias).to(factors.device)
        changed[bias] = (value.float() / rows).to(value.dtype)
    return rows[index], changed


def can_take_rows(tensor: QuantizedTensor | None) -> bool:
    """Whether a source's rows can be scaled one by one: it is not quantized, or has floating scales of its
    own for each row."""
    return tensor is None or (
        tensor.scales.dtype.is_floating_point and tensor.scheme.strategy in ("group", "channel")
    )


def _divided(values: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``values`` [N, …] divided by ``rows`` [N] where that is exact, and the rows that were used."""
    divided = (values.float() / rows.unsqueeze(-1)).to(values.dtype)
    exact = (divided.float() * rows.unsqueeze(-1) == values.float()).all(-1)
    return torch.where(exact, rows, 1.0), torch.where(exact.unsqueeze(-1), divided, values)


def unfolded(
    weights: dict[str, torch.Tensor],
    folds: Iterable[FoldResult],
    source: Checkpoint,
    written: Checkpoint,
    refs: Mapping[str, LinearRef],
) -> None:
    """Puts the weights of a finished block, read back from its shards, in the form in which the block ran:
    norm folds are undone, so that the replay multiplies what the first run did. Folds into linears are powers
    of two and stay; their changed tensors are added."""
    for fold in folds:
        if fold.kind == "norm":
            name = f"{fold.source}.weight"
            factors = norm_factors(source.read(name), written.read(name), fold.norm_offset)
            for linear in fold.linears:
                ref = refs.get(linear)
                if (weight := weights.get(f"{linear}.weight")) is not None:
                    weights[f"{linear}.weight"] = weight / factors
                elif ref is not None and ref.tensor in weights:  # a part of a tensor in a plain file
                    ref.weight.view(weights[ref.tensor]).div_(factors)
                # else it is read as the source has it
        else:
            weights.update({n: written.read(n) for n in fold.changed})
