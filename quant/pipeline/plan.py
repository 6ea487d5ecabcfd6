"""Everything that is known before the first block: what goes where, how large it gets, and every problem at once."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint.header import FLOATS
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.checkpoint.writer import TensorSpec, file_bytes
from quant.errors import Problems, QuantError, UsageError
from quant.formats import Format, FormatRegistry, Linear, quantization_config
from quant.formats.base import shape_problems, stated_dtype
from quant.models.adapter import block_of, decoder_linears, fused_name
from quant.pipeline.selection import select
from quant.planning.target import target_problems as gpu_problems
from quant.quantizers import QuantizerRegistry
from quant.recipe import Recipe
from quant.schemes import Scheme
from quant.units import format_size

#: Families whose linears are transformers' Conv1D: groups would run along the outputs.
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
#: A shard is closed at this size, as transformers does.
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output: a copy of the source's, or a part of a quantized linear."""

    spec: TensorSpec
    linear: str | None


@dataclass(frozen=True)
class Shard:
    file: str
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        return file_bytes([t.spec for t in self.tensors])


@dataclass(frozen=True)
class Unit:
    """What is finished, synced and journalled at once: a decoder block, or what lies outside the blocks (``block`` None)."""

    name: str
    block: int | None
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class JobPlan:
    """A job ready to run. ``output_bytes`` is exact: the tensors' names, dtypes and shapes are all fixed here."""

    recipe: Recipe
    checkpoint: Checkpoint
    scheme: Scheme
    format: Format
    linears: Mapping[str, Linear]
    unquantized: tuple[str, ...]
    units: tuple[Unit, ...]
    dtype: str

    @property
    def output_bytes(self) -> int:
        return sum(s.nbytes for u in self.units for s in u.shards)

    @property
    def copied_bytes(self) -> int:
        return sum(f.path.stat().st_size for f in self.checkpoint.side_files() if not f.dropped)

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": str(self.checkpoint.path),
            "output_path": str(self.recipe.output_path),
            "method": self.recipe.method,
            "scheme": self.scheme.to_dict(),
            "format": self.format.name,
            "linears": len(self.linears),
            "unquantized_linears": list(self.unquantized),
            "source_bytes": self.checkpoint.nbytes,
            "output_bytes": self.output_bytes,
            "side_files_bytes": self.copied_bytes,
        }


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the text decoder: ``text_config`` of a multimodal wrapper, else the whole."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def block_count(checkpoint: Checkpoint) -> int:
    """Number of decoder blocks: as config.json says, else as the tensors' names show."""
    stated = text_config(checkpoint.config).get("num_hidden_layers")
    if isinstance(stated, int) and stated > 0:
        return stated
    return 1 + max((b for n in checkpoint.tensors if (b := block_of(n)) is not None), default=-1)


def plan_job(recipe: Recipe) -> JobPlan:
    """Checks a job and lays out its output. Reads headers only.

    Raises:
        Problems, QuantError: everything that is wrong, listed together.
    """
    QuantizerRegistry.get(recipe.method)  # an unknown name is a mistake of the request, whatever else is wrong
    checkpoint = open_checkpoint(recipe.model_path)
    problems = _source_problems(checkpoint) + target_problems(recipe.model_path, recipe.output_path)
    scheme, form = recipe.resolved_scheme(), FormatRegistry.get(recipe.format)
    if reason := form.refuse(scheme.weights, recipe.target):
        problems.append(f"scheme {scheme} in format {form.name}: {reason}")
    if recipe.target == "vllm":
        problems += gpu_problems(scheme.weights.bits, form.name, recipe.gpu, recipe.vllm_version)
    dtype = checkpoint.dtype
    if dtype not in ("BF16", "F16", "F32"):
        problems.append(f"{checkpoint.path}: most weights are stored as {dtype}: quantizing starts from BF16, F16 or F32")
    if form.quant_method is not None:
        dtype = stated_dtype(checkpoint.config) or dtype  # of the scales; a config may state another dtype than the weights are stored in
    everything = decoder_linears(checkpoint.tensors, checkpoint.config)
    if not everything:
        problems.append(
            f"{checkpoint.path}: no linear of a decoder block is found among its {len(checkpoint.tensors)} tensors (names such as model.layers.0.….weight)"
        )
        raise Problems(problems)
    try:
        chosen = select(everything, recipe.layers, recipe.ignore, block_count(checkpoint))
    except UsageError as error:
        raise Problems([*problems, str(error)], exit_code=2) from error
    linears = {}
    for name in chosen:
        n, k = checkpoint.info(f"{name}.weight").shape
        linears[name] = Linear(name, n, k, scheme.weights)
    problems += shape_problems(linears.values(), recipe.tensor_parallel)
    if not any("do not divide" in p for p in problems):
        problems += [p for linear in linears.values() for p in form.problems(linear)][:8]
        if recipe.target == "vllm":
            problems += _fused_problems(linears, everything, form)
    if problems:
        raise Problems(list(dict.fromkeys(problems)))
    unquantized = tuple(unquantized_linears(checkpoint, linears))
    plan = JobPlan(recipe, checkpoint, scheme, form, linears, unquantized, lay_out(checkpoint, linears, form, dtype), dtype)
    check_disk(recipe.output_path, plan.output_bytes + plan.copied_bytes)
    return plan


def _source_problems(checkpoint: Checkpoint) -> list[str]:
    problems = []
    if checkpoint.config.get("model_type") in _TRANSPOSED:
        problems.append(
            f"{checkpoint.path}: model type {checkpoint.config['model_type']!r} stores its weights transposed, [inputs, outputs], which is not supported: "
            "choose a model whose linears are stored as [outputs, inputs]"
        )
    quantization = quantization_config(checkpoint.config)
    if quantization is not None:
        method = quantization.get("quant_method", "unknown")
        problems.append(
            f"{checkpoint.path}: is already quantized ({method}): quantize the original, or turn it into plain weights first with quant export-vllm --format plain"
        )
    return problems


def target_problems(model_path: Path, output_path: Path) -> list[str]:
    """Why an output directory cannot be made where it is asked for."""
    output, source = output_path.resolve(), model_path.resolve()
    if output.exists() and not output.is_dir():
        return [f"{output}: the output path is a file: choose another --output-path"]
    if output.exists() and any(output.iterdir()):
        return [f"{output}: the output directory is not empty: choose another --output-path, or remove it"]
    if output == source or source in output.parents:
        return [f"{output}: the output lies in the source directory: choose an --output-path outside {source}"]
    return []


def _fused_problems(linears: Mapping[str, Linear], everything: Sequence[str], form: Format) -> list[str]:
    """vLLM builds q/k/v and gate/up as one layer: all of its shards are quantized alike, or none."""
    if form.quant_method is None:
        return []
    members: dict[str, list[str]] = {}
    for name in everything:
        members.setdefault(fused_name(name), []).append(name)
    for fused, names in members.items():
        inside = [n for n in names if n in linears]
        if inside and len(inside) < len(names):
            out = [n.rsplit(".", 1)[-1] for n in names if n not in linears]
            return [
                f"{fused}: vLLM fuses {', '.join(n.rsplit('.', 1)[-1] for n in names)} into one layer, but {', '.join(out)} would stay unquantized: "
                "select all of them or none, or use --target other"
            ]
    return []


def unquantized_linears(checkpoint: Checkpoint, linears: Mapping[str, Linear]) -> list[str]:
    """Module names to list as ignored: linears of any part of the model that stay as they are; always the head, which may be tied."""
    names = {"lm_head"}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module not in linears and name.endswith(".weight") and len(info.shape) == 2 and info.dtype in FLOATS:
            if not re.search(r"(^|\.)(embed\w*|wte|wpe|\w*_embeddings?)$", module):
                names.add(module)
    return sorted(names, key=lambda n: (block_of(n + ".") is None, block_of(n + ".") or 0, n))


def lay_out(checkpoint: Checkpoint, linears: Mapping[str, Linear], form: Format, dtype: str) -> tuple[Unit, ...]:
    """Units in file order: what lies outside the blocks first, then block by block, each in shards of at most :data:`SHARD_BYTES`."""
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
    pieces: list[tuple[int | None, list[list[OutputTensor]]]] = []
    for block in sorted(members, key=lambda b: -1 if b is None else b):
        shards: list[list[OutputTensor]] = [[]]
        size = 0
        for tensor in members[block]:
            if size + tensor.spec.nbytes > SHARD_BYTES and shards[-1] and not _same_linear(shards[-1][-1], tensor):
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


def check_disk(output_path: Path, needed: int) -> None:
    """
    Raises:
        QuantError: the disk under ``output_path`` has less than ``needed`` bytes free.
    """
    output_path = output_path.absolute()
    folder = output_path.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    work = output_path.with_name(output_path.name + ".work")
    if work.exists():
        needed -= sum(f.stat().st_size for f in work.rglob("*") if f.is_file())
    if needed > free:
        raise QuantError(
            f"{folder}: {format_size(needed)} are needed for the output, {format_size(free)} are free: free some room, or choose another --output-path"
        )


def weight_map(units: Iterable[Unit]) -> dict[str, str]:
    """Tensor names to files, for the index."""
    return {t.spec.name: s.file for u in units for s in u.shards for t in s.tensors}
