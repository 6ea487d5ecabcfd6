"""Everything that is known before the first block: what goes where, how large it gets, and every problem at
once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from quant import defaults
from quant.calibration.files import empty_texts
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError, Problems, UsageError
from quant.formats import Format, FormatRegistry
from quant.models.account import LARGEST_REST, DecoderWeight, account, decoder_matrices, rest_problems
from quant.models.linears import LinearRef, built_linears, decoder_refs
from quant.models.place import decoder_list
from quant.models.roles import block_list, block_of, leftovers_note
from quant.pipeline.checks import (
    assignment_problems,
    check_disk,
    fused_problems,
    gpu_problems,
    kept_problems,
    method_problems,
    output_problems,
    source_problems,
    stack_problems,
    unlabelled_problems,
)
from quant.pipeline.layout import Unit, lay_out, unquantized_linears
from quant.pipeline.methods import calibrated, make_quantizer, suppressor_of
from quant.pipeline.selection import matches, select, selected
from quant.pipeline.source import QuantizedSource, keep_notes, keepable, read_source
from quant.recipe import Assignment, Recipe
from quant.schemes import Scheme
from quant.vllm.architectures import architecture_problem
from quant.vllm.cache import CACHE_PROJECTIONS
from quant.vllm.config import block_count as stated_block_count
from quant.vllm.config import heads_of, model_types, stated_dtype, text_config
from quant.vllm.layers import (
    Linear,
    built_plain,
    expert_problem,
    form_problem,
    reordered,
    shape_problems,
)
from quant.vllm.names import misplaced_experts, unfound_expert, unread_note


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


def block_count(checkpoint: Checkpoint) -> int:
    """Number of decoder blocks: as config.json says, else as the tensors' names show."""
    stated = stated_block_count(checkpoint.config)
    decoder = decoder_list(checkpoint.tensors.values(), checkpoint.config)
    listed = (block_of(n) for n in checkpoint.tensors if block_list(n) == decoder)
    return stated or 1 + max((b for b in listed if b is not None), default=-1)


def plan_job(recipe: Recipe) -> JobPlan:
    """Checks a job and lays out its output. Reads headers only.

    Raises:
        Problems, QuantError: everything that is wrong, listed together.
    """
    # a wrong name or option is a mistake of the request, whatever else is wrong
    make_quantizer(recipe.assignment(recipe.method))
    form = FormatRegistry.get(recipe.format)
    problems = output_problems(recipe.model_path, recipe.output_path)
    try:
        apart = recipe.keep_quantized and not form.stacked
        checkpoint, source, notes = read_source(recipe.model_path, apart)
    except CheckpointError as error:
        raise Problems([str(error), *problems]) if problems else error from None
    if note := leftovers_note(checkpoint.tensors.values()):
        notes.append(f"{note}, and copied with the rest")
    problems = source_problems(checkpoint, source, recipe) + problems
    dtype = checkpoint.dtype
    if dtype not in ("BF16", "F16", "F32"):
        problems.append(
            f"{checkpoint.path}: most weights are stored as {dtype}: quantizing starts from BF16, F16 or "
            "F32: load it in transformers with dtype=torch.bfloat16, save_pretrained it elsewhere, and "
            "quantize that"
        )
    if form.quant_method is not None:
        # of the scales; a config may state another dtype than the weights are stored in
        dtype = stated_dtype(checkpoint.config) or dtype
    kind = str(text_config(checkpoint.config).get("model_type"))
    if reason := form_problem(kind, form.name):
        raise Problems([*problems, f"{checkpoint.path}: {reason}"])
    refs = decoder_refs(checkpoint.tensors, checkpoint.config)
    for_vllm = recipe.target == "vllm" and form.quant_method is not None
    if for_vllm and (reason := architecture_problem(checkpoint.config, recipe.vllm_version)):
        problems.append(f"{checkpoint.path}: {reason}: use --target other to make it all the same")
    if for_vllm and (reason := misplaced_experts(model_types(checkpoint.config), checkpoint.tensors)):
        problems.append(f"{reason}, or use --target other")
    if for_vllm and (note := unread_note(model_types(checkpoint.config), checkpoint.tensors)):
        notes.append(note)
    plain = _plain(checkpoint, refs) if for_vllm else {}
    plain |= {n: reason for n in refs if n not in plain and (reason := form.leaves(n))}
    everything = [name for name in refs if name not in plain]
    if plain and not everything:
        problems.append(
            f"{checkpoint.path}: there is nothing that vLLM would read quantized: "
            f"{'; '.join(dict.fromkeys(plain.values()))}: serve it as it is, or use --target other or "
            "--format plain"
        )
        raise Problems(problems)
    if not everything:
        problems.append(
            f"{checkpoint.path}: no linear of a decoder block is found among its {len(checkpoint.tensors)} "
            "tensors (names such as model.layers.0.….weight)"
        )
        raise Problems(problems)
    kept, why_not = _kept(recipe, source, everything, plain, block_count(checkpoint), form)
    notes += why_not
    if kept and not set(everything) - set(kept):
        problems.append(
            f"{checkpoint.path}: --keep-quantized leaves nothing to quantize, all {len(kept)} linears are "
            "quantized already: name with --layers what to round anew; quant export-vllm alone turns the "
            "file into another format"
        )
        raise Problems(problems)
    assignments, mistakes = assign(
        recipe,
        [n for n in everything if n not in kept],
        block_count(checkpoint),
        [*_other(checkpoint, refs), *plain, *kept],
    )
    problems += mistakes
    linears = {}
    for name, assignment in assignments.items():
        ref = refs[name]
        scheme = assignment.scheme
        linears[name] = Linear(name, ref.n, ref.k, scheme.weights, scheme.activations, ref.turned)
    left = {} if recipe.layers is not None else ungrouped(linears, checkpoint)
    for name in left:
        del linears[name], assignments[name]
    different = list(dict.fromkeys(assignments.values())) or [recipe.assignment(recipe.method)]
    contradictions = assignment_problems(recipe, different, form)
    problems += [*contradictions, *gpu_problems(recipe, different, form)]
    problems += method_problems(linears, assignments)
    written = {**linears, **kept}
    carried_over = {n: Assignment("kept", x.scheme) for n, x in kept.items()}
    problems += kept_problems(recipe, {x.scheme for x in written.values()}, carried_over.values(), form)
    built = built_linears(checkpoint.tensors, checkpoint.config, written)
    problems += shape_problems(built, recipe.tensor_parallel, heads_of(checkpoint.config))
    if not any("do not divide" in p for p in problems):
        problems += [p for linear in linears.values() for p in form.problems(linear)][:8]
    if recipe.target == "vllm" and not mistakes:  # linears of a rule with a mistake are missing
        kinds = model_types(checkpoint.config)
        problems += fused_problems(written, {**assignments, **carried_over}, everything, form, kinds)
        if form.quant_method is not None:
            advice = "leave them out with --ignore '*.experts.*', or use --target other"
            if reason := expert_problem(kind, written.values(), form.name):
                problems.append(f"{reason}: use that, {advice}")
            if unfound := unfound_expert(kinds, written):
                problems.append(f"{unfound}: {advice}")
    if form.stacked:
        problems += stack_problems(refs.values(), written, form)
    if recipe.calibration_dataset and any(calibrated(recipe, a) for a in different):
        problems += empty_texts(recipe.calibration_dataset)
    caches = kv_scales(everything) if recipe.kv_cache_scheme else {}
    if recipe.kv_cache_scheme and not caches:
        problems.append(
            f"{checkpoint.path}: no layer has any of {', '.join(CACHE_PROJECTIONS)}, beside which vLLM "
            "looks for a cache's scales: leave --kv-cache-scheme out"
        )
    if recipe.kv_cache_scheme and (latent := [n for n in everything if n.endswith(".kv_a_proj_with_mqa")]):
        problems.append(
            f"{latent[0]}: of latent attention vLLM caches the latent itself, and what is measured here are "
            "the keys and values made from it: leave --kv-cache-scheme out"
        )
    # of others no shapes are known
    fitting = [] if any("do not divide" in p for p in problems) else written.values()
    made = [s.name for x in fitting for s in form.specs(x, dtype)] + [
        s.name for specs in caches.values() for s in specs
    ]
    if for_vllm:
        problems += _reordered(written.values(), form, model_types(checkpoint.config))
    problems += rest_problems(
        account(checkpoint.tensors, checkpoint.config, refs, refs, _named(recipe.ignore, checkpoint)),
        checkpoint.tensors,
    )
    problems += unlabelled_problems(checkpoint, made, set(written))
    if problems:
        usage = bool(mistakes) or set(problems) <= set(contradictions)
        raise Problems(list(dict.fromkeys(problems)), exit_code=2 if usage else 1)
    unquantized = tuple(unquantized_linears(checkpoint, written, refs))
    units = lay_out(checkpoint, written, form, dtype, caches, refs)
    plan = JobPlan(
        recipe,
        checkpoint,
        form,
        refs,
        linears,
        assignments,
        unquantized,
        units,
        dtype,
        plain,
        kept,
        source,
        tuple(notes),
        left,
    )
    check_disk(recipe.output_path, plan.disk_bytes)
    return plan


def _plain(checkpoint: Checkpoint, refs: Collection[str]) -> dict[str, str]:
    """The linears that vLLM builds in 16 bits whatever a config says, with the reasons."""
    # what stands beside a linear tells what it is, though it be no linear itself
    beside = (n.removesuffix(".weight") for n in checkpoint.tensors if n.endswith(".weight"))
    reasons = built_plain(dict.fromkeys([*refs, *beside]), checkpoint.config)
    return {name: why for name, why in reasons.items() if name in refs}


def _reordered(linears: Iterable[Linear], form: Format, kinds: Collection[str]) -> list[str]:
    """Linears whose outputs vLLM's loader reorders in a way that their quantized form does not bear, one of
    each kind."""
    reasons: dict[str, str] = {}
    for linear in linears:
        kind = linear.name.rpartition(".")[2]
        if kind not in reasons and reordered(linear.name, linear.scheme, form.name, kinds):
            reasons[kind] = (
                f"{linear.name}: vLLM's loader reorders its outputs, which {linear.scheme} in format "
                f"{form.name} does not bear: use --scheme w8a8-fp8, or --ignore '{kind}'"
            )
    return list(reasons.values())


def _kept(
    recipe: Recipe,
    source: QuantizedSource | None,
    everything: Sequence[str],
    plain: Collection[str],
    blocks: int,
    form: Format,
) -> tuple[dict[str, Linear], list[str]]:
    """Linears of a quantized source whose codes are carried over: all that the format can hold and vLLM
    reads, but those that ``--layers`` names; and why others are not."""
    if not recipe.keep_quantized or source is None:
        return {}, []
    wanted = set(source.layers.linears) - set(plain)
    if recipe.layers is not None:
        wanted -= set(selected(everything, recipe.layers, recipe.ignore, blocks)[0])
    kept, refused = keepable(source, sorted(wanted), form, recipe.target)
    return {n: kept[n] for n in source.layers.linears if n in kept}, keep_notes(refused)


def _other(checkpoint: Checkpoint, refs: Mapping[str, LinearRef]) -> list[str]:
    """Matrices of the decoder that are no linears, which ``--ignore`` may name all the same."""
    taken = {ref.tensor for ref in refs.values()}
    matrices = decoder_matrices(checkpoint.tensors, checkpoint.config)
    return [n.removesuffix(".weight") for n in matrices if n not in taken]


def _named(patterns: Sequence[str], checkpoint: Checkpoint) -> set[str]:
    """Tensors of the decoder that ``--ignore`` names."""
    names = [n.removesuffix(".weight") for n in decoder_matrices(checkpoint.tensors, checkpoint.config)]
    chosen = {n for p in patterns for n in names if matches(n, p)}
    return {n for n in checkpoint.tensors if n.removesuffix(".weight") in chosen}


def ungrouped(linears: Mapping[str, Linear], checkpoint: Checkpoint) -> dict[str, str]:
    """Linears whose inputs do not divide into the groups of their scheme, each with that reason, where they
    are a small part of the decoder (the low-rank matrices of Gemma 3n) and may be left; empty where they are
    more, which is for the request to settle."""
    reasons = {
        name: f"{linear.k} inputs do not divide into groups of {linear.weights.group_size}"
        for name, linear in linears.items()
        if linear.weights.strategy in ("group", "tensor_group") and linear.k % linear.weights.group_size
    }
    total = sum(prod(i.shape) for i in decoder_matrices(checkpoint.tensors, checkpoint.config).values())
    share = sum(linears[name].n * linears[name].k for name in reasons) / max(total, 1)
    return reasons if share <= LARGEST_REST and len(reasons) < len(linears) else {}


def assign(
    recipe: Recipe, everything: Sequence[str], blocks: int, others: Collection[str] = ()
) -> tuple[dict[str, Assignment], list[str]]:
    """What is done to each linear that is quantized, in file order; and every mistake in the selection and
    the rules: one that names nothing, or nothing that a rule before it has not named; a method, scheme or
    setting that is not. Linears that only such a rule names are left out."""
    chosen, problems = selected(everything, recipe.layers, recipe.ignore, blocks, others)
    assignments: dict[str, Assignment | None] = dict.fromkeys(chosen, recipe.assignment(recipe.method))
    ruled: set[str] = set()
    for number, rule in enumerate(recipe.rules, 1):
        hit: list[str] = []
        assignment = None
        try:
            try:
                hit = [n for n in select(everything, rule.layers, [], blocks) if n in assignments]
            except UsageError as error:
                raise UsageError(str(error).replace("--layers", "layers")) from error
            if not hit and chosen:
                raise UsageError(
                    f"layers {rule.layers!r} names no linear that is quantized: change it, or --layers and "
                    "--ignore"
                )
            if hit and ruled.issuperset(hit):
                raise UsageError(
                    f"layers {rule.layers!r} names only linears that rules before it name: put it first, or "
                    "leave it out"
                )
            if not rule.skip:
                assignment = rule.assigned(recipe)
                make_quantizer(assignment)
                if rule.outlier_suppression is not None:
                    suppressor_of(assignment, None)
        except UsageError as error:
            problems.append(f"rule {number}: {error}")
            assignment = None
        assignments |= {n: assignment for n in hit if n not in ruled}
        ruled |= set(hit)
    left = {n: a for n, a in assignments.items() if a is not None}
    if not left and not problems:
        problems.append("no linear is left to quantize: every one is skipped by a rule")
    return left, problems


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
