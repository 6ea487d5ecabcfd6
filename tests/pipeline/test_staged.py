"""The staged pass equals running the block afterwards with the new weights, whatever is set aside, and leaves
nothing behind when it fails."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quant.checkpoint.reader import open_checkpoint
from quant.errors import QuantError
from quant.models.adapter import InputGroup
from quant.models.calls import BlockCall, call_block
from quant.models.skeleton import Skeleton
from quant.pipeline.activation_store import ActivationStore, Batches, Calls
from quant.pipeline.staged import StagedForward, run_block
from tests.helpers import FAMILIES

CPU = torch.device("cpu")
BATCHES = [
    torch.randint(2, 4096, (rows, 24), generator=torch.Generator().manual_seed(rows)) for rows in (3, 3, 2, 1)
]
TINY, PLENTY = 1000, 1 << 30


def run_staged(
    folder: Path, store: ActivationStore, need_outputs: bool = True
) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]], nn.Module]:
    """Runs block 0 with every weight changed at its stage; returns outputs, what each group saw, and the
    block."""
    skeleton = Skeleton(open_checkpoint(folder), CPU)
    hidden, calls = skeleton.embed(BATCHES)
    batches = Batches(store, hidden)
    block, groups = skeleton.load_block(0), skeleton.groups(0)
    seen: dict[str, list[torch.Tensor]] = {}
    staged = StagedForward(
        block,
        0,
        groups,
        batches,
        Calls(store, calls),
        store,
        lambda g, i, x: seen.setdefault(g.linears[0], []).append(x.clone()),
        need_outputs,
    )
    staged.look_ahead()
    assert not seen  # nothing is observed
    order = []
    for group in staged.stages():
        order.append(group)
        for name in group.linears:
            module = block.get_submodule(name)
            module.weight = nn.Parameter((module.weight * 0.75).to(module.weight.dtype), requires_grad=False)  # type: ignore[operator,union-attr]
    assert order == list(groups)
    return ([batches.take(i) for i in range(len(BATCHES))] if need_outputs else []), seen, block


def run_plainly(folder: Path, block: nn.Module) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
    """The same block, as the staged pass left its weights, run batch by batch with hooks on its linears."""
    skeleton = Skeleton(open_checkpoint(folder), CPU)
    hidden, calls = skeleton.embed(BATCHES)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        block.get_submodule(g.linears[0]).register_forward_pre_hook(
            lambda m, a, n=g.linears[0]: seen.setdefault(n, []).append(a[0].clone())
        )
        for g in skeleton.groups(0)
    ]
    with torch.no_grad():
        outputs = [call_block(block, h, c[0]) for h, c in zip(hidden, calls, strict=True)]
    for handle in handles:
        handle.remove()
    return outputs, seen


@pytest.mark.parametrize("kind", [*FAMILIES, "stablelm", "cohere"])
@pytest.mark.parametrize("resident", [PLENTY, TINY], ids=["in memory", "spilled"])
def test_outputs_and_inputs_equal_the_block_run_afterwards_with_its_new_weights(
    kind: str, resident: int, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    store = ActivationStore(resident, tmp_path / "scratch")
    outputs, seen, block = run_staged(checkpoints(kind), store)
    wanted, seen_plainly = run_plainly(checkpoints(kind), block)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    assert seen.keys() == seen_plainly.keys()
    # a linear's input is what it will really see: earlier linears of the block are the new ones
    for name in seen:
        assert all(torch.equal(a, b) for a, b in zip(seen[name], seen_plainly[name], strict=True))
    assert (tmp_path / "scratch").exists() == (resident == TINY)
    store.close()
    assert not (tmp_path / "scratch").exists()


def test_the_last_block_stops_behind_its_last_linear(llama: Path, tmp_path: Path) -> None:
    store = ActivationStore(TINY, tmp_path / "scratch")
    _, seen, block = run_staged(llama, store, need_outputs=False)
    assert len(seen) == 4 and all(len(batches) == len(BATCHES) for batches in seen.values())
    assert unpatched(block)
    store.close()


def unpatched(block: nn.Module) -> bool:
    return all(type(m.forward).__name__ == "method" for m in block.modules())


class Block(nn.Module):
    """Two linears in a row, with something between them that a test may change."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(hidden))) + hidden


def staged_over(
    block: nn.Module,
    tmp_path: Path,
    linears: tuple[str, ...] = ("first", "second"),
    resident: int = TINY,
    count: int = 3,
) -> Any:
    store = ActivationStore(resident, tmp_path / "scratch")
    batches = Batches(store, [torch.full((1, 5, 4), float(i)) for i in range(count)])
    groups = [InputGroup((name,), "") for name in linears]
    return (
        StagedForward(
            block, 0, groups, batches, Calls(store, [[BlockCall()]] * count), store, lambda *a: None
        ),
        batches,
        store,
    )


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_inside_the_block_comes_out_and_leaves_no_forward_replaced(
    failing: int, tmp_path: Path
) -> None:
    calls = []

    def between(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == failing + 1:
            raise RuntimeError("the block broke")
        return x

    block = Block(between)
    staged, _, store = staged_over(block, tmp_path)
    with pytest.raises(RuntimeError, match="the block broke"):
        list(staged.stages())
    assert unpatched(block)
    store.close()
    assert torch.equal(block(torch.ones(1, 2, 4)), Block.forward(block, torch.ones(1, 2, 4)))


def test_stopping_between_stages_ends_all_batches_and_restores_the_block(tmp_path: Path) -> None:
    """A batch that waits ends where it is, and what it holds is freed."""
    ended = []

    class Ending(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(hidden)
            finally:
                ended.append(1)

    block = Ending()
    staged, _, _ = staged_over(block, tmp_path, count=2)
    stages = staged.stages()
    next(stages)
    stages.close()
    assert unpatched(block) and ended == [1, 1]


def test_an_error_of_the_caller_between_stages_restores_the_block(tmp_path: Path) -> None:
    block = Block()
    staged, _, _ = staged_over(block, tmp_path)
    with pytest.raises(ZeroDivisionError):
        for _ in staged.stages():
            raise ZeroDivisionError
    del staged
    import gc

    gc.collect()
    assert unpatched(block)


def test_linears_that_never_run_are_an_error_that_names_them(tmp_path: Path) -> None:
    staged, _, _ = staged_over(Block(), tmp_path, ("first", "second", "unused"))
    with pytest.raises(
        QuantError,
        match="the block's forward pass never used unused: the model's adapter names linears that do not run",
    ):
        list(staged.stages())


def test_batches_that_take_different_paths_are_an_error(tmp_path: Path) -> None:
    class Choosing(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.first(hidden) if float(hidden.mean()) > 0.5 else self.second(hidden)

    block = Choosing()
    staged, _, _ = staged_over(block, tmp_path)
    with pytest.raises(QuantError, match="batches reach the block's linears in different orders"):
        list(staged.stages())
    assert unpatched(block)


def test_a_block_that_returns_a_tuple_gives_its_first_value(tmp_path: Path) -> None:
    class Tuple(Block):
        def forward(self, hidden: torch.Tensor) -> Any:
            return super().forward(hidden), "attention"

    block = Tuple()
    staged, batches, _ = staged_over(block, tmp_path, resident=PLENTY)
    inputs = [torch.full((1, 5, 4), float(i)) for i in range(3)]
    assert len(list(staged.stages())) == 2
    with torch.no_grad():
        assert all(torch.equal(batches.take(i), Block.forward(block, x)) for i, x in enumerate(inputs))


class ByGroups(nn.Linear):
    """A linear of groups, as DeepSeek-V4's: its input has a dimension of them, its weight all their rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 2, self.in_features).transpose(0, 1)
        made = torch.bmm(rows, self.weight.view(2, -1, self.in_features).transpose(1, 2))
        return made.transpose(0, 1).reshape(*x.shape[:-1], -1)


def test_a_linear_that_does_not_go_token_by_token_is_looked_at_whole(tmp_path: Path) -> None:
    class Grouped(Block):
        def __init__(self) -> None:
            super().__init__()
            self.first = ByGroups(2, 4, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(hidden.unflatten(-1, (2, 2))).flatten(-2)) + hidden

    block = Grouped()
    staged, batches, _ = staged_over(block, tmp_path, resident=PLENTY)
    inputs = [torch.full((1, 5, 4), float(i)) for i in range(3)]
    staged.look_ahead()
    assert len(list(staged.stages())) == 2
    with torch.no_grad():
        assert all(torch.equal(batches.take(i), block(x)) for i, x in enumerate(inputs))


def test_run_block_replaces_every_batch_by_the_blocks_output(tmp_path: Path) -> None:
    block = Block()
    store = ActivationStore(TINY, tmp_path / "scratch")
    batches = Batches(store, [torch.full((1, 500, 4), float(i)) for i in range(3)])
    run_block(block, 0, batches, Calls(store, [[BlockCall()]] * 3))
    with torch.no_grad():
        assert all(torch.equal(batches.take(i), block(torch.full((1, 500, 4), float(i)))) for i in range(3))
    store.close()


def watched(store: ActivationStore) -> list[int]:
    """Bytes of each tensor that the store is given from now on."""
    stored: list[int] = []
    put = store.put

    def noting(tensor: torch.Tensor) -> Callable[[], None]:
        stored.append(tensor.untyped_storage().nbytes())
        return put(tensor)

    store.put = noting  # type: ignore[method-assign]
    return stored


def test_what_the_code_names_but_reads_no_more_is_not_kept(llama: Path, tmp_path: Path) -> None:
    """At the output projection: queries, keys, values and the first norm's output; at the down projection:
    the second norm's output."""
    store = ActivationStore(0, tmp_path / "scratch")
    stored = watched(store)
    skeleton = Skeleton(open_checkpoint(llama), CPU)
    tokens = torch.randint(2, 4096, (2, 24))
    hidden, calls = skeleton.embed([tokens])
    batches = Batches(store, hidden)
    block = skeleton.load_block(0)
    staged = StagedForward(block, 0, skeleton.groups(0), batches, Calls(store, calls), store, lambda *a: None)
    staged.look_ahead()
    config, counts = open_checkpoint(llama).config, []
    size = tokens.numel() * hidden[0].element_size()
    stored.clear()
    for _ in staged.stages():
        counts.append(sum(stored) // size)
        stored.clear()
    store.close()
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * (config.get("head_dim") or width // config["num_attention_heads"])
    # with the residual: a norm's output, attention's, a norm's, the activation's
    assert counts == [2 * width, width + heads, 2 * width, width + inner]


def test_a_tensor_that_only_some_batches_read_is_noticed(tmp_path: Path) -> None:
    class Choosing(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            early = self.norm(hidden + 1)
            large = float(hidden.sum()) > 25  # true of the larger batch only
            late = self.second(self.first(hidden))
            return late + early if large else late

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()

    block = Choosing()
    store = ActivationStore(TINY, tmp_path / "scratch")
    batches = Batches(store, [torch.ones(1, 5, 4), torch.ones(2, 5, 4)])
    groups = [InputGroup((name,), "") for name in ("first", "second")]
    staged = StagedForward(
        block, 0, groups, batches, Calls(store, [[BlockCall()]] * 2), store, lambda *a: None
    )
    staged.look_ahead()
    list(staged.stages())
    assert torch.isfinite(batches.take(0)).all() and torch.isnan(batches.take(1)).all()
    store.close()


def test_batches_that_stop_for_good_keep_nothing(tmp_path: Path) -> None:
    store = ActivationStore(0, tmp_path / "scratch")
    batches = Batches(store, [torch.ones(1, 500, 4)])
    groups = [InputGroup((name,), "") for name in ("first", "second")]
    staged = StagedForward(
        Block(), 0, groups, batches, Calls(store, [[BlockCall()]]), store, lambda *a: None, need_outputs=False
    )
    stored = watched(store)
    stages = staged.stages()
    next(stages)
    assert stored == [8000]  # the input, which the residual is too
    next(stages)
    assert stored == [8000] and not list(stages)
    store.close()


@pytest.mark.parametrize("kind", FAMILIES)
def test_waiting_batches_hold_no_activations(
    kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Neither what linears and norms are given, nor what the model's code keeps in its locals: residuals,
    queries, keys, values."""
    skeleton = Skeleton(open_checkpoint(checkpoints(kind)), CPU)
    store = ActivationStore(0, tmp_path / "scratch")
    calls = Calls(store)
    size = 7
    tokens = [
        torch.randint(2, 4096, (size, 24), generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]
    batches = Batches(store, skeleton.embedded(tokens, calls.append))
    block = skeleton.load_block(0)
    staged = StagedForward(block, 0, skeleton.groups(0), batches, calls, store, lambda *a: None)
    for group in staged.stages():
        held = [
            t.shape
            for t in gc.get_objects()
            if type(t) is torch.Tensor
            and t.is_floating_point()
            and t.shape[:1] == (size,)
            and t.untyped_storage().nbytes()
            if t.shape[1:] != (1, 24, 24)  # that is a mask, which all batches share
        ]
        assert not held, (group.linears, held)
    store.close()
