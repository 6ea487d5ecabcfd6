"""Run by the Python of vLLM's environment: the longest context that it derives from each config of a folder.

python contexts_of.py '[[folder, overrides, context or null], …]'
"""

from __future__ import annotations

import json
import sys

from vllm.config import ModelConfig

if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    found = [
        ModelConfig(model=folder, max_model_len=asked, hf_overrides=overrides, dtype="bfloat16").max_model_len
        for folder, overrides, asked in jobs
    ]
    print(json.dumps(found))
