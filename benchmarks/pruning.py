#!/usr/bin/env python3
"""What pruning costs in KL divergence to the source: weights by each method, over several calibration draws;
narrower blocks; and decoder blocks, each measured by leaving it out, beside the order in which `quant prune`
finds them.

    python benchmarks/pruning.py [--draws 0 1 2] [--shares 0.5 2:4] [--model MODEL] [--bench ../shared/bench]

A draw is the calibration text rotated to another article. The judge is `kl.py` of the bench folder.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, last_json, machine, run
from quality import rotated

SHARED = ROOT.parent / "shared"
METHODS = ("magnitude", "wanda", "sparsegpt")


def ranks(values: list[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [order.index(i) for i in range(len(values))]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    n, squares = len(a), sum((x - y) ** 2 for x, y in zip(ranks(a), ranks(b), strict=True))
    return 1 - 6 * squares / (n * (n * n - 1))


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
    p.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="which of three, by their numbers")
    p.add_argument("--shares", nargs="+", default=["0.5", "2:4", "4:8"], help="sparsities, and patterns")
    p.add_argument("--samples", default="128")
    p.add_argument("--length", default="512")
    p.add_argument("--chunks", default="100", help="of the text, for the judge")
    p.add_argument("--only", choices=["weights", "blocks", "widths"])
    a = p.parse_args()
    print(machine(), flush=True)
    text = a.calibration.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def prune(output: Path, *options: str) -> None:
            command = [sys.executable, ROOT / "quantize.py", "prune", "-m", a.model, "-o", output, *options]
            run([*command, "--quiet"])

        def judge(output: Path) -> float:
            given = ["--text", a.text, "--chunks", a.chunks, "--json"]
            command = [sys.executable, a.bench / "kl.py", a.model, output, *given]
            return float(last_json(run(command).output)["kl"][0])

        if a.only in (None, "widths"):
            config = json.loads((a.model / "config.json").read_text())
            wide, heads = config["intermediate_size"], config["num_key_value_heads"]
            cases = [("--intermediate-size", str(wide * n // 8)) for n in (7, 6, 4)]
            for option, size in [*cases, *(("--kv-heads", str(n)) for n in range(1, heads))]:
                output = work / f"narrow{option}-{size}"
                text_of = ("--calibration-dataset", str(a.calibration), "--samples", a.samples)
                prune(output, option, size, "--sequence-length", a.length, *text_of)
                print(f"  {option} {size}: KL {judge(output):.4f}", flush=True)
        if a.only in (None, "weights"):
            found: dict[tuple[str, str], list[float]] = {}
            for draw in a.draws:
                rows = work / f"draw{draw}.txt"
                rows.write_text(rotated(text, draw / 3), encoding="utf-8")
                common = [
                    "--calibration-dataset",
                    rows,
                    "--samples",
                    a.samples,
                    "--sequence-length",
                    a.length,
                ]
                for share in (("--pattern" if ":" in s else "--sparsity", s) for s in a.shares):
                    for method in METHODS:
                        if method == "magnitude" and draw != a.draws[0]:
                            continue  # it reads no text
                        output = work / f"{method}-{draw}-{share[1].replace(':', '-')}"
                        given = common if method != "magnitude" else []
                        prune(output, "--method", method, *share, *map(str, given))
                        kl = judge(output)
                        found.setdefault((share[1], method), []).append(kl)
                        print(f"  draw {draw}  {share[1]:<4} {method:<10} KL {kl:.4f}", flush=True)
            print("\nmean KL over draws")
            for (share, method), values in found.items():
                listed = ", ".join(f"{v:.4f}" for v in values)
                print(f"  {share:<4} {method:<10} {statistics.fmean(values):.4f}  ({listed})")
        if a.only in (None, "blocks"):
            blocks = json.loads((a.model / "config.json").read_text())["num_hidden_layers"]
            losses = []
            for block in range(blocks):
                output = work / f"without-{block}"
                prune(output, "--blocks", str(block))
                losses.append(judge(output))
            print("\nblock, KL without it (kl.py)", ", ".join(f"{b}: {x:.4f}" for b, x in enumerate(losses)))
            for measure in ("kl", "angle"):
                output = work / f"by-{measure}"
                prune(output, "--drop-blocks", "1", "--importance", measure)
                step = json.loads((output / "quant_report.json").read_text())["pruning"]["steps"][0]
                numbers = [step["importance"][str(b)] for b in range(blocks)]
                shown = ", ".join(f"{b}: {x:.4f}" for b, x in enumerate(numbers))
                print(f"{measure}: {shown}; rank correlation {rank_correlation(losses, numbers):.2f}")


if __name__ == "__main__":
    main()
