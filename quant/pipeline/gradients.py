"""A backward pass through the whole model, one block in memory at a time.

The full-precision model runs forward block by block, and each block's inputs are set aside. At the logits a
gradient is drawn whose covariance is the Hessian of the KL divergence there, in slices of tokens. Then come
the blocks from the last to the first: each runs again from the inputs it had, this time with what autograd
needs, and takes the gradient at its outputs to one at its inputs, which is that at the outputs of the block
before. On the way every linear's inputs and the gradients at its outputs are summed
(:class:`~quant.calibration.statistics.GradientAccumulator`).

Nothing of these passes depends on what the blocks are quantized to. So a job that goes on with unfinished
work makes the same pass again, without sums for the blocks that are finished.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from quant.calibration.parts import PartSums
from quant.calibration.statistics import Accumulator, GradientAccumulator, Statistics
from quant.errors import CheckpointError, QuantError, SourceFault, first_line
from quant.models.binding import BlockLinear
from quant.models.calls import BlockCall, call_block
from quant.models.experts import Routed, Stage, experts_through
from quant.models.products import linears_widened
from quant.models.skeleton import Skeleton
from quant.pipeline.activation_store import ActivationStore, Batches, Calls
from quant.pipeline.expert_gradients import ExpertGradients
from quant.pipeline.expert_solves import ERROR_TOKENS
from quant.pipeline.scratch import ScratchFiles
from quant.pipeline.staged import computed
from quant.quantizers.two_sided import OUTPUTS, blocks_of
from quant.tensors import all_finite

#: Elements of a model's logits that are in memory at a time, in fp32.
LOGITS = 1 << 24
#: What the seed of a row's next draw has more: beyond the number of any row, within the 32 bits of a seed
#: that count on a CPU.
_NEXT_DRAW = 1 << 20
#: Tokens that a block is tried on.
_TRIAL_TOKENS = 8
#: Tokens whose gradients at the logits are timed first, how many times as many next, and the seconds within
#: which more are: a few tokens of a large vocabulary take a CPU as long as thousands take a GPU.
_FIRST_TIMED, _MORE_TIMED, _TIMED = 8, 4, 2.0


def kl_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A draw fp32 [..., V] of mean zero whose covariance at each token is diag(p) - p pᵀ with p the softmax
    of the logits [..., V]: the Hessian by the logits of the KL divergence to them. No label is needed, and a
    draw has a lighter tail than p less a sampled token."""
    p = torch.softmax(logits.float(), -1)
    noise = torch.randn(p.shape, generator=generator, device=p.device).mul_(p.sqrt())
    return noise.sub_(p.mul_(noise.sum(-1, keepdim=True)))


@dataclass
class Seen:
    """What a pass through a block shows of its linears.

    Attributes:
        linears: by name inside the block, those that are summed, with what is asked of each.
        experts: modules inside the block whose routed experts are kept.
        files: hold what experts read that is too much for memory.
        outputs: by name, the outputs of a block of H_O at the most, where that is not the usual number.
        parts: how many parts all rows make; ``part``: the one of the batch under way.
        aside: takes what waits, as :class:`~quant.calibration.parts.PartSums` has it.
        sums: of each linear.
        samples: inputs [≤ 256, K] of each on the held-out row.
        routed, held_out: by module, what its experts read, and of it the held-out row's.
    """

    linears: Mapping[str, tuple[BlockLinear, frozenset[str]]]
    experts: Collection[str] = ()
    files: ScratchFiles = field(default_factory=ScratchFiles)
    outputs: Mapping[str, int] = field(default_factory=dict)
    parts: int = 1
    aside: Callable[[torch.Tensor], Callable[[], None]] | None = None
    part: int = 0
    sums: dict[str, PartSums[Any]] = field(default_factory=dict)
    samples: dict[str, torch.Tensor] = field(default_factory=dict)
    routed: dict[str, ExpertGradients] = field(default_factory=dict)
    held_out: dict[str, ExpertGradients] = field(default_factory=dict)
    _sent: dict[str, Routed] = field(default_factory=dict)

    @contextmanager
    def watching(self, block: nn.Module, held_out: bool) -> Iterator[None]:
        """While it lasts, what goes through the block is taken in."""
        take = self._take_sample if held_out else self._take
        handles = [
            block.get_submodule(linear.module).register_forward_hook(partial(take, name))
            for name, (linear, _) in self.linears.items()
        ]
        take_routed = self._take_routed_sample if held_out else self._take_routed
        handles += [
            block.get_submodule(path).register_forward_hook(partial(take_routed, path))
            for path in self.experts
        ]
        try:
            with linears_widened(block), experts_through(block, self._stop):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _stop(self, path: str, stage: Stage, routed: Routed) -> None:
        if stage == "up" and path in self.experts:
            self._sent[path] = replace(routed, rows=routed.rows.detach(), gates=routed.gates.detach())

    def _take_routed_sample(
        self, path: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> None:
        self.held_out.setdefault(path, ExpertGradients(self.files)).add(self._sent.pop(path))

    def _take_routed(self, path: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        sent = self._sent.pop(path)

        first = True

        def arrived(gradient: torch.Tensor) -> None:
            nonlocal first
            if first:  # what experts read would be kept once more for each other draw
                kept = self.routed.setdefault(path, ExpertGradients(self.files))
                kept.add_both(sent, gradient.reshape(-1, gradient.shape[-1]))
            first = False

        output.register_hook(arrived)

    def _take_sample(self, name: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        x = args[0]
        self.samples[name] = x.reshape(-1, x.shape[-1])[-ERROR_TOKENS:].clone()

    def _take(self, name: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        linear, needs = self.linears[name]
        inputs, place = args[0].detach(), linear.place
        if "gradients" not in needs or not output.requires_grad:  # as of what only chooses among tokens
            if name not in self.sums:
                shape = inputs.shape[-1], inputs.device
                alone = partial(Accumulator, *shape, needs - {"gradients"}, self.parts)
                self.sums[name] = PartSums(alone, self.aside)
            self.sums[name].add(self.part, inputs)
            return

        first = True

        def arrived(gradient: torch.Tensor) -> None:
            nonlocal first
            if place is not None and place.count:
                end = place.first + place.step * place.count
                gradient = gradient[..., place.first : end : place.step]
            if name not in self.sums:
                outputs = gradient.shape[-1]
                blocks = blocks_of(outputs, self.outputs.get(name, OUTPUTS))
                sizes = inputs.shape[-1], outputs, blocks, inputs.device
                self.sums[name] = PartSums(
                    partial(GradientAccumulator, *sizes, needs, self.parts), self.aside
                )
            with torch.no_grad():
                self.sums[name].add(self.part, inputs, gradient, first)
            first = False

        output.register_hook(arrived)

    def finish(self) -> dict[str, Statistics]:
        """The statistics of each linear; the sums are handed over."""
        made = {name: sums.finish() for name, sums in self.sums.items()}
        self.sums.clear()
        return made

    def release(self) -> None:
        """Frees what is kept of experts."""
        for kept in (*self.routed.values(), *self.held_out.values()):
            kept.release()
        self.routed.clear()
        self.held_out.clear()


class GradientStream:
    """The pass: :meth:`forward`, then :meth:`backward` for each block from the last to the first.

    Args:
        tokens: int64 [B, T], batch by batch.
        held_out: the batch that no gradient is taken of, or None.
        seed: of the draws at the logits, to which each row adds its number.
        draws: gradients that are drawn at the logits for each row. All go through a block behind one another,
            which runs forward once for them.
        of: which part of all rows each batch is of; None: all of one.
        before: rows of other ranks that come before these.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Sequence[torch.Tensor],
        held_out: int | None,
        store: ActivationStore,
        seed: int,
        draws: int = 1,
        of: Sequence[int] | None = None,
        before: int = 0,
    ):
        self._of, self._before = of, before
        self._skeleton, self._tokens, self._held_out = skeleton, tokens, held_out
        self._store, self._seed, self._draws = store, seed, draws
        self._calls = Calls(store)
        self._inputs = [Batches(store, skeleton.embedded(tokens, self._calls.append))]
        self._gradients: Batches | None = None
        first = self._inputs[0].copy(0)
        self._width = first.nbytes // max(tokens[0].numel(), 1)

    def forward(
        self, index: int, block: nn.Module, observing: AbstractContextManager[None] | None = None
    ) -> None:
        """Takes all batches through block ``index``, ``observing`` what goes on in it, and keeps what they
        were before."""
        inputs = self._inputs[-1]

        def outputs() -> Iterator[torch.Tensor]:
            with torch.no_grad(), computed(block), observing or nullcontext():
                for batch in range(len(inputs)):
                    hidden, call = inputs.take(batch), self._calls.take(batch, index)
                    output = call_block(block, hidden, call)
                    if not all_finite(output):
                        raise SourceFault(
                            f"{self._where(index)}: its outputs hold NaN or infinity on calibration tokens: "
                            "the model overflows or its weights or config.json are damaged: run quant "
                            "evaluate on the source; --method minmax needs no text"
                        )
                    # a block that is passed by gives what it was given
                    yield output.clone() if output is hidden else output
                    inputs.put(batch, hidden)
                    self._calls.put(batch, index)

        self._inputs.append(Batches(self._store, outputs()))

    def _where(self, index: int) -> str:
        return self._skeleton.block_prefix(index).rstrip(".")

    def at_logits(self) -> None:
        """Draws the gradients at the last block's outputs."""
        outputs, skeleton = self._inputs.pop(), self._skeleton
        first = [*accumulate(map(len, self._tokens), initial=self._before)]
        with skeleton.outside():
            drawn = (
                self._drawn(self._tokens[batch], outputs.take(batch), first[batch])
                for batch in range(len(outputs))
                if batch != self._held_out
            )
            self._gradients = Batches(self._store, drawn)
            if self._held_out is not None:
                outputs.take(self._held_out)

    @property
    def _slice(self) -> int:
        """Tokens of a row whose logits are in memory at a time."""
        return max(1, LOGITS // self._skeleton.vocabulary)

    def _drawn(self, tokens: torch.Tensor, hidden: torch.Tensor, first: int) -> torch.Tensor:
        """The gradients [D · B, T, H], one draw behind the other, of a batch whose first row has the number
        ``first``. Rows are drawn one by one, each with its own seed: batches of another size, as after a lack
        of memory, get the same."""
        gradient = torch.cat(
            [
                self._of_row(tokens[i, None], hidden[i, None], first + i + _NEXT_DRAW * draw)
                for draw in range(self._draws)
                for i in range(len(tokens))
            ]
        )
        _demand_finite(gradient, "the head")
        return gradient

    def _of_row(self, tokens: torch.Tensor, hidden: torch.Tensor, number: int) -> torch.Tensor:
        generator = torch.Generator(self._skeleton.device).manual_seed((self._seed + number) % 2**63)
        draw = partial(kl_gradient, generator=generator)
        parts = [
            self._skeleton.head_gradient(some, states.contiguous(), draw)
            for some, states in zip(tokens.split(self._slice, 1), hidden.split(self._slice, 1), strict=True)
        ]
        return torch.cat(parts, 1)

    @property
    def width(self) -> int:
        """Bytes of a token's hidden states."""
        return self._width

    def time_logits(self) -> float:
        """Seconds that a token's gradient at the logits takes, on a trial of a few tokens, then of more, up
        to a slice, while that takes no longer than :data:`_TIMED`; call it inside
        :meth:`Skeleton.outside`."""
        row, hidden = self._tokens[0][:1], self._inputs[0].take(0)
        most = min(self._slice, row.shape[1])
        several, seconds, loaded = min(_FIRST_TIMED, most), 0.0, False
        while True:
            part = hidden[:1, :several].contiguous()
            start = time.perf_counter()
            self._drawn(row[:, :several], part, 0)
            seconds = time.perf_counter() - start
            if loaded and (several == most or seconds * _MORE_TIMED > _TIMED):
                break
            # of the first time kernels are loaded
            several, loaded = (min(several * _MORE_TIMED, most) if loaded else several), True
        self._inputs[0].put(0, hidden)
        return seconds / several

    def drop_outputs(self) -> None:
        """Takes the outputs of a block that is tried for gradients at its outputs: another block can be tried
        on the same tokens then."""
        outputs, draws = self._inputs.pop(), self._draws
        repeated = (outputs.take(batch).repeat(draws, 1, 1) for batch in range(len(outputs)))
        self._gradients = Batches(self._store, repeated)
        inputs = self._inputs[-1]
        copies = Batches(self._store, (inputs.copy(batch) for batch in range(len(inputs))))
        self._inputs.append(copies)

    def backward(self, index: int, block: nn.Module, seen: Seen | None) -> None:
        """Takes the gradients at the outputs of block ``index`` to its inputs; what its linears show goes
        into ``seen``.

        Raises:
            QuantError: gradients that are not finite.
        """
        inputs, gradients = self._inputs.pop(), self._gradients
        assert gradients is not None
        number = 0
        for batch in range(len(inputs)):
            hidden, call = inputs.take(batch), self._calls.take(batch, index)
            if batch == self._held_out:
                if seen is not None:
                    with torch.no_grad(), seen.watching(block, True):
                        call_block(block, hidden, call)
            else:
                gradient = gradients.take(number)
                if seen is not None and self._of is not None:
                    seen.part = self._of[batch]
                made = _through(block, hidden, call, gradient, seen)
                _demand_finite(made, self._where(index))
                gradients.put(number, made)
                number += 1
            self._calls.put(batch, index)


def _through(
    block: nn.Module, hidden: torch.Tensor, call: BlockCall, gradient: torch.Tensor, seen: Seen | None
) -> torch.Tensor:
    """The gradients [D · B, T, H] at a block's inputs ``hidden`` [B, T, H] of D draws at its outputs,
    which lie behind one another as they do."""
    if not call.runs:
        return gradient
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        # whoever looks, experts are computed in one way: a job that goes on gets the same bytes
        with (seen or Seen({})).watching(block, False):
            output = call_block(block, leaf, call)
    made: list[torch.Tensor] = []
    draws = gradient.split(len(leaf))
    with ordered_sums(leaf.device):
        for number, draw in enumerate(draws):
            made += torch.autograd.grad(output, leaf, draw, retain_graph=number + 1 < len(draws))
    return torch.cat(made) if len(made) > 1 else made[0]


@contextmanager
def ordered_sums(device: torch.device) -> Iterator[None]:
    """While it lasts, a GPU adds in the same order every time, as far as its kernels can: the backward pass
    of attention would not, and a job that goes on would get other bytes."""
    if device.type == "cpu":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that cannot
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _demand_finite(gradient: torch.Tensor, where: str) -> None:
    if not all_finite(gradient):
        raise QuantError(
            f"{where}: the gradients at its inputs hold NaN or infinity: the model overflows in "
            f"{str(gradient.dtype).removeprefix('torch.')} on this text, or its weights are damaged: run "
            "quant evaluate on the source; --method gptq needs no gradients"
        )


def gradient_problem(skeleton: Skeleton, shown: Callable[[int], Seen]) -> str | None:
    """Why no gradients can be taken through a model's blocks, or None. One block of each kind is tried on a
    few tokens.

    Args:
        shown: of each block what the pass has to show.
    """
    count = min(_TRIAL_TOKENS, skeleton.vocabulary)
    hidden, calls = skeleton.probe(range(count))
    tried = set()
    for index in range(skeleton.block_count):
        kind = skeleton.layout(index)
        call = calls[index]
        if kind in tried or not call.runs:
            continue
        tried.add(kind)
        where = skeleton.block_prefix(index).rstrip(".")
        if call.state:
            return (
                f"{where} reads what earlier blocks leave for it, and a gradient would have to go there too"
            )
        seen, block = shown(index), skeleton.load_block(index)
        try:
            made = _through(block, hidden, call, torch.ones_like(hidden), seen)
            missing = sorted({*seen.linears, *seen.experts} - {*seen.sums, *seen.routed})
            if missing:
                return f"no gradient reaches {where}.{missing[0]}"
            if not all_finite(made):
                return f"the gradients at the inputs of {where} are not finite"
        except (CheckpointError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a foreign model's code raises
            return f"no gradient can be taken through {where} ({first_line(error, 200)})"
        finally:
            seen.release()
            skeleton.free_block(index)
    return None
