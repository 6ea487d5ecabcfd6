"""What every linear of a model would lose in every scheme that it may take, in nats of the model's KL
divergence per token; and what a whole choice loses, measured.

One backward pass through the full-precision model (:mod:`quant.pipeline.gradients`) gives both Hessians of
each linear. Each candidate is made by the job's own method, and its errors E cost

    tr(H_O · E · H_I · Eᵀ) / (2 · tr H_I)

as far as the Kronecker approximation goes (:mod:`quant.quantizers.yaqa`). Where a scheme rounds inputs, too,
their rounding adds eᵀ · H_O · e / (2 · mean ‖x‖²) of the errors e at the outputs of a held-out row.

What was made is kept, packed as it would be stored, until the choice has been judged. A block whose file is
written is not surveyed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant.calibration.statistics import Statistics
from quant.checkpoint.dtypes import TORCH
from quant.checkpoint.header import read_header
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.writer import ShardWriter
from quant.models.calls import call_block
from quant.models.skeleton import Skeleton
from quant.pipeline.candidates import Candidate, Item, linear_in
from quant.pipeline.expert_survey import BOTH, ExpertSurvey, Made
from quant.pipeline.gradients import LOGITS, GradientStream, Seen
from quant.pipeline.group_solves import demand_finite
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.memory import give_back
from quant.pipeline.methods import make_quantizer
from quant.pipeline.plan import JobPlan
from quant.pipeline.scratch import ScratchFiles
from quant.progress import Event, Progress
from quant.quantizers.activations import fake_quantize, input_parameters
from quant.quantizers.two_sided import loss
from quant.tensors import QuantizedTensor, largest_magnitude
from quant.vllm.config import model_types
from quant.vllm.layers import sharing_layers

#: By linear, what each candidate loses; of 16 bits 0.
Losses = dict[str, list[float | None]]


def surveyed(items: Sequence[Item], skeleton: Skeleton, index: int) -> dict[str, str]:
    """The linears of a block that a pass shows and that are an item's: the name in the file → that inside
    the block."""
    wanted = {n for item in items for n in item.linears}
    prefix = skeleton.block_prefix(index)
    read = {n for group in skeleton.groups(index) for n in group.linears}
    return {prefix + n: n for n in skeleton.linears(index) if n in read and prefix + n in wanted}


def routed_modules(skeleton: Skeleton, index: int) -> dict[str, str]:
    """The linears of routed experts of a block, and the module that each is in; by names inside the block."""
    return {n: g.experts for g in skeleton.groups(index) if g.experts for n in g.linears}


def asked_of(
    skeleton: Skeleton,
    index: int,
    names: Collection[str],
    needs: frozenset[str],
    files: ScratchFiles | None = None,
) -> Seen:
    """What a pass has to show of a block's linears, given by their names inside it; ``needs``: of those that
    are no routed experts', of which all is kept in ``files``."""
    places, routed = skeleton.linears(index), routed_modules(skeleton, index)
    return Seen(
        {n: (places[n], needs) for n in names if n not in routed},
        {routed[n] for n in names if n in routed},
        files or ScratchFiles(),
    )


def tokens_of(judged_by: Mapping[str, Statistics], seen: Halves) -> int:
    """Tokens that went through a block where its candidates are judged; where only routed experts have seen
    them, what these were sent."""
    several = max((s.tokens for s in judged_by.values()), default=0)
    return several or max((int(kept.counts.sum()) for kept in seen.judged.routed.values()), default=0)


def _made_file(work: WorkFolder, index: int) -> Path:
    """Where a block's candidates are."""
    return work.path / f"block-{index:05d}.safetensors"


@dataclass
class Halves:
    """Sums of the same pass of two kinds of batches by turns: what candidates are made by, and what they are
    judged by. A method that sees few tokens fits them, and would find its own errors on them too small.

    Attributes:
        made: empty where no method asks for anything.
        together: there are too few batches to take turns.
    """

    made: Seen
    judged: Seen
    together: bool
    _turn: int = 0

    def release(self) -> None:
        """Frees what is kept of experts."""
        self.made.release()
        self.judged.release()

    @contextmanager
    def watching(self, block: nn.Module, held_out: bool) -> Iterator[None]:
        with ExitStack() as stack:
            # of two that watch a block together, experts are seen by the inner one
            both = self.together or not (self.made.linears or self.made.experts)
            self._turn += not held_out
            if not held_out and (both or self._turn % 2):
                stack.enter_context(self.made.watching(block, False))
            if held_out or both or not self._turn % 2:
                stack.enter_context(self.judged.watching(block, held_out))
            yield


@dataclass(frozen=True)
class Survey:
    """Surveys the items of a job in the candidates of a pool.

    Args:
        manager: of a plan that has all the linears, whatever their scheme.
        work: the folder that is gone on with.
    """

    manager: QuantizationManager
    pool: Sequence[Candidate]
    items: Sequence[Item]
    work: WorkFolder
    progress: Progress

    @property
    def plan(self) -> JobPlan:
        return self.manager.plan

    def run(self, skeleton: Skeleton, tokens: torch.Tensor, held_out: torch.Tensor | None) -> Losses:
        """What each linear loses, of those that the pass reaches.

        Args:
            tokens: int64 [B, T] that gradients are taken through.

        Raises:
            QuantError: gradients or inputs that are not finite.
        """
        losses: Losses = {}
        for entry in self.work.finished.values():
            losses |= entry.get("losses", {})
        count = skeleton.block_count
        todo = [i for i in range(count) if f"block {i}" not in self.work.finished]
        if not todo:
            return losses
        manager = self.manager
        store = manager.workspace.store(self.work.path)
        rows = min(manager.workspace.batch_rows(tokens.shape[1]), -(-len(tokens) // 2))
        batches = [*tokens.split(rows)]
        together = len(batches) == 1
        aside = None if held_out is None else len(batches)
        batches += [] if held_out is None else [held_out]
        total = 2 * count
        try:
            self.progress(Event("sensitivity", 0, total, detail="embedding"))
            stream, clock = (
                GradientStream(skeleton, batches, aside, store, self.plan.recipe.seed),
                manager.clock,
            )
            for index in range(count):
                self.progress(Event("sensitivity", index, total, detail=f"forward through block {index}"))
                with clock.phase("forward"):
                    stream.forward(index, skeleton.load_block(index))
                skeleton.free_block(index)
                give_back()
            self.progress(Event("sensitivity", count, total, detail="gradients at the logits"))
            with clock.phase("logits"):
                stream.at_logits()
            for number, index in enumerate(range(count - 1, todo[0] - 1, -1)):
                self.progress(Event("sensitivity", count + number, total, detail=f"block {index}"))
                block = skeleton.load_block(index)
                seen = self._seen(skeleton, index, together, store.files) if index in todo else None
                with clock.phase("backward"):
                    stream.backward(index, block, seen)  # type: ignore[arg-type]
                if seen is not None:
                    losses |= self._solve(skeleton, index, block, seen)
                skeleton.free_block(index)
                give_back()
        finally:
            store.close()
        return losses

    def linears(self, skeleton: Skeleton, index: int) -> dict[str, str]:
        """:func:`surveyed` of its items."""
        return surveyed(self.items, skeleton, index)

    def _seen(self, skeleton: Skeleton, index: int, together: bool, files: ScratchFiles) -> Halves:
        names = self.linears(skeleton, index).values()
        needs = frozenset().union(*(self._needs(c) for c in self.pool))
        # of the same batches, what goes to experts is kept once
        twice = routed_modules(skeleton, index) if together else {}
        own = [n for n in names if needs and n not in twice]
        return Halves(
            asked_of(skeleton, index, own, needs, files),
            asked_of(skeleton, index, names, BOTH, files),
            together,
        )

    def _needs(self, candidate: Candidate) -> frozenset[str]:
        """Statistics that a candidate is made by."""
        if candidate.assignment is None:
            return frozenset()
        inputs = candidate.assignment.scheme.activations
        ranges = frozenset({"range"}) if inputs is not None and inputs.calibrated else frozenset()
        return make_quantizer(candidate.assignment).needs | ranges

    def _solve(self, skeleton: Skeleton, index: int, block: nn.Module, seen: Halves) -> Losses:
        """Makes and writes the candidates of a block's linears; what they lose goes into the journal."""
        made_by, judged_by = seen.made.finish(), seen.judged.finish()
        made = self._candidates(skeleton, index, block, seen, made_by, judged_by, {})
        seen.release()
        return made

    def _candidates(
        self,
        skeleton: Skeleton,
        index: int,
        block: nn.Module,
        seen: Halves,
        made_by: dict[str, Statistics],
        judged_by: dict[str, Statistics],
        facts: Mapping[str, Any],
    ) -> Losses:
        """``facts``: what else the journal is to say of the block, once its candidates are made."""
        plan, form, places = self.plan, self.plan.format, skeleton.linears(index)
        routed, kept, samples = routed_modules(skeleton, index), seen.judged.routed, seen.judged.samples
        names = {
            n: x
            for n, x in self.linears(skeleton, index).items()
            if (routed[x] in kept if x in routed else judged_by[x].gradients is not None)
        }
        dense = {n: x for n, x in names.items() if x not in routed}
        tokens = tokens_of(judged_by, seen)
        items = {n: item for item in self.items for n in item.linears if n in names}
        largest = self._largest([*dense], lambda n: places[dense[n]].get(block))
        specs = [
            replace(spec, name=f"{number}:{spec.name}")
            for name in names
            for number in self._made(items[name])
            for spec in form.specs(linear_in(plan, name, self.pool[number]), plan.dtype)
        ]
        path, losses, seconds = _made_file(self.work, index), {}, [0.0] * len(self.pool)
        with ShardWriter(path, specs) as writer, torch.no_grad():
            for name, local in dense.items():
                weight, both = places[local].get(block).float(), judged_by.pop(local)
                demand_finite(both, name)
                own, sample = made_by.pop(local, None), samples.pop(local, None)
                found: list[float | None] = [None] * len(self.pool)
                found[-1] = 0.0
                for number in self._made(items[name]):
                    start = time.perf_counter()
                    tensor = self._quantized(number, weight, own, largest[name])
                    seconds[number] += time.perf_counter() - start
                    found[number] = self._lost(number, weight, tensor, both, sample)
                    linear = linear_in(plan, name, self.pool[number])
                    for key, value in form.pack(linear, tensor, TORCH[plan.dtype]).items():
                        writer.write(f"{number}:{key}", value)
                losses[name] = found
                give_back()
            if len(dense) < len(names):
                made = seen.made.routed or seen.judged.routed, seen.judged.routed
                for one in ExpertSurvey(self.manager, self.pool).candidates(
                    skeleton, index, block, made, self.wanted(skeleton, index), tokens
                ):
                    seconds[one.number] += one.seconds
                    self._write_expert(writer, skeleton.block_prefix(index), one, losses)
        facts = {"losses": losses, "seconds": {str(i): s for i, s in enumerate(seconds)}, **facts}
        self.work.finish_unit(f"block {index}", {path: writer.digest}, facts)
        return losses

    def wanted(self, skeleton: Skeleton, index: int) -> Callable[[str], list[int]]:
        """Numbers of the candidates of a block's linears, by their names inside it; none of what is no
        item's."""
        names = self.linears(skeleton, index)
        found = {names[n]: self._made(item) for item in self.items for n in item.linears if n in names}
        return lambda local: found.get(local, [])

    def _write_expert(self, writer: ShardWriter, prefix: str, one: Made, losses: Losses) -> None:
        """Writes a candidate of an expert's linears; what they lose goes into ``losses``, under the first
        one's name."""
        for place, (local, tensor) in enumerate(zip(one.names, one.tensors, strict=True)):
            name = prefix + local
            if name not in losses:
                losses[name] = [*([None] * (len(self.pool) - 1)), 0.0]
            losses[name][one.number] = 0.0 if place else one.lost
            linear = linear_in(self.plan, name, self.pool[one.number])
            for key, value in self.plan.format.pack(linear, tensor, TORCH[self.plan.dtype]).items():
                writer.write(f"{one.number}:{key}", value)

    def _made(self, item: Item) -> list[int]:
        """Numbers of the candidates that an item may take, less 16 bits."""
        return [i for i, size in enumerate(item.sizes[:-1]) if size is not None]

    def _largest(
        self, names: Sequence[str], weight: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The largest magnitude among the linears whose whole-tensor numbers vLLM shares, of each."""
        found: dict[str, torch.Tensor] = {}
        for shared in sharing_layers(names, model_types(self.plan.checkpoint.config)):
            most = torch.stack([largest_magnitude(weight(n)).float() for n in shared]).amax()
            found |= dict.fromkeys(shared, most)
        return found

    def _quantized(
        self, number: int, weight: torch.Tensor, own: Statistics | None, largest: torch.Tensor
    ) -> QuantizedTensor:
        """A weight [N, K] as a candidate's method makes it."""
        assignment = self.pool[number].assignment
        assert assignment is not None
        quantizer, scheme = make_quantizer(assignment), assignment.scheme
        shared = largest if scheme.weights.strategy in ("tensor", "tensor_group") else None
        statistics = own.copy() if own is not None and quantizer.needs else None
        made = quantizer(weight.clone(), statistics, scheme.weights, TORCH[self.plan.dtype], shared).tensor
        return replace(made, inputs=input_parameters(own, scheme.activations))

    def _lost(
        self,
        number: int,
        weight: torch.Tensor,
        tensor: QuantizedTensor,
        both: Statistics,
        sample: torch.Tensor | None,
    ) -> float:
        """Nats that a candidate costs."""
        assert both.hessian is not None and both.gradients is not None
        made, trace = tensor.dequantize(), float(both.hessian.diagonal().sum()) or 1.0
        lost = float(loss(weight - made, both.hessian, both.gradients).double().sum()) / (2 * trace)
        assignment = self.pool[number].assignment
        inputs = None if assignment is None else assignment.scheme.activations
        if inputs is not None and sample is not None and len(sample):
            x = sample.float()
            errors = (x - fake_quantize(x, inputs, tensor.inputs)) @ made.t()
            identity = torch.eye(errors.shape[0], device=errors.device) / errors.shape[0]
            power = float(x.pow(2).sum(1).mean()) or 1.0
            lost += float(loss(errors.t(), identity, both.gradients).double().sum()) / (2 * power)
        return max(lost, 0.0)


class Judge:
    """Measures choices on rows of text: the KL divergence of each to the source, in fp32.

    Args:
        rows: int64 [B, T].
    """

    def __init__(self, survey: Survey, rows: torch.Tensor):
        self._survey, self._rows = survey, rows

    def measure(self, choices: Sequence[Mapping[str, int]]) -> list[list[float]]:
        """Of each choice (by linear the number of its candidate; others stay as they are) the divergence of
        each row, in nats per token."""
        survey = self._survey
        skeleton = Skeleton(survey.plan.checkpoint, survey.manager.device, torch.float32)
        batches = [*self._rows.split(survey.manager.workspace.batch_rows(self._rows.shape[1]))]
        hidden, calls = skeleton.embed(batches)
        states = [hidden, *([h.clone() for h in hidden] for _ in choices)]
        count = skeleton.block_count
        with torch.no_grad():
            for index in range(count):
                survey.progress(Event("compare", index, count, detail=f"block {index}"))
                loaded = False
                for choice, own in zip([{}, *choices], states, strict=True):
                    chosen = self._chosen(skeleton, index, choice)
                    if not loaded or chosen:
                        block = skeleton.load_block(index)
                    with ExitStack() as stack:
                        self._put(skeleton, index, block, chosen, stack)
                        for number, batch in enumerate(own):
                            own[number] = call_block(block, batch, calls[number][index])
                    loaded = not chosen  # as it is in the source, for the choices that leave it so
                    if chosen:
                        skeleton.free_block(index)
                skeleton.free_block(index)
                give_back()
            return self._divergences(skeleton, batches, states)

    def _chosen(self, skeleton: Skeleton, index: int, choice: Mapping[str, int]) -> dict[str, int]:
        """What is put into a block: by linear the number of a candidate that was made of it."""
        last = len(self._survey.pool) - 1
        names = [n for n in self._survey.linears(skeleton, index) if choice.get(n, last) != last]
        if not names:
            return {}
        headers = read_header(_made_file(self._survey.work, index))[0]
        held = {key.partition(":")[2].rpartition(".")[0] for key in headers}
        return {n: choice[n] for n in names if n in held}

    def _put(
        self, skeleton: Skeleton, index: int, block: nn.Module, chosen: Mapping[str, int], stack: ExitStack
    ) -> None:
        """Puts what was made of a block's linears into their places."""
        if not chosen:
            return
        survey, plan, places = self._survey, self._survey.plan, skeleton.linears(index)
        names = survey.linears(skeleton, index)
        headers = read_header(_made_file(survey.work, index))[0]
        file = Checkpoint(survey.work.path, {}, headers)
        for name, number in chosen.items():
            linear = linear_in(plan, name, survey.pool[number])
            packed = {
                spec.name: file.read(f"{number}:{spec.name}").to(skeleton.device)
                for spec in plan.format.specs(linear, plan.dtype)
            }
            tensor, place = plan.format.unpack(linear, packed, {}), places[names[name]]
            place.set(block, tensor.dequantize())
            if (inputs := linear.activations) is not None and not place.shared:

                def rounded(
                    module: nn.Module,
                    args: tuple[Any, ...],
                    inputs: Any = inputs,
                    numbers: Any = tensor.inputs,
                ) -> tuple[Any, ...]:
                    return (fake_quantize(args[0], inputs, numbers), *args[1:])

                handle = block.get_submodule(place.module).register_forward_pre_hook(rounded)
                stack.callback(handle.remove)

    def _divergences(
        self, skeleton: Skeleton, batches: Sequence[torch.Tensor], states: Sequence[Sequence[torch.Tensor]]
    ) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in states[1:]]
        with skeleton.outside():
            for number, batch in enumerate(batches):
                step = max(1, LOGITS // (skeleton.vocabulary * len(batch)))
                sums = [torch.zeros(len(batch), dtype=torch.float64) for _ in found]
                for start in range(0, batch.shape[1], step):
                    some = slice(start, start + step)
                    logs = [
                        skeleton.logits(batch[:, some], own[number][:, some].contiguous())
                        .float()
                        .log_softmax(-1)
                        for own in states
                    ]
                    exact = logs[0].exp()
                    for total, log in zip(sums, logs[1:], strict=True):
                        total += (exact * (logs[0] - log)).sum((-1, -2)).double().cpu()
                for own, total in zip(found, sums, strict=True):
                    own += (total / batch.shape[1]).tolist()
        return found
