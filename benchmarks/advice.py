#!/usr/bin/env python3
"""What is advised in sixty scenarios, beside what public recipes do, as docs/advice.md.

    python benchmarks/advice.py [--write] [--vllm PYTHON]

``--vllm`` names a Python that has vLLM: every printed ``vllm serve`` is then parsed with its own arguments.
A scenario is a model, GPUs and a need; the source says which precisions it offers for that model, or takes
for that need. Ours agrees where it is one of them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quant.planning.recommendation import Recommendation, recommend  # noqa: E402
from quant.planning.request import EngineRequest  # noqa: E402

DOCS = ROOT / "docs" / "advice.md"
#: Where the recipes were read.
RECIPES = "vllm-project/recipes at 8959cf6"
PAPER = "arXiv 2411.02355"

#: Model → (file of the recipes, precisions that it serves the model in).
OFFERED = {
    "Llama-3.1-8B-Instruct": ("meta-llama/Llama-3.1-8B-Instruct", "bf16 int8 int4 nvfp4 fp8"),
    "Llama-3.3-70B-Instruct": ("meta-llama/Llama-3.3-70B-Instruct", "bf16 fp8 nvfp4"),
    "Llama-3.2-1B-Instruct": ("meta-llama/Llama-3.2-1B-Instruct", "bf16 int8 int4"),
    "Llama-3.2-3B-Instruct": ("meta-llama/Llama-3.2-3B-Instruct", "bf16 int8 int4"),
    "Llama-4-Scout-17B-16E-Instruct": ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "bf16 fp8 nvfp4"),
    "Qwen3-4B": ("Qwen/Qwen3-4B", "bf16 fp8"),
    "Qwen3-8B": ("Qwen/Qwen3-8B", "bf16"),
    "Qwen3-32B": ("Qwen/Qwen3-32B", "bf16 fp8 int4"),
    "Qwen3-30B-A3B": ("Qwen/Qwen3-30B-A3B", "bf16"),
    "Qwen3-235B-A22B": ("Qwen/Qwen3-235B-A22B-Instruct-2507", "bf16 fp8 nvfp4"),
    "Qwen3-235B-A22B-FP8": ("Qwen/Qwen3-235B-A22B-Instruct-2507", "bf16 fp8 nvfp4"),
    "Qwen3-Coder-480B-A35B-Instruct": ("Qwen/Qwen3-Coder-480B-A35B-Instruct", "bf16 fp8 nvfp4"),
    "Qwen3-Next-80B-A3B-Instruct": ("Qwen/Qwen3-Next-80B-A3B-Instruct", "bf16 fp8 nvfp4"),
    "Qwen3.5-27B": ("Qwen/Qwen3.5-27B", "bf16 fp8 int4"),
    "Qwen3.5-35B-A3B": ("Qwen/Qwen3.5-35B-A3B", "bf16 fp8 int4"),
    "Qwen3.6-27B-NVFP4": ("Qwen/Qwen3.6-27B", "bf16 fp8 nvfp4"),
    "Qwen3.8-27B": ("Qwen/Qwen3.8-27B", "bf16 fp8 nvfp4"),
    "Qwen2.5-VL-7B-Instruct": ("Qwen/Qwen2.5-VL-7B-Instruct", "bf16 int4"),
    "gemma-4-31B-it": ("Google/gemma-4-31B-it", "bf16 fp8 nvfp4 int4"),
    "gpt-oss-20b": ("openai/gpt-oss-20b", "mxfp4"),
    "gpt-oss-120b": ("openai/gpt-oss-120b", "mxfp4"),
    "DeepSeek-V3": ("deepseek-ai/DeepSeek-V3", "fp8 nvfp4"),
    "DeepSeek-R1": ("deepseek-ai/DeepSeek-R1", "fp8 nvfp4"),
    "Kimi-K2-Instruct": ("moonshotai/Kimi-K2-Instruct", "fp8"),
    "Kimi-Linear-48B-A3B-Instruct": ("moonshotai/Kimi-Linear-48B-A3B-Instruct", "bf16"),
    "MiniMax-M2.5": ("MiniMaxAI/MiniMax-M2.5", "fp8 nvfp4"),
    "Phi-4-mini-instruct": ("microsoft/Phi-4-mini-instruct", "bf16"),
    "NVIDIA-Nemotron-Nano-9B-v2": ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "bf16 fp8 nvfp4"),
}

#: What the paper takes for one stream, and for many on large GPUs.
FOR_ONE, FOR_MANY = "int4", "fp8 int8"
#: Scheme → the precision as recipes call it; of a checkpoint as it is, its own.
PRECISIONS = {
    "w8a8-fp8": "fp8", "w8a16": "int8", "w8a8-int8": "int8", "w4a16": "int4", "nvfp4": "nvfp4",
}  # fmt: skip
METHODS = {"compressed-tensors": "int4", "modelopt": "nvfp4"}


@dataclass(frozen=True)
class Case:
    """A model, GPUs and a need: context in tokens, requests at once, what decides."""

    model: str
    gpu: str
    count: int = 1
    context: int = 8192
    concurrency: int = 1
    objective: str = "balanced"

    @property
    def need(self) -> str:
        return f"{self.concurrency} × {self.context // 1024}k, {self.objective}"


def cases() -> list[Case]:
    """The scenarios, small parts first."""
    one = [
        Case("Llama-3.2-1B-Instruct", "T4"), Case("Llama-3.2-3B-Instruct", "T4"), Case("Qwen3-4B", "T4"),
        Case("Llama-3.2-3B-Instruct", "RTX 4060"), Case("Llama-3.1-8B-Instruct", "RTX 3060"),
        Case("Llama-3.1-8B-Instruct", "RTX 3090"), Case("Qwen3-32B", "RTX 3090", context=4096),
        Case("Llama-3.1-8B-Instruct", "RTX 4090"), Case("Llama-3.1-8B-Instruct", "RTX 4090", 1, 8192, 16),
        Case("Qwen3-32B", "RTX 4090", context=4096), Case("gpt-oss-20b", "RTX 4090"),
        Case("Qwen3-8B", "RTX 5090", 1, 32768, 4), Case("Qwen3-32B", "RTX 5090"),
        Case("Qwen3.6-27B-NVFP4", "RTX 5090", 1, 32768), Case("Phi-4-mini-instruct", "RTX 4070"),
        Case("Llama-3.1-8B-Instruct", "L4"), Case("Llama-3.1-8B-Instruct", "L4", 1, 8192, 16),
        Case("Qwen2.5-VL-7B-Instruct", "L4"), Case("Qwen3-4B", "L4", 1, 8192, 16),
        Case("Llama-3.1-8B-Instruct", "A10G", 1, 8192, 8),
        Case("Qwen3-32B", "A6000"),
        Case("Llama-3.1-8B-Instruct", "A6000", 1, 4096, 1, "latency"),
        Case("Llama-3.1-8B-Instruct", "L40S"),
        Case("Llama-3.1-8B-Instruct", "L40S", 1, 2048, 64, "throughput"),
        Case("Llama-3.1-8B-Instruct", "L40S", 1, 4096, 1, "latency"), Case("Qwen3-32B", "L40S", 1, 16384, 4),
        Case("Qwen3-30B-A3B", "L40S", 1, 16384, 8), Case("Llama-3.3-70B-Instruct", "L40S", 2, 8192, 4),
        Case("Llama-3.3-70B-Instruct", "L40S", 4, 8192, 16), Case("Qwen3.5-27B", "L40S", 1, 32768, 4),
    ]  # fmt: skip
    large = [
        Case("Llama-3.1-8B-Instruct", "A100"), Case("Llama-3.1-8B-Instruct", "A100", objective="quality"),
        Case("Llama-3.3-70B-Instruct", "A100"), Case("Llama-3.3-70B-Instruct", "A100", 2, 8192, 8),
        Case("Llama-3.3-70B-Instruct", "A100", 4, 8192, 16, "quality"),
        Case("Qwen3-32B", "A100", 1, 16384, 8),
        Case("Llama-3.1-8B-Instruct", "H100", 1, 8192, 32),
        Case("Llama-3.1-8B-Instruct", "H100", 1, 4096, 64, "throughput"),
        Case("Qwen3-32B", "H100", 1, 16384, 8), Case("Qwen3-30B-A3B", "H100", 1, 16384, 16),
        Case("Llama-3.3-70B-Instruct", "H100"), Case("Llama-3.3-70B-Instruct", "H100", 2, 8192, 16),
        Case("Llama-3.3-70B-Instruct", "H100", 4, 32768, 32), Case("gpt-oss-120b", "H100", 1, 32768, 4),
        Case("gemma-4-31B-it", "H100", 1, 16384, 4), Case("Llama-4-Scout-17B-16E-Instruct", "H100", 2),
        Case("Qwen3-Next-80B-A3B-Instruct", "H100", 2, 32768, 8), Case("Qwen3-235B-A22B", "H100", 4),
        Case("Qwen3-235B-A22B-FP8", "H100", 4, 32768, 8), Case("Qwen3-235B-A22B-FP8", "H100", 8, 32768, 16),
        Case("NVIDIA-Nemotron-Nano-9B-v2", "H100", 1, 16384, 16), Case("MiniMax-M2.5", "H100", 4, 32768, 8),
        Case("Kimi-Linear-48B-A3B-Instruct", "H200", 1, 32768, 8), Case("Qwen3.8-27B", "H200", 1, 32768, 16),
        Case("Llama-3.3-70B-Instruct", "H200", 1, 8192, 16), Case("DeepSeek-V3", "H200", 8, 32768, 16),
        Case("DeepSeek-R1", "B200", 8, 32768, 32), Case("Kimi-K2-Instruct", "B200", 8, 32768, 16),
        Case("Qwen3-Coder-480B-A35B-Instruct", "B200", 8, 32768, 16), Case("Llama-3.3-70B-Instruct", "B200"),
    ]  # fmt: skip
    return one + large


def advise(case: Case) -> Recommendation:
    request = EngineRequest(context=case.context, concurrency=case.concurrency)
    return recommend(case.model, case.gpu, request, gpu_count=case.count, objective=case.objective)


def precision(recommendation: Recommendation) -> str:
    """What the advice is called in recipes; empty where nothing fits."""
    if recommendation.recommended is None:
        return ""
    if recommendation.recommended in PRECISIONS:
        return PRECISIONS[recommendation.recommended]
    method = str((recommendation.model.quantization or {}).get("quant_method", ""))
    return METHODS.get(method, method) or "bf16"


def source_of(case: Case, recommendation: Recommendation) -> str:
    """The public source and what it takes, with ✓ where ours is one of it."""
    if case.objective in ("latency", "throughput"):
        name, taken = PAPER, FOR_ONE if case.objective == "latency" else FOR_MANY
    else:
        file, taken = OFFERED[case.model]
        name = f"recipe {file}"
    return f"{'✓ ' if precision(recommendation) in taken.split() else ''}{name}: {taken.replace(' ', ', ')}"


def table(advised: list[tuple[Case, Recommendation]]) -> str:
    lines = [
        "| model | GPU | need | advice | context, cache | why | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, one in advised:
        chosen = next((p for p in one.plans if p.scheme == one.recommended), None)
        gpus = f"{case.count} × {one.gpus[0].name}" if case.count > 1 else one.gpus[0].name
        room = "" if one.plan is None else f"{one.plan.context:,}, {one.plan.kv_cache_bytes / 2**30:.1f} GiB"
        why = one.reason.split(": ")[0].replace("|", "/")
        label = chosen.label if chosen else "nothing fits"
        cells = [case.model, gpus, case.need, label, room, why, source_of(case, one)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refused(commands: list[str], python: str) -> dict[str, str]:
    """The ``vllm serve`` commands that the parser of vLLM 0.32 refuses, with its words."""
    program = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser, bad = make_arg_parser(FlexibleArgumentParser()), {}\n"
        "for words in json.load(sys.stdin):\n"
        "    try: parser.parse_args(words)\n"
        "    except SystemExit as error: bad[' '.join(words)] = str(error)\n"
        "print(json.dumps(bad))\n"
    )
    words = json.dumps([shlex.split(c)[2:] for c in commands])
    done = subprocess.run([python, "-c", program], input=words, capture_output=True, text=True, check=True)
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {DOCS.relative_to(ROOT)}")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python with vLLM, to parse the commands")
    options = parser.parse_args()
    advised = [(case, advise(case)) for case in cases()]
    text = table(advised)
    agreed = sum(source_of(case, one).startswith("✓") for case, one in advised)
    line = f"{len(advised)} scenarios, {agreed} with one of the precisions that the source takes."
    if options.vllm:
        commands = [c for _, one in advised for c in one.commands if c.startswith("vllm serve")]
        bad = refused(commands, options.vllm)
        for command, words in bad.items():
            print(f"refused: {command}: {words}", file=sys.stderr)
        line += f" vLLM's own parser takes {len(commands) - len(bad)} of the {len(commands)} commands."
    if options.write:
        head = (
            "# Advice\n\n"
            "What `quant recommend` advises, as `python benchmarks/advice.py --write` computes it, and what "
            f"public sources do for\nthe same model or need: {RECIPES} (`models/`), and {PAPER} for one "
            f"stream and for many at once.\n{line}\n\n"
        )
        DOCS.write_text(head + text + "\n", encoding="utf-8")
    else:
        print(text)
    print(line)


if __name__ == "__main__":
    main()
