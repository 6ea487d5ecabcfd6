"""A scheme for every layer, so that a checkpoint of a given size loses as little as possible.

The layers that vLLM builds are items of a knapsack (:mod:`quant.planning.allocation`): each takes one of the
candidates of :mod:`quant.pipeline.candidates`, whose bytes the format knows and whose loss
:mod:`quant.pipeline.survey` finds. The choice is measured on rows that nothing was calibrated with, beside
the best scheme of the same size for all layers, and given up where that one is better. What comes out is a
recipe with rules, and the job goes on as any other with rules does: nothing but the rules decides its bytes.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant import defaults
from quant.calibration.text import Rows
from quant.checkpoint.journal import WorkFolder
from quant.errors import NoGradients, NothingFits, Problems, QuantError, UsageError
from quant.hardware import detect
from quant.models.skeleton import Skeleton
from quant.pipeline.candidates import Candidate, Item, candidates, family, items_of
from quant.pipeline.checks import check_disk
from quant.pipeline.gradients import Seen, gradient_problem
from quant.pipeline.manager import CALIBRATION, QuantizationManager
from quant.pipeline.plan import JobPlan, plan_job
from quant.pipeline.retry import in_smaller_batches, memory_exhausted
from quant.pipeline.rows import later_rows
from quant.pipeline.survey import BOTH, Judge, Losses, Survey, asked_of, routed_modules, surveyed
from quant.planning.allocation import allocate as knapsack
from quant.planning.fitting import fitting_bytes
from quant.planning.request import EngineRequest
from quant.progress import Event, Progress, silent
from quant.quantizers import QuantizerRegistry
from quant.recipe import FP8_METHOD, MIXING, Recipe, make_recipe
from quant.schemes import DEFAULT_SCHEME, default_scheme
from quant.units import format_size

#: Tokens that choices are judged on.
JUDGED = 16384


@dataclass(frozen=True)
class Budget:
    """What the items may take of the file.

    Attributes:
        nbytes: of all items.
        others: bytes of the rest of what the target counts.
        weights: of the decoder, where the target is in bits; 0: it is in bytes.
        option: what asked for it, in words.
    """

    nbytes: int
    others: int
    weights: int
    option: str

    def shown(self, nbytes: int, up: bool = False) -> str:
        """The size of the target's kind where items take so many bytes; ``up``: a number that is enough."""
        total = nbytes + self.others
        if not self.weights:
            return f"{format_size(total)} ({total} bytes)"
        bits = 8 * total / self.weights
        return f"{(math.ceil(bits * 1e4) if up else math.floor(bits * 1e4)) / 1e4:g} bits"


@dataclass(frozen=True)
class Prepared:
    """All that is known before a model is run.

    Attributes:
        recipe: without a size, one scheme for all.
    """

    recipe: Recipe
    plan: JobPlan
    pool: tuple[Candidate, ...]
    items: tuple[Item, ...]
    budget: Budget

    @property
    def least(self) -> int:
        """Bytes of the items, each in its smallest candidate."""
        return sum(min(s for s in item.sizes if s is not None) for item in self.items)

    @property
    def most(self) -> int:
        """Bytes of the items in 16 bits."""
        return sum(item.sizes[-1] or 0 for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """What ``--dry-run`` says."""
        quantized = sum(max(s for s in item.sizes[:-1] if s is not None) for item in self.items)
        return {
            "target": self.budget.option,
            "budget_bytes": self.budget.nbytes,
            "layers": len(self.items),
            "candidates": [c.label for c in self.pool],
            "reachable": [self.budget.shown(self.least, up=True), self.budget.shown(self.most)],
            "all_quantized": self.budget.shown(quantized, up=True),
            "scratch_bytes": self.scratch_bytes,
        }

    @property
    def scratch_bytes(self) -> int:
        """Bytes of what every candidate makes, which wait until the choice has been judged."""
        return sum(s for item in self.items for s in item.sizes[:-1] if s is not None)


@dataclass(frozen=True)
class Allocation:
    """What was chosen, and why; ``recipe`` makes it."""

    recipe: Recipe
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.facts)


def request_problems(recipe: Recipe) -> list[str]:
    """What in a request leaves nothing to choose, or cannot be chosen for."""
    problems = []
    sizes = [f"--{k.replace('_', '-')}" for k in ("target_bits", "target_size", "fit") if getattr(recipe, k)]
    if len(sizes) > 1:
        problems.append(f"{' and '.join(sizes)} are both sizes: give one of them")
    if recipe.backend != defaults.ENGINE:
        problems.append(f"{sizes[0]}: {recipe.backend} makes one scheme: use --backend native")
    if recipe.rules:
        problems.append(
            f"{sizes[0]} chooses a scheme for every layer, and the rules name some: leave one out"
        )
    if given := [k for k in ("bits", "group_size", "activations") if getattr(recipe, k) is not None]:
        options = ", ".join(f"--{k.replace('_', '-')}" for k in given)
        problems.append(f"{sizes[0]} chooses it for every layer: leave {options} out")
    if recipe.keep_quantized:
        problems.append(f"{sizes[0]} rounds every layer anew: leave --keep-quantized out")
    if recipe.outlier_suppression not in (None, "none"):
        problems.append(
            f"{sizes[0]} takes no scaling of inputs into account: leave --outlier-suppression out"
        )
    if recipe.format != defaults.FORMAT:
        problems.append(
            f"{sizes[0]}: a {recipe.format} file holds one scheme: use --format {defaults.FORMAT}"
        )
    if recipe.method == "none":
        problems.append(f"{sizes[0]}: --method none rounds nothing: use --method gptq")
    if recipe.fit and recipe.gpu is None and not detect().gpus:
        problems.append(
            "--fit asks for the memory of the GPU here, and there is none: name the one that will serve it "
            "(--gpu L40S-48GB), or give --target-size"
        )
    if not recipe.fit and (
        given := [k for k in ("context", "concurrency") if getattr(recipe, k) is not None]
    ):
        problems.append(f"--{given[0]} belongs to --fit: leave it out, or give that")
    return problems


def prepare(recipe: Recipe) -> Prepared:
    """Checks a job that is to reach a size, and says what there is to choose among. Headers are read only.

    Raises:
        Problems, UsageError: what is wrong with the request.
        NothingFits: no choice is that small.
        QuantError: all that a job with the coarsest scheme would raise.
    """
    if problems := request_problems(recipe):
        raise Problems(problems, exit_code=2)
    base, plan = _base(recipe)
    pool = tuple(candidates(recipe.model_copy(update=dict.fromkeys(MIXING[:2])), plan))
    items = tuple(items_of(plan, pool))
    prepared = Prepared(base, plan, pool, items, _budget(recipe, plan))
    budget = prepared.budget
    reach = f"{budget.shown(prepared.least, up=True)} to {budget.shown(prepared.most)}"
    if budget.nbytes < prepared.least:
        raise NothingFits(
            f"{budget.option}: out of reach: {', '.join(dict.fromkeys(c.label for c in pool))} give {reach}"
        )
    if budget.nbytes >= prepared.most:
        raise UsageError(
            f"{budget.option}: the whole model fits in 16 bits ({reach}): there is nothing to quantize; "
            "give less"
        )
    return prepared


def _base(recipe: Recipe) -> tuple[Recipe, JobPlan]:
    """The recipe without a size, one scheme for all layers, and its plan: the finest that every layer can
    take.

    Raises:
        QuantError: not even the coarsest is one.
    """
    left_out = {*MIXING, "symmetric", *([] if recipe.method == "yaqa" else ["gradient_samples"])}
    values = {k: getattr(recipe, k) for k in recipe.model_fields_set if k not in left_out}
    rows = family(recipe)
    for row in reversed(rows):
        numbers = {"scheme": row.name} | ({"group_size": -1} if row.scheme.group_size_is_free else {})
        refused = QuantizerRegistry.get(FP8_METHOD if recipe.method == "fp8" else recipe.method).refuse
        method = {"method": row.methods[0]} if refused(row.scheme.weights) and row.methods else {}
        # settings of the job's own method are none of another's
        given = {k: v for k, v in values.items() if not (method and k == "options")}
        base = make_recipe({**given, **numbers, **method})
        try:
            return base, plan_job(base)
        except QuantError:
            if row == rows[0]:
                raise
    raise AssertionError


def _budget(recipe: Recipe, plan: JobPlan) -> Budget:
    items = sum(sum(s.nbytes for s in plan.format.specs(x, plan.dtype)) for x in plan.linears.values())
    if recipe.target_bits is not None:
        weights = sum(w.elements for w in plan.weights)
        others = plan.matrix_bytes - items
        allowed = math.floor(recipe.target_bits * weights / 8)
        return Budget(allowed - others, others, weights, recipe.size_asked)
    others = plan.output_bytes - items
    if recipe.target_size is not None:
        return Budget(recipe.target_size - others, others, 0, recipe.size_asked)
    ranks = recipe.tensor_parallel if "tensor_parallel" in recipe.model_fields_set else None
    request = EngineRequest(
        context=recipe.context,
        concurrency=recipe.concurrency or 1,
        tensor_parallel=ranks,
        vllm_version=recipe.vllm_version,
    )
    scheme = recipe.scheme or default_scheme(recipe.method)
    allowed = fitting_bytes(recipe.model_path, recipe.gpu, request, scheme)
    return Budget(allowed - others, others, 0, f"{recipe.size_asked} ({format_size(allowed)})")


def allocate(recipe: Recipe, progress: Progress = silent) -> Allocation:
    """Chooses a scheme for every layer of a job.

    What was found is kept beside the output until the job is finished, so that the same command goes on.

    Raises:
        QuantError: see :func:`prepare`; or no gradient can be taken through the model.
    """
    prepared = prepare(recipe)
    check_disk(_folder(recipe), prepared.scratch_bytes)
    facts = in_smaller_batches(
        lambda tokens: QuantizationManager(prepared.plan, batch_tokens=tokens),
        lambda manager: _decided(recipe, prepared, manager, progress),
    )
    for sentence in facts["notes"]:
        progress(Event("compare", message=sentence))
    return Allocation(_recipe(recipe, prepared, facts["picks"]), facts)


def _decided(
    recipe: Recipe, prepared: Prepared, manager: QuantizationManager, progress: Progress
) -> dict[str, Any]:
    """What was chosen, as the journal has it."""
    rows, skeleton = seen(prepared, manager)
    limit = min(recipe.gradient_samples or defaults.GRADIENT_SAMPLES, len(rows.tokens))
    tokens = rows.tokens[:limit]
    fingerprint = manager.fingerprint(rows) | {
        "gradient_rows": limit,
        "candidates": [c.label for c in prepared.pool],
    }
    # blocks that were finished before memory ran out are not what --fresh is to leave aside
    work = WorkFolder(_folder(recipe), fingerprint, recipe.fresh and not manager.workspace.smaller)
    try:
        key = f"choice for {prepared.budget.option}"
        if key not in work.finished:
            with memory_exhausted(manager.device):
                demand_gradients(prepared, skeleton)
                survey = Survey(manager, prepared.pool, prepared.items, work, progress)
                losses = survey.run(skeleton, tokens, rows.held_out)
                chosen = _chosen(prepared, survey, losses, progress)
            work.finish_unit(key, {}, {"chosen": chosen})
        found: dict[str, Any] = work.finished[key]["chosen"]
    finally:
        work.release()
    return found


def seen(prepared: Prepared, manager: QuantizationManager, instead: str = "") -> tuple[Rows, Skeleton]:
    """The job's calibration rows and its model.

    Raises:
        QuantError: see :meth:`QuantizationManager.prepare`.
    """
    try:
        return manager.prepare()
    except NoGradients as error:
        raise QuantError(f"{error.problem}: {instead or _without(prepared)}") from error


def _without(prepared: Prepared) -> str:
    """What to do where no gradients go through a model."""
    return f"{prepared.budget.option.partition(' ')[0]} needs gradients: use --scheme, which needs none"


def demand_gradients(prepared: Prepared, skeleton: Skeleton, instead: str = "") -> None:
    """
    Args:
        instead: what to do where there are none; empty: what a job of ``quantize`` can.

    Raises:
        QuantError: no gradient can be taken through the model, or what its experts lose cannot be told.
    """
    rounded = any(c.assignment is not None and c.assignment.scheme.activations for c in prepared.pool)
    for index in range(skeleton.block_count):
        names, places = surveyed(prepared.items, skeleton, index), skeleton.linears(index)
        routed = routed_modules(skeleton, index)
        for name, local in names.items():
            if local in routed and rounded:
                raise QuantError(
                    f"{name}: what rounded inputs of routed experts lose is not weighed: {_without(prepared)}"
                )
            if local not in routed and places[local].shared:
                raise QuantError(
                    f"{name}: a part of a parameter that holds several cannot be weighed: "
                    f"{instead or _without(prepared)}"
                )

    def wanted(index: int) -> Seen:
        return asked_of(skeleton, index, surveyed(prepared.items, skeleton, index).values(), BOTH)

    if problem := gradient_problem(skeleton, wanted):
        raise QuantError(f"{problem}: {instead or _without(prepared)}")


def forget(recipe: Recipe) -> None:
    """Removes what was kept beside a finished output."""
    shutil.rmtree(_folder(recipe).with_name(f"{_folder(recipe).name}.work"), ignore_errors=True)


def _folder(recipe: Recipe) -> Path:
    output = recipe.output_path.absolute()
    return output.with_name(f"{output.name}.choice")


def item_losses(prepared: Prepared, losses: Losses) -> list[list[float | None]]:
    """Of each item what it loses in each candidate; None of candidates that it cannot take."""
    found = []
    for item in prepared.items:
        known = [losses.get(n) for n in item.linears]
        row: list[float | None] = []
        for number, size in enumerate(item.sizes):
            each = [own[number] for own in known if own is not None]
            missing = size is None or len(each) < len(known) or any(x is None for x in each)
            row.append(None if missing else sum(x for x in each if x is not None))
        found.append(row)
    return found


def _chosen(prepared: Prepared, survey: Survey, losses: Losses, progress: Progress) -> dict[str, Any]:
    """The choice, judged, as plain values."""
    items, pool = prepared.items, prepared.pool
    found = item_losses(prepared, losses)
    unseen = [i for i, row in enumerate(found) if row[-1] is None]
    # what no token goes through has no loss to weigh: it takes the finest scheme that is none of 16 bits
    fixed = {i: max(n for n, s in enumerate(items[i].sizes[:-1]) if s is not None) for i in unseen}
    choices = []
    for i, (item, row) in enumerate(zip(items, found, strict=True)):
        numbers = [fixed[i]] if i in fixed else [n for n, x in enumerate(row) if x is not None]
        choices.append([(n, item.sizes[n] or 0, row[n] or 0.0) for n in numbers])
    made = knapsack([[(size, lost) for _, size, lost in own] for own in choices], prepared.budget.nbytes)
    if made is None:
        raise NothingFits(
            f"{prepared.budget.option}: out of reach: {len(fixed)} layers that no token goes through take "
            f"{pool[next(iter(fixed.values()))].label}"
        )
    picks = [own[p][0] for own, p in zip(choices, made.picks, strict=True)]
    uniform = _best_uniform(prepared, found, fixed)
    rows, apart = later_rows(prepared.plan, JUDGED)
    rivals = [picks, *([uniform[1]] if uniform is not None else [])]
    judged = Judge(survey, rows).measure([by_linear(items, p) for p in rivals])
    return _told(prepared, found, picks, made.gap, uniform, judged, rows.shape, apart, fixed)


def by_linear(items: Sequence[Item], picks: Sequence[int]) -> dict[str, int]:
    return {name: pick for item, pick in zip(items, picks, strict=True) for name in item.linears}


def _best_uniform(
    prepared: Prepared, found: Sequence[Sequence[float | None]], fixed: Mapping[int, int]
) -> tuple[int, list[int]] | None:
    """The candidate that loses least of those that fit where all layers take it, and what each layer takes
    then: where a group size does not divide a layer's inputs, the next smaller group."""
    best: tuple[float, int, list[int]] | None = None
    for number in range(len(prepared.pool) - 1):
        picks = []
        for i, item in enumerate(prepared.items):
            pick = fixed.get(i, _nearest(prepared, item, number))
            if pick is None:
                break
            picks.append(pick)
        if len(picks) < len(prepared.items):
            continue
        size = sum(item.sizes[p] or 0 for item, p in zip(prepared.items, picks, strict=True))
        lost = sum(row[p] or 0.0 for row, p in zip(found, picks, strict=True))
        if size <= prepared.budget.nbytes and (best is None or lost < best[0]):
            best = lost, number, picks
    return None if best is None else best[1:]


def _nearest(prepared: Prepared, item: Item, number: int) -> int | None:
    """The candidate that an item takes where all are to take one: it, or its scheme in smaller groups."""
    if item.sizes[number] is not None:
        return number
    wanted = prepared.pool[number].assignment
    assert wanted is not None
    for other, candidate in enumerate(prepared.pool[:-1]):
        own = candidate.assignment
        if (
            own is not None
            and item.sizes[other] is not None
            and own.scheme.name == wanted.scheme.name
            and 0 < own.scheme.weights.group_size < wanted.scheme.weights.group_size
        ):
            return other
    return None


def _summed(prepared: Prepared, found: Sequence[Sequence[float | None]], picks: Sequence[int]) -> float:
    return sum(row[p] or 0.0 for row, p in zip(found, picks, strict=True))


def _mean(values: Sequence[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_error": error}


def _told(
    prepared: Prepared,
    found: Sequence[Sequence[float | None]],
    picks: list[int],
    gap: float,
    uniform: tuple[int, list[int]] | None,
    judged: Sequence[Sequence[float]],
    shape: Sequence[int],
    apart: bool,
    fixed: Mapping[int, int],
) -> dict[str, Any]:
    """The choice with all that a report says of it; the better of it and the uniform scheme."""
    items, pool, budget = prepared.items, prepared.pool, prepared.budget
    kl, summed = _mean(judged[0]), _summed(prepared, found, picks)
    where = "rows that nothing was calibrated with" if apart else "the calibration's own last rows"
    rival, kept, ratio = None, True, 1.0
    if uniform is not None:
        number, same = uniform
        other, lost = _mean(judged[1]), _summed(prepared, found, same)
        kept = kl["mean"] < other["mean"] or picks == same
        # layers add to each other's loss what no sum over them has: about as much in one choice as in another
        ratio = other["mean"] / lost if lost > 0 else 1.0
        rival = {
            "scheme": pool[number].label,
            "nbytes": sum(item.sizes[p] or 0 for item, p in zip(items, same, strict=True)),
            "summed": lost,
            "measured": other,
        }
    notes = [
        f"{budget.option}: {_counted(pool, picks)}: predicted KL {summed * ratio:.3g}, measured "
        f"{kl['mean']:.3g} nats per token on {where}"
    ]
    if rival is not None:
        notes.append(
            f"{rival['scheme']} for all layers, the best of at most that size: measured {other['mean']:.3g}"
            + (
                ""
                if kept
                else f": taken instead of the choice by layers, which loses more ({kl['mean']:.3g})"
            )
        )
        picks = picks if kept else same
    if fixed:
        names = [items[i].name for i in fixed]
        notes.append(
            f"{len(names)} layers, {names[0]} among them, are read by no token of the text: "
            f"{pool[next(iter(fixed.values()))].label}"
        )
    if gap:
        notes.append(f"a better choice by less than {gap:g} of the loss may have been overlooked")
    return {
        "target": budget.option,
        "budget_bytes": budget.nbytes,
        "candidates": [c.label for c in pool],
        "picks": picks,
        "summed": summed,
        "predicted": summed * ratio,
        "measured": kl,
        "judged_rows": list(shape),
        "judged_apart": apart,
        "uniform": rival,
        "mixed": kept,
        "gap": gap,
        "layers": [
            {
                "name": item.name,
                "weights": item.weights,
                "scheme": pool[pick].label,
                "bits": 8 * (item.sizes[pick] or 0) / item.weights,
                "nats": row[pick],
                "choices": [
                    {"scheme": c.label, "bits": 8 * size / item.weights, "nats": lost}
                    for c, size, lost in zip(pool, item.sizes, row, strict=True)
                    if size is not None and lost is not None
                ],
            }
            for item, pick, row in zip(items, picks, found, strict=True)
        ],
        "notes": notes,
    }


def _counted(pool: Sequence[Candidate], picks: Sequence[int]) -> str:
    """How many layers take what."""
    counts = Counter(picks)
    return ", ".join(f"{counts[n]} × {c.label}" for n, c in enumerate(pool) if counts[n])


def _recipe(recipe: Recipe, prepared: Prepared, picks: Sequence[int]) -> Recipe:
    """The recipe that makes a choice: what most linears take is the job's, rules have the others."""
    linears = by_linear(prepared.items, picks)
    chosen: dict[int, list[str]] = {}
    for name in prepared.plan.linears:
        chosen.setdefault(linears[name], []).append(name)
    last = len(prepared.pool) - 1
    job = max((n for n in chosen if n != last), key=lambda n: (len(chosen[n]), -n))
    rule = prepared.pool[job].rule
    assert rule is not None
    unused = {"scheme", "group_size", "rules", "effort"}
    if not QuantizationManager(prepared.plan).needs:  # the text was for the choice alone
        unused |= CALIBRATION
    values = {k: getattr(prepared.recipe, k) for k in prepared.recipe.model_fields_set if k not in unused}
    own = dict(rule)
    method = own.pop("method", None)
    rules: list[dict[str, Any]] = []
    for number in sorted(chosen):
        other = prepared.pool[number].rule
        if number == job and method is None:
            continue
        rules.append(
            {
                "layers": ",".join(_patterns(chosen[number], prepared)),
                **({"skip": True} if other is None else other),
            }
        )
    return make_recipe({**values, **own, **({"rules": rules} if rules else {})})


def _patterns(names: Sequence[str], prepared: Prepared) -> list[str]:
    """Names for a rule: of a layer's routed experts, which are all alike, one pattern."""
    whole = Counter(head for n in prepared.plan.linears if (head := n.rpartition(".experts.")[0]))
    own = Counter(head for n in names if (head := n.rpartition(".experts.")[0]))
    found = dict.fromkeys(
        f"{head}.experts.*" if (head := n.rpartition(".experts.")[0]) and own[head] == whole[head] else n
        for n in names
    )
    return [*found]


def foresee(recipe: Recipe, progress: Progress = silent) -> dict[str, Any]:
    """What :func:`allocate` and the job behind it will do: :func:`quant.pipeline.estimate.estimate` of the
    one scheme for all layers, with ``allocation``. Its ``seconds`` are those of a job by gradients, which
    makes the same passes and one of the candidates, with a solve by the job's own method for each of the
    others.

    Raises:
        QuantError: see :func:`prepare`.
    """
    from quant.pipeline.estimate import estimate

    prepared = prepare(recipe)
    _, skeleton = seen(prepared, QuantizationManager(prepared.plan))
    demand_gradients(prepared, skeleton)
    value = estimate(prepared.plan, progress)
    asked = {k: getattr(recipe, k) for k in CALIBRATION & recipe.model_fields_set}
    own = {"damping", "clip_search", "act_order", "options"}
    values = {
        k: getattr(prepared.recipe, k) for k in prepared.recipe.model_fields_set if k not in own
    } | asked
    values |= {"method": "yaqa", "scheme": DEFAULT_SCHEME, "group_size": -1}
    passes = estimate(plan_job(make_recipe(values)), progress)
    allocation = prepared.to_dict()
    allocation["seconds"] = round(passes["seconds"] + (len(prepared.pool) - 2) * value["seconds"], 1)
    allocation["scratch_bytes"] += passes["scratch_bytes"]
    budget, plan = prepared.budget, prepared.plan
    more = budget.nbytes + budget.others - (plan.matrix_bytes if budget.weights else plan.output_bytes)
    value["output_bytes"] += more
    value["bits_per_weight"] += 8 * more / sum(w.elements for w in plan.weights)
    value["scheme"] = value["scheme"] | {"name": "mixed"}
    value["seconds"] += allocation["seconds"]
    value["peak_rss_bytes"] = max(value["peak_rss_bytes"], passes["peak_rss_bytes"])
    value["peak_gpu_bytes"] = max(value["peak_gpu_bytes"], passes["peak_gpu_bytes"])
    return value | {"allocation": allocation}
