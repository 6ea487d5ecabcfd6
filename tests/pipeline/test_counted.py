"""Dry runs of what is too large to be tried: the work is counted, and nothing is quantized."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.checkpoint.reader import Checkpoint
from quant.models.skeleton import Skeleton
from quant.pipeline.counted import Counter
from quant.pipeline.estimate import _some, estimate
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.plan import JobPlan, plan_job
from quant.progress import Event
from tests.helpers import recipe
from tests.models.mixtures import save_mixture


def job(source: Path, folder: Path, method: str = "gptq") -> JobPlan:
    options = {"group_size": 32, "samples": 4, "sequence_length": 64}
    return plan_job(recipe(source, folder / "out", method=method, **options))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("mixture") / "model", "qwen3_moe")


def test_blocks_that_would_take_too_long_are_counted_and_not_quantized(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = job(llama, tmp_path)
    tried = estimate(plan)
    monkeypatch.setattr("quant.pipeline.estimate._FEW", 0)
    monkeypatch.setattr("quant.pipeline.estimate.TRIAL_SECONDS", 0.0)
    monkeypatch.setattr("quant.pipeline.blocks.BlockQuantizer.quantize", None)
    events: list[Event] = []
    counted = estimate(plan, events.append)
    assert (tried["tried"], counted["tried"]) == (True, False)
    assert not [e for e in events if e.phase == "trial"]
    assert counted["seconds"] > 0 and counted["output_bytes"] == tried["output_bytes"]
    assert counted["peak_rss_bytes"] > plan.checkpoint.nbytes // 2


@pytest.mark.parametrize("method", ["gptq", "yaqa"])
def test_work_grows_with_tokens_and_experts_count_by_the_tokens_that_they_see(
    method: str, llama: Path, mixture: Path, tmp_path: Path
) -> None:
    for source in (llama, mixture):
        manager = QuantizationManager(job(source, tmp_path, method))
        rows, skeleton = manager.prepare()
        counter = Counter(manager, skeleton)
        none, some, more = (counter.block(0, tokens).seconds for tokens in (0, 1000, 3000))
        assert 0 < none < some and more - none == pytest.approx(3 * (some - none))
    weights = sum(p.numel() for p in skeleton.blocks[0].parameters())
    assert counter.block(0, 0).memory > skeleton.dtype.itemsize * weights
    assert counter._active(4) == 0.5  # two of four experts


def test_what_shares_an_input_is_found_without_reading_experts(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = job(mixture, tmp_path)
    manager = QuantizationManager(plan)
    read: list[str] = []
    for name in ("read", "read_index"):
        whole = getattr(Checkpoint, name)

        def noted(self: Checkpoint, tensor: str, *rest: int, whole: object = whole) -> object:
            read.append(tensor)
            return whole(self, tensor, *rest)  # type: ignore[operator]

        monkeypatch.setattr(Checkpoint, name, noted)
    skeleton = Skeleton(plan.checkpoint, manager.device)
    groups = skeleton.groups(0)
    assert {(g.experts, g.stage) for g in groups if g.experts} == {
        ("mlp.experts", "up"),
        ("mlp.experts", "down"),
    }
    assert read and not [n for n in read if ".experts." in n]
    assert all(p.is_meta for p in skeleton.blocks[0].parameters())


def test_no_rate_is_negative_where_wide_inputs_take_more_than_products_explain(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = job(llama, tmp_path)
    manager = QuantizationManager(plan)
    # sixteen times by the weight for four times the inputs, as where a cache ends
    monkeypatch.setattr(Counter, "_on", lambda self, a, n, k: (0.0, n * k * (k / 256) ** 2))
    rates = Counter(manager, Skeleton(plan.checkpoint, manager.device))._of(
        plan.assignments[min(plan.linears)]
    )
    assert rates.element == 0 and rates.solve(512, 1024) == pytest.approx(512 * 1024 * 16)


def test_linears_that_are_tried_are_the_largest_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.pipeline.estimate._TRIED", 100)
    sizes = {"a": 10, "b": 40, "c": 60, "d": 45, "e": 900}
    assert _some(list(sizes), sizes.__getitem__, 2) == ["b", "d"]
    assert _some(["c", "e"], sizes.__getitem__, 2) == ["c"]


def test_the_memory_of_linears_that_are_too_large_to_be_tried_is_added(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = job(llama, tmp_path, "minmax")
    monkeypatch.setattr("quant.pipeline.estimate.peak_rss", lambda: 0)
    whole = estimate(plan)["peak_rss_bytes"]
    monkeypatch.setattr("quant.pipeline.estimate._TRIED", 1)
    most = max(x.n * x.k for x in plan.linears.values())
    # codes of a byte, and words of half a byte with their scales, for each weight that was not tried
    assert most < estimate(plan)["peak_rss_bytes"] - whole < 4 * most
