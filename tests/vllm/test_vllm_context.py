"""vLLM itself as the judge of the longest context that a config has."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from quant.serving.deployment import OFFLINE
from tests.contexts import CONTEXTS
from tests.helpers import ROOT

HERE = Path(__file__).parent


def test_vllm_derives_the_same_contexts(vllm_python: str, tmp_path: Path) -> None:
    example = ROOT / "examples" / "tinylm-4m"
    jobs = []
    for number, (changes, overrides, asked, _) in enumerate(CONTEXTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in example.glob("tokenizer*"):
            (folder / file.name).symlink_to(file)
        config = json.loads((example / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        jobs.append([str(folder), overrides, asked])
    done = subprocess.run(
        [vllm_python, str(HERE / "contexts_of.py"), json.dumps(jobs)],
        capture_output=True, text=True, timeout=300, env=os.environ | OFFLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [longest for *_, longest in CONTEXTS]
