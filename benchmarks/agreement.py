#!/usr/bin/env python3
"""Whether what `recommend` prints runs, for every model of the catalogue on six GPUs.

    python benchmarks/agreement.py [--gpu-count N] [--part 1/4] [--experts N] [MODEL ...]

Each distinct command is dry-run on a stand-in of the model: its config.json, and safetensors headers with
holes where the values would be. What the job would write stands in for itself in the same way, and the
printed ``vllm serve`` of it goes through ``quant-deploy plan``. Disks and memory count as large enough, and
no trial is made of what a block takes. Of models with one config the first is judged. With ``--experts`` the
stand-ins have so many of a layer at most, which is quicker; bytes are then not compared. Ends with 1 where
anything disagrees.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quant.catalog import catalogue  # noqa: E402
from quant.planning.recommendation import recommend  # noqa: E402
from tests.agreement import GPUS, disagreements, room_for_everything  # noqa: E402
from tests.stand_ins import published_config, with_fewer_experts, write_stand_in  # noqa: E402


def judge(name: str, count: int, experts: int | None) -> tuple[int, int, list[str]]:
    """Recommendations that print commands, distinct jobs among them, and what disagrees."""
    done: dict[str, Any] = {}
    entry = catalogue()[name]
    config = published_config(entry["config"])
    fewer = config if experts is None else with_fewer_experts(config, experts)
    printed, problems, whole = 0, [], "caveat" not in entry and fewer == config
    with tempfile.TemporaryDirectory() as folder:
        source = write_stand_in(fewer, Path(folder) / name.rpartition("/")[2])
        for gpu in GPUS:
            recommendation = recommend(name, gpu, gpu_count=count)
            printed += bool(recommendation.commands)
            found = disagreements(recommendation, gpu, source, Path(folder) / "made", done, whole)
            problems += [f"{gpu}: {p}" for p in found]
    return printed, len(done), problems


def distinct(names: Iterable[str]) -> list[str]:
    """The models of which nothing that is planned by is the same as of one before."""
    first: dict[str, str] = {}
    for name in names:
        known = {k: v for k, v in catalogue()[name].items() if k not in ("source", "note")}
        first.setdefault(json.dumps(known, sort_keys=True), name)
    return list(first.values())


def part(text: str) -> tuple[int, int]:
    """I/N as two numbers, from 1/N to N/N."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/4 or 4/4")
    return int(number), int(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="parts of names; all models where none is given")
    parser.add_argument("--gpu-count", type=int, default=1, help="GPUs of each kind")
    parser.add_argument("--experts", type=int, help="routed experts of a layer at most")
    parser.add_argument("--part", type=part, default=(1, 1), help="every fourth model, from the first: 1/4")
    options = parser.parse_args()
    chosen = distinct(n for n in catalogue() if not options.models or any(m in n for m in options.models))
    warnings.simplefilter("ignore")
    totals, (first, parts) = [0, 0, 0], options.part
    with room_for_everything(seconds=0):
        for number, name in list(enumerate(chosen))[first - 1 :: parts]:
            start = time.process_time()
            printed, made, problems = judge(name, options.gpu_count, options.experts)
            totals = [a + b for a, b in zip(totals, (printed, made, len(problems)), strict=True)]
            seconds = time.process_time() - start
            print(f"{number} {name}: {printed} printed, {made} jobs, {seconds:.1f} s", flush=True)
            for problem in dict.fromkeys(problems):
                print(f"  {problem}", flush=True)
    print(f"{totals[0]} recommendations with commands, {totals[1]} distinct jobs, {totals[2]} disagreements")
    sys.exit(1 if totals[2] else 0)


if __name__ == "__main__":
    main()
