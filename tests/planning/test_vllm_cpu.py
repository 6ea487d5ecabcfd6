"""The plan beside what vLLM's CPU build really allocates: nine architectures with random weights, started one
after another.

Needs an interpreter with vLLM::

    QUANT_VLLM_PYTHON=/path/to/vllm/bin/python python -m pytest -m vllm tests/planning/test_vllm_cpu.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quant.catalog import model_from_config
from quant.hardware import cpu_device
from quant.planning import EngineRequest, plan
from quant.vllm.kernels import has_fp8_cache
from tests.planning.tiny_models import TINY

MIB = 2**20
CONTEXT, CACHE, TOKENS = 2048, 64 * MIB, 1024

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    python = os.environ.get("QUANT_VLLM_PYTHON")
    if not python:
        pytest.skip("QUANT_VLLM_PYTHON names no interpreter with vLLM")
    root = tmp_path_factory.mktemp("vllm")
    jobs = []
    for name, config in TINY.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        for context, dtype in (
            (CONTEXT, "auto"),
            (1500, "auto"),
            *([(CONTEXT, "fp8")] if name == "gqa" and has_fp8_cache(cpu_device(2**36)) else []),
        ):
            arguments = {"max_num_batched_tokens": TOKENS, "max_num_seqs": 64, "kv_cache_dtype": dtype}
            key = f"{name} {context} {dtype}"
            jobs.append(
                {
                    "name": key,
                    "path": str(root / name),
                    "context": context,
                    "kv_cache_bytes": CACHE,
                    "arguments": arguments,
                }
            )
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("start_vllm.py")
    done = subprocess.run(
        [python, str(script), str(root / "jobs.json")],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    lines = [
        json.loads(line.removeprefix("RESULT "))
        for line in done.stdout.splitlines()
        if line.startswith("RESULT ")
    ]
    assert len(lines) == len(jobs), done.stderr[-2000:]
    return {line["name"]: line for line in lines}


def cases() -> list[tuple[str, int, str]]:
    return [(n, c, "auto") for n in TINY for c in (CONTEXT, 1500)] + [("gqa", CONTEXT, "fp8")]


@pytest.mark.parametrize(("name", "context", "dtype"), cases())
def test_tokens_and_bytes_per_token_are_those_of_the_running_engine(
    started: dict[str, dict[str, Any]], name: str, context: int, dtype: str
) -> None:
    if dtype == "fp8" and not has_fp8_cache(cpu_device(2**36)):
        pytest.skip("neither AVX512 nor AMX, one of which vLLM's FP8 cache takes on a CPU")
    real = started[f"{name} {context} {dtype}"]
    assert "error" not in real, real["error"]
    request = EngineRequest(
        context=context,
        max_num_batched_tokens=TOKENS,
        max_num_seqs=64,
        kv_cache_memory_bytes=CACHE,
        kv_cache_dtype=dtype,
    )
    found = plan(model_from_config(TINY[name], name), [cpu_device(2**36)], None, request)
    assert found.layout is not None
    assert found.block_tokens == real["block_size"]
    assert len(found.layout.groups) == real["groups"]
    assert found.kv_blocks == real["blocks"]
    assert found.kv_tokens == real["tokens"]
    assert found.max_concurrency == pytest.approx(real["concurrency"], abs=1e-4)
    pool_bytes_per_token = real["bytes"] / real["blocks"] * real["groups"] / real["block_size"]
    assert found.kv_bytes_per_token == pool_bytes_per_token
