"""A checkpoint that can be read, turned into one GGUF file for llama.cpp and Ollama, a tensor at a time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError, Problems, QuantError, UsageError, clipped
from quant.evaluation.agreement import file_problems
from quant.formats import QuantizedLayers, find_format
from quant.formats.legacy import repaired
from quant.formats.reading import dequantized, read_linear
from quant.gguf.container import Tensor, write_tensors
from quant.gguf.families import Family, config_notes, config_problems, family_of
from quant.gguf.levels import LEVELS, OWN_LEVELS, Level, Place, carried, package, rounded
from quant.gguf.llama_cpp import llama_python, quantize
from quant.gguf.metadata import add_hyperparameters, rotary_factors
from quant.gguf.text import expert_of, is_tied, text_tensors
from quant.gguf.tokenizer import Vocabulary, read_vocabulary
from quant.models.linears import LinearRef
from quant.pipeline.checks import check_disk, existing_folder
from quant.pipeline.importance import importance
from quant.pipeline.memory import peak_rss
from quant.pipeline.source import taken_apart
from quant.progress import Event, Progress, silent
from quant.vllm.config import block_count, heads_of, text_config

if TYPE_CHECKING:
    import numpy as np

#: Numbers that are rounded at a time.
_PIECE = 1 << 22
#: A row that is whole blocks of every type.
_WHOLE = 256
#: The tables of tokens.
_TABLES: Mapping[str, Place] = {"token_embd.weight": "embedding", "output.weight": "head"}


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was made.

    Attributes:
        path: of the file.
        architecture: llama.cpp's name.
        level: its level.
        tensors: how many of which type.
        source_bytes, file_bytes: of the checkpoint's tensors, and of the file.
        exact: linears whose codes were stored as they are.
        scales_rounded: of those, how many scales fp16 had to round.
        notes: what is not as asked, or differs in llama.cpp.
        dropped: tensors that the file has no place for, and why.
        seconds, peak_rss_bytes: what it took.
    """

    path: str
    architecture: str
    level: str
    tensors: Mapping[str, int]
    source_bytes: int
    file_bytes: int
    exact: int
    scales_rounded: int
    notes: tuple[str, ...]
    dropped: Mapping[str, str]
    seconds: float
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "output_path": self.path,
            "architecture": self.architecture,
            "level": self.level,
            "tensors": dict(self.tensors),
            "source_bytes": self.source_bytes,
            "output_bytes": self.file_bytes,
            "exact_linears": self.exact,
            "scales_rounded": self.scales_rounded,
            "notes": list(self.notes),
            "dropped": dict(self.dropped),
            "seconds": {"total": self.seconds},
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def export_gguf(
    model_path: str | Path,
    output_path: str | Path,
    level: str | None = None,
    *,
    imatrix: bool = True,
    calibration: Mapping[str, Any] | None = None,
    name: str | None = None,
    progress: Progress = silent,
) -> GgufFile:
    """Reads a checkpoint in whatever format it is and writes one GGUF file at a level.

    Codes that the level stores as they are, are carried over; other matrices are dequantized and rounded to
    the nearest. What the source left in 16 bits of a decoder that it has quantized stays so. No more than a
    piece of one matrix is in memory, or one matrix where the source is quantized.

    Args:
        level: a name of :data:`quant.gguf.levels.LEVELS`, or of :data:`~quant.gguf.levels.OWN_LEVELS`, which
            llama.cpp makes of a 16-bit file that is removed again; None: the one that holds the source's
            codes as they are, else its dtype's.
        imatrix: whether llama.cpp weighs errors by E[x²] of calibration text
            (:mod:`quant.pipeline.importance`).
        calibration: its options, as :func:`quant.make_recipe` takes them.
        name: what the file calls the model; None: as its folder.

    Raises:
        Problems, QuantError: what stands against it, all together, before anything is written.
    """
    start, output = time.perf_counter(), Path(output_path)
    if level is not None and level in OWN_LEVELS:
        return _by_llama_cpp(Path(model_path), output, level, imatrix, calibration or {}, progress)
    gguf = package()
    job = _plan(Path(model_path), output, level, name)
    part = output.with_name(f".{output.name}.part")
    writer = gguf.GGUFWriter(None, job.family.architecture)
    _add_keys(writer, job)
    check_disk(output, sum(t.nbytes for t in job.tensors))
    output.parent.mkdir(parents=True, exist_ok=True)
    total = len(job.tensors)
    try:
        progress(Event("export", 0, total))
        for done, tensor in enumerate(write_tensors(part, writer, job.tensors), 1):
            progress(Event("export", done, total, detail=tensor.name))
        size = part.stat().st_size
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    counts: dict[str, int] = {}
    for tensor in job.tensors:
        counts[tensor.type] = counts.get(tensor.type, 0) + 1
    notes = [*job.notes, *job.vocabulary.notes]
    if job.counts["scales"]:
        notes.append(f"{job.counts['scales']} scales rounded to fp16, which the file stores them in")
    return GgufFile(
        path=str(output),
        architecture=job.family.architecture,
        level=job.level_name,
        tensors=counts,
        source_bytes=job.checkpoint.nbytes,
        file_bytes=size,
        exact=job.counts["exact"],
        scales_rounded=job.counts["scales"],
        notes=tuple(notes),
        dropped=job.dropped,
        seconds=round(time.perf_counter() - start, 3),
        peak_rss_bytes=peak_rss(),
    )


def _by_llama_cpp(
    model_path: Path,
    output: Path,
    level: str,
    imatrix: bool,
    calibration: Mapping[str, Any],
    progress: Progress,
) -> GgufFile:
    """A level that llama.cpp makes of a 16-bit file of ours."""
    start = time.perf_counter()
    llama_python()  # before anything is written
    job = _plan(model_path, output, None)
    wide = output.with_name(f".{output.name}.16-bit")
    part = output.with_name(f".{output.name}.part")
    check_disk(output, 2 * sum(t.nbytes for t in job.tensors))
    weights: dict[str, np.ndarray] = {}
    if imatrix:
        scratch = output.with_name(f".{output.name}.importance")
        weights = _importance(job, importance(model_path, scratch, calibration, progress))
    wide.unlink(missing_ok=True)
    try:
        made = export_gguf(
            model_path, wide, "f16" if job.checkpoint.dtype == "F16" else "bf16", progress=progress
        )
        threads = max(1, torch.get_num_threads())
        quantize(wide, part, OWN_LEVELS[level], weights, threads, progress)
        types = {t.name: (t.tensor_type.name, int(t.shape[0])) for t in package().GGUFReader(part).tensors}
        size = part.stat().st_size
        os.replace(part, output)
    finally:
        wide.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    counts: dict[str, int] = {}
    notes = list(made.notes)
    for name, (type_, columns) in types.items():
        counts[type_] = counts.get(type_, 0) + 1
        if type_ != "F32" and columns % 256:
            notes.append(f"{name} is {type_}: its rows of {columns} are not whole blocks of 256")
    return replace(
        made,
        path=str(output),
        level=level,
        tensors=counts,
        file_bytes=size,
        notes=tuple(notes),
        seconds=round(time.perf_counter() - start, 3),
        peak_rss_bytes=peak_rss(),
    )


def _importance(job: _Job, by_linear: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """By tensor of the file, what its matrices' inputs weigh; of experts that no token reached, the mean of
    the others'."""
    weights = {}
    for tensor in job.tensors:
        parts = [by_linear.get(n.removesuffix(".weight")) for n in tensor.sources]
        known = [p for p in parts if p is not None]
        if known:
            mean = torch.stack(known).mean(0)
            weights[tensor.name] = torch.cat([mean if p is None else p for p in parts]).numpy()
    return weights


@dataclass
class _Job:
    """An export that nothing stands against.

    Attributes:
        checkpoint: as it is stored; ``plain``: the same with values for its quantized linears.
        layers: its quantized linears; None: it has none.
        called: the model's name in the file.
        tensors: of the file, in order.
        counts: filled as tensors are made: linears carried over, and scales that fp16 rounded.
    """

    checkpoint: Checkpoint
    plain: Checkpoint
    layers: QuantizedLayers | None
    family: Family
    level_name: str
    level: Level
    vocabulary: Vocabulary
    called: str
    tensors: list[Tensor] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"exact": 0, "scales": 0})


def check_export(model_path: Path, output: Path, level: str) -> None:
    """Whether :func:`export_gguf` could make the file of a model, before work whose result it would take.

    Raises:
        Problems, QuantError: what stands against it.
    """
    package()
    _plan(model_path, output, level)


def file_path_problems(output: Path, model_path: Path) -> list[str]:
    """Why a file cannot be made of a model where it is asked for."""
    source = model_path.resolve()
    if source.is_dir() and source in output.resolve().parents:
        return [f"{output}: lies in the source directory: choose an --output-path outside {source}"]
    if output.exists() or output.is_symlink():
        return [f"{output}: exists already: choose another --output-path, or remove it"]
    folder = existing_folder(output.absolute().parent)
    if not folder.is_dir():
        return [f"{output}: {folder} is a file, no directory: choose another --output-path"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"{output}: {folder} cannot be written to: choose another --output-path"]
    return []


def _plan(path: Path, output: Path, level: str | None, called: str | None = None) -> _Job:
    """Reads headers and the tokenizer; writes nothing.

    Raises:
        Problems, QuantError: what stands against it.
    """
    if level is not None and level not in LEVELS:
        raise UsageError(f"--level is {clipped(level)}: {', '.join([*LEVELS, *OWN_LEVELS])} are known")
    checkpoint, _ = repaired(open_checkpoint(path))
    layers = find_format(checkpoint.config, checkpoint.tensors)
    family = family_of(checkpoint.config)
    problems = file_path_problems(output, path)
    problems += [f"{checkpoint.path}: {line}" for line in file_problems(checkpoint, layers)]
    problems += [f"{checkpoint.path}: {line}" for line in config_problems(checkpoint.config, family)]
    plain = dequantized(checkpoint, layers)
    if layers is not None and layers.stacks:
        layers = taken_apart(layers, plain)
        plain = dequantized(checkpoint, layers)
    embedding = next((t for n, t in plain.tensors.items() if n.endswith("embed_tokens.weight")), None)
    if embedding is None:
        problems.append(f"{checkpoint.path}: has no embed_tokens.weight: it is no model of this family")
    if problems:
        raise Problems(problems)
    assert embedding is not None
    name = level or _own_level(layers, checkpoint)
    vocabulary = read_vocabulary(checkpoint.path, text_config(checkpoint.config), embedding.shape[0])
    called = called or checkpoint.path.resolve().name.removesuffix(".gguf")
    job = _Job(checkpoint, plain, layers, family, name, LEVELS[name], vocabulary, called)
    job.notes += config_notes(checkpoint.config, family)
    _lay_out(job)
    return job


def _own_level(layers: QuantizedLayers | None, checkpoint: Checkpoint) -> str:
    """The level that stores most of a source as it is."""
    counts: dict[str, int] = {}
    for linear in () if layers is None else layers.linears.values():
        for name in ("q4_0", "q4_1", "q8_0"):  # the smallest one first
            if LEVELS[name].takes(linear.weights, linear.k):
                counts[name] = counts.get(name, 0) + 1
                break
    if counts:
        return max(counts, key=lambda n: counts[n])
    return "f16" if checkpoint.dtype == "F16" else "bf16"


def _lay_out(job: _Job) -> None:
    """Fills the tensors of the file, what has no place in it, and notes.

    Raises:
        Problems: the checkpoint has tensors that llama.cpp has no place for.
    """
    gguf, plain = package(), job.plain
    architecture = getattr(gguf.MODEL_ARCH, job.family.architecture.upper())
    names = gguf.get_tensor_name_map(architecture, block_count(plain.config) or 0)
    text = text_tensors(plain, job.family)
    job.dropped |= text.dropped
    problems: list[str] = []
    for name, own in text.named.items():
        target = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if target is None:
            problems.append(f"{name}: llama.cpp's {job.family.architecture} has no such tensor")
            continue
        job.tensors.append(_tensor(job, name, target, text.refs.get(name.removesuffix(".weight"))))
    problems += _stack(job, text.experts, names)
    for target, factors in rotary_factors(plain.config).items():
        job.tensors.append(Tensor(target, (len(factors),), "F32", partial(_floats, factors)))
    if problems:
        raise Problems([f"{job.checkpoint.path}: {p}" for p in problems])
    job.tensors.sort(key=lambda t: _place(t.name))


def _place(name: str) -> tuple[int, int]:
    """Where a tensor stands: the embedding first, then the blocks, the head last."""
    block = re.match(r"blk\.(\d+)\.", name)
    if block:
        return 1, int(block[1])
    return (2, 0) if name.startswith("output") else (0, 0)


def _stack(job: _Job, experts: Mapping[str, LinearRef], names: Any) -> list[str]:
    """Adds a tensor for each projection of the experts of a block; returns what stands against it."""
    groups: dict[tuple[str, str], dict[int, LinearRef]] = {}
    problems = []
    for name, ref in experts.items():
        block, projection, number = expert_of(name)
        groups.setdefault((block, projection), {})[number] = ref
        if ref.bias is not None:
            problems.append(f"{ref.name}: its experts have biases, which llama.cpp's graph does not add")
    for (block, projection), members in groups.items():
        first = members[0]
        target = names.get_name(f"{block}.mlp.experts.{projection}") + ".weight"
        shape = (len(members), first.n, first.k)
        ordered = [members[i] for i in range(len(members))]
        type_ = _type(job, target, shape, [r.name for r in ordered])
        rows = partial(_expert_rows, job, ordered, type_)
        job.tensors.append(Tensor(target, shape, type_, rows, tuple(f"{r.name}.weight" for r in ordered)))
    return problems


def _type(job: _Job, target: str, shape: Sequence[int], linears: Sequence[str]) -> str:
    """The type of a tensor, as the level says; and a note where its rows are no whole blocks."""
    level = job.level
    coded = None if job.layers is None else bool(linears) and all(n in job.layers.linears for n in linears)
    place: Place = "linear"
    if len(shape) == 1 or "ffn_gate_inp" in target:
        place = "vector"
    elif not coded:
        place = _TABLES.get(target, "linear")
    type_ = level.type_of(place, shape[-1], tied=is_tied(job.family, job.plain), coded=coded)
    wanted = level.type_of(place, _WHOLE, tied=is_tied(job.family, job.plain), coded=coded)
    if type_ != wanted:
        job.notes.append(f"{target} is {type_}: its rows of {shape[-1]} are not whole blocks of {wanted}")
    return type_


def _tensor(job: _Job, name: str, target: str, ref: LinearRef | None) -> Tensor:
    """One tensor of the file that is one of the checkpoint."""
    shape = tuple(s for s in job.plain.info(name).shape)
    if target.endswith("ffn_gate_inp_shexp.weight"):
        shape = shape[-1:]  # [1, K] of a gate with one output
    linears = [ref.name] if ref is not None else [name.removesuffix(".weight")]
    type_ = _type(job, target, shape, linears)
    order = _row_order(job, target)
    if len(shape) == 1:
        offset = job.family.norm_offset if name.endswith("norm.weight") else 0.0
        rows: Callable[[], Iterable[np.ndarray]] = partial(_vector, job.plain, name, offset, order)
    elif job.layers is not None and _exact(job, linears[0], type_):
        rows = partial(_carried_rows, job, linears[0], type_, order)
    else:
        rows = partial(_rounded_rows, job, name, type_, order)
    return Tensor(target, shape, type_, rows, (name,))


def _exact(job: _Job, linear: str, type_: str) -> bool:
    assert job.layers is not None
    held = job.layers.linears.get(linear)
    return held is not None and type_ == job.level.type and job.level.takes(held.weights, held.k)


def _row_order(job: _Job, target: str) -> torch.Tensor | None:
    """int64 [rows]: which row of q or k stands where; None where they stay.

    A head's halves, which transformers turns against each other, are interleaved: row ``i`` of the first half
    is followed by row ``i`` of the second.
    """
    kind = re.search(r"attn_([qk])\.(weight|bias)$", target)
    heads = heads_of(job.plain.config)
    if not job.family.interleaved or kind is None or heads is None:
        return None
    count = heads.attention if kind[1] == "q" else heads.kv
    source = next(n for n in job.plain.tensors if n.endswith(f".{kind[1]}_proj.weight"))
    rows = job.plain.info(source).shape[0]
    return torch.arange(rows).view(count, 2, -1).transpose(1, 2).reshape(-1)


def _floats(values: Sequence[float]) -> Iterator[np.ndarray]:
    import numpy as np

    yield np.asarray(values, np.float32).view(np.uint8)[None]


def _vector(plain: Checkpoint, name: str, offset: float, order: torch.Tensor | None) -> Iterator[np.ndarray]:
    import numpy as np

    value = plain.read(name).float().reshape(-1) + offset
    yield (value if order is None else value[order]).numpy().view(np.uint8)[None]


def _carried_rows(job: _Job, linear: str, type_: str, order: torch.Tensor | None) -> Iterator[np.ndarray]:
    """Blocks of a linear's own codes; rounded from its values where only its tensors tell that they do not
    fit: zero points after all, groups in another order."""
    assert job.layers is not None
    tensor = read_linear(job.layers.form, job.layers, job.checkpoint, linear)
    shifted = tensor.zeros is not None and bool(tensor.zeros.any())
    if tensor.group_index is not None or (shifted and job.level.symmetric):
        values = tensor.dequantize()
        yield from _in_pieces([values if order is None else values[order]], type_, linear)
        return
    if order is not None:
        zeros = None if tensor.zeros is None else tensor.zeros[order]
        tensor = replace(tensor, codes=tensor.codes[order], scales=tensor.scales[order], zeros=zeros)
    blocks, changed = carried(tensor, type_)
    job.counts["exact"] += 1
    job.counts["scales"] += changed
    yield blocks


def _rounded_rows(job: _Job, name: str, type_: str, order: torch.Tensor | None) -> Iterator[np.ndarray]:
    columns = job.plain.info(name).shape[-1]
    if order is not None:
        yield from _in_pieces([job.plain.read(name)[order]], type_, name)
    else:
        yield from _in_pieces(job.plain.read_rows(name, max(1, _PIECE // columns)), type_, name)


def _expert_rows(job: _Job, refs: Sequence[LinearRef], type_: str) -> Iterator[np.ndarray]:
    for ref in refs:
        if job.layers is not None and _exact(job, ref.name, type_):
            yield from _carried_rows(job, ref.name, type_, None)
        else:
            yield from _in_pieces([ref.read(job.plain)], type_, ref.name)


def _in_pieces(values: Iterable[torch.Tensor], type_: str, name: str) -> Iterator[np.ndarray]:
    """Rows rounded to a type, several pieces at a time.

    Raises:
        CheckpointError: a value is not finite, or beyond fp16 where it is stored so.
    """
    workers = max(1, torch.get_num_threads())
    with ThreadPoolExecutor(workers) as pool:
        for whole in values:
            size = max(1, _PIECE // whole.shape[-1])
            for value in whole.split(size):
                parts = value.float().chunk(workers)
                for part in parts:
                    _demand_range(part, type_, name)
                yield from pool.map(lambda part: rounded(part.numpy(), type_), parts)


def _demand_range(part: torch.Tensor, type_: str, name: str) -> None:
    largest = float(part.abs().max()) if part.numel() else 0.0
    if not largest < float("inf"):
        raise CheckpointError(f"{name}: holds NaN or infinity: the source is damaged, fetch it again")
    if type_ not in ("BF16", "F32") and largest > 65504.0:
        raise QuantError(f"{name}: {largest:g} is beyond fp16, which {type_} stores: use --level bf16")


def _add_keys(writer: Any, job: _Job) -> None:
    """Everything but the tensors."""
    gguf, config = package(), job.plain.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(job.called)
    writer.add_file_type(job.level.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, config, job.family)
    job.vocabulary.add_to(writer)
