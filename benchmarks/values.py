#!/usr/bin/env python3
"""Do other programs read the same weights from our files, and do we from theirs? Bit by bit, in fp32.

    python benchmarks/values.py --gptqmodel-python PYTHON --autogptq-python PYTHON --llmcompressor-python
    PYTHON [--model MODEL]

Ours read by theirs: our `gptq` checkpoint is loaded with AutoGPTQ's torch kernel and with GPTQModel, our
compressed-tensors one is decompressed by the official package; each then dequantizes its layers, which are
compared with `quant`'s own values. Theirs read by ours: GPTQModel's and llm-compressor's checkpoints of the
same model, dequantized by them and by us.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, quantize_command, run
from safetensors.torch import load_file

from quant.checkpoint.reader import open_checkpoint
from quant.evaluation.verify import verify
from quant.formats.reading import dequantized
from quant.pipeline.export import export

SHARED = ROOT.parent / "shared"

#: Run by the other program's interpreter: MODEL OUT. Writes each quantized layer's weight [N, K] as it
#: computes it.
AUTOGPTQ = """
import sys, torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import save_file
off = ("use_triton", "inject_fused_attention", "inject_fused_mlp")
on = ("disable_exllama", "disable_exllamav2", "use_safetensors")
options = dict.fromkeys(off, False) | dict.fromkeys(on, True)
model = AutoGPTQForCausalLM.from_quantized(sys.argv[1], device="cpu", torch_dtype=torch.float32, **options)
weights = {}
for name, module in model.model.named_modules():
    if hasattr(module, "qweight"):
        weights[name] = module.scales.float()
        eye = torch.eye(module.infeatures)
        module.float()
        out = module(eye)
        out = out - module.bias.float() if getattr(module, "bias", None) is not None else out
        weights[name] = out.t().float().contiguous()
save_file(weights, sys.argv[2])
"""
GPTQMODEL = """
import os, sys, torch
os.cpu_count = lambda: 8
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
model = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.TORCH).model
weights = {}
for name, module in model.named_modules():
    if hasattr(module, "qweight"):
        weights[name] = module.dequantize_weight().t().float().contiguous()
save_file(weights, sys.argv[2])
"""
COMPRESSED = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig
from safetensors.torch import save_file
whole = CompressedTensorsConfig(run_compressed=False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=whole)
weights = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")}
save_file({n.removesuffix(".weight"): p.float().contiguous() for n, p in weights.items()}, sys.argv[2])
"""


def compare(checkpoint: Path, dump: Path, stored: torch.dtype) -> str:
    """Every layer of the dump against our reading of the checkpoint; ``stored`` is the dtype in which the
    other program holds weights."""
    ours, theirs = dequantized(open_checkpoint(checkpoint)), load_file(dump)
    worst, equal = 0.0, 0
    for name, value in theirs.items():
        mine = ours.read(f"{name}.weight").to(stored).float()
        equal += bool(torch.equal(mine, value))
        worst = max(worst, float((mine - value).abs().max() / mine.abs().max()))
    return (
        f"{equal} of {len(theirs)} layers bit-equal in {str(stored).removeprefix('torch.')}, largest "
        f"relative difference {worst:.1e}"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=lambda p: Path(p).resolve(), default=SHARED / "data/models/tinylm-11m")
    p.add_argument("--bench", type=lambda p: Path(p).resolve(), default=SHARED / "bench")
    p.add_argument(
        "--text", type=lambda p: Path(p).resolve(), default=SHARED / "data/text/wikipedia-sample/wiki.txt"
    )
    (
        p.add_argument("--llmcompressor-python"),
        p.add_argument("--gptqmodel-python"),
        p.add_argument("--autogptq-python"),
    )
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        few = ["--samples", "16", "--sequence-length", "256"]
        run(quantize_command(a.model, work / "gptq", "--method", "gptq", "--format", "gptq", *few))
        run(quantize_command(a.model, work / "ct", "--method", "gptq", *few))
        run(quantize_command(a.model, work / "ct-asym", "--method", "minmax", "--asymmetric"))

        def ask(
            who: str,
            python: str | None,
            program: str,
            checkpoint: Path,
            stored: torch.dtype,
            ours: Path | None = None,
        ) -> None:
            if python:
                dump = work / "dump.safetensors"
                run([python, "-c", program, checkpoint, dump])
                print(f"{who}: {compare(ours or checkpoint, dump, stored)}", flush=True)

        ask("our gptq read by AutoGPTQ", a.autogptq_python, AUTOGPTQ, work / "gptq", torch.float32)
        ask("our gptq read by GPTQModel", a.gptqmodel_python, GPTQMODEL, work / "gptq", torch.bfloat16)
        ask(
            "our compressed-tensors read by the official package",
            sys.executable,
            COMPRESSED,
            work / "ct",
            torch.bfloat16,
        )
        ask(
            "our asymmetric compressed-tensors read by the official package",
            sys.executable,
            COMPRESSED,
            work / "ct-asym",
            torch.bfloat16,
        )
        common = ["--text", a.text, "--samples", "16", "--length", "256"]
        if a.gptqmodel_python:
            run([a.gptqmodel_python, a.bench / "peer_gptqmodel.py", a.model, work / "theirs-gptq", *common])
            # it stores fp16 scales for a bf16 model and rounds them to bf16 when it loads, as vLLM does and
            # as our export does
            export(work / "theirs-gptq", work / "exported", "compressed-tensors")
            ask(
                "GPTQModel's checkpoint, exported by us, against its own reading",
                a.gptqmodel_python,
                GPTQMODEL,
                work / "theirs-gptq",
                torch.bfloat16,
                work / "exported",
            )
            print(
                "  verify:",
                "passed" if verify(work / "theirs-gptq").passed else verify(work / "theirs-gptq").failed,
            )
        if a.llmcompressor_python:
            run(
                [
                    a.llmcompressor_python,
                    a.bench / "peer_llmcompressor.py",
                    a.model,
                    work / "theirs-ct",
                    *common,
                ]
            )
            ask(
                "llm-compressor's checkpoint read by us",
                a.llmcompressor_python,
                COMPRESSED,
                work / "theirs-ct",
                torch.bfloat16,
            )
            print(
                "  verify:",
                "passed" if verify(work / "theirs-ct").passed else verify(work / "theirs-ct").failed,
            )


if __name__ == "__main__":
    main()
