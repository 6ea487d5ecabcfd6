#!/usr/bin/env python3
"""The planner's predictions beside what vLLM printed on real machines, and beside two simpler rules on the
same starts.

    python benchmarks/planner_accuracy.py [--samples FILE.yaml …] [--configs FILE.json …] [--json] [--verbose]
    python benchmarks/planner_accuracy.py --write   # configs/planner_errors.json and the tables of the docs

Several files are judged together; without ``--samples`` all that are beside the checkout are. ``--configs``
holds config.json facts of models that the catalogue lacks.

A sample is one start: what was asked for, and what vLLM printed or how it failed. What a sample does not say
is left to the planner's defaults; a start that names no release is taken as V0 when it counts GPU blocks (V1
prints tokens), else as 0.9.

* weights: error against "model loading took"
* KV bytes per token: predicted bytes times the printed tokens must give the printed cache within its rounding
  and one block
* non-KV: activation peak and memory outside torch, where printed, else what is left of total × utilization
* KV cache: predicted room against what was printed (or the printed tokens times their bytes), negative where
  there was none; longest context where vLLM printed its estimate
* verdict: would this start succeed? *Tight* (the plan's stated error reaches the limit) counts as right where
  the printed KV cache, if there is one, lies within that error. Judged apart on starts that did and starts
  that did not. Starts that failed for another reason than memory, or that do not say the GPU, are not judged.

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

from quant.catalog import NAME_MARKS, catalogue, find_model, stored_as, stored_bytes  # noqa: E402
from quant.data import load_json  # noqa: E402
from quant.errors import QuantError  # noqa: E402
from quant.hardware import Gpu, gpu_names, idle_bytes, named_gpu  # noqa: E402
from quant.models.shapes import spec_from_config  # noqa: E402
from quant.models.spec import DTYPE_BYTES, ModelSpec  # noqa: E402
from quant.parts import USABLE_SHARE  # noqa: E402
from quant.planning.accuracy import kind_of  # noqa: E402
from quant.planning.engine import model_rules  # noqa: E402
from quant.planning.memory import MemoryPlan, plan  # noqa: E402
from quant.planning.request import EngineRequest  # noqa: E402
from quant.planning.rule_of_thumb import OVERHEADS  # noqa: E402
from quant.planning.storage import checkpoint_bytes, source_schemes  # noqa: E402
from quant.vllm.kernels import has_unified_memory  # noqa: E402
from quant.vllm.releases import Rules, parse_version  # noqa: E402

GIB = 2**30
ERRORS, DOCS = ROOT / "configs" / "planner_errors.json", ROOT / "docs" / "planning.md"
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

#: config facts of models that the catalogue lacks, by name, of the files given with ``--configs``
CONFIGS: dict[str, dict[str, Any]] = {}


def release_of(sample: dict[str, Any]) -> str:
    """The release that the start ran, or the engine's most likely one."""
    if version := sample.get("vllm_version") or sample.get("vllm_version_read"):
        return str(version)
    if "gpu_blocks" in sample or "non_torch_gib" in sample:
        return "0.6.6"
    first = next((v for mark, v in FIRST_RELEASE if mark in sample["model"].lower()), "0.9.0")
    return max("0.9.0", first, key=parse_version)


def model_of(sample: dict[str, Any]) -> ModelSpec:
    """The model of a start: as it is named where its facts are known, else with the shapes of
    ``config_of``."""
    name, base = sample["model"].split(" (")[0], sample.get("config_of")
    spec = None
    for known in (name, base):
        if known in CONFIGS:
            spec = spec_from_config(CONFIGS[known], name, known)
            break
    if spec is None:
        spec = find_model(base if base and name not in catalogue() else name)
    words = str(sample.get("quantization", "none")).split(" ")[0]
    marks = [MARKS[words]] if words in MARKS else []
    if base and not spec.quantization:  # the checkpoint's own name says more than the sample's word
        marks.insert(0, name)
    if words not in ("none", "") and not spec.quantization:
        config = next((c for mark in marks for p, c in NAME_MARKS if re.search(p, mark, re.IGNORECASE)), None)
        spec = stored_as(spec, config) if config else spec
    return spec


def gpu_of(sample: dict[str, Any]) -> Gpu | None:
    """The GPU of a start: its name where the table has it, with the memory that was printed; a card that is
    told by its size alone is the part of that size. None where neither is told."""
    total = sample.get("gpu_total_gib") or sample.get("gpu_usable_gib")
    name = str(sample.get("gpu_name", "")).split(" (")[0]
    gpu = None
    if card := re.fullmatch(r"(\d+) ?GB card", name):
        total = total or float(card[1]) * USABLE_SHARE
        parts = [named_gpu(n) for n in gpu_names()]
        gpu = min(parts, key=lambda g: abs(g.total_bytes / GIB - total))
        gpu = gpu if abs(gpu.total_bytes / GIB - total) < 0.3 else None
    elif name:
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
    free_bytes = int(free * GIB) if free else int(size - max(held * GIB, idle_bytes(size)))
    if gpu is None:
        return Gpu(name=name or "unnamed", total_bytes=size, free_bytes=free_bytes, capability=capability)
    return replace(gpu, total_bytes=size, free_bytes=free_bytes)


def _limits(flags: str) -> dict[str, int]:
    """Items a prompt may have, as ``--limit-mm-per-prompt`` says: ``image=2,video=0`` or as JSON."""
    said = re.search(r"--limit-mm-per-prompt[ =](\{.*?\}|\S+)", flags)
    return {kind: int(n) for kind, n in re.findall(r"(\w+)\W*[=:]\W*(\d+)", said[1])} if said else {}


def request_of(sample: dict[str, Any]) -> EngineRequest:
    """vLLM's arguments of a start."""
    asked, flags = sample.get("max_model_len"), str(sample.get("other_flags", ""))
    return EngineRequest(
        context=asked if isinstance(asked, int) and asked > 0 else None,
        tensor_parallel=sample.get("tensor_parallel_size", 1),
        pipeline_parallel=sample.get("pipeline_parallel_size", 1),
        gpu_memory_utilization=sample.get("gpu_memory_utilization"),
        max_num_seqs=sample.get("max_num_seqs"), max_num_batched_tokens=sample.get("max_num_batched_tokens"),
        enforce_eager=bool(sample.get("enforce_eager")), vllm_version=release_of(sample),
        block_size=sample.get("block_size"),
        kv_cache_dtype=sample.get("kv_cache_dtype", "auto"),
        chunked_prefill=True if "--enable-chunked-prefill" in flags else None,
        dtype={"half": "float16"}.get(sample.get("dtype"),
        sample.get("dtype") if sample.get("dtype") in DTYPE_BYTES else None),
        language_model_only="--language-model-only" in flags,
        limit_mm_per_prompt=_limits(flags),
        mm_encoder_tp_mode="data" if "--mm-encoder-tp-mode data" in flags else "weights",
        enable_expert_parallel="--enable-expert-parallel" in flags,
    )  # fmt: skip


def predict(sample: dict[str, Any]) -> tuple[ModelSpec, Gpu | None, MemoryPlan]:
    spec, gpu, request = model_of(sample), gpu_of(sample), request_of(sample)
    if request.context and request.context > spec.max_context:
        spec = replace(spec, max_context=request.context)  # extended by rope scaling on the command line
    anywhere = gpu or replace(named_gpu("H100"), total_bytes=2**42, free_bytes=2**42)
    gpus = [anywhere] * (request.ranks * request.pipeline_parallel)
    planned = plan(spec, gpus, None, request)
    # vLLM takes the longest context that fits
    if sample.get("max_model_len") in (-1, "auto") and planned.max_context:
        planned = plan(spec, gpus, None, replace(request, context=planned.max_context))
    return spec, gpu, planned


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


def printed_cache(sample: dict[str, Any], planned: MemoryPlan) -> float | None:
    """GiB of KV cache that the start printed, or its printed tokens hold."""
    if "kv_cache_gib" in sample:
        return float(sample["kv_cache_gib"])
    tokens = sample.get("kv_tokens")
    return tokens * planned.kv_bytes_per_token / GIB if tokens else None


def longest_error(sample: dict[str, Any], spec: ModelSpec, planned: MemoryPlan) -> float | None:
    """Relative error of the longest context; None where vLLM printed no estimate, or none below the model's
    own."""
    printed = sample.get("est_max_model_len")
    if not printed or printed >= spec.max_context:
        return None
    return planned.max_context / printed - 1


def token_error(sample: dict[str, Any], planned: MemoryPlan) -> float | None:
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
    slack = 0.0051 * GIB + (
        planned.layout.bytes_per_block * len(planned.layout.groups) if planned.layout else 0
    )
    predicted = planned.kv_bytes_per_token * tokens
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


def release_group(rules: Rules) -> str:
    """The row of a release in the error table: releases that account alike."""
    if rules.engine == "v0":
        return "V0"
    bounds = ((0, 17, 0), (0, 20, 0), (0, 25, 0), (0, 29, 0))
    names = ("V1 to 0.16", "0.17 to 0.19", "0.20 to 0.24", "0.25 to 0.28", "from 0.29")
    return names[sum(rules.version >= bound for bound in bounds)]


def device_group(gpu: Gpu) -> str:
    """The row of a device in the error table."""
    if has_unified_memory(gpu):
        return "unified memory"
    return "ROCm" if gpu.platform == "rocm" else gpu.kind or "not named"


def within(row: dict[str, Any]) -> bool:
    """Whether the printed KV cache, if there is one, lies within the plan's stated error."""
    return "kv" not in row or abs(row["kv"][2]) <= row["stated"] + 0.005


def judge(sample: dict[str, Any]) -> dict[str, Any]:
    """One row of the table; ``skipped`` says why a sample could not be planned."""
    row: dict[str, Any] = {
        "id": sample.get("id", "?"),
        "model": sample.get("model", "?"),
        "status": sample.get("status", "?"),
    }
    try:
        spec, gpu, planned = predict(sample)
    except QuantError as error:
        return {**row, "skipped": str(error)}
    row["quantized"] = spec.quantization is not None
    simple, simple_fits = naive(sample, spec, gpu)
    if "weights_gib" in sample:
        measured = sample["weights_gib"]
        predicted = [w / GIB for w in planned.weights_by_stage]
        closest = min((w for w in predicted), key=lambda w: abs(w - measured))
        row["weights"] = (measured, closest, closest / measured - 1)
        bits, world = source_bits(spec), len(predicted) * planned.tensor_parallel
        row["weights_params"] = spec.parameters * bits / 8 / GIB / world / measured - 1
        # the rule halves the 16-bit file's "32" bits once for each step
        rule = {16: "fp16", 8: "int8"}.get(int(bits), "int4")
        row["weights_rule"] = 2 * spec.parameters * bits / 32 * OVERHEADS[rule] / GIB / world / measured - 1
    row["tokens"] = token_error(sample, planned)
    used = non_kv(sample)
    if used is not None:
        value = (planned.activation_bytes + planned.other_bytes) / GIB
        row["non_kv"] = (used, value, value - used)
        row["non_kv_naive"] = 2.0 - used
    if gpu is not None:
        rules = model_rules(spec, gpu, release_of(sample))
        row["kind"] = kind_of(spec, rules, gpu, request_of(sample))
        row["release"], row["device"] = release_group(rules), device_group(gpu)
        row["stated"], row["unsure"] = (
            planned.error_bytes / GIB,
            spec.uncertainty * planned.weights_bytes / GIB,
        )
        if (cache := printed_cache(sample, planned)) is not None:
            row["kv"] = (cache, planned.room_bytes / GIB, planned.room_bytes / GIB - cache)
        row["longest"] = longest_error(sample, spec, planned)
    if gpu is not None and sample.get("status") not in NOT_MEMORY:
        row["ok"] = sample["status"] == "ok"
        row["verdict"], row["why"] = planned.verdict, planned.tight or planned.why
        row["right"] = (planned.fits is row["ok"]) if not planned.tight else within(row)
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
        right = sum(r["right"] if key == "verdict" else r[key] is ok for r in judged)
        return {"right": right, "of": len(judged)}

    cache = [abs(r["kv"][2]) for r in planned if "kv" in r]
    longest = [abs(r["longest"]) for r in planned if r.get("longest") is not None]
    judged = [r for r in planned if "ok" in r]

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
        "kv_cache_gib": {
            "starts": len(cache), "median": statistics.median(cache) if cache else None,
            "p90": percentile(cache, 0.9) if cache else None,
        },
        "longest_context": {
            "starts": len(longest), "median": statistics.median(longest) if longest else None,
        },
        "tight": {"starts": sum(r["verdict"] == "tight" for r in judged), "of": len(judged)},
        "verdicts_started": verdicts(True, "verdict"), "verdicts_failed": verdicts(False, "verdict"),
        "verdicts_started_naive": verdicts(True, "verdict_naive"),
        "verdicts_failed_naive": verdicts(False, "verdict_naive"),
    }  # fmt: skip


def show(rows: list[dict[str, Any]], figures: dict[str, Any], verbose: bool) -> None:
    print(
        f"{'start':50} {'weights GiB':>22} {'error':>7} {'KV/token':>8} {'non-KV GiB':>13} {'error':>6} "
        f"{'KV cache GiB':>15} {'error':>6}  verdict (naive)"
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
            ours, simple = r["right"], r["verdict_naive"] is r["ok"]
            words = "tight" if r["verdict"] == "tight" else ""
            verdict = (
                f"{r['status']}: {words} {'right' if ours else 'WRONG'} ({'right' if simple else 'wrong'})"
            )
        cache = f"{r['kv'][0]:6.2f} → {r['kv'][1]:6.2f} {r['kv'][2]:+6.2f}" if "kv" in r else " " * 22
        print(f"{r['id']:50} {weights} {token:>8} {other} {cache}  {verdict}")
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
    k = f["kv_cache_gib"]
    if k["starts"]:
        print(f"KV cache ({k['starts']} starts): median error {k['median']:.2f} GiB, P90 {k['p90']:.2f}")
    k = f["longest_context"]
    if k["starts"]:
        print(f"longest context ({k['starts']} starts): median error {k['median']:.1%}")
    print(f"tight: {f['tight']['starts']} of {f['tight']['of']}")
    for name in ("started", "failed"):
        ours, simple = f[f"verdicts_{name}"], f[f"verdicts_{name}_naive"]
        if ours["of"]:
            print(
                f"verdicts on starts that {name}: {ours['right']} of {ours['of']} right   (naive: "
                f"{simple['right']})"
            )


def markdown(rows: list[dict[str, Any]]) -> str:
    """Markdown: every start's error under the three rules."""
    lines = [
        "| start | weights GiB | ours | params × bytes | rule of thumb | non-KV GiB | ours | 2 GiB | "
        "KV cache GiB | ours | started | ours | naive |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
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
        cells += [f"{r['kv'][0]:.2f}", f"{r['kv'][2]:+.2f}"] if "kv" in r else ["", ""]
        cells += (
            [
                "yes" if r["ok"] else "no",
                "tight" if r["verdict"] == "tight" else "✓" if r["right"] else "✗",
                "✓" if r["verdict_naive"] is r["ok"] else "✗",
            ]
            if "ok" in r
            else [""] * 3
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def into_docs(tables: dict[str, str]) -> None:
    """Puts tables between their marks (``<!-- name -->`` … ``<!-- /name -->``) of docs/planning.md."""
    text = DOCS.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, _, rest = text.partition(begin)
        text = head + begin + table + "\n" + end + rest.partition(end)[2]
    DOCS.write_text(text, encoding="utf-8")


def groups(rows: list[dict[str, Any]], by: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The judged rows by their value of ``by``, in order of its first appearance."""
    gathered: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if by in row:
            gathered.setdefault(row[by], []).append(row)
    return sorted(gathered.items())


def error_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: errors by kind of model, release and device."""
    lines = [
        "| by | starts | KV cache, median | P90 | longest context, median | started: right | failed: right | "
        "tight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for by in ("kind", "release", "device"):
        for name, members in [*groups(rows, by)]:
            figures = summary(members)
            cache, longest = figures["kv_cache_gib"], figures["longest_context"]
            cells = [
                f"{by}: {name}",
                str(len(members)),
                f"{cache['median']:.2f} GiB ({cache['starts']})" if cache["starts"] else "",
                f"{cache['p90']:.2f}" if cache["starts"] else "",
                f"{longest['median']:.1%} ({longest['starts']})" if longest["starts"] else "",
                *(
                    f"{figures[k]['right']} of {figures[k]['of']}" if figures[k]["of"] else ""
                    for k in ("verdicts_started", "verdicts_failed")
                ),
                str(figures["tight"]["starts"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stated_errors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What plans of every kind are said to be off by: the error that four in five measured starts of the kind
    do not exceed, beyond what the weights' source leaves open. Of fewer than three starts their largest
    counts, and all kinds' share at least."""

    def error(members: list[dict[str, Any]], least: float) -> dict[str, Any]:
        beyond = [max(0.0, abs(r["kv"][2]) - r["unsure"]) for r in members]
        few = len(beyond) < 3
        size = max([*beyond, least]) if few else percentile(beyond, 0.9)
        return {"error_gib": max(0.35, -(-round(size * 100) // 5) * 5 / 100), "starts": len(beyond)}

    measured = [r for r in rows if "kv" in r]
    everything = error(measured, 0.0)
    kinds = {kind: error(members, everything["error_gib"]) for kind, members in groups(measured, "kind")}
    return {
        "source": "benchmarks/planner_accuracy.py --write",
        "kinds": {"all": everything, "cpu": {"error_gib": 0.0, "starts": 0}, **kinds},
    }


def read_samples(files: list[Path], configs: list[Path]) -> list[dict[str, Any]]:
    """The starts of all files; the models of ``configs`` become known."""
    for path in configs:
        facts = json.loads(path.read_text(encoding="utf-8"))
        CONFIGS.update({name: entry["config"] for name, entry in facts.items()})
    return [s for path in files for s in yaml.safe_load(path.read_text(encoding="utf-8"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=Path, nargs="+", help="files of measured starts")
    parser.add_argument("--configs", type=Path, nargs="*", help="config.json facts of their models")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--errors", action="store_true", help="the table of errors by kind")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write the stated errors to {ERRORS.relative_to(ROOT)}, the tables to {DOCS.relative_to(ROOT)}",
    )
    parser.add_argument("--verbose", action="store_true", help="the reason of every verdict")
    options = parser.parse_args()
    beside = ROOT.parent / "shared" / "data"
    files = options.samples or sorted(beside.glob("vllm_memory_samples*.yaml"))
    missing = [str(f) for f in files if not f.is_file()] or ([] if files else [str(beside)])
    if missing:
        sys.exit(f"{', '.join(missing)} is not there: give the measured starts with --samples")
    configs = options.configs
    if configs is None:
        configs = sorted({f for path in files for f in path.parent.glob("model_configs_*.json")})
    samples = read_samples(files, configs)
    rows = [judge(s) for s in samples]
    if options.write:
        ERRORS.write_text(json.dumps(stated_errors(rows), indent=1) + "\n", encoding="utf-8")
        load_json.cache_clear()
        rows = [judge(s) for s in samples]
        into_docs({"errors": error_table(rows), "starts": markdown(rows)})
    figures = summary(rows)
    if options.json:
        print(json.dumps({"summary": figures, "rows": rows}))
    elif options.errors:
        print(error_table(rows))
    else:
        show(rows, figures, options.verbose)


if __name__ == "__main__":
    main()
