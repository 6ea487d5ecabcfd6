"""What schemes may be chosen among layer by layer: those of a family that the format holds and the target
serves, and the layers of vLLM that each of them is chosen for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quant.checkpoint.writer import TensorSpec
from quant.errors import UsageError
from quant.pipeline.methods import suppressor_of
from quant.pipeline.plan import JobPlan
from quant.planning.target import target_problems
from quant.quantizers import QuantizerRegistry
from quant.recipe import Assignment, Recipe, Rule
from quant.schemes import DEFAULT_SCHEME, SCHEMES, SchemeRegistry, SchemeRow, default_scheme
from quant.vllm.config import heads_of, model_types
from quant.vllm.kernels import GROUP_SIZES
from quant.vllm.layers import Linear, fused_layers, reordered, shape_problems

#: Sizes of groups that are chosen among, by bits and symmetry. With eight bits smaller groups gain next to
#: nothing; with four, zero points gain more for their bytes than the smaller groups of those without.
_GROUPS = {(8, True): (-1,), (4, True): (-1, 128), (4, False): (-1, 128, 64, 32)}


@dataclass(frozen=True)
class Candidate:
    """A scheme with the method that makes it, and the keys of a rule that say so; ``rule`` None: 16 bits."""

    rule: Mapping[str, Any] | None
    assignment: Assignment | None

    @property
    def label(self) -> str:
        """Its name in tables.

        >>> Candidate(None, None).label
        '16 bits'
        """
        if self.assignment is None:
            return "16 bits"
        scheme = self.assignment.scheme
        size = scheme.weights.group_size
        if not scheme.group_size_is_free:
            return scheme.name
        return f"{scheme.name} by {'channel' if size == -1 else f'groups of {size}'}"


@dataclass(frozen=True)
class Item:
    """Linears that take one scheme, because vLLM builds one layer of them.

    Attributes:
        name: of that layer.
        weights: how many.
        sizes: bytes in the file by candidate; None of one that it cannot take.
    """

    name: str
    linears: tuple[str, ...]
    weights: int
    sizes: tuple[int | None, ...]


def family(recipe: Recipe) -> list[SchemeRow]:
    """The rows of a scheme and those finer ones that its layers may take, coarsest first: where nobody has
    said otherwise, integers with zero points beside those without.

    Raises:
        UsageError: it needs more than a scheme.
    """
    name = recipe.scheme or default_scheme(recipe.method)
    asymmetric = f"{name.removesuffix('-asym')}-asym"
    if asymmetric in SCHEMES and recipe.symmetric is not None:
        name = name.removesuffix("-asym") if recipe.symmetric else asymmetric
    rows = [SchemeRegistry.get(name)]
    if asymmetric in SCHEMES and recipe.scheme is None and recipe.symmetric is None:
        rows = [SchemeRegistry.get(name.removesuffix("-asym")), SchemeRegistry.get(asymmetric)]
    while rows[-1].finer:
        rows.append(SchemeRegistry.get(rows[-1].finer))
    if needed := rows[0].needs:
        raise UsageError(
            f"scheme {name!r} needs {' and '.join(needed.values())}, which no choice by layers takes into "
            f"account: use --scheme {DEFAULT_SCHEME}, or leave the size out"
        )
    return rows


def candidates(recipe: Recipe, plan: JobPlan) -> list[Candidate]:
    """What may be chosen, fewest bits first; 16 bits come last.

    Args:
        recipe: without rules; its scheme names the family.
        plan: of the same model, every linear in any scheme.

    Raises:
        UsageError: nothing of the family is served.
    """
    found: list[Candidate] = []
    refused: list[str] = []
    for row in family(recipe):
        for rule in _rules(row, recipe):
            assignment = Rule(layers="*", **rule).assigned(recipe)
            if reason := QuantizerRegistry.get(assignment.method).refuse(assignment.scheme.weights):
                if not row.methods or row.scheme.weights.type == "int":
                    refused.append(f"{row.name}: --method {assignment.method}: {reason}")
                    continue
                rule = {**rule, "method": row.methods[0]}
                assignment = Rule(layers="*", **rule).assigned(recipe)
            scheme = assignment.scheme
            problems = [plan.format.refuse(scheme, recipe.target)]
            if recipe.target == "vllm":
                problems += target_problems(scheme, plan.format.name, recipe.gpu, recipe.vllm_version)
            if reasons := [p for p in problems if p]:
                refused.append(f"{row.name}: {reasons[0]}")
            elif suppressor_of(assignment, None) is not None:
                refused.append(f"{row.name}: --method {assignment.method} scales inputs")
            else:
                found.append(Candidate(rule, assignment))
    if not found:
        raise UsageError(f"no scheme is left to choose: {'; '.join(dict.fromkeys(refused))}")
    return [*found, Candidate(None, None)]


def _rules(row: SchemeRow, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Keys of a rule for each size of groups, largest groups first. A scheme that was asked for has all."""
    if not row.scheme.group_size_is_free:
        yield {"scheme": row.name}
        return
    weights = row.scheme.weights
    every = sorted(GROUP_SIZES, key=lambda g: (g != -1, -g))
    asked = recipe.scheme is not None or recipe.symmetric is not None
    few = weights.bits == 8 or not asked
    for size in _GROUPS.get((weights.bits, weights.symmetric), every) if few else every:
        yield {"scheme": row.name, "group_size": size}


def items_of(plan: JobPlan, pool: Sequence[Candidate]) -> list[Item]:
    """The layers that vLLM builds of a plan's linears, and what each takes of the file in every candidate.
    All routed experts of a layer are one."""
    kinds = model_types(plan.checkpoint.config)
    found = []
    for name, linears in fused_layers(plan.linears, kinds).items():
        sizes = tuple(_bytes(plan, linears, candidate) for candidate in pool)
        weights = sum(plan.linears[n].n * plan.linears[n].k for n in linears)
        found.append(Item(name, tuple(linears), weights, sizes))
    return found


def linear_in(plan: JobPlan, name: str, candidate: Candidate) -> Linear:
    """A linear of the plan in a candidate's scheme."""
    assert candidate.assignment is not None
    scheme = candidate.assignment.scheme
    return replace(plan.linears[name], weights=scheme.weights, activations=scheme.activations)


def _bytes(plan: JobPlan, linears: Sequence[str], candidate: Candidate) -> int | None:
    """What linears take of the file, or None where the candidate does not hold one of them."""
    if candidate.assignment is None:
        refs, source = [plan.refs[n] for n in linears], plan.checkpoint
        # values of a quantized source are stored anew
        kinds = [plan.dtype if r.tensor in source.computed else source.info(r.tensor).dtype for r in refs]
        return sum(TensorSpec("", kind, (r.n, r.k)).nbytes for r, kind in zip(refs, kinds, strict=True))
    config, recipe = plan.checkpoint.config, plan.recipe
    types, heads, total = model_types(config), heads_of(config), 0
    for name in linears:
        linear = linear_in(plan, name, candidate)
        grouped = linear.weights.strategy in ("group", "tensor_group")
        if grouped and linear.k % linear.weights.group_size:
            return None
        if plan.format.problems(linear) or shape_problems([linear], recipe.tensor_parallel, heads):
            return None
        if recipe.target == "vllm" and reordered(name, linear.scheme, plan.format.name, types):
            return None
        total += sum(spec.nbytes for spec in plan.format.specs(linear, plan.dtype))
    return total
