"""KL divergence of GGUF levels as llama.cpp computes them, and of Q4_0 whose codes GPTQ chose:

    QUANT_LLAMA_PYTHON=.venv-llama/bin/python python benchmarks/gguf_levels.py [MODEL] [--rows 48]

A line a file: bits per weight of the file, KL to the source's log-probabilities (transformers, fp32) over
rows of wikitext-2's test split, and perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quant.gguf.levels import LEVELS, OWN_LEVELS  # noqa: E402
from quant.levels import make_level  # noqa: E402
from quant.pipeline.gguf import export_gguf  # noqa: E402


def text_rows(folder: Path, count: int, length: int) -> list[list[int]]:
    """Rows from the end of the bundled test text."""
    import gzip

    from transformers import AutoTokenizer

    text = gzip.decompress((ROOT / "quant/calibration/data/wikitext-2-test.txt.gz").read_bytes()).decode()
    ids = AutoTokenizer.from_pretrained(folder)(
        text[-count * length * 8 :], add_special_tokens=False
    ).input_ids
    ids = ids[-count * (length - 1) :]
    return [[0, *ids[i * (length - 1) : (i + 1) * (length - 1)]] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=ROOT / "examples/tinylm-4m", type=Path)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--levels", nargs="*", default=[*LEVELS, *OWN_LEVELS])
    asked = parser.parse_args()
    from transformers import AutoModelForCausalLM

    rows = text_rows(asked.model, asked.rows, 256)
    longest = json.loads((asked.model / "config.json").read_text())["max_position_embeddings"]
    few = {"samples": asked.samples, "sequence_length": min(512, longest)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
        parameters = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            logs = [model(torch.tensor([r])).logits[0, :-1].log_softmax(-1) for r in rows]
        np.save(folder / "reference.npy", torch.stack(logs).numpy())
        files = {}
        for level in asked.levels:
            files[level] = folder / f"{level}.gguf"
            export_gguf(asked.model, files[level], level, calibration=few)
            if level in OWN_LEVELS:
                files[f"{level}, unweighed"] = folder / f"{level}-plain.gguf"
                export_gguf(asked.model, files[f"{level}, unweighed"], level, imatrix=False)
        for method in ("gptq", "yaqa"):
            files[f"q4_0 by {method}"] = file = folder / f"{method}.gguf"
            values = {"model_path": asked.model, "output_path": file, "method": method, "scheme": "q4_0"}
            make_level({**values, **few}, True)
        request = {"rows": rows, "reference": str(folder / "reference.npy")}
        done = subprocess.run(
            [os.environ["QUANT_LLAMA_PYTHON"], str(ROOT / "tests/gguf/run_llama.py")],
            input=json.dumps([{**request, "file": str(f)} for f in files.values()]),
            capture_output=True,
            text=True,
            check=True,
        )
        for (name, file), answer in zip(files.items(), json.loads(done.stdout), strict=True):
            bits = 8 * file.stat().st_size / parameters
            perplexity = math.exp(answer["loss"])
            print(f"{name:20} {bits:6.2f} bits  KL {answer['kl']:.6f}  perplexity {perplexity:.3f}")


if __name__ == "__main__":
    main()
