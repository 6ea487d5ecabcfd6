#!/usr/bin/env python3
"""The planner's predictions beside what vLLM printed on real machines, and beside two simpler rules on the
same starts.

    python benchmarks/planner_accuracy.py [--samples FILE.yaml] [--json] [--verbose]

A sample is one start: what was asked for, and what vLLM printed or how it failed. What a sample does not say
is left to the planner's defaults; a start that names no release is taken as V0 when it counts GPU blocks (V1
prints tokens), else as 0.9.

* weights: error against "model loading took"
* KV bytes per token: predicted bytes times the printed tokens must give the printed cache within its rounding
  and one block
* non-KV: activation peak and memory outside torch, where printed, else what is left of total × utilization
* verdict: would this start succeed? Judged apart on starts that did and starts that did not. Starts that
  failed for another reason than memory, or that do not say the GPU, are not judged.

The naive rule: KV = total × utilization − file size / GPUs − 2 GiB, with the plain KV formula. ``params``:
weights = parameters × bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quant.catalog import NAME_MARKS, find_model, stored_bytes  # noqa: E402
from quant.errors import QuantError  # noqa: E402
from quant.hardware import Gpu, named_gpu  # noqa: E402
from quant.models.spec import DTYPE_BYTES, ModelSpec  # noqa: E402
from quant.planning.memory import EngineRequest, MemoryPlan, plan  # noqa: E402
from quant.planning.rule_of_thumb import OVERHEADS  # noqa: E402
from quant.planning.storage import checkpoint_bytes, source_schemes  # noqa: E402
from quant.vllm.releases import parse_version  # noqa: E402

GIB = 2**30
NOT_MEMORY = {"failed_other"}

#: a sample's words for its quantization → the mark that a name would carry
MARKS = {
    "bitsandbytes-4bit": "-bnb-4bit", "bitsandbytes": "-bnb-4bit", "w8a8-int8": ".w8a8", "w8a8": ".w8a8",
    "int8": ".w8a8",
    "w8a16": ".w8a16",
    "awq": "-AWQ", "awq_marlin": "-AWQ", "awq-int4": "-AWQ", "gptq": "-GPTQ", "gptq_marlin": "-GPTQ",
    "gptq-int4": "-GPTQ-Int4",
    "gptq-int8": "-GPTQ-Int8", "fp8": "-FP8-dynamic", "w4a16": ".w4a16", "nvfp4": "-NVFP4",
    "modelopt_fp4": "-NVFP4",
}  # fmt: skip


#: the first release that serves a family, from vLLM's release notes: an unnamed release is not older
FIRST_RELEASE = (
    ("qwen3.5", "0.17.0"),
    ("qwen3-vl", "0.11.0"),
    ("qwen3-next", "0.10.2"),
    ("gpt-oss", "0.10.1"),
    ("internvl3_5", "0.10.1"),
)


def release_of(sample: dict[str, Any]) -> str:
    """The release that the start ran, or the engine's most likely one."""
    if version := sample.get("vllm_version"):
        return str(version)
    if "gpu_blocks" in sample or "non_torch_gib" in sample:
        return "0.6.6"
    first = next((v for mark, v in FIRST_RELEASE if mark in sample["model"].lower()), "0.9.0")
    return max("0.9.0", first, key=parse_version)


def model_of(sample: dict[str, Any]) -> ModelSpec:
    spec = find_model(sample["model"].split(" (")[0])
    words = str(sample.get("quantization", "none")).split(" ")[0]
    if words not in ("none", "") and not spec.quantization and words in MARKS:
        for pattern, config in NAME_MARKS:
            if re.search(pattern, MARKS[words], re.IGNORECASE):
                spec = replace(spec, quantization=config)
                break
    return spec


def gpu_of(sample: dict[str, Any]) -> Gpu | None:
    """The GPU of a start: its name where the table has it, with the memory that was printed; None where
    neither is told."""
    total = sample.get("gpu_total_gib") or sample.get("gpu_usable_gib")
    name = str(sample.get("gpu_name", "")).split(" (")[0]
    gpu = None
    if name:
        try:
            gpu = named_gpu(name)
        except QuantError:
            gpu = None
    if gpu is None and total is None:
        return None
    capability = (7, 5) if re.search("7\\.5|Volta|Turing|22GB", str(sample.get("gpu_name", ""))) else (8, 0)
    size = int(float(total) * GIB) if total else gpu.total_bytes  # type: ignore[union-attr]
    free = sample.get("gpu_free_at_start_gib")
    held = 0.0
    # the rest was held by other processes
    if "gpu_free_at_oom_gib" in sample and "torch_allocated_at_oom_gib" in sample:
        held = max(0.0, size / GIB - sample["gpu_free_at_oom_gib"] - sample["torch_allocated_at_oom_gib"])
    free_bytes = int(free * GIB) if free else int(size - max(held, 0.3) * GIB)
    if gpu is None:
        return Gpu(name=name or "unnamed", total_bytes=size, free_bytes=free_bytes, capability=capability)
    return replace(gpu, total_bytes=size, free_bytes=free_bytes)


def predict(sample: dict[str, Any]) -> tuple[ModelSpec, Gpu | None, MemoryPlan]:
    spec, gpu = model_of(sample), gpu_of(sample)
    ranks, stages = sample.get("tensor_parallel_size", 1), sample.get("pipeline_parallel_size", 1)
    asked = sample.get("max_model_len")
    context = asked if isinstance(asked, int) and asked > 0 else None
    if context and context > spec.max_context:
        spec = replace(spec, max_context=context)  # extended by rope scaling on the command line
    chunked = True if "--enable-chunked-prefill" in str(sample.get("other_flags", "")) else None
    request = EngineRequest(
        context=context, tensor_parallel=ranks, pipeline_parallel=stages,
        gpu_memory_utilization=sample.get("gpu_memory_utilization"),
        max_num_seqs=sample.get("max_num_seqs"), max_num_batched_tokens=sample.get("max_num_batched_tokens"),
        enforce_eager=bool(sample.get("enforce_eager")), vllm_version=release_of(sample),
        block_size=sample.get("block_size"),
        kv_cache_dtype=sample.get("kv_cache_dtype", "auto"), chunked_prefill=chunked,
        dtype={"half": "float16"}.get(sample.get("dtype"),
        sample.get("dtype") if sample.get("dtype") in DTYPE_BYTES else None),
    )  # fmt: skip
    anywhere = gpu or replace(named_gpu("H100"), total_bytes=2**42, free_bytes=2**42)
    found = plan(spec, [anywhere] * (ranks * stages), None, request)
    if asked in (-1, "auto") and found.max_context:  # vLLM takes the longest context that fits
        found = plan(spec, [anywhere] * (ranks * stages), None, replace(request, context=found.max_context))
    return spec, gpu, found


def non_kv(sample: dict[str, Any]) -> float | None:
    """GiB that were neither weights nor cache, as printed or as what is left."""
    if "activation_peak_gib" in sample and "non_torch_gib" in sample:
        return float(sample["activation_peak_gib"] + sample["non_torch_gib"])
    total = sample.get("gpu_total_gib") or sample.get("gpu_usable_gib")
    if total and {"weights_gib", "kv_cache_gib", "gpu_memory_utilization"} <= set(sample):
        return float(
            total * sample["gpu_memory_utilization"] - sample["weights_gib"] - sample["kv_cache_gib"]
        )
    return None


def token_error(sample: dict[str, Any], found: MemoryPlan) -> float | None:
    """Relative error of the predicted bytes per token, 0 within the print's rounding; None where the start
    printed too little."""
    tokens = sample.get("kv_tokens") or (
        sample["gpu_blocks"] * sample["block_size"]
        if sample.get("gpu_blocks") and "block_size" in sample
        else 0
    )
    if not tokens or "kv_cache_gib" not in sample:
        return None
    measured = sample["kv_cache_gib"] * GIB
    slack = 0.0051 * GIB + (found.layout.bytes_per_block * len(found.layout.groups) if found.layout else 0)
    predicted = found.kv_bytes_per_token * tokens
    return 0.0 if abs(predicted - measured) <= slack else predicted / measured - 1


def source_bits(spec: ModelSpec) -> int:
    """Bits of a weight of the checkpoint's own linears, the fewest where they differ."""
    stored = map(source_schemes(spec), spec.weights)
    return min((s.weights.bits for s in stored if s is not None), default=16)


def naive(sample: dict[str, Any], spec: ModelSpec, gpu: Gpu | None) -> tuple[float, bool | None]:
    """The simple rule's weights in GiB, and its verdict."""
    world = sample.get("tensor_parallel_size", 1) * sample.get("pipeline_parallel_size", 1)
    size = checkpoint_bytes(spec) if not spec.quantization else spec.parameters * (source_bits(spec) / 8)
    weights = size / world
    if gpu is None:
        return weights / GIB, None
    kv = gpu.total_bytes * sample.get("gpu_memory_utilization", 0.9) - weights - 2 * GIB
    width = 1 if sample.get("kv_cache_dtype", "auto").startswith("fp8") else 2
    each = 2 * spec.layers * spec.kv_heads * spec.head_dim * width / world
    return weights / GIB, kv / each >= (sample.get("max_model_len") or spec.max_context)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(share * 100) // 100) - 1))]


def judge(sample: dict[str, Any]) -> dict[str, Any]:
    """One row of the table; ``skipped`` says why a sample could not be planned."""
    row: dict[str, Any] = {
        "id": sample.get("id", "?"),
        "model": sample.get("model", "?"),
        "status": sample.get("status", "?"),
    }
    try:
        spec, gpu, found = predict(sample)
    except QuantError as error:
        return {**row, "skipped": str(error)}
    row["quantized"] = spec.quantization is not None
    simple, simple_fits = naive(sample, spec, gpu)
    if "weights_gib" in sample:
        measured = sample["weights_gib"]
        predicted = [w / GIB for w in found.weights_by_stage]
        closest = min((w for w in predicted), key=lambda w: abs(w - measured))
        row["weights"] = (measured, closest, closest / measured - 1)
        bits, world = source_bits(spec), len(predicted) * found.tensor_parallel
        row["weights_params"] = spec.parameters * bits / 8 / GIB / world / measured - 1
        # the rule halves the 16-bit file's "32" bits once for each step
        rule = {16: "fp16", 8: "int8"}.get(int(bits), "int4")
        row["weights_rule"] = 2 * spec.parameters * bits / 32 * OVERHEADS[rule] / GIB / world / measured - 1
    row["tokens"] = token_error(sample, found)
    used = non_kv(sample)
    if used is not None:
        value = (found.activation_bytes + found.other_bytes) / GIB
        row["non_kv"] = (used, value, value - used)
        row["non_kv_naive"] = 2.0 - used
    if gpu is not None and sample.get("status") not in NOT_MEMORY:
        row["ok"] = sample["status"] == "ok"
        row["verdict"], row["why"] = found.fits, found.why
        row["verdict_naive"] = simple_fits
    row["stored_gib"] = stored_bytes(spec) / GIB
    row["naive_weights_gib"] = simple
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the error table."""
    planned = [r for r in rows if "skipped" not in r]

    def weights(quantized: bool, key: str) -> dict[str, Any]:
        errors = [
            abs(r[key][2] if key == "weights" else r[key])
            for r in planned
            if "weights" in r and r["quantized"] is quantized
        ]
        limit = 0.02 if quantized else 0.01
        if not errors:
            return {"starts": 0}
        return {
            "starts": len(errors),
            "within": sum(e <= limit for e in errors),
            "limit": limit,
            "median": statistics.median(errors),
            "worst": max(errors),
        }

    by_model: dict[str, list[float]] = {}
    for r in planned:
        if "non_kv" in r:
            by_model.setdefault(r["model"], []).append(abs(r["non_kv"][2]))
    errors = [abs(r["non_kv"][2]) for r in planned if "non_kv" in r]
    simple = [abs(r["non_kv_naive"]) for r in planned if "non_kv" in r]
    tokens = [r["tokens"] for r in planned if r.get("tokens") is not None]

    def verdicts(ok: bool, key: str) -> dict[str, int]:
        judged = [r for r in planned if r.get("ok") is ok]
        return {"right": sum(r[key] is ok for r in judged), "of": len(judged)}

    return {
        "samples": len(rows), "planned": len(planned),
        "weights_unquantized": weights(False, "weights"),
        "weights_unquantized_params": weights(False, "weights_params"),
        "weights_quantized": weights(True, "weights"),
        "weights_quantized_params": weights(True, "weights_params"),
        "weights_unquantized_rule_of_thumb": weights(False, "weights_rule"),
        "weights_quantized_rule_of_thumb": weights(True, "weights_rule"),
        "kv_bytes_per_token": {"starts": len(tokens), "exact": sum(t == 0 for t in tokens)},
        "non_kv_gib": {
            "starts": len(errors), "models": len(by_model),
            "median": statistics.median(errors) if errors else None,
            "worst_model_median": max((statistics.median(v) for v in by_model.values()), default=None),
            "p90": percentile(errors, 0.9) if errors else None,
            "naive_median": statistics.median(simple) if simple else None,
            "naive_p90": percentile(simple, 0.9) if simple else None,
        },
        "verdicts_started": verdicts(True, "verdict"), "verdicts_failed": verdicts(False, "verdict"),
        "verdicts_started_naive": verdicts(True, "verdict_naive"),
        "verdicts_failed_naive": verdicts(False, "verdict_naive"),
    }  # fmt: skip


def show(rows: list[dict[str, Any]], figures: dict[str, Any], verbose: bool) -> None:
    print(
        f"{'start':50} {'weights GiB':>22} {'error':>7} {'KV/token':>8} {'non-KV GiB':>13} {'error':>6}  "
        "verdict (naive)"
    )
    for r in rows:
        if "skipped" in r:
            print(f"{r['id']:50} not planned: {r['skipped']}")
            continue
        weights = (
            f"{r['weights'][0]:9.2f} → {r['weights'][1]:9.2f} {r['weights'][2]:+7.2%}"
            if "weights" in r
            else " " * 30
        )
        token = "" if r.get("tokens") is None else "exact" if r["tokens"] == 0 else f"{r['tokens']:+.1%}"
        other = (
            f"{r['non_kv'][0]:5.2f} → {r['non_kv'][1]:5.2f} {r['non_kv'][2]:+6.2f}"
            if "non_kv" in r
            else " " * 20
        )
        verdict = ""
        if "ok" in r:
            ours, simple = r["verdict"] is r["ok"], r["verdict_naive"] is r["ok"]
            verdict = f"{r['status']}: {'right' if ours else 'WRONG'} ({'right' if simple else 'wrong'})"
        print(f"{r['id']:50} {weights} {token:>8} {other}  {verdict}")
        if verbose and r.get("why"):
            print(f"{'':12}{r['why']}")
    print()
    f = figures
    for name, limit in (("unquantized", "1 %"), ("quantized", "2 %")):
        ours, simple, thumb = (f[f"weights_{name}{tail}"] for tail in ("", "_params", "_rule_of_thumb"))
        if ours["starts"]:
            print(
                f"weights, {name}: {ours['within']} of {ours['starts']} within {limit}, "
                f"median {ours['median']:.2%}, worst {ours['worst']:.2%}"
                f"   (params × bytes: {simple['within']}, {simple['median']:.2%}, {simple['worst']:.2%}; "
                f"rule of thumb: {thumb['within']}, {thumb['median']:.2%}, {thumb['worst']:.2%})"
            )
    print(
        f"KV bytes per token: {f['kv_bytes_per_token']['exact']} of {f['kv_bytes_per_token']['starts']} exact"
    )
    n = f["non_kv_gib"]
    if n["starts"]:
        print(
            f"non-KV memory ({n['starts']} starts, {n['models']} models): median error {n['median']:.2f} "
            "GiB, worst model's median "
            f"{n['worst_model_median']:.2f}, P90 {n['p90']:.2f}   (naive 2 GiB: median "
            f"{n['naive_median']:.2f}, P90 {n['naive_p90']:.2f})"
        )
    for name in ("started", "failed"):
        ours, simple = f[f"verdicts_{name}"], f[f"verdicts_{name}_naive"]
        if ours["of"]:
            print(
                f"verdicts on starts that {name}: {ours['right']} of {ours['of']} right   (naive: "
                f"{simple['right']})"
            )


def markdown(rows: list[dict[str, Any]]) -> None:
    """The table of docs/planning.md: every start's error under the three rules."""
    print(
        "| start | weights GiB | ours | params × bytes | rule of thumb | non-KV GiB | ours | 2 GiB | "
        "started | ours | naive |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        if "skipped" in r:
            continue
        cells = [r["id"]]
        if "weights" in r:
            cells += [
                f"{r['weights'][0]:.2f}",
                f"{r['weights'][2]:+.1%}",
                f"{r['weights_params']:+.1%}",
                f"{r['weights_rule']:+.1%}",
            ]
        else:
            cells += [""] * 4
        cells += (
            [f"{r['non_kv'][0]:.2f}", f"{r['non_kv'][2]:+.2f}", f"{r['non_kv_naive']:+.2f}"]
            if "non_kv" in r
            else [""] * 3
        )
        cells += (
            [
                "yes" if r["ok"] else "no",
                *("✓" if r[k] is r["ok"] else "✗" for k in ("verdict", "verdict_naive")),
            ]
            if "ok" in r
            else [""] * 3
        )
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=Path, default=ROOT.parent / "shared" / "data" / "vllm_memory_samples.yaml"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="the table of the docs")
    parser.add_argument("--verbose", action="store_true", help="the reason of every verdict")
    options = parser.parse_args()
    if not options.samples.is_file():
        sys.exit(f"{options.samples} is not there: give the measured starts with --samples")
    rows = [judge(s) for s in yaml.safe_load(options.samples.read_text(encoding="utf-8"))]
    figures = summary(rows)
    if options.json:
        print(json.dumps({"summary": figures, "rows": rows}))
    elif options.markdown:
        markdown(rows)
    else:
        show(rows, figures, options.verbose)


if __name__ == "__main__":
    main()
