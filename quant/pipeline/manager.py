"""The one loop: read a block, run it, quantize its linears, write it, free it."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant.activations import input_parameters
from quant.backends import NATIVE
from quant.calibration.statistics import Accumulator, Statistics
from quant.calibration.text import Rows
from quant.checkpoint.header import read_header
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.writer import write_text
from quant.devices import device_of
from quant.errors import CheckpointError, QuantError, UsageError, VerificationFailed
from quant.evaluation.preservation import preservation
from quant.evaluation.verify import verify
from quant.formats.reading import read_linear
from quant.models.adapter import InputGroup, fused_name
from quant.models.attention import observed_attention, staircase_attention
from quant.models.skeleton import BlockCall, Skeleton
from quant.outlier_suppression import Suppressor
from quant.pipeline.folding import can_take_rows, find_fold, fold_linear, fold_norm, unfolded
from quant.pipeline.memory import peak_rss, release_free_memory
from quant.pipeline.plan import JobPlan, Unit, make_quantizer, make_suppressor, plan_job, text_config
from quant.pipeline.rows import job_rows
from quant.pipeline.staged import ActivationStore, Batches, StagedForward, run_block
from quant.pipeline.writing import write_rest, write_unit
from quant.progress import Event, Progress, silent
from quant.quantizers import Quantized, Quantizer
from quant.recipe import Assignment, Recipe
from quant.report.evidence import NOT_CALIBRATED, NOT_HELD_OUT, REPORT
from quant.schemes import BLOCK, Scheme
from quant.serving.arguments import engine_arguments, vllm_config
from quant.tensors import QuantizedTensor, largest_magnitude, sum_of_squares
from quant.units import format_seconds

#: Tokens of one batch: large enough for full speed of the matrix products, small enough that a batch's activations are few.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
#: Bytes of calibration activations that a CPU run keeps in memory. The rest goes to a scratch file, which the page cache holds where there is room.
RESIDENT_CPU = 256 << 20
#: Elements of a weight that a method without data works on at a time: a CPU's temporaries stay in its cache, a GPU's still fill it.
PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}
#: An input feature this many times as large as the median one is an outlier: its weights may be small and still matter, and few bits round them away.
OUTLIERS = 32.0
#: Tensors that a job without data works on at once, and so has in memory, on as many cores; and units, of which one may be waiting for the disk.
MOST_WORKERS, UNITS_UNDER_WAY = 4, 2
#: Bytes of a buffer that is made and freed, untouched, before the work: from then on glibc's allocator keeps freed blocks of up to this size, where
#: it would give each back to the system and have it cleared again. Its own limit is 32 MiB.
KEPT = 31 << 20
#: Keys of a recipe that say which text is read.
CALIBRATION = frozenset({"calibration_dataset", "samples", "sequence_length", "shuffle", "chat_template", "seed"})
#: Tokens of the held-out row that a layer's error is measured on.
ERROR_TOKENS = 512


@dataclass
class Made:
    """What a block's quantization makes: linears by file name, source tensors with new values, scales of the KV cache."""

    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    _cache: torch.Tensor | None = None

    def observe_cache(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Notes the largest magnitudes of K and V, as they go into the cache."""
        largest = torch.stack([key.abs().amax(), value.abs().amax()]).float()
        self._cache = largest if self._cache is None else torch.maximum(self._cache, largest)
        return key, value

    def finish_cache(self, names: Sequence[str]) -> None:
        """Makes the block's cache scales, fp32 [1] each: what maps the largest magnitude seen to the largest E4M3 number.

        Raises:
            QuantError: the block has names for them, but no attention that could be observed.
        """
        for name in names:
            if self._cache is None:
                raise QuantError(
                    f"{name}: the block's attention does not go through transformers' attention functions: leave --kv-cache-scheme out"
                )
            largest = self._cache[0 if name.endswith("k_scale") else 1]
            if not bool(torch.isfinite(largest)):
                raise QuantError(f"{name}: the cache's values hold NaN or infinity on calibration tokens: run quant evaluate on the source")
            self.changed[name] = (torch.where(largest == 0, 1.0, largest) / 448.0).reshape(1).cpu()


class Assembled:
    """A quantized weight of ``count`` rows put together from pieces of them, in order."""

    def __init__(self, count: int):
        self._count, self._filled = count, 0
        self._codes: torch.Tensor | None = None
        self._scales: list[torch.Tensor] = []
        self._zeros: list[torch.Tensor] = []
        self._fallbacks: dict[str, None] = {}
        self._notes: dict[str, None] = {}
        self._last: Quantized | None = None

    def add(self, piece: Quantized) -> None:
        tensor = piece.tensor
        if self._codes is None:
            self._codes = torch.empty(self._count, *tensor.codes.shape[1:], dtype=tensor.codes.dtype, device=tensor.codes.device)
        self._codes[self._filled : self._filled + len(tensor.codes)] = tensor.codes
        self._filled += len(tensor.codes)
        self._scales.append(tensor.scales)
        if tensor.zeros is not None:
            self._zeros.append(tensor.zeros)
        self._fallbacks |= dict.fromkeys(piece.fallbacks)
        self._notes |= dict.fromkeys(piece.notes)
        self._last = piece

    def finish(self) -> Quantized:
        assert self._last is not None and self._codes is not None and self._filled == self._count
        tensor = self._last.tensor
        scales = tensor.scales if tensor.scheme.strategy == "tensor" else torch.cat(self._scales)
        tensor = replace(tensor, codes=self._codes, scales=scales, zeros=torch.cat(self._zeros) if self._zeros else None)
        return Quantized(tensor, tuple(self._fallbacks), tuple(self._notes))


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
        if recipe.backend != NATIVE:
            raise UsageError(f"--backend is {recipe.backend!r}: this is the native one, quant.quantize runs the others")
        self.quantizers = {a: make_quantizer(a) for a in dict.fromkeys(plan.assignments.values())}
        self.suppressors = {a: self._suppressor(q) for a, q in self.quantizers.items()}
        self.device = device_of(recipe.device)
        self.clock = Clock()
        self.layers: dict[str, dict[str, Any]] = {}
        self.folds: dict[str, dict[str, Any]] = {}
        self._amax: dict[str, torch.Tensor] = {}
        self._amax_lock = threading.Lock()
        self.scratch_bytes = 0

    def _suppressor(self, quantizer: Quantizer) -> Suppressor | None:
        """The one that the job names, or else the one that is part of the method."""
        recipe = self.plan.recipe
        name = recipe.outlier_suppression or quantizer.suppressor
        return make_suppressor(name, recipe.alpha) if name and name != "none" else None

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that anything in the job asks for; empty where no calibration is needed."""
        return frozenset().union(*(self._needs(a) for a in self.quantizers)) | (
            {"range"} if self.plan.recipe.kv_cache_scheme else frozenset()
        )

    def _needs(self, assignment: Assignment) -> frozenset[str]:
        suppressor, activations = self.suppressors[assignment], assignment.scheme.activations
        wanted = self.quantizers[assignment].needs | (suppressor.needs if suppressor else frozenset())
        return wanted | {"range"} if activations is not None and activations.calibrated else wanted

    def run(self) -> dict[str, Any]:
        """Quantizes, writes, verifies, publishes; returns the report.

        Raises:
            QuantError: with finished work kept for the next run of the same command.
        """
        start = time.perf_counter()
        rows, skeleton = self.prepare() if self.needs else (None, None)
        if rows is None and (unused := sorted(CALIBRATION & self.plan.recipe.model_fields_set)):
            named = ", ".join(f"--{k.replace('_', '-')}" for k in unused)
            self.progress(Event("text", message=f"{named}: not used, nothing in this job needs calibration text", warning=True))
        work = WorkFolder(self.plan.recipe.output_path.absolute(), self._fingerprint(rows), self.plan.recipe.fresh)
        try:
            for entry in work.finished.values():
                self.layers.update(entry["layers"])
                self.folds.update(entry["folds"])
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
        with self.clock.phase("text"):
            rows = job_rows(self.plan)
        skeleton = Skeleton(self.plan.checkpoint, self.device)
        known = {skeleton.block_prefix(b) + n for b in range(skeleton.block_count) for n in skeleton.adapter.linears()}
        unknown = [n for n in self.plan.linears if n not in known]
        if unknown:
            raise QuantError(
                f"{', '.join(unknown[:3])} {'is' if len(unknown) == 1 else 'are'} not among the linears that a block is seen to run, so there is no "
                "calibration for it: leave it with --ignore, or use --method minmax"
            )
        return rows, skeleton

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
                calls: dict[int, list[BlockCall]] = {}
                batches = Batches(store, skeleton.embedded(tokens, calls))
                held_out = len(tokens) - 1 if rows.held_out is not None else None
            for unit in self._units(work):
                if unit.block is None or unit.block >= skeleton.block_count:
                    if unit.name not in work.finished:
                        self._write(unit, work, Made())
                    continue
                last = unit.block == skeleton.block_count - 1
                block_calls = {b: c[unit.block] for b, c in calls.items()}
                if unit.name in work.finished:
                    if not last:
                        with self.clock.phase("replay"):
                            block = skeleton.load_block(unit.block, self._finished_weights(unit, work))
                            with staircase_attention(block):
                                run_block(block, batches, block_calls)
                else:
                    with self.clock.phase("load"):
                        block = skeleton.load_block(unit.block)
                    made = self._quantize_block(skeleton, unit.block, block, batches, block_calls, store, held_out, need_outputs=not last)
                    self._write(unit, work, made)
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
    ) -> Made:
        """Quantizes the chosen linears of one block and leaves its outputs in ``batches``."""
        prefix = skeleton.block_prefix(index)
        chosen = self._chosen_groups(skeleton.adapter.groups, prefix)
        groups = list(chosen)
        sums: dict[InputGroup, Accumulator] = {}
        samples: dict[InputGroup, torch.Tensor] = {}

        def observe(group: InputGroup, batch: int, inputs: torch.Tensor) -> None:
            with self.clock.phase("statistics"):
                if batch == held_out:
                    samples[group] = inputs.reshape(-1, inputs.shape[-1])[-ERROR_TOKENS:].clone()
                    return
                if group not in sums:
                    sums[group] = Accumulator(inputs.shape[-1], inputs.device, self._needs(self._assignment(prefix, group)))
                sums[group].add(inputs)

        made = Made()
        cache = [spec.name for unit in self.plan.units if unit.block == index for spec in unit.made]
        observed = observed_attention(block, made.observe_cache) if cache else nullcontext()
        if not groups:
            with staircase_attention(block), observed:
                run_block(block, batches, calls)
            made.finish_cache(cache)
            return made
        staged = StagedForward(block, groups, batches, calls, store, observe, need_outputs)
        clock = self.clock.seconds
        before, other = time.perf_counter(), clock["statistics"] + clock["solve"]
        with staircase_attention(block), observed:
            for group in staged.stages():
                release_free_memory()  # the solve needs much of it, in larger pieces
                start = time.perf_counter()
                modules = [block.get_submodule(name) for name in group.linears]
                weights = [block.get_parameter(f"{name}.weight") for name in group.linears]
                with self.clock.phase("solve"):
                    statistics = sums.pop(group).finish()
                    if not statistics.finite:
                        raise QuantError(
                            f"{prefix}{group.linears[0]}: its inputs hold NaN or infinity on calibration tokens: the model overflows or its "
                            "weights or config.json are damaged: run quant evaluate on the source; --method minmax --scheme w4a16 needs no inputs"
                        )
                    results, factors = self._solve_group(
                        group, chosen[group], prefix, weights, statistics, skeleton.adapter.norm_offset, made
                    )
                for name, module, weight, result in zip(group.linears, modules, weights, results, strict=True):
                    value, evidence = self._going_on(result.tensor, weight, factors, samples.get(group))
                    self._record(prefix + name, result, *evidence, statistics.tokens, time.perf_counter() - start)
                    module.weight = nn.Parameter(value, requires_grad=False)
        made.finish_cache(cache)
        clock["forward"] += time.perf_counter() - before - (clock["statistics"] + clock["solve"] - other)
        return made

    def _solve_group(
        self,
        group: InputGroup,
        whole: InputGroup,
        prefix: str,
        weights: Sequence[torch.Tensor],
        statistics: Statistics,
        norm_offset: float,
        made: Made,
    ) -> tuple[list[Quantized], torch.Tensor | None]:
        """Suppresses and quantizes linears that share an input; what they become goes into ``made``.

        Returns:
            each linear's result, and the factors fp32 [K] that its input will have been divided by, or None.
        """
        assignment = self._assignment(prefix, group)
        scheme, dtype = assignment.scheme, _torch_dtype(self.plan.dtype)
        quantizer, suppressor = self.quantizers[assignment], self.suppressors[assignment]
        sizes = [len(w) for w in weights]
        stacked = torch.empty(sum(sizes), weights[0].shape[1], device=weights[0].device)
        for rows, weight in zip(stacked.split(sizes), weights, strict=True):
            rows.copy_(weight)
        notes: tuple[str, ...] = ()
        factors = None
        if suppressor is not None:
            factors, notes = self._suppress(suppressor, group, whole, prefix, stacked, statistics, scheme, norm_offset, made)
        elif scheme.weights.bits <= 4 and (spread := statistics.spread) > OUTLIERS:
            notes = (
                f"a feature of its input is {spread:.0f} times the median one: --outlier-suppression awq keeps what small weights make of it",
            )
        if factors is not None:
            stacked *= factors
            statistics = statistics.divided(factors)
        inputs = input_parameters(statistics, scheme.activations)
        if scheme.weights.strategy == "block" and any(n % BLOCK for n in sizes[:-1]):  # blocks do not straddle linears
            copies = [statistics if i == len(sizes) - 1 else statistics.copy() for i in range(len(sizes))]
            results = [quantizer(w.clone(), s, scheme.weights, dtype) for w, s in zip(stacked.split(sizes), copies, strict=True)]
        else:
            result = quantizer(stacked, statistics, scheme.weights, dtype)
            ends = list(accumulate(sizes))
            results = [replace(result, tensor=result.tensor.rows(end - n, end)) for n, end in zip(sizes, ends, strict=True)]
        results = [replace(r, tensor=replace(r.tensor, inputs=inputs), notes=(*notes, *r.notes)) for r in results]
        made.linears.update({prefix + n: r.tensor for n, r in zip(group.linears, results, strict=True)})
        return results, factors

    def _suppress(
        self,
        suppressor: Suppressor,
        group: InputGroup,
        whole: InputGroup,
        prefix: str,
        stacked: torch.Tensor,
        statistics: Statistics,
        scheme: Scheme,
        norm_offset: float,
        made: Made,
    ) -> tuple[torch.Tensor | None, tuple[str, ...]]:
        """The factors that a suppressor proposes, folded; or None and why not."""
        config = text_config(self.plan.checkpoint.config)
        head_size = int(
            config.get("head_dim") or int(config.get("hidden_size") or 0) // max(int(config.get("num_attention_heads") or 1), 1) or 1
        )
        fold = find_fold(group, whole, prefix, self.plan.checkpoint, norm_offset, head_size, self.plan.recipe.exact_folds, stacked.device)
        if isinstance(fold, str):
            return None, (f"not scaled by {suppressor.name}: {fold}",)
        if fold.place.source not in suppressor.sources:
            return None, ()
        if fold.place.source == "linear" and not can_take_rows(made.linears.get(fold.source)):
            return None, (f"not scaled by {suppressor.name}: {group.source} has no scale for each output",)
        proposed = suppressor(stacked, statistics, scheme, _torch_dtype(self.plan.dtype), fold.place)
        make = fold_norm if fold.place.source == "norm" else partial(fold_linear, done=made.linears)
        factors, changed = make(fold, proposed.factors, self.plan.checkpoint)
        made.changed.update(changed)
        self.folds[prefix + "+".join(group.linears)] = {
            "suppressor": suppressor.name,
            "kind": fold.place.source,
            "source": fold.source,
            "linears": [prefix + n for n in group.linears],
            "norm_offset": fold.norm_offset,
            "changed": sorted(changed),
            "factors": [float(factors.min()), float(factors.max())],
            "notes": list(proposed.notes),
        }
        return factors, proposed.notes

    def _assignment(self, prefix: str, group: InputGroup) -> Assignment:
        return self.plan.assignments[prefix + group.linears[0]]

    def _chosen_groups(self, groups: Sequence[InputGroup], prefix: str) -> dict[InputGroup, InputGroup]:
        """The linears to quantize that share an input and are quantized alike → all that share the input."""
        chosen: dict[InputGroup, InputGroup] = {}
        for group in groups:
            alike: dict[Assignment, list[str]] = {}
            for name in group.linears:
                if prefix + name in self.plan.linears:
                    alike.setdefault(self.plan.assignments[prefix + name], []).append(name)
            chosen |= {InputGroup(tuple(names), group.source, group.fused): group for names in alike.values()}
        return chosen

    def _finished_weights(self, unit: Unit, work: WorkFolder) -> dict[str, torch.Tensor]:
        """Dequantized weights of a finished block, read back from its shards."""
        headers = {name: info for shard in unit.shards for name, info in read_header(work.path / shard.file)[0].items()}
        written = Checkpoint(work.path, {}, headers)
        config = output_config(self.plan, self._act_order()).get("quantization_config")
        if config is None:
            weights = {t.spec.name: written.read(t.spec.name) for s in unit.shards for t in s.tensors if t.linear is not None}
        else:
            found = self.plan.format.find(config, headers)
            weights = {f"{name}.weight": read_linear(self.plan.format, found, written, name).dequantize() for name in found.linears}
        names = {t.linear for s in unit.shards for t in s.tensors}
        unfolded(weights, {k: f for k, f in self.folds.items() if f["linears"][0] in names}, self.plan.checkpoint, written)
        return weights

    def _resident_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else RESIDENT_CPU

    # --- methods that need no data ----------------------------------------------------------------------------------------------------

    def _data_free(self, work: WorkFolder) -> None:
        """Tensor by tensor through the files; no module is built, so any architecture goes through.

        Each worker quantizes, hashes and writes one tensor at a time on one thread, whose pieces stay in the cache of its core; threads that shared
        a piece would wait for each other, for long where others use the cores too. The workers go on with the next unit while one is synced.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        torch.empty(KEPT, dtype=torch.uint8)
        workers, writers = ThreadPoolExecutor(worker_count(threads)), ThreadPoolExecutor(UNITS_UNDER_WAY)

        def start(unit: Unit) -> Future[dict[Path, str]]:
            """Starts a unit once its room on the disk is claimed: what a full disk leaves finished are then the first units."""
            claimed = threading.Event()
            files = writers.submit(self._files, unit, work, Made(), workers, claimed.set)
            files.add_done_callback(lambda _: claimed.set())  # or it has failed
            claimed.wait()
            return files

        try:
            ahead = (start(u) for u in self.plan.units if u.name not in work.finished)
            under_way = deque(islice(ahead, 1))
            for unit in self._units(work):
                if unit.name not in work.finished:
                    under_way.extend(islice(ahead, 1))
                    with self.clock.phase("write"):
                        self._finish_unit(unit, work, under_way.popleft().result())
        finally:
            workers.shutdown(wait=False, cancel_futures=True)  # after an error or an interrupt: ends the units under way
            writers.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _quantize_alone(self, name: str) -> QuantizedTensor:
        """Quantizes one linear by pieces of its rows, which are independent; of the source no more than a piece is in memory."""
        assignment = self.plan.assignments[name]
        weights = assignment.scheme.weights
        start = time.perf_counter()
        amax = self._fused_amax(name) if weights.strategy in ("tensor", "tensor_group") else None
        shared = {} if amax is None else {"amax": amax}
        signal, noise = [], []
        whole = Assembled(self.plan.linears[name].n)
        for stored, weight, squares in self._pieces(name):
            result = self.quantizers[assignment](weight, None, weights, _torch_dtype(self.plan.dtype), **shared)
            signal.append(squares)
            # a dtype holds the difference of two of its numbers exactly where neither is more than twice the other, or one is 0
            noise.append(sum_of_squares(result.tensor.dequantize().to(stored.dtype).sub_(stored).float()))
            whole.add(result)
        quantized = whole.finish()
        self._record(name, quantized, _total(noise), _total(signal), None, 0, time.perf_counter() - start)
        return quantized.tensor

    def _pieces(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """A linear's weight by pieces of rows, whole blocks of them: as stored, and as fp32 of its own, both on the device; and the sum of its squares.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        size = PIECE.get(self.device.type, PIECE["cuda"])
        block = BLOCK if self.plan.assignments[name].scheme.weights.strategy == "block" else 1
        rows = max(block, size // self.plan.linears[name].k // block * block)
        for piece in self.plan.checkpoint.read_rows(f"{name}.weight", rows):
            stored = piece.to(self.device)
            weight = stored.to(torch.float32, copy=True)
            squares = sum_of_squares(weight)
            # a sum of squares is finite only if every number is; those of large numbers may overflow
            if not bool(torch.isfinite(squares)) and not bool(torch.isfinite(weight).all()):
                raise CheckpointError(
                    f"{self.plan.checkpoint.info(f'{name}.weight').file}: {name}.weight holds NaN or infinity: the source is damaged, fetch it again"
                )
            yield stored, weight, squares

    def _fused_amax(self, name: str) -> torch.Tensor:
        """Largest magnitude in the layer that vLLM fuses a linear into: its shards get one number for the whole tensor."""
        fused = fused_name(name)
        with self._amax_lock:
            if fused not in self._amax:
                shards = [n for n in self.plan.linears if fused_name(n) == fused]
                self._amax[fused] = torch.stack([largest_magnitude(w) for n in shards for _, w, _ in self._pieces(n)]).amax()
            return self._amax[fused]

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

    def _going_on(
        self, tensor: QuantizedTensor, weight: torch.Tensor, factors: torch.Tensor | None, sample: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[float, float, float | None]]:
        """The values that the batches under way go on with, in the dtype of ``weight`` [N, K], and the evidence for the linear.

        By pieces of rows, which stay in the cache of a CPU: whole weights in fp32 would be written and read again a dozen times.

        Returns:
            values; energy of what rounding changed, energy of the weight, and relative output error on ``sample`` [T, K], or None without one.
        """
        n, k = weight.shape
        size = 4 * PIECE.get(self.device.type, PIECE["cuda"])
        rows = max(BLOCK, size // k // BLOCK * BLOCK)
        values = torch.empty_like(weight)
        sums = torch.zeros(4, dtype=torch.float64, device=weight.device)
        for start in range(0, n, rows):
            end = min(start + rows, n)
            piece, exact, kept = tensor.rows(start, end).dequantize(), weight[start:end], values[start:end]
            if self.plan.format.quant_method is None:
                piece = piece.to(_torch_dtype(self.plan.dtype)).float()  # plain files hold values, rounded once: go on with those
            if factors is not None:
                piece = piece / factors  # the batches under way carry the input as it was before the fold
            kept.copy_(piece)
            wide = exact.float()
            difference = wide - kept
            missed = wanted = torch.zeros((), device=weight.device)
            if sample is not None:
                wanted = sum_of_squares((sample @ exact.to(sample.dtype).t()).float())
                missed = sum_of_squares((sample @ difference.to(sample.dtype).t()).float())
            sums += torch.stack([sum_of_squares(difference), sum_of_squares(wide), missed, wanted])
        noise, signal, lost, whole = sums.tolist()
        return values, (noise, signal, lost / max(whole, 1e-30) if sample is not None else None)

    def _record(self, name: str, result: Quantized, noise: float, signal: float, error: float | None, tokens: int, seconds: float) -> None:
        self.layers[name] = {
            "name": name,
            "method": self.plan.assignments[name].method,
            "scheme": str(self.plan.linears[name].numbers),
            "error": error,
            "error_missing": None if error is not None else NOT_HELD_OUT if tokens else NOT_CALIBRATED,
            "snr_db": round(10 * float(torch.log10(torch.tensor(signal / max(noise, 1e-30)))), 2) if signal else None,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "fallback": "; ".join(result.fallbacks) or None,
            "notes": list(result.notes),
        }
        for fallback in result.fallbacks:
            self.progress(Event("quantize", message=f"{name}: {fallback}", warning=True))

    def _write(self, unit: Unit, work: WorkFolder, made: Made) -> None:
        """Writes a unit and notes that it is finished."""
        with self.clock.phase("write"):
            self._finish_unit(unit, work, self._files(unit, work, made))

    def _files(
        self, unit: Unit, work: WorkFolder, made: Made, workers: Executor | None = None, claimed: Callable[[], object] = lambda: None
    ) -> dict[Path, str]:
        """Writes a unit's files, and returns each one's digest; linears that are not in ``made`` are quantized now."""

        def produce(name: str) -> QuantizedTensor:
            return made.linears.pop(name) if name in made.linears else self._quantize_alone(name)

        plan = self.plan
        return write_unit(unit, work.path, plan.checkpoint, plan.format, plan.linears, plan.dtype, produce, made.changed, workers, claimed)

    def _finish_unit(self, unit: Unit, work: WorkFolder, files: Mapping[Path, str]) -> None:
        """Puts a unit whose files are written and synced into the journal."""
        names = sorted({t.linear for s in unit.shards for t in s.tensors if t.linear})
        for name in names:
            self.layers[name]["unit"] = unit.name
        folds = {k: f for k, f in self.folds.items() if set(f["linears"]) & set(names)}
        work.finish_unit(unit.name, files, {"layers": {n: self.layers[n] for n in names}, "folds": folds})

    def _finish(self, work: WorkFolder, rows: Rows | None, start: float) -> dict[str, Any]:
        """Side files, index, config, static verification, report."""
        plan, checkpoint = self.plan, self.plan.checkpoint
        with self.clock.phase("finish"):
            config = output_config(plan, self._act_order())
            arguments = engine_arguments(config, tensor_parallel=plan.recipe.tensor_parallel)
            dropped = write_rest(work.path, checkpoint, plan.units, plan.format, config, arguments)
        with self.clock.phase("verify"):
            changed = sorted({n for f in self.folds.values() for n in f["changed"]})
            made = sorted({t.name for u in plan.units for t in u.made})
            verification = verify(
                work.path,
                tensor_parallel=plan.recipe.tensor_parallel,
                source=checkpoint.path,
                target=plan.recipe.target,
                changed=changed,
                made=made,
            )
            if verification.failed:
                raise VerificationFailed(
                    f"{work.path}: the output failed its own verification: {'; '.join(verification.failed[:5])}. It was not published"
                )
            preserved = preservation(checkpoint.path, work.path, self.device) if plan.methods == ["none"] else None
            if preserved is not None and not preserved.preserved:
                raise VerificationFailed(
                    f"{work.path}: the output is another function than the source: KL {preserved.kl:.2g} nats per token, logits differ by "
                    f"{preserved.difference:.2%} at most. It was not published"
                )
        layers = [self.layers[name] for name in plan.linears]
        copied = [
            n
            for n in checkpoint.tensors
            if n not in set(changed) and (n.removesuffix(".weight") not in plan.linears or not n.endswith(".weight"))
        ]
        report: dict[str, Any] = {
            "output_path": str(plan.recipe.output_path),
            "source_path": str(checkpoint.path),
            "method": plan.recipe.method,
            "methods": plan.methods,
            "scheme": plan.scheme_dict(),
            "format": plan.format.name,
            "target": plan.recipe.target,
            "settings": plan.recipe.settings(),
            "source_bytes": checkpoint.nbytes,
            "output_bytes": sum(f.stat().st_size for f in work.path.glob("*.safetensors")),
            "bits_per_weight": plan.bits_per_weight,
            "seconds": {k: round(v, 3) for k, v in self.clock.seconds.items()} | {"total": round(time.perf_counter() - start, 3)},
            "peak_rss_bytes": peak_rss(),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            "scratch_bytes": self.scratch_bytes,
            "calibration": None if rows is None else {"rows": len(rows.tokens), "length": rows.tokens.shape[1], "digest": rows.digest},
            "layers": layers,
            "fallbacks": [{"name": x["name"], "fallback": x["fallback"]} for x in layers if x["fallback"]],
            "tensors": {
                "quantized": [f"{n}.weight" for n in plan.linears],
                "copied": copied,
                "folded": changed,
                "added": made,
                "dropped": [],
            },
            "folds": self.folds,
            "unquantized_linears": list(plan.unquantized),
            "side_files_dropped": dropped,
            "vllm": vllm_config(arguments),
            "function": None if preserved is None else preserved.to_dict(),
            "verify": verification.to_dict(),
            "output_hash": verification.content_hash,
        }
        write_text(work.path / REPORT, json.dumps(report, indent=2) + "\n")
        return report

    def _act_order(self) -> str:
        return next((o for q in self.quantizers.values() if (o := str(getattr(q, "act_order", "none"))) != "none"), "none")


def worker_count(threads: int) -> int:
    """Tensors that a job without data works on at once where torch may use so many threads."""
    return min(threads, MOST_WORKERS)


def _total(parts: list[torch.Tensor]) -> float:
    return float(torch.stack(parts).double().sum())


def _torch_dtype(name: str) -> torch.dtype:
    from quant.checkpoint.dtypes import TORCH

    return TORCH[name]


def output_config(plan: JobPlan, act_order: str) -> dict[str, Any]:
    """The source's config.json with the format's ``quantization_config``."""
    config = dict(plan.checkpoint.config)
    quantization = plan.format.config(list(plan.linears.values()), plan.unquantized, act_order, bool(plan.recipe.kv_cache_scheme))
    if quantization is not None:
        if plan.recipe.target == "other" and any(plan.format.refuse(s, "vllm") for s in plan.schemes):
            quantization["meta"] = {**quantization.get("meta", {}), "target": "other engines: vLLM refuses this file"}
        config["quantization_config"] = quantization
    return config


def quantize(recipe: Recipe, progress: Progress = silent) -> dict[str, Any]:
    """Plans and runs a job, with whichever backend it names; returns the report that is also written as ``quant_report.json``.

    Raises:
        QuantError: see :func:`plan_job`, :meth:`QuantizationManager.run` and :mod:`quant.backends.run`.
    """
    if recipe.backend != NATIVE:
        from quant.backends.run import plan_backend, quantize_with

        return quantize_with(plan_backend(recipe), progress)
    return QuantizationManager(plan_job(recipe), progress).run()
