"""GPTQ by Triton's kernels and by the same steps of torch, on a CPU by Triton's interpreter, which is asked
for before torch is imported: prints how many codes and scales differ, case by case, as JSON."""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from quant.calibration.statistics import Statistics
from quant.quantizers import GPTQQuantizer, columns, factors, gptq, refining, two_sided
from quant.quantizers.grids import Grid
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
    columns.kernels_for = lambda tensor: columns._triton() if by_triton else None  # type: ignore[assignment]
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


def both_sides(by_triton: bool, bits: int, zeros: bool) -> list[torch.Tensor]:
    """Codes after feedback along both sides, codes after a descent, and what that gained: of two weights with
    two blocks of outputs each."""
    two_sided.kernels_for = lambda tensor: columns._triton() if by_triton else None  # type: ignore[assignment]
    scheme = WeightScheme(bits, 8, not zeros) if bits == 4 else WeightScheme(bits, 8, type="float")
    grid, draw = Grid(scheme, torch.float32), torch.Generator().manual_seed(5)

    def hessian(*shape: int) -> torch.Tensor:
        mixed = torch.randn(*shape, generator=draw)
        return mixed @ mixed.mT / shape[-1] + 0.1 * torch.eye(shape[-1])

    inputs, outputs, weight = hessian(2, 16, 16), hessian(2, 2, 5, 5), torch.randn(2, 9, 16, generator=draw)
    uppers = [torch.linalg.cholesky(h.flip(-2, -1)).flip(-2, -1) for h in (inputs, outputs)]
    scales = weight.view(2, 9, 2, 8).abs().amax(-1) / (7 if bits == 4 else 448)
    shifts = torch.randint(-2, 3, scales.shape, generator=draw).float() if zeros else None
    places = torch.arange(16).expand(2, 16), torch.arange(5).expand(2, 2, 5)
    made = two_sided.feed_back(weight, scales, shifts, uppers[0], places[0], uppers[1], places[1], grid)
    found, gained = two_sided.descend(
        weight, two_sided.Codes(made.clone(), scales, shifts, grid), inputs, outputs
    )
    return [made, found.codes, gained]


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
    sides = {}
    for name, bits, zeros in (("int4", 4, False), ("int4-asym", 4, True), ("fp8", 8, False)):
        (a, b, c), (x, y, z) = both_sides(True, bits, zeros), both_sides(False, bits, zeros)
        sides[name] = [int((a != x).sum()), int((b != y).sum()), float((c - z).abs().max() / z.max())]
        sides[name].append(int((y != x).sum()))
    print(json.dumps({"different": different, "launched": len(launched), "sides": sides}))


if __name__ == "__main__":
    main()
