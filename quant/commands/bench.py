"""``quant-deploy bench``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant.commands import options
from quant.commands.options import together
from quant.commands.terminal import Output, common_options
from quant.commands.types import PATH, FiniteRange, TokenCount
from quant.errors import UsageError

if TYPE_CHECKING:
    from quant.serving.bench import BenchRequest, TargetResult
    from quant.serving.client import Endpoint

#: Where an endpoint is and how it is asked.
endpoint_options = together(
    options.served_model,
    click.option("--chat", is_flag=True, help="Ask /v1/chat/completions instead of /v1/completions."),
    options.api_key_env,
    options.certificates,
    options.stall,
)


@click.command()
@click.option("--url", "urls", multiple=True, help="Endpoint, such as http://127.0.0.1:8000; repeatable.")
@options.model_path(required=False, many="checkpoints")
@endpoint_options
@click.option(
    "--concurrency",
    metavar="N,…",
    show_default="twice as many each time until it gains nothing",
    help="Requests at a time; with --rate the most under way.",
)
@click.option(
    "--rate", metavar="R,…", help="Requests a second whatever is answered; latencies count from the plan."
)
@click.option(
    "--arrivals",
    type=click.Choice(["poisson", "constant"]),
    default="poisson",
    show_default=True,
    help="Gaps between the requests of --rate.",
)
@click.option(
    "--requests", type=click.IntRange(1), show_default="8 for each at a time, at least 50", help="Per load."
)
@click.option(
    "--warm-up", type=click.IntRange(0), default=4, show_default=True, help="Requests before, not counted."
)
@click.option(
    "--input-tokens",
    default="512",
    show_default=True,
    help="Tokens of a prompt: 512, 128-1024, lognormal:512:0.5 (median, sigma).",
)
@click.option("--output-tokens", default="128", show_default=True, help="Tokens of an answer, likewise.")
@click.option("--prompts", type=PATH, help="File of prompts: one a line, or .jsonl with prompt or messages.")
@click.option("--text", type=PATH, show_default="the bundled one", help="Text to cut prompts from.")
@click.option(
    "--shared-prefix", type=TokenCount(0), default=0, show_default=True, help="Tokens all prompts share."
)
@click.option("--stop-at-eos", is_flag=True, help="Let answers end by themselves.")
@click.option("--temperature", type=FiniteRange(0), default=0.0, show_default=True, help="Of sampling.")
@click.option(
    "--goodput", metavar="LIMITS", help="Limits a good request keeps, in ms: ttft:500,tpot:50,e2el:5000."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and arrivals.")
@click.option(
    "--tool",
    type=click.Choice(["vllm", "guidellm", "aiperf"]),
    help="Load with this tool instead of our own client, and report its figures.",
)
@click.option("--tool-python", type=PATH, show_default="--vllm-python's", help="Python that has the tool.")
@options.vllm_python
@options.start_timeout
@click.option("--output", type=PATH, help="Folder for bench.json, bench.csv and bench.html.")
@options.gpu
@common_options
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_ARGUMENTS...]")
def bench(
    out: Output,
    urls: tuple[str, ...],
    checkpoints: tuple[Path, ...],
    output: Path | None,
    tool: str | None,
    tool_python: Path | None,
    **given: Any,
) -> None:
    """Load test of endpoints, or of checkpoints that it starts vLLM on: TTFT, time per token, throughput,
    percentiles with their confidence, the knee, a page with curves. Definitions are vLLM's.

    \b
    quant-deploy bench --url http://127.0.0.1:8000 --concurrency 1,4,16 --output load
    quant-deploy bench -m out/a -m out/b --concurrency 8 --goodput ttft:500,tpot:50
    """
    if not urls and not checkpoints:
        raise UsageError("give --url of an endpoint, or --model-path of a checkpoint to start vLLM on")
    results: list[TargetResult] = []
    with out.progress("starting") as progress:  # what is imported takes seconds on a busy machine
        from quant.commands.render import bench as render
        from quant.serving.bench import failed_everywhere, prepare_folder, result_of, write_results

        request = _request(given)
        prepare_folder(output)
        for name, endpoint, facts, stack in _targets(out, urls, checkpoints, given):
            with stack:
                if tool is not None:
                    from quant.serving.tools import run_tool

                    python = tool_python or given["vllm_python"]
                    results.append(
                        run_tool(tool, python, endpoint, request, name=name, facts=facts, progress=progress)
                    )
                else:
                    from quant.serving.bench import bench_endpoint

                    results.append(
                        bench_endpoint(endpoint, request, name=name, facts=facts, progress=progress)
                    )
    value = result_of(results, request) | {"tool": tool or "quant"}
    if output is not None:
        value["files"] = [str(p) for p in write_results(output, value)]
    out.result(value, lambda console: render.bench(console, value))
    for r in results:
        for note in r.notes:
            out.warn(f"{r.name}: {note}" if len(results) > 1 else note)
    if (error := failed_everywhere(results)) is not None:
        raise error


def _numbers(text: str | None, what: str, whole: bool) -> list[float]:
    """A list such as ``1,4,16``.

    Raises:
        UsageError: something in it is no positive number.
    """
    values = []
    for part in [] if text is None else text.split(","):
        try:
            value = float(int(part)) if whole else float(part)
        except ValueError:
            value = math.nan
        if not 0 < value < 1e9:
            kind = "whole numbers" if whole else "numbers"
            raise UsageError(f"{what} is {text!r}: positive {kind} are needed, such as 1,4,16")
        values.append(value)
    return values


def _request(given: dict[str, Any]) -> BenchRequest:
    from quant.serving.bench import BenchRequest, check_concurrency
    from quant.serving.load import Level
    from quant.serving.measures import Lengths, parse_limits
    from quant.serving.prompts import PromptRequest, read_prompts

    concurrency = [int(c) for c in _numbers(given["concurrency"], "--concurrency", True)]
    rates = _numbers(given["rate"], "--rate", False)
    if rates and len(concurrency) > 1:
        raise UsageError(
            f"--concurrency is {given['concurrency']!r} and --rate is given: with a rate it is one number, "
            "the most requests under way"
        )
    poisson = given["arrivals"] == "poisson"
    levels = tuple(
        [Level(concurrency[0] if concurrency else None, r, poisson) for r in rates]
        or [Level(concurrency=c) for c in concurrency]
    )
    check_concurrency(levels)
    if given["prompts"] is not None:
        read_prompts(given["prompts"])  # before a server is started for them
    prompts = PromptRequest(
        Lengths.parse(given["input_tokens"], "--input-tokens"),
        Lengths.parse(given["output_tokens"], "--output-tokens"),
        given["prompts"],
        given["text"],
        given["shared_prefix"],
        given["seed"],
    )
    request = BenchRequest(
        prompts,
        levels,
        given["requests"],
        given["warm_up"],
        {} if given["goodput"] is None else parse_limits(given["goodput"]),
        {"temperature": given["temperature"]},
        not given["stop_at_eos"],
    )
    for level in levels:
        if level.rate is not None and (days := request.count(level) / level.rate / 86400) > 1:
            raise UsageError(
                f"--rate is {level.rate:g}: {request.count(level)} requests take {days:,.0f} days: ask for "
                "more a second, or for fewer --requests"
            )
    return request


def endpoint_of(url: str, given: Mapping[str, Any]) -> Endpoint:
    """The endpoint that options describe."""
    from quant.serving.client import Endpoint, api_key, endpoint_url

    return Endpoint(
        endpoint_url(url),
        given["model"] or "",
        given["chat"],
        api_key(given["api_key_env"]),
        str(given["ca"]) if given["ca"] else None,
        given["insecure"],
        given["stall"],
    )


def _targets(
    out: Output, urls: Sequence[str], checkpoints: Sequence[Path], given: dict[str, Any]
) -> Iterator[tuple[str, Endpoint, dict[str, Any], ExitStack]]:
    """Each endpoint with its name and facts; leaving the stack stops what was started for it."""
    from quant.serving.bench import checkpoint_facts
    from quant.serving.deployment import DeploymentRequest, plan
    from quant.serving.process import running

    endpoints = [endpoint_of(url, given) for url in urls]  # every address is checked before the first load
    deployments = [
        plan(
            path,
            DeploymentRequest(
                gpu=given["gpu"], port=0, api_key_env=given["api_key_env"], extra=given["extra"]
            ),
        )
        for path in checkpoints
    ]
    for endpoint in endpoints:
        yield endpoint.url.partition("://")[2], endpoint, {}, ExitStack()
    for path, deployment in zip(checkpoints, deployments, strict=True):
        stack = ExitStack()
        out.note(f"starting vLLM on {path}")
        server, installation = stack.enter_context(
            running(
                deployment,
                python=given["vllm_python"],
                timeout=given["timeout"],
                log=lambda line: out.details([line]),
            )
        )
        facts = checkpoint_facts(path) | {
            "load_seconds": server.load_seconds,
            "kv_cache_tokens": server.kv_cache_tokens(),
            "vllm_version": installation.version,
        }
        endpoint = replace(endpoint_of(server.url, given), model=server.name, api_key=server.api_key)
        yield path.name, endpoint, facts, stack
