"""How much memory the blocks of a job take while they are quantized, counted from their shapes: what a budget
is decided by before the start, and what ``--dry-run`` says of blocks that are too large to be tried.

Beside a block's weights there are its codes until they are written; of the group of linears whose turn it is,
the sums of its statistics, and what its solve makes of them; and what one batch holds on its way. The
coefficients are those of this code, which ``benchmarks/projections.py`` compares with what jobs took.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from quant.calibration.parts import part_sizes
from quant.models.adapter import InputGroup
from quant.models.experts import find_experts
from quant.models.skeleton import Skeleton
from quant.pipeline.division import waiting_sums
from quant.pipeline.experts import RESIDENT, at_a_time, workers_for
from quant.pipeline.ranks import asked_ranks, ranks_beside
from quant.quantizers.two_sided import blocks_of
from quant.vllm.config import stated, whole_number

if TYPE_CHECKING:
    from quant.pipeline.manager import QuantizationManager

#: Bytes of a weight while it is solved: fp32 with its errors and codes; and with what a method of two sides
#: holds beside them.
SOLVED, SOLVED_TWICE = 9, 40
#: Bytes for each element of a Hessian while the order of its columns is chosen.
ORDERED = 16
#: Fp32 matrices [K, K] that a solve has at once: the Hessian and its factor.
_SQUARES = 2
#: Bytes of a feature while 8-bit products are summed: a run of 8192 tokens as 16-bit numbers and as codes.
_RUN = 3 << 13
#: Hidden states of a token that are there at once while a batch goes through a block: residual, normed, the
#: product's input and output.
_STATES = 4
#: Bytes of a weight of a tensor that is quantized without data; and of the pieces that a worker has of it.
_TENSOR, _PIECES = 4, 16 << 20
#: What allocators keep beside what is asked of them.
_KEPT = 1.05


def block_bytes(manager: QuantizationManager, skeleton: Skeleton, index: int, tokens: int) -> int:
    """Bytes of one block beside the activations that wait: of the device that computes.

    Args:
        tokens: of the largest batch.

    Raises:
        CheckpointError: a block that cannot be run to see which linears share an input.
    """
    plan, block, prefix = manager.plan, skeleton.blocks[index], skeleton.block_prefix(index)
    item, largest, widest = skeleton.dtype.itemsize, 0, 0
    # of several ranks each may have the sums of a block that it is about to solve, beside those under way
    held = summed_bytes(manager, skeleton, index) * min(asked_ranks(plan.recipe), 2)
    experts = bool(find_experts(block))
    for group in skeleton.groups(index):
        members = [x for n in group.linears if (x := plan.linears.get(prefix + n))]
        if not members:
            continue
        k, outputs = members[0].k, [x.n for x in members]
        needs = manager.blocks.solver.needs(plan.assignments[members[0].name])
        if "gradients" in needs:
            for n in outputs:
                largest = max(largest, SOLVED_TWICE * n * k + 8 * k * k, ORDERED * k * k)
            widest = max(widest, k + sum(outputs))
            continue
        together = max(outputs) * 2 if group.experts else sum(outputs)
        once = 1
        if group.experts:
            workers = workers_for(together, k, manager.device)
            each = len(members) // (2 if group.stage == "up" else 1)
            once = min(workers * at_a_time(together, k, manager.device, workers), max(each, 1))
        squares = _SQUARES * 4 * k * k if "hessian" in needs else 0
        run = _RUN * k if squares and manager.device.type == "cpu" and _eight_bits() else 0
        largest = max(largest, once * (SOLVED * together * k + squares) + run)
        widest = max(widest, k + sum(outputs) if not group.experts else k + together)
    whole = sum(p.numel() for p in block.parameters())
    hidden = int(skeleton.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    passing = tokens * item * (_STATES * hidden + 2 * widest)
    aside = 2 * RESIDENT if experts and manager.device.type == "cpu" else 0
    # a batch is on its way while sums are made, or the group is solved
    return int(_KEPT * (whole * (item + 1) + held + largest + passing + aside))


def largest_block(
    manager: QuantizationManager, skeleton: Skeleton, tokens: int, blocks: Iterable[int]
) -> int:
    """:func:`block_bytes` of the largest of some blocks."""
    return max((block_bytes(manager, skeleton, index, tokens) for index in blocks), default=0)


def outside_bytes(skeleton: Skeleton) -> int:
    """Bytes of what lies outside the blocks while it is in memory: embedding, norm and head."""
    inside = {id(p) for block in skeleton.blocks for p in block.parameters()}
    seen = {id(p): p for p in skeleton.model.parameters() if id(p) not in inside}
    return sum(p.numel() * skeleton.dtype.itemsize for p in seen.values())


def waiting_bytes(
    manager: QuantizationManager, skeleton: Skeleton, tokens: int, rows: int, width: int | None = None
) -> int:
    """Bytes that wait at once, wherever, in the rank that has the most of the calibration: the states that a
    part of a block adds to and the widest input of its linears, and the sums of parts that are set aside;
    with gradients the inputs of all blocks and the gradients at the outputs of one.

    Args:
        tokens: of that rank.
        rows: of all ranks.
        width: bytes of a token's hidden states, where they have been seen; None: as the embedding has them.
    """
    hidden = int(skeleton.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    states = tokens * (width or hidden * skeleton.dtype.itemsize)
    parts = -(-len(part_sizes(rows)) // asked_ranks(manager.plan.recipe))
    if manager.plan.gradients:
        sums = max(summed_bytes(manager, skeleton, index) for index in range(skeleton.block_count))
        # on the way back through a block its inputs go as sums of parts come, of which some wait together
        beside = max(done.bit_count() * sums - states * done // parts for done in range(parts))
        return (skeleton.block_count + max(1, manager.draws)) * states + beside
    inputs = (
        linear.k
        for index in range(skeleton.block_count)
        for group in skeleton.groups(index)
        for name in (() if group.experts else group.linears)
        if (linear := manager.plan.linears.get(skeleton.block_prefix(index) + name)) is not None
    )
    widest = tokens * max(inputs, default=hidden) * skeleton.dtype.itemsize
    return states + max(states, widest) + waiting_sums(manager.plan, parts)


def expert_file_bytes(manager: QuantizationManager, skeleton: Skeleton, tokens: int) -> int:
    """Bytes of the files that hold what the experts of a block read and become, beyond what of it stays in
    memory, of all ranks of a machine: each is told what the experts of all read.

    Args:
        tokens: of all ranks.
    """
    if manager.device.type != "cpu":
        return 0
    ranks, most = asked_ranks(manager.plan.recipe), 0
    for index in range(skeleton.block_count):
        layers: dict[str, list[InputGroup]] = {}
        for group in skeleton.groups(index):
            if group.experts:
                layers.setdefault(group.experts, []).append(group)
        counts = {e.path: e.count for e in find_experts(skeleton.blocks[index])} if layers else {}
        made = 0
        for path, groups in layers.items():
            sent = min(stated_active(skeleton.checkpoint.config) or counts[path], counts[path])
            most = max(most, made + _layer_files(manager, skeleton, index, groups, tokens, sent))
            made += sum(_made_files(manager, skeleton, index, group) for group in groups)
    return (ranks_beside(manager.plan.recipe) if ranks > 1 else 1) * most


def _layer_files(
    manager: QuantizationManager,
    skeleton: Skeleton,
    index: int,
    groups: Sequence[InputGroup],
    tokens: int,
    sent: int,
) -> int:
    """:func:`expert_file_bytes` of one layer of a block, whose tokens are sent to ``sent`` experts each."""
    plan, prefix, item = manager.plan, skeleton.block_prefix(index), skeleton.dtype.itemsize
    several = asked_ranks(plan.recipe) > 1
    most = made = before = 0
    for group in groups:
        members = [x for n in group.linears if (x := plan.linears.get(prefix + n))]
        if not members:
            continue
        width = members[0].k
        if plan.gradients:  # inputs and gradients of the tokens, which both products are made of
            read = 0 if before else 2 * width * item
        else:
            read = width * item * (1 if group.stage == "up" else sent)
        batch = read * min(tokens, manager.workspace.batch_tokens)
        rows, new = _beyond(read * tokens, batch), _made_files(manager, skeleton, index, group)
        # until all ranks have told theirs
        own = _beyond(read * tokens // asked_ranks(plan.recipe), batch) if several else 0
        most = max(most, before + made + rows + max(new, own))
        made += new
        if plan.gradients or plan.recipe.moe_calibration == "all":
            before += rows
    return most


def _made_files(manager: QuantizationManager, skeleton: Skeleton, index: int, group: InputGroup) -> int:
    """Bytes of the codes and scales of a group of experts that are on files until the block is written."""
    plan, prefix = manager.plan, skeleton.block_prefix(index)
    size = each = 0
    for name in group.linears:
        if (linear := plan.linears.get(prefix + name)) is not None:
            weights = plan.assignments[linear.name].scheme.weights
            numbers = linear.n * weights.groups(linear.k)
            each = linear.n * linear.k
            size += each + numbers * ((4 if weights.scales == "F32" else 2) + (not weights.symmetric))
    return _beyond(size, each)


def _beyond(size: int, each: int) -> int:
    """Bytes that memory is not meant for, of things of ``each`` so many."""
    return max(size - RESIDENT // max(each, 1) * each, 0)


def stated_active(config: Mapping[str, Any]) -> int | None:
    """Experts that a token is sent to, as config.json states it."""
    return whole_number(stated(config, "active"))


def summed_bytes(manager: QuantizationManager, skeleton: Skeleton, index: int) -> int:
    """Bytes of the sums of one block's linears that take gradients, of which experts have none at once."""
    plan, prefix, held = manager.plan, skeleton.block_prefix(index), 0
    for group in skeleton.groups(index):
        for name in () if group.experts else group.linears:
            if (linear := plan.linears.get(prefix + name)) is None:
                continue
            assignment, solver = plan.assignments[prefix + name], manager.blocks.solver
            if "gradients" in solver.needs(assignment):
                count, size = blocks_of(linear.n, solver.outputs(assignment))
                held += 4 * (linear.k**2 + count * size**2)
    return held


def tensor_bytes(sizes: Iterable[int], workers: int) -> int:
    """Bytes of a job without data beside the program: of the largest tensors that are worked on at once, each
    by a worker: as they are, as codes, and packed.

    Args:
        sizes: weights of each.
    """
    most = sorted(sizes)[-workers:]
    return sum(_TENSOR * n for n in most) + _PIECES * workers


def _eight_bits() -> bool:
    return torch.cpu._is_vnni_supported()
