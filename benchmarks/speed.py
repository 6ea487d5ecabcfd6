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
from pathlib import Path

from common import ROOT, last_json, machine, quantize_command, result_line, run

SHARED = ROOT.parent / "shared"
GIB = 2**30


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench", type=lambda p: Path(p).resolve(), default=SHARED / "bench")
    p.add_argument(
        "--text", type=lambda p: Path(p).resolve(), default=SHARED / "data/text/wikipedia-sample/wiki.txt"
    )
    p.add_argument("--llmcompressor-python"), p.add_argument("--gptqmodel-python")
    (
        p.add_argument("--layers", type=int, default=4),
        p.add_argument("--repeat", type=int, default=1),
        p.add_argument("--threads", type=int, default=2),
    )
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
    a = p.parse_args()
    peers = {
        "llm-compressor": (a.llmcompressor_python, "peer_llmcompressor.py"),
        "GPTQModel": (a.gptqmodel_python, "peer_gptqmodel.py"),
    }
    print(machine(), f"{a.threads} threads", flush=True)
    rows: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def make(layers: int) -> Path:
            model = work / f"model{layers}"
            run([sys.executable, a.bench / "make_bench_model.py", model, "--layers", str(layers)])
            return model

        def ours(model: Path, turn: int, method: str = "gptq") -> tuple[float, float, float]:
            options = [
                "--method",
                method,
                "--calibration-dataset",
                str(a.text),
                "--samples",
                "128",
                "--sequence-length",
                "512",
            ]
            done = run(quantize_command(model, work / f"{method}-{model.name}-{turn}", *options), a.threads)
            report = last_json(done.output)
            print(
                "    phases:",
                ", ".join(f"{k} {v:.1f} s" for k, v in report["seconds"].items() if v >= 0.05),
                flush=True,
            )
            return report["seconds"]["quantize"], done.seconds, done.peak_rss_bytes / GIB

        def peer(name: str, model: Path, turn: int) -> tuple[float, float, float]:
            python, program = peers[name]
            command = [
                python,
                a.bench / program,
                model,
                work / f"{name}-{turn}",
                "--text",
                a.text,
                "--samples",
                "128",
                "--length",
                "512",
            ]
            done = run(command, a.threads)
            seconds = re.search(r"quantize ([\d.]+) s", result_line(done.output))
            assert seconds is not None
            return float(seconds[1]), done.seconds, done.peak_rss_bytes / GIB

        model = make(a.layers)
        for turn in range(a.repeat):
            for name in ("quant", *(n for n, (python, _) in peers.items() if python)):
                row = ours(model, turn) if name == "quant" else peer(name, model, turn)
                rows.setdefault(name, []).append(row)
                print(
                    f"  {name:<15} quantize {row[0]:7.1f} s   whole {row[1]:7.1f} s   peak {row[2]:.2f} GiB",
                    flush=True,
                )
        print(f"\n{a.layers} blocks, medians of {a.repeat}")
        for name, values in rows.items():
            if name == "quant":
                continue
            ratios = [
                statistics.median(v[i] / o[i] for v, o in zip(values, rows["quant"], strict=True))
                for i in range(3)
            ]
            print(
                f"  {name} / quant: quantize {ratios[0]:.2f}x, whole command {ratios[1]:.2f}x, peak memory "
                f"{ratios[2]:.2f}x"
            )
        others: dict[str, tuple[float, float, float]] = {}
        for method in a.also:
            row, gptq = ours(model, 0, method), rows["quant"][0]
            others[method] = row
            print(
                f"  {method:<15} quantize {row[0]:7.1f} s   whole {row[1]:7.1f} s   peak {row[2]:.2f} GiB",
                end="",
            )
            print(f"   quantize {row[0] / gptq[0]:.2f}x of gptq's", flush=True)
        if a.deeper:
            deeper = make(a.deeper)
            for method, row in {"gptq": rows["quant"][0], **others}.items():
                deep = ours(deeper, 0, method)
                print(
                    f"  quant {method} at {a.deeper} blocks: peak {deep[2]:.2f} GiB, "
                    f"{deep[2] / row[2] - 1:+.1%} against {a.layers} blocks"
                )


if __name__ == "__main__":
    main()
