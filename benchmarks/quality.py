#!/usr/bin/env python3
"""KL divergence of quantized checkpoints to their source, ours beside llm-compressor's, GPTQModel's and
AutoRound's, over several calibration draws.

    python benchmarks/quality.py --llmcompressor-python PYTHON --gptqmodel-python PYTHON
        --autoround-python PYTHON [--autoround-iterations 200 20] [--draws 3 [--only 2 3]]
        [--bench ../shared/bench]

Every program quantizes the same rows: a draw is the calibration text rotated to another article, cut into
rows in file order. The judge is `kl.py` of the bench folder (means over 100 chunks of wikitext-2 test, both
models in fp32). Ours is judged through `--format plain`, which holds the values of the packed checkpoint
rounded once to bf16, and so is AutoRound's; the others' through their own loaders. AutoRound's 200
iterations took 706 s on two cores.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, last_json, machine, quantize_command, run

from quant.defaults import EFFORTS

SHARED = ROOT.parent / "shared"
PEERS = Path(__file__).resolve().parent / "peers.py"


def rotated(text: str, share: float, mark: str = "<doc ") -> str:
    """The text from the first article (it starts with ``mark``) after ``share`` of it, then the rest."""
    cut = text.find(mark, int(len(text) * share)) if share else 0
    return text[cut:] + text[:cut]


def peers(a: argparse.Namespace, rows: Path, output: Path, bits: int) -> Iterator[tuple[str, str, Path, str]]:
    """Makes the checkpoint of each peer that is asked for; yields the Python that reads it, the peer's name,
    where it is and what it is read by."""
    common = ["--text", rows, "--samples", a.samples, "--length", a.length]
    if a.llmcompressor_python and bits == 4:  # it has no 3-bit preset
        made = output.with_name(f"llmcompressor-{output.name}")
        run([a.llmcompressor_python, a.bench / "peer_llmcompressor.py", a.model, made, *common])
        yield a.llmcompressor_python, "llm-compressor", made, "transformers"
    if a.gptqmodel_python:
        made = output.with_name(f"gptqmodel-{output.name}")
        program = a.bench / "peer_gptqmodel.py"
        run([a.gptqmodel_python, program, a.model, made, "--bits", str(bits), *common])
        yield a.gptqmodel_python, "GPTQModel", made, "gptqmodel"
    for iterations in a.autoround_iterations if a.autoround_python else ():
        made = output.with_name(f"autoround-{iterations}-{output.name}")
        options = ["--method", "auto-round", "--bits", str(bits), "--iters", str(iterations)]
        run([a.autoround_python, PEERS, a.model, made, *options, *common])
        yield sys.executable, f"AutoRound {iterations}", made, "transformers"


def ours(a: argparse.Namespace, method: str, rows: Path, output: Path, bits: int) -> None:
    options = ["--bits", str(bits), "--format", "plain", "--calibration-dataset", str(rows)]
    options += ["--samples", a.samples, "--sequence-length", a.length, *a.options]
    options += ["--gradient-samples", a.gradient_samples] if method == "yaqa" else []
    chosen = "--effort" if method in EFFORTS else "--method"
    run(quantize_command(a.model, output, chosen, method, *options))


def asked() -> argparse.Namespace:
    def path(words: str) -> Path:
        return Path(words).resolve()

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=path, default=SHARED / "data/models/tinylm-11m")
    p.add_argument("--bench", type=path, default=SHARED / "bench")
    p.add_argument("--calibration", type=path, default=SHARED / "data/text/wikipedia-sample/wiki.txt")
    p.add_argument("--text", type=path, default=SHARED / "data/text/wikitext-2/test.txt")
    p.add_argument("--llmcompressor-python"), p.add_argument("--gptqmodel-python")
    p.add_argument("--autoround-python")
    p.add_argument("--autoround-iterations", type=int, nargs="+", default=[200])
    p.add_argument("--draws", type=int, default=3)
    p.add_argument("--only", type=int, nargs="+", metavar="DRAW", help="of these draws, counted from 1")
    p.add_argument("--samples", default="128"), p.add_argument("--length", default="512")
    p.add_argument("--chunks", default="100", help="of the text, for the judge")
    p.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    p.add_argument("--methods", nargs="+", default=["gptq", "yaqa"], help="of ours, or values of --effort")
    p.add_argument("--gradient-samples", default="128", help="of our yaqa by name")
    p.add_argument("--options", nargs="*", default=[], help="more options for our command")
    return p.parse_args()


def main() -> None:
    a = asked()
    text = a.calibration.read_text(encoding="utf-8")
    divergences: dict[tuple[str, int], list[float]] = {}
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def judge(python: str, name: str, bits: int, output: Path, loader: str = "transformers") -> None:
            command = [python, a.bench / "kl.py", a.model, output, "--text", a.text, "--json"]
            command += ["--loader", loader, "--chunks", a.chunks]
            kl, error = last_json(run(command).output)["kl"]
            divergences.setdefault((name, bits), []).append(kl)
            print(f"  {name:<15} W{bits} g128  KL {kl:.5f} ± {error:.5f}", flush=True)

        for draw in sorted({number - 1 for number in a.only} if a.only else range(a.draws)):
            rows = work / f"draw{draw}.txt"
            rows.write_text(rotated(text, draw / a.draws), encoding="utf-8")
            print(f"draw {draw + 1} of {a.draws}", flush=True)
            for bits in a.bits:
                for method in a.methods:
                    output = work / f"{method}-{draw}-{bits}"
                    ours(a, method, rows, output, bits)
                    judge(sys.executable, f"quant {method}", bits, output)
                for python, name, output, loader in peers(a, rows, work / f"{draw}-{bits}", bits):
                    judge(python, name, bits, output, loader)
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
