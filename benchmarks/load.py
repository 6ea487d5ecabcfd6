#!/usr/bin/env python3
"""The load test's client: how many streams it drives, and its figures beside vLLM's own ``bench serve`` (and
guidellm's) on one server, in turn.

    python benchmarks/load.py --streams 100,250,500
    python benchmarks/load.py --url http://127.0.0.1:8000 --vllm-python PYTHON [--guidellm-python PYTHON]

Streams: a server of its own process sends 20 tokens a second to each, with the moment of sending in every
token; the client's delay is from there to where its arrival is noted, on one core. Pairs: each program loads
the same server with the same lengths, one after another, and ratios are taken turn by turn.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time

from common import ROOT, last_json, machine, run

sys.path.insert(0, str(ROOT))

from quant.serving.client import Endpoint, Prompt, ask  # noqa: E402
from quant.serving.load import watched  # noqa: E402

_RATE = 20
_FIGURES = ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "output_throughput")


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


def pairs(a: argparse.Namespace) -> None:
    tools = {"quant": None, "vllm": a.vllm_python, "guidellm": a.guidellm_python}
    shape = ["--input-tokens", str(a.input_tokens), "--output-tokens", str(a.output_tokens)]
    ratios: dict[tuple[str, str], list[float]] = {}
    for turn in range(a.repeat):
        rows = {}
        for tool, python in tools.items():
            if tool != "quant" and python is None:
                continue
            command = [
                sys.executable,
                ROOT / "deploy_vllm.py",
                "bench",
                "--url",
                a.url,
                "--json",
                "-q",
                *shape,
            ]
            command += [
                "--concurrency",
                str(a.concurrency),
                "--requests",
                str(a.requests),
                "--seed",
                str(turn),
            ]
            command += [] if tool == "quant" else ["--tool", tool, "--tool-python", python]
            rows[tool] = last_json(run(command).output)["targets"][0]["levels"][0]
            print(f"  {tool}: " + ", ".join(f"{k} {rows[tool][k]:.2f}" for k in _FIGURES), flush=True)
        for tool in rows.keys() - {"quant"}:
            for key in _FIGURES:
                ratios.setdefault((tool, key), []).append(rows["quant"][key] / rows[tool][key])
    for (tool, key), values in sorted(ratios.items()):
        print(f"{key}: quant / {tool} {statistics.median(values):.3f} (median of {len(values)} pairs)")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--streams", default="", help="such as 100,250,500")
    p.add_argument("--seconds", type=float, default=5.0)
    p.add_argument("--url"), p.add_argument("--vllm-python"), p.add_argument("--guidellm-python")
    p.add_argument("--concurrency", type=int, default=4)
    p.add_argument("--requests", type=int, default=64)
    p.add_argument("--repeat", type=int, default=5)
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
    if a.url:
        pairs(a)


if __name__ == "__main__":
    main()
