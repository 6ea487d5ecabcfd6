#!/usr/bin/env python3
"""The load test's client: how many streams it drives, and its figures beside vLLM's own ``bench serve`` (and
guidellm's) on one server, in turn.

    python benchmarks/load.py --streams 100,250,500
    python benchmarks/load.py --model-path CHECKPOINT --vllm-python PYTHON [--guidellm-python PYTHON]

Streams: a server of its own process sends 20 tokens a second to each, with the moment of sending in every
token; the client's delay is from there to where its arrival is noted, on one core. Pairs: each program loads
the same server with the same lengths, one after another, and ratios are taken turn by turn.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from common import ROOT, machine

sys.path.insert(0, str(ROOT))

from quant.serving.bench import BenchRequest, bench_endpoint  # noqa: E402
from quant.serving.client import Endpoint, Prompt, ask  # noqa: E402
from quant.serving.load import Level, watched  # noqa: E402
from quant.serving.measures import Lengths, percentile_interval  # noqa: E402
from quant.serving.prompts import PromptRequest  # noqa: E402
from quant.serving.tools import TOOLS, Job, _resolved  # noqa: E402

_RATE = 20
_FIGURES = ("median_ttft_ms", "median_tpot_ms", "median_e2el_ms", "output_throughput")


def echo(port: int) -> None:
    """Streams of tokens, each the time at which it was sent."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length"))
        body = json.loads(await reader.readexactly(int(length.split(b":")[1])))
        kind = b"content-type: text/event-stream\r\ntransfer-encoding: chunked"
        writer.write(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\n\r\n")
        begun = time.perf_counter()
        for i in range(body["max_tokens"]):
            await asyncio.sleep(max(0.0, begun + (i + 1) / _RATE - time.perf_counter()))
            finish = "length" if i == body["max_tokens"] - 1 else None
            choice = {"index": 0, "text": f"{time.perf_counter():.6f};", "finish_reason": finish}
            event = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "choices": [choice]}
            data = b"data: %s\n\n" % json.dumps(event).encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    asyncio.run(main())


async def drive(port: int, streams: int, seconds: float) -> None:
    """Streams that start within one second; prints how late the client noted their tokens."""
    endpoint, prompt = Endpoint(f"http://127.0.0.1:{port}", "m"), Prompt("x", 1, int(seconds * _RATE))

    async def one(number: int) -> list[float]:
        await asyncio.sleep(number / streams)
        trace = await ask(client, endpoint, prompt)
        if trace.error:
            raise SystemExit(f"{trace.error}: {trace.detail}")
        sent = [float(t) for t in trace.text.split(";") if t]
        return [noted - at for at, noted in zip(sent, trace.stamps, strict=True)]

    async with endpoint.client() as client, watched() as health:
        late = [x for per_stream in await asyncio.gather(*map(one, range(streams))) for x in per_stream]
    late.sort()
    p50, p99 = (1000 * late[int(share * (len(late) - 1))] for share in (0.5, 0.99))
    print(
        f"{streams} streams at {_RATE} tokens/s: tokens noted {p50:.2f} ms (P50), {p99:.2f} ms (P99) late; "
        f"own loop {1000 * health.p99:.2f} ms (P99) late, {health.cpu_share:.0%} of a core"
        f"{': says it is saturated' if health.saturated else ''}",
        flush=True,
    )


@contextmanager
def served(model: Path, python: str) -> Iterator[str]:
    """vLLM on a checkpoint by this checkout's own ``serve``; the address that it answers at."""
    command = [sys.executable, ROOT / "deploy_vllm.py", "serve", "-m", model, "--port", "0", "--json", "-q"]
    command += ["--vllm-python", python, "--", "--enforce-eager"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM did not start on {model}")
        yield json.loads(line)["url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


#: Another program's own command, again for every line of arguments: it is imported once, so that turns are
#: seconds apart and what drifts on the machine is the same for both.
_STAYS = {
    "vllm": "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser(); add_cli_args(parser)\n"
    "command = lambda words: main(parser.parse_args(words))\n",
    "guidellm": "from guidellm.__main__ import cli\n"
    "command = lambda words: cli(words, standalone_mode=False)\n",
}
_LOOP = """
import contextlib, json, os, sys
told = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    try:
        command(json.loads(line)); said = ""
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said), file=told, flush=True)
"""


@contextmanager
def staying(tool: str, python: str) -> Iterator[Callable[[Job], dict]]:
    """Loads as another program makes them."""
    words, read = TOOLS[tool]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [python, "-c", _STAYS[tool] + _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process,
    ):

        def load(job: Job) -> dict:
            arguments = words(job)[2:]  # what follows -c PROGRAM, or -m MODULE
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
            if json.loads(said or '"it ended"'):
                log.seek(0)
                raise SystemExit(f"{tool}: {said}\n{log.read()[-2000:]}")
            return read(job)

        try:
            yield load
        finally:
            process.stdin.close()


def ours(job: Job) -> dict:
    """The same load by our own client."""
    request = replace(job.request, levels=(job.level,), requests=job.requests)
    return bench_endpoint(job.endpoint, request).levels[0]


def pairs(a: argparse.Namespace, url: str) -> None:
    """Each turn every program, the first of one turn the last of the next, each with prompts that are new."""
    lengths = [Lengths("fixed", float(n), float(n)) for n in (a.input_tokens, a.output_tokens)]
    endpoint, root = _resolved(Endpoint(url))
    pythons = {"vllm": a.vllm_python, "guidellm": a.guidellm_python}
    with ExitStack() as stack:
        tools = {"quant": ours}
        tools |= {t: stack.enter_context(staying(t, python)) for t, python in pythons.items() if python}
        for concurrency in map(int, a.concurrency.split(",")):
            rows: dict[str, list[dict]] = {tool: [] for tool in tools}
            for turn in range(-1, a.repeat):  # the first is no pair: programs make their connections in it
                for tool in list(tools)[:: 1 if turn % 2 == 0 else -1]:
                    # the seed of each turn is another, or prompts would be in the server's cache
                    asked = PromptRequest(*lengths, seed=a.seed + 100 * concurrency + turn + 1)
                    with tempfile.TemporaryDirectory() as folder:
                        level = Level(concurrency=concurrency)
                        request = BenchRequest(asked, (), None, a.warm_up)
                        job = Job(endpoint, request, level, a.requests, root, Path(folder))
                        row = tools[tool](job)
                    done, made = row["completed"], row["total_output_tokens"]
                    if done < 0.9 * a.requests or made != done * a.output_tokens:
                        raise SystemExit(f"{tool}: {done} of {a.requests} answered, {made} tokens")
                    rows[tool] += [row] if turn >= 0 else []
            compared(f"{concurrency} at a time", rows)


def compared(level: str, rows: dict[str, list[dict]]) -> None:
    """Medians of the programs, and of the quotients turn by turn with the interval that holds it by 95 %."""
    for tool, found in rows.items():
        medians = ", ".join(f"{k} {statistics.median(row[k] for row in found):.2f}" for k in _FIGURES)
        print(f"{level}, {tool}: {medians}", flush=True)
    for tool in rows.keys() - {"quant"}:
        for key in _FIGURES:
            both = zip(rows["quant"], rows[tool], strict=True)
            quotients = sorted(mine[key] / theirs[key] for mine, theirs in both)
            ranks = percentile_interval(len(quotients), 50) or (0, len(quotients) - 1)
            low, high = (quotients[r] for r in ranks)
            print(
                f"{level}, {key}: quant / {tool} {statistics.median(quotients):.3f} "
                f"({low:.3f} to {high:.3f}, {len(quotients)} pairs)",
                flush=True,
            )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--streams", default="", help="such as 100,250,500")
    p.add_argument("--seconds", type=float, default=5.0)
    p.add_argument("--url", help="a server that runs")
    p.add_argument("--model-path", type=lambda p: Path(p).resolve(), help="a checkpoint to serve instead")
    p.add_argument("--vllm-python"), p.add_argument("--guidellm-python")
    p.add_argument("--concurrency", default="1,4,16")
    p.add_argument("--seed", type=int, default=0, help="of the first turn's prompts")
    p.add_argument("--requests", type=int, default=32)
    p.add_argument("--repeat", type=int, default=15)
    p.add_argument("--warm-up", type=int, default=4)
    p.add_argument("--input-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=32)
    a = p.parse_args()
    print(machine(), flush=True)
    if a.streams:
        port = 20000 + os.getpid() % 10000
        server = multiprocessing.get_context("spawn").Process(target=echo, args=(port,), daemon=True)
        server.start()
        time.sleep(2)
        for streams in map(int, a.streams.split(",")):
            asyncio.run(drive(port, streams, a.seconds))
        server.terminate()
    if a.model_path:
        if not a.vllm_python:
            raise SystemExit("--model-path needs --vllm-python to serve it")
        with served(a.model_path, a.vllm_python) as url:
            pairs(a, url)
    elif a.url:
        pairs(a, a.url)


if __name__ == "__main__":
    main()
