"""The load test beside vLLM's own on a server whose moments are stated, and on the real server.
Paired figures of both on the real one: benchmarks/load.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from quant.serving.deployment import DeploymentRequest, plan
from quant.serving.process import running
from quant.serving.server_metrics import parse_metrics
from quant.vllm import metrics
from tests.helpers import ROOT, left_alive
from tests.serving.endpoint import endpoint
from tests.vllm.test_vllm_commands import OPTIONS

_FIGURES = ("median_ttft_ms", "median_tpot_ms", "median_e2el_ms")


def _bench(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "deploy_vllm.py"), "bench", "--json", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_both_tools_measure_the_same_where_moments_are_stated(source: Path, vllm_python: str) -> None:
    """TTFT 150 ms and 25 ms a token: figures agree within a tenth, so the definitions are the same."""
    with endpoint(ttft=0.15, itl=0.025, root=str(source)) as fake:
        options = ["--url", fake.url, "--concurrency", "2", "--requests", "12", "--input-tokens", "16"]
        options += ["--output-tokens", "10", "--warm-up", "1"]
        ours = _bench(*options)["targets"][0]["levels"][0]
        theirs = _bench(*options, "--tool", "vllm", "--tool-python", vllm_python)["targets"][0]["levels"][0]
    assert ours["completed"] == theirs["completed"] == 12
    for key in _FIGURES:
        assert 0.9 < ours[key] / theirs[key] < 1.1, (key, ours[key], theirs[key])
    assert ours["total_output_tokens"] == theirs["total_output_tokens"]


def test_a_real_server_is_loaded_and_tells_what_it_saw(
    make: Callable[..., Path], vllm_python: str, tmp_path: Path
) -> None:
    deployment = plan(make(*OPTIONS), DeploymentRequest(port=0, extra=("--enforce-eager",)))
    with running(deployment, python=vllm_python) as (server, _):
        members = psutil.Process().children(recursive=True)
        options = ["--url", server.url, "--concurrency", "1,4,16", "--requests", "24"]
        options += ["--input-tokens", "64", "--output-tokens", "24", "--output", str(tmp_path)]
        levels = _bench(*options)
        exported = set(parse_metrics(server.text("/metrics")))
    assert left_alive(members, 20) == []
    # what alerts, dashboards and this report are made of; of speculation only a server that speculates tells
    named = [*metrics.GAUGES.values(), *(n for n in metrics.COUNTERS.values() if "spec_decode" not in n)]
    named += [f"{name}_bucket" for name in metrics.HISTOGRAMS.values()]
    assert {metrics.PREFIX + n for n in (*named, metrics.CACHE_CONFIG)} <= exported
    target = levels["targets"][0]
    assert [x["completed"] for x in target["levels"]] == [24, 24, 24]
    assert all(x["total_input_tokens"] == 24 * 64 for x in target["levels"])  # by the server's own count
    assert all(x["total_output_tokens"] == 24 * 24 for x in target["levels"])
    seen = target["levels"][2]["server"]
    assert seen["output_tokens"] >= 24 * 24 and seen["prefix_hit_rate"] < 0.1 and seen["preemptions"] == 0
    assert (tmp_path / "bench.html").exists()
