#!/usr/bin/env python3
"""A peer on a checkpoint: llm-compressor in any of its preset schemes, with or without SmoothQuant, or
AutoRound. Run by quality.py, methods.py and others in the peer's environment. Prints seconds and CPU seconds
of the quantization alone. Mixtures are calibrated as llm-compressor's default has it: every expert sees all
tokens.

python peers.py MODEL OUT --text FILE --method gptq|rtn --scheme W8A8 [--smooth 0.5] [--samples 128] [--length
512]
python peers.py MODEL OUT --text FILE --method auto-round [--bits 4] [--group-size 128] [--iters 200]

AutoRound (auto-round 0.16; 200 iterations are its default, 1000 its auto-round-best) writes what its codes
stand for as a plain checkpoint, its `fake` format, which any judge reads.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def taken(a, tokenizer) -> list[list[int]]:
    """Rows of tokens in file order, as all programs take them."""
    ids = tokenizer(open(a.text, encoding="utf-8").read())["input_ids"]
    return [ids[i * a.length : (i + 1) * a.length] for i in range(a.samples)]


def done(start: float, cpu: float) -> None:
    print(f"RESULT {time.perf_counter() - start:.2f} {time.process_time() - cpu:.2f}", flush=True)


def llm_compressor(a, model, tokenizer, rows: list[list[int]]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * a.length] * len(rows)})
    method = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[a.method]
    recipe = [method(targets="Linear", scheme=a.scheme, ignore=["lm_head"])]
    if a.smooth is not None:
        try:
            from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
        except ImportError:
            from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
        recipe.insert(0, SmoothQuantModifier(smoothing_strength=a.smooth))
    start, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=a.length,
            num_calibration_samples=len(rows),
        )
    done(start, cpu)
    model.save_pretrained(a.out, save_compressed=True)
    tokenizer.save_pretrained(a.out)


def auto_round(a, model, tokenizer, rows: list[list[int]]) -> None:
    from auto_round import AutoRound

    given = [{"input_ids": torch.tensor(r), "attention_mask": torch.ones(a.length).long()} for r in rows]
    program = AutoRound(
        model,
        tokenizer,
        bits=a.bits,
        group_size=a.group_size,
        sym=True,
        iters=a.iters,
        nsamples=len(rows),
        seqlen=a.length,
        dataset=torch.utils.data.DataLoader(given, batch_size=8),
        device_map="cpu",
        enable_torch_compile=False,
    )
    start, cpu = time.perf_counter(), time.process_time()
    program.quantize_and_save(a.out, format="fake")
    done(start, cpu)
    out = Path(a.out)
    if not (out / "config.json").exists():  # it lies in a folder of the model's name
        for file in next(out.glob("*/config.json")).parent.iterdir():
            file.rename(out / file.name)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model"), p.add_argument("out"), p.add_argument("--text", required=True)
    p.add_argument("--method", default="rtn", choices=["gptq", "rtn", "auto-round"])
    p.add_argument("--scheme", default="W4A16"), p.add_argument("--smooth", type=float)
    p.add_argument("--bits", type=int, default=4), p.add_argument("--group-size", type=int, default=128)
    p.add_argument("--iters", type=int, default=200)
    p.add_argument("--samples", type=int, default=128), p.add_argument("--length", type=int, default=512)
    a = p.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype="auto")
    run = auto_round if a.method == "auto-round" else llm_compressor
    run(a, model, tokenizer, taken(a, tokenizer))


if __name__ == "__main__":
    main()
