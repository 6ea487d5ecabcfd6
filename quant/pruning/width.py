"""A model whose blocks are narrower: fewer routed experts, MLP channels or groups of attention heads, the
same number in every block; an ordinary checkpoint with other sizes in its config.json.

One kind after another, each in one pass over the blocks, one block in memory at a time. A block is measured
on what the narrower blocks before it give, narrowed, and run on the same states again. Beside them go the
states of the source, so that at the end of each pass the KL divergence to the source is known, on rows of
text that nothing was measured on.

- Experts go by what they add to the outputs of tokens that are routed to them: the mean of the router's
  weight times the norm of the expert's output (REAP, Lasby et al. 2025, arXiv:2510.13999). Nothing is merged.
- Channels of the MLP, and groups of heads (a KV head with its query heads), go by what the block's output
  loses when those that stay make up for them, and the projection that reads them is fitted to that
  (:mod:`quant.pruning.saliency`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quant import defaults
from quant.accelerator import device_name, device_of
from quant.calibration.statistics import Accumulator
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.writer import file_digest
from quant.errors import CheckpointError, SourceFault, UsageError
from quant.evaluation.quality import Runner
from quant.models.calls import BlockCall, call_block
from quant.models.experts import Routed, Stage, expert_outputs, experts_through, find_experts
from quant.models.narrowing import CALLED, Kind, Taken, Widths, cuts, narrowed, widths
from quant.pipeline.activation_store import ActivationStore, Batches
from quant.pipeline.checks import check_disk
from quant.pipeline.fingerprint import fingerprint
from quant.pipeline.rows import Measured, measured_rows
from quant.pipeline.workspace import RESIDENT_CPU
from quant.progress import Event, Progress, silent
from quant.pruning.importance import copied, divergences, embedded, split_rows, through
from quant.pruning.output import (
    Times,
    built,
    opened,
    with_config,
    write_smaller,
)
from quant.pruning.saliency import best_of_groups, least_units, made_up_for
from quant.report.value import Provenance, Pruning, Report
from quant.units import ranges
from quant.vllm.config import block_count, stated, whole_number

#: Rows of text behind those that are measured on, that the KL divergence is told of.
HELD_OUT = 8
#: The options that say how many stay.
OPTIONS: Mapping[Kind, str] = {
    "experts": "--experts",
    "channels": "--intermediate-size",
    "heads": "--kv-heads",
}


@dataclass(frozen=True)
class Width(Measured):
    """How many units stay in every block, and the text that they are measured on.

    Attributes:
        experts, channels, heads: routed experts, MLP channels, KV heads; None: all.
        multiple_of: of what the channels are a multiple.
        tensor_parallel: ranks that heads and channels are to be shared out to.
    """

    experts: int | None = None
    channels: int | None = None
    heads: int | None = None
    multiple_of: int = 128
    samples: int = defaults.SAMPLES
    tensor_parallel: int = 1

    @property
    def asked(self) -> dict[Kind, int]:
        """How many stay, by kind, in the order in which they go."""
        given: dict[Kind, int | None] = {
            "experts": self.experts,
            "channels": self.channels,
            "heads": self.heads,
        }
        return {kind: stay for kind, stay in given.items() if stay is not None}

    def problem(self, found: Widths) -> str | None:
        """What is wrong with it for a model of these widths, or None."""
        stay, ranks = self.asked[found.kind], self.tensor_parallel
        named, called = f"{OPTIONS[found.kind]} is {stay}", CALLED[found.kind][0]
        if not 1 <= stay < found.count:
            most = found.count - 1
            return f"{named}: the model has {found.count} {called} in a block: from 1 to {most} can stay"
        if found.kind == "channels":
            for number, why in (
                (self.multiple_of, "kernels and groups of scales want it so; --multiple-of says otherwise"),
                (ranks, "tensor parallelism shares channels out evenly"),
            ):
                if stay % number:
                    return f"{named}, no multiple of {number}: {why}: {_nearest(stay, number, found.count)}"
        if found.kind == "heads" and (stay * found.queries % ranks or (stay % ranks and ranks % stay)):
            return (
                f"{named}, with {stay * found.queries} query heads: {ranks} ranks of tensor parallelism "
                "cannot share them out whole"
            )
        if found.kind == "experts":
            return self._expert_problem(found, named, stay)
        return None

    def _expert_problem(self, found: Widths, named: str, stay: int) -> str | None:
        if stay < found.active:
            return f"{named}: a token visits {found.active} of them, so at least as many stay"
        if found.groups and stay % found.groups:
            return (
                f"{named}: the router sorts experts into {found.groups} groups of one size: "
                f"{_nearest(stay, found.groups, found.count)}"
            )
        if found.groups and stay // found.groups * found.top_groups < found.active:
            return (
                f"{named}: a token visits {found.active} experts of {found.top_groups} groups of "
                f"{stay // found.groups}, which are too few"
            )
        return None


def _nearest(stay: int, number: int, count: int) -> str:
    near = [n for n in (stay // number * number, -(-stay // number) * number) if 0 < n < count]
    return f"ask for {' or '.join(map(str, near))}" if near else f"the model's {count} allow no such number"


def _undivided(checkpoint: Checkpoint, width: Width, found: Widths) -> str | None:
    """What transformers has against a number of heads in families where it wants the hidden size to be a
    multiple of it (`LlamaConfig.validate_architecture`), or None."""
    hidden, stay = whole_number(stated(checkpoint.config, "hidden_size")) or 0, width.asked["heads"]
    if not hidden % (stay * found.queries):
        return None
    fitting = [n for n in range(1, found.count) if hidden % (n * found.queries) == 0]
    way = f"ask for {' or '.join(map(str, fitting))}" if fitting else "no number of them does"
    return (
        f"{checkpoint.path}: {OPTIONS['heads']} is {stay}, with {stay * found.queries} query heads: "
        f"transformers reads this family where hidden_size, {hidden}, is a multiple of them: {way}"
    )


def narrow(
    model_path: str | Path,
    output_path: str | Path,
    width: Width,
    progress: Progress = silent,
    command: Sequence[str] | None = None,
    fresh: bool = False,
) -> Report:
    """Writes ``model_path`` with narrower blocks.

    What was measured of each block is kept, so that the same call goes on where one was killed.

    Raises:
        Problems, UsageError, QuantError: what stands against it, before anything is measured where that can
            be told.
    """
    start = time.perf_counter()
    output = Path(output_path)
    checkpoint = opened(model_path, output)
    if not width.asked:
        raise UsageError(f"give how many stay: {', '.join(OPTIONS.values())}")
    if width.samples < 1:
        raise UsageError(f"--samples is {width.samples}: at least one row is measured on")
    found = {kind: widths(checkpoint, kind) for kind in width.asked}
    for sizes in found.values():
        if (problem := width.problem(sizes)) is not None:
            raise UsageError(f"{checkpoint.path}: {problem}")
    device = device_of(width.device)
    source = Runner(checkpoint, device)
    trial = checkpoint
    for kind, stay in width.asked.items():  # what cannot be written is told before anything is measured
        trial = narrowed(trial, found[kind], stay, lambda block, stay=stay: torch.arange(stay))  # type: ignore[misc]
    try:
        built(trial, f"the {' and '.join(CALLED[k][0] for k in width.asked)} that would go")
    except CheckpointError as error:
        if "heads" in found and (problem := _undivided(checkpoint, width, found["heads"])):
            raise UsageError(problem) from error
        raise
    check_disk(output, 2 * checkpoint.nbytes)
    rows = measured_rows(checkpoint, replace(width, samples=width.samples + HELD_OUT))
    settings = {OPTIONS[kind].removeprefix("--"): stay for kind, stay in width.asked.items()}
    work = WorkFolder(output.absolute(), fingerprint(checkpoint, settings, rows, device), fresh)
    try:
        own, steps = source, []
        for kind, stay in width.asked.items():
            one = _Pass(source, own, found[kind], stay, work, progress)
            steps.append(one.go(rows.tokens))
            own = one.after
        made = own.skeleton.checkpoint
        pruning = Pruning(
            blocks=block_count(checkpoint.config) or 0,
            widths=tuple(steps),
            calibration=rows.to_dict(),
        )
        return write_smaller(
            replace(made, computed={}, computed_parts={}),
            checkpoint,
            work,
            output,
            pruning,
            Times(start, time.perf_counter()),
            Provenance.here(command, device_name(device)),
            progress,
            _Values(made),
            scratch=_STATE.format("*"),
        )
    finally:
        work.release()


#: What is kept of a block that was measured.
_STATE = "width-{}.safetensors"


class _Values(Mapping[str, torch.Tensor]):
    """The values of a checkpoint that are computed, when they are asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self._computed = checkpoint.computed

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._computed[name]().contiguous()

    def __contains__(self, name: object) -> bool:
        return name in self._computed

    def __iter__(self) -> Iterator[str]:
        return iter(self._computed)

    def __len__(self) -> int:
        return len(self._computed)


class _Pass:
    """One kind, through all blocks.

    Attributes:
        after: the narrower model; of blocks that are not measured yet the first units stay.
    """

    def __init__(
        self, source: Runner, before: Runner, found: Widths, stay: int, work: WorkFolder, progress: Progress
    ):
        self._source, self._before, self._found, self._stay = source, before, found, stay
        self._work, self._progress = work, progress
        self._kept: dict[int, torch.Tensor] = {}
        self._scores: dict[int, torch.Tensor] = {}
        self._fitted: dict[str, torch.Tensor] = {}
        cut = narrowed(before.skeleton.checkpoint, found, stay, self._units, self._fitted.get)
        with with_config(cut, f"the {CALLED[found.kind][0]} that go") as placed:
            self.after = Runner(placed, source.skeleton.device)
        self.after.skeleton.checkpoint = cut

    def _units(self, block: int) -> torch.Tensor:
        return self._kept.get(block, torch.arange(self._stay))

    def go(self, rows: torch.Tensor) -> dict[str, Any]:
        """Measures and narrows every block on rows of tokens int64 [R, T]; the last :data:`HELD_OUT` judge.

        Returns:
            what a report says of it, see :class:`quant.report.value.Pruning`; no scores of channels, which
            are many.
        """
        found, count = self._found, self._source.skeleton.block_count
        batches = [*split_rows(rows[:-HELD_OUT]), *split_rows(rows[-HELD_OUT:])]
        judging = len(split_rows(rows[-HELD_OUT:]))
        hidden, calls = embedded(self._source, batches)
        own_calls, after_calls = (embedded(r, batches)[1] for r in (self._before, self.after))
        store = ActivationStore(RESIDENT_CPU, self._work.path / "activations.bin")
        try:
            whole = Batches(store, hidden)
            own = copied(whole, store)
            for index in range(count):
                self._progress(Event(CALLED[found.kind][0], index, count, detail=f"block {index}"))
                through(self._source, index, [whole], calls)
                self._narrow(index, own, own_calls[:-judging])
                through(self.after, index, [own], after_calls)
            self._progress(Event(CALLED[found.kind][0], count, count))
            last, runner = range(len(batches) - judging, len(batches)), self._source
            ours, theirs = (Batches(store, (states.copy(b) for b in last)) for states in (own, whole))
            kl = divergences(runner, batches[-judging:], theirs, {0: ours}, self._progress)[0]
        finally:
            store.close()
        self._progress(
            Event(
                CALLED[found.kind][0],
                message=f"{found.count} {CALLED[found.kind][0]} → {self._stay}: KL {kl:.4g} to the source",
            )
        )
        return {
            "kind": found.kind,
            "called": CALLED[found.kind][0],
            "before": found.count,
            "after": self._stay,
            "kl": kl,
            "kept": {str(i): ranges(kept.tolist()) for i, kept in self._kept.items()},
            "scores": {str(i): s.tolist() for i, s in self._scores.items()}
            if found.kind != "channels"
            else {},
            "fitted": sorted(self._fitted),
        }

    def _narrow(self, index: int, states: Batches, calls: Sequence[Sequence[BlockCall]]) -> None:
        """Decides what of a block stays, or takes over what an earlier run has decided."""
        skeleton = self._before.skeleton
        taken = cuts(skeleton.checkpoint, index, self._found)
        if not taken:
            return
        name, file = f"{self._found.kind} {index}", self._file(index)
        if name not in self._work.finished:
            block = skeleton.load_block(index)
            feed = [partial(call_block, block, states.copy(b), calls[b][index]) for b in range(len(calls))]
            with torch.no_grad():
                if self._found.kind == "experts":
                    found = self._experts(block, feed, index)
                else:
                    found = self._columns(block, feed, index, taken)
            skeleton.free_block(index)
            save_file(found, file)
            self._work.finish_unit(name, {file: file_digest(file)}, {})
        state = load_file(file)
        self._kept[index], self._scores[index] = state.pop("kept"), state.pop("scores")
        self._fitted |= state

    def _file(self, index: int) -> Path:
        return self._work.path / _STATE.format(f"{self._found.kind}-{index:05d}")

    def _columns(
        self, block: nn.Module, feed: Sequence[Callable[[], Any]], index: int, taken: Mapping[str, Taken]
    ) -> dict[str, torch.Tensor]:
        """Which columns of the projection that reads them stay, and what it becomes."""
        skeleton = self._before.skeleton
        checkpoint, prefix = skeleton.checkpoint, skeleton.block_prefix(index)
        readers = {n: t for n, t in taken.items() if t.dimension == 1}
        linears = {f"{prefix}{n}.weight": linear for n, linear in skeleton.linears(index).items()}
        if len(readers) != 1 or not readers.keys() <= linears.keys():
            raise CheckpointError(
                f"{checkpoint.path}: block {index} has {len(readers)} projections that read its "
                f"{CALLED[self._found.kind][0]}, and one is known to be cut"
            )
        ((reader, place),) = readers.items()
        stored = checkpoint.read(reader)
        sums = Accumulator(stored.shape[1], skeleton.device, {"hessian"})
        module = block.get_submodule(linears[reader].module)
        handle = module.register_forward_pre_hook(lambda module, inputs: sums.add(inputs[0]))
        try:
            for step in feed:
                step()
        finally:
            handle.remove()
        statistics = sums.finish()
        if not statistics.finite:
            raise SourceFault(
                f"{prefix.rstrip('.')}: its activations hold NaN or infinity: run quant evaluate"
            )
        hessian = statistics.hessian
        assert hessian is not None
        weight = stored.to(hessian.device).float()
        kept, costs = least_units(weight, hessian, place.segments[0][1], self._stay)
        fitted = made_up_for(weight, hessian, place.places(kept).to(hessian.device))
        return {"kept": kept, "scores": costs, reader: fitted.to(stored.dtype).cpu()}

    def _experts(
        self, block: nn.Module, feed: Sequence[Callable[[], Any]], index: int
    ) -> dict[str, torch.Tensor]:
        """Which experts stay."""
        count, device = self._found.count, self._before.skeleton.device
        modules = {e.path: (block.get_submodule(e.path), e) for e in find_experts(block) if e.count == count}
        if len(modules) != 1:
            raise CheckpointError(
                f"{self._before.skeleton.checkpoint.path}: block {index} has {len(modules)} modules of "
                f"{count} experts, and one is known to be cut"
            )
        sums = torch.zeros(count, dtype=torch.float64, device=device)
        tokens = torch.zeros(count, dtype=torch.float64, device=device)

        def noted(path: str, stage: Stage, routed: Routed) -> None:
            if stage == "down" and path in modules:
                sent = routed.counts.nonzero().squeeze(1).tolist()
                for expert, (pairs, made) in zip(sent, expert_outputs(*modules[path], routed), strict=True):
                    sums[expert] += (made.float().norm(dim=1) * routed.gates[pairs]).double().sum()
                tokens.add_(routed.counts)

        with experts_through(block, noted):
            for step in feed:
                step()
        scores = (sums / tokens.clamp(min=1)).float().cpu()
        return {"kept": best_of_groups(scores, self._stay, self._found.groups), "scores": scores}
