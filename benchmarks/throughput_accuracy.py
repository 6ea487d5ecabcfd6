#!/usr/bin/env python3
"""Predicted speed beside published figures of vLLM, in two halves: on one the constants are fitted, on the
other they are judged.

    python benchmarks/throughput_accuracy.py [--json] [--verbose]
    python benchmarks/throughput_accuracy.py --write   # fits: configs/throughput.json and docs/throughput.md

The figures are in ``benchmarks/data/throughput.yaml``. Which half one is in was settled before the first fit:
by a hash of its source, model and GPU, so that a sweep stays together. A figure beyond the bound of its own
setting (every share 1, nothing else takes time) cannot have been measured so; it is listed and not counted.

A job that ends with its last request runs dry: answers are taken as exponentially distributed up to the
longest, or all alike. How many run at once is the least of what was asked, ``max_num_seqs``, and what the
planned KV cache holds of the mean length.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quant.catalog import find_model  # noqa: E402
from quant.hardware import named_gpu  # noqa: E402
from quant.planning.engine import model_rules  # noqa: E402
from quant.planning.memory import plan  # noqa: E402
from quant.planning.request import EngineRequest  # noqa: E402
from quant.planning.throughput import (  # noqa: E402
    FORETOLD,
    Costs,
    Work,
    fitted_costs,
    kind_of,
    kinds_of,
    prefill_seconds,
    served_rate,
    step_seconds,
    work_of,
)

DATA = ROOT / "benchmarks" / "data" / "throughput.yaml"
TABLE, DOCS = ROOT / "configs" / "throughput.json", ROOT / "docs" / "throughput.md"
#: keys of a figure that are vLLM's arguments
ARGUMENTS = ("gpu_memory_utilization", "max_num_seqs", "kv_cache_dtype", "language_model_only")
#: figures that a kind must have in the held-out half for its error to be taken alone
LEAST = 8
#: slices in which a job that runs dry is summed
SLICES = 12

#: Where the fit begins: (path in :class:`Costs`, value); shares are at most 1.
START: tuple[tuple[tuple[str, ...], float], ...] = (
    (("memory",), 0.8),
    (("compute", "16"), 0.6), (("compute", "8"), 0.5), (("compute", "packed"), 0.4),
    (("attention", "v0"), 0.5), (("attention", "v1"), 0.3), (("experts",), 0.7),
    (("layer",), 3e-5), (("host", "v0"), 2e-3), (("sequence", "v0"), 4e-5), (("sequence", "v1"), 1.5e-5),
    (("reduce", "nvlink"), 1e-5), (("reduce", "pcie"), 3e-5),
    (("link", "nvlink"), 2e11), (("link", "pcie"), 1.2e10), (("unpack",), 2e-13),
)  # fmt: skip
SHARES = ("memory", "compute", "attention", "experts")
#: what is not fitted: V1's host works while the GPU does, which the figures confirm
FIXED = {("host", "v1"): 0.0}
#: the bound: everything at its full rate, and nothing else
IDEAL = Costs(
    memory=1.0, compute={"16": 1.0, "8": 1.0, "packed": 1.0}, unpack=0.0,
    attention={"v0": 1.0, "v1": 1.0}, experts=1.0, layer=0.0, host={"v0": 0.0, "v1": 0.0},
    sequence={"v0": 0.0, "v1": 0.0}, reduce={"nvlink": 0.0, "pcie": 0.0},
    link={"nvlink": math.inf, "pcie": math.inf},
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A published figure and what is needed to predict it. ``kinds``: rows of the tables of errors."""

    source: str
    model: str
    gpu: str
    version: str
    setting: dict[str, Any]
    work: Work
    slots: float
    kinds: tuple[str, str]

    @property
    def held_out(self) -> bool:
        name = f"{self.source}|{self.model}|{self.gpu}"
        return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2 == 1

    @property
    def measured(self) -> float:
        """Tokens a second of all streams together, or of one."""
        if "tpot_ms" in self.setting:
            return 1000 / float(self.setting["tpot_ms"])
        return float(self.setting["output_tok_s"])

    def predicted(self, costs: Costs) -> float:
        """The same by the model."""
        s, work, slots = self.setting, self.work, self.slots
        prompt, answer, requests = s["input"], s["output"], s.get("requests")
        read, cached = prefill_seconds(work, costs, prompt), prompt + answer / 2
        if "tpot_ms" in s:
            return 1 / (step_seconds(work, costs, slots, cached) + (slots - 1) * read / answer)
        if requests is None:
            return served_rate(work, costs, slots, prompt, answer)
        slots = min(slots, requests)
        full = answer * step_seconds(work, costs, slots, cached)
        total = requests * read + (requests - slots) / slots * full
        if "longest" not in s or slots == 1:
            return requests * answer / (total + full)
        mean = _mean_before_cut(answer, s["longest"])
        width = min(s["longest"], mean * math.log(slots)) / SLICES
        for n in range(SLICES):
            at = (n + 0.5) * width
            left = max(1.0, slots * math.exp(-at / mean))
            total += width * step_seconds(work, costs, left, prompt + min(at, answer))
        return float(requests * answer / total)

    def error(self, costs: Costs) -> float:
        return self.predicted(costs) / self.measured - 1

    @property
    def beyond_bound(self) -> bool:
        return self.measured > self.predicted(IDEAL)


def _mean_before_cut(mean: float, longest: float) -> float:
    """The mean of exponentially distributed lengths that, cut at the longest, have this mean."""
    low, high = mean / 2, longest * 50
    for _ in range(60):
        middle = (low + high) / 2
        if middle * (1 - math.exp(-longest / middle)) < mean:
            low = middle
        else:
            high = middle
    return low


def read_figures(path: Path = DATA) -> list[Figure]:
    """All figures of a file.

    Raises:
        QuantError: a model or GPU that is not known, or a setting that vLLM would refuse.
    """
    figures = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        for run in entry["runs"]:
            for setting in run["figures"]:
                where = (run["model"], run["gpu"], run["vllm"], setting.get("gpus", 1))
                context = setting.get("max_model_len") or max(
                    4096, setting["input"] + setting.get("longest", setting["output"])
                )
                given = tuple((k, setting[k]) for k in ARGUMENTS if k in setting)
                work, tokens, most, kinds = _planned(*where, context, given)
                slots = min(setting["concurrency"], most)
                if tokens:
                    slots = max(1.0, min(slots, tokens / (setting["input"] + setting["output"] / 2)))
                figures.append(Figure(entry["source"], *where[:3], setting, work, slots, kinds))
    return figures


@cache
def _planned(
    model: str, name: str, version: str, ranks: int, context: int, given: tuple[tuple[str, Any], ...]
) -> tuple[Work, int, int, tuple[str, str]]:
    """Of a start: what it costs, the tokens that its cache holds, its ``max_num_seqs``, its kinds."""
    spec, gpu = find_model(model), named_gpu(name)
    request = EngineRequest(
        context=min(context, spec.max_context), tensor_parallel=ranks, vllm_version=version, **dict(given)
    )
    planned = plan(spec, [gpu] * ranks, None, request)
    work = work_of(spec, gpu, planned, model_rules(spec, gpu, version).engine)
    assert work is not None, name
    return work, planned.kv_tokens, planned.max_num_seqs, kinds_of(spec, gpu)


# -- fitting -------------------------------------------------------------------------------------------------


def costs_of(values: Sequence[float]) -> Costs:
    table: dict[str, Any] = {}
    for path, value in (*zip((p for p, _ in START), values, strict=True), *FIXED.items()):
        if len(path) == 1:
            table[path[0]] = value
        else:
            table.setdefault(path[0], {})[path[1]] = value
    return Costs(**table)


def loss(values: Sequence[float], figures: Iterable[Figure]) -> float:
    """Sum over figures of what a logarithm of the error costs: its square while it is small, then itself, so
    that figures from a setting other than they tell do not decide."""
    costs, total = costs_of(values), 0.0
    for figure in figures:
        off = math.log(figure.predicted(costs) / figure.measured) / 0.15
        total += math.sqrt(1 + off * off) - 1
    return total


def fit(figures: Sequence[Figure]) -> list[float]:
    """The constants of the least loss that a search along one after another finds, in ever smaller steps."""
    values = [value for _, value in START]
    best = loss(values, figures)
    for step in (0.3, 0.1, 0.04, 0.015):
        before = math.inf
        while before - best > 0.01:
            before = best
            for n, (path, _) in enumerate(START):
                for factor in (math.exp(step), math.exp(-step)):
                    while True:
                        tried = [*values]
                        tried[n] *= factor
                        if path[0] in SHARES and tried[n] > 1:
                            break
                        if (now := loss(tried, figures)) >= best - 1e-6:
                            break
                        values, best = tried, now
    return [float(f"{value:.3g}") for value in values]


# -- judging -------------------------------------------------------------------------------------------------


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def groups(figure: Figure) -> list[str]:
    """The rows of the table that a figure counts in."""
    streams = figure.setting["concurrency"]
    kind = kind_of(figure.kinds[0], figure.work.engine, streams)
    size = "one stream" if streams == 1 else "2 to 16 streams" if streams <= 16 else "more streams"
    stored = {"16": "16 bits", "8": "8 bits or fewer, natively", "packed": "packed weights"}
    classes = {**figure.work.compute, **figure.work.expert_compute}
    most = max(classes, key=lambda k: figure.work.compute.get(k, 0) + figure.work.expert_compute.get(k, 0))
    ranks = "one GPU" if figure.work.ranks == 1 else "tensor parallel"
    return [
        "all", f"engine {figure.work.engine.upper()}", size, f"kind: {kind}",
        f"device: {figure.kinds[1]}", f"linears: {stored[most]}", ranks,
        f"source: {figure.source.split(':')[0].split('#')[0]}",
    ]  # fmt: skip


def summary(figures: Sequence[Figure], costs: Costs) -> dict[str, dict[str, Any]]:
    """For every row: figures, median and P90 of the relative error, of each half."""
    table: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[bool, list[float]]] = {}
    for figure in figures:
        for name in groups(figure):
            rows.setdefault(name, {False: [], True: []})[figure.held_out].append(abs(figure.error(costs)))
    for name in sorted(rows, key=lambda n: (n != "all", not n.startswith("engine"), ":" in n, n)):
        table[name] = {}
        for half, errors in (("fitted", rows[name][False]), ("held", rows[name][True])):
            table[name][half] = len(errors)
            if errors:
                table[name][f"{half}_median"] = round(percentile(errors, 0.5), 3)
                table[name][f"{half}_p90"] = round(percentile(errors, 0.9), 3)
    return table


def constants(costs: Costs, figures: Sequence[Figure]) -> dict[str, Any]:
    """What ``configs/throughput.json`` holds: the constants and the errors by kind and device. Of a device
    that is missed by more than :data:`FORETOLD` nothing is foretold, so its figures count in no kind."""

    def rows(kind: str, table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        found = {}
        for name, row in table.items():
            if name.startswith(f"{kind}: "):
                told = {"p90": row["held_p90"]} if row["held"] else {}
                counts = {"fitted": row["fitted"], "held": row["held"]}
                found[name.removeprefix(f"{kind}: ")] = {**counts, **told}
        return found

    devices = rows("device", summary(figures, costs))
    near = [f for f in figures if devices[f.kinds[1]].get("p90", 0.0) <= FORETOLD]
    return {
        "source": "benchmarks/throughput_accuracy.py --write: fitted on one half of "
        "benchmarks/data/throughput.yaml; p90: error that nine in ten figures of the other do not exceed",
        "least": LEAST, "costs": {f.name: getattr(costs, f.name) for f in fields(Costs)},
        "devices": devices, "kinds": rows("kind", summary(near, costs)),
    }  # fmt: skip


_HEAD = """\
# Predicted speed beside published figures

`quant recommend` says about how fast a plan will be. The model behind it (`quant/planning/throughput.py`) is
the roofline of `quant/planning/speed.py` with what kernels, links and the host really take; its constants are
fitted by `python benchmarks/throughput_accuracy.py --write`, which also writes this page and
`configs/throughput.json`.

{count} figures count (`benchmarks/data/throughput.yaml`, each with its source). A hash of source, model and
GPU, settled before the first fit, puts a figure into the half that is fitted or the half that is held apart.
So a sweep stays in one half, while a source's other models and GPUs may be in the other: the errors are those
of further models and GPUs of the kinds below, measured as people publish them.

## Errors

| figures of | fitted | median | P90 | held apart | median | P90 |
|---|---|---|---|---|---|---|
"""

_CONSTANTS = """
What a plan is said to be about carries the P90 of its kind on its engine, devices that are missed by more
than 100 % left out. Kinds with fewer than {least} held-out figures, and devices with fewer than {least} in
all, carry the widest error of the others. No figure is given where none like it was fitted (other devices and
kinds of model, plans without CUDA graphs, pipeline parallelism), nor where the P90 of the kind or of the
device is above 100 %; for those the bounds alone are told.

## Constants

| of | constant | fitted |
|---|---|---|
"""

_SOURCES = """
`memory`, `compute`, `attention` and `experts` are shares of the GPU's own bandwidth and rates; `layer`,
`host`, `sequence`, `reduce` and `unpack` seconds; `link` bytes a second. What they mean stands at `Costs`. A
step takes the hypotenuse of reading, unpacking and computing, and then the layers, the host and the
all-reduces; prompts are read between steps.

What the model does not know: the host's CPU (small models on V0 differ by a factor of two with it), the
attention backend (prompts of 32,000 tokens were read two to three times slower through 0.11's server than by
0.20's engine), speculation, prefix caches, and whether a GPU is held down by its power limit.

## Sources

| source | figures | held apart |
|---|---|---|
"""


def page(figures: Sequence[Figure], beyond: Sequence[Figure], costs: Costs) -> str:
    """docs/throughput.md."""

    def percent(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.0%}" if key in row else ""

    text = _HEAD.format(count=len(figures))
    for name, r in summary(figures, costs).items():
        told = [
            f"{r[half]} | {percent(r, f'{half}_median')} | {percent(r, f'{half}_p90')}"
            for half in ("fitted", "held")
        ]
        text += f"| {name} | {' | '.join(told)} |\n"
    text += _CONSTANTS.format(least=LEAST)
    for path, value in zip((p for p, _ in START), values_of(costs), strict=True):
        text += f"| {path[0]} | {path[-1] if len(path) > 1 else ''} | {value:g} |\n"
    text += _SOURCES
    sources: dict[str, list[bool]] = {}
    for figure in figures:
        sources.setdefault(figure.source, []).append(figure.held_out)
    for name, halves in sources.items():
        text += f"| {name} | {len(halves)} | {sum(halves)} |\n"
    if beyond:
        text += "\nNot counted, because they are beyond the bound of the setting that they tell:\n\n"
    for f in beyond:
        text += (
            f"- {f.source}: {f.model} on {f.gpu}, {f.setting['input']} / {f.setting['output']} tokens: "
            f"{f.measured:,.0f} tok/s, at most {f.predicted(IDEAL):,.0f}\n"
        )
    return text


def values_of(costs: Costs) -> list[float]:
    """The fitted constants in the order of :data:`START`."""
    found = []
    for path, _ in START:
        value = getattr(costs, path[0])
        found.append(float(value if len(path) == 1 else value[path[1]]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="fit, and write the constants and the page")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="every figure")
    given = parser.parse_args()
    every = read_figures()
    figures = [f for f in every if not f.beyond_bound]
    beyond = [f for f in every if f.beyond_bound]
    if given.write:
        costs = costs_of(fit([f for f in figures if not f.held_out]))
        told = json.dumps(constants(costs, figures), indent=1)
        TABLE.write_text(told + "\n", encoding="utf-8")
        DOCS.write_text(page(figures, beyond, costs), encoding="utf-8")
    else:
        costs = fitted_costs()
    table = summary(figures, costs)
    if given.json:
        print(json.dumps(table, indent=1))
        return
    if given.verbose:
        for f in figures:
            print(
                f"{'held ' if f.held_out else 'fit  '}{f.source[:40]:40} {f.model[-40:]:40} {f.gpu[:14]:14} "
                f"{f.work.ranks} {f.version:7} {f.setting['input']:6}/{f.setting['output']:<5} "
                f"{f.slots:7.1f} {f.measured:9.1f} → {f.predicted(costs):9.1f} {f.error(costs):+.0%}"
            )
    for name, r in table.items():
        halves = (
            f"{r[h]:4} {r.get(f'{h}_median', 0):6.1%} {r.get(f'{h}_p90', 0):6.1%}" for h in ("fitted", "held")
        )
        print(f"{name:50} {'    '.join(halves)}")
    print(f"{len(beyond)} figures are beyond the bound of their setting and not counted")


if __name__ == "__main__":
    main()
