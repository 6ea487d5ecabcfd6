"""The commands that start vLLM, run as a user runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from quant.serving.server_metrics import parse_metrics
from quant.vllm import metrics
from tests.helpers import ROOT, left_alive
from tests.vllm.conftest import AVX512, EXACT_INT8

#: What these tests serve: a scheme for which vLLM has kernels on this machine.
OPTIONS = (
    ("--format", "compressed-tensors", "--symmetric", "--group-size", "128", "--method", "gptq")
    if AVX512
    else ("--scheme", "w8a8-fp8", "--method", "minmax")
)


def _start(path: Path, *options: str, **settings: Any) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(ROOT / "deploy_vllm.py"),
        "--model-path",
        str(path),
        "--port",
        "0",
        "--json",
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def _check(*options: str, **settings: Any) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, str(ROOT / "deploy_vllm.py"), "check", "--json", "-q", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, **settings)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


FIGURES = ("median_ttft_ms", "median_tpot_ms", "median_e2el_ms")


def bench(*options: str, **settings: Any) -> dict[str, Any]:
    """What ``quant-deploy bench`` prints."""
    command = [sys.executable, str(ROOT / "deploy_vllm.py"), "bench", "--json", "-q", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def _is_measured_as_served(url: str, path: Path, source: Path, environment: dict[str, str]) -> None:
    """Its own log-probabilities give the loss that our run of the checkpoint gives, and the bound of the KL
    that the same tokens give there; the source's would give none."""
    command = [sys.executable, str(ROOT / "quantize.py"), "evaluate", str(path), "--against", str(source)]
    command += ["--url", url, "--api-key-env", "KEY", "--length", "128", "--chunks", "6", "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    served, kl = value["served"], value["kl"]["mean"]
    assert served["url"] == url and served["tokens"] == value["tokens"] == 6 * 127
    assert abs(served["loss"]["mean"] - value["loss"]["mean"]) < 0.01
    bound, own = served["kl_at_least"]["mean"], served["own_kl_at_least"]["mean"]
    assert 0 < own < served["own_kl"]["mean"] == kl
    # 16 bits add a little to what rounding the weights costs
    assert 0.8 * own < bound < 1.5 * own + 5e-4, served
    assert served["distance"] < 0.1 and served["top1"]["mean"] > 0.85


def _is_loaded(url: str, folder: Path, environment: dict[str, str]) -> None:
    """At 1, 4 and 16 at a time, every token is counted and the reports are there."""
    lengths = ["--requests", "16", "--input-tokens", "64", "--output-tokens", "12"]
    found = bench("--url", url, "--api-key-env", "KEY", "--concurrency", "1,4,16", *lengths, "--output",
                  str(folder), env=environment)["targets"][0]  # fmt: skip
    levels = found["levels"]
    assert [x["level"]["concurrency"] for x in levels] == [1, 4, 16]
    assert [x["completed"] for x in levels] == [16, 16, 16]
    assert all(x["total_input_tokens"] == 16 * 64 for x in levels)  # by the server's own count
    assert all(x["total_output_tokens"] == 16 * 12 for x in levels)
    seen = levels[2]["server"]
    assert seen["output_tokens"] >= 16 * 12 and seen["prefix_hit_rate"] < 0.1 and seen["preemptions"] == 0
    assert {p.name for p in folder.iterdir()} == {"bench.json", "bench.csv", "bench.html"}
    assert json.loads((folder / "bench.json").read_text())["targets"][0]["levels"] == levels


def _counts_as_vllms_own_tool(url: str, environment: dict[str, str], vllm_python: str) -> None:
    """Both tools in turn on one server count the same. How near their times are is told where the moments are
    stated (test_vllm_bench.py) and where the machine is quiet (benchmarks/load.py): here other tests have
    their turns in between."""
    options = ["--url", url, "--api-key-env", "KEY", "--concurrency", "4", "--requests", "16"]
    options += ["--input-tokens", "64", "--output-tokens", "32"]
    tools = ([], ["--tool", "vllm", "--tool-python", vllm_python])
    ours, theirs = (bench(*options, *tool, env=environment)["targets"][0]["levels"][0] for tool in tools)
    for key in ("completed", "total_output_tokens"):
        assert ours[key] == theirs[key] == {"completed": 16, "total_output_tokens": 16 * 32}[key]
    assert all(level[key] > 0 for level in (ours, theirs) for key in (*FIGURES, "output_throughput"))


def _writes_text_for_students(url: str, folder: Path, environment: dict[str, str]) -> None:
    """Tasks are answered with where each answer is from; the one that its context has no room for is left
    out with the server's reason, and stops no other."""
    tasks, output = folder / "tasks.txt", folder / "data.jsonl"
    said = [
        "The history of",
        "In the north of the country",
        "the river and " * 1000,
        "A species of",
        "He was born",
    ]
    tasks.write_text("".join(f"{task}\n" for task in said))
    command = [sys.executable, str(ROOT / "quantize.py"), "distill", "--generate", str(tasks), "--url", url]
    command += ["--api-key-env", "KEY", "-o", str(output), "--max-tokens", "40", "--answers", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    value, rows = json.loads(done.stdout), [json.loads(line) for line in output.read_text().splitlines()]
    assert value["asked"] == 10 and value["dropped"]["refused"] == 2 and value["rows"] == len(rows) > 0
    assert "task 2 is left out: " in done.stderr and "context length" in done.stderr
    assert {r["made_by"]["task"] for r in rows} <= {0, 1, 3, 4}
    for row in rows:
        made = row["made_by"]
        prompt = said[made["task"]]
        assert made["model"] == "tiny" and 0 < made["tokens"] <= 40
        assert row["text"].startswith(prompt) and len(row["text"]) >= len(prompt) + 20


def _exports_what_is_read(url: str) -> None:
    """What alerts, dashboards and reports are made of; of speculation only a server that speculates tells."""
    with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
        exported = set(parse_metrics(answer.read().decode()))
    named = [*metrics.GAUGES.values(), *(n for n in metrics.COUNTERS.values() if "spec_decode" not in n)]
    named += [f"{name}_bucket" for name in metrics.HISTOGRAMS.values()]
    assert {metrics.PREFIX + n for n in (*named, metrics.CACHE_CONFIG)} <= exported


def _is_planned(path: Path) -> None:
    """The plan names the command that is then run."""
    command = [sys.executable, str(ROOT / "deploy_vllm.py"), "plan", "-m", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"][:3] == ["vllm", "serve", str(path)]


def test_serve_answers_is_checked_and_loaded_until_a_signal_and_leaves_no_process(
    make: Callable[..., Path], source: Path, vllm_python: str, tmp_path: Path
) -> None:
    path = make(*OPTIONS)
    _is_planned(path)
    environment = os.environ | {"KEY": "s3cret"}
    started = time.perf_counter()
    process = _start(path, "--api-key-env", "KEY", "--name", "tiny", "--", "--enforce-eager", env=environment)
    assert process.stdout is not None and process.stderr is not None
    log: list[str] = []
    stream = process.stderr
    reader = threading.Thread(target=lambda: log.extend(stream), daemon=True)
    reader.start()
    try:
        report = json.loads(process.stdout.readline())
        elapsed = time.perf_counter() - started
        assert report["model"] == "tiny"
        assert report["url"].startswith("http://127.0.0.1:")
        assert report["max_model_len"] == 1024
        assert report["kv_cache_tokens"] > report["max_model_len"]
        # the rest is this program's start and one completion
        assert 0.5 * elapsed < report["load_seconds"] < elapsed
        completion = report["completion"]
        assert completion["text"].strip() and completion["tokens"] > 0 and completion["tokens_per_second"] > 0
        with urllib.request.urlopen(report["url"] + "/health", timeout=10) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(report["url"] + "/v1/models", timeout=10)
        refused.value.close()
        # what it was made from is not what it serves
        options = ("--url", report["url"], "--checkpoint", str(source), "--only", "fidelity")
        code, found, said = _check(*options, "--api-key-env", "KEY", env=environment)
        failed = {f["name"] for f in found["findings"] if f["status"] == "FAIL"}
        assert code == 4 and "log-probabilities, 1 at a time" in failed, found
        assert failed <= {f"log-probabilities, {n} at a time" for n in (1, 32)}
        options = ("--url", report["url"], "--only", "operation", "--output", str(tmp_path / "check.json"))
        code, found, said = _check(*options, "--api-key-env", "KEY", env=environment)
        assert code == 0 and json.loads((tmp_path / "check.json").read_text())["passed"], found
        _is_measured_as_served(report["url"], path, source, environment)
        _is_loaded(report["url"], tmp_path / "load", environment)
        _counts_as_vllms_own_tool(report["url"], environment, vllm_python)
        _writes_text_for_students(report["url"], tmp_path, environment)
        _exports_what_is_read(report["url"])
        members = psutil.Process(process.pid).children(recursive=True)
        assert any("EngineCore" in " ".join(m.cmdline()) for m in members)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert left_alive(members, 1) == []
    reader.join(10)
    text = "".join(log)
    assert "s3cret" not in text
    assert "Loading weights took" in text  # vLLM's log is streamed
    assert "stopping vLLM" in text and text.rstrip().endswith("stopped")
    assert "Traceback" not in text  # of an engine whose server we ended
    assert process.stdout.read() == ""  # one JSON object and nothing else
    process.stdout.close()
    process.stderr.close()
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", int(report["url"].rpartition(":")[2])))


def test_check_stops_by_itself_and_a_signal_while_loading_stops_too(
    make: Callable[..., Path], vllm_python: str
) -> None:
    path = make(*OPTIONS)
    process = _start(path, "--check", "-q", "--", "--enforce-eager")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["completion"]["tokens"] > 0
    assert err == ""  # quiet
    process = _start(path)
    assert process.stderr is not None
    for line in process.stderr:
        if "non-default args" in line:  # vLLM runs and is far from ready
            break
    members = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert left_alive(members, 1) == []


#: Loads that a CPU carries: what is tested is that each check comes to its end and finds what is there.
_PROFILE = """
performance: {input_tokens: 64, output_tokens: 16, requests: 8, concurrency: 4, seconds: 60,
              ttft_p95_ms: 60000, stream_tokens_per_second: 0.1, sustained_concurrency: 2,
              long_prompts: {4096: 60000}}
fidelity: {concurrency: 32, repeats: 3}
operation: {growth_per_hour: 1000GiB}
"""


def test_check_finds_a_sound_server_sound(
    make: Callable[..., Path], vllm_python: str, tmp_path: Path
) -> None:
    profile, output = tmp_path / "cpu.yaml", tmp_path / "report.json"
    profile.write_text(_PROFILE)
    code, value, said = _check(
        "--checkpoint", str(make(*OPTIONS)), "--profile", str(profile), "--soak", "4s",
        "--output", str(output), "--", "--enforce-eager", "--shutdown-timeout", "60",
    )  # fmt: skip
    by_name = {f["name"]: f for f in value["findings"]}
    assert code == 0, "\n".join(
        f"{f['name']}: {f['detail']}" for f in value["findings"] if f["status"] == "FAIL"
    )
    assert value["passed"] and json.loads(output.read_text())["passed"]
    skipped = {name for name, f in by_name.items() if f["status"] == "SKIP"}
    assert skipped <= {
        "chat template", "tool calls", "JSON mode", "a prompt of 4,096 tokens", "memory of the GPUs",
        "KV cache as planned", "the gateway limits the rate", "filters stop what they must",
        "memory over time",
    }  # fmt: skip
    # vLLM's health stays good while it ends, and a busy machine may delay this program
    warned = {name for name, f in by_name.items() if f["status"] == "WARN"}
    assert warned <= {
        "not ready while it ends", "the client keeps up", "disk room of temporary files",
        "answers are streamed", "requests at a time within the limits",
    }, warned  # fmt: skip
    assert by_name["log-probabilities, 32 at a time"]["value"] > 0
    drained = by_name["requests under way are finished"]
    assert drained["value"] == drained["threshold"] > 10  # as many as some seconds bring on this machine
    assert "Kernel" in by_name["kernels as planned"]["detail"] and value["kv_cache_tokens"] > 1024
    assert 0 < by_name["starts again"]["value"] < 600


def test_a_killed_serve_takes_its_server_along(make: Callable[..., Path], vllm_python: str) -> None:
    path = make(*OPTIONS)
    process = _start(path)
    assert process.stderr is not None
    for line in process.stderr:
        if "Initializing a V1 LLM engine" in line:
            break
    members = psutil.Process(process.pid).children(recursive=True)
    assert len(members) > 2  # a watcher, the server, its engine
    process.kill()
    process.communicate(timeout=60)
    assert left_alive(members, 60) == []


def test_verify_compares_in_vllm_and_sees_what_only_values_tell(
    make: Callable[..., Path], vllm_python: str
) -> None:
    path = make(*OPTIONS)
    command = [
        sys.executable,
        str(ROOT / "quantize.py"),
        "verify",
        str(path),
        "--vllm",
        vllm_python,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["passed"] and value["vllm"]["passed"]
    assert 0 < value["vllm"]["deviation"] <= value["vllm"]["limit"]
    assert value["vllm"]["generated"] == 384


def test_a_start_that_fails_says_why_and_quotes_the_log(make: Callable[..., Path], vllm_python: str) -> None:
    path = make(*OPTIONS)
    process = _start(path, "-q", "--", "--quantization", "awq")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "vLLM ended with status 1 before it was ready" in err
    assert "(compressed-tensors) does not match the quantization method" in err
    assert "  | " in err and "Traceback" not in err.partition("  | ")[0]
    assert json.loads(out)["exit_code"] == 1


def test_a_port_in_use_is_named_before_anything_starts(make: Callable[..., Path], vllm_python: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / "deploy_vllm.py"),
                "serve",
                "-m",
                str(make(*OPTIONS)),
                "--port",
                str(port),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert re.search(rf"--port {port} of 127.0.0.1 is in use by another program", done.stderr)
    assert "INFO" not in done.stderr  # vLLM, which has not been started, says more


def test_a_python_without_vllm_is_named(make: Callable[..., Path], vllm_python: str) -> None:
    process = _start(make(*OPTIONS), "--vllm-python", sys.executable)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "has no vLLM" in err and "--vllm-python" in err


@pytest.mark.skipif(EXACT_INT8, reason="int8 products are exact on this CPU")
def test_verify_says_that_products_overflow(make: Callable[..., Path], vllm_python: str) -> None:
    path = make("--scheme", "w8a8-int8", "--method", "minmax", "--outlier-suppression", "none")
    command = [sys.executable, str(ROOT / "quantize.py"), "verify", str(path), "--vllm", vllm_python]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 4, done.stderr
    assert "no VNNI" in done.stderr and "another machine" in done.stderr
