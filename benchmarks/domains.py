#!/usr/bin/env python3
"""Whether a method makes any domain of text worse than another does: KL to the source on the bundled texts of
five domains, mean of several calibration draws.

    python benchmarks/domains.py [--model DIR] [--methods yaqa gptq] [--draws 3] [--bits 4 3]

The first method is judged by the others. A draw is the calibration text rotated to another place; both
methods quantize the same rows, and both are measured on the same chunks by `quant evaluate --domains`. A
domain is worse where the difference of the means over draws is above zero by more than its 95 % interval,
which is over chunks, of the draws' mean differences; the program then ends with 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, last_json, machine, quantize_command, run
from quality import rotated

from quant.calibration.files import bundled, documents
from quant.evaluation.intervals import Measured, mean_of
from quant.evaluation.quality import Source, run_both
from quant.evaluation.texts import DOMAINS, Sample, joined

SHARED = ROOT.parent / "shared"


def by_chunk(output: Path, source: Source) -> dict[str, list[float]]:
    """Domain → mean KL of each chunk."""
    import torch

    from quant.checkpoint.reader import open_checkpoint
    from quant.evaluation.quality import Runner
    from quant.evaluation.simulation import Simulation
    from quant.progress import silent

    checkpoint, device = open_checkpoint(output), torch.device("cpu")
    runner = Runner(checkpoint, device, Simulation(checkpoint))
    numbers = run_both(runner, source, joined(source.texts), device, silent)
    assert numbers.kl is not None
    values, found = numbers.kl.double().mean(1).tolist(), {}
    for text in source.texts:
        found[text.name], values = values[: len(text.rows)], values[len(text.rows) :]
    return found


def difference(own: list[list[float]], other: list[list[float]]) -> Measured:
    """Mean over draws of the difference of two methods' KL, with its error over chunks.

    Args:
        own, other: of each draw, each chunk's KL.
    """
    draws = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(own, other, strict=True)]
    return mean_of([statistics.fmean(values) for values in zip(*draws, strict=True)])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=SHARED / "data/models/tinylm-11m")
    p.add_argument("--calibration", type=Path, help="text  [default: the bundled one]")
    p.add_argument("--methods", nargs="+", default=["yaqa", "gptq"])
    p.add_argument("--bits", type=int, nargs="+", default=[4])
    p.add_argument("--draws", type=int, default=3)
    p.add_argument("--samples", default="128")
    p.add_argument("--length", default="512")
    p.add_argument("--chunks", type=int, default=16, help="of each domain")
    p.add_argument("--gradient-samples", default="128", help="of yaqa")
    a = p.parse_args()
    if len(a.methods) < 2:
        p.error("--methods: give the one to judge and at least one to judge it by")
    text = next(iter(documents([a.calibration or bundled("wikipedia")])))
    source = Source(a.model, Sample(length=int(a.length), chunks=a.chunks, domains=True))
    worse = []
    print(machine(), flush=True)
    for bits in a.bits:
        found: dict[tuple[str, str], list[list[float]]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for draw in range(a.draws):
                rows = Path(folder) / f"draw{draw}.txt"
                rows.write_text(rotated(str(text), draw / a.draws), encoding="utf-8")
                for method in a.methods:
                    output = Path(folder) / f"{method}-{draw}"
                    options = ["--bits", str(bits), "--calibration-dataset", str(rows), "--method", method]
                    options += ["--samples", a.samples, "--sequence-length", a.length]
                    options += ["--gradient-samples", a.gradient_samples] if method == "yaqa" else []
                    last_json(run(quantize_command(a.model.resolve(), output, *options)).output)
                    for name, values in by_chunk(output, source).items():
                        found.setdefault((method, name), []).append(values)
        print(f"\n{a.model.name}, W{bits}: KL in nats per token, mean of {a.draws} draws")
        print(f"| domain | chunks | {' | '.join(a.methods)} | ratio | difference, 95 % |")
        print("|---|---|" + "---|" * len(a.methods) + "---|---|")
        for name in DOMAINS:
            means = [statistics.fmean(map(statistics.fmean, found[m, name])) for m in a.methods]
            for other, mean in zip(a.methods[1:], means[1:], strict=True):
                away = difference(found[a.methods[0], name], found[other, name])
                low, high = away.interval or (away.mean, away.mean)
                cells = " | ".join(f"{m:.5f}" for m in means)
                print(
                    f"| {name} | {len(found[other, name][0])} | {cells} | {means[0] / mean:.3f}x {other} | "
                    f"{low:+.6f} to {high:+.6f} |",
                    flush=True,
                )
                if low > 0:
                    worse.append(f"W{bits} {name}: {a.methods[0]} is worse than {other}")
    print("\n" + ("\n".join(worse) or f"no domain is worse under {a.methods[0]}"))
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
