"""A checkpoint that can be read, turned into one that vLLM serves: another format, repaired side files,
engine arguments."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quant import defaults
from quant.checkpoint.dtypes import TORCH
from quant.checkpoint.gguf_path import gguf_file
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.checkpoint.writer import TensorSpec
from quant.errors import CheckpointError, Problems, UsageError, VerificationFailed
from quant.evaluation.agreement import file_problems
from quant.evaluation.verify import verify
from quant.formats import Contents, Format, FormatRegistry, QuantizedLayers, find_format
from quant.formats.base import FOREIGN, IncompleteCheckpoint
from quant.formats.legacy import lacking, repaired
from quant.formats.reading import dequantized, read_linear
from quant.gguf.reading import dequantized_note, open_gguf
from quant.models.linears import LinearRef, built_linears, fused_refs
from quant.models.roles import block_of
from quant.models.stacking import stacked
from quant.pipeline.checks import check_disk, output_problems
from quant.pipeline.layout import Unit, lay_out, unquantized_linears
from quant.pipeline.memory import peak_rss
from quant.pipeline.source import as_read, carried, taken_apart, without_shared_biases
from quant.pipeline.writing import write_rest, write_unit
from quant.progress import Event, Progress, silent
from quant.quantizers.nearest import round_to_nearest
from quant.report.files import write_report
from quant.report.value import Conversion, Provenance, Quantization, Report
from quant.schemes import UNQUANTIZED
from quant.tensors import QuantizedTensor
from quant.vllm.architectures import architecture_problem
from quant.vllm.arguments import engine_arguments, vllm_config
from quant.vllm.cache import KV_CACHE, cache_problems, cache_scale
from quant.vllm.config import heads_of, model_types, quantization_config, stated_dtype, without_quantization
from quant.vllm.layers import Linear, expert_problem, form_problem, shape_problems


def export(
    model_path: str | Path,
    output_path: str | Path,
    format_name: str | None = None,
    *,
    source: str | Path | None = None,
    requantize: bool = False,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
    target: str = "vllm",
    progress: Progress = silent,
    quantization: Quantization | None = None,
    seconds: Mapping[str, float] | None = None,
    command: Sequence[str] | None = None,
) -> Report:
    """Reads ``model_path`` in whatever format it is and writes ``output_path`` in ``format_name`` (its own by
    default).

    Codes, scales and zero points are carried over, not rounded anew, and so are calibrated numbers of
    activations and of an FP8 KV cache where the format has a place for them; the report names those that are
    left out. Scales of weight-only integers are stored in the model's dtype, as vLLM would cast them, and the
    report says how many that changed. Only linears whose groups are in activation order have no other way:
    ``requantize`` dequantizes them and rounds them again in natural groups, and the report gives each one's
    signal-to-noise ratio against what the checkpoint held.

    Args:
        quantization, seconds: what the report says of a checkpoint that was only just made from ``source``,
            and what that took.
        command: the words that were typed, for the report.

    Raises:
        Problems, QuantError: what stands against it, all together, before anything is written.
    """
    start = time.perf_counter()
    output, made_from = Path(output_path), Path(source) if source is not None else None
    job = _plan(Path(model_path), output, format_name, made_from, requantize, tensor_parallel, target)
    arguments = engine_arguments(job.config, tensor_parallel=tensor_parallel, max_model_len=max_model_len)
    work = WorkFolder(
        output.absolute(), {"export": str(job.checkpoint.path), "format": job.form.name}, fresh=True
    )
    try:
        for number, unit in enumerate(job.units):
            scales = {s.name: job.checkpoint.read(job.caches[s.name]) for s in unit.made}
            files = write_unit(
                unit, work.path, job.plain, job.form, job.linears, job.refs, job.dtype, job.produce, scales
            )
            work.finish_unit(unit.name, files, {})
            progress(Event("export", number + 1, len(job.units)))
        dropped = write_rest(work.path, job.checkpoint, job.units, job.form, job.config, arguments, made_from)
        served = job.form.quant_method is not None
        result = verify(work.path, tensor_parallel=tensor_parallel, target=target, served=served)
        if result.failed:
            raise VerificationFailed(
                f"{work.path}: the output failed its own verification: {'; '.join(result.failed[:5])}. It "
                "was not published"
            )
        # of a checkpoint that was only just made, the source is what it was made from
        origin = job.checkpoint if quantization is None or source is None else open_checkpoint(source)
        report = Report(
            output_path=str(output),
            source_path=origin.metadata.get("file", str(origin.path)),
            format=job.form.name,
            source_bytes=origin.nbytes,
            output_bytes=sum(t.spec.nbytes for u in job.units for s in u.shards for t in s.tensors),
            seconds={
                **(seconds or {}),
                "total": round(time.perf_counter() - start + (seconds or {}).get("quantize", 0.0), 3),
            },
            peak_rss_bytes=peak_rss(),
            side_files_dropped=tuple(dropped),
            vllm=vllm_config(arguments),
            verify=result.to_dict() | {"path": str(output)},  # where it is published
            output_hash=result.content_hash,
            quantization=quantization,
            conversion=job.conversion(),
            provenance=Provenance.here(command),
        )
        sources = [job.checkpoint.path, *([] if made_from is None else [made_from])]
        write_report(work.path, report, origin, sources)
        work.publish()
    finally:
        work.abandon()  # an export is a copy: it starts over rather than resuming
        work.release()
    return report


@dataclass
class _Job:
    """An export that nothing stands against.

    Attributes:
        checkpoint: what is read; ``plain``: the same with the values of its quantized linears.
        layers: its quantized linears, or None.
        linears: as the output's format will store them.
        refs: where ``plain`` has those that the format stores all of a layer in one tensor.
        caches: by name in the output, tensors of an FP8 KV cache's scales that it keeps.
        config: the output's config.json.
        left: tensors that the format has no place for, each with the reason.
        changed, requantized: filled as linears are produced: those whose scales the model's dtype rounded,
            and decibels by linear that was rounded anew.
    """

    checkpoint: Checkpoint
    plain: Checkpoint
    layers: QuantizedLayers | None
    form: Format
    target: str
    linears: Mapping[str, Linear]
    refs: Mapping[str, LinearRef]
    caches: Mapping[str, str]
    units: tuple[Unit, ...]
    config: Mapping[str, Any]
    dtype: str
    repairs: Sequence[str]
    left: Sequence[Mapping[str, str]]
    changed: list[str] = field(default_factory=list)
    requantized: dict[str, float] = field(default_factory=dict)

    def produce(self, name: str) -> QuantizedTensor:
        """A linear as the output has it."""
        assert self.layers is not None
        tensor = read_linear(self.layers.form, self.layers, self.checkpoint, name)
        if self.form.quant_method is None:
            return tensor
        if tensor.group_index is not None and not self.form.keeps_order(self.target):
            value = tensor.dequantize()
            tensor = round_to_nearest(value, self.linears[name].weights, TORCH[self.dtype], search=True)
            noise = (tensor.dequantize() - value).square().sum()
            self.requantized[name] = round(float(10 * (value.square().sum() / noise).log10()), 2)
            return tensor
        tensor, rounded = carried(tensor, self.linears[name], TORCH[self.dtype])
        if rounded:
            self.changed.append(name)
        return tensor

    def conversion(self) -> Conversion:
        """What the report says of it once all is written."""
        return Conversion(
            source_format=self.layers.format if self.layers else "plain",
            linears=len(self.linears),
            scales_rounded=tuple(self.changed),
            requantized=self.requantized,
            repairs=tuple(self.repairs),
            kv_cache_scales=len(self.caches),
            tensors_dropped=tuple(self.left),
        )


def _plan(
    path: Path,
    output: Path,
    format_name: str | None,
    source: Path | None,
    requantize: bool,
    tensor_parallel: int,
    target: str,
) -> _Job:
    """Reads headers, and what of the tensors tells how they are stored; writes nothing.

    Raises:
        Problems, QuantError: what stands against it, all together.
    """
    checkpoint, repairs = repaired(_opened(path))
    if checkpoint.metadata.get("format") == "gguf" and (note := dequantized_note(checkpoint)):
        repairs.append(note)
    problems = output_problems(path, output)
    if source is not None and not source.is_dir():
        problems.append(f"--source is {str(source)!r}: there is no such directory")
    layers = _layers(checkpoint, problems)
    if layers is not None and not layers.linears and not layers.stacks:
        repairs.append(
            f"{checkpoint.quantization_file or 'quantization_config'} left out: no tensor is quantized"
        )
        checkpoint, layers = replace(dequantized(checkpoint, layers), origin=None), None
    problems += [f"{checkpoint.path}: {line}" for line in file_problems(checkpoint, layers)]
    own = layers.format if layers else "plain"
    # a format of other programs is not written: what it holds goes into the one that holds most
    form = FormatRegistry.get(format_name or (defaults.FORMAT if own in FOREIGN else own))
    written = form.quant_method is not None
    if layers is None and written:
        raise UsageError(f"{path}: is not quantized: quant quantize makes a {form.name} checkpoint of it")
    if written and target == "vllm":
        reason = architecture_problem(checkpoint.config)
        problems += [f"{checkpoint.path}: {reason}: use --target other"] if reason else []
    plain, refs = dequantized(checkpoint, layers), dict[str, LinearRef]()
    if layers is not None and layers.stacks and written:
        layers = taken_apart(layers, plain)
        if form.stacked:  # as they are stored, all of a layer in one tensor
            refs = fused_refs(plain.tensors, plain.config)
        else:
            plain = without_shared_biases(plain, dequantized(checkpoint, layers))
    linears, ordered = _written(checkpoint, layers, form, target, requantize, problems)
    if tensor_parallel > 1:
        problems += _parallel_problems(checkpoint, linears, form, tensor_parallel)
    caches = _caches(checkpoint, layers, form, problems, repairs)
    if problems:
        raise Problems(problems)
    dtype = stated_dtype(checkpoint.config) or "BF16"
    if not written and layers is not None:
        plain = stacked(plain)
    made: dict[int, list[TensorSpec]] = {}
    for name, original in caches.kept.items():
        info = checkpoint.info(original)
        made.setdefault(block_of(name) or 0, []).append(TensorSpec(name, info.dtype, info.shape))
    units = lay_out(plain, linears, form, dtype, made, refs)
    check_disk(output, sum(s.nbytes for u in units for s in u.shards))
    config = without_quantization(plain.config)
    if linears:
        contents = Contents(
            list(linears.values()),
            unquantized_linears(plain, linears, fused_refs(plain.tensors, plain.config)),
            caches.scheme,
            {"act_order": "group" if ordered else "static"},
            model_types(checkpoint.config),
        )
        if (said := form.config(contents)) is not None:
            config["quantization_config"] = said
    return _Job(
        checkpoint=checkpoint,
        plain=plain,
        layers=layers,
        form=form,
        target=target,
        linears=linears,
        refs=refs,
        caches=caches.kept,
        units=units,
        config=config,
        dtype=dtype,
        repairs=repairs,
        left=_left_out(checkpoint, layers, form, caches.left),
    )


def _opened(path: Path) -> Checkpoint:
    """The checkpoint, of a GGUF file with zero points where they say what its minima mean."""
    return open_checkpoint(path) if gguf_file(path) is None else open_gguf(path, zero_points=True)


def _layers(checkpoint: Checkpoint, problems: Sequence[str]) -> QuantizedLayers | None:
    """What of the checkpoint is quantized.

    Raises:
        Problems: that cannot be read; with the ``problems`` found before.
    """
    try:
        return find_format(checkpoint.config, checkpoint.tensors)
    except IncompleteCheckpoint as error:
        raise Problems([*problems, *error.problems]) from error
    except CheckpointError as error:
        if problems:
            raise Problems([*problems, str(error)]) from error
        raise


def _written(
    checkpoint: Checkpoint,
    layers: QuantizedLayers | None,
    form: Format,
    target: str,
    requantize: bool,
    problems: list[str],
) -> tuple[dict[str, Linear], bool]:
    """The linears as the format will store them, and whether any keeps its groups in activation order; what
    stands against it is added to ``problems``."""
    if layers is None:
        return {}, False
    linears, ordered, written = dict(layers.linears), False, form.quant_method is not None
    lost = lacking(checkpoint, layers, inputs=written)
    problems += lost
    if not written:
        return linears, False
    if not lost:
        linears, ordered, wrong = _as_read(checkpoint, layers, form, target, requantize)
        problems += wrong
    problems += _problems(linears.values(), form, target)
    kind = next(iter(model_types(checkpoint.config)), "")
    reasons = [form_problem(kind, form.name)]
    reasons += [expert_problem(kind, linears.values(), form.name)] if target == "vllm" else []
    problems += [f"{reason}: --format plain keeps the values" for reason in reasons if reason]
    problems += [
        f"{stack.name}: its experts share multipliers with one another or between their projections, which "
        "no format written here holds: quant quantize -m rounds them anew, --format plain keeps their values"
        for stack in list(layers.stacks.values())[:1]
    ]
    return linears, ordered


@dataclass(frozen=True)
class _Caches:
    """The scales of an FP8 KV cache.

    Attributes:
        kept: by name in the output, those that it keeps.
        left: those that its format has no place for.
        scheme: what the output's config says of them; None: nothing.
    """

    kept: Mapping[str, str]
    left: Sequence[str]
    scheme: Mapping[str, Any] | None


def _caches(
    checkpoint: Checkpoint,
    layers: QuantizedLayers | None,
    form: Format,
    problems: list[str],
    repairs: list[str],
) -> _Caches:
    """What becomes of them; what stands against it is added to ``problems``, what is mended to
    ``repairs``."""
    scheme = (quantization_config(checkpoint.config) or {}).get("kv_cache_scheme")
    names = checkpoint.tensors if layers is not None else ()
    caches = {c: n for n in names if (c := cache_scale(n)) is not None}
    if scheme and not caches:
        repairs.append(
            "kv_cache_scheme removed: the checkpoint has no scales for it, and vLLM would take 1.0"
        )
    if caches and form.kv_cache:
        scheme = scheme or KV_CACHE
        problems += cache_problems(checkpoint.tensors, scheme)
        return _Caches(caches, (), scheme)
    if layers is not None and layers.format == form.name and form.keeps_kv_cache:
        return _Caches(caches, (), None)
    return _Caches({}, list(caches.values()), None)


def _as_read(
    checkpoint: Checkpoint, layers: QuantizedLayers, form: Format, target: str, requantize: bool
) -> tuple[dict[str, Linear], bool, list[str]]:
    """The linears with what only their tensors tell (symmetry, order); whether any has groups in activation
    order that are kept; and what stands against reading them."""
    linears, ordered, unread = as_read(checkpoint, layers, layers.linears)
    problems = list(dict.fromkeys(unread.values()))
    kept = bool(ordered) and form.keeps_order(target)
    if ordered and not kept and not requantize:
        problems.append(
            "the groups are in activation order (g_idx is not k // group_size), which vLLM has no path "
            "for: --requantize rounds those linears anew "
            "(the report says what that costs), --format plain keeps their values; best is to quantize "
            "the original again with --act-order static"
        )
    return linears, kept, problems


def _problems(linears: Collection[Linear], form: Format, target: str) -> list[str]:
    """What the wanted format and its target have against the linears."""
    problems: dict[str, None] = {}
    for linear in linears:
        if reason := form.refuse(linear.scheme, target):
            problems[f"{linear.weights} in format {form.name}: {reason}"] = None
        problems.update(dict.fromkeys(form.problems(linear)))
    for problem in shape_problems(linears):
        problems[
            f"{problem}. quant quantize makes that of this checkpoint, --format plain keeps its values"
        ] = None
    if not form.together({x.scheme for x in linears}):
        problems[
            f"the linears have several schemes; a {form.name} file of ours holds one: use --format "
            "compressed-tensors"
        ] = None
    return list(problems)


def _parallel_problems(
    checkpoint: Checkpoint, linears: Mapping[str, Linear], form: Format, ranks: int
) -> list[str]:
    """What of the linears, as the format will store them, vLLM cannot share out over ranks."""
    if form.quant_method is None:
        linears = {n: replace(x, weights=UNQUANTIZED.weights) for n, x in linears.items()}
    whole = shape_problems(linears.values())
    built = built_linears(checkpoint.tensors, checkpoint.config, linears)
    return [p for p in shape_problems(built, ranks, heads_of(checkpoint.config)) if p not in whole]


def _left_out(
    checkpoint: Checkpoint, layers: QuantizedLayers | None, form: Format, caches: Sequence[str]
) -> list[dict[str, str]]:
    """Tensors of the checkpoint that the format has no place for, each with the reason."""
    left = [
        {"tensor": n, "reason": f"a {form.name} checkpoint has no place for the scales of an FP8 KV cache"}
        for n in sorted(caches)
    ]
    if form.quant_method is None and layers is not None:
        numbers = layers.form.lasts("inputs")
        names = (layers.tensor(f"{n}.{x}") for n in layers.linears for x in numbers)
        left += [
            {"tensor": n, "reason": f"a {form.name} checkpoint leaves activations as they are"}
            for n in names
            if n in checkpoint.tensors
        ]
    return left
