"""What a job starts from, what becomes of each linear, and what speaks against it: the stages of
:func:`quant.pipeline.plan.plan_job`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError, Problems, UsageError
from quant.formats import Format
from quant.models.account import LARGEST_REST, decoder_matrices
from quant.models.linears import LinearRef, built_linears, decoder_refs
from quant.models.place import decoder_list
from quant.models.roles import block_list, block_of, leftovers_note
from quant.models.vectors import lost_bias
from quant.pipeline.checks import (
    fused_problems,
    kept_problems,
    method_problems,
    output_problems,
    source_problems,
    stack_problems,
)
from quant.pipeline.methods import make_quantizer, suppressor_of
from quant.pipeline.selection import select, selected
from quant.pipeline.source import QuantizedSource, keep_notes, keepable, read_source
from quant.recipe import Assignment, Recipe
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
class Start:
    """What a job starts from. ``dtype``: header name of the dtype that scales and plain weights get."""

    checkpoint: Checkpoint
    source: QuantizedSource | None
    dtype: str
    notes: list[str]
    problems: list[str]


@dataclass(frozen=True)
class Decoder:
    """The linears of the decoder's blocks: all, and ``plain`` those that stay in 16 bits whatever is asked,
    each with the reason; ``everything`` is the rest, which may be quantized."""

    refs: Mapping[str, LinearRef]
    plain: dict[str, str]
    everything: list[str]


@dataclass(frozen=True)
class Choice:
    """What becomes of each linear. ``mistakes``: faults of the request that left linears unassigned."""

    kept: dict[str, Linear]
    assignments: dict[str, Assignment]
    linears: dict[str, Linear]
    left: dict[str, str]
    mistakes: list[str]

    @cached_property
    def written(self) -> dict[str, Linear]:
        return {**self.linears, **self.kept}

    @cached_property
    def carried_over(self) -> dict[str, Assignment]:
        return {n: Assignment("kept", x.scheme) for n, x in self.kept.items()}

    def different(self, recipe: Recipe) -> list[Assignment]:
        """The distinct assignments; the recipe's own where nothing is assigned."""
        return list(dict.fromkeys(self.assignments.values())) or [recipe.assignment(recipe.method)]


def for_vllm(recipe: Recipe, form: Format) -> bool:
    """Whether vLLM is to read the output as quantized."""
    return recipe.target == "vllm" and form.quant_method is not None


def read_start(recipe: Recipe, form: Format) -> Start:
    """The source, and what is wrong with it and with where the output shall be."""
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
    kinds = model_types(checkpoint.config)
    if reason := form_problem(_kind(checkpoint), form.name):
        raise Problems([*problems, f"{checkpoint.path}: {reason}"])
    if for_vllm(recipe, form):
        if reason := architecture_problem(checkpoint.config, recipe.vllm_version):
            problems.append(f"{checkpoint.path}: {reason}: use --target other to make it all the same")
        if reason := lost_bias(checkpoint.tensors, checkpoint.config, checkpoint.is_zero):
            problems.append(f"{reason}: use --target other to make it all the same")
        if reason := misplaced_experts(kinds, checkpoint.tensors):
            problems.append(f"{reason}, or use --target other")
        if note := unread_note(kinds, checkpoint.tensors):
            notes.append(note)
    return Start(checkpoint, source, dtype, notes, problems)


def _kind(checkpoint: Checkpoint) -> str:
    """``model_type`` of its text decoder."""
    return str(text_config(checkpoint.config).get("model_type"))


def decoder_of(recipe: Recipe, form: Format, read: Start) -> Decoder:
    """The linears that there are.

    Raises:
        Problems: there is none that could be quantized.
    """
    checkpoint = read.checkpoint
    refs = decoder_refs(checkpoint.tensors, checkpoint.config)
    plain = _plain(checkpoint, refs) if for_vllm(recipe, form) else {}
    plain |= {n: reason for n in refs if n not in plain and (reason := form.leaves(n))}
    everything = [name for name in refs if name not in plain]
    if everything:
        return Decoder(refs, plain, everything)
    if plain:
        problem = (
            f"{checkpoint.path}: there is nothing that vLLM would read quantized: "
            f"{'; '.join(dict.fromkeys(plain.values()))}: serve it as it is, or use --target other or "
            "--format plain"
        )
    else:
        problem = (
            f"{checkpoint.path}: no linear of a decoder block is found among its {len(checkpoint.tensors)} "
            "tensors (names such as model.layers.0.….weight)"
        )
    raise Problems([*read.problems, problem])


def _plain(checkpoint: Checkpoint, refs: Collection[str]) -> dict[str, str]:
    """The linears that vLLM builds in 16 bits whatever a config says, with the reasons."""
    # what stands beside a linear tells what it is, though it be no linear itself
    beside = (n.removesuffix(".weight") for n in checkpoint.tensors if n.endswith(".weight"))
    reasons = built_plain(dict.fromkeys([*refs, *beside]), checkpoint.config)
    return {name: why for name, why in reasons.items() if name in refs}


def choose(recipe: Recipe, form: Format, read: Start, decoder: Decoder) -> Choice:
    """What the request makes of each linear; why codes are not carried over goes to the notes.

    Raises:
        Problems: all is quantized already, and to be kept so.
    """
    checkpoint, everything = read.checkpoint, decoder.everything
    blocks = block_count(checkpoint)
    kept, why_not = _kept(recipe, read.source, everything, decoder.plain, blocks, form)
    read.notes.extend(why_not)
    if kept and not set(everything) - set(kept):
        problem = (
            f"{checkpoint.path}: --keep-quantized leaves nothing to quantize, all {len(kept)} linears are "
            "quantized already: name with --layers what to round anew; quant export-vllm alone turns the "
            "file into another format"
        )
        raise Problems([*read.problems, problem])
    names = [n for n in everything if n not in kept]
    others = [*_other(checkpoint, decoder.refs), *decoder.plain, *kept]
    assignments, mistakes = assign(recipe, names, blocks, others)
    linears = {}
    for name, assignment in assignments.items():
        ref = decoder.refs[name]
        scheme = assignment.scheme
        linears[name] = Linear(name, ref.n, ref.k, scheme.weights, scheme.activations, ref.turned)
    left = {} if recipe.layers is not None else ungrouped(linears, checkpoint)
    for name in left:
        del linears[name], assignments[name]
    return Choice(kept, assignments, linears, left, mistakes)


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


def block_count(checkpoint: Checkpoint) -> int:
    """Number of decoder blocks: as config.json says, else as the tensors' names show."""
    stated = stated_block_count(checkpoint.config)
    decoder = decoder_list(checkpoint.tensors.values(), checkpoint.config)
    listed = (block_of(n) for n in checkpoint.tensors if block_list(n) == decoder)
    return stated or 1 + max((b for b in listed if b is not None), default=-1)


# of messages about a group that does not divide a row
MISFIT = "do not divide"


def linear_problems(
    recipe: Recipe, form: Format, checkpoint: Checkpoint, decoder: Decoder, choice: Choice
) -> list[str]:
    """What is wrong with the linears: methods, shapes, what vLLM fuses, where experts stand."""
    linears, written, carried_over = choice.linears, choice.written, choice.carried_over
    problems = method_problems(linears, choice.assignments)
    problems += kept_problems(recipe, {x.scheme for x in written.values()}, carried_over.values(), form)
    built = built_linears(checkpoint.tensors, checkpoint.config, written)
    problems += shape_problems(built, recipe.tensor_parallel, heads_of(checkpoint.config))
    if not any(MISFIT in p for p in problems):
        problems += [p for linear in linears.values() for p in form.problems(linear)][:8]
    if recipe.target == "vllm" and not choice.mistakes:  # linears of a rule with a mistake are missing
        kinds = model_types(checkpoint.config)
        both = {**choice.assignments, **carried_over}
        problems += fused_problems(written, both, decoder.everything, form, kinds)
        if form.quant_method is not None:
            advice = "leave them out with --ignore '*.experts.*', or use --target other"
            if reason := expert_problem(_kind(checkpoint), written.values(), form.name):
                problems.append(f"{reason}: use that, {advice}")
            if unfound := unfound_expert(kinds, written):
                problems.append(f"{unfound}: {advice}")
    if form.stacked:
        problems += stack_problems(decoder.refs.values(), written, form)
    return problems


def cache_problems(
    checkpoint: Checkpoint, everything: Sequence[str], caches: Mapping[int, Sequence[TensorSpec]]
) -> list[str]:
    """What keeps the scales of a quantized KV cache from being measured."""
    problems = []
    if not caches:
        problems.append(
            f"{checkpoint.path}: no layer has any of {', '.join(CACHE_PROJECTIONS)}, beside which vLLM "
            "looks for a cache's scales: leave --kv-cache-scheme out"
        )
    if latent := [n for n in everything if n.endswith(".kv_a_proj_with_mqa")]:
        problems.append(
            f"{latent[0]}: of latent attention vLLM caches the latent itself, and what is measured here are "
            "the keys and values made from it: leave --kv-cache-scheme out"
        )
    return problems


def reordered_problems(linears: Iterable[Linear], form: Format, kinds: Collection[str]) -> list[str]:
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
