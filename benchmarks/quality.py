#!/usr/bin/env python3
"""KL divergence of quantized checkpoints to their source, ours beside llm-compressor's and GPTQModel's, over
several calibration draws.

    python benchmarks/quality.py --llmcompressor-python PYTHON --gptqmodel-python PYTHON [--draws 3] [--bench
    ../shared/bench]

Every program quantizes the same rows: a draw is the calibration text rotated to another article, cut into
rows in file order. The judge is `kl.py` of the bench folder (means over 100 chunks of wikitext-2 test, both
models in fp32). Ours is judged through `--format plain`, which holds the values of the packed checkpoint
rounded once to bf16; the peers' through their own loaders.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, last_json, machine, quantize_command, run

from quant.defaults import EFFORTS

SHARED = ROOT.parent / "shared"


def rotated(text: str, share: float, mark: str = "<doc ") -> str:
    """The text from the first article (it starts with ``mark``) after ``share`` of it, then the rest."""
    cut = text.find(mark, int(len(text) * share)) if share else 0
    return text[cut:] + text[:cut]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=lambda p: Path(p).resolve(), default=SHARED / "data/models/tinylm-11m")
    p.add_argument("--bench", type=lambda p: Path(p).resolve(), default=SHARED / "bench")
    p.add_argument(
        "--calibration",
        type=lambda p: Path(p).resolve(),
        default=SHARED / "data/text/wikipedia-sample/wiki.txt",
    )
    p.add_argument(
        "--text", type=lambda p: Path(p).resolve(), default=SHARED / "data/text/wikitext-2/test.txt"
    )
    p.add_argument("--llmcompressor-python"), p.add_argument("--gptqmodel-python")
    (
        p.add_argument("--draws", type=int, default=3),
        p.add_argument("--samples", default="128"),
        p.add_argument("--length", default="512"),
    )
    p.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    p.add_argument("--methods", nargs="+", default=["gptq", "yaqa"], help="of ours, or values of --effort")
    p.add_argument("--gradient-samples", default="128", help="of our yaqa by name")
    p.add_argument("--options", nargs="*", default=[], help="more options for our command")
    a = p.parse_args()
    text = a.calibration.read_text(encoding="utf-8")
    divergences: dict[tuple[str, int], list[float]] = {}
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def judge(python: str, name: str, bits: int, output: Path, loader: str = "transformers") -> None:
            command = [
                python,
                a.bench / "kl.py",
                a.model,
                output,
                "--text",
                a.text,
                "--json",
                "--loader",
                loader,
            ]
            kl, error = last_json(run(command).output)["kl"]
            divergences.setdefault((name, bits), []).append(kl)
            print(f"  {name:<15} W{bits} g128  KL {kl:.5f} ± {error:.5f}", flush=True)

        for draw in range(a.draws):
            rows = work / f"draw{draw}.txt"
            rows.write_text(rotated(text, draw / a.draws), encoding="utf-8")
            print(f"draw {draw + 1} of {a.draws}", flush=True)
            for bits in a.bits:
                for method in a.methods:
                    output = work / f"{method}-{draw}-{bits}"
                    options = ["--bits", str(bits), "--format", "plain", "--calibration-dataset", str(rows)]
                    options += ["--samples", a.samples, "--sequence-length", a.length, *a.options]
                    options += ["--gradient-samples", a.gradient_samples] if method == "yaqa" else []
                    chosen = "--effort" if method in EFFORTS else "--method"
                    run(quantize_command(a.model, output, chosen, method, *options))
                    judge(sys.executable, f"quant {method}", bits, output)
                common = ["--text", rows, "--samples", a.samples, "--length", a.length]
                if a.llmcompressor_python and bits == 4:  # it has no 3-bit preset
                    output = work / f"llmcompressor-{draw}-{bits}"
                    run([a.llmcompressor_python, a.bench / "peer_llmcompressor.py", a.model, output, *common])
                    judge(a.llmcompressor_python, "llm-compressor", bits, output)
                if a.gptqmodel_python:
                    output = work / f"gptqmodel-{draw}-{bits}"
                    run(
                        [
                            a.gptqmodel_python,
                            a.bench / "peer_gptqmodel.py",
                            a.model,
                            output,
                            "--bits",
                            str(bits),
                            *common,
                        ]
                    )
                    judge(a.gptqmodel_python, "GPTQModel", bits, output, "gptqmodel")
    print("\nmean KL over draws, and the ratio of each of ours to it")
    for (name, bits), values in divergences.items():
        mean = statistics.fmean(values)
        ratios = [f"{m} {statistics.fmean(divergences[f'quant {m}', bits]) / mean:.3f}x" for m in a.methods]
        print(
            f"  {name:<15} W{bits} g128  {mean:.5f}  (draws {', '.join(f'{v:.5f}' for v in values)})  "
            f"{', '.join(ratios)}"
        )


if __name__ == "__main__":
    main()
