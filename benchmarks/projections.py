#!/usr/bin/env python3
"""What --dry-run predicts against what the same jobs took: twelve small runs over methods, shapes and sizes.

python benchmarks/projections.py [--only NAME ...] [--threads 1] [--json FILE]

Each is a checkpoint with random weights and a tokenizer of its own, predicted and then quantized in processes
of their own. Peak memory, seconds and scratch are compared; runs named "tight" get the least of --max-memory
that a refusal names, so that activations go to scratch. The aim is 15 % of peak memory, 30 % of the seconds
and 10 % of the scratch file. Time is of a machine that does nothing else: with `--json` the runs may be made
a few at a time, and each call prints all that the file has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from common import ROOT, last_json, machine, run

#: Most that a prediction may be off.
AIMS = {"peak": 0.15, "seconds": 0.30, "scratch": 0.10}


@dataclass(frozen=True)
class Run:
    """A job: hidden and intermediate size, blocks, experts (0: a dense model), rows of tokens, options."""

    name: str
    shape: tuple[int, int, int]
    options: tuple[str, ...]
    rows: tuple[int, int] = (16, 256)
    experts: int = 0
    dtype: str = "float32"
    tight: bool = False


SMALL, MIDDLE, WIDE, LARGE = (256, 768, 4), (512, 1536, 3), (768, 2304, 2), (2048, 5632, 20)
RUNS = (
    Run("gptq small", SMALL, ("--method", "gptq")),
    Run("gptq middle", MIDDLE, ("--method", "gptq")),
    Run("gptq wide, act-order", WIDE, ("--method", "gptq", "--act-order", "static")),
    Run("gptq w8a8-int8", MIDDLE, ("--method", "gptq", "--scheme", "w8a8-int8")),
    Run("gptq tight", MIDDLE, ("--method", "gptq"), (64, 256), tight=True),
    Run("awq middle", MIDDLE, ("--method", "awq")),
    Run("awq tight", SMALL, ("--method", "awq"), (64, 256), tight=True),
    Run("yaqa small", SMALL, ("--method", "yaqa")),
    Run("hqq wide", WIDE, ("--method", "hqq")),
    Run("minmax large", LARGE, ("--method", "minmax"), dtype="bfloat16"),
    Run("fp8 large", LARGE, ("--method", "fp8"), dtype="bfloat16"),
    # of which what the second products read is too much for memory
    Run("gptq mixture", (256, 512, 2), ("--method", "gptq"), (64, 512), experts=8),
)


def make(run_: Run, folder: Path) -> Path:
    """The checkpoint, written by a process of its own: its memory is not the job's."""
    program = (
        "import sys, torch, transformers as t\n"
        "h, i, n, e, dtype, out, tok = *map(int, sys.argv[1:5]), *sys.argv[5:]\n"
        "tokenizer = t.AutoTokenizer.from_pretrained(tok)\n"
        "torch.manual_seed(0)\n"
        "names = dict(hidden_size=h, intermediate_size=i, num_hidden_layers=n, num_attention_heads=h // 64,\n"
        "    num_key_value_heads=max(h // 256, 1), vocab_size=len(tokenizer), max_position_embeddings=2048,\n"
        "    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)\n"
        "config = t.MixtralConfig(num_local_experts=e, **names) if e else t.LlamaConfig(**names)\n"
        "model = (t.MixtralForCausalLM if e else t.LlamaForCausalLM)(config).to(getattr(torch, dtype))\n"
        "model.save_pretrained(out); tokenizer.save_pretrained(out)\n"
    )
    out = folder / re.sub(r"\W+", "-", run_.name)
    words = [*map(str, run_.shape), str(run_.experts), run_.dtype, out, ROOT / "examples/tinylm-4m"]
    run([sys.executable, "-c", program, *words])
    return out


def quantize(run_: Run, model: Path, *more: str, threads: int) -> dict:
    words = [sys.executable, "-m", "quant", "quantize", "-m", model, "-q", "--json", *run_.options, *more]
    if "gptq" in run_.options or run_.tight or not {"hqq", "minmax", "fp8"} & set(run_.options):
        words += ["--samples", str(run_.rows[0]), "--sequence-length", str(run_.rows[1])]
    return last_json(run(words, threads, result="{").output)


def compare(run_: Run, folder: Path, threads: int) -> dict:
    """Predicted and measured of one run."""
    model, budget = make(run_, folder), []
    if run_.tight:
        refused = quantize(run_, model, "--dry-run", "--max-memory", "1MiB", threads=threads)
        budget = ["--max-memory", re.search(r"give --max-memory (\d+MiB)", refused["error"])[1]]
    predicted = quantize(run_, model, "--dry-run", *budget, threads=threads)
    output = folder / f"{model.name}-out"
    made = quantize(run_, model, "-o", str(output), *budget, threads=threads)
    values = {
        "peak": (predicted["peak_rss_bytes"] / 2**20, made["peak_rss_bytes"] / 2**20),
        "seconds": (predicted["seconds"], made["seconds"]["total"]),
        "scratch": (predicted["scratch_bytes"] / 2**20, made["scratch_bytes"] / 2**20),
    }
    subprocess.run(["rm", "-r", str(model), str(output)], check=True)
    return {"run": asdict(run_), **values, "phases": made["seconds"]}


def error(pair: tuple[float, float]) -> float:
    """Of a prediction, relative to what was measured, or to one second or MiB where that was less."""
    predicted, measured = pair
    return (predicted - measured) / max(measured, 1.0)


def line(found: dict) -> str:
    cells = []
    for kind in AIMS:
        predicted, measured = found[kind]
        cells.append(f"{predicted:8.1f} {measured:7.1f} {error(found[kind]):+6.0%}")
    return f"{found['run']['name']:24}{'  '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="runs whose names begin so")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the numbers; runs that it has are not made again")
    options = parser.parse_args()
    print(machine(), f"{options.threads} threads", sep=", ")
    print(f"{'run':24}{'peak MiB':>22}{'seconds':>24}{'scratch MiB':>22}")
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    for made in found:
        print(line(made))
    known = {made["run"]["name"] for made in found}
    with tempfile.TemporaryDirectory() as folder:
        for run_ in RUNS:
            if run_.name in known or not run_.name.startswith(tuple(options.only)):
                continue
            found.append(compare(run_, Path(folder), options.threads))
            print(line(found[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
    for kind, aim in AIMS.items():
        errors = sorted((abs(error(f[kind])), f["run"]["name"]) for f in found)
        within = sum(e <= aim for e, _ in errors)
        worst, name = errors[-1]
        print(f"{kind}: within {aim:.0%} in {within} of {len(errors)}, largest error {worst:.0%} ({name})")


if __name__ == "__main__":
    main()
