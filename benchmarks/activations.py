#!/usr/bin/env python3
"""What rounding the inputs of each kind of linear alone costs: KL to the source, weights as they are.

    python benchmarks/activations.py [--models tinylm-11m …] [--chunks 8]

Inputs are rounded to int8 token by token, without and with zero points, as vLLM's kernels do it
(:func:`quant.quantizers.activations.fake_quantize`), of one kind of linear at a time and of all.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from common import machine
from methods import MODELS, SHARED, Model
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant.quantizers.activations import fake_quantize
from quant.schemes import ActivationScheme

KINDS = {
    "q/k/v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate/up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@contextmanager
def rounded(model: torch.nn.Module, kinds: tuple[str, ...], scheme: ActivationScheme) -> Iterator[None]:
    """While it lasts, the inputs of linears whose names end so are rounded."""

    def round_input(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fake_quantize(args[0], scheme), *args[1:])

    handles = [
        module.register_forward_pre_hook(round_input)
        for name, module in model.named_modules()
        if name.endswith(kinds)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: torch.nn.Module, chunks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logarithms of the probabilities of each chunk [1, T], [T, V]."""
    with torch.no_grad():
        return [model(chunk).logits[0].log_softmax(-1) for chunk in chunks]


def rows(model: Model, a: argparse.Namespace) -> Iterator[str]:
    """A line of the table for each kind of linear."""
    source = a.data / "models" / model.name
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    text = (a.data / "text" / model.text).read_text(encoding="utf-8")[: 16 * a.chunks * model.length]
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt", verbose=False).input_ids[0]
    chunks = ids[: a.chunks * model.length].view(-1, model.length).split(1)
    plain = logits(loaded, chunks)

    def divergence(names: tuple[str, ...], symmetric: bool) -> float:
        with rounded(loaded, names, ActivationScheme(symmetric=symmetric)):
            made = logits(loaded, chunks)
        sums = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(plain, made, strict=True)]
        return float(torch.stack(sums).mean())

    for kind, names in {**KINDS, "all": tuple(chain(*KINDS.values()))}.items():
        one, other = divergence(names, True), divergence(names, False)
        yield f"| {model.name} | {kind} | {one:.6f} | {other:.6f} | {other / one:.2f} |"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=SHARED / "data", help="folder with models and texts")
    p.add_argument("--models", nargs="+", default=[m.name for m in MODELS], choices=[m.name for m in MODELS])
    p.add_argument("--chunks", type=int, default=8)
    a = p.parse_args()
    print(machine(), flush=True)
    print("| model | inputs rounded | KL, symmetric | with zero points | of it |\n|---|---|---|---|---|")
    for model in (m for m in MODELS if m.name in a.models):
        for line in rows(model, a):
            print(line, flush=True)


if __name__ == "__main__":
    main()
