#!/usr/bin/env python3
"""Seconds and memory of GPTQ W4 g128 beside llm-compressor and GPTQModel, on one model, one text, one
machine, in one run.

    python benchmarks/speed.py --llmcompressor-python PYTHON --gptqmodel-python PYTHON [--layers 4] [--repeat
    1]

The model is random weights in the block shape of a 1B Llama (`make_bench_model.py` of the bench folder);
calibration is 128 rows of 512 tokens. "quantize" is each program's own quantization phase (ours: from the
first block's read to the last shard's sync); "whole" is the command from start to end as the operating system
sees it. Programs take turns, so that a drifting machine hits all of them, and ratios are taken turn by turn.
"""

import argparse
import re
import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from common import ROOT, last_json, machine, quantize_command, result_line, run

SHARED = ROOT.parent / "shared"
GIB = 2**30
#: The program of the bench folder that runs each peer.
PEERS = {"llm-compressor": "peer_llmcompressor.py", "GPTQModel": "peer_gptqmodel.py"}
#: Seconds of the quantization and of the whole command, and GiB at the peak.
Row = tuple[float, float, float]


def asked() -> Namespace:
    def path(words: str) -> Path:
        return Path(words).resolve()

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench", type=path, default=SHARED / "bench")
    p.add_argument("--text", type=path, default=SHARED / "data/text/wikipedia-sample/wiki.txt")
    p.add_argument("--llmcompressor-python"), p.add_argument("--gptqmodel-python")
    p.add_argument("--layers", type=int, default=4), p.add_argument("--repeat", type=int, default=1)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument(
        "--deeper",
        type=int,
        default=0,
        help="also run ours on a model of this many blocks, for memory against depth",
    )
    p.add_argument(
        "--also",
        nargs="*",
        default=[],
        metavar="METHOD",
        help="also run these methods of ours, as a ratio to our gptq's seconds",
    )
    return p.parse_args()


def make(a: Namespace, work: Path, layers: int) -> Path:
    model = work / f"model{layers}"
    run([sys.executable, a.bench / "make_bench_model.py", model, "--layers", str(layers)])
    return model


def ours(a: Namespace, model: Path, turn: int, method: str = "gptq") -> Row:
    options = ["--method", method, "--calibration-dataset", str(a.text)]
    options += ["--samples", "128", "--sequence-length", "512"]
    output = model.with_name(f"{method}-{model.name}-{turn}")
    done = run(quantize_command(model, output, *options), a.threads)
    report = last_json(done.output)
    phases = (f"{k} {v:.1f} s" for k, v in report["seconds"].items() if v >= 0.05)
    print("    phases:", ", ".join(phases), flush=True)
    return report["seconds"]["quantize"], done.seconds, done.peak_rss_bytes / GIB


def peer(a: Namespace, name: str, python: str, model: Path, turn: int) -> Row:
    command = [python, a.bench / PEERS[name], model, model.with_name(f"{name}-{turn}"), "--text", a.text]
    done = run([*command, "--samples", "128", "--length", "512"], a.threads)
    seconds = re.search(r"quantize ([\d.]+) s", result_line(done.output))
    assert seconds is not None
    return float(seconds[1]), done.seconds, done.peak_rss_bytes / GIB


def shown(name: str, row: Row, more: str = "") -> None:
    print(
        f"  {name:<15} quantize {row[0]:7.1f} s   whole {row[1]:7.1f} s   peak {row[2]:.2f} GiB{more}",
        flush=True,
    )


def compare(a: Namespace, model: Path) -> Row:
    """Our gptq beside the peers, run in turns; returns ours of the first."""
    pythons = {"llm-compressor": a.llmcompressor_python, "GPTQModel": a.gptqmodel_python}
    rows: dict[str, list[Row]] = {}
    for turn in range(a.repeat):
        for name in ("quant", *(n for n, python in pythons.items() if python)):
            row = ours(a, model, turn) if name == "quant" else peer(a, name, pythons[name], model, turn)
            rows.setdefault(name, []).append(row)
            shown(name, row)
    print(f"\n{a.layers} blocks, medians of {a.repeat}")
    for name, values in rows.items():
        if name == "quant":
            continue
        pairs = [*zip(values, rows["quant"], strict=True)]
        ratios = [statistics.median(v[i] / o[i] for v, o in pairs) for i in range(3)]
        print(
            f"  {name} / quant: quantize {ratios[0]:.2f}x, whole command {ratios[1]:.2f}x, peak memory "
            f"{ratios[2]:.2f}x"
        )
    return rows["quant"][0]


def main() -> None:
    a = asked()
    print(machine(), f"{a.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make(a, work, a.layers)
        made = {"gptq": compare(a, model)}
        for method in a.also:
            made[method] = ours(a, model, 0, method)
            shown(method, made[method], f"   quantize {made[method][0] / made['gptq'][0]:.2f}x of gptq's")
        if a.deeper:
            deeper = make(a, work, a.deeper)
            for method, row in made.items():
                deep = ours(a, deeper, 0, method)
                print(
                    f"  quant {method} at {a.deeper} blocks: peak {deep[2]:.2f} GiB, "
                    f"{deep[2] / row[2] - 1:+.1%} against {a.layers} blocks"
                )


if __name__ == "__main__":
    main()
