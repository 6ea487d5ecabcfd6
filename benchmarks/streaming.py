#!/usr/bin/env python3
"""Time and memory of the methods that need no data, beside a copy of the same checkpoint.

python benchmarks/streaming.py [--gib 2] [--scheme w8a8-fp8] [--repeats 3] [--llmcompressor-python PATH]

Writes a bf16 checkpoint with the block shapes of a 1B Llama and random weights, in one file. Then, in turns:
copies and syncs it; quantizes it in a process of its own (planning, rounding, writing, verification, report
and publication count, start-up and imports do not); and, where asked, converts it with llm-compressor's
`model_free_ptq`, which neither syncs nor verifies. Each turn's ratio is to the copy just before it. The
source is in the page cache throughout (dropping it takes root), so reading costs a copy in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import ROOT, last_json, machine, result_line, run

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD = 2048, 8192, 32, 8, 64
#: llm-compressor's names for our schemes.
PEER_SCHEMES = {"w8a8-fp8": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "w8a16": "W8A16", "w4a16": "W4A16"}
PEER = """
import sys, time
from llmcompressor import model_free_ptq
start = time.perf_counter()
options = {"ignore": ["lm_head", "model.embed_tokens"], "max_workers": int(sys.argv[4]), "device": "cpu"}
model_free_ptq(sys.argv[1], sys.argv[2], scheme=sys.argv[3], **options)
print("RESULT", time.perf_counter() - start, flush=True)
"""


def make_checkpoint(folder: Path, size: int, vocabulary: int) -> None:
    """A Llama of about ``size`` bytes: as many blocks as fit beside the embedding, which is tied."""
    import torch

    from quant.checkpoint.writer import ShardWriter, TensorSpec, write_text

    block = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    outside = [
        TensorSpec("model.embed_tokens.weight", "BF16", (vocabulary, HIDDEN)),
        TensorSpec("model.norm.weight", "BF16", (HIDDEN,)),
    ]
    blocks = [TensorSpec(f"model.layers.{{}}.{n}.weight", "BF16", shape) for n, shape in block.items()]
    count = max(1, round((size - outside[0].nbytes) / sum(s.nbytes for s in blocks)))
    specs = outside + [TensorSpec(s.name.format(i), s.dtype, s.shape) for i in range(count) for s in blocks]
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder / "model.safetensors", specs) as writer:
        for spec in specs:
            # by pieces: a child's largest resident memory counts from that of the process it was forked from
            counts = (min(1024, spec.shape[0] - start) for start in range(0, spec.shape[0], 1024))
            made = (
                torch.randn(count, *spec.shape[1:], generator=generator).mul_(0.02).bfloat16()
                for count in counts
            )
            writer.write_pieces(spec.name, (memoryview(m.view(torch.uint8).numpy()).cast("B") for m in made))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": count,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    write_text(folder / "config.json", json.dumps(config, indent=2))


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a directory's files and sync them."""
    start = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def convert(source: Path, target: Path, scheme: str) -> None:
    """The measured child: quantizes, and prints seconds and CPU seconds from the end of the imports on."""
    from quant.pipeline.memory import prepare_torch

    prepare_torch()
    from quant.pipeline.manager import QuantizationManager
    from quant.pipeline.plan import plan_job
    from quant.recipe import Recipe

    start, cpu = time.perf_counter(), time.process_time()
    recipe = Recipe(model_path=source, output_path=target, method="minmax", scheme=scheme)
    report = QuantizationManager(plan_job(recipe)).run()
    rows = {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "phases": dict(report.seconds),
    }
    print(json.dumps(rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--vocabulary", type=int, default=128256, help="rows of the embedding, 4 KiB each")
    parser.add_argument("--scheme", default="w8a8-fp8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the files go, on the disk to be measured (default: temporary files')",
    )
    parser.add_argument(
        "--llmcompressor-python",
        type=Path,
        help="the python of an environment with llm-compressor, to compare with",
    )
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        return convert(*options.convert, options.scheme)
    threads = len(os.sched_getaffinity(0))
    print(machine(), f"{threads} threads", sep=", ")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source, target = folder / "source", folder / "target"
        make_checkpoint(source, round(options.gib * 2**30), options.vocabulary)
        print(
            f"{(source / 'model.safetensors').stat().st_size / 2**30:.2f} GiB, scheme {options.scheme}",
            flush=True,
        )
        ratios, peers = [], []
        for turn in range(options.repeats):
            copied = copy(source, target)
            shutil.rmtree(target)
            ours = run(
                [
                    sys.executable,
                    ROOT / "benchmarks/streaming.py",
                    "--scheme",
                    options.scheme,
                    "--convert",
                    source,
                    target,
                ],
                threads,
            )
            shutil.rmtree(target)
            result = last_json(ours.output)
            ratios.append(result["seconds"] / copied)
            phases = ", ".join(f"{k} {v:.2f}" for k, v in result["phases"].items())
            print(
                f"{turn + 1}: copy {copied:.2f} s, quant {result['seconds']:.2f} s ({phases}; "
                f"{result['cpu']:.2f} of CPU), {ratios[-1]:.2f} copies, "
                f"peak {ours.peak_rss_bytes / 2**20:.0f} MiB",
                flush=True,
            )
            if options.llmcompressor_python:
                command = [
                    options.llmcompressor_python,
                    "-c",
                    PEER,
                    source,
                    target,
                    PEER_SCHEMES[options.scheme],
                    str(threads),
                ]
                peer = run(command, threads)
                shutil.rmtree(target)
                seconds = float(result_line(peer.output).split()[1])
                peers.append(seconds / copied)
                print(
                    f"   llm-compressor {seconds:.2f} s, {peers[-1]:.2f} copies, peak "
                    f"{peer.peak_rss_bytes / 2**20:.0f} MiB",
                    flush=True,
                )
        print(
            f"median: quant {median(ratios):.2f} "
            f"copies{f', llm-compressor {median(peers):.2f}' if peers else ''}"
        )


if __name__ == "__main__":
    main()
