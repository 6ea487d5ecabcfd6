"""``quant search``: which method and scheme a model loses least by within a size, foretold from a sample.

Candidates are made of a few blocks (:mod:`quant.pipeline.sampling`), put into the full-precision model, and
what it loses then is measured on rows that they were not made by. All other blocks follow from a guess for
each (:mod:`quant.planning.prediction`). A scheme for every layer is chosen as ``quantize`` would choose it,
by losses foretold in the same way.

What was found is kept beside the output until the search is finished.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant import defaults
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import open_checkpoint
from quant.errors import NothingFits, QuantError
from quant.hardware import detect, named_gpu
from quant.models.skeleton import Skeleton
from quant.pipeline.candidates import Candidate, items_of
from quant.pipeline.checks import check_disk
from quant.pipeline.estimate import READ, WRITTEN
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.methods import make_quantizer
from quant.pipeline.mixing import Prepared, by_linear, demand_gradients, item_losses, prepare, seen
from quant.pipeline.plan import plan_job
from quant.pipeline.retry import in_smaller_batches, memory_exhausted
from quant.pipeline.rows import later_rows
from quant.pipeline.sampling import SampledSurvey
from quant.pipeline.survey import Judge, Losses
from quant.planning.allocation import allocate as knapsack
from quant.planning.prediction import Predicted, extrapolate, front, ratio, spread
from quant.planning.target import target_problems
from quant.progress import Progress, silent
from quant.quantizers import QuantizerRegistry
from quant.recipe import MIXING, Recipe, Rule, make_recipe
from quant.schemes import candidates as recommended
from quant.vllm.context import context_length
from quant.vllm.kernels import formats_of, kernel_of

#: What to do where no gradients go through a model.
_INSTEAD = "quant search needs gradients: use quant quantize --scheme, which needs none"
#: Passes forward that a method of Hessians makes: the inputs of its statistics, the outputs behind them.
_PASSES = 2


@dataclass(frozen=True)
class Entry:
    """A method and a scheme for all layers, or a scheme for each.

    Attributes:
        recipe: makes it.
        nbytes: of the output's tensors.
        bits: a weight of the decoder.
        tokens: that the job is calibrated with.
        number: of its candidate; None: several.
    """

    name: str
    recipe: Recipe
    nbytes: int
    bits: float
    tokens: int
    number: int | None
    fits: bool

    @property
    def options(self) -> str:
        """What ``quant quantize`` is given for it."""
        recipe, words = self.recipe, [f"--method {self.recipe.method}"]
        if self.number is None:
            words.append(recipe.size_asked)
            words += [f"--{k} {v}" for k in ("context", "concurrency") if (v := getattr(recipe, k))]
            words += [] if recipe.gpu is None else [f"--gpu {shlex.quote(recipe.gpu)}"]
        else:
            words.append(f"--scheme {recipe.scheme}")
            words += [] if recipe.group_size is None else [f"--group-size {recipe.group_size}"]
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        return {
            "scheme": self.name,
            "method": self.recipe.method,
            "options": self.options,
            "output_bytes": self.nbytes,
            "bits_per_weight": self.bits,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Searched:
    """What was found.

    Attributes:
        entries: of each what is known; where nothing was run, ``kl`` and so on are missing.
        chosen: the recipe of the best that fits; None where nothing was run.
        facts: what else is told.
    """

    entries: tuple[Mapping[str, Any], ...]
    chosen: Recipe | None
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {**self.facts, "candidates": [dict(e) for e in self.entries]}


def search(
    recipe: Recipe,
    progress: Progress = silent,
    *,
    blocks: int = defaults.SEARCH_BLOCKS,
    rows: int = defaults.SEARCH_SAMPLES,
    run: bool = True,
) -> Searched:
    """Foretells what candidates lose, and says which of those that fit loses least.

    Args:
        recipe: with a size; its method is the one that a scheme for every layer is made by.
        blocks: to sample, spread over the depth.
        rows: of calibration text.
        run: False: only says what there is to choose among; nothing is written.

    Raises:
        NothingFits: no candidate is that small.
        QuantError: see :func:`quant.pipeline.mixing.prepare`; or no gradient can be taken through the model.
    """
    job = _prepared(recipe, rows)
    facts, found = in_smaller_batches(
        lambda tokens: QuantizationManager(job.prepared.plan, batch_tokens=tokens),
        lambda manager: _searched(recipe, job, manager, progress, blocks, run),
    )
    if not run:
        return Searched(tuple(e.to_dict() for e in job.entries), None, facts)
    shutil.rmtree(_folder(recipe).with_name(f"{_folder(recipe).name}.work"), ignore_errors=True)
    best = min(
        range(len(found)), key=lambda i: (not found[i]["fits"], found[i]["kl"], found[i]["output_bytes"])
    )
    return Searched(tuple(found), job.entries[best].recipe, facts | {"chosen": found[best]})


def _folder(recipe: Recipe) -> Path:
    output = recipe.output_path.absolute()
    return output.with_name(f"{output.name}.search")


def _searched(
    recipe: Recipe, job: _Job, manager: QuantizationManager, progress: Progress, blocks: int, run: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is told of a search, and its entries with what they lose."""
    prepared = job.prepared
    text, skeleton = seen(prepared, manager, _INSTEAD)
    with memory_exhausted(manager.device):
        demand_gradients(prepared, skeleton, _INSTEAD)
    kinds = [skeleton.layout(i) for i in range(skeleton.block_count)]
    sampled = spread(skeleton.block_count, blocks, kinds)
    facts = {
        "target": prepared.budget.option,
        "budget_bytes": prepared.budget.nbytes + _unchosen(prepared),
        "blocks": skeleton.block_count,
        "sampled_blocks": sampled,
        "rows": list(text.tokens.shape),
        "left_out": dict(job.left_out),
    }
    if not run:
        return facts, []
    check_disk(_folder(recipe), _scratch_bytes(prepared, skeleton, sampled))
    fingerprint = manager.fingerprint(text) | {
        "candidates": [_label(c) for c in prepared.pool],
        "sampled_blocks": sampled,
    }
    # blocks that were finished before memory ran out are not what --fresh is to leave aside
    work = WorkFolder(_folder(recipe), fingerprint, recipe.fresh and not manager.workspace.smaller)
    try:
        with memory_exhausted(manager.device):
            survey = SampledSurvey(manager, prepared.pool, prepared.items, work, progress, frozenset(sampled))
            made = survey.run(skeleton, text.tokens, text.held_out)
            if "passes" not in work.finished:
                passes = {k: manager.clock.seconds.get(k, 0.0) for k in ("forward", "logits", "backward")}
                work.finish_unit("passes", {}, {"seconds": passes})
            found = _Outcome(job, survey, skeleton, sampled, made).told(text.tokens.numel())
    finally:
        work.release()
    return facts, found


@dataclass(frozen=True)
class _Job:
    """A search that is ready to run.

    Attributes:
        mixed: how many of the pool's candidates layers may be given, the first ones.
    """

    prepared: Prepared
    mixed: int
    entries: tuple[Entry, ...]
    left_out: Mapping[str, str]


def _prepared(recipe: Recipe, rows: int) -> _Job:
    """What is searched among. Headers are read only."""
    given = {k: getattr(recipe, k) for k in recipe.model_fields_set}
    length = _length(recipe, defaults.SEQUENCE_LENGTH)
    few = {"samples": rows, "gradient_samples": rows, "sequence_length": min(length, defaults.SEARCH_LENGTH)}
    prepared = prepare(make_recipe(given | few))
    pool, left_out = [*prepared.pool[:-1]], {}
    count, known = len(pool), {c.assignment for c in pool}
    routed = any(".experts." in name for name in prepared.plan.linears)
    for candidate in _uniform(recipe):
        assert candidate.assignment is not None
        if routed and candidate.assignment.scheme.activations is not None:
            left_out[_label(candidate)] = "what rounded inputs of routed experts lose is not weighed"
        elif candidate.assignment not in known:
            pool.append(candidate)
    pool.append(Candidate(None, None))
    items = tuple(items_of(prepared.plan, pool))
    prepared = replace(prepared, pool=tuple(pool), items=items)
    entries = []
    values = {k: v for k, v in given.items() if k not in (*MIXING, "effort", "gradient_samples")}
    for number, candidate in enumerate(pool[:-1]):
        assert candidate.rule is not None
        own = make_recipe({**values, **candidate.rule})
        try:
            plan = plan_job(own)
        except QuantError as error:
            left_out[_label(candidate)] = str(error)
            continue
        if any(item.sizes[number] is None for item in items):
            left_out[_label(candidate)] = "not every layer can take it"
            continue
        fits = sum(item.sizes[number] or 0 for item in items) <= prepared.budget.nbytes
        tokens = plan.rows * length
        name = candidate.label
        entries.append(Entry(name, own, plan.output_bytes, plan.bits_per_weight, tokens, number, fits))
    tokens = length * min(recipe.samples, recipe.gradient_samples or defaults.GRADIENT_SAMPLES)
    entries.append(
        _sized(Entry("mixed", recipe, 0, 0.0, tokens, None, True), prepared, prepared.budget.nbytes)
    )
    return _Job(prepared, count, tuple(entries), left_out)


def _length(recipe: Recipe, most: int) -> int:
    """Tokens of a row of the job."""
    longest = context_length(open_checkpoint(recipe.model_path).config)
    return recipe.sequence_length or min(most, longest or most)


def _label(candidate: Candidate) -> str:
    """A candidate with its method."""
    assignment = candidate.assignment
    return candidate.label if assignment is None else f"{candidate.label}, {assignment.method}"


def _uniform(recipe: Recipe) -> Iterator[Candidate]:
    """What is tried for all layers, beside what layers may be given: each scheme that would be recommended
    unasked, of those in 8 bits by the method that needs no data, of those in 4 by every method."""
    gpu = named_gpu(recipe.gpu) if recipe.gpu is not None else next(iter(detect().gpus), None)
    for row in recommended():
        native = gpu is not None and formats_of(gpu).get(kernel_of(row.scheme)) == "native"
        if row.needs or not row.methods or (row.native and not native):
            continue
        if target_problems(row.scheme, recipe.format, recipe.gpu, recipe.vllm_version):
            continue
        for method in row.methods if row.scheme.weights.bits < 8 else row.methods[:1]:
            rule: dict[str, Any] = {"scheme": row.name, "method": method}
            if row.scheme.group_size_is_free:
                rule["group_size"] = row.scheme.weights.group_size
            assignment = Rule(layers="*", **rule).assigned(recipe)
            if not QuantizerRegistry.get(assignment.method).refuse(assignment.scheme.weights):
                yield Candidate(rule, assignment)


def _unchosen(prepared: Prepared) -> int:
    """Bytes of the output's tensors that are no item's."""
    plan = prepared.plan
    return plan.output_bytes - sum(
        sum(s.nbytes for s in plan.format.specs(x, plan.dtype)) for x in plan.linears.values()
    )


def _sized(entry: Entry, prepared: Prepared, nbytes: int) -> Entry:
    """An entry whose items take so many bytes."""
    plan = prepared.plan
    total = nbytes + _unchosen(prepared)
    more = total - plan.output_bytes
    bits = plan.bits_per_weight + 8 * more / sum(w.elements for w in plan.weights)
    return replace(entry, nbytes=total, bits=round(bits, 4))


def _scratch_bytes(prepared: Prepared, skeleton: Skeleton, sampled: Sequence[int]) -> int:
    """Bytes of all candidates of the sampled blocks."""
    prefixes = tuple(skeleton.block_prefix(i) for i in sampled)
    return sum(
        size
        for item in prepared.items
        if item.linears[0].startswith(prefixes)
        for size in item.sizes[:-1]
        if size is not None
    )


class _Outcome:
    """What the entries of a search are foretold to lose.

    Args:
        made: by linear of the sampled blocks what each candidate's errors lose.
    """

    def __init__(
        self, job: _Job, survey: SampledSurvey, skeleton: Skeleton, sampled: Sequence[int], made: Losses
    ):
        self._job, self._survey, self._made = job, survey, made
        self._sampled, self._count = set(sampled), skeleton.block_count
        self._guessed = survey.guesses()
        #: linear → its block, and its place inside that, which all experts of a layer share
        self._places = {
            name: (index, re.sub(r"\.experts\.\d+\.", ".experts.", local))
            for index in range(skeleton.block_count)
            for name, local in survey.linears(skeleton, index).items()
        }
        self._losses = self._brought()
        self._told = {index: self._foretold(without=index) for index in sampled}

    def told(self, tokens: int) -> list[dict[str, Any]]:
        """Every entry with its KL, where ``tokens`` went through the model."""
        items, entries = self._job.prepared.items, self._job.entries
        mixed = self._mixed()
        picks = [by_linear(items, mixed if e.number is None else [e.number] * len(items)) for e in entries]
        found = []
        for entry, own, rows in zip(entries, picks, self._measured(picks), strict=True):
            if entry.number is None:
                size = sum(item.sizes[p] or 0 for item, p in zip(items, mixed, strict=True))
                entry = _sized(entry, self._job.prepared, size)
            predicted = self._predicted(own, rows)
            seconds = self._seconds(entry, set(mixed), tokens)
            found.append(
                entry.to_dict()
                | {"kl": predicted.kl, "standard_error": predicted.error, "measured_share": predicted.share}
                | {"seconds": round(seconds, 1)}
            )
        best = front([(e["output_bytes"], e["kl"]) for e in found])
        return [e | {"front": i in best} for i, e in enumerate(found)]

    def _brought(self) -> Losses:
        """Of every linear what it loses by candidate: as made, or as the sampled blocks foretell."""
        told = self._foretold(without=None)
        return {name: self._made.get(name) or told[name] for name in self._guessed}

    def _foretold(self, without: int | None) -> Losses:
        """Of every linear what sampled blocks, but for one, foretell by candidate: its guess, times what
        linears of its place in those blocks lose beyond theirs."""
        count = len(self._job.prepared.pool)
        pairs: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for name, own in self._made.items():
            index, local = self._places[name]
            for number, (lost, guess) in enumerate(zip(own, self._guessed[name], strict=True)):
                if index != without and lost is not None and guess is not None:
                    pairs.setdefault((local, number), []).append((lost, guess))
        anywhere = [
            ratio([p for (_, n), own in pairs.items() if n == number for p in own]) for number in range(count)
        ]
        factors = {place: ratio(own) for place, own in pairs.items()}
        return {
            name: [
                None if guess is None else guess * factors.get((self._places[name][1], n), anywhere[n])
                for n, guess in enumerate(guesses)
            ]
            for name, guesses in self._guessed.items()
            if without in (None, self._places[name][0])
        }

    def _mixed(self) -> list[int]:
        """The candidate of each item where every layer has its own."""
        prepared, last = self._job.prepared, len(self._job.prepared.pool) - 1
        allowed = {*range(self._job.mixed), last}
        choices = []
        for item, row in zip(prepared.items, item_losses(prepared, self._losses), strict=True):
            own = [(n, item.sizes[n] or 0, x) for n, x in enumerate(row) if x is not None and n in allowed]
            if not own:  # read by no token: the finest of the schemes
                finest = max(n for n in range(self._job.mixed) if item.sizes[n] is not None)
                own = [(finest, item.sizes[finest] or 0, 0.0)]
            choices.append(own)
        made = knapsack([[(size, lost) for _, size, lost in own] for own in choices], prepared.budget.nbytes)
        if made is None:
            raise NothingFits(f"{prepared.budget.option}: out of reach for layers that no token goes through")
        return [own[p][0] for own, p in zip(choices, made.picks, strict=True)]

    def _measured(self, picks: Sequence[Mapping[str, int]]) -> list[list[float]]:
        """KL of each row where what each entry picks is put into the sampled blocks."""
        work, prepared = self._survey.work, self._job.prepared
        key = f"measured for {prepared.budget.option}"
        if key not in work.finished:
            rows, _ = later_rows(prepared.plan, defaults.SEARCH_JUDGED)
            inside = {n for n, (index, _) in self._places.items() if index in self._sampled}
            few = [{n: own[n] for n in inside} for own in picks]
            work.finish_unit(key, {}, {"measured": {"rows": Judge(self._survey, rows).measure(few)}})
        measured: list[list[float]] = work.finished[key]["measured"]["rows"]
        return measured

    def _predicted(self, picks: Mapping[str, int], rows: Sequence[float]) -> Predicted:
        lost = dict.fromkeys(range(self._count), 0.0)
        for name, losses in self._losses.items():
            lost[self._places[name][0]] += losses[picks[name]] or 0.0
        sampled = [
            (lost[index], sum(x[picks[name]] or 0.0 for name, x in told.items()))
            for index, told in self._told.items()
        ]
        return extrapolate(rows, sampled, [x for index, x in lost.items() if index not in self._sampled])

    def _seconds(self, entry: Entry, mixed: set[int], tokens: int) -> float:
        """Seconds that the whole job takes, by those of the search: passes by the token, solves by the
        block."""
        passes = self._survey.work.finished["passes"]["seconds"]
        forward, gradients = passes["forward"], sum(passes.values())
        statistics = max(passes["backward"] - 3 * forward, 0.0) / 2
        solves = [x * self._count / len(self._sampled) for x in self._survey.seconds()]
        prepared = self._job.prepared
        numbers = mixed - {len(prepared.pool) - 1} if entry.number is None else {entry.number}
        needs = frozenset[str]()
        for number in numbers:
            assignment = prepared.pool[number].assignment
            assert assignment is not None
            needs |= make_quantizer(assignment).needs
        once = gradients if "gradients" in needs else _PASSES * forward + statistics if needs else 0.0
        seconds = once * entry.tokens / tokens + max((solves[n] for n in numbers), default=0.0)
        if entry.number is None:  # the choice before
            seconds += gradients * entry.tokens / tokens + sum(solves[: self._job.mixed])
        return seconds + prepared.plan.checkpoint.nbytes / READ + entry.nbytes / WRITTEN
