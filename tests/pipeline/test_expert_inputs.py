"""What the experts of a layer read: kept whole wherever it lies, and blended with what their layer reads."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from quant.errors import DiskFull
from quant.models.experts import Experts, Routed
from quant.pipeline import experts as module
from quant.pipeline.experts import (
    PRIOR,
    Aside,
    Calibration,
    ExpertInputs,
    expert_statistics,
    in_chunks,
    layer_statistics,
    workers_for,
)
from quant.pipeline.scratch import ScratchFiles
from quant.threads import side_by_side

FEATURES = 16
NEEDS = frozenset({"hessian", "range"})
LAYER = Experts("experts", 3, ("gate_proj", "up_proj"), False, False)


def inputs(counts: list[list[int]], seed: int = 0) -> ExpertInputs:
    """Batches of as many tokens of each expert as ``counts`` say, those of the last one much larger."""
    generator = torch.Generator().manual_seed(seed)
    made = ExpertInputs()
    for batch in counts:
        total = sum(batch)
        rows = torch.randn(total, FEATURES, generator=generator)
        rows[total - batch[-1] :] *= 8
        order = torch.randperm(total, generator=generator)  # where in the batch each pair's row lies
        stored = torch.empty_like(rows)
        stored[order] = rows
        gates = torch.rand(total, generator=generator)
        made.add(Routed(stored, order, torch.tensor(batch), gates))
    return made


def mean_square(rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    scaled = rows if weights is None else rows * (weights / weights.square().mean().sqrt()).unsqueeze(1)
    return scaled.t() @ scaled / max(len(rows), 1)


def close(made: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    """Equal up to what rounding inputs to eight bits changes."""
    assert made is not None
    return float((made - wanted).norm() / wanted.norm()) < 0.02


def test_a_blend_weighs_an_experts_tokens_against_those_of_its_layer() -> None:
    given = inputs([[40, 0, 30], [24, 0, 50]])
    prior = layer_statistics(given, NEEDS)
    everything = torch.cat(list(given.batches()))
    assert prior.tokens == len(everything) == 144 and close(prior.hessian, mean_square(everything))
    for expert, own in ((0, 64), (1, 0), (2, 80)):
        rows, gates = given.of(expert)
        assert len(rows) == own
        made, notes = expert_statistics(nn.Module(), LAYER, expert, given, prior, "blend", NEEDS)
        share = own / (own + PRIOR * FEATURES)
        wanted = share * mean_square(rows, gates) + (1 - share) * mean_square(everything)
        assert close(made.hessian, wanted)
        assert bool(notes) == (own < FEATURES) and made.maximum is not None
        # its range is what it reads, however the gates weigh it
        assert torch.equal(made.maximum, (rows if own else everything).amax(0).clamp(min=0))
    assert close(prior.hessian, mean_square(everything)), "what is known of the layer is not used up"


def test_the_second_product_blends_as_many_of_the_layers_tokens_as_its_own_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "expert_inner", lambda module, experts, expert, rows: rows * 3)
    given, hessian = inputs([[60, 0, 20]]), frozenset({"hessian"})
    for there, taken in ((500, (16, 32, 28)), (24, (16, 24, 24))):
        ones, none = torch.ones(there, FEATURES), torch.zeros(3, dtype=torch.int64)
        layer = ExpertInputs()
        layer.add(Routed(ones, torch.arange(there), none, torch.ones(there)))
        for expert, tokens in enumerate(taken):
            made, _ = expert_statistics(nn.Module(), LAYER, expert, given, layer, "blend", hessian)
            rows, gates = given.of(expert)
            share = len(rows) / (len(rows) + tokens)
            assert close(made.hessian, share * mean_square(rows, gates) + (1 - share) * 9)


@pytest.mark.parametrize("how", [x for x in get_args(Calibration) if x != "blend"])
def test_other_ways_take_the_tokens_that_they_name(how: Calibration) -> None:
    given = inputs([[40, 3, 30]])
    prior = layer_statistics(given, NEEDS) if how == "all" else None
    made, notes = expert_statistics(nn.Module(), LAYER, 1, given, prior, how, NEEDS)
    wanted = torch.cat(list(given.batches())) if how == "all" else given.of(1)[0]
    assert made.tokens == len(wanted) and close(made.hessian, mean_square(wanted))
    assert bool(notes) == (how == "routed")


def test_rows_that_no_expert_reads_are_none_of_the_layers() -> None:
    """Llama 4's experts have a row of their own for each token, zero where the router sends none."""
    given = ExpertInputs()
    rows = torch.zeros(12, FEATURES)
    rows[[1, 6, 7]] = torch.randn(3, FEATURES)
    given.add(Routed(rows, torch.tensor([1, 6, 7]), torch.tensor([1, 2, 0]), torch.ones(3)))
    assert [len(b) for b in given.batches()] == [3]
    assert [len(b) for b in given.reduced(2).batches()] == [2]


def test_what_is_put_aside_is_the_same_in_memory_and_on_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESIDENT", 100)
    files = ScratchFiles(tmp_path)
    aside = Aside(files)
    tensors = [
        torch.randn(5, 4).bfloat16(),
        torch.randn(30, 7),
        torch.randint(-8, 8, (9, 6)).to(torch.int8).t(),
    ]
    kept = [aside.keep(t) for t in tensors]
    aside.give_back()
    for tensor, copy in zip(tensors, kept, strict=True):
        assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
    assert list(tmp_path.iterdir()) == [], "files have no name that could be left behind"
    size = sum(t.nbytes for t in tensors[1:])  # the first is in memory
    assert files.held == files.most == size
    del aside, kept, copy
    assert (files.held, files.most) == (0, size)
    with pytest.raises(DiskFull, match="layer of experts"):
        Aside(ScratchFiles(tmp_path / "gone")).keep(torch.zeros(1000))


@pytest.mark.parametrize(("workers", "each"), [(1, 4), (2, 2), (4, 1)])
def test_chunks_are_worked_on_side_by_side_and_come_in_order(workers: int, each: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with side_by_side(workers) as several:
            assert torch.get_num_threads() == each
            made = list(several(lambda x: (sum(x), torch.get_num_threads()), in_chunks(range(7), 3)))
            assert made == [(3, each), (12, each), (6, each)]
            with pytest.raises(ZeroDivisionError):
                list(several(lambda x: 1 / x, [2, 0, 1]))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_no_more_experts_are_solved_side_by_side_than_memory_is_set_aside_for() -> None:
    before, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(16)
    try:
        assert workers_for(1536, 2048, cpu) == 16, "Qwen3-30B-A3B's"
        assert workers_for(4096, 7168, cpu) == 3, "DeepSeek V3's"
        assert workers_for(32768, 6144, cpu) == 1, "Mixtral 8x22B's"
        assert workers_for(1536, 2048, torch.device("cuda")) == 1
    finally:
        torch.set_num_threads(before)
