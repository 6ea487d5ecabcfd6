#!/usr/bin/env python3
"""What distillation gives back: a model without one block, and a model in three bits whose norms and scales
are trained under the same codes, each before and after, in KL divergence to the source on text that neither
was taught with; and the time that it took.

    python benchmarks/distillation.py [--model MODEL] [--bench ../shared/bench] [--only block|w3]

The judge is `kl.py` of the bench folder, on WikiText-2; what is taught with is Wikipedia.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import ROOT, Finished, last_json, machine, run

SHARED = ROOT.parent / "shared"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=lambda p: Path(p).resolve(), default=SHARED / "data/models/tinylm-4m")
    p.add_argument("--bench", type=lambda p: Path(p).resolve(), default=SHARED / "bench")
    p.add_argument(
        "--lesson", type=lambda p: Path(p).resolve(), default=SHARED / "data/text/wikipedia-sample/wiki.txt"
    )
    p.add_argument(
        "--text", type=lambda p: Path(p).resolve(), default=SHARED / "data/text/wikitext-2/test.txt"
    )
    p.add_argument("--chunks", default="60", help="of 512 tokens, judged")
    p.add_argument("--steps", default="120", help="for the model without a block")
    p.add_argument("--rate", default="5e-4", help="for the model without a block")
    p.add_argument("--method", default="gptq", help="by which three bits are made")
    p.add_argument("--samples", default="800", help="rows that the model in three bits is taught, each once")
    p.add_argument("--only", choices=["block", "w3"])
    a = p.parse_args()
    print(machine(), flush=True)
    text = ["--calibration-dataset", str(a.lesson), "--sequence-length", "512"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def quant(command: str, model: Path, output: Path, *options: str) -> Finished:
            given = ["-m", model, "-o", output, *options, "--quiet"]
            return run([sys.executable, ROOT / "quantize.py", command, *given])

        def judge(output: Path) -> float:
            if json.loads((output / "config.json").read_text()).get("quantization_config"):
                plain = output.with_name(f"{output.name}-plain")  # its values, in a form that kl.py reads
                quant("export-vllm", output, plain, "--format", "plain")
                output = plain
            given = ["--text", a.text, "--chunks", a.chunks, "--json"]
            command = [sys.executable, a.bench / "kl.py", a.model, output, *given]
            return float(last_json(run(command).output)["kl"][0])

        def lesson(name: str, student: Path, *options: str) -> None:
            taught = work / f"{name}-taught"
            done = quant("distill", student, taught, "--teacher", str(a.model), *text, *options)
            lessons = json.loads((taught / "quant_report.json").read_text())["distillation"]
            before, after = judge(student), judge(taught)
            own = [kl for _, kl in lessons["judged"]]
            print(
                f"{name}: KL {before:.5f} -> {after:.5f}, {1 - after / before:.1%} less (on held-out rows of "
                f"the lesson's own text {own[0]:.5f} -> {min(own):.5f}, {1 - min(own) / own[0]:.1%}), "
                f"{len(lessons['losses'])} steps, {done.seconds:.0f} s, {done.cpu_seconds:.0f} s of CPU",
                flush=True,
            )

        if a.only != "w3":
            quant("prune", a.model, work / "short", "--drop-blocks", "1", "--samples", "8")
            given = ["--steps", a.steps, "--samples", str(4 * int(a.steps)), "--judge-every", "30"]
            lesson("block", work / "short", *given, "--learning-rate", a.rate)
        if a.only != "block":
            given = ["--scheme", "w3a16", "--format", "gptq", "--target", "other", "--samples", "64", *text]
            quant("quantize", a.model, work / "w3", "--method", a.method, *given)
            lesson("w3", work / "w3", "--samples", a.samples, "--steps", str(int(a.samples) // 4))


if __name__ == "__main__":
    main()
