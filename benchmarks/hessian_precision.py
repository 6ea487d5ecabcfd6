#!/usr/bin/env python3
"""Does the arithmetic of calibration move KL? The same jobs with the sums of the Hessian as this machine's
pipeline makes them, of 8-bit integers where those multiply fastest, and with fp32 products.

    python benchmarks/hessian_precision.py [--model MODEL] [--draws 3] [--bits 4 3] [--kl-only]

For each it prints the largest error of any Hessian of the model, relative to the damped Hessian that GPTQ
works with: the spectral norm of L⁻¹ (H' - H) L⁻ᵀ, where H' is the sum, H the fp64 sum of fp32 products, and L
Lᵀ = H + 0.01 · mean(diag H) · I. 0.01 means that no weighting of inputs is judged more than 1 % off. `bf16
products` is the plain way that the pipeline does not take: every product rounded to bf16 as torch returns it.
KL is judged by our own evaluator on the bundled wikitext-2 text; draws are rows shuffled with seeds 0, 1, 2 …
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, machine

from quant.calibration import statistics as sums
from quant.evaluation.quality import evaluate
from quant.jobs import quantize
from quant.pipeline import blocks
from quant.recipe import make_recipe


class Bf16Gram(sums.Gram):
    """xᵀx in bf16, each batch's product rounded once."""

    def add(self, x: torch.Tensor) -> None:
        self.total += x.bfloat16().t() @ x.bfloat16()


#: How sums are made.
WAYS = {"pipeline": sums.gram_for, "fp32 products": sums.Gram, "bf16 products": Bf16Gram}


class Checked(sums.Accumulator):
    """Also sums in fp64, and keeps the largest error seen."""

    worst = 0.0

    def __init__(self, features: int, device: torch.device, needs: Any):
        super().__init__(features, device, needs)
        self.exact = torch.zeros(features, features, dtype=torch.float64)

    def add(self, inputs: torch.Tensor) -> None:
        super().add(inputs)
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self.exact += x.t() @ x

    def finish(self) -> sums.Statistics:
        tokens = self.tokens
        finished = super().finish()
        assert finished.hessian is not None
        exact = self.exact / tokens
        damped = exact + 0.01 * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)
        factor = torch.linalg.cholesky(damped)
        half = torch.linalg.solve_triangular(factor, finished.hessian.double() - exact, upper=False)
        whitened = torch.linalg.solve_triangular(factor, half.t(), upper=False)
        Checked.worst = max(Checked.worst, float(torch.linalg.eigvalsh(whitened).abs().max()))
        return finished


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared/data/models/tinylm-11m"
    p.add_argument("--model", type=Path, default=shared if shared.exists() else ROOT / "examples/tinylm-4m")
    (
        p.add_argument("--draws", type=int, default=3),
        p.add_argument("--bits", type=int, nargs="+", default=[4, 3]),
    )
    p.add_argument(
        "--kl-only",
        action="store_true",
        help="leave out the errors, whose fp64 sums take most of the time, and plain bf16 products",
    )
    a = p.parse_args()
    print(machine())
    if not a.kl_only:
        blocks.Accumulator = Checked  # type: ignore[misc]
    for bits in a.bits:
        means = {}
        for name, way in list(WAYS.items())[: 2 if a.kl_only else None]:
            sums.gram_for = way  # type: ignore[assignment]
            Checked.worst, divergences, fallbacks = 0.0, [], 0
            for seed in range(a.draws):
                with tempfile.TemporaryDirectory() as folder:
                    values = dict(
                        model_path=a.model,
                        output_path=Path(folder) / "out",
                        method="gptq",
                        bits=bits,
                        format="plain",
                    )
                    report = quantize(
                        make_recipe(
                            {**values, "samples": 128, "sequence_length": 512, "shuffle": True, "seed": seed}
                        )
                    )
                    assert report.quantization is not None
                    fallbacks += len(report.quantization.fallbacks)
                    kl = evaluate(Path(folder) / "out", against=a.model).kl
                    assert kl is not None
                    divergences.append(kl.mean)
            means[name] = statistics.fmean(divergences)
            draws = ", ".join(f"{v:.6f}" for v in divergences)
            error = "" if a.kl_only else f", largest error {Checked.worst:.1e}"
            print(
                f"W{bits} {name:<14} KL {means[name]:.6f} (draws {draws}){error}, fallbacks {fallbacks}",
                flush=True,
            )
        print(
            f"W{bits} KL: pipeline / fp32 products = {means['pipeline'] / means['fp32 products']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
