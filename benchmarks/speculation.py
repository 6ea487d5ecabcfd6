#!/usr/bin/env python3
"""Acceptance as we measure it beside what vLLM counts, of prediction heads of several families and of drafts,
prompt by prompt.

    python benchmarks/speculation.py --vllm-python PYTHON [--ways deepseek_v3,qwen3_next] [--prompts 24]

The heads are of tiny checkpoints by chance (tests/speculation/guessed.py), the drafts trained on the bundled
model's text; in fp32 where vLLM's CPU build has it, so that texts part seldom. Printed: acceptance with its
95 % interval over prompts, and the difference with its own: over all prompts, and over those that both sides
continue by the same text, where nothing but the head can differ.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import ROOT, machine

sys.path.insert(0, str(ROOT))

from quant.speculation.dflash import dflash  # noqa: E402
from quant.speculation.heads import eagle3, native_head  # noqa: E402
from quant.speculation.measure import generate  # noqa: E402
from quant.speculation.proposers import Model, Proposer  # noqa: E402
from quant.speculation.run import SpeculationRequest, _prompts  # noqa: E402
from quant.speculation.sampling import Sampling  # noqa: E402
from tests.speculation import guessed  # noqa: E402
from tests.speculation.drafts import (  # noqa: E402
    STEPS,
    TINY,
    trained,
    trained_parallel,
    write_dflash,
    write_eagle3,
)

K, TOKENS = 3, 96
Counts = list[tuple[int, int]]


def interval(values: Sequence[tuple[float, float]], draws: int = 2000) -> tuple[float, float]:
    """95 % of the quotient of sums, by drawing prompts anew."""
    generator, found = random.Random(0), []
    for _ in range(draws):
        drawn = generator.choices(values, k=len(values))
        found.append(sum(a for a, _ in drawn) / max(sum(b for _, b in drawn), 1))
    found.sort()
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


def share(counts: Counts) -> str:
    accepted, proposed = (sum(x) for x in zip(*counts, strict=True))
    low, high = interval(counts)
    return f"{accepted / proposed:.1%} ({low:.1%} to {high:.1%}) of {proposed}"


def gap(ours: Counts, theirs: Counts) -> str:
    """Points between the two, prompts drawn together."""
    generator, found = random.Random(0), []
    pairs = list(zip(ours, theirs, strict=True))

    def points(drawn: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> float:
        rates = [sum(x[side][0] for x in drawn) / sum(x[side][1] for x in drawn) for side in (0, 1)]
        return 100 * (rates[0] - rates[1])

    for _ in range(2000):
        found.append(points(generator.choices(pairs, k=len(pairs))))
    found.sort()
    return f"{points(pairs):+.2f} points ({found[50]:+.2f} to {found[1950]:+.2f})"


def written(way: str, folder: Path) -> tuple[Path, dict]:
    """The target of a way, and vLLM's config of it."""
    if way in guessed.FAMILIES:
        return guessed.write(way, folder / way, "float32"), {"method": "mtp"}
    make = {
        "eagle3": lambda at: write_eagle3(at, trained("eagle3", STEPS)),
        "dflash": lambda at: write_dflash(at, trained_parallel(STEPS, K)),
    }[way]
    return TINY, {"method": way, "model": str(make(folder / way))}


def proposer(way: str, target: Model, config: dict, folder: Path) -> Proposer:
    if way in guessed.FAMILIES:
        return native_head(target, folder / f"{way}-head")
    return {"eagle3": eagle3, "dflash": dflash}[way](target, Path(config["model"]))


def counted_by_vllm(python: str, job: dict, folder: Path) -> dict:
    """What vLLM says and counts of one way; where it does not run, why, as ``error``."""
    (folder / "jobs.json").write_text(json.dumps([job]))
    command = [python, str(ROOT / "tests/vllm/speculate_many.py"), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [json.loads(x[7:]) for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not found or "error" in found[0]:
        log = Path(job["log"]).read_text().splitlines() if Path(job["log"]).exists() else []
        said = found[0]["error"] if found else done.stderr[-1000:]
        return {"error": "\n  ".join([said, *log[-4:]])}
    return found[0]


#: Of what vLLM's CPU build computes in bf16 alone; texts then part where two tokens are nearly as likely.
_BF16 = ("qwen3_next", "qwen3_5_text")


def compare(way: str, folder: Path, rows: list[list[int]], python: str) -> None:
    path, config = written(way, folder)
    target, dtype = Model(path, torch.device("cpu"), folder), "bfloat16" if way in _BF16 else "float32"
    target.model.to(getattr(torch, dtype))
    guess, generator = proposer(way, target, config, folder), torch.Generator().manual_seed(0)
    ours, texts = [], []
    for row in rows:
        target.reset()
        text, found = generate(target, guess, row, TOKENS, K, Sampling(), generator)
        texts.append(text)
        ours.append((found.accepted, found.draft_tokens))
    print(f"{way}: here {share(ours)}", flush=True)
    job = {
        "name": way, "path": str(path), "rows": rows, "new_tokens": TOKENS, "dtype": dtype,
        "config": config | {"num_speculative_tokens": K}, "each": True, "log": str(folder / f"{way}.log"),
    }  # fmt: skip
    said = counted_by_vllm(python, job, folder)
    if "error" in said:
        return print(f"  vLLM: {said['error']}", flush=True)
    theirs = [(x["num_accepted_tokens"], x["num_draft_tokens"]) for x in said["each"]]
    print(f"  vLLM {share(theirs)}: {gap(ours, theirs)}", flush=True)
    alike = [i for i, text in enumerate(texts) if text == said["tokens"][i]]
    print(f"  texts alike: {len(alike)} of {len(rows)}", flush=True)
    if alike:
        both = [ours[i] for i in alike], [theirs[i] for i in alike]
        print(f"  of those: here {share(both[0])}, vLLM {share(both[1])}: {gap(*both)}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vllm-python", required=True)
    p.add_argument("--ways", default=",".join([*guessed.FAMILIES, "eagle3", "dflash"]))
    p.add_argument("--prompts", type=int, default=24)
    a = p.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        rows = _prompts(TINY, SpeculationRequest(new_tokens=TOKENS, prompts=a.prompts))
        for way in a.ways.split(","):
            compare(way, folder, rows, a.vllm_python)


if __name__ == "__main__":
    main()
