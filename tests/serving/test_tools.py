"""What other load testers' results are read as: each kept file is a real one, of 12 requests, 2 at a time, of
10 tokens to a server that sends the first after 150 ms and one every 25 ms (tests/serving/endpoint.py), with
requests and texts left out."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quant.commands.render.bench import bench as draw_bench
from quant.errors import QuantError, UsageError
from quant.report.bench_page import bench_page
from quant.serving.bench import BenchRequest, as_csv, bench_endpoint, result_of
from quant.serving.client import Endpoint
from quant.serving.load import Level
from quant.serving.measures import Lengths
from quant.serving.prompts import PromptRequest
from quant.serving.tools import TOOLS, Job, run_tool
from tests.serving.endpoint import endpoint

KEPT = Path(__file__).parent / "data"
REQUEST = BenchRequest(PromptRequest(Lengths.parse("16", "i"), Lengths.parse("10", "o")), (), 12, 1)


def _job(folder: Path, level: Level | None = None, **of_endpoint: Any) -> Job:
    at = Endpoint("http://127.0.0.1:9", "m", **of_endpoint)
    return Job(at, REQUEST, level or Level(concurrency=2), 12, "/models/m", folder)


@pytest.mark.parametrize(
    ("tool", "kept", "name"),
    [
        ("guidellm", "guidellm-0.8.1.json", "guidellm.json"),
        ("aiperf", "aiperf-0.13.0.json", "profile_export_aiperf.json"),
    ],
)
def test_figures_of_real_results_are_those_that_our_own_client_has(
    tool: str, kept: str, name: str, tmp_path: Path
) -> None:
    shutil.copy(KEPT / kept, tmp_path / name)
    (tmp_path / "phases" / "warmup").mkdir(parents=True)  # aiperf's own warm-up, which is not the result
    (tmp_path / "phases" / "warmup" / name).write_text("{}")
    theirs = TOOLS[tool][1](_job(tmp_path))
    with endpoint(ttft=0.15, itl=0.025) as fake:
        request = BenchRequest(REQUEST.prompts, (Level(concurrency=2),), 12, 1)
        ours = bench_endpoint(Endpoint(fake.url), request).levels[0]
    for key in ("completed", "failed", "num_prompts", "total_output_tokens", "errors"):
        assert theirs[key] == ours[key], key
    for key in ("median_ttft_ms", "mean_ttft_ms", "median_tpot_ms", "median_e2el_ms", "output_throughput"):
        assert 0.9 < theirs[key] / ours[key] < 1.1, (key, theirs[key], ours[key])
    assert {k for k in ours if k.endswith("_ms") and isinstance(ours[k], float)} <= set(theirs)


def _without_tokens(path: Path) -> Path:
    """aiperf's result of an endpoint that does not count tokens."""
    found = json.loads((KEPT / "aiperf-0.13.0.json").read_text())
    for key in ("total_usage_prompt_tokens", "total_usage_completion_tokens"):
        del found[key]
    path.write_text(json.dumps(found))
    return path


def test_tokens_that_aiperf_was_not_told_are_unknown(tmp_path: Path) -> None:
    _without_tokens(tmp_path / "profile_export_aiperf.json")
    value = TOOLS["aiperf"][1](_job(tmp_path))
    assert value["total_input_tokens"] is None and value["total_output_tokens"] is None
    assert value["failed"] == 0 and value["completed"] == 12


@pytest.mark.parametrize(("set_to", "seen"), [("1", None), ("true", None), ("0", ""), (None, "")])
def test_aiperf_asks_the_hub_only_where_that_is_not_forbidden(
    set_to: str | None, seen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its result is written where tokens are unknown."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if set_to is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", set_to)
    monkeypatch.setattr("quant.serving.tools._resolved", lambda at: (replace(at, model="m"), str(tmp_path)))
    request = BenchRequest(REQUEST.prompts, (Level(concurrency=2),), 12, 1)
    result_file = _without_tokens(tmp_path / "found.json")
    python = _script(
        tmp_path,
        f"""echo "$HF_HUB_OFFLINE" > {tmp_path}/seen
        while [ "$1" != --artifact-dir ]; do shift; done
        cp {result_file} "$2/profile_export_aiperf.json" """,
    )
    if seen is None:
        with pytest.raises(UsageError, match="unset HF_HUB_OFFLINE for this command"):
            run_tool("aiperf", python, Endpoint("http://127.0.0.1:9"), request)
        assert not (tmp_path / "seen").exists()
        return
    result = result_of([run_tool("aiperf", python, Endpoint("http://127.0.0.1:9"), request)], request)
    assert (tmp_path / "seen").read_text().strip() == seen
    level = result["targets"][0]["levels"][0]
    assert level["total_input_tokens"] is None and level["completed"] == 12
    draw_bench(Console(file=io.StringIO()), result)
    assert bench_page(result) and as_csv(result)


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_key_is_in_no_list_of_processes(tool: str, tmp_path: Path) -> None:
    for key in (None, "s3cret"):
        words = TOOLS[tool][0](_job(tmp_path, api_key=key))
        assert "s3cret" not in " ".join(words)


def test_loads_are_asked_for_in_each_tools_words(tmp_path: Path) -> None:
    def options(level: Level) -> dict[str, Any]:
        words = TOOLS["guidellm"][0](_job(tmp_path, level))
        return {w: json.loads(v) for w, v in zip(words, words[1:], strict=False) if v.startswith("{")}

    found = options(Level(3, rate=8.0, poisson=False))
    assert found["--profile"] == {"kind": "constant", "rate": 8.0, "max_concurrency": 3}
    assert options(Level(rate=8.0))["--profile"] == {"kind": "poisson", "rate": 8.0}
    assert found["--backend"]["request_format"] == "/v1/completions"
    assert found["--backend"]["extras"] == {"body": {"temperature": 0}}
    words = TOOLS["aiperf"][0](_job(tmp_path, Level(3, rate=8.0)))
    at = {w: words[i + 1] for i, w in enumerate(words[:-1])}
    assert (
        at["--request-rate"] == "8.0"
        and at["--request-rate-mode"] == "poisson"
        and at["--concurrency"] == "3"
    )


def _script(folder: Path, text: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("echo 'No module named guidellm' >&2; exit 1", QuantError, "No module named guidellm"),
        ("exit 0", QuantError, "not in a form that is known"),
    ],
)
def test_a_tool_that_fails_is_told(text: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
    request = BenchRequest(REQUEST.prompts, (Level(concurrency=2),), 2, 1)
    with endpoint() as fake, pytest.raises(kind, match=words):
        run_tool("guidellm", _script(tmp_path, text), Endpoint(fake.url), request)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: BenchRequest(r.prompts), "loads that are stated"),
        (lambda r: BenchRequest(PromptRequest(Lengths.parse("9-16", "i"), r.prompts.output_tokens),
                                (Level(concurrency=1),), 2), "takes fixed"),
    ],
)  # fmt: skip
def test_what_no_tool_takes_is_refused(change: Callable[[BenchRequest], BenchRequest], words: str) -> None:
    with endpoint() as fake, pytest.raises(UsageError, match=words):
        run_tool("vllm", "python", Endpoint(fake.url), change(REQUEST))
