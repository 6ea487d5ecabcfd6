#!/usr/bin/env python3
"""What calibration is worth to a mixture of experts: KL of GPTQ and YAQA W4 g128 with each
--moe-calibration, beside llm-compressor's GPTQ, which shows every expert all tokens; and what a router that
starves an expert costs.

    python benchmarks/make_mixture.py BALANCED
    python benchmarks/make_mixture.py SKEWED --skew BALANCED
    python benchmarks/mixture.py BALANCED [--skewed SKEWED] [--draws 3] [--llmcompressor-python PYTHON]

A draw is the calibration text rotated to another article, cut into rows in file order; every program gets the
same rows. The judge is `kl.py` of the bench folder, on text of which nothing was used for calibration, both
models in fp32, each quantized model against its own source. A standard error is over chunks; it is not that
of a difference between two rows of the table, which are judged on the same chunks.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from common import ROOT, Finished, last_json, machine, quantize_command, run
from quality import rotated

SHARED = ROOT.parent / "shared"
PEERS = Path(__file__).resolve().parent / "peers.py"
WAYS = ("routed", "all", "blend")
#: End of the label of what is made of the mixture whose router starves an expert.
SKEWED = ", skewed"


@dataclass
class Found:
    """KL to the source and its standard error by draw, and CPU seconds of quantizing."""

    kl: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.kl)


class Table:
    """Makes and judges checkpoints."""

    def __init__(self, a: argparse.Namespace, work: Path):
        self.a, self.work = a, work
        self.found: dict[str, Found] = {}

    def add(
        self, label: str, model: Path, command: list[str | Path], output: Path, foreign: bool = False
    ) -> None:
        """Runs a command that makes ``output`` of ``model``, judges it, prints a line."""
        done: Finished = run(command)
        if foreign:
            output = dequantized_peer(model, output)
        judge = [
            sys.executable, self.a.bench / "kl.py", model, output, "--text", self.work / "judged.txt",
            "--json", "--chunks", str(self.a.chunks),
        ]  # fmt: skip
        kl, error = last_json(run(judge).output)["kl"]
        found = self.found.setdefault(label, Found())
        found.kl.append(kl)
        found.error.append(error)
        found.cpu.append(done.cpu_seconds)
        print(f"  {label:<24} KL {kl:.5f} ± {error:.5f}, {done.cpu_seconds:.0f} s of CPU", flush=True)

    def ours(self, label: str, model: Path, rows: Path, method: str, way: str) -> None:
        output = self.work / f"{label.replace(' ', '-')}-{rows.stem}"
        options = [
            "--method", method, "--scheme", "w4a16", "--format", "plain", "--target", "other",
            "--calibration-dataset", str(rows), "--samples", str(self.a.samples),
            "--sequence-length", str(self.a.length), "--moe-calibration", way, *self.a.options,
            *(["--gradient-samples", str(self.a.samples)] if method == "yaqa" else []),
        ]  # fmt: skip
        self.add(label, model, quantize_command(model, output, *options), output)

    def peer(self, label: str, model: Path, rows: Path) -> None:
        output = self.work / f"{label}-{rows.stem}"
        python = self.a.llmcompressor_python
        command = [
            python, PEERS, model, output, "--method", "gptq", "--text", rows,
            "--samples", str(self.a.samples), "--length", str(self.a.length),
        ]  # fmt: skip
        self.add(label, model, command, output, foreign=True)


#: Names of Mixtral's files → those that llm-compressor gives to the experts that it takes apart.
RENAMED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def dequantized_peer(source: Path, folder: Path) -> Path:
    """A plain checkpoint with the values of llm-compressor's, under the source's names, as ``--format plain``
    writes ours: transformers does not read the packed experts."""
    from safetensors.torch import save_file

    from quant.checkpoint.reader import open_checkpoint
    from quant.formats.reading import dequantized

    original, values = open_checkpoint(source), dequantized(open_checkpoint(folder))
    tensors = {}
    for name, info in original.tensors.items():
        theirs = ".".join(RENAMED.get(part, part) for part in name.split("."))
        value = values.read(name if name in values.tensors else theirs)
        if tuple(value.shape) != info.shape:
            raise SystemExit(f"{folder}: {name} is {tuple(value.shape)}, {info.shape} in the source")
        tensors[name] = value.to(original.read(name).dtype).contiguous()
    plain = folder.with_name(f"{folder.name}-plain")
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, plain / file)
    return plain


def text_of(name: str) -> str:
    """A text of the package."""
    from quant.calibration.files import bundled

    with gzip.open(bundled(name), "rt", encoding="utf-8") as stream:
        return stream.read()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("mixture", type=lambda p: Path(p).resolve())
    p.add_argument("--skewed", type=lambda p: Path(p).resolve(), help="the same with a starved expert")
    p.add_argument("--bench", type=lambda p: Path(p).resolve(), default=SHARED / "bench")
    p.add_argument("--llmcompressor-python", type=Path)
    p.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    p.add_argument("--methods", nargs="+", default=("gptq", "yaqa"), help="of ours")
    p.add_argument("--draws", type=int, default=3)
    p.add_argument("--samples", type=int, default=128)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--chunks", type=int, default=100)
    p.add_argument("--options", nargs="*", default=[], help="more options for our command")
    a = p.parse_args()
    print(f"{machine()}; {a.samples} × {a.length} calibration tokens, {a.chunks} chunks", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        table = Table(a, Path(folder))
        (table.work / "judged.txt").write_text(text_of("wikitext-2-test"), encoding="utf-8")
        calibration = text_of("wikipedia")
        for draw in range(a.draws):
            rows = table.work / f"draw{draw}.txt"
            rows.write_text(rotated(calibration, draw / a.draws), encoding="utf-8")
            print(f"draw {draw + 1} of {a.draws}", flush=True)
            for method, way in product(a.methods, a.ways):
                table.ours(f"{method} {way}", a.mixture, rows, method, way)
            if a.llmcompressor_python:
                table.peer("llm-compressor", a.mixture, rows)
            for method, way in product(a.methods, a.ways if a.skewed else ()):
                table.ours(f"{method} {way}{SKEWED}", a.skewed, rows, method, way)
    first = next(iter(table.found.values()))
    print(f"\n{'':<26}mean KL   of first's   draws")
    for label, found in table.found.items():
        share = f"{found.mean / first.mean:.3f}"
        draws = ", ".join(f"{v:.5f}" for v in found.kl)
        print(f"  {label:<24}{found.mean:.5f}   {share:<10}   {draws}")
    for method, way in product(a.methods, a.ways if a.skewed else ()):
        balanced, skewed = (table.found[f"{method} {way}{end}"] for end in ("", SKEWED))
        print(f"a starved expert costs {skewed.mean / balanced.mean:.3f}x the KL with {method} {way}")


if __name__ == "__main__":
    main()
