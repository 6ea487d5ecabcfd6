"""From quantized linears to a finished directory: shards as they are made, then side files, index,
config.json last."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.dtypes import TORCH
from quant.checkpoint.reader import INDEX, REWRITTEN, STALE, Checkpoint
from quant.checkpoint.writer import ShardWriter, TensorSpec, write_text
from quant.errors import DiskFull, NotFinite, SourceFault
from quant.evaluation.values import finite_pieces
from quant.formats import Contents, Format
from quant.models.linears import LinearRef
from quant.pipeline.layout import OutputTensor, Unit, weight_map
from quant.pipeline.plan import JobPlan
from quant.quantizers import Quantizer
from quant.recipe import Assignment
from quant.tensors import QuantizedTensor, all_finite
from quant.vllm.arguments import Argument, vllm_config
from quant.vllm.cache import KV_CACHE
from quant.vllm.config import model_types, without_quantization
from quant.vllm.layers import Linear

VLLM_CONFIG = "vllm_config.json"
#: Elements that are rounded at a time.
_PIECE = 1 << 22


def write_unit(
    unit: Unit,
    folder: Path,
    source: Checkpoint,
    form: Format,
    linears: Mapping[str, Linear],
    refs: Mapping[str, LinearRef],
    dtype: str,
    produce: Callable[[str], QuantizedTensor],
    changed: Mapping[str, torch.Tensor] | None = None,
    workers: Executor | None = None,
    claimed: Callable[[], object] = lambda: None,
) -> dict[Path, str]:
    """Writes and syncs a unit's shards; returns the digest of each file.

    Linears come from ``produce``; every other tensor is copied byte for byte, unless ``changed`` has new
    values for it. Each is made and written by one of ``workers``, or one after the other in file order where
    there are none. ``claimed`` is called when the disk's room for the unit has been claimed.
    """
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(folder / shard.file, [t.spec for t in shard.tensors]))
            for shard in unit.shards
        ]
        claimed()

        def write_linear(linear: str, specs: Sequence[TensorSpec], writer: ShardWriter) -> None:
            own = specs[0].dtype if form.quant_method is None else dtype
            packed = form.pack(linears[linear], produce(linear), TORCH[own])
            for spec in specs:
                writer.write(spec.name, packed.pop(spec.name))

        def write_stack(tensors: Sequence[OutputTensor], writer: ShardWriter) -> None:
            def pack(linear: str) -> Mapping[str, torch.Tensor]:
                return form.pack(linears[linear], produce(linear), TORCH[dtype])

            specs, held = [t.spec for t in tensors], [refs[n] for n in tensors[0].linears]
            kept = {s.name: torch.empty(s.shape, dtype=TORCH[s.dtype]) for s in specs[1:]}
            writer.write_pieces(specs[0].name, _stack(specs, held, pack, list(form.parts), kept))
            for name, value in kept.items():
                writer.write(name, value)

        def write_other(tensor: OutputTensor, writer: ShardWriter) -> None:
            name, wanted = tensor.spec.name, TORCH[tensor.spec.dtype]
            if tensor.linears:
                held = [refs[n] for n in tensor.linears]
                writer.write_pieces(name, _refused(source, name, held, produce, wanted))
            elif tensor.part is not None:
                writer.write(name, _narrowed(tensor.part.read(source), wanted, source, tensor.part.tensor))
            elif changed and name in changed:
                writer.write(name, changed[name])
            elif tensor.rounded:
                pieces = source.read_rows(name, max(1, _PIECE // max(1, prod(tensor.spec.shape[1:]))))
                writer.write_pieces(name, (_bytes(_narrowed(p, wanted, source, name)) for p in pieces))
            else:
                writer.write_pieces(name, finite_pieces(source, name))

        jobs: list[Callable[[], None]] = []
        for shard, writer in zip(unit.shards, writers, strict=True):
            for (linear, stack), tensors in groupby(shard.tensors, lambda t: (t.linear, t.stack)):
                if stack:
                    jobs.append(partial(write_stack, list(tensors), writer))
                elif linear is not None:
                    jobs.append(partial(write_linear, linear, [t.spec for t in tensors], writer))
                else:
                    jobs += [partial(write_other, t, writer) for t in tensors]
        _do(jobs, workers)
    return {writer.path: writer.digest for writer in writers}


def _stack(
    specs: Sequence[TensorSpec],
    held: Iterable[LinearRef],
    pack: Callable[[str], Mapping[str, torch.Tensor]],
    lasts: Iterable[str],
    kept: Mapping[str, torch.Tensor],
) -> Iterator[bytes]:
    """The bytes of the codes of a stack of experts, one expert at a time; outputs lie where the source's
    fused tensor has them.

    Args:
        specs: of the stack's tensors, codes first.
        pack: the tensors of a linear.
        lasts: the last parts of their names, in the order of ``specs``.
        kept: the other tensors of the stack, which are filled.
    """
    codes = torch.empty(specs[0].shape[1:], dtype=TORCH[specs[0].dtype])
    for expert, members in groupby(held, lambda ref: ref.weight.expert or 0):
        slabs = [codes, *(kept[s.name][expert] for s in specs[1:])]
        for ref in members:
            place, packed = replace(ref.weight, expert=None, transposed=False), pack(ref.name)
            for slab, last in zip(slabs, lasts, strict=True):
                place.view(slab).copy_(packed[f"{ref.name}.{last}"])
        yield _bytes(codes)


def _refused(
    source: Checkpoint,
    name: str,
    refs: Iterable[LinearRef],
    produce: Callable[[str], QuantizedTensor],
    dtype: torch.dtype,
) -> Iterator[bytes]:
    """The bytes of a fused tensor in the source's layout, with the values of quantized linears in their
    places; one expert at a time."""
    by_expert: dict[int, list[LinearRef]] = {}
    for ref in refs:
        by_expert.setdefault(ref.weight.expert or 0, []).append(ref)
    for expert in range(source.info(name).shape[0]):
        slab = _narrowed(source.read_index(name, expert), dtype, source, name).contiguous()
        for ref in by_expert.get(expert, []):
            replace(ref.weight, expert=None).view(slab).copy_(produce(ref.name).dequantize())
        yield _bytes(slab)


def _narrowed(value: torch.Tensor, dtype: torch.dtype, source: Checkpoint, name: str) -> torch.Tensor:
    """Values of a tensor of the source in the dtype that they are written in.

    Raises:
        NotFinite: the source's are not finite.
        SourceFault: they are, and ``dtype`` has no room for them.
    """
    made = value.to(dtype)
    if made.is_floating_point() and not all_finite(made):
        if not all_finite(value):
            raise NotFinite(source.info(name).file, name)
        raise SourceFault(
            f"{source.info(name).file}: {name} holds values of up to {float(value.abs().max()):.3g}, which "
            f"{str(dtype).removeprefix('torch.')} has no room for: state bfloat16 as dtype in the source's "
            "config.json"
        )
    return made


def _bytes(value: torch.Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _do(jobs: Sequence[Callable[[], None]], workers: Executor | None) -> None:
    """Does all jobs. When one fails the others are left out or waited for: the file that they write to is
    about to be closed."""
    if workers is None:
        for job in jobs:
            job()
        return
    futures = [workers.submit(job) for job in jobs]
    try:
        for future in futures:
            future.result()
    finally:
        wait([f for f in futures if not f.cancel()])


def write_rest(
    folder: Path,
    source: Checkpoint,
    units: tuple[Unit, ...],
    form: Format,
    config: Mapping[str, Any],
    arguments: list[Argument],
    fallback: Path | None = None,
) -> list[dict[str, str]]:
    """Everything behind the shards: side files, index, engine arguments, and config.json last, because
    without it the folder is no model.

    Args:
        fallback: directory to take side files from that the source lacks.

    Returns:
        side files left out, each with its reason.
    """
    dropped = copy_side_files(source, folder)
    if fallback is not None:
        for file in Checkpoint(fallback, {}, {}).side_files():
            target = folder / file.relative
            own = file.relative in STALE or file.relative in REWRITTEN
            if not file.dropped and not own and not target.exists():
                _copy(file.path, target)
    if sum(len(u.shards) for u in units) > 1:
        total = sum(t.spec.nbytes for u in units for s in u.shards for t in s.tensors)
        write_text(
            folder / INDEX,
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map(units)}, indent=2) + "\n",
        )
    if form.config_file and "quantization_config" in config:
        write_text(folder / form.config_file, json.dumps(config["quantization_config"], indent=2) + "\n")
    write_text(folder / VLLM_CONFIG, json.dumps(vllm_config(arguments), indent=2) + "\n")
    write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return dropped


def copy_side_files(source: Checkpoint, folder: Path) -> list[dict[str, str]]:
    """Copies every side file byte for byte; returns those left out with the reason."""
    dropped = []
    for file in source.side_files():
        if file.relative in REWRITTEN:
            continue
        if reason := file.dropped or STALE.get(file.relative):
            dropped.append({"file": file.relative, "reason": reason})
            continue
        _copy(file.path, folder / file.relative)
    return dropped


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(file, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # the error itself names the source
            raise DiskFull(
                f"{target}: the disk is full. Free some room and run the same command again: finished work "
                "is kept"
            ) from error
        raise


def output_config(plan: JobPlan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config.json with the format's ``quantization_config``; ``settings``: the methods'."""
    config = without_quantization(plan.checkpoint.config)
    cache = KV_CACHE if plan.recipe.kv_cache_scheme else None
    quantization = plan.format.config(
        Contents(
            list(plan.written.values()),
            plan.unquantized,
            cache,
            settings,
            model_types(plan.checkpoint.config),
        )
    )
    if quantization is not None:
        if plan.recipe.target == "other" and any(plan.format.refuse(s, "vllm") for s in plan.schemes):
            quantization["meta"] = {
                **quantization.get("meta", {}),
                "target": "other engines: vLLM refuses this file",
            }
        config["quantization_config"] = quantization
    return config


def method_settings(quantizers: Mapping[Assignment, Quantizer]) -> dict[str, str]:
    """Settings of a job's methods that a format may have a word for."""
    orders = (str(getattr(q, "act_order", "none")) for q in quantizers.values())
    return {"act_order": next((order for order in orders if order != "none"), "none")}
