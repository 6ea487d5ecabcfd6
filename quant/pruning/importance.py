"""What each decoder block of a model counts for, measured on text, one block in memory at a time.

Two measures: ``kl``, what the model's distribution of the next token moves by when the block is left out,
which is what is wanted of a smaller model, and takes half as many passes as there are blocks; and ``angle``,
by how much the block turns the hidden states, arccos(x·y / ‖x‖‖y‖) / π of its input x and output y (Gromov et
al. 2024, arXiv:2403.17887; Men et al. 2024, arXiv:2403.03853, take the cosine), which takes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch

from quant import defaults
from quant.errors import CheckpointError, SourceFault
from quant.evaluation.quality import Runner, columns_of, compared
from quant.models.calls import BlockCall, call_block
from quant.pipeline.activation_store import ActivationStore, Batches
from quant.progress import Event, Progress
from quant.tensors import all_finite

#: Tokens of a batch.
_BATCH_TOKENS = 4096


def block_angles(
    runner: Runner, rows: torch.Tensor, kept: Sequence[int], store: ActivationStore, progress: Progress
) -> dict[int, float]:
    """By block among ``kept``, the mean angle between its inputs and outputs on rows of tokens int64 [R, T],
    in half turns: 0 of a block that changes nothing, ½ of one whose outputs are at right angles to its
    inputs."""
    hidden, calls = embedded(runner, split_rows(rows))
    states, angles = Batches(store, hidden), {}
    for number, index in enumerate(kept):
        progress(Event("importance", number, len(kept), detail=f"block {index}"))
        turned, tokens = 0.0, 0

        def noted(before: torch.Tensor, after: torch.Tensor) -> None:
            nonlocal turned, tokens
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            turned += float(cosine.clamp(-1, 1).arccos().double().sum()) / math.pi
            tokens += cosine.numel()

        through(runner, index, [states], calls, noted)
        angles[index] = turned / tokens
    progress(Event("importance", len(kept), len(kept)))
    return angles


def block_losses(
    runner: Runner, rows: torch.Tensor, kept: Sequence[int], store: ActivationStore, progress: Progress
) -> dict[int, float]:
    """By block among ``kept``, the mean KL divergence, in nats per token on rows of tokens int64 [R, T], from
    the whole model to the one with ``kept`` less that block.

    All these models go through the blocks together, so that each block is read once: what a block gets has as
    many versions as blocks before it could be missing.
    """
    batches = split_rows(rows)
    hidden, calls = embedded(runner, batches)
    count = runner.skeleton.block_count
    whole = Batches(store, hidden)
    trunk = whole if len(kept) == count else copied(whole, store)
    without: dict[int, Batches] = {}
    for index in range(count):
        progress(Event("importance", index, count, detail=f"block {index}, {len(without) + 1} times"))
        if index not in kept:
            through(runner, index, [whole], calls)
            continue
        missing = copied(trunk, store)
        both = [whole] if trunk is whole else [whole, trunk]
        through(runner, index, [*both, *without.values()], calls)
        without[index] = missing
    progress(Event("importance", count, count))
    return divergences(runner, batches, whole, without, progress)


def divergences(
    runner: Runner,
    batches: Sequence[torch.Tensor],
    whole: Batches,
    without: Mapping[int, Batches],
    progress: Progress,
) -> dict[int, float]:
    """Mean KL in nats per token from what the ``whole`` model gives to what each other gives, of the states
    behind the last block."""
    sums = dict.fromkeys(without, 0.0)
    tokens, device = 0, runner.skeleton.device
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(runner.skeleton.outside())
        first = whole.copy(0)
        ranges = columns_of([runner], batches[0], [first])
        for number, batch in enumerate(batches):
            reference = whole.take(number)[..., :-1, :]
            for done, (index, states) in enumerate(without.items()):
                progress(
                    Event("importance at the logits", number * len(sums) + done, len(batches) * len(sums))
                )
                own = states.take(number)[..., :-1, :]
                found = compared([runner, runner], batch, [own, reference], ranges, None, device)
                assert found.kl is not None
                sums[index] += float(found.kl.double().sum())
            tokens += batch[:, 1:].numel()
    return {index: total / tokens for index, total in sums.items()}


def split_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows of tokens [R, T] in batches of a few thousand."""
    return list(rows.split(max(1, _BATCH_TOKENS // rows.shape[1])))


def embedded(
    runner: Runner, batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[list[BlockCall]]]:
    """The states before the blocks by batch, and the calls of all blocks.

    Raises:
        CheckpointError: blocks read what earlier ones leave for them.
    """
    hidden, calls = runner.skeleton.embed(batches)
    if any(call.state for one in calls for call in one):
        raise CheckpointError(
            f"{runner.skeleton.checkpoint.path}: its blocks read what earlier ones leave for them, so none "
            "can be pruned"
        )
    return hidden, calls


def copied(states: Batches, store: ActivationStore) -> Batches:
    """The same states once more."""
    return Batches(store, (states.copy(batch) for batch in range(len(states))))


def through(
    runner: Runner,
    index: int,
    streams: Sequence[Batches],
    calls: Sequence[Sequence[BlockCall]],
    noted: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> None:
    """Takes all streams of states through block ``index``; ``noted`` is told each batch's states before and
    behind it."""
    skeleton = runner.skeleton
    block = skeleton.load_block(index)
    with torch.no_grad():
        for states in streams:
            for batch in range(len(states)):
                before = states.take(batch)
                after = call_block(block, before, calls[batch][index])
                if not all_finite(after):
                    raise SourceFault(
                        f"{skeleton.block_prefix(index).rstrip('.')}: its outputs hold NaN or infinity: the "
                        "model overflows without a block before it, or its weights are damaged: run quant "
                        "evaluate on the source"
                    )
                if noted is not None:
                    noted(before, after)
                states.put(batch, after.clone() if after is before else after)
    skeleton.free_block(index)


#: By its name, what measures blocks.
MEASURE = dict(zip(defaults.IMPORTANCES, (block_losses, block_angles), strict=True))
