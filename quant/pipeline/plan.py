"""Everything that is known before the first block: what goes where, how large it gets, and every problem at
once."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from quant.calibration.text import empty_texts
from quant.checkpoint.header import FLOATS
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.checkpoint.writer import TensorSpec, file_bytes
from quant.errors import Problems, QuantError, UsageError, clipped
from quant.formats import Format, FormatRegistry
from quant.models.adapter import block_of, decoder_linears
from quant.outlier_suppression import OutlierSuppressionRegistry, Suppressor
from quant.pipeline.selection import select, selected
from quant.planning.target import target_problems as gpu_problems
from quant.quantizers import Quantizer, QuantizerRegistry
from quant.recipe import Assignment, Recipe
from quant.schemes import UNQUANTIZED, Scheme
from quant.units import format_size
from quant.vllm.cache import CACHE_PROJECTIONS
from quant.vllm.config import block_count as stated_block_count
from quant.vllm.config import quantization_config, stated_dtype
from quant.vllm.layers import Linear, fused_name, shape_problems

#: Families whose linears are transformers' Conv1D: groups would run along the outputs.
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
#: A shard is closed at this size, as transformers does.
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output: a copy of the source's, a part of a quantized linear, or ``made`` by
    calibration (a scale of the KV cache)."""

    spec: TensorSpec
    linear: str | None
    made: bool = False


@dataclass(frozen=True)
class Shard:
    file: str
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        return file_bytes([t.spec for t in self.tensors])


@dataclass(frozen=True)
class Unit:
    """What is finished, synced and journalled at once: a decoder block, or what lies outside the blocks
    (``block`` None)."""

    name: str
    block: int | None
    shards: tuple[Shard, ...]

    @property
    def made(self) -> list[TensorSpec]:
        """Tensors that calibration makes."""
        return [t.spec for s in self.shards for t in s.tensors if t.made]


@dataclass(frozen=True)
class JobPlan:
    """A job ready to run. ``output_bytes`` is exact: the tensors' names, dtypes and shapes are all fixed
    here."""

    recipe: Recipe
    checkpoint: Checkpoint
    format: Format
    linears: Mapping[str, Linear]
    assignments: Mapping[str, Assignment]
    unquantized: tuple[str, ...]
    units: tuple[Unit, ...]
    dtype: str

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

    @property
    def output_bytes(self) -> int:
        return sum(s.nbytes for u in self.units for s in u.shards)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the quantized linears, everything counted."""
        stored = sum(
            t.spec.nbytes for u in self.units for s in u.shards for t in s.tensors if t.linear is not None
        )
        return round(8 * stored / sum(x.n * x.k for x in self.linears.values()), 4)

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
            "linears": len(self.linears),
            "unquantized_linears": list(self.unquantized),
            "bits_per_weight": self.bits_per_weight,
            "source_bytes": self.checkpoint.nbytes,
            "output_bytes": self.output_bytes,
            "side_files_bytes": self.copied_bytes,
        }


def block_count(checkpoint: Checkpoint) -> int:
    """Number of decoder blocks: as config.json says, else as the tensors' names show."""
    stated = stated_block_count(checkpoint.config)
    return stated or 1 + max((b for n in checkpoint.tensors if (b := block_of(n)) is not None), default=-1)


def plan_job(recipe: Recipe) -> JobPlan:
    """Checks a job and lays out its output. Reads headers only.

    Raises:
        Problems, QuantError: everything that is wrong, listed together.
    """
    # a wrong name or option is a mistake of the request, whatever else is wrong
    make_quantizer(recipe.assignment(recipe.method))
    checkpoint = open_checkpoint(recipe.model_path)
    problems = _source_problems(checkpoint) + target_problems(recipe.model_path, recipe.output_path)
    form = FormatRegistry.get(recipe.format)
    dtype = checkpoint.dtype
    if dtype not in ("BF16", "F16", "F32"):
        problems.append(
            f"{checkpoint.path}: most weights are stored as {dtype}: quantizing starts from BF16, F16 or F32"
        )
    if form.quant_method is not None:
        # of the scales; a config may state another dtype than the weights are stored in
        dtype = stated_dtype(checkpoint.config) or dtype
    everything = decoder_linears(checkpoint.tensors, checkpoint.config)
    if not everything:
        problems.append(
            f"{checkpoint.path}: no linear of a decoder block is found among its {len(checkpoint.tensors)} "
            "tensors (names such as model.layers.0.….weight)"
        )
        raise Problems(problems)
    assignments, mistakes = assign(recipe, everything, block_count(checkpoint))
    problems += mistakes
    linears = {}
    for name, assignment in assignments.items():
        n, k = checkpoint.info(f"{name}.weight").shape
        linears[name] = Linear(name, n, k, assignment.scheme.weights, assignment.scheme.activations)
    different = list(dict.fromkeys(assignments.values())) or [recipe.assignment(recipe.method)]
    problems += _assignment_problems(recipe, different, form)
    problems += shape_problems(linears.values(), recipe.tensor_parallel)
    if not any("do not divide" in p for p in problems):
        problems += [p for linear in linears.values() for p in form.problems(linear)][:8]
    if recipe.target == "vllm" and not mistakes:  # linears of a rule with a mistake are missing
        problems += _fused_problems(linears, assignments, everything, form)
    if recipe.calibration_dataset and any(calibrated(recipe, a) for a in different):
        problems += empty_texts(recipe.calibration_dataset)
    caches = kv_scales(checkpoint, everything) if recipe.kv_cache_scheme else {}
    if recipe.kv_cache_scheme and not caches:
        problems.append(
            f"{checkpoint.path}: no layer has any of {', '.join(CACHE_PROJECTIONS)}, beside which vLLM "
            "looks for a cache's scales: leave --kv-cache-scheme out"
        )
    if recipe.kv_cache_scheme and (latent := [n for n in everything if n.endswith(".kv_a_proj_with_mqa")]):
        problems.append(
            f"{latent[0]}: of latent attention vLLM caches the latent itself, and what is measured here are "
            "the keys and values made from it: "
            "leave --kv-cache-scheme out"
        )
    # of others no shapes are known
    fitting = [] if any("do not divide" in p for p in problems) else linears.values()
    made = [s.name for x in fitting for s in form.specs(x, dtype)] + [
        s.name for specs in caches.values() for s in specs
    ]
    problems += _unlabelled_problems(checkpoint, made, set(linears))
    if problems:
        raise Problems(list(dict.fromkeys(problems)), exit_code=2 if mistakes else 1)
    unquantized = tuple(unquantized_linears(checkpoint, linears))
    units = lay_out(checkpoint, linears, form, dtype, caches)
    plan = JobPlan(recipe, checkpoint, form, linears, assignments, unquantized, units, dtype)
    check_disk(recipe.output_path, plan.output_bytes + plan.copied_bytes)
    return plan


def assign(recipe: Recipe, everything: Sequence[str], blocks: int) -> tuple[dict[str, Assignment], list[str]]:
    """What is done to each linear that is quantized, in file order; and every mistake in the selection and
    the rules: one that names nothing, or nothing that a rule before it has not named; a method, scheme or
    setting that is not. Linears that only such a rule names are left out."""
    chosen, problems = selected(everything, recipe.layers, recipe.ignore, blocks)
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
        except UsageError as error:
            problems.append(f"rule {number}: {error}")
            assignment = None
        assignments |= {n: assignment for n in hit if n not in ruled}
        ruled |= set(hit)
    left = {n: a for n, a in assignments.items() if a is not None}
    if not left and not problems:
        problems.append("no linear is left to quantize: every one is skipped by a rule")
    return left, problems


def _assignment_problems(recipe: Recipe, assignments: Sequence[Assignment], form: Format) -> list[str]:
    """What methods, schemes, format and target have against each other."""
    problems = []
    for scheme in dict.fromkeys(a.scheme for a in assignments):
        if scheme == UNQUANTIZED and form.quant_method is not None:
            problems.append(
                f"--method none makes an ordinary checkpoint, format {form.name} holds quantized weights: "
                "use --format plain"
            )
        elif reason := form.refuse(scheme, recipe.target):
            problems.append(f"scheme {scheme} in format {form.name}: {reason}")
        if recipe.target == "vllm":
            problems += gpu_problems(scheme, form.name, recipe.gpu, recipe.vllm_version)
    for assignment in assignments:
        if reason := QuantizerRegistry.get(assignment.method).refuse(assignment.scheme.weights):
            problems.append(f"--method {assignment.method}: {reason}")
    if not form.mixed and len({a.scheme for a in assignments}) > 1:
        problems.append(
            f"the rules give several schemes; a {form.name} file holds one: use --format compressed-tensors"
        )
    if recipe.kv_cache_scheme and not form.kv_cache:
        holders = ", ".join(f.name for f in FormatRegistry if f.kv_cache)
        problems.append(
            f"--kv-cache-scheme: a {form.name} checkpoint has no place for the cache's scales: use --format "
            f"{holders}"
        )
    if recipe.outlier_suppression not in (None, "none"):
        make_suppressor(recipe.outlier_suppression, recipe.alpha)
    elif recipe.alpha is not None:
        problems.append("--alpha belongs to --outlier-suppression smooth_quant: name it too")
    return problems


def make_quantizer(assignment: Assignment) -> Quantizer:
    """The method of an assignment with the settings it has.

    Raises:
        UsageError: unknown method, or an option that this method does not have.
    """
    return _configured(
        QuantizerRegistry.get(assignment.method), f"--method {assignment.method}", dict(assignment.options)
    )


def make_suppressor(name: str, alpha: float | str | None) -> Suppressor:
    """
    Raises:
        UsageError: unknown name, or one that has no alpha.
    """
    kind = OutlierSuppressionRegistry.get(name)
    return _configured(kind, f"--outlier-suppression {name}", {} if alpha is None else {"alpha": alpha})


def calibrated(recipe: Recipe, assignment: Assignment) -> bool:
    """Whether calibration text is run for an assignment: its method, its suppressor, its activations or the
    job's KV cache ask for some."""
    quantizer, activations = make_quantizer(assignment), assignment.scheme.activations
    name = recipe.outlier_suppression or quantizer.suppressor
    suppressed = (
        bool(name)
        and name != "none"
        and bool(make_suppressor(name, recipe.alpha if recipe.outlier_suppression else None).needs)
    )
    stored = activations is not None and activations.calibrated
    return bool(quantizer.needs) or suppressed or stored or recipe.kv_cache_scheme is not None


def _configured(kind: Callable[..., Any], what: str, options: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    for option in options:
        if option not in known:
            raise UsageError(
                f"--{str(option).replace('_', '-')} is not an option of {what}: "
                f"{'it has ' + ', '.join(known) if known else 'it has none'}"
            )
    if wrong := _wrong_types(kind, options):
        raise UsageError(f"{what}: {'; '.join(wrong)}")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what}: {error}") from error


def _wrong_types(kind: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """Settings that are not of their field's type: dataclasses take anything, and a text for a number would
    be noticed in the middle of the work."""
    try:
        hints = get_type_hints(kind)
    except NameError:
        return []  # an extension's types that only a type checker knows
    wrong = []
    for name, value in options.items():
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except PydanticSchemaGenerationError:
            continue  # a type of the extension's own: it judges itself
        except ValidationError as error:
            kinds = " or ".join(
                dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors())
            )
            wrong.append(f"{name} is {clipped(value)}: must be {kinds}")
        else:
            if isinstance(value, float) and not math.isfinite(value):
                wrong.append(f"{name} is {value}: must be a finite number")
    return wrong


def kv_scales(checkpoint: Checkpoint, everything: Sequence[str]) -> dict[int, list[TensorSpec]]:
    """By block, the scales of an FP8 KV cache: one number each for K and V, beside the projections they come
    from."""
    found: dict[int, list[TensorSpec]] = {}
    for name in everything:
        attention, _, last = name.rpartition(".")
        block = block_of(name + ".")
        if block is not None and last in CACHE_PROJECTIONS:
            found[block] = [TensorSpec(f"{attention}.{x}_scale", "F32", (1,)) for x in "kv"]
    return found


def _source_problems(checkpoint: Checkpoint) -> list[str]:
    problems = []
    architectures = checkpoint.config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        problems.append(
            f"{checkpoint.path / 'config.json'}: architectures is {clipped(architectures)}: a list of the "
            "model's class is needed, such as "
            '["LlamaForCausalLM"]: engines choose the model by it'
        )
    if checkpoint.config.get("model_type") in _TRANSPOSED:
        problems.append(
            f"{checkpoint.path}: model type {checkpoint.config['model_type']!r} stores its weights "
            "transposed, [inputs, outputs], which is not supported: "
            "choose a model whose linears are stored as [outputs, inputs]"
        )
    empty = [
        n
        for n, i in checkpoint.tensors.items()
        if n.endswith(".weight") and len(i.shape) == 2 and not all(i.shape)
    ]
    if empty:
        problems.append(
            f"{checkpoint.info(empty[0]).file}: {empty[0]} is empty: the source is damaged, fetch it again"
        )
    quantization = quantization_config(checkpoint.config)
    if quantization is not None:
        method = quantization.get("quant_method", "unknown")
        problems.append(
            f"{checkpoint.path}: is already quantized ({method}): quantize the original, or turn it into "
            "plain weights first with quant export-vllm --format plain"
        )
    return problems


def _unlabelled_problems(checkpoint: Checkpoint, made: Iterable[str], linears: Collection[str]) -> list[str]:
    """Signs of an earlier quantization that config.json says nothing of: codes in place of weights, numbers
    that the output would have too."""
    weights = {
        n: i
        for n, i in checkpoint.tensors.items()
        if n.endswith(".weight") and len(i.shape) == 2 and block_of(n) is not None
    }
    codes = [n for n, i in weights.items() if i.dtype not in ("BF16", "F16", "F32", "F64")]
    found = [n for n in made if n in checkpoint.tensors and n.removesuffix(".weight") not in linears]
    return [
        f"{checkpoint.path}: {names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''} {why}: "
        "it looks quantized, and its config.json has no "
        "quantization_config: quantize the original"
        for names, why in (
            (codes, f"is stored as {checkpoint.info(codes[0]).dtype}" if codes else ""),
            (found, "is there already"),
        )
        if names
    ]


def target_problems(model_path: Path, output_path: Path) -> list[str]:
    """Why an output directory cannot be made where it is asked for."""
    output, source = output_path.resolve(), model_path.resolve()
    if os.path.exists(output) and not output.is_dir():
        return [f"{output}: the output path is a file: choose another --output-path"]
    if os.path.exists(output) and any(output.iterdir()):
        return [f"{output}: the output directory is not empty: choose another --output-path, or remove it"]
    if output == source or source in output.parents:
        return [
            f"{output}: the output lies in the source directory: choose an --output-path outside {source}"
        ]
    folder = _existing(output.parent)
    if not folder.is_dir():
        return [f"{output}: {folder} is a file, no directory: choose another --output-path"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [
            f"{output}: {folder} cannot be written to: choose another --output-path, or change its "
            "permissions"
        ]
    return []


def _existing(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
    # pathlib's would raise for a path below a directory that cannot be searched
    while not os.path.exists(path):
        path = path.parent
    return path


def _fused_problems(
    linears: Mapping[str, Linear],
    assignments: Mapping[str, Assignment],
    everything: Sequence[str],
    form: Format,
) -> list[str]:
    """vLLM builds q/k/v and gate/up as one layer: all of its shards are quantized alike, or none."""
    if form.quant_method is None:
        return []
    members: dict[str, list[str]] = {}
    for name in everything:
        members.setdefault(fused_name(name), []).append(name)
    problems: dict[str, str] = {}  # one for each kind of fused layer
    for fused, names in members.items():
        kind = fused.rpartition(".")[2]
        if kind in problems:
            continue
        inside = [n for n in names if n in linears]
        schemes = dict.fromkeys(str(linears[n].scheme) for n in inside)
        if len(schemes) > 1:
            problems[kind] = (
                f"{fused}: vLLM fuses {', '.join(n.rsplit('.', 1)[-1] for n in names)} into one layer, but "
                f"they would become {' and '.join(schemes)}: "
                "give them one scheme"
            )
            continue
        methods = dict.fromkeys(assignments[n].method for n in inside)
        if len(dict.fromkeys(assignments[n] for n in inside)) > 1 and linears[inside[0]].weights.strategy in (
            "tensor",
            "tensor_group",
        ):
            problems[kind] = (
                f"{fused}: {', '.join(n.rsplit('.', 1)[-1] for n in inside)} share one number in scheme "
                f"{next(iter(schemes))}, "
                "but are made by "
                f"{' and '.join(methods)}{'' if len(methods) > 1 else ' with different settings'}: give "
                "them one method with one setting"
            )
            continue
        if inside and len(inside) < len(names):
            out = [n.rsplit(".", 1)[-1] for n in names if n not in linears]
            problems[kind] = (
                f"{fused}: vLLM fuses {', '.join(n.rsplit('.', 1)[-1] for n in names)} into one layer, but "
                f"{', '.join(out)} would stay unquantized: "
                "select all of them or none, or use --target other"
            )
    return list(problems.values())


def unquantized_linears(checkpoint: Checkpoint, linears: Mapping[str, Linear]) -> list[str]:
    """Module names to list as ignored: linears of any part of the model that stay as they are; always the
    head, which may be tied."""
    names = {"lm_head"}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if (
            module not in linears
            and name.endswith(".weight")
            and len(info.shape) == 2
            and info.dtype in FLOATS
        ):
            if not re.search(r"(^|\.)(embed\w*|wte|wpe|\w*_embeddings?)$", module):
                names.add(module)
    return sorted(names, key=lambda n: (block_of(n + ".") is None, block_of(n + ".") or 0, n))


def lay_out(
    checkpoint: Checkpoint,
    linears: Mapping[str, Linear],
    form: Format,
    dtype: str,
    made: Mapping[int, Sequence[TensorSpec]] | None = None,
) -> tuple[Unit, ...]:
    """Units in file order: what lies outside the blocks first, then block by block, each in shards of at most
    :data:`SHARD_BYTES`.

    ``made``: by block, tensors that the source does not have.
    """
    members: dict[int | None, list[OutputTensor]] = {None: []}
    for name in sorted(checkpoint.tensors, key=lambda n: (block_of(n) is None, block_of(n) or 0, n)):
        info = checkpoint.tensors[name]
        module = name.removesuffix(".weight")
        entry = members.setdefault(block_of(name), [])
        if name.endswith(".weight") and module in linears:
            linear = linears[module]
            entry += [OutputTensor(spec, module) for spec in form.specs(linear, dtype)]
        else:
            entry.append(OutputTensor(TensorSpec(name, info.dtype, info.shape), None))
    for index, specs in (made or {}).items():
        members.setdefault(index, []).extend(OutputTensor(spec, None, made=True) for spec in specs)
    pieces: list[tuple[int | None, list[list[OutputTensor]]]] = []
    for block in sorted(members, key=lambda b: -1 if b is None else b):
        shards: list[list[OutputTensor]] = [[]]
        size = 0
        for tensor in members[block]:
            if (
                size + tensor.spec.nbytes > SHARD_BYTES
                and shards[-1]
                and not _same_linear(shards[-1][-1], tensor)
            ):
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.spec.nbytes
        if shards[0]:
            pieces.append((block, shards))
    total = sum(len(shards) for _, shards in pieces)
    units, number = [], 0
    for block, shards in pieces:
        files = []
        for tensors in shards:
            number += 1
            file = "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            files.append(Shard(file, tuple(tensors)))
        units.append(Unit("outside" if block is None else f"block {block}", block, tuple(files)))
    return tuple(units)


def _same_linear(a: OutputTensor, b: OutputTensor) -> bool:
    return a.linear is not None and a.linear == b.linear


def check_disk(output_path: Path, needed: int, scratch: int = 0) -> None:
    """
    Raises:
        QuantError: the disk under ``output_path`` has less than ``needed + scratch`` bytes free; what
            unfinished work takes counts as free."""
    output_path = output_path.absolute()
    folder = _existing(output_path.parent)
    free = shutil.disk_usage(folder).free
    work = output_path.with_name(output_path.name + ".work")
    if work.exists():
        needed = max(needed - sum(f.stat().st_size for f in work.rglob("*") if f.is_file()), 0)
    if needed + scratch > free:
        files = f" and {format_size(scratch)} for calibration activations" if scratch else ""
        raise QuantError(
            f"{folder}: {format_size(needed)} are needed for the output{files}, {format_size(free)} are "
            "free: free some room, or choose another "
            f"--output-path{', or use fewer --samples' if scratch else ''}"
        )


def weight_map(units: Iterable[Unit]) -> dict[str, str]:
    """Tensor names to files, for the index."""
    return {t.spec.name: s.file for u in units for s in u.shards for t in s.tensors}
