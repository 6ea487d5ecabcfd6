#!/usr/bin/env python3
"""Does the bf16 product behind the Hessian move KL? The same jobs with the sums as the pipeline makes them, and with fp32 products.

    python benchmarks/hessian_precision.py [--model MODEL] [--draws 3]

Prints the relative error of the Hessian itself (Frobenius norm, against fp64) on one batch of real activations, and the KL of both ways for each
calibration draw (rows shuffled with seeds 0, 1, 2 …), judged by our own evaluator on the bundled wikitext-2 text.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from common import ROOT, machine

from quant.calibration import statistics as sums
from quant.evaluation.quality import evaluate
from quant.pipeline.manager import quantize
from quant.recipe import make_recipe


def relative_error(tokens: int, features: int, batch: int) -> float:
    """Of the sum over ``tokens`` rows of correlated bf16 noise, in batches."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    total, exact = torch.zeros(features, features), torch.zeros(features, features, dtype=torch.float64)
    for _ in range(tokens // batch):
        x = (torch.randn(batch, features, generator=generator) @ mix).bfloat16()
        sums.add_gram(total, x)
        exact += x.double().t() @ x.double()
    lower = torch.ones(features, features).tril().bool()
    return float((total.double() - exact)[lower].norm() / exact[lower].norm())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared/data/models/tinylm-11m"
    p.add_argument("--model", type=Path, default=shared if shared.exists() else ROOT / "examples/tinylm-4m")
    p.add_argument("--draws", type=int, default=3), p.add_argument("--bits", type=int, default=4)
    a = p.parse_args()
    print(machine())
    as_is = sums.bf16_products
    found: dict[str, list[float]] = {"pipeline": [], "fp32 products": []}
    for name in found:
        sums.bf16_products = as_is if name == "pipeline" else lambda: False
        print(f"{name}: relative error of a Hessian of 65,536 tokens {relative_error(65536, 1024, 2048):.1e}", flush=True)
        for seed in range(a.draws):
            with tempfile.TemporaryDirectory() as folder:
                values = dict(model_path=a.model, output_path=Path(folder) / "out", method="gptq", bits=a.bits, format="plain")
                quantize(make_recipe({**values, "samples": 128, "sequence_length": 512, "shuffle": True, "seed": seed}))
                kl = evaluate(Path(folder) / "out", against=a.model).kl
                assert kl is not None
                found[name].append(kl.mean)
                print(f"  draw {seed}: KL {kl.mean:.6f} ± {kl.standard_error:.6f}", flush=True)
    means = {k: statistics.fmean(v) for k, v in found.items()}
    print(f"mean KL: {', '.join(f'{k} {v:.6f}' for k, v in means.items())}; ratio {means['pipeline'] / means['fp32 products']:.4f}")


if __name__ == "__main__":
    main()
