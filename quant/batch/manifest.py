"""What a batch is asked to do: a YAML file of jobs, defaults and matrices, read into :class:`Job` values.

Every path in it, and in the recipes that it names, is relative to the manifest's own folder. What is wrong is
listed all at once, before the first job starts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quant import defaults
from quant.documents import LONGEST_WRITTEN, read_text
from quant.errors import Problems, QuantError, UsageError, clipped, one_of
from quant.hub import cached_snapshot, is_hub_id, model_name, set_offline
from quant.recipe import UPLOAD, Recipe, make_recipe, read_recipe, read_yaml

#: Jobs of one manifest; and problems that a message lists.
MOST_JOBS, _MOST_LISTED = 10_000, 50
#: Bytes of a directory's name that leave room for the ending of its work folder.
_LONGEST = 250
#: Recipe keys that the job itself has a word for, and those that a batch cannot mean.
_JOBS_OWN = {"model_path": "model", "output_path": "output"}
_REFUSED = {"fresh": "a batch goes on where it stopped: remove the output's .work folder to start over"}
_PLACE = re.compile(r"\{([^{}]*)\}")


#: Words that become paths and lines of files.
_Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,4000}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VerifyGate(_Strict):
    """``quant verify`` on the output: at this tensor parallel degree, and in the vLLM of an environment."""

    tensor_parallel: int = Field(1, ge=1, le=1024)
    vllm: _Text | None = None


class EvaluateGate(_Strict):
    """``quant evaluate`` of the output against its source, and what it may have lost: the mean KL divergence
    in nats, and the share by which perplexity may rise."""

    max_kl: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_perplexity_increase: float | None = Field(None, ge=-1, allow_inf_nan=False)
    text: _Text | None = None
    chunks: int = Field(defaults.EVALUATION_CHUNKS, ge=2)
    length: int | None = Field(None, ge=8)


class JobSettings(_Strict):
    """Keys that defaults, jobs and matrices share.

    Attributes:
        recipe: a recipe file, or a recipe's keys.
        overrides: recipe keys that win over the recipe's; those of a job over those of the defaults.
        verify, evaluate: gates that the output must pass.
        retries: how often a job is tried again after a failure that may pass by itself.
        retry_delay: seconds before the first of them; each further one waits twice as long.
        priority: the larger, the sooner.
        threads: of the job's process (OMP_NUM_THREADS); None: as in the batch's own environment.
        accelerator: on a cluster, the kind of GPU that the job must get, by the cluster's own name of it.
    """

    recipe: _Text | dict[str, Any] | None = None
    overrides: dict[str, Any] = {}
    verify: VerifyGate | None = None
    evaluate: EvaluateGate | None = None
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    retry_delay: Annotated[float, Field(ge=0, le=3600)] = 10.0
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = 0
    threads: Annotated[int | None, Field(ge=1, le=4096)] = None
    accelerator: Annotated[str | None, Field(pattern=r"^[\w.:-]+$")] = None


class JobEntry(JobSettings):
    """A job of ``jobs``. Its name is its output as the manifest has it, where none is given."""

    model: _Text
    output: _Text
    name: _Text | None = Field(None, max_length=200)


class MatrixEntry(JobSettings):
    """A matrix: a job for each combination of a model, a recipe where ``recipes`` has some, and a value of
    each axis. Axes are recipe keys. ``output`` names them in braces: ``out/{model}-{scheme}``."""

    models: list[_Text] = Field(min_length=1)
    output: _Text
    recipes: list[_Text] = []
    axes: dict[str, list[Any]] = {}


@dataclass(frozen=True)
class Job:
    """One job of which the manifest leaves nothing open.

    Attributes:
        name: unique in the manifest.
        model: a directory's absolute path, or a Hub id.
        output: absolute.
        values: of the recipe, as :func:`quant.recipe.make_recipe` takes them, paths absolute.
        index: its place in the manifest.
    """

    name: str
    model: str
    output: Path
    values: Mapping[str, Any]
    verify: VerifyGate | None
    evaluate: EvaluateGate | None
    retries: int
    retry_delay: float
    priority: int
    threads: int | None
    accelerator: str | None
    index: int

    @property
    def slug(self) -> str:
        """The name as a file name has it: letters, digits, and what tells it from others."""
        plain = re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-").lower()[-40:].strip("-")
        return f"{plain or 'job'}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the output's bytes, as JSON has it."""
        own = {k: v for k, v in self.values.items() if k not in (*UPLOAD, "output_path", "backend_python")}
        value: dict[str, Any] = plain({**own, "model_path": self.model})
        return value

    @property
    def digest(self) -> str:
        """Of :attr:`settings`."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def source(self) -> Path | None:
        """The model's directory; None of a Hub id that the cache does not have yet."""
        return cached_snapshot(self.model) if not os.path.isabs(self.model) else Path(self.model)


def plain(value: Any) -> Any:
    """A value as JSON has it: keys are strings, and what JSON has no word for is its text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


@dataclass
class _Reading:
    """A manifest while it is read.

    Attributes:
        base: the manifest's folder.
        problems: everything that is wrong so far.
        recipes: values of each recipe file that was read.
        checked: digests of recipe values that were found to be good.
    """

    base: Path
    problems: list[str] = field(default_factory=list)
    recipes: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    models: dict[str, str | None] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)

    def path(self, text: str | Path) -> Path:
        return Path(os.path.normpath(self.base / text))


def read_manifest(path: Path) -> tuple[Job, ...]:
    """The jobs of a manifest, in its order, matrices behind jobs.

    Raises:
        UsageError, Problems: it cannot be read; everything that is wrong: keys, values, recipes, models that
            are not there, outputs that meet.
    """
    try:
        text = read_text(path, LONGEST_WRITTEN)
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error.strerror)
        raise UsageError(f"{path}: the manifest cannot be read: {why}; see docs/batch.md") from error
    value = read_yaml(text, f"{path}:")
    parts = {"defaults": dict, "jobs": list, "matrix": list}
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a manifest is a mapping with {', '.join(parts)}; see docs/batch.md")
    reading = _Reading(Path(os.path.abspath(path)).parent)
    for key in value:
        if key not in parts:
            reading.problems.append(str(one_of("manifest key", key, list(parts))))
    for key, kind in parts.items():
        if value.get(key) is not None and not isinstance(value[key], kind):
            what = "a mapping of job keys" if kind is dict else "a list, with a - before each entry"
            reading.problems.append(f"{key} is {clipped(value[key])}: it must be {what}")
            value[key] = kind()
    shared = _validated(JobSettings, value.get("defaults") or {}, "defaults", reading) or JobSettings()
    jobs: list[Job] = []
    for entry in _entries(value, shared, reading):
        if len(jobs) == MOST_JOBS:
            reading.problems.append(f"more than {MOST_JOBS:,} jobs: use several manifests")
            break
        jobs.append(_job(entry, shared, len(jobs), reading))
    if not jobs and not reading.problems:
        reading.problems.append("no jobs: give them in jobs, or models in matrix")
    reading.problems += _meetings(jobs)
    if reading.problems:
        found = [f"{path}: {p}" for p in dict.fromkeys(reading.problems)]
        more = [f"and {len(found) - _MOST_LISTED:,} more"] if len(found) > _MOST_LISTED else []
        raise Problems([*found[:_MOST_LISTED], *more], exit_code=2)
    return tuple(jobs)


def _validated(kind: type[Any], value: Any, where: str, reading: _Reading) -> Any:
    """A mapping as its model; None, with its problems noted, where it is none."""
    if not isinstance(value, dict):
        reading.problems.append(f"{where} is {clipped(value)}: it must be a mapping of job keys")
        return None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        reading.problems += [_problem(kind, e, where) for e in error.errors()]
        return None


def _problem(kind: type[BaseModel], error: Any, where: str) -> str:
    """A line for one error of pydantic's."""
    place = [str(p) for p in error["loc"] if p not in ("str", "dict[str,any]")]
    name = ".".join(place)
    if error["type"] == "extra_forbidden":
        gates: dict[str, type[BaseModel]] = {"verify": VerifyGate, "evaluate": EvaluateGate}
        known = gates.get(place[0], kind) if len(place) > 1 else kind
        unknown = place[-1]
        hint = "; it is a recipe key: put it into overrides" if unknown in Recipe.model_fields else ""
        return f"{where}: {one_of('key', unknown, list(known.model_fields))}{hint}"
    if error["type"] == "missing":
        return f"{where}: {name} is missing"
    said = error["msg"][0].lower() + error["msg"][1:]
    return f"{where}: {name} is {clipped(error['input'])}: {said}"


@dataclass(frozen=True)
class _Entry:
    """A job as an entry or one combination of a matrix has it; ``where`` begins its messages."""

    settings: JobSettings
    model: str
    output: str
    name: str | None
    where: str
    recipe: str | dict[str, Any] | None
    axes: Mapping[str, Any] = field(default_factory=dict)


def _entries(value: Mapping[str, Any], shared: JobSettings, reading: _Reading) -> Iterator[_Entry]:
    for number, given in enumerate(value.get("jobs") or [], 1):
        entry = _validated(JobEntry, given, f"job {number}", reading)
        if entry is not None:
            where = f"job {number} ({clipped(entry.name or entry.output)})"
            recipe = entry.recipe if "recipe" in entry.model_fields_set else shared.recipe
            yield _Entry(entry, entry.model, entry.output, entry.name, where, recipe)
    for number, given in enumerate(value.get("matrix") or [], 1):
        entry = _validated(MatrixEntry, given, f"matrix {number}", reading)
        if entry is not None:
            yield from _combinations(entry, f"matrix {number}", shared, reading)


def _combinations(entry: MatrixEntry, where: str, shared: JobSettings, reading: _Reading) -> Iterator[_Entry]:
    """The jobs of a matrix, models first."""
    before = len(reading.problems)
    if empty := [key for key, values in entry.axes.items() if not values]:
        reading.problems.append(f"{where}: axis {empty[0]} has no values: give some, or leave it out")
    if entry.recipes and "recipe" in entry.model_fields_set:
        reading.problems.append(f"{where}: recipe and recipes: give one of the two")
    known = ["model", *(["recipe"] if entry.recipes else []), *entry.axes]
    for name in _PLACE.findall(entry.output):
        if name not in known:
            reading.problems.append(f"{where}: output: {one_of('placeholder', name, known)}")
    sizes = {"model": len(entry.models), "recipe": len(entry.recipes)}
    sizes |= {key: len(values) for key, values in entry.axes.items()}
    for key in known:
        if sizes[key] > 1 and f"{{{key}}}" not in entry.output:
            reading.problems.append(
                f"{where}: output is {clipped(entry.output)}: it must hold {{{key}}}, of which there are "
                f"{sizes[key]}, or their jobs would write to one directory"
            )
    if (total := math.prod(max(n, 1) for n in sizes.values())) > MOST_JOBS:
        reading.problems.append(
            f"{where}: stands for {total:,} jobs, a manifest may have {MOST_JOBS:,}: split it"
        )
    if len(reading.problems) > before:
        return
    inherited = entry.recipe if "recipe" in entry.model_fields_set else shared.recipe
    recipes: list[Any] = list(entry.recipes) or [inherited]
    for model, recipe, *values in itertools.product(entry.models, recipes, *entry.axes.values()):
        axes = dict(zip(entry.axes, values, strict=True))
        stem = Path(recipe).stem if isinstance(recipe, str) else ""
        words = {"model": model_name(reading.path(model)), "recipe": stem, **axes}
        output = _PLACE.sub(lambda m, w=words: _file_name(w[m[1]]), entry.output)  # type: ignore[misc]
        yield _Entry(entry, model, output, None, f"{where} ({clipped(output)})", recipe, axes)


def _file_name(value: Any) -> str:
    """A value as part of a file name.

    >>> _file_name("org/name"), _file_name(0.5), _file_name(True)
    ('org-name', '0.5', 'true')
    """
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^\w.+=-]+", "-", text)


def _job(entry: _Entry, shared: JobSettings, index: int, reading: _Reading) -> Job:
    """An entry with its recipe, overrides and gates; what is wrong with them is noted."""
    own = entry.settings

    def of(key: str) -> Any:
        return getattr(own if key in own.model_fields_set else shared, key)

    model = _model(entry, reading) or str(reading.path(entry.model))
    values = dict(_recipe(entry, reading) or {})
    values |= {**shared.overrides, **own.overrides, **entry.axes}
    for key, word in _JOBS_OWN.items():
        if key in {**shared.overrides, **own.overrides, **entry.axes}:
            reading.problems.append(f"{entry.where}: overrides name {key}: the job's key {word} does that")
        values.pop(key, None)
    for key, why in _REFUSED.items():
        if key in values:
            reading.problems.append(f"{entry.where}: {key}: {why}")
    output = reading.path(entry.output)
    if long := [part for part in output.parts if len(part.encode(errors="replace")) > _LONGEST]:
        reading.problems.append(
            f"{entry.where}: output has the part {clipped(long[0])}: more than {_LONGEST} bytes are no file "
            "name"
        )
    values = _absolute(values, reading) | {"model_path": model, "output_path": str(output)}
    _check_recipe(values, entry.where, reading)
    evaluate, verify = of("evaluate"), of("verify")
    if evaluate is not None and evaluate.text is not None:
        evaluate = evaluate.model_copy(update={"text": str(reading.path(evaluate.text))})
        if not os.path.exists(evaluate.text):
            reading.problems.append(f"{entry.where}: evaluate.text: there is no {evaluate.text}")
    if verify is not None and verify.vllm is not None:
        verify = verify.model_copy(update={"vllm": str(reading.path(verify.vllm))})
    name = entry.name or _named(entry.output)
    return Job(
        name, model, output, values, verify, evaluate, of("retries"), of("retry_delay"), of("priority"),
        of("threads"), of("accelerator"), index,
    )  # fmt: skip


def _named(output: str) -> str:
    """The name of a job that has none: its output without the steps that lead there.

    >>> _named("../out/./w4a16"), _named("/srv/out/w4a16")
    ('out/w4a16', '/srv/out/w4a16')
    """
    return re.sub(r"^(\.\./)+", "", os.path.normpath(output))


def _absolute(values: dict[str, Any], reading: _Reading) -> dict[str, Any]:
    """Recipe values whose paths are absolute."""
    found = dict(values)
    if isinstance(texts := values.get("calibration_dataset"), list):
        found["calibration_dataset"] = [str(reading.path(t)) if isinstance(t, str) else t for t in texts]
    for key in ("backend_python", "scratch_dir"):
        if isinstance(path := values.get(key), str):
            found[key] = str(reading.path(path))
    return found


def _recipe(entry: _Entry, reading: _Reading) -> Mapping[str, Any] | None:
    """Values of an entry's recipe; each file is read once."""
    recipe = entry.recipe
    if recipe is None or isinstance(recipe, dict):
        return recipe
    if recipe not in reading.recipes:
        reading.recipes[recipe] = None
        try:
            reading.recipes[recipe] = read_recipe(reading.path(recipe))
        except QuantError as error:
            reading.problems += getattr(error, "problems", [str(error)])
    return reading.recipes[recipe]


def _model(entry: _Entry, reading: _Reading) -> str | None:
    """A model as an absolute path or a Hub id; None, with the problem noted, where there is none."""
    text = entry.model
    if text not in reading.models:
        path = reading.path(text)
        found: str | None = str(path)
        if os.path.isfile(path / "config.json"):
            pass
        elif os.path.exists(path):
            found = None
            reading.problems.append(f"{entry.where}: model {path}: there is no config.json in it")
        elif is_hub_id(text):
            found = text
            if set_offline() and cached_snapshot(text) is None:
                found = None
                reading.problems.append(
                    f"{entry.where}: model {text}: there is no {path}, it is not in the Hub's cache, and "
                    "HF_HUB_OFFLINE forbids fetching it"
                )
        else:
            found = None
            reading.problems.append(f"{entry.where}: model {path}: there is no such directory")
        reading.models[text] = found
    elif reading.models[text] is None:
        reading.problems.append(f"{entry.where}: model {text}: is not there, as said above")
    return reading.models[text]


def _check_recipe(values: Mapping[str, Any], where: str, reading: _Reading) -> None:
    """Notes what is wrong with a job's recipe. Jobs with the same one are checked once."""
    key = json.dumps(plain({k: v for k, v in values.items() if k not in _JOBS_OWN}), sort_keys=True)
    if key in reading.checked:
        return
    try:
        recipe = make_recipe({"method": "gptq", **values})
        recipe.resolved_scheme(recipe.method if "method" in values else None)
    except QuantError as error:
        said = getattr(error, "problems", [str(error)])
        reading.problems += [f"{where}: {p}" for p in said]
        return
    for text in recipe.calibration_dataset:
        if not os.path.exists(text):
            reading.problems.append(f"{where}: calibration_dataset: there is no {text}")
    reading.checked.add(key)


def _meetings(jobs: Sequence[Job]) -> list[str]:
    """What is wrong with where jobs write: two of them in one directory by any spelling, one inside another,
    inside a source, or where another one's unfinished work lies."""
    problems: list[str] = []
    outputs: dict[str, Job] = {}
    names: dict[str, Job] = {}
    real = {job.index: os.path.realpath(job.output) for job in jobs}
    for job in jobs:
        if (same := names.setdefault(job.name, job)) is not job and same.output != job.output:
            problems.append(f"name {clipped(job.name)} is that of two jobs: give each its own")
        first = outputs.setdefault(real[job.index], job)
        if first is not job:
            how = "" if first.output == job.output else f": {first.output} is the same directory"
            problems.append(f"output {job.output}: is that of {first.name!r} and of {job.name!r}{how}")
    sources = {os.path.realpath(job.model): job for job in jobs if os.path.isabs(job.model)}
    for job in jobs:
        here = real[job.index]
        if here.endswith(".work") and (other := outputs.get(here.removesuffix(".work"))) is not None:
            problems.append(
                f"output {job.output}: is where the unfinished work of {other.name!r} lies: choose another"
            )
        for parent in (here, *map(str, Path(here).parents)):
            if (of := sources.get(parent)) is not None:
                what = "is" if parent == here else "lies in"
                problems.append(
                    f"output {job.output}: {what} the model of {of.name!r}, which is only read: choose "
                    "another directory, or a manifest of its own for a chain of jobs"
                )
            if parent != here and (outer := outputs.get(parent)) is not None:
                problems.append(f"output {job.output}: lies in the output of {outer.name!r}")
    return problems
