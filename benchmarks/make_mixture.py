#!/usr/bin/env python3
"""Makes a trained mixture of experts out of a small dense model, for measurements of quality: random experts
say little of what calibration is worth.

    python benchmarks/make_mixture.py OUT [--source examples/tinylm-4m] [--text FILE …] [--steps 80]
    python benchmarks/make_mixture.py OUT --skew MIXTURE [--share 0.002] [--steps 20]

The first form upcycles a Llama checkpoint to Mixtral's architecture (Komatsuzaki et al. 2022,
arXiv:2212.05055): every expert begins as the dense model's MLP with noise of its own, the router at random,
and all is trained on the text with a loss that keeps the experts of each layer equally busy (Fedus et al.
2021, arXiv:2101.03961, equation 4). The second takes a mixture made so, moves the first expert's row of every
router against the mean of the router's inputs until the expert gets only ``--share`` of the tokens, trains a
little more with the routers held, and sets the share again.

Prints the loss on text that was not trained on, and the least and the largest share of an expert.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from torch import nn

#: Tokens of a row and rows of a step.
LENGTH, ROWS = 256, 8
#: Noise of a new expert, as a share of the root mean square of each of its matrices.
NOISE = 0.3
#: Weight of the balancing loss.
BALANCE = 0.02
#: Rows that are kept from training, to judge by.
HELD_OUT = 16


def texts(files: list[Path]) -> str:
    """The files' text, or that of the calibration text that the package brings."""
    from quant.calibration.files import bundled

    parts = []
    for file in files or [bundled("wikipedia")]:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as stream:
            parts.append(stream.read())
    return "\n\n".join(parts)


def token_rows(source: Path, text: str) -> torch.Tensor:
    """int64 [R, LENGTH], rows of the text in file order."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"]
    count = len(tokens) // LENGTH
    return torch.tensor(tokens[: count * LENGTH]).view(count, LENGTH)


def upcycled(source: Path, experts: int, top: int, seed: int) -> nn.Module:
    """A Mixtral in fp32, each expert the MLP of the Llama checkpoint with noise of its own."""
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    kept = {
        name: getattr(dense.config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
            "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        )
    }  # fmt: skip
    config = MixtralConfig(**kept, num_local_experts=experts, num_experts_per_tok=top, sliding_window=None)
    model = MixtralForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    model.load_state_dict({n: v for n, v in dense.state_dict().items() if ".mlp." not in n}, strict=False)
    with torch.no_grad():
        for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
            mlp, moe = theirs.mlp, ours.mlp
            both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            for target, value in (
                (moe.experts.gate_up_proj, both),
                (moe.experts.down_proj, mlp.down_proj.weight),
            ):
                noise = torch.randn(target.shape, generator=generator)
                target.copy_(value + noise * NOISE * value.square().mean().sqrt())
            moe.gate.weight.copy_(torch.randn(moe.gate.weight.shape, generator=generator) * 0.02)
    return model


def cross_entropy(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats a token of logits [B, T, V] for the tokens [B, T] themselves."""
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


def imbalance(logits: torch.Tensor, top: int) -> torch.Tensor:
    """E · Σ over experts of (share of the pairs that it gets) · (its mean probability), of router logits
    [T, E]: 1 where all are alike."""
    chosen = logits.topk(top, -1).indices
    share = torch.bincount(chosen.reshape(-1), minlength=logits.shape[1]) / chosen.numel()
    return logits.shape[1] * (share * logits.softmax(-1).mean(0)).sum()


def train(model: Any, rows: torch.Tensor, steps: int, rate: float, balance: float, seed: int) -> None:
    """AdamW with a cosine schedule, products in bf16."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    ramp = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / ramp
            if s < ramp
            else 0.05 + 0.475 * (1 + float(torch.cos(torch.tensor(torch.pi * s / steps))))
        ),
    )
    top, start = model.config.num_experts_per_tok, time.perf_counter()
    model.train()
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (ROWS,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch, output_router_logits=True)
        text = cross_entropy(output.logits, batch)
        loss = text + balance * sum(imbalance(x.float(), top) for x in output.router_logits)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if not step % 10 or step == steps - 1:
            print(
                f"step {step + 1} of {steps}: {text.item():.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.eval()


@torch.no_grad()
def judged(model: Any, rows: torch.Tensor) -> dict[str, Any]:
    """Mean loss in nats a token, and each layer's shares of pairs by expert."""
    losses, logits = [], []
    for batch in rows.split(4):
        output = model(batch, output_router_logits=True)
        losses.append(cross_entropy(output.logits, batch))
        logits.append(output.router_logits)
    shares = []
    for layer in zip(*logits, strict=True):
        picked = torch.cat(layer).topk(model.config.num_experts_per_tok, -1).indices.reshape(-1)
        shares.append((torch.bincount(picked, minlength=layer[0].shape[1]) / len(picked)).tolist())
    return {"loss": float(torch.stack(losses).mean()), "shares": shares}


@torch.no_grad()
def starve(model: Any, rows: torch.Tensor, share: float) -> None:
    """Moves the first expert's row of every router until it gets ``share`` of the pairs, layer by layer from
    the front, because a layer changes what the next one is sent.

    It moves along the direction on which the router's inputs differ least, the least-squares solution of
    x · d = 1: nearly a bias, so that the tokens that stay are those which want the expert most. Along the
    mean they would be those that lie far from it, such as the first of a row, on which all others depend."""
    top = model.config.num_experts_per_tok
    for layer in model.model.layers:
        seen: list[torch.Tensor] = []
        hook = layer.mlp.gate.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for batch in rows.split(4):
            model(batch)
        hook.remove()
        inputs, router = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]), layer.mlp.gate.weight
        gram = inputs.t() @ inputs / len(inputs)
        gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
        direction, before = torch.linalg.solve(gram, inputs.mean(0)), router[0].clone()
        low, high = -50.0, 50.0
        for _ in range(30):
            middle = (low + high) / 2
            router[0] = before - middle * direction
            got = float((nn.functional.linear(inputs, router).topk(top, -1).indices == 0).float().mean())
            low, high = (middle, high) if got > share else (low, middle)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("output", type=Path)
    p.add_argument("--source", type=Path, default=ROOT / "examples/tinylm-4m", help="a Llama checkpoint")
    p.add_argument("--text", type=Path, nargs="+", default=[], help="default: the package's Wikipedia sample")
    p.add_argument("--experts", type=int, default=8)
    p.add_argument("--top", type=int, default=2)
    p.add_argument(
        "--skew", type=Path, metavar="MIXTURE", help="make the router of this mixture a skewed one"
    )
    p.add_argument("--share", type=float, default=0.002, help="of the pairs of token and expert (--skew)")
    p.add_argument("--steps", type=int, help="of training: 80, or 20 with --skew")
    p.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    from transformers import AutoModelForCausalLM

    torch.manual_seed(a.seed)
    source = a.skew or a.source
    rows = token_rows(source, texts(a.text))
    # every 40th row or so, over the whole text
    apart = torch.arange(HELD_OUT) * (len(rows) // HELD_OUT)
    mask = torch.ones(len(rows), dtype=torch.bool)
    mask[apart] = False
    held_out, rows = rows[apart], rows[mask]
    if a.skew:
        model = AutoModelForCausalLM.from_pretrained(a.skew, dtype=torch.float32)
        starve(model, rows[: HELD_OUT * 4], a.share)
        for layer in model.model.layers:
            layer.mlp.gate.weight.requires_grad = False
        train(model, rows, 20 if a.steps is None else a.steps, a.rate / 5, 0.0, a.seed + 1)
        starve(model, rows[: HELD_OUT * 4], a.share)
    else:
        model = upcycled(a.source, a.experts, a.top, a.seed)
        train(model, rows, 80 if a.steps is None else a.steps, a.rate, BALANCE, a.seed)
    verdict = judged(model, held_out)
    model.bfloat16().save_pretrained(a.output)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / file).exists():
            shutil.copyfile(source / file, a.output / file)
    shares = [s for layer in verdict["shares"] for s in layer]
    print(
        json.dumps(
            {
                "loss": verdict["loss"],
                "least": min(shares),
                "largest": max(shares),
                "shares": verdict["shares"],
            }
        )
    )


if __name__ == "__main__":
    main()
