"""Several checkpoints of one model beside one another: what each costs in bits per weight, and what it
lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import Problems, QuantError, UsageError, VerificationFailed
from quant.evaluation.quality import Evaluation, Source, evaluate
from quant.evaluation.texts import Sample
from quant.formats import find_format
from quant.formats.reading import dequantized
from quant.models.account import decoder_matrices
from quant.models.linears import decoder_refs
from quant.progress import Progress, silent


@dataclass(frozen=True)
class Compared:
    """One of them.

    Attributes:
        scheme: the schemes of its quantized linears by name; ``none`` where none is quantized.
        bits_per_weight: stored bits of all linears of the decoder's blocks, quantized or not, with scales,
            zero points and all else that belongs to them, over the number of their weights; None where their
            tensors have other names than in the source.
        total_bytes: of all tensors.
    """

    evaluation: Evaluation
    scheme: str
    bits_per_weight: float | None
    total_bytes: int

    def to_dict(self) -> dict[str, Any]:
        own = {
            "scheme": self.scheme,
            "bits_per_weight": self.bits_per_weight,
            "total_bytes": self.total_bytes,
        }
        return self.evaluation.to_dict() | own


def compare_outputs(
    paths: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    length: int | None = None,
    chunks: int | None = None,
    domains: bool = False,
    long_context: bool = False,
    device: str | None = None,
    progress: Progress = silent,
    failed: Callable[[str, QuantError], None] | None = None,
) -> Iterator[Compared]:
    """Measures each checkpoint on the same chunks, one after the other; the source runs once. See
    :func:`quant.evaluation.quality.evaluate`.

    Args:
        failed: is told of a checkpoint that cannot be run, and the others go on; None: its error is raised.

    Raises:
        Problems: checkpoints that cannot be read or are named twice; all of them, before anything runs.
        QuantError: one that cannot be run.
    """
    sample = Sample(None if text is None else Path(text), length, chunks, domains, long_context)
    checkpoints: list[Checkpoint] = []
    problems = [f"{p} is named twice" for i, p in enumerate(paths) if Path(p) in map(Path, paths[:i])]
    for path in [*paths, *([] if against is None else [against])]:
        try:
            checkpoint = open_checkpoint(path)
            find_format(checkpoint.config, checkpoint.tensors)
            checkpoints.append(checkpoint)
        except QuantError as error:
            problems.append(str(error))
    if problems:
        raise Problems(problems)
    length = sample.resolved(*checkpoints)
    source = None if against is None else Source(against, sample, length, device, progress)
    origin = checkpoints[-1] if against is not None else None
    for path, checkpoint in zip(paths, checkpoints, strict=False):
        try:
            measured = evaluate(
                path,
                against=source,
                text=text,
                length=length,
                chunks=chunks,
                domains=domains,
                long_context=long_context,
                device=device,
                progress=progress,
            )
        except QuantError as error:
            if failed is None or isinstance(error, UsageError):
                raise
            failed(str(path), error)
            continue
        yield Compared(
            measured,
            scheme_names(checkpoint),
            bits_per_weight(checkpoint, origin or checkpoint),
            checkpoint.nbytes,
        )


def scheme_names(checkpoint: Checkpoint) -> str:
    layers = find_format(checkpoint.config, checkpoint.tensors)
    linears = layers.linears.values() if layers else ()
    return " + ".join(dict.fromkeys(str(x.scheme) for x in linears)) or "none"


def bits_per_weight(checkpoint: Checkpoint, origin: Checkpoint) -> float | None:
    """Stored bits over the number of weights, of the matrices that ``origin``'s decoder blocks have; None
    where one of them is not there under its name."""
    source = dequantized(origin)
    matrices = decoder_matrices(source.tensors, source.config)
    holder = {ref.name: ref.tensor for ref in decoder_refs(source.tensors, source.config).values()}
    stored = dict.fromkeys(matrices, 0)
    for name, info in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        matrix = name if name in stored else holder.get(module, "")
        if matrix in stored and last != "bias":
            stored[matrix] += info.nbytes
    if not stored or not all(stored.values()):
        return None
    return 8 * sum(stored.values()) / sum(prod(i.shape) for i in matrices.values())


def demand(done: Sequence[Compared], limit: float | None) -> None:
    """
    Raises:
        VerificationFailed: naming every checkpoint that :meth:`Evaluation.demand` fails.
    """
    failed = []
    for one in done:
        try:
            one.evaluation.demand(limit)
        except VerificationFailed as error:
            failed.append(str(error))
    if failed:
        raise VerificationFailed("\n  ".join(failed))
