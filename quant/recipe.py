"""A job in data: what the command line and a YAML file both become. Unknown keys are refused with the known
ones listed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from quant import defaults
from quant.documents import LONGEST_WRITTEN, YAML_FAULTS, read_text
from quant.errors import Problems, QuantError, UsageError, clipped, one_of
from quant.hardware import count_in
from quant.schemes import UNQUANTIZED, Scheme, default_scheme, resolve_scheme
from quant.units import parse_size, parse_tokens
from quant.vllm.releases import VLLM_VERSION

#: `--method fp8` is rounding to the nearest FP8 number, by this method.
FP8_METHOD = "minmax"


def _as_options(keys: Iterable[str]) -> str:
    return ", ".join(f"--{k.replace('_', '-')}" for k in keys)


#: Values that a recipe may hold, aliases counted as often as they stand: a few lines of them can stand for
#: billions.
_MOST_VALUES = 100_000


@dataclass(frozen=True)
class Assignment:
    """What is done to a linear: the method with its settings, the scheme, and how its input is scaled before
    (None: by what is part of the method)."""

    method: str
    scheme: Scheme
    options: tuple[tuple[str, Any], ...] = ()
    outlier_suppression: str | None = None


class LayerSettings(BaseModel):
    """The keys that say how a linear is quantized: of the whole job, or of one of its rules."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    scheme: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    activations: Literal["dynamic", "static"] | None = None
    symmetric_activations: bool | None = None
    act_order: Literal["none", "static"] | None = None
    damping: float | None = Field(None, gt=0, le=1)
    clip_search: bool | None = None
    outlier_suppression: str | None = None
    options: dict[str, Any] = {}

    def resolved_scheme(self, method: str | None = None) -> Scheme:
        """
        Raises:
            UsageError: see :func:`quant.schemes.resolve_scheme`; or `fp8` with a scheme of integers.
        """
        name = self.scheme
        if name is None and self.bits is None and self.symmetric is None:
            name = default_scheme(method or "")
        if method in defaults.UNROUNDED:
            if given := [k for k in _OF_SCHEME if getattr(self, k) is not None]:
                raise UsageError(
                    f"--method {method} leaves weights in the model's own dtype: leave "
                    f"{_as_options(given)} out"
                )
            return UNQUANTIZED
        scheme = resolve_scheme(
            name,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            activations=self.activations,
            symmetric_activations=self.symmetric_activations,
        )
        if method == "fp8" and (scheme.weights.type, scheme.weights.bits) != ("float", 8):
            given = [k for k in ("scheme", "bits", "symmetric") if getattr(self, k) is not None]
            raise UsageError(
                f"--method fp8 rounds to FP8, scheme {scheme} is not one: leave {_as_options(given)} out, "
                "or use --method minmax"
            )
        return scheme

    def assignment(self, method: str) -> Assignment:
        """What these keys make of a linear with a method."""
        named = {
            k: getattr(self, k)
            for k in ("act_order", "damping", "clip_search")
            if getattr(self, k) is not None
        }
        if twice := sorted(named.keys() & self.options.keys()):
            raise UsageError(
                f"{twice[0]} is given twice, as --{twice[0].replace('_', '-')} and among the options: leave "
                "one of them out"
            )
        options = tuple(sorted({**self.options, **named}.items()))
        return Assignment(
            FP8_METHOD if method == "fp8" else method,
            self.resolved_scheme(method),
            options,
            self.outlier_suppression,
        )


#: Keys that a scheme, and a method, decide: a rule that names another one takes none of these from the job.
_OF_SCHEME = ("scheme", "bits", "group_size", "symmetric", "activations", "symmetric_activations")
_OF_METHOD = ("act_order", "damping", "clip_search", "options")
#: Keys that say which size schemes are chosen for: what is chosen stands in the rules.
MIXING = ("target_bits", "target_size", "fit", "context", "concurrency")
#: The key of a recipe file under which the model is pruned first (:mod:`quant.steps`); no key of a job.
PRUNE = "prune"
#: Keys that say where the finished output is uploaded to.
UPLOAD = ("push_to_hub", "private", "commit_message", "replace_on_hub")
#: Keys that say what a job may take of the machine that it runs on, and where.
BUDGETS = ("max_memory", "max_gpu_memory", "scratch_dir")


class Rule(LayerSettings):
    """Other numbers for some layers; the first rule that names a linear counts. What a rule leaves out is as
    the job has it, but a rule with a scheme or a method of its own takes none of the job's keys that belong
    to one. ``skip`` leaves the layers unquantized."""

    layers: str
    method: str | None = None
    skip: bool = False

    @model_validator(mode="after")
    def _skips_or_changes(self) -> Rule:
        if self.skip and (others := sorted(self.model_fields_set - {"layers", "skip"})):
            raise ValueError(
                f"skip leaves the layers as they are, and {', '.join(others)} would change them: give one "
                "of the two"
            )
        if self.method == "none":
            raise ValueError(
                "method none is the whole job's, for smoothing alone: skip: true leaves layers unquantized"
            )
        return self

    def assigned(self, job: Recipe) -> Assignment:
        """What is done to the rule's linears.

        Raises:
            UsageError: see :meth:`resolved_scheme`.
        """
        values = {
            k: getattr(self if k in self.model_fields_set else job, k) for k in LayerSettings.model_fields
        }
        if self.model_fields_set & {"scheme", "bits"}:
            values |= {k: getattr(self, k) for k in _OF_SCHEME}
        elif self.method == "fp8" and job.resolved_scheme(job.method).weights.type != "float":
            values |= {k: getattr(self, k) for k in _OF_SCHEME}  # the method names a scheme too
        elif (
            self.method is not None
            and job.method != "none"
            and values["scheme"] is values["bits"] is values["symmetric"] is None
        ):
            # the job's own, which it leaves to its method
            values["scheme"] = default_scheme(job.method)
        if self.method is not None:
            values |= {k: getattr(self, k) for k in _OF_METHOD}
        return LayerSettings(**values).assignment(self.method or job.method)


def _tokens(value: Any) -> Any:
    """A number of tokens as people write it (``2k``); all else is left to be judged."""
    if not isinstance(value, str):
        return value
    try:
        return parse_tokens(value)
    except UsageError:
        return value


def _size(value: Any) -> Any:
    """A size as people write it (``20GiB``); all else is left to be judged."""
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except UsageError:
        return value


class Recipe(LayerSettings):
    """One quantization. Field names are the option names of ``quant quantize`` with underscores."""

    model_path: Path
    output_path: Path
    method: str
    effort: Literal["fast", "balanced", "best"] | None = None
    rules: list[Rule] = []
    alpha: float | Literal["auto"] | None = None
    moe_calibration: Literal["routed", "all", "blend"] = defaults.MOE_CALIBRATION
    kv_cache_scheme: Literal["fp8"] | None = None
    keep_quantized: bool = False
    format: str = defaults.FORMAT
    target: Literal["vllm", "other"] = "vllm"
    calibration_dataset: list[Path] = []
    samples: int = Field(defaults.SAMPLES, ge=1, le=100_000)
    gradient_samples: int | None = Field(None, ge=1, le=100_000)
    sequence_length: Annotated[int | None, BeforeValidator(_tokens)] = Field(None, ge=8, le=10_000_000)
    shuffle: bool = False
    chat_template: bool | None = None
    target_bits: float | None = Field(None, gt=0, le=32)
    target_size: Annotated[int | None, BeforeValidator(_size)] = Field(None, gt=0)
    fit: bool = False
    context: Annotated[int | None, BeforeValidator(_tokens)] = Field(None, ge=1)
    concurrency: int | None = Field(None, ge=1)
    layers: str | None = None
    ignore: list[str] = []
    seed: int = Field(defaults.SEED, ge=0, lt=2**63)
    device: str | None = None
    max_memory: Annotated[int | None, BeforeValidator(_size)] = Field(None, gt=0)
    max_gpu_memory: Annotated[int | None, BeforeValidator(_size)] = Field(None, gt=0)
    scratch_dir: Path | None = None
    devices: str | None = None
    gpu: str | None = None
    tensor_parallel: int = Field(1, ge=1, le=1024)
    vllm_version: str = VLLM_VERSION
    fresh: bool = False
    backend: Literal["native", "auto-gptq", "autoawq"] = defaults.ENGINE
    backend_python: Path | None = None
    push_to_hub: str | None = None
    private: bool = False
    commit_message: str | None = None
    replace_on_hub: bool = False

    @property
    def mixes(self) -> bool:
        """Whether schemes are chosen layer by layer, for a size."""
        return self.target_bits is not None or self.target_size is not None or self.fit

    @property
    def exact_folds(self) -> bool:
        """Whether factors are powers of two everywhere: where nothing is rounded afterwards, nothing shall
        change."""
        return self.method == "none"

    def plain(self) -> dict[str, Any]:
        """What was given, as a recipe file has it, but where the output goes, whether it is uploaded, and
        what the machine may be asked for."""
        left_out = {"output_path", "fresh", *UPLOAD, *BUDGETS}
        value = self.model_dump(mode="json", exclude_unset=True)
        return {k: v for k, v in value.items() if k not in left_out}

    @property
    def size_asked(self) -> str:
        """The size that a scheme for every layer is to reach, as an option; empty where none is."""
        if self.target_bits is not None:
            return f"--target-bits {self.target_bits:g}"
        if self.target_size is not None:
            return f"--target-size {self.target_size}"
        return "--fit" if self.fit else ""

    def settings(self) -> dict[str, Any]:
        """What decides the output's bytes, for the fingerprint: everything but where it goes and whether it
        resumes."""
        # an effort is its method and options
        skipped = {
            "output_path",
            "fresh",
            "model_path",
            "backend_python",
            "effort",
            "devices",
            *MIXING,
            *UPLOAD,
            *BUDGETS,
        }
        return {
            k: (v if not isinstance(v, (Path, list, dict)) else str(v))
            for k, v in self.model_dump().items()
            if k not in skipped
        }


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values. A legacy engine brings its method and format; :func:`quant.jobs.resolve`
    also chooses what is not given.

    Raises:
        UsageError, Problems: unknown keys, missing ones, values out of range; all at once.
    """
    known = list(Recipe.model_fields)
    if unknown := [str(one_of("recipe key", key, known)) for key in values if key not in known]:
        raise UsageError(unknown[0]) if len(unknown) == 1 else Problems(unknown, exit_code=2)
    engine = str(values.get("backend", defaults.ENGINE))
    if engine in defaults.LEGACY_ENGINES:
        method, form = defaults.LEGACY_ENGINES[engine]
        values = {"method": method, "format": form, **values}
    elif values.get("backend_python") is not None:
        raise UsageError(
            f"--backend-python belongs to --backend {' or '.join(defaults.LEGACY_ENGINES)}: name one, or "
            "leave it out"
        )
    if "tensor_parallel" not in values and (ranks := _count_of(values.get("gpu"))) is not None:
        values = {**values, "tensor_parallel": ranks}
    try:
        return Recipe(**values)
    except ValidationError as error:
        problems = []
        for e in error.errors():
            name = ".".join(str(p) for p in e["loc"])
            if e["type"] == "extra_forbidden":
                problems.append(
                    str(one_of(f"{name.rpartition('.')[0]} key", e["loc"][-1], list(Rule.model_fields)))
                )
                continue
            if e["type"] == "missing":
                problems.append(f"{name}: {e['msg'][0].lower()}{e['msg'][1:]}")
                continue
            if name.startswith("alpha."):  # of each of its two kinds there is an error
                name, e["msg"] = "alpha", "input should be a number from 0 to 1, or auto"
            quotes = (
                ", in quotes" if e["type"] == "string_type" and isinstance(e["input"], int | float) else ""
            )
            problems.append(f"{name} is {clipped(e['input'])}: {e['msg'][0].lower()}{e['msg'][1:]}{quotes}")
        problems = list(dict.fromkeys(problems))
        raise Problems(problems, exit_code=2) from error


def _count_of(gpu: Any) -> int | None:
    """How many GPUs the target's name says; None where it says none, or is no part's, which is told with all
    else that is wrong."""
    try:
        return count_in(gpu) if isinstance(gpu, str) else None
    except UsageError:
        return None


def read_recipe(path: Path) -> dict[str, Any]:
    """Plain values of a YAML recipe.

    Raises:
        QuantError, UsageError: unreadable, not a mapping, unknown keys, a key that stands twice.
    """
    try:
        text = read_text(path, LONGEST_WRITTEN)
    except (OSError, UnicodeDecodeError) as error:
        raise QuantError(f"{path}: the recipe cannot be read: {error}") from error
    values = read_yaml(text, f"{path}:")
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of options to values, such as 'method: gptq'")
    known = [*Recipe.model_fields, PRUNE]
    if unknown := [str(one_of(f"{path}: recipe key", key, known)) for key in values if key not in known]:
        raise UsageError(unknown[0]) if len(unknown) == 1 else Problems(unknown, exit_code=2)
    return values


def recipe_values(config: Path | None, given: Mapping[str, Any], output: bool = True) -> dict[str, Any]:
    """The values of a job: those of a recipe file, and those given, which win.

    Args:
        output: whether an output must be named.

    Raises:
        QuantError, UsageError: see :func:`read_recipe`; or no model or no output is named by either.
    """
    of_file = read_recipe(config) if config is not None else {}
    if "method" in given:  # each names the method: the file's gives way like any other key
        of_file.pop("effort", None)
    if "effort" in given:
        of_file.pop("method", None)
    values = {**of_file, **given}
    needed = ("model_path", "output_path") if output else ("model_path",)
    if missing := [k for k in needed if k not in values]:
        them = "it as an option" if len(missing) == 1 else "them as options"
        raise UsageError(f"missing {_as_options(missing)}: give {them} or in the recipe of --config")
    return values


class _Loader(yaml.SafeLoader):
    """Plain values; a key that stands twice in a mapping is a mistake, where YAML's own loader takes the last
    one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {clipped(key.value)} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """A YAML document's plain value; ``where`` begins the message.

    Raises:
        UsageError: not YAML; or aliases that stand for more than :data:`_MOST_VALUES` values.
    """
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, *YAML_FAULTS) as error:
        raise UsageError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}") from error
    stack, count = [value], 0
    while stack:
        one = stack.pop()
        count += 1
        if count > _MOST_VALUES:
            raise UsageError(
                f"{where} has aliases (*name) that stand for more than {_MOST_VALUES:,} values: write the "
                "values out"
            )
        stack += (
            [*one.keys(), *one.values()]
            if isinstance(one, dict)
            else one
            if isinstance(one, (list, tuple, set))
            else ()
        )
    return value
