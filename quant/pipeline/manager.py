"""The one loop: read a block, run it, quantize its linears, write it, free it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quant.calibration.statistics import Accumulator
from quant.calibration.text import Rows, bundled, calibration_rows
from quant.checkpoint.header import read_header
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.writer import write_text
from quant.devices import device_of
from quant.errors import CheckpointError, QuantError, UsageError, VerificationFailed
from quant.evaluation.verify import verify
from quant.formats.reading import read_linear
from quant.models.adapter import InputGroup
from quant.models.skeleton import BlockCall, Skeleton
from quant.offline import load_tokenizer
from quant.pipeline.memory import peak_rss
from quant.pipeline.plan import JobPlan, Unit, plan_job, text_config
from quant.pipeline.staged import ActivationStore, Batches, StagedForward, run_block
from quant.pipeline.writing import REPORT, write_rest, write_unit
from quant.progress import Event, Progress, silent
from quant.quantizers import Quantized, Quantizer, QuantizerRegistry
from quant.recipe import Recipe
from quant.serving.arguments import engine_arguments, vllm_config
from quant.tensors import QuantizedTensor
from quant.units import format_seconds

#: Tokens of one batch: large enough for full speed of the matrix products, small enough that a batch's activations are few.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
#: Bytes of calibration activations that a CPU run keeps in memory. The rest goes to a scratch file, which the page cache holds where there is room.
RESIDENT_CPU = 256 << 20
#: Tokens of the held-out row that a layer's error is measured on.
ERROR_TOKENS = 512


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


class QuantizationManager:
    """Runs one planned job.

    >>> manager = QuantizationManager(plan_job(recipe))  # doctest: +SKIP
    >>> report = manager.run()  # doctest: +SKIP

    The block loop is :meth:`_calibrated` for methods that need statistics and :meth:`_data_free` for those that do not.
    """

    def __init__(self, plan: JobPlan, progress: Progress = silent):
        self.plan, self.progress = plan, progress
        recipe = plan.recipe
        self.quantizer = make_quantizer(recipe)
        self.device = device_of(recipe.device)
        self.clock = Clock()
        self.layers: dict[str, dict[str, Any]] = {}
        self.scratch_bytes = 0

    def run(self) -> dict[str, Any]:
        """Quantizes, writes, verifies, publishes; returns the report.

        Raises:
            QuantError: with finished work kept for the next run of the same command.
        """
        start = time.perf_counter()
        rows, skeleton = self.prepare() if self.quantizer.needs else (None, None)
        work = WorkFolder(self.plan.recipe.output_path.absolute(), self._fingerprint(rows), self.plan.recipe.fresh)
        try:
            for entry in work.finished.values():
                self.layers.update(entry["layers"])
            if work.finished:
                self.progress(Event("quantize", message=f"resuming: {len(work.finished)} of {len(self.plan.units)} units are finished"))
            with self.clock.phase("quantize"):
                if rows is not None and skeleton is not None:
                    self._calibrated(skeleton, rows, work)
                else:
                    self._data_free(work)
            report = self._finish(work, rows, start)
            work.publish()
        except torch.OutOfMemoryError as error:
            raise QuantError(
                f"{self.device}: out of memory ({str(error).splitlines()[0][:160]}): use fewer --samples, a shorter --sequence-length, or --device cpu; "
                "finished blocks are kept, but other settings start over"
            ) from error
        finally:
            work.release()
        return report

    def prepare(self) -> tuple[Rows, Skeleton]:
        """Calibration rows and the model without weights.

        Raises:
            QuantError: too little text, a model that cannot be run block by block, or linears that no group of the model's adapter has.
        """
        rows, skeleton = self._rows(), Skeleton(self.plan.checkpoint, self.device)
        known = {skeleton.block_prefix(b) + n for b in range(skeleton.block_count) for n in skeleton.adapter.linears()}
        unknown = [n for n in self.plan.linears if n not in known]
        if unknown:
            raise QuantError(
                f"{', '.join(unknown[:3])} {'is' if len(unknown) == 1 else 'are'} not among the linears that a block is seen to run, so there is no "
                "calibration for it: leave it with --ignore, or use --method minmax"
            )
        return rows, skeleton

    def _rows(self) -> Rows:
        recipe, checkpoint = self.plan.recipe, self.plan.checkpoint
        with self.clock.phase("text"):
            config = text_config(checkpoint.config)
            longest = config.get("max_position_embeddings")
            length = recipe.sequence_length or min(2048, longest if isinstance(longest, int) else 2048)
            if isinstance(longest, int) and length > longest:
                raise UsageError(f"--sequence-length is {length}: the model's longest context is {longest}")
            return calibration_rows(
                load_tokenizer(checkpoint.path),
                recipe.calibration_dataset or [bundled("wikipedia")],
                recipe.samples,
                length,
                vocabulary=size if isinstance(size := config.get("vocab_size"), int) else 2**31,
                shuffle=recipe.shuffle,
                seed=recipe.seed,
                chat_template=recipe.chat_template,
            )

    def _fingerprint(self, rows: Rows | None) -> dict[str, Any]:
        """What decides the output's bytes."""
        source = {
            f.name: [f.stat().st_size, f.stat().st_mtime_ns]
            for f in [*self.plan.checkpoint.weight_files, self.plan.checkpoint.path / "config.json"]
        }
        return {
            "source": {"path": str(self.plan.checkpoint.path.absolute()), "files": source},
            "settings": self.plan.recipe.settings(),
            "calibration": rows.digest if rows else None,
            "torch": torch.__version__,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability()
            if self.device.type == "cpu"
            else torch.cuda.get_device_name(self.device),
        }

    # --- methods that need statistics -------------------------------------------------------------------------------------------------

    def _calibrated(self, skeleton: Skeleton, rows: Rows, work: WorkFolder) -> None:
        """The block loop. On screen as a whole on purpose: every calibrated method goes through these lines."""
        store = ActivationStore(self._resident_bytes(), work.path / "activations.bin")
        try:
            with self.clock.phase("embed"):
                size = max(1, BATCH_TOKENS[self.device.type if self.device.type in BATCH_TOKENS else "cuda"] // rows.tokens.shape[1])
                tokens = [*rows.tokens.split(size), *([rows.held_out] if rows.held_out is not None else [])]
                hidden, calls = skeleton.embed(tokens)
                batches = Batches(store, hidden)
                held_out = len(tokens) - 1 if rows.held_out is not None else None
                del hidden
            for unit in self._units(work):
                if unit.block is None or unit.block >= skeleton.block_count:
                    if unit.name not in work.finished:
                        self._write(unit, work, {})
                    continue
                last = unit.block == skeleton.block_count - 1
                block_calls = {b: c[unit.block] for b, c in calls.items()}
                if unit.name in work.finished:
                    if not last:
                        with self.clock.phase("replay"):
                            run_block(skeleton.load_block(unit.block, self._finished_weights(unit, work)), batches, block_calls)
                else:
                    with self.clock.phase("load"):
                        block = skeleton.load_block(unit.block)
                    done = self._quantize_block(skeleton, unit.block, block, batches, block_calls, store, held_out, need_outputs=not last)
                    self._write(unit, work, done)
                skeleton.free_block(unit.block)
        finally:
            self.scratch_bytes = store.spilled_bytes
            store.close()

    def _quantize_block(
        self,
        skeleton: Skeleton,
        index: int,
        block: nn.Module,
        batches: Batches,
        calls: Mapping[int, BlockCall],
        store: ActivationStore,
        held_out: int | None,
        need_outputs: bool,
    ) -> dict[str, QuantizedTensor]:
        """Quantizes the chosen linears of one block and leaves its outputs in ``batches``."""
        prefix = skeleton.block_prefix(index)
        groups = [g for g in self._chosen_groups(skeleton.adapter.groups, prefix)]
        sums: dict[InputGroup, Accumulator] = {}
        samples: dict[InputGroup, torch.Tensor] = {}

        def observe(group: InputGroup, batch: int, inputs: torch.Tensor) -> None:
            with self.clock.phase("statistics"):
                if batch == held_out:
                    samples[group] = inputs.reshape(-1, inputs.shape[-1])[-ERROR_TOKENS:].clone()
                    return
                if group not in sums:
                    sums[group] = Accumulator(inputs.shape[-1], inputs.device, self.quantizer.needs)
                sums[group].add(inputs)

        done: dict[str, QuantizedTensor] = {}
        if not groups:
            run_block(block, batches, calls)
            return done
        staged = StagedForward(block, groups, batches, calls, store, observe, need_outputs)
        clock = self.clock.seconds
        before, other = time.perf_counter(), clock["statistics"] + clock["solve"]
        for group in staged.stages():
            start = time.perf_counter()
            modules = [block.get_submodule(name) for name in group.linears]
            weights = [block.get_parameter(f"{name}.weight") for name in group.linears]
            with self.clock.phase("solve"):
                statistics = sums.pop(group).finish()
                stacked = torch.cat([w.float() for w in weights])
                result = self.quantizer(stacked, statistics, self.plan.scheme.weights, _torch_dtype(self.plan.dtype))
                del stacked
            row = 0
            for name, module, weight in zip(group.linears, modules, weights, strict=True):
                tensor = result.tensor.rows(row, row + len(weight))
                row += len(weight)
                value = tensor.dequantize()
                if self.plan.format.quant_method is None:
                    value = value.to(_torch_dtype(self.plan.dtype))  # plain files hold values, rounded once: go on with those
                value = value.to(weight.dtype)
                self._note(prefix + name, tensor, result, weight, value, samples.get(group), statistics.tokens, time.perf_counter() - start)
                module.weight = nn.Parameter(value, requires_grad=False)
                done[prefix + name] = tensor
        clock["forward"] += time.perf_counter() - before - (clock["statistics"] + clock["solve"] - other)
        return done

    def _chosen_groups(self, groups: Sequence[InputGroup], prefix: str) -> list[InputGroup]:
        chosen = []
        for group in groups:
            linears = tuple(n for n in group.linears if prefix + n in self.plan.linears)
            if linears:
                chosen.append(InputGroup(linears, group.source, group.fused))
        return chosen

    def _finished_weights(self, unit: Unit, work: WorkFolder) -> dict[str, torch.Tensor]:
        """Dequantized weights of a finished block, read back from its shards."""
        headers = {name: info for shard in unit.shards for name, info in read_header(work.path / shard.file)[0].items()}
        written = Checkpoint(work.path, {}, headers)
        config = output_config(self.plan, self._act_order()).get("quantization_config")
        if config is None:
            return {t.spec.name: written.read(t.spec.name) for s in unit.shards for t in s.tensors if t.linear is not None}
        found = self.plan.format.find(config, headers)
        return {f"{name}.weight": read_linear(self.plan.format, found, written, name).dequantize() for name in found.linears}

    def _resident_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else RESIDENT_CPU

    # --- methods that need no data ----------------------------------------------------------------------------------------------------

    def _data_free(self, work: WorkFolder) -> None:
        """Tensor by tensor through the files; no module is built, so any architecture goes through."""
        for unit in self._units(work):
            if unit.name not in work.finished:
                self._write(unit, work, {})

    def _quantize_alone(self, name: str) -> QuantizedTensor:
        start = time.perf_counter()
        stored = self.plan.checkpoint.read(f"{name}.weight")
        weight = stored.to(self.device).float()
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{self.plan.checkpoint.info(f'{name}.weight').file}: {name}.weight holds NaN or infinity: the source is damaged, fetch it again"
            )
        with self.clock.phase("solve"):
            result = self.quantizer(weight, None, self.plan.scheme.weights, _torch_dtype(self.plan.dtype))
        value = result.tensor.dequantize().to(stored.dtype)
        self._note(name, result.tensor, result, stored.to(self.device), value, None, 0, time.perf_counter() - start)
        return result.tensor

    # --- shared -----------------------------------------------------------------------------------------------------------------------

    def _units(self, work: WorkFolder) -> Iterator[Unit]:
        units = self.plan.units
        for number, unit in enumerate(units):
            start, before = time.perf_counter(), unit.name in work.finished
            yield unit
            errors = [f["error"] for n, f in self.layers.items() if f.get("unit") == unit.name and f["error"] is not None]
            error = f", relative error {max(errors):.2%} at most" if errors else ""
            self.progress(
                Event(
                    "quantize",
                    number + 1,
                    len(units),
                    message=f"{unit.name:>9} {'replayed' if before else 'written'} in {format_seconds(time.perf_counter() - start)}{error}",
                )
            )

    def _note(
        self,
        name: str,
        tensor: QuantizedTensor,
        result: Quantized,
        weight: torch.Tensor,
        value: torch.Tensor,
        sample: torch.Tensor | None,
        tokens: int,
        seconds: float,
    ) -> None:
        """Keeps the evidence for one linear: relative output error on held-out tokens, signal to noise of the weight, what went otherwise."""
        difference = weight.float() - value.float()
        noise, signal = float(difference.square().sum()), float(weight.float().square().sum())
        error = None
        if sample is not None:
            wanted = (sample @ weight.to(sample.dtype).t()).float()
            missed = (
                (sample.float() @ difference.t()) if sample.dtype == torch.float32 else (sample @ difference.to(sample.dtype).t()).float()
            )
            error = float(missed.square().sum() / wanted.square().sum().clamp_min(1e-30))
        self.layers[name] = {
            "name": name,
            "scheme": str(tensor.scheme),
            "error": error,
            "snr_db": round(10 * float(torch.log10(torch.tensor(signal / max(noise, 1e-30)))), 2) if signal else None,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "fallback": "; ".join(result.fallbacks) or None,
            "notes": list(result.notes),
        }
        for fallback in result.fallbacks:
            self.progress(Event("quantize", message=f"{name}: {fallback}", warning=True))

    def _write(self, unit: Unit, work: WorkFolder, done: dict[str, QuantizedTensor]) -> None:
        """Writes a unit; linears that are not in ``done`` are quantized now."""

        def produce(name: str) -> QuantizedTensor:
            return done.pop(name) if name in done else self._quantize_alone(name)

        with self.clock.phase("write"):
            files = write_unit(unit, work.path, self.plan.checkpoint, self.plan.format, self.plan.linears, self.plan.dtype, produce)
            names = sorted({t.linear for s in unit.shards for t in s.tensors if t.linear})
            for name in names:
                self.layers[name]["unit"] = unit.name
            work.finish_unit(unit.name, files, {"layers": {n: self.layers[n] for n in names}})

    def _finish(self, work: WorkFolder, rows: Rows | None, start: float) -> dict[str, Any]:
        """Side files, index, config, static verification, report."""
        plan, checkpoint = self.plan, self.plan.checkpoint
        with self.clock.phase("finish"):
            config = output_config(plan, self._act_order())
            arguments = engine_arguments(config, tensor_parallel=plan.recipe.tensor_parallel)
            dropped = write_rest(work.path, checkpoint, plan.units, plan.format, config, arguments)
        with self.clock.phase("verify"):
            verification = verify(work.path, tensor_parallel=plan.recipe.tensor_parallel, source=checkpoint.path, target=plan.recipe.target)
            if verification.failed:
                raise VerificationFailed(
                    f"{work.path}: the output failed its own verification: {'; '.join(verification.failed[:5])}. It was not published"
                )
        layers = [self.layers[name] for name in plan.linears]
        copied = [n for n in checkpoint.tensors if n.removesuffix(".weight") not in plan.linears or not n.endswith(".weight")]
        report: dict[str, Any] = {
            "output_path": str(plan.recipe.output_path),
            "source_path": str(checkpoint.path),
            "method": plan.recipe.method,
            "scheme": plan.scheme.to_dict(),
            "format": plan.format.name,
            "target": plan.recipe.target,
            "settings": plan.recipe.settings(),
            "source_bytes": checkpoint.nbytes,
            "output_bytes": sum(f.stat().st_size for f in work.path.glob("*.safetensors")),
            "bits_per_weight": bits_per_weight(plan),
            "seconds": {k: round(v, 3) for k, v in self.clock.seconds.items()} | {"total": round(time.perf_counter() - start, 3)},
            "peak_rss_bytes": peak_rss(),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            "scratch_bytes": self.scratch_bytes,
            "calibration": None if rows is None else {"rows": len(rows.tokens), "length": rows.tokens.shape[1], "digest": rows.digest},
            "layers": layers,
            "fallbacks": [{"name": x["name"], "fallback": x["fallback"]} for x in layers if x["fallback"]],
            "tensors": {"quantized": [f"{n}.weight" for n in plan.linears], "copied": copied, "dropped": []},
            "side_files_dropped": dropped,
            "vllm": vllm_config(arguments),
            "verify": verification.to_dict(),
            "output_hash": verification.content_hash,
        }
        write_text(work.path / REPORT, json.dumps(report, indent=2) + "\n")
        return report

    def _act_order(self) -> str:
        return str(getattr(self.quantizer, "act_order", "none"))


def _torch_dtype(name: str) -> torch.dtype:
    from quant.checkpoint.dtypes import TORCH

    return TORCH[name]


def make_quantizer(recipe: Recipe) -> Quantizer:
    """The method of a recipe with the settings it has.

    Raises:
        UsageError: unknown method, or an option that this method does not have.
    """
    kind = QuantizerRegistry.get(recipe.method)
    fields = getattr(kind, "__dataclass_fields__", {})
    options = {k: getattr(recipe, k) for k in ("act_order", "damping", "clip_search") if getattr(recipe, k) is not None}
    for option in options:
        if option not in fields:
            raise UsageError(f"--{option.replace('_', '-')} is not an option of --method {recipe.method}")
    return kind(**options)


def bits_per_weight(plan: JobPlan) -> float:
    """Stored bits per weight of the quantized linears, everything counted."""
    stored = sum(t.spec.nbytes for u in plan.units for s in u.shards for t in s.tensors if t.linear is not None)
    return round(8 * stored / sum(x.n * x.k for x in plan.linears.values()), 4)


def output_config(plan: JobPlan, act_order: str) -> dict[str, Any]:
    """The source's config.json with the format's ``quantization_config``."""
    config = dict(plan.checkpoint.config)
    quantization = plan.format.config(list(plan.linears.values()), plan.unquantized, act_order)
    if quantization is not None:
        if plan.recipe.target == "other" and plan.format.refuse(plan.scheme.weights, "vllm"):
            quantization["meta"] = {**quantization.get("meta", {}), "target": "other engines: vLLM refuses this file"}
        config["quantization_config"] = quantization
    return config


def quantize(recipe: Recipe, progress: Progress = silent) -> dict[str, Any]:
    """Plans and runs a job; returns the report that is also written as ``quant_report.json``.

    Raises:
        QuantError: see :func:`plan_job` and :meth:`QuantizationManager.run`.
    """
    return QuantizationManager(plan_job(recipe), progress).run()
