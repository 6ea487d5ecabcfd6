#!/usr/bin/env python3
"""Projects what jobs take whose models and machines are not here: 8B, 70B and 405B parameters and a mixture
of 235B, on a box of CPU cores, on one H100 and on eight.

    python benchmarks/scaling.py [--text FILE] [--methods gptq yaqa minmax] [--models 8B] [--cores 32]

Models are files of the right header and no content, which the dry run's own count goes over
(`quant/pipeline/counted.py`, `footprint.py`): shapes of every block, not a formula of the parameters. On a
CPU its rates are measured here, on one thread, and divided by the cores of the projected machine. A GPU that
is not here has no measured rate: its numbers are shares of a data sheet's peaks (SHARES), which say where the
time would go and how it would divide, and no more than that. Eight GPUs exchange through the host's memory,
as `docs/ranks.md` says. All are projections; `projections.py` has the error of the dry run on jobs that were
run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import ROOT, machine

from quant.calibration.parts import part_sizes
from quant.jobs import complete
from quant.pipeline import plan as planning
from quant.pipeline.counted import BothRates, Counter, Rates
from quant.pipeline.estimate import READ, WRITTEN, _kinds
from quant.pipeline.footprint import summed_bytes, waiting_bytes
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.workspace import RESIDENT_CPU
from quant.recipe import Assignment, Recipe
from quant.vllm.config import stated

DENSE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8}
#: config.json of the models; of the others' published ones what shapes need.
MODELS: dict[str, dict[str, Any]] = {
    "8B": DENSE | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32},
    "70B": DENSE | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64},
    "405B": DENSE | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                     "num_attention_heads": 128},
    "235B mixture": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 4096,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    },
}  # fmt: skip
#: An H100 SXM by its data sheet: operations a second in bf16 and in fp32, bytes a second of its memory; and
#: the shares of them that are assumed.
BF16, FP32, HBM = 989e12, 67e12, 3.35e12
SHARES = {"bf16": 0.4, "fp32": 0.5, "hbm": 0.5}
#: Bytes of activations that stay in a GPU's memory, at the most.
MOST_RESIDENT = 40 << 30
#: Bytes a second that ranks exchange through gloo on one machine: assumed.
EXCHANGED = 2e9
#: Operations of a solve by N·K²: feedback between runs and a sweep's product of errors with H, of a run's own
#: steps about as many again in registers; and products of a method of two Hessians come as it says.
SOLVE, ROWS, LENGTH = 8, 128, 2048


class OnOneCore(Counter):
    """The count with rates measured here, by the time that this thread had: others may use the cores, too."""

    def _timed(self, work: Callable[[], object]) -> float:
        work()
        start = time.process_time()
        work()
        return time.process_time() - start


class OnH100(Counter):
    """The count with the rates of a data sheet."""

    def _product_seconds(self) -> float:
        return 2 / (BF16 * SHARES["bf16"])

    def _of(self, assignment: Assignment) -> Rates:
        fp32, needs = FP32 * SHARES["fp32"], self._manager.blocks.solver.needs(assignment)
        if "hessian" not in needs:
            return Rates(0.0, 40 / (HBM * SHARES["hbm"]))
        return Rates(2 / (BF16 * SHARES["bf16"]), 0.0, SOLVE / fp32)

    def _of_both(self, assignment: Assignment) -> BothRates:
        quantizer, fp32 = self._manager.quantizers[assignment], FP32 * SHARES["fp32"]
        # a step of an input and a block: a diagonal's fourteen operations of 5 microseconds, shared by a tile
        step = 14 * 5e-6 * 2 / 128
        return BothRates(2 / fp32, step, 2 * getattr(quantizer, "products", 10) / fp32)


@dataclass(frozen=True)
class Projection:
    """Of a job on a machine: seconds, and bytes of memory where blocks are worked on, of scratch, and of what
    ranks exchange."""

    seconds: float
    memory: int
    scratch: int
    network: int


def make(name: str, folder: Path) -> Path:
    """The model's folder: a header, a file of that length without content, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/tinylm-4m" / file, folder)
    vocabulary = 151936 if "num_experts" in MODELS[name] else 128256
    values = MODELS[name] | {
        "vocab_size": vocabulary, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    header, end = {}, 0
    for key, tensor in state.items():
        shapes = {key: tuple(tensor.shape)}
        if key.endswith("experts.gate_up_proj"):  # files hold experts one by one
            base, (count, two, hidden) = key.removesuffix("gate_up_proj"), tensor.shape
            shapes = {
                f"{base}{e}.{p}_proj.weight": (two // 2, hidden) for e in range(count) for p in ("gate", "up")
            }
        elif key.endswith("experts.down_proj"):
            base, (count, hidden, inner) = key.removesuffix("down_proj"), tensor.shape
            shapes = {f"{base}{e}.down_proj.weight": (hidden, inner) for e in range(count)}
        for part, shape in shapes.items():
            size = 2 * torch.Size(shape).numel()
            header[part] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def project(model: Path, method: str, cores: int, text: Path | None) -> dict[str, Projection]:
    """By machine."""
    options: dict[str, Any] = {}
    if method != "minmax":
        options = {"samples": ROWS, "sequence_length": LENGTH} | (
            {"calibration_dataset": [text]} if text else {}
        )
    recipe = complete(Recipe(model_path=model, output_path=model.with_name("out"), method=method, **options))[
        0
    ]
    plan = planning.plan_job(recipe)
    manager = QuantizationManager(plan)
    files = plan.checkpoint.nbytes / READ + plan.output_bytes / WRITTEN
    if not manager.needs:
        weights = sum(x.n * x.k for x in plan.linears.values())
        largest = 9 * max(x.n * x.k for x in plan.linears.values())
        rounding = 40 * weights / (HBM * SHARES["hbm"])
        # eight processes read from and write to the same disk; what is written is not exchanged
        return {
            name: Projection(files + rounding / count, largest, 0, 0)
            for name, count in (("H100", 1), ("8 H100", 8))
        }
    rows, skeleton = manager.prepare()
    tokens, kinds = ROWS * LENGTH, _kinds(plan, skeleton)
    waiting = waiting_bytes(manager, skeleton, tokens, ROWS)
    made = {}
    for machine_name, kind, count in (("CPU", OnOneCore, 1), ("H100", OnH100, 1), ("8 H100", OnH100, 8)):
        counter = kind(manager, skeleton)
        seconds, memory = 0.0, 0
        for index, blocks in kinds:
            work = counter.block(index, tokens)
            seconds, memory = seconds + work.seconds * blocks, max(memory, work.memory)
        if machine_name == "CPU":
            made[f"{cores} cores"] = Projection(
                seconds / cores + files, memory + RESIDENT_CPU, waiting - RESIDENT_CPU, 0
            )
            continue
        exchanged = 0
        if count > 1:
            if plan.gradients and any(".experts." in x for x in plan.linears):
                continue  # refused: docs/ranks.md
            parts = len(part_sizes(ROWS))
            if plan.gradients:  # blocks are solved by turns; sums go to rank 0, and from there to who solves
                sums = sum(summed_bytes(manager, skeleton, i) for i in range(skeleton.block_count))
                exchanged = sums * parts
                seconds = seconds / count + exchanged / EXCHANGED
            else:  # each rank divides passes and sums; a GPU solves every weight
                # experts, of which each rank solves some, aside
                plain = [x for n, x in plan.linears.items() if ".experts." not in n]
                solve = sum(SOLVE * x.n * x.k**2 / (FP32 * SHARES["fp32"]) for x in plain)
                sums = sum(4 * k * k for k in _inputs(plan, skeleton))
                exchanged = sums * 2 * (parts - 1) + 2 * sum(x.n * x.k for x in plan.linears.values())
                exchanged += tokens * sum(_routed_bytes(plan, skeleton))
                seconds = (seconds - solve) / count + solve + exchanged / EXCHANGED
        resident = min(waiting // count, MOST_RESIDENT)
        made[machine_name] = Projection(seconds + files, memory + resident, 0, exchanged)
    return made


def _routed_bytes(plan: planning.JobPlan, skeleton: Any) -> Iterator[int]:
    """Bytes a token of what experts read, in bf16, that every rank is told."""
    visits = int(stated(plan.checkpoint.config, "active") or 0)
    for index in range(skeleton.block_count):
        for group in skeleton.groups(index):
            name = skeleton.block_prefix(index) + group.linears[0]
            if group.experts and name in plan.linears:
                yield 2 * plan.linears[name].k * (1 if group.stage == "up" else visits)


def _inputs(plan: planning.JobPlan, skeleton: Any) -> list[int]:
    """K of each input that is summed, those of experts aside."""
    return [
        plan.linears[skeleton.block_prefix(index) + group.linears[0]].k
        for index in range(skeleton.block_count)
        for group in skeleton.groups(index)
        if not group.experts and skeleton.block_prefix(index) + group.linears[0] in plan.linears
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=["gptq", "yaqa", "minmax"])
    parser.add_argument("--models", nargs="*", default=[*MODELS])
    parser.add_argument("--cores", type=int, default=32, help="of the CPU box that is projected")
    parser.add_argument("--text", type=Path, help="calibration text instead of the bundled one")
    options = parser.parse_args()
    # neither disk nor memory of this machine is what the job would have
    planning.check_disk = lambda *_: None  # type: ignore[assignment]
    print(f"rates of a CPU measured on {machine()}, one thread")
    print("| model | method | machine | hours | memory | scratch | exchanged |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            model = make(name, Path(folder) / name)
            for method in options.methods:
                for where, p in project(model, method, options.cores, options.text).items():
                    sizes = (f"{x / 2**30:.1f} GiB" if x else "-" for x in (p.memory, p.scratch, p.network))
                    print(
                        f"| {name} | {method} | {where} | {p.seconds / 3600:.2f} | {' | '.join(sizes)} |",
                        flush=True,
                    )


if __name__ == "__main__":
    sys.exit(main())
