#!/usr/bin/env python3
"""Seconds of a job by one process and by several ranks, in turns on one machine, and whether they make the
same files.

    python benchmarks/ranks.py [--ranks 2] [--layers 4] [--repeat 3] [--methods gptq minmax] [--model MODEL]

The model is random weights in the block shape of a 1B Llama (`make_bench_model.py` of the bench folder), as
that of `speed.py`; `--hidden` and `--intermediate` make it smaller. Each process has one thread, on CPUs. The
seconds are those of the quantization, from the first block's read to the last shard's sync, and those of the
whole command with its start and its verification; ratios are taken turn by turn. Cores that others use, too,
make both longer: what ranks cannot divide shows in the seconds of all cores together (cpu), which would be
those of one process if nothing were done twice; ranks / (cpu of several / cpu of one) is the most they gain.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, last_json, machine, quantize_command, run
from kills import files

SHARED = ROOT.parent / "shared"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench", type=lambda p: Path(p).resolve(), default=SHARED / "bench")
    p.add_argument(
        "--text", type=lambda p: Path(p).resolve(), default=SHARED / "data/text/wikipedia-sample/wiki.txt"
    )
    p.add_argument("--model", type=lambda p: Path(p).resolve(), help="instead of the bench model")
    for name, default in {"ranks": 2, "layers": 4, "hidden": 2048, "intermediate": 5632}.items():
        p.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"repeat": 1, "samples": 128, "length": 512}.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--methods", nargs="*", default=["gptq", "awq", "minmax", "fp8"])
    a = p.parse_args()
    print(machine(), "one thread a rank", flush=True)
    different = False
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = a.model
        if model is None:
            model = work / "model"
            shape = [f"--{n}={getattr(a, n)}" for n in ("layers", "hidden", "intermediate")]
            run([sys.executable, a.bench / "make_bench_model.py", model, *shape])
        for method in a.methods:
            options = ["--method", method]
            if method not in ("minmax", "fp8", "hqq"):
                options += ["--calibration-dataset", str(a.text), "--samples", str(a.samples)]
                options += ["--sequence-length", str(a.length)]
            ratios: list[tuple[float, float, float]] = []
            for turn in range(a.repeat):
                made, seconds = [], []
                for ranks in (1, a.ranks):
                    output = work / f"{method}-{turn}-{ranks}"
                    devices = ["--devices", ",".join(["cpu"] * ranks)]
                    done = run(quantize_command(model, output, *options, *devices), 1)
                    phases = last_json(done.output)["seconds"]
                    seconds.append((phases["quantize"], done.seconds, done.cpu_seconds))
                    made.append(files(output))
                    shown = ", ".join(f"{k} {v:.1f}" for k, v in phases.items() if v >= 0.05)
                    shown += f"; whole {done.seconds:.1f} s, cpu {done.cpu_seconds:.1f} s"
                    print(f"  {method} {ranks}: {shown}", flush=True)
                same = made[0] == made[1]
                different |= not same
                one, several = seconds
                ratios.append((one[0] / several[0], one[1] / several[1], a.ranks * one[2] / several[2]))
                print(f"  {method}: files {'identical' if same else 'DIFFERENT'}", flush=True)
            quantized, whole, cpu = (statistics.median(r[i] for r in ratios) for i in range(3))
            print(
                f"{method}: {a.ranks} ranks {quantized:.2f}x in quantization, {whole:.2f}x in the whole "
                f"command, at the most {cpu:.2f}x by cpu, medians of {a.repeat}",
                flush=True,
            )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
