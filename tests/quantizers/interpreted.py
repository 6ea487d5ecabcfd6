"""GPTQ by Triton's kernels and by the same steps of torch, on a CPU by Triton's interpreter, which is asked
for before torch is imported: prints how many codes and scales differ, case by case, as JSON."""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from quant.calibration.statistics import Statistics
from quant.quantizers import GPTQQuantizer, columns, factors, gptq, refining
from quant.schemes import WeightScheme

#: Scheme, order of columns, dtype of scales, weights at once, inputs: groups of part of a run, and of all of
#: it.
CASES = {
    "int4": (WeightScheme(4, 8), "static", torch.float16, 1, 16),
    "int4-asym": (WeightScheme(4, 16, False), "none", torch.bfloat16, 2, 16),
    "int8": (WeightScheme(8, -1, scales="F32"), "static", torch.bfloat16, 1, 24),
    "nvfp4": (
        WeightScheme(4, 16, type="float", strategy="tensor_group", scales="F8_E4M3"), "static", None, 2, 32,
    ),
    "fp8": (WeightScheme(8, -1, type="float", strategy="channel", scales="F32"), "none", None, 1, 16),
}  # fmt: skip
OUTPUTS = 6


def solved(case: str, by_triton: bool) -> list[torch.Tensor]:
    """Codes and scales of some weights of one shape, each with inputs of its own."""
    columns._kernels_for = lambda tensor: columns._triton() if by_triton else None  # type: ignore[assignment]
    scheme, order, dtype, weights, inputs = CASES[case]
    draw = torch.Generator().manual_seed(3)
    seen = []
    for _ in range(weights):
        mixed = torch.randn(inputs, inputs, generator=draw)
        x = torch.randn(200, inputs, generator=draw) @ mixed
        seen.append(Statistics(200, x.t() @ x / 200))
    drawn = torch.randn(weights, OUTPUTS, inputs, generator=draw) * 0.02
    made = GPTQQuantizer(act_order=order).many(drawn, seen, scheme, dtype or torch.bfloat16)
    return [x for m in made for x in (m.tensor.codes, m.tensor.scales, m.tensor.zeros) if x is not None]


def main() -> None:
    launched = []
    for module in (gptq, refining, factors):
        module.on_accelerator = lambda tensor: True  # type: ignore[attr-defined]
    for name in ("round_columns", "refine_columns"):
        kernel = getattr(columns._triton(), name)
        setattr(columns._triton(), name, lambda *a, kernel=kernel: (launched.append(1), kernel(*a)))
    different = {}
    for case in CASES:
        pairs = zip(solved(case, True), solved(case, False), strict=True)
        different[case] = sum(int((a.float() != b.float()).sum()) for a, b in pairs)
    print(json.dumps({"different": different, "launched": len(launched)}))


if __name__ == "__main__":
    main()
