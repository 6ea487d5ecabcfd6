"""The load test's client and arithmetic, against a server of the tests with stated moments and faults."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy_vllm import main
from quant.serving.bench import BenchRequest, bench_endpoint
from quant.serving.client import Endpoint, Trace, endpoint_url
from quant.serving.load import Level, arrivals
from quant.serving.measures import (
    Distribution,
    Lengths,
    Summary,
    knee,
    parse_limits,
    percentile_interval,
)
from quant.serving.prompts import PromptRequest, _Windows
from quant.serving.server_metrics import figures, parse_metrics
from tests.serving.endpoint import endpoint

PROMPTS = PromptRequest(Lengths.parse("16", "i"), Lengths.parse("5", "o"))


def _load(url: str, level: Level, requests: int = 12, stall: float = 1.0, **options: Any) -> dict[str, Any]:
    request = BenchRequest(options.pop("prompts", PROMPTS), (level,), requests, 0, **options)
    return bench_endpoint(Endpoint(url, stall=stall), request).levels[0]


def test_figures_are_those_of_the_moments_at_which_tokens_were_sent() -> None:
    with endpoint(ttft=0.06, itl=0.03) as fake:
        level = _load(fake.url, Level(concurrency=4), limits=parse_limits("ttft:1000,tpot:1000"))
    assert level["completed"] == 12 and not level["failed"] and fake.most == 4
    assert level["total_output_tokens"] == 12 * 5 and level["total_input_tokens"] == 12 * 16
    # as it was sent, and more by what a busy machine takes; a first token that is read late shortens the rest
    assert 60 <= level["median_ttft_ms"] < 150
    assert 27 <= level["median_tpot_ms"] < 60
    # rounds of four, one after another
    assert 3 * (0.06 + 4 * 0.03) <= level["duration"] < 6 * (0.06 + 4 * 0.03)
    assert level["output_throughput"] == pytest.approx(60 / level["duration"])
    assert level["request_goodput"] == pytest.approx(level["request_throughput"])
    assert level["max_concurrent_requests"] == 4


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("429", "429"),
        ("500", "5xx"),
        ("401", "401"),
        ("400", "4xx"),
        ("html", "no stream"),
        ("garbage", "no stream"),
        ("event", "error event"),
        ("cut", "cut off"),
        ("drop", "cut off"),
        ("hang", "timeout"),
    ],
)
def test_each_failure_is_counted_by_its_kind_and_is_in_no_latency(fault: str, kind: str) -> None:
    with endpoint(fault=fault, every=4) as fake:
        level = _load(fake.url, Level(concurrency=4), 15)
    # one request was asked before the first that is measured
    assert level["errors"] == {kind: 4}
    assert level["completed"] == 11 and level["failed"] == 4
    assert level["p99_e2el_ms"] < 900  # a request that hangs would have a second


def test_an_open_loop_counts_from_the_planned_moment_so_that_a_slow_server_hides_nothing() -> None:
    """Coordinated omission: one request at a time takes 60 ms, 50 a second arrive, so the n-th waits for
    n - 1 others; a closed loop, or counting from the sending, would tell 60 ms for each."""
    with endpoint(ttft=0.06, itl=0.0, slots=1) as fake:
        level = _load(fake.url, Level(rate=50, poisson=False), 20)
        closed = _load(fake.url, Level(concurrency=1), 5)
    waited = 1000 * 19 * (0.06 - 0.02)
    assert closed["median_ttft_ms"] < 0.3 * waited
    assert 0.8 * waited < level["p95_ttft_ms"] < 3 * waited
    # and where it is the client that holds requests back
    with endpoint(ttft=0.06, itl=0.0) as fake:
        level = _load(fake.url, Level(1, rate=50, poisson=False), 20)
    assert fake.most == 1
    assert 0.8 * waited < level["p95_ttft_ms"] < 3 * waited


def test_a_server_that_stands_still_is_seen_by_all_who_come_meanwhile() -> None:
    """For 0.6 s, with 50 a second planned: those 30 wait; at one at a time only the one under way would."""
    with endpoint(ttft=0.01, itl=0.0, stall_after=10, stall=0.6) as fake:
        # a machine that lacks processors may stand still for longer yet, which the client bears here
        level = _load(fake.url, Level(rate=50, poisson=False), 40, stall=30.0)
    assert level["completed"] == 40, level["errors"]
    assert level["p99_ttft_ms"] > 500 and level["median_ttft_ms"] > 50 and level["p90_ttft_ms"] > 400


def test_what_an_endpoint_lacks_is_done_without_and_said() -> None:
    with endpoint(refuses=("ignore_eos",), counted=False, tokenizes=False) as fake:
        request = BenchRequest(PROMPTS, (Level(concurrency=2),), 6, 2)
        result = bench_endpoint(Endpoint(fake.url), request)
    assert any("ignore_eos" in note for note in result.notes)
    assert any("does not count tokens" in note for note in result.notes)
    level = result.levels[0]
    assert level["completed"] == 6 and level["total_output_tokens"] == 30
    assert level["server"]["preemptions"] == 0 and level["server"]["running"]["max"] <= 2
    assert isinstance(fake.behaviour.bodies[-1]["prompt"], str)  # by characters: it does not tokenize


def test_a_sweep_doubles_the_load_until_it_gains_nothing() -> None:
    with endpoint(ttft=0.2, itl=0.0, slots=4) as fake:
        result = bench_endpoint(Endpoint(fake.url), BenchRequest(PROMPTS, (), 16, 0))
    tried = [x["level"]["concurrency"] for x in result.levels]
    # four at a time is what it can; noise may make a little gain of eight
    assert tried in ([1, 2, 4, 8], [1, 2, 4, 8, 16])
    assert result.knee == 2


def test_prompts_share_a_prefix_only_where_it_is_asked_for() -> None:
    def bodies(shared: int) -> list[list[int]]:
        asked = PromptRequest(Lengths.parse("30-40", "i"), Lengths.parse("2", "o"), shared_prefix=shared)
        with endpoint() as fake:
            _load(fake.url, Level(concurrency=4), 10, prompts=asked)
            return [b["prompt"] for b in fake.behaviour.bodies if not isinstance(b["prompt"], str)]

    alone, together = bodies(0), bodies(20)
    assert len({tuple(p[:8]) for p in alone}) == 10
    assert len({tuple(p[:20]) for p in together}) == 1 and len({tuple(p) for p in together}) == 10
    assert all(30 <= len(p) <= 40 for p in alone + together)


def test_windows_of_a_text_begin_at_every_place_once_and_go_on_at_its_beginning() -> None:
    windows = _Windows("abcde", 0)
    first, second = ([windows.next(7) for _ in range(5)] for _ in range(2))
    assert sorted(first) == sorted(second) == ["abcdeab", "bcdeabc", "cdeabcd", "deabcde", "eabcdea"]
    assert first != second  # another order


def test_intervals_hold_what_they_promise() -> None:
    generator = np.random.default_rng(0)
    for percent, n in ((50, 60), (90, 200), (95, 400)):
        truth = -math.log(1 - percent / 100)
        ranks = percentile_interval(n, percent)
        assert ranks is not None
        draws = np.sort(generator.exponential(size=(2000, n)), axis=1)
        inside = ((draws[:, ranks[0]] <= truth) & (truth <= draws[:, ranks[1]])).mean()
        assert 0.94 <= inside <= 0.99
    assert percentile_interval(60, 99) is None  # the largest of 60 values is no bound of it
    inside = 0
    for _ in range(1000):
        low, high = Distribution.of(generator.normal(1, 1, 12).tolist()).mean_interval() or (0, 0)
        inside += low <= 1000 <= high
    assert 0.93 <= inside / 1000 <= 0.98


def test_definitions_of_one_request() -> None:
    trace = Trace(10.0, 10.5, (11.0, 11.2, 11.6), 11.6, 7, 5)
    assert trace.ttft == 1.0 and trace.e2el == pytest.approx(1.6)
    assert trace.tpot == pytest.approx(0.6 / 4)  # tokens, not pieces
    assert trace.itl == pytest.approx((0.2, 0.4))
    summary = Summary.of([trace], {"ttft": 900.0})
    assert summary.goodput == 0 and Summary.of([trace], {"ttft": 1001.0}).goodput == pytest.approx(1 / 1.6)
    assert knee([(math.nan, math.nan), (1.0, 2.0)]) == 1 and knee([(math.nan, math.nan)]) is None


def test_arrivals_have_the_rate_asked_for_and_lengths_the_distribution() -> None:
    times = list(arrivals(Level(rate=20), 4000, 1))
    assert times[-1] == pytest.approx(200, rel=0.06)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.08)  # exponential
    assert set(np.round(np.diff(list(arrivals(Level(rate=20, poisson=False), 50, 1))), 9)) == {0.05}
    generator = random.Random(0)
    drawn = [Lengths.parse("lognormal:100:0.5", "x").draw(generator) for _ in range(4000)]
    assert np.median(drawn) == pytest.approx(100, rel=0.05)


def test_metrics_of_each_engine_come_under_one_name() -> None:
    sglang = figures(parse_metrics('sglang:num_queue_reqs{a="1"} 2\nsglang:num_queue_reqs{a="2"} 3\n'))
    assert sglang == {"queue": 5.0}
    vllm = figures(parse_metrics('vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:kv_cache_usage_perc 0.25\n'))
    assert vllm == {"kv_cache_usage": 0.5}  # a share is not added up
    assert figures(parse_metrics("<html>\nnot metrics\n")) == {}


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return int(stop.value.code or 0), said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--url of an endpoint"),
        (["--url", "ftp://x"], "give an address such as"),
        (["--url", "http://a:99999"], "give an address such as"),
        (["--url", "http://u:p@a"], "--api-key-env"),
        (["--url", "http://a", "--rate", "0"], "positive numbers"),
        (["--url", "http://a", "--rate", "nan"], "positive numbers"),
        (["--url", "http://a", "--rate", "1e-9"], "days"),
        (["--url", "http://a", "--temperature", "nan"], "no finite number"),
        (["--url", "http://a", "--stall", "inf"], "no finite number"),
        (["--url", "http://a", "--goodput", ""], "ttft:500"),
        (["--url", "http://a", "--concurrency", "1,x"], "positive whole numbers"),
        (["--url", "http://a", "--concurrency", "1000000"], "ports"),
        (["--url", "http://a", "--concurrency", "1,2", "--rate", "3"], "one number"),
        (["--url", "http://a", "--input-tokens", "9-3"], "--input-tokens"),
        (["--url", "http://a", "--goodput", "ttfb:3"], "ttft:500"),
        (["--url", "http://a", "--prompts", "missing.txt"], "--prompts"),
        (["--url", "http://a", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, said = _fails(capsys, *arguments)
    assert code == 2 and words in said


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda url: [url.rsplit(":", 1)[0] + ":9", "-q"], "is the server up"),
        (lambda url: [url.replace("http:", "https:")], "encrypted connection failed"),
        (lambda url: [url, "--served-model", "other"], "serves m"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_named_with_the_next_step(
    prepare: Callable[[str], list[str]], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint() as fake:
        code, said = _fails(capsys, "--url", *prepare(fake.url), "--concurrency", "1")
    assert code == 1 and words in said


def test_a_key_is_sent_and_a_wrong_one_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--concurrency", "2", "--requests", "4", "--input-tokens", "8", "--output-tokens", "2"]
    with endpoint(key="right") as fake:
        monkeypatch.setenv("KEY", "wrong")
        code, said = _fails(capsys, "--url", fake.url, "--api-key-env", "KEY", *options)
        assert code == 1 and "key was refused" in said and "wrong" not in said.replace("wrong:", "")
        for unsent in ("s3c\nret", "s3crät"):  # no header carries them
            monkeypatch.setenv("KEY", unsent)
            code, said = _fails(capsys, "--url", fake.url, "--api-key-env", "KEY", *options)
            assert code == 2 and "no header can carry it" in said and "s3c" not in said
        monkeypatch.setenv("KEY", "right")
        code, said = _fails(capsys, "--url", fake.url, "--api-key-env", "KEY", *options)
        assert code == 0


def test_several_endpoints_are_ranked_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "load"
    options = ["--concurrency", "1,4", "--requests", "12", "--input-tokens", "8", "--output-tokens", "4"]
    with endpoint(itl=0.001) as fast, endpoint(itl=0.02, fault="500", every=5) as slow:
        with pytest.raises(SystemExit) as stop:
            main(["bench", "--url", slow.url, "--url", fast.url, *options, "--output", str(folder), "--json"])
    assert not stop.value.code
    result = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in result["ranking"]["throughput"]] == [u[7:] for u in (fast.url, slow.url)]
    assert json.loads((folder / "bench.json").read_text())["targets"] == result["targets"]
    lines = (folder / "bench.csv").read_text().splitlines()
    assert len(lines) == 5 and "p99_ttft_ms" in lines[0]
    page = (folder / "bench.html").read_text()
    assert page.count("<svg") == 3 and "5xx" in page
    # the colours are told before the first curve, heads and rankings have units, no server's share is bare
    assert page.index("class=key") < page.index("<svg")
    assert "TTFT P95, ms" in page and "lowest P95 of whole answers, ms" in page and "10.0%" in page
    assert not re.search(r"(src|href)=.?http|<script", page)  # nothing of the network


def test_the_client_says_when_it_is_the_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint() as fake:

        async def busy() -> Any:
            import time

            request = BenchRequest(PROMPTS, (Level(concurrency=2),), 60, 0)
            from quant.serving.bench import _bench

            async def hog() -> None:
                while True:
                    time.sleep(0.02)  # this program's own loop stands still
                    await asyncio.sleep(0.001)

            task = asyncio.create_task(hog())
            try:
                return await _bench(Endpoint(fake.url), request, "", {}, lambda event: None)
            finally:
                task.cancel()

        result = asyncio.run(busy())
    assert result.levels[0]["client"]["saturated"]
    assert any("client was the bottleneck" in note for note in result.notes)


@pytest.mark.parametrize(
    "text",
    ["localhost:8000", "http://localhost:8000/", "http://localhost:8000/v1", "localhost:8000/v1/models",
     "http://localhost:8000/v1/chat/completions/"],
)  # fmt: skip
def test_addresses_as_people_write_them(text: str) -> None:
    assert endpoint_url(text) == "http://localhost:8000"
