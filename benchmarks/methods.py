#!/usr/bin/env python3
"""The quality of every method in every scheme: KL to the source, top-1 agreement, bits per weight, seconds
and peak memory, beside the peers.

    python benchmarks/methods.py [--models tinylm-11m …] [--rows w4a16/gptq …] [--draws 3]
    [--llmcompressor-python PYTHON] [--gptqmodel-python PYTHON]
                                 [--autoawq-python PYTHON] [--vllm-python PYTHON] [--json FILE]

A draw is the calibration text rotated to another place, cut into rows in file order; methods that need no
data have one, and so has AutoAWQ, which takes eight minutes. It is also run with its scale search mended (see
quant/backends/worker_autoawq.py). Weights-only schemes are judged by `kl.py` of the bench folder through
`--format plain`, schemes with quantized activations by `quant evaluate`, which simulates them, and, with
--vllm-python, by vLLM itself (perplexity, chunk by chunk, as a loss against the bf16 source). The standard
error of a KL is over the chunks of one draw, averaged over draws. Bits per weight count everything that is
stored for the quantized linears.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, last_json, machine, quantize_command, run
from quality import rotated

from quant.defaults import EFFORTS

SHARED = ROOT.parent / "shared"
PEERS = Path(__file__).resolve().parent / "peers.py"


@dataclass(frozen=True)
class Model:
    """A source with the texts it was trained for; ``length`` is that of calibration rows and of evaluation
    chunks."""

    name: str
    calibration: str
    text: str
    length: int
    mark: str  # where a document starts
    group: str = "128"


MODELS = (
    Model("tinylm-11m", "wikipedia-sample/wiki.txt", "wikitext-2/test.txt", 512, "<doc "),
    Model("tinylm-11m-outliers", "wikipedia-sample/wiki.txt", "wikitext-2/test.txt", 512, "<doc "),
    Model("stories260K", "tinystories/train_sample.txt", "tinystories/valid.txt", 256, "\n\n", "-1"),
    Model("babyllama-tok361", "tinystories/train_sample.txt", "tinystories/valid.txt", 256, "\n\n", "-1"),
)


@dataclass(frozen=True)
class Row:
    """A scheme made by a method: of ours, or (``peer``) the same by another program with its own words for
    both."""

    scheme: str
    label: str
    options: tuple[str, ...]
    calibrated: bool = True
    weights_only: bool = True
    peer: str = ""
    draws: int = 0  # 0: as many as asked for


def ours(scheme: str, label: str, *options: str, data: bool = True, weights_only: bool = True) -> Row:
    method = (
        label.split("+")[-1] if label.split("+")[0] in ("smooth_quant", "awq") and "+" in label else label
    )
    extra = ("--outlier-suppression", label.split("+")[0]) if "+" in label else ()
    return Row(
        scheme,
        label,
        (
            *("--effort" if method in EFFORTS else "--method", method),
            *("--scheme", re.sub("-(static|channel|azp)$", "", scheme)),
            *(("--group-size", "-1") if scheme.endswith("-channel") else ()),
            *(*extra, *options),
        ),
        data,
        weights_only,
    )


def peer(
    scheme: str, program: str, label: str, *options: str, data: bool = True, weights_only: bool = True
) -> Row:
    return Row(scheme, f"{program} {label}", options, data, weights_only, program)


#: As many rows for gradients as for the Hessians of the others.
YAQA = ("--gradient-samples", "128")

ROWS = (
    ours("w4a16", "minmax", data=False),
    ours("w4a16", "gptq"),
    ours("w4a16", "yaqa", *YAQA),
    ours("w4a16", "balanced"),
    ours("w4a16", "best"),
    ours("w4a16", "smooth_quant+gptq"),
    ours("w4a16", "awq+gptq"),
    peer("w4a16", "llm-compressor", "rtn", "--method", "rtn", "--scheme", "W4A16", data=False),
    peer("w4a16", "llm-compressor", "gptq", "--method", "gptq", "--scheme", "W4A16"),
    peer("w4a16", "GPTQModel", "gptq", "--bits", "4"),
    ours("w4a16-asym", "minmax", data=False),
    ours("w4a16-asym", "hqq", data=False),
    ours("w4a16-asym", "awq"),
    ours("w4a16-asym", "gptq"),
    ours("w4a16-asym", "yaqa", *YAQA),
    ours("w4a16-asym", "balanced"),
    ours("w4a16-asym", "best"),
    ours("w4a16-asym", "awq+gptq"),
    Row("w4a16-asym", "AutoAWQ awq", (), peer="AutoAWQ", draws=1),
    Row(
        "w4a16-asym",
        "AutoAWQ awq, search mended",
        ("--backend", "autoawq", "--backend-python", "{AutoAWQ}"),
        draws=1,
    ),
    ours("w4a16-channel", "gptq"),
    ours("w4a16-channel", "yaqa", *YAQA),
    ours("w4a16-channel", "balanced"),
    ours("w4a16-channel", "best"),
    ours("w3a16", "gptq"),
    ours("w3a16", "yaqa", *YAQA),
    ours("w3a16", "balanced"),
    ours("w3a16", "best"),
    peer("w3a16", "GPTQModel", "gptq", "--bits", "3"),
    ours("w8a16", "minmax", data=False),
    ours("w8a8-int8", "minmax", "--outlier-suppression", "none", data=False, weights_only=False),
    ours("w8a8-int8", "smooth_quant+minmax", weights_only=False),
    ours("w8a8-int8", "smooth_quant+gptq", weights_only=False),
    ours("w8a8-int8", "balanced", weights_only=False),
    ours("w8a8-int8-azp", "smooth_quant+gptq", "--asymmetric-activations", weights_only=False),
    peer(
        "w8a8-int8",
        "llm-compressor",
        "rtn",
        "--method",
        "rtn",
        "--scheme",
        "W8A8",
        data=False,
        weights_only=False,
    ),
    peer(
        "w8a8-int8",
        "llm-compressor",
        "smoothquant+rtn",
        "--method",
        "rtn",
        "--scheme",
        "W8A8",
        "--smooth",
        "0.5",
        weights_only=False,
    ),
    peer(
        "w8a8-int8",
        "llm-compressor",
        "smoothquant+gptq",
        "--method",
        "gptq",
        "--scheme",
        "W8A8",
        "--smooth",
        "0.5",
        weights_only=False,
    ),
    ours("w8a8-int8-static", "smooth_quant+minmax", "--activations", "static", weights_only=False),
    ours("w8a8-fp8", "fp8", data=False, weights_only=False),
    peer(
        "w8a8-fp8",
        "llm-compressor",
        "rtn",
        "--method",
        "rtn",
        "--scheme",
        "FP8_DYNAMIC",
        data=False,
        weights_only=False,
    ),
    ours("w8a8-fp8-tensor-static", "fp8", "--activations", "static", weights_only=False),
    peer(
        "w8a8-fp8-tensor-static",
        "llm-compressor",
        "rtn",
        "--method",
        "rtn",
        "--scheme",
        "FP8",
        weights_only=False,
    ),
    ours("fp8-block", "fp8", data=False, weights_only=False),
    peer(
        "fp8-block",
        "llm-compressor",
        "rtn",
        "--method",
        "rtn",
        "--scheme",
        "FP8_BLOCK",
        data=False,
        weights_only=False,
    ),
    ours("nvfp4a16", "minmax", data=False),
    ours("nvfp4a16", "gptq"),
    ours("nvfp4a16", "yaqa", *YAQA),
    ours("nvfp4a16", "balanced"),
    ours("nvfp4a16", "best"),
    peer("nvfp4a16", "llm-compressor", "rtn", "--method", "rtn", "--scheme", "NVFP4A16", data=False),
    ours("nvfp4", "minmax", weights_only=False),
    ours("nvfp4", "gptq", weights_only=False),
    ours("nvfp4", "smooth_quant+gptq", weights_only=False),
    ours("mxfp4a16", "minmax", data=False),
    ours("mxfp4a16", "gptq"),
    ours("mxfp8", "minmax", data=False, weights_only=False),
)


#: Schemes whose group size is to be chosen.
GROUPED = ("w4a16", "w4a16-asym", "w3a16", "w8a16")


@dataclass
class QuantizedLayers:
    """What the draws of a row gave."""

    kl: list[float]
    error: list[float]
    top1: list[float]
    bits: float
    seconds: list[float]
    peak: int
    loss: list[float]


class Job:
    """Runs the rows of one model."""

    def __init__(self, arguments: argparse.Namespace, model: Model, work: Path):
        self.a, self.model, self.work = arguments, model, work
        self.source = arguments.data / "models" / model.name
        self.text = arguments.data / "text" / model.text
        self.chunks = str(arguments.chunks)

    def rows_of(self, draw: int) -> Path:
        """The calibration text of a draw."""
        path = self.work / f"draw{draw}.txt"
        if not path.exists():
            text = (self.a.data / "text" / self.model.calibration).read_text(encoding="utf-8")
            path.write_text(rotated(text, draw / self.a.draws, self.model.mark), encoding="utf-8")
        return path

    def make(self, row: Row, draw: int, output: Path) -> tuple[float, int, float]:
        """Makes a checkpoint; returns seconds and peak memory of the whole program, and the bits per
        weight."""
        length = str(self.model.length)
        if row.peer:
            python = {
                "llm-compressor": self.a.llmcompressor_python,
                "GPTQModel": self.a.gptqmodel_python,
                "AutoAWQ": self.a.autoawq_python,
            }[row.peer]
            options = [
                *row.options,
                "--text",
                self.rows_of(draw),
                "--samples",
                self.a.samples,
                "--length",
                length,
            ]
            if row.peer == "llm-compressor":
                done = run([python, PEERS, self.source, output, *options])
            else:
                done = run(
                    [python, self.a.bench / f"peer_{row.peer.lower()}.py", self.source, output, *options]
                )
            return done.seconds, done.peak_rss_bytes, stored_bits(output, self.source)
        grouped = ("--group-size", self.model.group) if row.scheme in GROUPED else ()
        form = "plain" if row.weights_only else "compressed-tensors"
        options = [o.format(AutoAWQ=self.a.autoawq_python) for o in row.options]
        options += [*grouped, "--format", form, *self.a.options, "--target", "other"]
        if row.calibrated:
            options += [
                "--calibration-dataset",
                str(self.rows_of(draw)),
                "--samples",
                self.a.samples,
                "--sequence-length",
                length,
            ]
        done = run(quantize_command(self.source, output, *options))
        bits = last_json(done.output)["bits_per_weight"]
        if row.weights_only:  # the plain file has 16 bits a weight: count what the packed one would have
            bits = self.packed_bits(last_json(done.output))
        return done.seconds, done.peak_rss_bytes, bits

    def packed_bits(self, report: dict) -> float:
        """Bits per weight with scales, zero points and the numbers of each tensor (its shape, or NVFP4's
        global scale) counted."""
        from quant.checkpoint.reader import open_checkpoint
        from quant.schemes import WeightScheme

        checkpoint = open_checkpoint(self.source)
        scheme = WeightScheme(**report["scheme"]["weights"])
        scale = {"model": 16, "F32": 32}.get(scheme.scales, 8)
        total = weights = 0.0
        for name in report["tensors"]["quantized"]:
            n, k = checkpoint.info(name).shape
            total += n * k * scheme.bits_per_weight(k, scale) + (128 if scheme.type == "int" else 32)
            weights += n * k
        return total / weights

    def judge(self, row: Row, output: Path) -> tuple[float, float, float]:
        """KL, its standard error over chunks, and top-1 agreement."""
        if row.weights_only and row.peer != "AutoAWQ":
            python = {
                "llm-compressor": self.a.llmcompressor_python,
                "GPTQModel": self.a.gptqmodel_python,
            }.get(row.peer, sys.executable)
            loader = "gptqmodel" if row.peer == "GPTQModel" else "transformers"
            command = [
                python,
                self.a.bench / "kl.py",
                self.source,
                output,
                "--text",
                self.text,
                "--json",
                "--loader",
                loader,
            ]
            value = last_json(
                run([*command, "--length", str(self.model.length), "--chunks", self.chunks]).output
            )
            return value["kl"][0], value["kl"][1], value["top1"][0]
        command = [
            sys.executable,
            ROOT / "quantize.py",
            "evaluate",
            output,
            "--against",
            self.source,
            "--text",
            self.text,
            "--json",
        ]
        value = last_json(run([*command, "--length", str(self.model.length), "--chunks", self.chunks]).output)
        return value["kl"]["mean"], value["kl"]["standard_error"], value["top1"]["mean"]

    def served(self, output: Path) -> float:
        """Loss of log-likelihood in nats a token, as vLLM computes it: that of the checkpoint less that of
        the source."""
        if self.source not in self.a.cache:
            self.a.cache[self.source] = self._vllm(self.source)
        return self._vllm(output) - self.a.cache[self.source]

    def _vllm(self, path: Path) -> float:
        command = [
            self.a.vllm_python,
            self.a.bench / "vllm_perplexity.py",
            path,
            "--text",
            self.text,
            "--json",
            "--chunks",
            self.chunks,
        ]
        return last_json(run(command, result="{").output)["nll"]

    def measure(self, row: Row) -> QuantizedLayers | str:
        """All draws of a row, or why it cannot be made."""
        layers = QuantizedLayers([], [], [], 0.0, [], 0, [])
        for draw in range(row.draws or self.a.draws if row.calibrated else 1):
            output = self.work / "output"
            subprocess.run(["rm", "-rf", output, output.with_name("output.work")], check=True)
            try:
                seconds, peak, layers.bits = self.make(row, draw, output)
            except SystemExit as error:
                return next(
                    (
                        x
                        for x in reversed(str(error).splitlines())
                        if "Error" in x or "error" in x or ": " in x
                    ),
                    str(error),
                )[:200]
            kl, error, top1 = self.judge(row, output)
            (
                layers.kl.append(kl),
                layers.error.append(error),
                layers.top1.append(top1),
                layers.seconds.append(seconds),
            )
            layers.peak = max(layers.peak, peak)
            if (
                self.a.vllm_python
                and draw == 0
                and not row.weights_only
                and not row.peer
                and self.model.name.startswith("tinylm")
            ):
                try:
                    layers.loss.append(self.served(output))
                except SystemExit:
                    pass  # a scheme that vLLM's CPU build has no kernel for
        return layers


def stored_bits(output: Path, source: Path) -> float:
    """Stored bits per weight of a checkpoint's quantized linears, from its headers."""
    sys.path.insert(0, str(ROOT))
    from quant.checkpoint.reader import open_checkpoint
    from quant.formats import find_format

    checkpoint = open_checkpoint(output)
    layers = find_format(checkpoint.config, checkpoint.tensors)
    if layers is None:
        return 16.0
    own = [
        i.nbytes
        for n, i in checkpoint.tensors.items()
        if n.rpartition(".")[0] in layers.linears and not n.endswith(".bias")
    ]
    return 8 * sum(own) / sum(x.n * x.k for x in layers.linears.values())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data",
        type=lambda p: Path(p).resolve(),
        default=SHARED / "data",
        help="folder with models and texts",
    )
    p.add_argument(
        "--bench",
        type=lambda p: Path(p).resolve(),
        default=SHARED / "bench",
        help="folder with kl.py, vllm_perplexity.py and the peers",
    )
    p.add_argument("--models", nargs="+", default=[m.name for m in MODELS], choices=[m.name for m in MODELS])
    p.add_argument("--rows", nargs="+", default=[], metavar="SCHEME/METHOD", help="only these rows")
    p.add_argument("--llmcompressor-python"), p.add_argument("--gptqmodel-python")
    (
        p.add_argument("--autoawq-python", help="takes eight minutes a draw on the 11M model"),
        p.add_argument("--vllm-python"),
    )
    (
        p.add_argument("--draws", type=int, default=3),
        p.add_argument("--samples", default="128"),
        p.add_argument("--chunks", type=int, default=100),
    )
    p.add_argument("--options", nargs="*", default=[], help="more options for our command")
    p.add_argument("--json", type=Path, help="append each row's values to this file")
    a = p.parse_args()
    a.cache = {}
    pythons = {
        "llm-compressor": a.llmcompressor_python,
        "GPTQModel": a.gptqmodel_python,
        "AutoAWQ": a.autoawq_python,
        "": sys.executable,
    }
    rows = [
        r
        for r in ROWS
        if pythons[r.peer]
        and (a.autoawq_python or "{AutoAWQ}" not in r.options)
        and (not a.rows or f"{r.scheme}/{r.label}" in a.rows)
    ]
    print(machine(), flush=True)
    for model in (m for m in MODELS if m.name in a.models):
        print(
            f"\n{model.name}: {a.samples} × {model.length} calibration tokens a draw, {a.chunks} chunks of "
            f"{model.length} tokens of {model.text}"
        )
        print(
            "| scheme | method | KL | draws | top-1 | bits/weight | seconds | peak MiB | loss in vLLM "
            "|\n|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            job = Job(a, model, Path(folder))
            for row in rows:
                divergence = job.measure(row)
                if isinstance(divergence, str):
                    print(f"| {row.scheme} | {row.label} | not made: {divergence} |", flush=True)
                    continue
                kl, error = statistics.fmean(divergence.kl), statistics.fmean(divergence.error)
                print(
                    f"| {row.scheme} | {row.label} | {kl:.5f} ± {error:.5f} | "
                    f"{', '.join(f'{x:.5f}' for x in divergence.kl)} "
                    f"| {statistics.fmean(divergence.top1):.2%} | {divergence.bits:.3f} | "
                    f"{statistics.fmean(divergence.seconds):.0f} | {divergence.peak >> 20} "
                    f"| {f'{statistics.fmean(divergence.loss):+.5f}' if divergence.loss else ''} |",
                    flush=True,
                )
                if a.json:
                    with a.json.open("a") as stream:
                        stream.write(
                            json.dumps(
                                {
                                    "model": model.name,
                                    "scheme": row.scheme,
                                    "label": row.label,
                                    **vars(divergence),
                                }
                            )
                            + "\n"
                        )


if __name__ == "__main__":
    main()
