"""Runs AutoAWQ on a checkpoint; started by :mod:`quant.backends.run` with the Python of AutoAWQ's
environment, where this package is not.

    python worker_autoawq.py JOB.json

Standard output ends with one JSON object: versions, seconds of the quantization, notes for the report.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def own_snapshots(quantizer: Any) -> None:
    """Makes the scale search restore the weights that it started from, on a CPU too.

    AutoAWQ 0.2.9 keeps ``{k: v.cpu()}`` of the layer and restores it after each candidate. On a GPU that is a
    copy; on a CPU ``cpu()`` returns the tensor itself, so the first candidate's scales, multiplied in place,
    stay in the weights for good.
    """
    search = quantizer._compute_best_scale

    def with_copies(
        self: Any, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any, **named: Any
    ) -> Any:
        take = module2inspect.state_dict
        module2inspect.state_dict = lambda *a, **k: {n: v.clone() for n, v in take(*a, **k).items()}
        try:
            return search(self, x, w_mean, x_mean, module2inspect, *rest, **named)
        finally:
            del module2inspect.state_dict

    quantizer._compute_best_scale = with_copies


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import awq
    import torch
    import transformers
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

    own_snapshots(AwqQuantizer)
    rows = job["rows"]
    # blocks go to the GPU one by one, where there is one
    model = AutoAWQForCausalLM.from_pretrained(
        job["model"], device_map="cpu", safetensors=True, trust_remote_code=False
    )
    start = time.perf_counter()
    model.quantize(
        None,
        quant_config=job["settings"],
        calib_data=rows,
        max_calib_samples=len(rows),
        max_calib_seq_len=len(rows[0]),
    )
    seconds = time.perf_counter() - start
    model.save_quantized(job["output"])
    notes = ["AutoAWQ computes and stores in fp16"]
    if not torch.cuda.is_available():
        notes.append(
            "AutoAWQ's scale search was made to restore copies of the weights: on a CPU it restores the "
            "weights that it has changed"
        )
    versions = {
        "autoawq": awq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"versions": versions, "seconds": seconds, "notes": notes}), flush=True)


if __name__ == "__main__":
    main()
