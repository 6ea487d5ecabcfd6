"""What stands against a job before it starts: each check returns its problems, one line each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quant import defaults
from quant.checkpoint.header import WIDE_FLOATS
from quant.checkpoint.journal import is_unpublished
from quant.checkpoint.reader import Checkpoint
from quant.errors import QuantError, clipped
from quant.evaluation.agreement import file_problems
from quant.formats import Format, FormatRegistry
from quant.models.account import LARGEST_REST
from quant.models.linears import LinearRef, holders
from quant.models.roles import block_of, kind_of
from quant.pipeline.methods import make_quantizer, make_suppressor, takes_alpha
from quant.pipeline.source import QuantizedSource
from quant.planning.target import target_problems
from quant.quantizers import QuantizerRegistry
from quant.recipe import Assignment, Recipe
from quant.schemes import UNQUANTIZED, Scheme
from quant.units import format_size
from quant.vllm.layers import Linear, fused_layers

if TYPE_CHECKING:
    from quant.models.skeleton import Skeleton
    from quant.pipeline.plan import JobPlan


def gpu_problems(recipe: Recipe, assignments: Sequence[Assignment], form: Format) -> list[str]:
    """What the GPU, and the release of vLLM, that are made for have against the schemes."""
    schemes = dict.fromkeys(a.scheme for a in assignments) if recipe.target == "vllm" else ()
    return [p for s in schemes for p in target_problems(s, form.name, recipe.gpu, recipe.vllm_version)]


def assignment_problems(recipe: Recipe, assignments: Sequence[Assignment], form: Format) -> list[str]:
    """What options have against each other, whatever the model: methods, schemes, format and target."""
    problems = []
    for scheme in dict.fromkeys(a.scheme for a in assignments):
        if scheme == UNQUANTIZED and form.quant_method is not None:
            problems.append(
                f"--method {recipe.method} makes an ordinary checkpoint, format {form.name} holds quantized "
                "weights: use --format plain"
            )
        elif reason := form.refuse(scheme, recipe.target):
            problems.append(f"scheme {scheme} in format {form.name}: {reason}")
    needs = frozenset[str]().union(*(QuantizerRegistry.get(a.method).needs for a in assignments))
    if recipe.gradient_samples is not None and "gradients" not in needs:
        problems.append("--gradient-samples belongs to --method yaqa: name it, or leave the rows out")
    for assignment in assignments:
        if reason := QuantizerRegistry.get(assignment.method).refuse(assignment.scheme.weights):
            problems.append(f"--method {assignment.method}: {reason}")
    if not form.together({a.scheme for a in assignments}):
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
    elif recipe.alpha is not None and not any(
        name and name != "none" and takes_alpha(name) for name in (a.outlier_suppression for a in assignments)
    ):
        problems.append("--alpha belongs to --outlier-suppression smooth_quant: name it too")
    return problems


def method_problems(linears: Mapping[str, Linear], assignments: Mapping[str, Assignment]) -> list[str]:
    """What methods that care for the shape of a weight have against those of linears, each kind once."""
    problems: dict[str, None] = {}
    made = {a: make_quantizer(a) for a in set(assignments.values())}
    for name, linear in linears.items():
        judge = getattr(made[assignments[name]], "shape_problem", None)
        if judge is not None and (reason := judge(linear.k)):
            problems[f"{kind_of(name)}: {reason}"] = None
    return list(problems)


def source_problems(checkpoint: Checkpoint, source: QuantizedSource | None, recipe: Recipe) -> list[str]:
    """What stands against a source, whatever is to be made of it.

    Args:
        checkpoint: with the values of its weights.
        source: what it was, where it is quantized already.
    """
    problems = []
    architectures = checkpoint.config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        problems.append(
            f"{checkpoint.path / 'config.json'}: architectures is {clipped(architectures)}: a list of the "
            "model's class is needed, such as "
            '["LlamaForCausalLM"]: engines choose the model by it'
        )
    problems += [f"{checkpoint.path}: {line}" for line in file_problems(checkpoint, build=True)]
    empty = [
        n
        for n, i in checkpoint.tensors.items()
        if n.endswith(".weight") and len(i.shape) == 2 and not all(i.shape)
    ]
    if empty:
        problems.append(
            f"{checkpoint.info(empty[0]).file}: {empty[0]} is empty: the source is damaged, fetch it again"
        )
    if source is not None and recipe.backend != defaults.ENGINE:
        problems.append(
            f"{checkpoint.path}: is already quantized ({source.method}), which {recipe.backend} does not "
            "read: use --backend native, or turn it into plain weights first with quant export-vllm "
            "--format plain"
        )
    if source is None and recipe.keep_quantized:
        problems.append(
            f"{checkpoint.path}: is not quantized, so there is nothing to keep: leave --keep-quantized out"
        )
    return problems


def kept_problems(
    recipe: Recipe, schemes: Collection[Scheme], kept: Collection[Assignment], form: Format
) -> list[str]:
    """What stands against codes that are carried over: the file that holds them beside others, and the GPU.

    Args:
        schemes: of everything that the file will hold.
    """
    if not kept:
        return []
    problems = []
    if not form.together(schemes):
        problems.append(
            f"--keep-quantized: the file would hold {' and '.join(sorted(map(str, schemes)))}; a {form.name} "
            "file holds one scheme: use --format compressed-tensors, or leave --keep-quantized out"
        )
    if recipe.target == "vllm":
        for scheme in dict.fromkeys(a.scheme for a in kept):
            problems += target_problems(scheme, form.name, recipe.gpu, recipe.vllm_version)
    return problems


def unlabelled_problems(checkpoint: Checkpoint, made: Iterable[str], linears: Collection[str]) -> list[str]:
    """Signs of an earlier quantization that config.json says nothing of: codes in place of weights, numbers
    that the output would have too."""
    weights = {
        n: i
        for n, i in checkpoint.tensors.items()
        if n.endswith(".weight") and len(i.shape) == 2 and block_of(n) is not None
    }
    codes = [n for n, i in weights.items() if i.dtype not in WIDE_FLOATS]
    unlabelled = [n for n in made if n in checkpoint.tensors and n.removesuffix(".weight") not in linears]
    return [
        f"{checkpoint.path}: {names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''} {why}: "
        "it looks quantized, and its config.json has no "
        "quantization_config: quantize the original"
        for names, why in (
            (codes, f"is stored as {checkpoint.info(codes[0]).dtype}" if codes else ""),
            (unlabelled, "is there already"),
        )
        if names
    ]


def stack_problems(refs: Iterable[LinearRef], written: Collection[str], form: Format) -> list[str]:
    """Experts that a format has in one tensor for a layer, and that are not all to be quantized."""
    return [
        f"{name}: --format {form.name} has all of its experts in one tensor, and "
        f"{sum(x.name in written for x in held)} of {len(held)} linears are quantized: select all of them or "
        "none"
        for name, held in holders(refs).items()
        if 0 < sum(x.name in written for x in held) < len(held)
    ][:1]


def output_problems(model_path: Path, output_path: Path) -> list[str]:
    """Why an output directory cannot be made where it is asked for."""
    output, source = output_path.resolve(), model_path.resolve()
    if os.path.exists(output) and not output.is_dir():
        return [f"{output}: the output path is a file: choose another --output-path"]
    if os.path.exists(output) and any(output.iterdir()) and not is_unpublished(output):
        return [f"{output}: the output directory is not empty: choose another --output-path, or remove it"]
    if output == source or source in output.parents:
        return [
            f"{output}: the output lies in the source directory: choose an --output-path outside {source}"
        ]
    folder = existing_folder(output.parent)
    if not folder.is_dir():
        return [f"{output}: {folder} is a file, no directory: choose another --output-path"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [
            f"{output}: {folder} cannot be written to: choose another --output-path, or change its "
            "permissions"
        ]
    return []


def existing_folder(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
    # pathlib's would raise for a path below a directory that cannot be searched
    while not os.path.exists(path):
        path = path.parent
    return path


def fused_problems(
    linears: Mapping[str, Linear],
    assignments: Mapping[str, Assignment],
    everything: Sequence[str],
    form: Format,
    kinds: Collection[str] = (),
) -> list[str]:
    """vLLM builds q/k/v and gate/up as one layer: all of its shards are quantized alike, or none.

    Args:
        everything: all linears that could be quantized.
        kinds: the model types of the config and its parts.
    """
    if form.quant_method is None:
        return []
    problems: dict[str, str] = {}  # one for each kind of fused layer
    for fused, names in fused_layers(everything, kinds).items():
        kind = fused.rpartition(".")[2]
        if kind in problems:
            continue
        inside = [n for n in names if n in linears]
        schemes = dict.fromkeys(str(linears[n].scheme) for n in inside)
        if len(schemes) > 1:
            problems[kind] = (
                f"{fused}: vLLM fuses {_last_parts(names)} into one layer, but "
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
                f"{fused}: {_last_parts(inside)} share one number in scheme "
                f"{next(iter(schemes))}, "
                "but are made by "
                f"{' and '.join(methods)}{'' if len(methods) > 1 else ' with different settings'}: give "
                "them one method with one setting"
            )
            continue
        if inside and len(inside) < len(names):
            out = [n for n in names if n not in linears]
            problems[kind] = (
                f"{fused}: vLLM fuses {_last_parts(names)} into one layer, but "
                f"{_last_parts(out)} would stay unquantized: "
                "select all of them or none, or use --target other"
            )
    return list(problems.values())


def _last_parts(names: Sequence[str]) -> str:
    """Members of a fused layer, short: ``gate_proj, up_proj``; of a layer's experts, which share their last
    parts, ``gate_proj, up_proj of experts 3, 5, 6 and 14 more``."""
    lasts = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in names))
    numbers = list(dict.fromkeys(n.split(".")[-2] for n in names if ".experts." in n))
    if not numbers:
        return lasts
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"{lasts} of expert{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:3])}{more}"


def check_disk(output_path: Path, needed: int, scratch: int = 0) -> None:
    """
    Raises:
        QuantError: the disk under ``output_path`` has less than ``needed + scratch`` bytes free; what
            unfinished work takes counts as free."""
    output_path = output_path.absolute()
    folder = existing_folder(output_path.parent)
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


def check_scratch(folder: Path, needed: int) -> None:
    """
    Raises:
        QuantError: the disk under a folder of ``--scratch-dir`` has fewer bytes free than activations take.
    """
    free = shutil.disk_usage(existing_folder(folder.absolute())).free
    if needed > free:
        raise QuantError(
            f"--scratch-dir {folder}: {format_size(needed)} of calibration activations go there, "
            f"{format_size(free)} are free: free some room, name another folder, or use fewer --samples"
        )


def unseen_problem(plan: JobPlan, skeleton: Skeleton, known: Collection[str]) -> str | None:
    """Why a job cannot be run of whose linears a pass shows only the inputs of ``known``, or None.

    The others are rounded from their weights alone. Of those that the model reads they must be a small part;
    of no account are linears that it does not read at all, and blocks that it passes by.
    """
    unseen = [n for n in plan.linears if n not in known]
    calibrated = [n for n in unseen if (a := plan.linears[n].activations) is not None and a.calibrated]
    read = {
        skeleton.block_prefix(b) + n
        for b in range(skeleton.block_count)
        if skeleton.groups(b)
        for n in skeleton.linears(b)
    }
    stray = calibrated or [n for n in unseen if n in read]
    total = sum(w.elements for w in plan.weights)
    if not calibrated and sum(plan.linears[n].n * plan.linears[n].k for n in stray) <= LARGEST_REST * total:
        return None
    other = "a --scheme whose inputs take no calibration" if calibrated else "--method minmax"
    return (
        f"{', '.join(stray[:3])}{f' and {len(stray) - 3} more' if len(stray) > 3 else ''} "
        f"{'is' if len(stray) == 1 else 'are'} not among the linears that a block is seen to run, so there "
        f"is no calibration for it: leave it with --ignore, or use {other}"
    )
