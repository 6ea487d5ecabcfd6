#!/usr/bin/env python3
"""What a method of ours takes beside our GPTQ: peak memory of models that differ in depth alone, and CPU
seconds of the same job.

    python benchmarks/depth.py [--methods yaqa] [--depths 4 16] [--samples 128] [--memory-samples 16]
    [OPTION …]

Options that are not its own go to the command of the methods. The models are random weights in the block
shape of a 1B Llama (`make_bench_model.py` of the bench folder). Seconds are taken at the first depth and of
the whole process, start-up and verification included, so that a busy machine says the same; memory at every
depth, by default of fewer rows, because what waits beyond 256 MiB lies in a file. Exit status 1 where a limit
is passed that is asked for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from common import ROOT, Finished, last_json, machine, quantize_command, run

SHARED = ROOT.parent / "shared"
GIB = 2**30


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench", type=lambda p: Path(p).resolve(), default=SHARED / "bench")
    p.add_argument(
        "--text", type=lambda p: Path(p).resolve(), default=SHARED / "data/text/wikipedia-sample/wiki.txt"
    )
    p.add_argument("--methods", nargs="+", default=["yaqa"])
    p.add_argument("--depths", nargs="*", type=int, default=[4, 16], help="blocks")
    p.add_argument("--samples", type=int, default=128, help="rows where seconds are taken; 0: none are")
    p.add_argument("--memory-samples", type=int, default=16, help="rows where memory is; 0: none is")
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--most-times", type=float, help="CPU seconds of a method, by GPTQ's")
    p.add_argument("--most-growth", type=float, default=0.05, help="of memory from the first depth to any")
    p.add_argument("--most-memory", type=float, default=3.0, help="GiB")
    a, more = p.parse_known_args()
    print(machine(), f"{a.threads} threads", flush=True)
    passed: list[str] = []
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def job(method: str, layers: int, samples: int) -> Finished:
            model, output = work / f"model{layers}", work / "out"
            if not model.exists():
                run([sys.executable, a.bench / "make_bench_model.py", model, "--layers", str(layers)])
            options = [] if method == "gptq" else more
            command = quantize_command(
                model, output, "--method", method, "--calibration-dataset", str(a.text),
                "--samples", str(samples), "--sequence-length", str(a.length), *options,
            )  # fmt: skip
            done = run(command, a.threads)
            rows = last_json(done.output)["calibration"]["rows"]
            shutil.rmtree(output)
            print(
                f"  {method:<8} {layers:>3} blocks, {rows:>4} rows: {done.cpu_seconds:7.1f} s of CPU, peak "
                f"{done.peak_rss_bytes / GIB:.2f} GiB",
                flush=True,
            )
            return done

        if a.samples:
            base = job("gptq", a.depths[0], a.samples).cpu_seconds
            for method in a.methods:
                times = job(method, a.depths[0], a.samples).cpu_seconds / base
                found[f"{method}_times_gptq"] = round(times, 2)
                if a.most_times is not None and times > a.most_times:
                    passed.append(f"{method} takes {times:.2f} times GPTQ's seconds")
        if a.memory_samples:
            for method in a.methods:
                peaks = [job(method, d, a.memory_samples).peak_rss_bytes for d in a.depths]
                growth = max(peaks) / peaks[0] - 1
                found[f"{method}_peak_gib"] = [round(x / GIB, 3) for x in peaks]
                found[f"{method}_growth"] = round(growth, 4)
                if growth > a.most_growth:
                    passed.append(f"{method}'s memory grows by {growth:.1%} with depth")
                if max(peaks) > a.most_memory * GIB:
                    passed.append(f"{method} takes {max(peaks) / GIB:.2f} GiB")
    print(json.dumps({**found, "passed_limits": passed}))
    if passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
