#!/usr/bin/env python3
"""How well `quant search` foretells: the KL of its candidates beside that of the checkpoints themselves.

    python benchmarks/search.py [--models tinylm-11m …] [--bits 5] [--blocks 3] [--search-samples 32]
                                [--samples 64] [--length 512] [--chunks 40] [--candidates 6] [--json FILE]

Of the candidates those are made that the search calls best and others at even distances behind them in what
they are foretold to lose, each by `quant quantize`, and measured by `quant evaluate` on the bundled test
text, of which the search has nothing.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine

sys.path.insert(0, str(ROOT))

from methods import SHARED  # noqa: E402
from mixed import in_bf16  # noqa: E402

import quant  # noqa: E402
from quant import jobs  # noqa: E402
from quant.evaluation.quality import Sample, Source, evaluate  # noqa: E402
from quant.recipe import make_recipe  # noqa: E402


def spread(found: list[dict], wanted: int) -> list[dict]:
    """Some of the candidates, the first and the last among them."""
    found = sorted(found, key=lambda e: e["kl"])
    last, several = len(found) - 1, min(wanted, len(found))
    return [found[i] for i in sorted({round(i * last / max(several - 1, 1)) for i in range(several)})]


def settings(entry: dict) -> dict:
    """A candidate's options as keys of a recipe."""
    words = entry["options"].split()
    values = {k.removeprefix("--").replace("-", "_"): v for k, v in zip(words[::2], words[1::2], strict=True)}
    return {
        k: int(v) if k == "group_size" else float(v) if k == "target_bits" else v for k, v in values.items()
    }


def checked(model: Path, options: argparse.Namespace, folder: Path) -> list[dict]:
    text = {"samples": options.samples, "sequence_length": options.length}
    values = {"model_path": model, "output_path": folder / "out", "target_bits": options.bits, **text}
    start = time.perf_counter()
    found = jobs.search(values, blocks=options.blocks, rows=options.search_samples).to_dict()
    print(f"{model.name}: searched in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    source = Source(model, Sample(length=min(options.length, 512), chunks=options.chunks))
    rows = []
    for number, entry in enumerate(spread(found["candidates"], options.candidates)):
        output = folder / f"{number}"
        report = quant.quantize(
            make_recipe({"model_path": model, "output_path": output, **text, **settings(entry)})
        )
        kl = evaluate(output, against=source).kl
        assert kl is not None
        rows.append(
            {
                "model": model.name,
                **{
                    k: entry[k]
                    for k in ("scheme", "method", "bits_per_weight", "kl", "standard_error", "seconds")
                },
                "measured": kl.mean,
                "measured_error": kl.standard_error,
                "measured_seconds": report.seconds["total"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            with options.json.open("a") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| model | scheme | method | bits | KL foretold | measured | foretold / measured "
        "| off by, standard errors | seconds foretold | taken |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        off = (r["kl"] - r["measured"]) / math.hypot(r["standard_error"], r["measured_error"])
        lines.append(
            f"| {r['model']} | {r['scheme']} | {r['method']} | {r['bits_per_weight']:.2f} "
            f"| {r['kl']:.5f} ± {r['standard_error']:.5f} | {r['measured']:.5f} ± {r['measured_error']:.5f} "
            f"| {r['kl'] / r['measured']:.2f} | {off:+.1f} "
            f"| {r['seconds']:.0f} | {r['measured_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tinylm-11m"])
    parser.add_argument("--bits", type=float, default=5.0)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--search-samples", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--json", type=Path, help="file that rows are added to, a JSON object a line")
    options = parser.parse_args()
    print(machine(), file=sys.stderr)
    rows: list[dict] = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            model = in_bf16(options.data / "models" / name, Path(folder))
            rows += checked(model, options, Path(folder))
    print(table(rows))


if __name__ == "__main__":
    main()
