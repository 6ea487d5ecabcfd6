"""Everything that is known before the first block: what goes where, how large it gets, and every problem at
once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from quant import defaults
from quant.calibration.files import empty_texts
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.writer import TensorSpec
from quant.errors import Problems
from quant.formats import Format, FormatRegistry
from quant.models.account import DecoderWeight, account, decoder_matrices, rest_problems
from quant.models.linears import LinearRef
from quant.models.roles import block_of
from quant.pipeline.assigning import (
    MISFIT,
    cache_problems,
    choose,
    decoder_of,
    for_vllm,
    linear_problems,
    read_start,
    reordered_problems,
)
from quant.pipeline.checks import (
    assignment_problems,
    check_disk,
    gpu_problems,
    unlabelled_problems,
)
from quant.pipeline.layout import Unit, lay_out, unquantized_linears
from quant.pipeline.methods import calibrated, make_quantizer
from quant.pipeline.selection import matches
from quant.pipeline.source import QuantizedSource
from quant.recipe import Assignment, Recipe
from quant.schemes import Scheme
from quant.vllm.cache import CACHE_PROJECTIONS
from quant.vllm.config import model_types
from quant.vllm.layers import (
    Linear,
)


@dataclass(frozen=True)
class JobPlan:
    """A job ready to run. ``output_bytes`` is exact: the tensors' names, dtypes and shapes are all fixed
    here.

    Attributes:
        refs: every linear of the decoder's blocks, quantized or not, and where the source stores it.
        linears: those that are quantized; ``assignments`` says how.
        kept: linears of a quantized source whose codes are carried over.
        source: what the source was, where it is quantized already; ``checkpoint`` then has its values.
        notes: what else is to be said of the source.
        unquantized: linears of any part of the model that stay as they are.
        plain: those of the decoder's blocks among them that vLLM builds in 16 bits whatever a config says,
            each with the reason.
        left: those of the decoder's blocks that no group of the scheme fits, each with that reason.
        dtype: header name of the dtype that scales, and plain weights, are stored in.
        allocation: how its schemes were chosen for a size, as
            :meth:`quant.pipeline.mixing.Allocation.to_dict` has it; or None.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    format: Format
    refs: Mapping[str, LinearRef]
    linears: Mapping[str, Linear]
    assignments: Mapping[str, Assignment]
    unquantized: tuple[str, ...]
    units: tuple[Unit, ...]
    dtype: str
    plain: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, Linear] = field(default_factory=dict)
    source: QuantizedSource | None = None
    notes: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    allocation: Mapping[str, Any] | None = None

    @cached_property
    def written(self) -> dict[str, Linear]:
        """The linears that the output holds quantized, those carried over included."""
        return {**self.linears, **self.kept}

    @property
    def source_summary(self) -> dict[str, Any] | None:
        """What the source was, where it is quantized already, and what becomes of its matrices."""
        if self.source is None:
            return {"notes": list(self.notes)} if self.notes else None
        taken = {self.refs[n].tensor for n in self.linears}
        return self.source.summary(taken, self.kept) | {"notes": list(self.notes)}

    @cached_property
    def gradients(self) -> bool:
        """Whether a method of the job asks for gradients of the whole model."""
        return any("gradients" in make_quantizer(a).needs for a in set(self.assignments.values()))

    @property
    def rows(self) -> int:
        """Calibration rows that are read."""
        recipe = self.recipe
        most = recipe.gradient_samples or defaults.GRADIENT_SAMPLES
        return min(recipe.samples, most) if self.gradients else recipe.samples

    @property
    def schemes(self) -> list[Scheme]:
        """The distinct schemes, in the order of the layers."""
        return list(dict.fromkeys(a.scheme for a in self.assignments.values()))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(a.method for a in self.assignments.values()))

    def scheme_dict(self) -> dict[str, Any]:
        """The scheme as a dict; of several, ``mixed`` with its parts."""
        if len(self.schemes) == 1:
            return self.schemes[0].to_dict()
        return {"name": "mixed", "parts": [s.to_dict() for s in self.schemes]}

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(t.spec.nbytes for u in self.units for s in u.shards for t in s.tensors)

    @property
    def disk_bytes(self) -> int:
        """Bytes of its files, those that are copied beside the weights among them."""
        return sum(s.nbytes for u in self.units for s in u.shards) + self.copied_bytes

    @cached_property
    def weights(self) -> list[DecoderWeight]:
        """Every matrix of the decoder and what becomes of it."""
        return account(self.checkpoint.tensors, self.checkpoint.config, self.refs, self.written)

    @cached_property
    def matrix_bytes(self) -> int:
        """Stored bytes of the decoder's matrices, those that stay as they are included."""
        matrices = {w.name for w in self.weights}
        return sum(
            t.spec.nbytes
            for u in self.units
            for s in u.shards
            for t in s.tensors
            if t.linear in self.refs
            or t.stack
            or t.spec.name in matrices
            or (t.part is not None and t.part.tensor in matrices)
        )

    @cached_property
    def bits_per_weight(self) -> float:
        """:attr:`matrix_bytes` by weight, in bits."""
        return round(8 * self.matrix_bytes / sum(w.elements for w in self.weights), 4)

    @property
    def copied(self) -> list[str]:
        """Tensors that are the source's own, those with scaling folded in included."""
        return [t.spec.name for u in self.units for s in u.shards for t in s.tensors if t.copied]

    @property
    def copied_bytes(self) -> int:
        return sum(f.path.stat().st_size for f in self.checkpoint.side_files() if not f.dropped)

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": str(self.checkpoint.path),
            "output_path": str(self.recipe.output_path),
            "method": self.recipe.method,
            "scheme": self.scheme_dict(),
            "format": self.format.name,
            "source_quantization": self.source_summary,
            "linears": len(self.linears),
            "unquantized_linears": list(self.unquantized),
            "plain_in_vllm": dict(self.plain),
            "left": dict(self.left),
            "bits_per_weight": self.bits_per_weight,
            "source_bytes": self.checkpoint.nbytes,
            "output_bytes": self.output_bytes,
            "side_files_bytes": self.copied_bytes,
        }


def plan_job(recipe: Recipe) -> JobPlan:
    """Checks a job and lays out its output. Reads headers only.

    Raises:
        Problems, QuantError: everything that is wrong, listed together.
    """
    # a wrong name or option is a mistake of the request, whatever else is wrong
    make_quantizer(recipe.assignment(recipe.method))
    form = FormatRegistry.get(recipe.format)
    read = read_start(recipe, form)
    checkpoint, dtype = read.checkpoint, read.dtype
    decoder = decoder_of(recipe, form, read)
    choice = choose(recipe, form, read, decoder)
    written = choice.written
    different = choice.different(recipe)
    contradictions = assignment_problems(recipe, different, form)
    problems = [*read.problems, *choice.mistakes, *contradictions, *gpu_problems(recipe, different, form)]
    problems += linear_problems(recipe, form, checkpoint, decoder, choice)
    if recipe.calibration_dataset and any(calibrated(recipe, a) for a in different):
        problems += empty_texts(recipe.calibration_dataset)
    caches = kv_scales(decoder.everything) if recipe.kv_cache_scheme else {}
    if recipe.kv_cache_scheme:
        problems += cache_problems(checkpoint, decoder.everything, caches)
    # of others no shapes are known
    fitting = [] if any(MISFIT in p for p in problems) else written.values()
    made = [s.name for x in fitting for s in form.specs(x, dtype)] + [
        s.name for specs in caches.values() for s in specs
    ]
    if for_vllm(recipe, form):
        problems += reordered_problems(written.values(), form, model_types(checkpoint.config))
    problems += rest_problems(
        account(
            checkpoint.tensors,
            checkpoint.config,
            decoder.refs,
            decoder.refs,
            _named(recipe.ignore, checkpoint),
        ),
        checkpoint.tensors,
    )
    problems += unlabelled_problems(checkpoint, made, set(written))
    if problems:
        usage = bool(choice.mistakes) or set(problems) <= set(contradictions)
        raise Problems(list(dict.fromkeys(problems)), exit_code=2 if usage else 1)
    plan = JobPlan(
        recipe,
        checkpoint,
        form,
        decoder.refs,
        choice.linears,
        choice.assignments,
        tuple(unquantized_linears(checkpoint, written, decoder.refs)),
        lay_out(checkpoint, written, form, dtype, caches, decoder.refs),
        dtype,
        decoder.plain,
        choice.kept,
        read.source,
        tuple(read.notes),
        choice.left,
    )
    check_disk(recipe.output_path, plan.disk_bytes)
    return plan


def _named(patterns: Sequence[str], checkpoint: Checkpoint) -> set[str]:
    """Tensors of the decoder that ``--ignore`` names."""
    names = [n.removesuffix(".weight") for n in decoder_matrices(checkpoint.tensors, checkpoint.config)]
    chosen = {n for p in patterns for n in names if matches(n, p)}
    return {n for n in checkpoint.tensors if n.removesuffix(".weight") in chosen}


def kv_scales(everything: Sequence[str]) -> dict[int, list[TensorSpec]]:
    """By block, the scales of an FP8 KV cache: one number each for K and V, beside the projections they come
    from."""
    scales: dict[int, list[TensorSpec]] = {}
    for name in everything:
        attention, _, last = name.rpartition(".")
        block = block_of(name + ".")
        if block is not None and last in CACHE_PROJECTIONS:
            scales[block] = [TensorSpec(f"{attention}.{x}_scale", "F32", (1,)) for x in "kv"]
    return scales
