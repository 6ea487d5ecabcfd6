"""Runs AutoGPTQ on a checkpoint; started by :mod:`quant.backends.run` with the Python of AutoGPTQ's
environment, where this package is not.

    python worker_auto_gptq.py JOB.json

Standard output ends with one JSON object: versions, seconds of the quantization, notes for the report.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import auto_gptq
    import torch
    import transformers
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    model = AutoGPTQForCausalLM.from_pretrained(
        job["model"], BaseQuantizeConfig(**job["settings"]), trust_remote_code=False
    )
    examples = [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        for row in job["rows"]
    ]
    start = time.perf_counter()
    model.quantize(examples, batch_size=1)
    seconds = time.perf_counter() - start
    model.save_quantized(job["output"], use_safetensors=True)
    versions = {
        "auto-gptq": auto_gptq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(
        json.dumps(
            {"versions": versions, "seconds": seconds, "notes": ["AutoGPTQ computes and stores in fp16"]}
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
