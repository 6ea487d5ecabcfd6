#!/usr/bin/env python3
"""llm-compressor on a checkpoint, in any of its preset schemes, with or without SmoothQuant. Run by
methods.py and others in llm-compressor's environment. Prints seconds and CPU seconds of the quantization
alone. Mixtures are calibrated as its default has it: every expert sees all tokens.

python peers.py MODEL OUT --text FILE --method gptq|rtn --scheme W8A8 [--smooth 0.5] [--samples 128] [--length
512]
"""

import argparse
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

p = argparse.ArgumentParser()
p.add_argument("model"), p.add_argument("out"), p.add_argument("--text", required=True)
(
    p.add_argument("--method", default="rtn", choices=["gptq", "rtn"]),
    p.add_argument("--scheme", default="W4A16"),
)
(
    p.add_argument("--smooth", type=float),
    p.add_argument("--samples", type=int, default=128),
    p.add_argument("--length", type=int, default=512),
)
a = p.parse_args()
model = AutoModelForCausalLM.from_pretrained(a.model, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(a.model)
ids = tokenizer(open(a.text, encoding="utf-8").read())["input_ids"]
rows = [ids[i * a.length : (i + 1) * a.length] for i in range(a.samples)]
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * a.length] * len(rows)})
recipe = [
    {"gptq": GPTQModifier, "rtn": QuantizationModifier}[a.method](
        targets="Linear", scheme=a.scheme, ignore=["lm_head"]
    )
]
if a.smooth is not None:
    try:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    except ImportError:
        from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
    recipe.insert(0, SmoothQuantModifier(smoothing_strength=a.smooth))
start, cpu = time.perf_counter(), time.process_time()
with torch.no_grad():
    oneshot(
        model=model, dataset=data, recipe=recipe, max_seq_length=a.length, num_calibration_samples=len(rows)
    )
print(f"RESULT {time.perf_counter() - start:.2f} {time.process_time() - cpu:.2f}", flush=True)
model.save_pretrained(a.out, save_compressed=True)
tokenizer.save_pretrained(a.out)
