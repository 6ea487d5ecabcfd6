"""Load tests by other well-kept tools, each run in a child process of its own environment, and their results
read into the same report.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import QuantError, UsageError, clipped
from quant.progress import Event, Progress, silent
from quant.serving.bench import BenchRequest, TargetResult
from quant.serving.client import Endpoint
from quant.serving.load import Level
from quant.serving.measures import PERCENTILES

_METRICS = ("ttft", "tpot", "itl", "e2el")


#: Stands for the endpoint's key in a tool's arguments.
_KEY = "{api-key}"


@dataclass(frozen=True)
class Job:
    """One load as a tool is asked for it."""

    endpoint: Endpoint
    request: BenchRequest
    level: Level
    requests: int
    tokenizer: str
    folder: Path

    @property
    def lengths(self) -> tuple[int, int]:
        """Input and output tokens, which must be fixed: each tool has a way of its own to vary them.

        Raises:
            UsageError: a distribution was asked for.
        """
        asked = self.request.prompts.input_tokens, self.request.prompts.output_tokens
        if any(lengths.kind != "fixed" for lengths in asked):
            raise UsageError("--tool takes fixed --input-tokens and --output-tokens, such as 512 and 128")
        return int(asked[0].low), int(asked[1].low)


#: The parts of vLLM's ``bench serve`` alone: its own command asks for a package's name that some builds lack.
_VLLM_BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


def _vllm_command(job: Job) -> list[str]:
    given, made = job.lengths
    command = [
        "-c", _VLLM_BENCH, "--base-url", job.endpoint.url,
        "--backend", "openai-chat" if job.endpoint.chat else "openai",
        "--endpoint", job.endpoint.route.removeprefix(job.endpoint.url),
        "--model", job.tokenizer, "--served-model-name", job.endpoint.model, "--tokenizer", job.tokenizer,
        "--dataset-name", "random", "--random-input-len", str(given), "--random-output-len", str(made),
        "--num-prompts", str(job.requests), "--num-warmups", str(job.request.warm_up),
        "--seed", str(job.request.prompts.seed), "--percentile-metrics", ",".join(_METRICS),
        "--metric-percentiles", ",".join(map(str, PERCENTILES)),
        "--save-result", "--result-dir", str(job.folder), "--result-filename", "result.json",
        *[f"--{k.replace('_', '-')}={v}" for k, v in job.request.sampling.items() if k == "temperature"],
    ]  # fmt: skip
    if job.level.concurrency is not None:
        command += ["--max-concurrency", str(job.level.concurrency)]
    if job.level.rate is not None:
        command += ["--request-rate", str(job.level.rate)]
        command += [] if job.level.poisson else ["--burstiness", "1e6"]
    if job.request.ignore_eos:
        command.append("--ignore-eos")
    if job.request.limits:
        command += ["--goodput", *(f"{k}:{v:g}" for k, v in job.request.limits.items())]
    return command


def _vllm_result(job: Job) -> dict[str, Any]:
    found = json.loads((job.folder / "result.json").read_text())
    value = {k: v for k, v in found.items() if not isinstance(v, (list, dict))}
    errors = {"failed": int(value["failed"])} if value.get("failed") else {}
    return value | {"errors": errors}


#: Runs a tool that takes the key in its arguments alone: from the environment, so that no list of processes
#: shows it.
_KEYED = (
    "import os, runpy, sys; key = os.environ['OPENAI_API_KEY']; "
    f"sys.argv = [w.replace('{_KEY}', key) for w in sys.argv]; "
    "sys.argv[0] = sys.argv.pop(1); runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def _module(name: str, job: Job) -> list[str]:
    """How a tool's package is run."""
    return ["-c", _KEYED, name] if job.endpoint.api_key else ["-m", name]


def _guidellm_command(job: Job) -> list[str]:
    """Of guidellm 0.8, whose options are kinds with settings."""
    given, made = job.lengths
    profile: dict[str, Any] = {"kind": "concurrent", "streams": job.level.concurrency}
    if job.level.rate is not None:
        profile = {"kind": "poisson" if job.level.poisson else "constant", "rate": job.level.rate}
        profile |= {} if job.level.concurrency is None else {"max_concurrency": job.level.concurrency}
    settings: dict[str, dict[str, Any]] = {
        "backend": {
            "kind": "openai_http", "target": job.endpoint.url, "model": job.endpoint.model,
            "request_format": job.endpoint.route.removeprefix(job.endpoint.url),
            "verify": not job.endpoint.insecure,
            "extras": {"body": dict(job.request.sampling)},
            **({"api_key": _KEY} if job.endpoint.api_key else {}),
        },
        "profile": profile,
        "constraint": {"kind": "max_requests", "count": job.requests},
        "tokenizer": {"kind": "huggingface_auto", "model": job.tokenizer},
        "data": {"kind": "synthetic_text", "prompt_tokens": given, "output_tokens": made},
        "seed": {"kind": "static", "value": job.request.prompts.seed},
        "output": {"kind": "json", "path": str(job.folder / "guidellm.json")},
    }  # fmt: skip
    words = [w for name, value in settings.items() for w in (f"--{name}", json.dumps(value))]
    return [*_module("guidellm", job), "run", *words, "--disable-console"]


def _guidellm_result(job: Job) -> dict[str, Any]:
    found = json.loads((job.folder / "guidellm.json").read_text())["benchmarks"][0]
    metrics = found["metrics"]

    def figures(name: str, key: str, unit: float) -> dict[str, float]:
        part = metrics[key]["successful"]
        at = part["percentiles"]
        return {
            f"mean_{name}_ms": unit * part["mean"],
            f"std_{name}_ms": unit * part["std_dev"],
            f"median_{name}_ms": unit * part["median"],
            **{f"p{p}_{name}_ms": unit * at[f"p{p}"] for p in PERCENTILES},
        }

    totals = metrics["request_totals"]
    return {
        "duration": found.get("duration"),
        "num_prompts": totals["total"],
        "completed": totals["successful"],
        "failed": totals["errored"],
        "total_input_tokens": int(metrics["prompt_token_count"]["successful"]["total_sum"]),
        "total_output_tokens": int(metrics["output_token_count"]["successful"]["total_sum"]),
        "errors": {"failed": totals["errored"]} if totals["errored"] else {},
        "request_throughput": metrics["requests_per_second"]["successful"]["mean"],
        "output_throughput": metrics["output_tokens_per_second"]["successful"]["mean"],
        **figures("ttft", "time_to_first_token_ms", 1.0),
        **figures("itl", "inter_token_latency_ms", 1.0),
        # guidellm's own time_per_output_token divides whole answers by all tokens; its inter-token latency
        # is what others call TPOT: (last - first) / (n - 1) of a request, once for each of its tokens
        **figures("tpot", "inter_token_latency_ms", 1.0),
        **figures("e2el", "request_latency", 1000.0),
    }


def _aiperf_command(job: Job) -> list[str]:
    given, made = job.lengths
    load = [] if job.level.concurrency is None else ["--concurrency", str(job.level.concurrency)]
    if job.level.rate is not None:
        load += ["--request-rate", str(job.level.rate)]
        load += ["--request-rate-mode", "poisson" if job.level.poisson else "constant"]
    ending = [w for key in ("ignore_eos:true", f"min_tokens:{made}") for w in ("--extra-inputs", key)]
    return [
        *_module("aiperf", job), "profile", "--url", job.endpoint.url, "--model", job.endpoint.model,
        "--streaming",
        "--endpoint-type", "chat" if job.endpoint.chat else "completions", *load,
        "--request-count", str(job.requests), "--warmup-request-count", str(max(job.request.warm_up, 1)),
        "--isl", str(given), "--osl", str(made), *(ending if job.request.ignore_eos else []),
        "--tokenizer", job.tokenizer, "--artifact-dir", str(job.folder), "--ui", "none",
        "--use-server-token-count", "--random-seed", str(job.request.prompts.seed),
        *[w for k, v in job.request.sampling.items() if k == "temperature"
          for w in ("--extra-inputs", f"{k}:{v:g}")],
        *(("--api-key", _KEY) if job.endpoint.api_key else ()),
    ]  # fmt: skip


def _aiperf_result(job: Job) -> dict[str, Any]:
    found = json.loads((job.folder / "profile_export_aiperf.json").read_text())  # warm-up's is in a folder

    def figures(name: str, key: str) -> dict[str, float]:
        part = found[key]
        return {
            f"mean_{name}_ms": part["avg"],
            f"std_{name}_ms": part["std"],
            f"median_{name}_ms": part["p50"],
            **{f"p{p}_{name}_ms": part[f"p{p}"] for p in PERCENTILES},
        }

    def total(key: str) -> int | None:
        value = (found.get(key) or {}).get("avg")
        return None if value is None else int(value)

    # without an error there is no count of them; without the endpoint's usage no count of tokens is known
    failed, done = total("error_request_count") or 0, int(found["request_count"]["avg"])
    return {
        "duration": (found.get("benchmark_duration") or {}).get("avg"),
        "num_prompts": done + failed,
        "completed": done,
        "total_input_tokens": total("total_usage_prompt_tokens"),
        "total_output_tokens": total("total_usage_completion_tokens"),
        "failed": failed,
        "errors": {"failed": failed} if failed else {},
        "request_throughput": found["request_throughput"]["avg"],
        "output_throughput": found["output_token_throughput"]["avg"],
        **figures("ttft", "time_to_first_token"),
        **figures("itl", "inter_token_latency"),
        **figures("tpot", "inter_token_latency"),  # per request (last - first) / (n - 1), as TPOT is here
        **figures("e2el", "request_latency"),
    }


#: Tool → the words behind its Python for a load, and how its result is read.
TOOLS: dict[str, tuple[Callable[[Job], list[str]], Callable[[Job], dict[str, Any]]]] = {
    "vllm": (_vllm_command, _vllm_result),
    "guidellm": (_guidellm_command, _guidellm_result),
    "aiperf": (_aiperf_command, _aiperf_result),
}


def run_tool(
    tool: str,
    python: str | Path | None,
    endpoint: Endpoint,
    request: BenchRequest,
    *,
    name: str = "",
    facts: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> TargetResult:
    """Loads an endpoint with another tool.

    Args:
        python: interpreter that has the tool; None: the one of QUANT_VLLM_PYTHON, or this.

    Raises:
        UsageError: no load is stated, or the tool cannot do what is asked.
        QuantError: it is not there, fails, or its result cannot be read.
    """
    if not request.levels:
        raise UsageError("--tool takes loads that are stated: give --concurrency or --rate")
    if request.prompts.file is not None or request.prompts.shared_prefix:
        raise UsageError("--tool makes prompts of its own: leave --prompts and --shared-prefix out")
    from quant.serving.installation import default_python

    chosen = str(python or default_python())
    endpoint, root = _resolved(endpoint)
    levels = []
    for level in request.levels:
        with tempfile.TemporaryDirectory(prefix="quant-bench-") as folder:
            job = Job(endpoint, request, level, request.count(level), root, Path(folder))
            progress(Event(f"{tool}: {level}", detail=f"{job.requests} requests"))
            levels.append(_one(tool, chosen, job))
    return TargetResult(
        name or endpoint.model, endpoint, tuple(levels), facts or {}, (f"measured by {tool}",)
    )


def _resolved(endpoint: Endpoint) -> tuple[Endpoint, str]:
    """The endpoint with its model's name, and the tokenizer to take: the checkpoint that it serves where it
    tells its path, else the model's name."""
    import asyncio

    from quant.serving.client import get_json, resolve

    async def ask() -> tuple[Endpoint, str]:
        async with endpoint.client() as client:
            known = await resolve(client, endpoint)
            listed = await get_json(client, known, "/v1/models")
            own: dict[str, Any] = next((m for m in listed["data"] if m.get("id") == known.model), {})
            return known, str(own.get("root") or known.model)

    return asyncio.run(ask())


def _environment(tool: str, job: Job) -> dict[str, str]:
    """This process's, in which no hub is asked, but by aiperf with a tokenizer on this machine, which offline
    looks for a folder in the hub's cache alone.

    Raises:
        UsageError: the caller has forbidden what aiperf needs.
    """
    own = os.environ.get("HF_HUB_OFFLINE")
    if tool != "aiperf" or not Path(job.tokenizer).is_dir():
        return {"HF_HUB_OFFLINE": "1", **os.environ}
    if own is not None and own.strip().upper() in ("1", "ON", "YES", "TRUE"):  # as the hub's package reads it
        raise UsageError(
            f"--tool is aiperf, and HF_HUB_OFFLINE is {own!r}: with it, aiperf finds no tokenizer in a "
            f"folder ({job.tokenizer}): unset HF_HUB_OFFLINE for this command, or take --tool "
            "vllm or guidellm"
        )
    return {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}


def _one(tool: str, python: str, job: Job) -> dict[str, Any]:
    command, read = TOOLS[tool]
    words = [python, *command(job)]
    environment = _environment(tool, job)
    if Path(python).absolute() != Path(sys.executable).absolute():
        environment.pop("PYTHONPATH", None)
    if job.endpoint.api_key:
        environment["OPENAI_API_KEY"] = job.endpoint.api_key
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=environment)
    except OSError as error:
        raise UsageError(f"--tool-python is {python!r}: it does not run: {error.strerror}") from error
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-8:]
        raise QuantError(
            f"{tool} ended with status {done.returncode}; give the Python that has it with --tool-python:\n"
            + "\n".join(f"  {line}" for line in said)
            + f"\n  its command: {shlex.join(words)}"
        )
    try:
        value = read(job)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise QuantError(
            f"{tool}'s result is not in a form that is known here ({type(error).__name__}: "
            f"{clipped(str(error))}): its release may be newer"
        ) from error
    level = {"text": str(job.level), "concurrency": job.level.concurrency, "rate": job.level.rate}
    empty = {
        "output_throughput_ci95": None, "request_goodput": None, "server": None,
        "client": {"p99_delay_ms": None, "cpu_share": None, "saturated": False},
    }  # fmt: skip
    return {"level": level, **empty, **value}
