"""A quantization from what is asked to its report, whichever engine does the work: resolve → plan → estimate
or run. The commands, batches and programs call these.

>>> resolved = resolve({"model_path": "M", "output_path": "O", "scheme": "w8a8-int8"})
>>> resolved.recipe.method, resolved.recipe.outlier_suppression
('minmax', 'smooth_quant')
>>> report = run(plan(resolved.recipe))  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from quant import defaults
from quant.checkpoint.reader import read_json
from quant.errors import NoGradients, Problems, QuantError, RankLost, UsageError
from quant.hardware import detect, named_gpu
from quant.models.support import DATA_FREE, GRADIENTS, WITHOUT_GRADIENTS
from quant.pipeline.memory import prepare_torch
from quant.planning.recommendation import Recommendation
from quant.planning.target import best_inputs, best_options, choose, method_for, settings
from quant.progress import Event, Progress, silent
from quant.recipe import BUDGETS, Assignment, Recipe, Rule, make_recipe
from quant.schemes import DEFAULT_SCHEME, PRESETS, Scheme, row_of
from quant.upload import destination_of, made_already, upload, upload_problem
from quant.vllm.config import text_config
from quant.vllm.layers import ONE_FORM

if TYPE_CHECKING:
    from quant.pipeline.plan import JobPlan
    from quant.pipeline.ranks import Ranks
    from quant.pipeline.searching import Searched
    from quant.report.value import Report


@dataclass(frozen=True)
class ResolvedJob:
    """A job of which nothing is left to choose.

    Attributes:
        recipe: what will be done; its settings are those of the report.
        notes: a sentence for each choice that was made for the user.
        recommendation: what method and scheme were taken from, where the request named neither.
    """

    recipe: Recipe
    notes: tuple[str, ...] = ()
    recommendation: Recommendation | None = None


def resolve(values: Mapping[str, Any]) -> ResolvedJob | Recommendation:
    """Chooses what a request leaves open.

    Without a method, ``effort`` chooses it for the scheme, bits or size; without these too, the
    recommendation for the GPU here (or for ``gpu``) decides on the scheme. Then the recipe gets what its
    schemes need, as :func:`complete` says.

    Args:
        values: keys of a :class:`Recipe`, as a recipe file has them.

    Returns:
        the job; or the recommendation itself where the unquantized model fits, so that there is nothing to
        make.

    Raises:
        UsageError, Problems: wrong values, all at once; or no method, and no GPU to choose one for.
        NothingFits: no scheme fits the GPU.
    """
    chosen: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    recommendation = None
    native = values.get("backend", defaults.ENGINE) == defaults.ENGINE
    if "effort" in values and ("method" in values or not native):
        other = f"method {values['method']}" if "method" in values else f"backend {values['backend']}"
        raise UsageError(f"--effort chooses the method, and --{other} names it: leave one of them out")
    if "method" not in values and native:
        # wrong values are mistakes of the request, whatever is recommended
        asked = make_recipe({**values, "method": "gptq"})
        effort = asked.effort or defaults.EFFORT
        if "scheme" in values or "bits" in values or asked.mixes:
            given = asked.outlier_suppression
            needs = None if given is None else {"outlier_suppression": given}
            scheme = asked.resolved_scheme()
            method, note = method_for(scheme, asked.model_path, needs, effort)
            chosen, notes = {"method": method}, (note,) if note else ()
        else:
            recommendation = choose(
                asked.model_path,
                asked.output_path,
                gpu=asked.gpu,
                tensor_parallel=asked.tensor_parallel if "tensor_parallel" in values else None,
                vllm_version=asked.vllm_version,
            )
            if recommendation.recommended == "none":
                return recommendation
            chosen = settings(recommendation)
            if effort != defaults.EFFORT:
                scheme = asked.model_copy(update={"scheme": recommendation.recommended}).resolved_scheme()
                chosen["method"], _ = method_for(scheme, asked.model_path, effort=effort)
            notes = (f"{recommendation.recommended} by {chosen['method']}: {recommendation.reason}",)
        chosen |= _of_effort(asked, effort, chosen["method"])
        if effort == "best" and (brought := best_inputs(asked, scheme)):
            chosen |= brought
            notes += (_ZERO_POINTS.format(scheme.name),)
    whole = {**chosen, **values}
    if "options" in chosen:  # those that were given are among them
        whole["options"] = chosen["options"]
    recipe, form = _formatted(make_recipe(whole))
    recipe, needed = complete(recipe)
    if recipe.gpu is not None and (taken := named_gpu(recipe.gpu).note):
        notes = (taken, *notes)
    return ResolvedJob(recipe, (*notes, *form, *needed, *_without_text(recipe)), recommendation)


_ZERO_POINTS = (
    "{}: each token's inputs get a zero point beside their scale, by --effort best; --symmetric-activations "
    "leaves it out"
)
#: Keys that say which text is calibrated with, and how.
_OF_TEXT = (
    "calibration_dataset", "samples", "sequence_length", "shuffle", "chat_template", "moe_calibration",
)  # fmt: skip


def _without_text(recipe: Recipe) -> tuple[str, ...]:
    """A sentence on keys that do nothing, because no method of the job reads calibration text."""
    given = [f"--{key.replace('_', '-')}" for key in _OF_TEXT if key in recipe.model_fields_set]
    if not given or recipe.backend != defaults.ENGINE:
        return ()
    prepare_torch()
    from quant.pipeline.methods import calibrated

    try:
        rules = [rule.assigned(recipe) for rule in recipe.rules if not rule.skip]
        if any(calibrated(recipe, a) for a in (recipe.assignment(recipe.method), *rules)):
            return ()
    except UsageError:  # planning lists it with all others
        return ()
    verb = "has" if len(given) == 1 else "have"
    return (f"{', '.join(given)} {verb} no effect: --method {recipe.method} reads no calibration text here",)


def _of_effort(asked: Recipe, effort: str, method: str) -> dict[str, Any]:
    """Recipe keys that an effort brings beside a method; the method is another one where settings are asked
    for that it has not."""
    chosen: dict[str, Any] = {"effort": effort}
    if method not in GRADIENTS:
        return chosen
    if asked.act_order is not None:
        return chosen | {"method": WITHOUT_GRADIENTS}
    if effort == "best":
        chosen |= {"gradient_samples": asked.samples, "options": best_options(asked)}
    return chosen


def _formatted(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe that names no format, in the one that vLLM reads the family's quantized experts in; and a
    sentence on that."""
    file = recipe.model_path / "config.json"
    if "format" in recipe.model_fields_set or recipe.target != "vllm" or not file.is_file():
        return recipe, ()
    kind = str(text_config(read_json(file, "the config")).get("model_type"))
    form, scheme = ONE_FORM.get(kind, (recipe.format, ""))
    if recipe.resolved_scheme(recipe.method).name != scheme:
        return recipe, ()
    note = f"--format {form}: the one in which vLLM reads quantized experts of model type {kind!r}"
    return recipe.model_copy(update={"format": form}), (note,)


def complete(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe with what its schemes need to be good, where nobody has decided otherwise: eight-bit integer
    activations (``w8a8-int8``) get ``outlier_suppression: smooth_quant``, as a recommendation of that scheme
    has it, and 4-bit ones (``nvfp4``, ``mxfp4``) the same with ``alpha: auto``, which leaves inputs alone
    that gain nothing, in jobs that read calibration text. ``outlier_suppression: none`` leaves it out; a
    method with a suppressor of its own (AWQ) keeps that one. What is complete already stays as it is.

    Returns:
        the recipe, and a sentence for each thing that was added to it.
    """
    if recipe.backend != defaults.ENGINE or recipe.outlier_suppression is not None or recipe.mixes:
        return recipe, ()
    assignment = recipe.assignment(recipe.method)
    job, alphas = _needed(assignment), [_alpha(assignment)]
    rules: list[Rule] = []
    notes = [] if job is None else [_note(assignment.scheme, job, alphas[0])]
    for number, rule in enumerate(recipe.rules, 1):
        needed = None if (own := _assigned(rule, recipe)) is None else _needed(own)
        if own is not None and needed != job:
            # the job's own choice is for its scheme; what a rule's method brings stays with the rule
            rule = rule.model_copy(update={"outlier_suppression": needed or _own(own) or "none"})
            if needed is not None:
                alphas.append(_alpha(own))
                notes.append(f"rule {number}: {_note(own.scheme, needed, alphas[-1])}")
        rules.append(rule)
    if not notes:
        return recipe, ()
    found: dict[str, Any] = {"outlier_suppression": job, "rules": rules}
    if recipe.alpha is None and (alpha := next(filter(None, alphas), None)):
        found["alpha"] = alpha
    return recipe.model_copy(update=found), tuple(notes)


def _assigned(rule: Rule, recipe: Recipe) -> Assignment | None:
    """What a rule does, where that is still open: nothing is decided for one that skips, that names a
    suppressor itself, or that has a mistake, which planning will list with all others."""
    if rule.skip or rule.outlier_suppression is not None:
        return None
    try:
        return rule.assigned(recipe)
    except UsageError:
        return None


def _needed(assignment: Assignment) -> str | None:
    """The suppressor that an assignment's scheme asks for and its method does not bring."""
    needed = _asked_keys(assignment).get("outlier_suppression")
    return needed if needed is not None and not _own(assignment) else None


def _alpha(assignment: Assignment) -> str | None:
    """What the suppressor is told that :func:`_needed` gives, beside its default."""
    return _asked_keys(assignment).get("alpha") if _needed(assignment) else None


def _asked_keys(assignment: Assignment) -> Mapping[str, str]:
    """What a scheme needs; and what suits it, where text is read without that."""
    row, inputs = row_of(assignment.scheme), assignment.scheme.activations
    read = assignment.method not in DATA_FREE or (inputs is not None and inputs.calibrated)
    return {**row.suits, **row.needs} if read else row.needs


def _own(assignment: Assignment) -> str:
    """The suppressor that is part of an assignment's method."""
    prepare_torch()
    from quant.quantizers import QuantizerRegistry

    return QuantizerRegistry.get(assignment.method).suppressor


def _note(scheme: Scheme, suppressor: str, alpha: str | None) -> str:
    where = ", where a layer's outputs gain by it" if alpha == "auto" else ""
    bits = 16 if scheme.activations is None else scheme.activations.bits
    return (
        f"{scheme.name}: {suppressor} scales inputs before they are rounded{where}, because outliers would "
        f"ruin what {bits} bits make of them; --outlier-suppression none turns that off"
    )


def plan(recipe: Recipe, progress: Progress = silent) -> JobPlan:
    """Checks a job for its engine, completed by :func:`complete`, and lays out its output. Headers are read,
    no tensors, unless schemes are chosen for a size: then the whole model is run
    (:mod:`quant.pipeline.mixing`). Where the output is to be uploaded, the Hub is asked whether it may be.

    Raises:
        Problems, QuantError: everything that is wrong, listed together.
    """
    to = destination_of(recipe)
    refused = None if to is None else upload_problem(to)
    try:
        planned = _planned(complete(recipe)[0], progress)
    except QuantError as error:
        if refused is None:
            raise
        raise Problems([*getattr(error, "problems", [str(error)]), refused], error.exit_code) from error
    if refused is not None:
        raise QuantError(refused)
    return planned


def _planned(recipe: Recipe, progress: Progress) -> JobPlan:
    prepare_torch()
    _check_ranks(recipe)
    if recipe.mixes:
        from quant.pipeline.mixing import allocate
        from quant.pipeline.plan import plan_job

        allocation = allocate(recipe, progress)
        return replace(plan_job(allocation.recipe), allocation=allocation.to_dict())
    if recipe.backend != defaults.ENGINE:
        if given := [f"--{k.replace('_', '-')}" for k in BUDGETS if getattr(recipe, k) is not None]:
            raise UsageError(f"--backend {recipe.backend} keeps no budget: leave {', '.join(given)} out")
        from quant.backends.run import plan_backend

        return plan_backend(recipe)
    from quant.pipeline.plan import plan_job

    return plan_job(recipe)


def _check_ranks(recipe: Recipe) -> None:
    """
    Raises:
        UsageError: devices that are not there, or a job that several processes cannot share.
    """
    from quant.pipeline.ranks import asked_ranks

    if (count := asked_ranks(recipe)) == 1:
        return
    if recipe.backend != defaults.ENGINE:
        raise UsageError(
            f"{count} ranks: --backend {recipe.backend} works in one process: leave --devices out"
        )
    if recipe.mixes and recipe.devices is None:
        raise UsageError(
            f"{recipe.size_asked} under torchrun: schemes are chosen by one process: use --devices, whose "
            "rank 0 chooses them before the others start"
        )


def foreseen(recipe: Recipe, progress: Progress = silent) -> dict[str, Any]:
    """What :func:`plan` and :func:`run` will do, with what :func:`estimate` says of it. Of a job whose
    schemes are chosen for a size, the prediction is for one scheme for all layers, with ``allocation``: what
    will be chosen among, which sizes can be reached, and about how many seconds the choice takes.

    Raises:
        QuantError: see :func:`plan` and :func:`estimate`.
    """
    recipe = complete(recipe)[0]
    if not recipe.mixes:
        return estimate(plan(recipe), progress)
    prepare_torch()
    from quant.pipeline.mixing import foresee

    return foresee(recipe, progress)


def search(
    values: Mapping[str, Any],
    progress: Progress = silent,
    *,
    blocks: int = defaults.SEARCH_BLOCKS,
    rows: int = defaults.SEARCH_SAMPLES,
    run: bool = True,
) -> Searched:
    """Foretells from a sample of blocks what the sensible methods and schemes would lose
    (:func:`quant.pipeline.searching.search`).

    Args:
        values: keys of a :class:`Recipe` without a method; without a size, the GPU here or that of ``gpu`` is
            to hold the model.

    Raises:
        UsageError: wrong values; or neither a size nor a GPU.
        QuantError: see :func:`quant.pipeline.searching.search`.
    """
    asked = make_recipe({**values, "method": WITHOUT_GRADIENTS})
    if not asked.mixes:
        if asked.gpu is None and not detect().gpus:
            raise UsageError(
                "no size is given and no GPU is here to choose one for: give --target-size, --target-bits or "
                "the GPU that will serve it (--gpu L40S-48GB)"
            )
        values = {**values, "fit": True}
    method, _ = method_for(PRESETS[DEFAULT_SCHEME], asked.model_path)
    prepare_torch()
    from quant.pipeline.searching import search

    recipe = make_recipe({**values, "method": method})
    return search(recipe, progress, blocks=blocks, rows=rows, run=run)


def estimate(plan: JobPlan, progress: Progress = silent) -> dict[str, Any]:
    """What a job will make and, for the native engine, take: :meth:`JobPlan.to_dict` with the bytes, memory
    and seconds of :func:`quant.pipeline.estimate.estimate`; for a legacy engine with ``backend``, of which
    nothing more is predicted.

    Raises:
        QuantError: what would stop the job.
    """
    if plan.recipe.backend != defaults.ENGINE:
        return plan.to_dict() | {"backend": plan.recipe.backend}
    from quant.pipeline.estimate import estimate

    try:
        return estimate(plan, progress) | _divided(plan)
    except NoGradients as error:
        return estimate(_without_gradients(plan, error, progress), progress)


def _divided(plan: JobPlan) -> dict[str, Any]:
    """``ranks`` of several processes: how many, their devices (of torchrun: none), and what they divide."""
    from quant.pipeline.methods import calibrated
    from quant.pipeline.ranks import asked_ranks, devices_of

    if (count := asked_ranks(plan.recipe)) == 1:
        return {}
    devices = [str(d) for d in devices_of(plan.recipe)] if plan.recipe.devices is not None else []
    several = any(calibrated(plan.recipe, a) for a in set(plan.assignments.values()))
    what = "calibration rows and, on CPUs, rows of weights" if several else "whole blocks of the output"
    if plan.gradients:
        what = "calibration rows, and blocks to be solved"
    return {"ranks": {"count": count, "devices": devices, "divided": what}}


def made(recipe: Recipe) -> Report | None:
    """The report of an output that this job made before and that only waits to be uploaded, or None.

    Raises:
        QuantError: the output has changed since.
    """
    recipe, _ = complete(recipe)
    if destination_of(recipe) is None or recipe.mixes:  # what was chosen, its settings do not say
        return None
    asked = [recipe]
    if recipe.effort is not None:  # where no gradients go through the model
        asked.append(recipe.model_copy(update=_instead(recipe)))
    settings = (json.loads(json.dumps(r.settings())) for r in asked)
    found = (made_already(recipe.output_path, recipe.model_path, {"settings": s}) for s in settings)
    return next((report for report in found if report is not None), None)


def run(plan: JobPlan, progress: Progress = silent, command: Sequence[str] | None = None) -> Report:
    """Runs a planned job; returns the report that is also written into the output directory.

    Where a device's memory does not hold a batch of calibration tokens, the job goes on from its last
    finished block with batches of half as many, down to one row; the report names what was done. Of several
    processes that torchrun started all return the report of rank 0, which writes.

    Args:
        command: the words that were typed, for the report.

    Raises:
        QuantError: with finished work kept for the next run of the same job (the legacy engines start over).
    """
    if plan.recipe.backend != defaults.ENGINE:
        from quant.backends.run import quantize_with

        return quantize_with(plan, progress, command)
    from quant.pipeline.ranks import started

    with started(plan.recipe, _follow, plan) as ranks:
        if ranks.first:
            report = _run(plan, progress, command, ranks)
            with suppress(RankLost):  # all is made
                ranks.told(report)
        else:
            report = _follow(ranks, plan)
    if plan.allocation is not None:
        from quant.pipeline.mixing import forget

        forget(plan.recipe)
    return report


def _follow(ranks: Ranks, plan: JobPlan) -> Report:
    """The part of a process that is not rank 0; returns the report of that one."""
    from quant.pipeline.manager import QuantizationManager

    try:
        QuantizationManager(plan, ranks=ranks).follow()
    except NoGradients as error:  # as rank 0 does
        QuantizationManager(_without_gradients(plan, error, silent), ranks=ranks).follow()
    return cast("Report", ranks.told(None))


def _run(plan: JobPlan, progress: Progress, command: Sequence[str] | None, ranks: Ranks) -> Report:
    """The part of rank 0, which writes."""
    from quant.pipeline.manager import QuantizationManager
    from quant.pipeline.retry import in_smaller_batches

    def make(tokens: int | None) -> QuantizationManager:
        # what a run has finished that gave out of memory is not what --fresh is to leave aside
        again = {} if tokens is None else {"fresh": False}
        job = replace(plan, recipe=plan.recipe.model_copy(update=again))
        return QuantizationManager(job, progress, command, tokens, ranks)

    try:
        return in_smaller_batches(make, QuantizationManager.run)
    except NoGradients as error:
        plan = _without_gradients(plan, error, progress)
        return in_smaller_batches(make, QuantizationManager.run)


def _without_gradients(plan: JobPlan, error: NoGradients, progress: Progress) -> JobPlan:
    """The same job by the method that an effort takes where no gradients go through the model.

    Raises:
        NoGradients: the method was named.
    """
    if plan.recipe.effort is None:
        raise error
    recipe = plan.recipe.model_copy(update=_instead(plan.recipe) | {"effort": None})
    note = f"--method {WITHOUT_GRADIENTS} instead of {plan.recipe.method}: {error.problem}"
    planned = _planned(recipe, progress)
    return replace(planned, notes=(*planned.notes, note))


def _instead(recipe: Recipe) -> dict[str, Any]:
    """What changes in a recipe whose effort takes gradients, where none go through the model."""
    options = {k: v for k, v in recipe.options.items() if k not in defaults.BEST or k == "signed"}
    return {"method": WITHOUT_GRADIENTS, "gradient_samples": None, "options": options}


def quantize(recipe: Recipe, progress: Progress = silent) -> Report:
    """Completes, plans and runs a job, and uploads its output where the recipe says so; returns its report.

    Raises:
        QuantError: see :func:`plan`, :func:`run` and :func:`quant.upload.upload`.
    """
    recipe, notes = complete(recipe)
    for note in notes:
        progress(Event("plan", message=note))
    report = made(recipe) or run(plan(recipe, progress), progress)
    if (to := destination_of(recipe)) is not None:
        upload(recipe.output_path, to, progress)
    return report
