"""What is set aside comes back in place, within a budget of memory, or is an error with the way out."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from quant.errors import DiskFull, QuantError
from quant.pipeline.activation_store import ActivationStore, Space


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_put_aside_comes_back_in_place_for_every_view(dtype: torch.dtype, tmp_path: Path) -> None:
    store = ActivationStore(0, tmp_path / "scratch")
    tensors = [
        torch.randn(3, 100 + 10 * (i % 2), generator=torch.Generator().manual_seed(i)).to(dtype)
        for i in range(6)
    ]
    views, wanted = [t[1:, ::2] for t in tensors], [t.clone() for t in tensors]
    for _ in range(3):
        back = [store.put(t) for t in tensors]
        assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
        for restore in reversed(back):
            restore()
        assert all(torch.equal(t, w) for t, w in zip(tensors, wanted, strict=True))
        assert all(torch.equal(v, w[1:, ::2]) for v, w in zip(views, wanted, strict=True))
    # places in the file are used again
    assert (tmp_path / "scratch").stat().st_size == sum(t.untyped_storage().nbytes() for t in tensors)
    store.close()


def test_the_budget_bounds_what_stays_in_memory(tmp_path: Path) -> None:
    store = ActivationStore(2000, tmp_path / "scratch")
    tensors = [torch.full((200,), float(i)) for i in range(4)]
    back = [store.put(t) for t in tensors]
    assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
    assert store.spilled_bytes == (tmp_path / "scratch").stat().st_size == 1600  # two fit into the budget
    back[0]()
    extra = torch.full((200,), 9.0)
    last = store.put(extra)  # where the first one was
    assert store.spilled_bytes == 1600
    for restore in (*back[1:], last):
        restore()
    assert all(torch.equal(t, torch.full((200,), float(i))) for i, t in enumerate(tensors)) and torch.equal(
        extra, torch.full((200,), 9.0)
    )
    store.close()


def test_an_empty_tensor_needs_no_place(tmp_path: Path) -> None:
    store = ActivationStore(0, tmp_path / "scratch")
    store.put(torch.empty(0, 7))()
    assert store.spilled_bytes == 0


@pytest.mark.parametrize("limit", [None, 300])
def test_places_never_overlap_and_free_neighbours_become_one(limit: int | None) -> None:
    space, random = Space(limit), Random(0)
    taken: dict[int, int] = {}
    refused = 0
    for _ in range(2000):
        if taken and random.random() < 0.5:
            start = random.choice(list(taken))
            space.give(start, taken.pop(start))
            continue
        size = random.randint(1, 60)
        place = space.take(size)
        if place is None:
            refused += 1
            continue
        assert 0 <= place and (limit is None or place + size <= limit)
        assert all(place + size <= s or s + n <= place for s, n in taken.items())
        taken[place] = size
    assert (refused > 0) == (limit is not None)
    for start in list(taken):
        space.give(start, taken.pop(start))
    assert space.take(space.end) == 0  # all that was ever taken is one place again


def test_a_scratch_file_without_room_is_an_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    store = ActivationStore(0, tmp_path / "scratch")
    monkeypatch.setattr(
        os, "pwrite", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(
        DiskFull,
        match=r"scratch: cannot hold 400 B of calibration activations \(No space left on device\)"
        ".*fewer --samples",
    ):
        store.put(torch.ones(100))
    store.close()
    assert not (tmp_path / "scratch").exists()


def test_a_scratch_file_that_another_process_cuts_is_an_error(tmp_path: Path) -> None:
    store = ActivationStore(0, tmp_path / "scratch")
    restore = store.put(torch.ones(100))
    (tmp_path / "scratch").write_bytes(b"")
    with pytest.raises(QuantError, match="the scratch file ended early"):
        store.put(torch.ones(200))  # which would make it as long again, with a hole
    with pytest.raises(QuantError, match="the scratch file ended early"):
        restore()
    store.close()
