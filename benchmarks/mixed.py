#!/usr/bin/env python3
"""What choosing a scheme for every layer gains over one scheme for all: KL to the source at the same bits per
weight, and how well it was predicted.

    python benchmarks/mixed.py [--models tinylm-11m …] [--methods gptq …] [--bits 4.25 4.5 5] [--draws 3]
                               [--samples 128] [--chunks 40] [--json FILE]

A draw is the calibration text rotated to another place. Every checkpoint is made by `quant quantize` and
measured by `quant evaluate` on the first chunks of a test text that no draw has. Uniform schemes are 4 bits
by channel and in groups of 128, 64 and 32, without and with zero points, and 8 bits by channel. What one of
them would lose at the bits of a mixed checkpoint is read off the lower hull of these points: of those without
zero points, of all, and of all by the logarithm of KL (a uniform scheme of that many bits, which no engine
has between 4 and 8; the others are what layers drawn by lot would lose).
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, machine

sys.path.insert(0, str(ROOT))

from methods import MODELS, SHARED, Model  # noqa: E402
from quality import rotated  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import quant  # noqa: E402
from quant.evaluation.quality import Sample, Source, evaluate  # noqa: E402

#: Bits, group sizes and symmetry of the schemes that are given to all layers.
UNIFORM = tuple((4, g, s) for s in (True, False) for g in (-1, 128, 64, 32)) + ((8, -1, True),)


def made(values: dict, output: Path, source: Source) -> dict:
    """A checkpoint's bits per weight, KL with its error, seconds, and how it was chosen."""
    report = quant.quantize(quant.make_recipe({**values, "output_path": output}))
    found = evaluate(output, against=source)
    job = report.quantization
    assert job is not None and job.bits_per_weight is not None and found.kl is not None
    return {
        "bits": job.bits_per_weight,
        "kl": found.kl.mean,
        "error": found.kl.standard_error,
        "seconds": report.seconds["total"],
        "allocation": None
        if job.allocation is None
        else {k: job.allocation[k] for k in ("summed", "predicted", "measured", "uniform", "mixed", "gap")},
    }


def in_bf16(source: Path, folder: Path) -> Path:
    """The model as it is served, with scales of 16 bits: small test models are stored in fp32."""
    config = json.loads((source / "config.json").read_text())
    if (config.get("dtype") or config.get("torch_dtype")) == "bfloat16":
        return source
    copy = folder / source.name
    shutil.copytree(source, copy)
    for file in copy.glob("*.safetensors"):
        tensors = {k: v.bfloat16() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    return copy


def hull_at(points: list[tuple[float, float]], bits: float) -> float:
    """The lower convex hull of (bits, loss) at so many bits; below the first point its loss."""
    points = sorted(points)
    kept: list[tuple[float, float]] = []
    for x, y in points:
        if kept and y >= kept[-1][1]:
            continue
        while len(kept) > 1 and (kept[-1][1] - kept[-2][1]) * (x - kept[-2][0]) >= (y - kept[-2][1]) * (
            kept[-1][0] - kept[-2][0]
        ):
            kept.pop()
        kept.append((x, y))
    if bits <= kept[0][0]:
        return kept[0][1]
    for (x0, y0), (x1, y1) in zip(kept, kept[1:], strict=False):
        if bits <= x1:
            return y0 + (bits - x0) / (x1 - x0) * (y1 - y0)
    return kept[-1][1]


def fits(model: Path, bits: int, group: int) -> bool:
    """Whether every linear's inputs divide into groups and fill words of a bit width."""
    config = json.loads((model / "config.json").read_text())
    sides = [config["hidden_size"], config["intermediate_size"]]
    return all(k % (32 // bits) == 0 and (group == -1 or k % group == 0) for k in sides)


def one_draw(
    model: Model,
    method: str,
    draw: int,
    asked: list[float],
    samples: int,
    chunks: int,
    data: Path,
    folder: Path,
) -> list[dict]:
    """The rows of one draw: uniform schemes, then mixed ones."""
    path, text = in_bf16(data / "models" / model.name, folder), data / "text" / model.text
    calibration = folder / "calibration.txt"
    whole = (data / "text" / model.calibration).read_text()
    calibration.write_text(rotated(whole, draw / 3, model.mark))
    values = {
        "model_path": path,
        "method": method,
        "samples": samples,
        "sequence_length": model.length,
        "calibration_dataset": [calibration],
    }
    if method == "minmax":
        uniform_values = {"model_path": path, "method": method}
    else:
        uniform_values = values | ({"gradient_samples": min(samples, 64)} if method == "yaqa" else {})
    source = Source(path, Sample(text=text, length=model.length, chunks=chunks))
    # K that fills no whole words at 4 bits stays as it is: in both
    ignore = [] if fits(path, 4, -1) else ["*.down_proj"]
    rows, points = [], []
    for bits, group, symmetric in UNIFORM:
        if not fits(path, bits, group) and not (ignore and group == -1):
            continue
        name = f"w{bits} {'channel' if group == -1 else f'g{group}'}{'' if symmetric else ' asym'}"
        numbers = {"bits": bits, "group_size": group, "symmetric": symmetric}
        own = {**uniform_values, **numbers, "ignore": ignore}
        row = made(own, folder / f"{name}.{draw}", source)
        points.append((row["bits"], row["kl"], symmetric))
        rows.append({"model": model.name, "method": method, "draw": draw, "name": name, **row})
        print(json.dumps(rows[-1]), flush=True)
    for target in asked:
        own = {**values, "gradient_samples": min(samples, 64), "target_bits": target, "ignore": ignore}
        row = made(own, folder / f"mixed{target}.{draw}", source)
        without = hull_at([(b, k) for b, k, plain in points if plain], row["bits"])
        line = hull_at([(b, k) for b, k, _ in points], row["bits"])
        log = math.exp(hull_at([(b, math.log(k)) for b, k, _ in points], row["bits"]))
        rows.append(
            {
                "model": model.name,
                "method": method,
                "draw": draw,
                "name": f"mixed {target:g}",
                **row,
                "without": without,
                "uniform": line,
                "uniform_log": log,
                "predicted_over_measured": row["allocation"]["predicted"]
                / row["allocation"]["measured"]["mean"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Means over draws, a line for each model, method and target."""
    lines = [
        "| model | method | target | bits | KL mixed | of uniform without zero points | of all uniform "
        "| by logarithm | predicted / measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((r["model"], r["method"], r["name"]) for r in rows if r["name"].startswith("mixed"))
    for key in keys:
        own = [r for r in rows if (r["model"], r["method"], r["name"]) == key]

        def mean(field: str, own: list[dict] = own) -> float:
            return statistics.fmean(r[field] for r in own)

        guesses = [r["predicted_over_measured"] for r in own]
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2].removeprefix('mixed ')} | {mean('bits'):.3f} "
            f"| {mean('kl'):.6f} "
            f"| {mean('kl') / mean('without'):.2f} | {mean('kl') / mean('uniform'):.2f} "
            f"| {mean('kl') / mean('uniform_log'):.2f} | {min(guesses):.2f}…{max(guesses):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["tinylm-11m", "tinylm-11m-outliers", "babyllama-tok361"]
    )
    parser.add_argument("--methods", nargs="+", default=["gptq", "yaqa"])
    parser.add_argument("--bits", nargs="+", type=float, default=[4.25, 4.5, 5.0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--json", type=Path, help="file that rows are added to, a JSON object a line")
    options = parser.parse_args()
    print(machine(), file=sys.stderr)
    rows: list[dict] = []
    for name in options.models:
        model = next(m for m in MODELS if m.name == name)
        for method in options.methods:
            for draw in range(options.first_draw, options.first_draw + options.draws):
                with tempfile.TemporaryDirectory() as folder:
                    new = one_draw(
                        model,
                        method,
                        draw,
                        options.bits,
                        options.samples,
                        options.chunks,
                        options.data,
                        Path(folder),
                    )
                rows += new
                if options.json:
                    with options.json.open("a") as stream:
                        for row in new:
                            stream.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
