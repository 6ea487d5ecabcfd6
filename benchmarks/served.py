#!/usr/bin/env python3
"""Is what vLLM serves what we measured? Perplexity as vLLM computes it, of the source, of our packed
checkpoint and of the same values as `plain`.

    python benchmarks/served.py --vllm-python PYTHON [--model MODEL] [--chunks 64]

The packed and the plain checkpoint hold the same values, so their chunks must agree to the rounding of bf16
kernels; our own evaluator, in fp32, gives the same rise over the source.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from common import ROOT, last_json, machine, quantize_command, run

SHARED = ROOT.parent / "shared"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vllm-python", required=True)
    p.add_argument("--model", type=lambda p: Path(p).resolve(), default=SHARED / "data/models/tinylm-11m")
    p.add_argument("--bench", type=lambda p: Path(p).resolve(), default=SHARED / "bench")
    p.add_argument(
        "--text", type=lambda p: Path(p).resolve(), default=SHARED / "data/text/wikitext-2/test.txt"
    )
    p.add_argument("--chunks", default="64")
    a = p.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        gptq = ["--method", "gptq", "--sequence-length", "512"]
        checkpoints = {"source": a.model}
        for name, options in {
            "packed W4 g128": gptq,
            "gptq-format W4 g128": [*gptq, "--format", "gptq"],
            "plain W4 g128": [*gptq, "--format", "plain"],
        }.items():
            checkpoints[name] = work / name.replace(" ", "-")
            run(quantize_command(a.model, checkpoints[name], *options))
        perplexities = {}
        for name, path in checkpoints.items():
            command = [
                a.vllm_python,
                a.bench / "vllm_perplexity.py",
                path,
                "--text",
                a.text,
                "--chunks",
                a.chunks,
                "--json",
            ]
            perplexities[name] = last_json(run(command, result="{").output)
            rise = perplexities[name]["nll"] - perplexities["source"]["nll"]
            print(
                f"  {name:<20} perplexity {perplexities[name]['perplexity']:.4f}  (loss {rise:+.5f} nats to "
                "source)",
                flush=True,
            )
        for name in ("packed W4 g128", "gptq-format W4 g128"):
            both = zip(
                perplexities[name]["nll_by_chunk"], perplexities["plain W4 g128"]["nll_by_chunk"], strict=True
            )
            apart = [x - y for x, y in both]
            print(
                f"  {name} - plain, by chunk: mean {statistics.fmean(apart):+.6f}, largest "
                f"{max(map(abs, apart)):.6f} nats"
            )


if __name__ == "__main__":
    main()
