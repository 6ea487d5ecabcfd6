#!/usr/bin/env python3
"""Time and memory of GPTQ on two blocks of Qwen3-30B-A3B's shape, beside the least that their arithmetic
takes on this machine, and beside llm-compressor.

    python benchmarks/experts.py [--samples 64] [--length 512] [--llmcompressor-python PYTHON]

llm-compressor, which shows all tokens to every expert, takes long: with --experts 16 --samples 8 an expert
is sent as many tokens.

The weights are random, 128 experts a block of which a token takes 8. The floor is what the matrix products
alone would take at the speeds that products of these shapes are measured to have here, just before and just
after, while each of as many threads makes products of its own: all that the cores can do at once, without a
thread that ever waits for another. Cores share a cache, a memory and a clock, and two at once make less than
twice what one does while the other rests, which no program can have; a second floor, "of one core", goes by
that all the same. The products: one forward pass through every linear and the causal attention between them
(bf16, or fp32 where the CPU multiplies that faster), the lower halves of the Hessians (int8 where the CPU
multiplies 8-bit integers, else fp32), and of every Hessian the Cholesky factorization, K³/3, and of every
weight the feedback of its columns on each other, N·K² (both fp32, as torch's `@` multiplies them; where the
tool knows a faster way, another floor goes by it). What is not in it: reading, routing, scales, rounding,
judging, packing and writing. On a machine that others use, compare the CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from threading import Lock, current_thread, main_thread

from common import ROOT, Finished, last_json, machine, result_line, run

GIB = 2**30
TOKENIZER = ROOT / "examples/tinylm-4m"
#: A program's name, the seconds of its quantization, those of CPU, and the whole program.
Measured = tuple[str, float, float, Finished]
#: The least seconds that a product's speed is measured over.
MEASURED = 0.5


@dataclass(frozen=True)
class Shape:
    """Of the blocks."""

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top: int = 8
    heads: int = 32
    kv_heads: int = 4
    head: int = 128
    blocks: int = 2

    def config(self) -> dict:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "hidden_act": "silu",
            "vocab_size": json.loads((TOKENIZER / "config.json").read_text())["vocab_size"],
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one block's tensors."""
        wide, narrow = self.heads * self.head, self.kv_heads * self.head
        attention = {
            "q_proj": (wide, self.hidden),
            "k_proj": (narrow, self.hidden),
            "v_proj": (narrow, self.hidden),
            "o_proj": (self.hidden, wide),
            "q_norm": (self.head,),
            "k_norm": (self.head,),
        }
        expert = {
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return {
            "input_layernorm": (self.hidden,),
            **{f"self_attn.{n}": s for n, s in attention.items()},
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate": (self.experts, self.hidden),
            **{f"mlp.experts.{e}.{n}": s for e in range(self.experts) for n, s in expert.items()},
        }

    def products(self) -> list[tuple[int, tuple[int, ...], float]]:
        """Of one block: how many Hessians of how many inputs K there are, the outputs N of the linears that
        share each, and what share of the tokens each sees."""
        wide, narrow = self.heads * self.head, self.kv_heads * self.head
        routed = self.top / self.experts
        return [
            (1, (self.hidden, wide + 2 * narrow), 1.0),
            (1, (wide, self.hidden), 1.0),
            (self.experts, (self.hidden, 2 * self.intermediate), routed),
            (self.experts, (self.intermediate, self.hidden), routed),
        ]


def make_checkpoint(folder: Path, shape: Shape) -> None:
    """Random weights in bf16, with the bundled model's tokenizer."""
    import torch

    from quant.checkpoint.writer import ShardWriter, TensorSpec, write_text

    config = shape.config()
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (config["vocab_size"], shape.hidden))]
    specs += [
        TensorSpec(f"model.layers.{block}.{name}.weight", "BF16", size)
        for block in range(shape.blocks)
        for name, size in shape.tensors().items()
    ]
    specs.append(TensorSpec("model.norm.weight", "BF16", (shape.hidden,)))
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder / "model.safetensors", specs) as writer:
        for spec in specs:
            value = torch.randn(spec.shape, generator=generator)
            value = value * 0.02 if len(spec.shape) > 1 else 1 + value * 0.1
            writer.write(spec.name, value.bfloat16())
    write_text(folder / "config.json", json.dumps(config, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)


def seconds_of(work: Callable[[], object], threads: int, at_once: int) -> float:
    """Seconds that one call would take of so many threads which never wait for each other: the CPU seconds of
    a call, over enough calls, where ``at_once`` threads make theirs at the same time. So others' work on the
    machine does not count, nor what threads spend waiting because of it."""
    import torch

    def of_one(start: float) -> tuple[float, int]:
        calls, cpu = 0, time.thread_time()
        while time.perf_counter() - start < MEASURED:
            work()
            calls += 1
        return time.thread_time() - cpu, calls

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(at_once, initializer=partial(torch.set_num_threads, 1)) as pool:
            [*pool.map(lambda _: work(), range(at_once))]
            found = [*pool.map(of_one, [time.perf_counter()] * at_once)]
        return sum(cpu for cpu, _ in found) / sum(calls for _, calls in found) / threads
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Speeds:
    """Operations a second of the kinds of product: of solving as torch's ``@`` does it, and as the tool does;
    and causal attentions of a row of tokens a second."""

    forward: float
    gram: float
    solve: float
    fastest: float
    attention: float

    def __str__(self) -> str:
        return (
            f"{self.forward / 1e9:.0f}, {self.gram / 1e9:.0f} and {self.solve / 1e9:.0f} G operations/s "
            f"(solving at most {self.fastest / 1e9:.0f})"
        )


def measured_speeds(shape: Shape, tokens: int, length: int, threads: int, at_once: int) -> Speeds:
    """What this machine does on an expert's matrices, and on attention of ``length`` tokens, by so many
    threads; see :func:`seconds_of`."""
    import torch

    from quant.models.attention import causal
    from quant.quantizers.products import product

    timed = partial(seconds_of, threads=threads, at_once=at_once)
    rows = max(256, tokens * shape.top // shape.experts)
    x, w = torch.randn(rows, shape.hidden), torch.randn(2 * shape.intermediate, shape.hidden)
    narrow, matrix = x.bfloat16(), w.bfloat16()
    forward = min(
        timed(lambda: torch.nn.functional.linear(narrow, matrix)),
        timed(lambda: torch.nn.functional.linear(x, w)),
    )
    if torch.cpu._is_vnni_supported():
        codes = (x * 30).clamp(-127, 127).to(torch.int8)
        gram = timed(lambda: torch._int_mm(codes.t(), codes))
    else:
        gram = timed(lambda: x.t() @ x)
    panel, columns = torch.randn(512, 512), torch.randn(512, 2 * shape.intermediate)
    solve, fastest = timed(lambda: panel @ columns), timed(lambda: product(panel, columns))
    query = torch.randn(1, shape.heads, length, shape.head).bfloat16()
    key = torch.randn(1, shape.kv_heads, length, shape.head).bfloat16()
    wide = query.float(), key.float(), key.float()
    attention = min(
        timed(lambda: causal(query, key, key, None)),
        timed(lambda: causal(*wide, None)),
        timed(
            lambda: torch.nn.functional.scaled_dot_product_attention(
                query, key, key, is_causal=True, enable_gqa=True
            )
        ),
    )
    operations = 2 * panel.numel() * columns.shape[1]
    return Speeds(
        2 * x.numel() * len(w) / forward,
        2 * rows * shape.hidden**2 / gram,
        operations / solve,
        operations / min(solve, fastest),
        1 / attention,
    )


def floor_seconds(shape: Shape, tokens: int, length: int, speeds: Speeds, solve: float) -> dict[str, float]:
    """Seconds of the products of all blocks, by kind; ``solve``: operations a second of the solves."""
    seconds = dict.fromkeys(("forward", "attention", "Hessians", "solves"), 0.0)
    for block in range(shape.blocks):
        seconds["attention"] += tokens / length / speeds.attention
        for number, (count, (k, n), share) in enumerate(shape.products()):
            # nothing reads what the last block makes, so its last linears are not run
            if block < shape.blocks - 1 or number < len(shape.products()) - 1:
                seconds["forward"] += count * share * tokens * 2 * k * n / speeds.forward
            seconds["Hessians"] += count * share * tokens * k * k / speeds.gram
            seconds["solves"] += count * (k**3 / 3 + n * k * k) / solve
    return seconds


def convert(source: Path, target: Path, text: Path, samples: int, length: int, options: list[str]) -> None:
    """The measured child: quantizes, and prints seconds and CPU seconds of the blocks, from the first one's
    read to the last one's sync, by phase."""
    from quant.pipeline.memory import prepare_torch

    prepare_torch()
    from quant.pipeline.manager import QuantizationManager
    from quant.pipeline.plan import plan_job
    from quant.pipeline.records import Clock
    from quant.recipe import Recipe

    settings = dict(pair.split("=", 1) for pair in options)
    recipe = Recipe(
        model_path=source, output_path=target, method="gptq", scheme="w4a16", samples=samples,
        sequence_length=length, calibration_dataset=[str(text)], target="other", **settings,
    )  # fmt: skip
    manager = QuantizationManager(plan_job(recipe))
    processor, phase, together = Clock(), Clock.phase, Lock()

    @contextmanager
    def both(clock: Clock, name: str) -> Iterator[None]:
        # experts are solved by threads of one core each, side by side
        now = time.process_time if current_thread() is main_thread() else time.thread_time
        start = now()
        with phase(clock, name):
            yield
        with together:
            processor.seconds[name] += now() - start

    Clock.phase = both  # type: ignore[method-assign]
    report = manager.run()
    # the passes through the blocks are what is left of the loop
    parts = ("embed", "load", "statistics", "solve", "write")
    processor.seconds["forward"] = processor.seconds["quantize"] - sum(processor.seconds[p] for p in parts)
    print(json.dumps({"seconds": dict(report.seconds), "cpu": dict(processor.seconds)}), flush=True)


def told_floor(
    name: str, shape: Shape, tokens: int, length: int, speeds: Speeds, solve: float
) -> dict[str, float]:
    """:func:`floor_seconds`, in a line of the table."""
    floor = floor_seconds(shape, tokens, length, speeds, solve)
    parts = ", ".join(f"{k} {v:.1f}" for k, v in floor.items())
    print(f"{name:<17} {sum(floor.values()):7.1f} s: {parts}", flush=True)
    return floor


def told(name: str, seconds: float, cpu: float, done: Finished, floors: list[float], threads: int) -> str:
    """A line of the table."""
    wall, busy = (" and ".join(f"{v / f:.2f}" for f in floors) for v in (seconds, cpu / threads))
    return (
        f"{name:<17} {seconds:7.1f} s ({wall} of the floor), {cpu:.1f} s of CPU ({busy}); whole program "
        f"{done.seconds:.1f} s, peak {done.peak_rss_bytes / GIB:.2f} GiB"
    )


def compared(ours: Measured, peer: Measured) -> str:
    """The peer's figures in ours."""
    (_, seconds, cpu, done), (name, theirs, busy, other) = ours, peer
    return (
        f"{name} / quant: {theirs / seconds:.2f}x the seconds, {busy / cpu:.2f}x those of CPU, "
        f"{other.peak_rss_bytes / done.peak_rss_bytes:.2f}x the memory"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--samples", type=int, default=64)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--experts", type=int, default=Shape.experts, help="fewer, for a quick look")
    p.add_argument("--blocks", type=int, default=Shape.blocks)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--folder", type=Path, help="where the files go (default: temporary files')")
    p.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    p.add_argument("--llmcompressor-python", type=Path)
    p.add_argument("--only-peer", action="store_true", help="leave ours out")
    p.add_argument("--convert", nargs=3, type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.convert:
        return convert(*a.convert, a.samples, a.length, a.options)
    import torch

    torch.set_num_threads(a.threads)
    shape, tokens = Shape(experts=a.experts, blocks=a.blocks), a.samples * a.length
    print(f"{machine()}, {a.threads} threads; {a.samples} × {a.length} calibration tokens", flush=True)
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        folder = Path(name)
        make_checkpoint(folder / "source", shape)
        text = folder / "text.txt"
        text.write_text(calibration_text(), encoding="utf-8")
        measured = partial(measured_speeds, shape, tokens, a.length, a.threads)
        ways = {"floor": a.threads, "floor of one core": 1}
        before = [measured(at_once) for at_once in ways.values()]
        lines: list[Measured] = []
        if not a.only_peer:
            done = run(
                [
                    sys.executable, ROOT / "benchmarks/experts.py", "--convert", folder / "source",
                    folder / "ours", text, "--samples", str(a.samples), "--length", str(a.length),
                    "--options", *a.options,
                ],
                a.threads,
            )  # fmt: skip
            report = last_json(done.output)
            seconds, cpu = report["seconds"], report["cpu"]
            lines.append(("quant", seconds["quantize"], cpu["quantize"], done))
            phases = ", ".join(f"{k} {seconds[k]:.1f} ({cpu.get(k, 0):.1f})" for k in seconds if k != "total")
            print(f"ours by phase, seconds (of CPU): {phases}", flush=True)
            shutil.rmtree(folder / "ours")
        if a.llmcompressor_python:
            done = run(
                [
                    a.llmcompressor_python, ROOT / "benchmarks/peers.py", folder / "source", folder / "peer",
                    "--method", "gptq", "--text", text, "--samples", str(a.samples),
                    "--length", str(a.length),
                ],
                a.threads,
            )  # fmt: skip
            seconds, cpu = map(float, result_line(done.output).split()[1:])
            lines.append(("llm-compressor", seconds, cpu, done))
        after = [measured(at_once) for at_once in ways.values()]
    floors = []
    for name, *pair in zip(ways, before, after, strict=True):
        best = Speeds(*(max(getattr(s, f.name) for s in pair) for f in fields(Speeds)))
        print(f"{name}: forward, Hessian and solving products run at {best}")
        floors.append(sum(told_floor(name, shape, tokens, a.length, best, best.solve).values()))
        if best.fastest > 1.1 * best.solve:
            fast = told_floor(f"{name}, fastest", shape, tokens, a.length, best, best.fastest)
            floors.append(sum(fast.values()))
    for entry in lines:
        print(told(*entry, floors, a.threads), flush=True)
    if len(lines) > 1:
        print(compared(*lines))


def calibration_text() -> str:
    """The package's own Wikipedia sample."""
    import gzip

    from quant.calibration.files import bundled

    with gzip.open(bundled("wikipedia"), "rt", encoding="utf-8") as stream:
        return stream.read()


if __name__ == "__main__":
    main()
