#!/usr/bin/env python3
"""What rounding to E4M3 and to E5M2 costs, the two FP8 formats of Micikevicius et al. 2022 (FP8 Formats for
Deep Learning, arXiv:2209.05433).

    python benchmarks/fp8_rounding.py [--models DIRECTORY …] [--rows 4] [--length 256]

Prints a markdown table; that of the bundled model stands in docs/schemes.md. Rounded are the weights of a
model's linears, their inputs for the bundled text, and random numbers for orientation: normal ones, and two
of Student's t distribution, whose tails are heavy (of 3 degrees of freedom the variance is the last moment,
of 1 there is no mean).

A scale brings the largest magnitude that it stands for to the format's largest number, 448 or 57344; values
become the nearest number, ties to even. Of a weight [N, K] a scale stands for all of it, for an output, or
for 128 × 128; of an input [T, K] for all tokens, for a token, or for 128 values of a token. The
signal-to-noise ratio of a tensor is 10 · log10(Σx² / Σ(x' - x)²) in dB, of which the mean over tensors is
printed; "to zero" is the share of all values but zeros that become 0. Blocks run in fp32; every number is
taken in fp32 to the format and back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks run from a checkout, installed or not

from quant.calibration.files import bundled  # noqa: E402
from quant.calibration.text import calibration_rows  # noqa: E402
from quant.checkpoint.reader import open_checkpoint  # noqa: E402
from quant.models.calls import call_block  # noqa: E402
from quant.models.skeleton import Skeleton  # noqa: E402
from quant.offline import load_tokenizer  # noqa: E402
from quant.schemes import BLOCK  # noqa: E402

BUNDLED = ROOT / "examples" / "tinylm-4m"
SHARED = [ROOT.parent / "shared" / "data" / "models" / n for n in ("tinylm-11m", "tinylm-11m-outliers")]
NUMBERS = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
#: What a scale stands for → rows and columns of its tile; None: all of them.
WEIGHTS = {"tensor": (None, None), "output channel": (1, None), "128 × 128": (BLOCK, BLOCK)}
INPUTS = {"tensor": (None, None), "token": (1, None), "token's 128 inputs": (1, BLOCK)}
RANDOM = {"tensor": (None, None), "row of 1024": (1, None)}
Tile = tuple[int | None, int | None]


@dataclass
class Errors:
    """What rounding did to some tensors: ``ratios`` in dB, one a tensor; ``lost`` of ``values`` numbers that
    were not 0 became 0."""

    ratios: list[float] = field(default_factory=list)
    lost: int = 0
    values: int = 0

    def add(self, x: torch.Tensor, number: torch.dtype, tile: Tile) -> None:
        codes = rounded(x, number, tile)
        noise = (codes - x).double().square().sum()
        self.ratios.append(float(10 * (x.double().square().sum() / noise).log10()))
        self.lost += int(((codes == 0) & (x != 0)).sum())
        self.values += int((x != 0).sum())

    @property
    def share(self) -> str:
        share = f"{self.lost / self.values:.3%}"
        return "0" if not self.lost else "< 0.001%" if share == "0.000%" else share


def largest(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """fp32 [R, C]: of each value of x [R, C], the largest magnitude in its tile; tiles at the ends may be
    short."""
    (n, k), (rows, columns) = x.shape, (size or whole for size, whole in zip(tile, x.shape, strict=True))
    padded = nn.functional.pad(x.abs(), (0, -k % columns, 0, -n % rows))
    tops = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))
    return tops.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


def rounded(x: torch.Tensor, number: torch.dtype, tile: Tile) -> torch.Tensor:
    """fp32 [R, C]: x [R, C] in an FP8 format with a scale for each tile, and back."""
    limit = torch.finfo(number).max
    top = largest(x, tile)
    scale = torch.where(top == 0, 1.0, top / limit)
    return (x / scale).clamp_(-limit, limit).to(number).float().mul_(scale)


def tensors_of(path: Path, rows: int, length: int) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights``, fp32 [N, K], and ``inputs``, fp32 [rows · length, K], of the linears of a checkpoint,
    block by block."""
    checkpoint = open_checkpoint(path)
    vocabulary = int(checkpoint.config["vocab_size"])
    tokens = calibration_rows(
        load_tokenizer(path), [bundled("wikipedia")], rows, length, vocabulary=vocabulary
    ).tokens
    skeleton = Skeleton(checkpoint, torch.device("cpu"), torch.float32)
    (hidden,), (calls,) = skeleton.embed([tokens])
    for index in range(skeleton.block_count):
        block, seen = skeleton.load_block(index), []
        for group in skeleton.groups(index):
            for name in group.linears:
                yield "weights", block.get_submodule(name).weight.detach()
            first = block.get_submodule(group.linears[0])  # the others read the same
            first.register_forward_pre_hook(
                lambda module, inputs, seen=seen: seen.append(inputs[0].flatten(0, -2))
            )
        with torch.no_grad():
            hidden = call_block(block, hidden, calls[index])
        skeleton.free_block(index)
        yield from (("inputs", x) for x in seen)


def student(generator: torch.Generator, degrees: int, size: int = 1024) -> torch.Tensor:
    """fp32 [size, size] of Student's t distribution with whole ``degrees`` of freedom: a normal number over
    the root of a mean of squares."""
    squares = sum(torch.randn(size, size, generator=generator).square() for _ in range(degrees))
    return torch.randn(size, size, generator=generator) / torch.as_tensor(squares / degrees).sqrt()


def random_tensors() -> Iterator[tuple[str, torch.Tensor]]:
    """Numbers for orientation, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    yield "normal numbers", torch.randn(1024, 1024, generator=generator)
    yield "Student t, 3 degrees", student(generator, 3)
    yield "Student t, 1 degree", student(generator, 1)


def measure(models: Sequence[Path], rows: int, length: int) -> dict[tuple[str, str, str], Errors]:
    """(what is rounded, what a scale stands for, format) → errors, in the order of the table."""
    errors: dict[tuple[str, str, str], Errors] = {}

    def add(name: str, x: torch.Tensor, tiles: dict[str, Tile]) -> None:
        for place, tile in tiles.items():
            for word, number in NUMBERS.items():
                errors.setdefault((name, place, word), Errors()).add(x, number, tile)

    for path in models:
        for kind, x in tensors_of(path, rows, length):
            add(f"{kind} of {path.name}", x, WEIGHTS if kind == "weights" else INPUTS)
    for name, x in random_tensors():
        add(name, x, RANDOM)
    order = list(dict.fromkeys(name for name, _, _ in errors))
    return dict(sorted(errors.items(), key=lambda item: order.index(item[0][0])))


def table(models: Sequence[Path] = (BUNDLED,), rows: int = 4, length: int = 256) -> str:
    """The table, in markdown."""
    measured = measure(models, rows, length)
    lines = [
        "| rounded | a scale for each | E4M3 dB | E5M2 dB | E4M3 to zero | E5M2 to zero |",
        "|---|---|---|---|---|---|",
    ]
    for name, place in dict.fromkeys((n, p) for n, p, _ in measured):
        errors = [measured[name, place, word] for word in NUMBERS]
        ratios = [f"{sum(e.ratios) / len(e.ratios):.1f}" for e in errors]
        lines.append(f"| {' | '.join([name, place, *ratios, *(e.share for e in errors)])} |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [m for m in SHARED if m.is_dir()] or [BUNDLED]
    p.add_argument(
        "--models", nargs="+", type=lambda p: Path(p).resolve(), default=models, metavar="DIRECTORY"
    )
    p.add_argument("--rows", type=int, default=4, help="rows of text")
    p.add_argument("--length", type=int, default=256, help="tokens of a row")
    a = p.parse_args()
    print(table(a.models, a.rows, a.length))


if __name__ == "__main__":
    main()
