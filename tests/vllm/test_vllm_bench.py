"""The load test beside vLLM's own on a server whose moments are stated; on the real one it is part of the
journey in test_vllm_commands.py. More pairs of both there: benchmarks/load.py."""

from __future__ import annotations

from pathlib import Path

from tests.serving.endpoint import endpoint
from tests.vllm.test_vllm_commands import FIGURES, bench


def test_both_tools_measure_the_same_where_moments_are_stated(source: Path, vllm_python: str) -> None:
    """TTFT 150 ms and 25 ms a token: figures agree within a tenth, so the definitions are the same."""
    with endpoint(ttft=0.15, itl=0.025, root=str(source)) as fake:
        options = ["--url", fake.url, "--concurrency", "2", "--requests", "12", "--input-tokens", "16"]
        options += ["--output-tokens", "10", "--warm-up", "1"]
        ours = bench(*options)["targets"][0]["levels"][0]
        theirs = bench(*options, "--tool", "vllm", "--tool-python", vllm_python)["targets"][0]["levels"][0]
    assert ours["completed"] == theirs["completed"] == 12
    for key in FIGURES:
        assert 0.9 < ours[key] / theirs[key] < 1.1, (key, ours[key], theirs[key])
    assert ours["total_output_tokens"] == theirs["total_output_tokens"]
