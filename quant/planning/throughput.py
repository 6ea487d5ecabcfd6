"""Predicted speed: what the roofline leaves out, fitted on published figures of vLLM.

A step of decoding reads the weights and the cache, computes, waits for kernels to start in every layer, for
the ranks' sums and for the host. What each of these takes beyond the roofline's ideal is a constant of
``configs/throughput.json``, which ``benchmarks/throughput_accuracy.py --write`` fits on one half of the
figures in ``benchmarks/data/throughput.yaml`` and judges on the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import hypot
from typing import Any

from quant.data import load_json
from quant.hardware import Gpu
from quant.models.spec import ModelSpec
from quant.planning.engine import model_rules
from quant.planning.memory import MemoryPlan
from quant.planning.request import EngineRequest
from quant.planning.speed import (
    PROMPT_TOKENS,
    Speed,
    bytes_of,
    computed_in,
    read_weights,
    speed_bounds,
    stored_schemes,
)
from quant.vllm.kernels import formats_of


@dataclass(frozen=True)
class Costs:
    """The fitted constants. Shares are of the GPU's own figures, times are seconds.

    Attributes:
        memory: share of the bandwidth that reads reach.
        compute: share of the rate that multiplications reach, by how they are computed: ``16`` bits, natively
            in ``8`` bits or fewer, or from ``packed`` weights.
        unpack: seconds that a packed weight takes to be unpacked, however fast it is read.
        attention: share of the 16-bit rate that attention over the prompt reaches, by engine.
        experts: share of all of these that grouped kernels of routed experts reach.
        layer: of a decoder block's kernels in a captured graph, however little they read.
        host: of a step outside the graph, by engine.
        sequence: of the engine for every sequence of a step, by engine.
        reduce: of one all-reduce, by link.
        link: bytes a second that all-reduces move, by link.
    """

    memory: float
    compute: Mapping[str, float]
    unpack: float
    attention: Mapping[str, float]
    experts: float
    layer: float
    host: Mapping[str, float]
    sequence: Mapping[str, float]
    reduce: Mapping[str, float]
    link: Mapping[str, float]


@dataclass(frozen=True)
class Work:
    """What a model takes of one of its ranks: bytes, and seconds at the GPU's full rates.

    Attributes:
        weights: bytes of weights that every step reads; ``experts``: of all routed experts.
        packed: weights of all those bytes that are unpacked on the way; ``packed_experts``: of the experts.
        visited: share of the routed experts that a token visits.
        compute: seconds a token by the classes of :attr:`Costs.compute`; ``expert_compute``: of its experts.
        attention: seconds a token of the prompt for each token before it.
        cache: bytes of cache a token.
    """

    layers: int
    hidden: int
    ranks: int
    link: str
    engine: str
    bandwidth: float
    weights: float
    experts: float
    packed: float
    packed_experts: float
    visited: float
    compute: Mapping[str, float]
    expert_compute: Mapping[str, float]
    attention: float
    cache: float


def work_of(spec: ModelSpec, gpu: Gpu, plan: MemoryPlan, engine: str) -> Work | None:
    """What the model costs as planned; None where the GPU's bandwidth or rates are not known."""
    rate = gpu.rates.get("fp16")
    if not gpu.bandwidth or not rate:
        return None
    stored, formats, ranks = stored_schemes(spec, plan.scheme), formats_of(gpu), plan.tensor_parallel
    # of the weights that every token reads, of the routed experts
    sizes, packed = [0.0, 0.0], [0.0, 0.0]
    seconds: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for weight in read_weights(spec):
        routed = spec.moe is not None and weight.role == "experts"
        own = stored(weight)
        kind, speed = computed_in(own, gpu, formats)
        share = spec.moe.active / spec.moe.experts if spec.moe and routed else 1.0
        sizes[routed] += bytes_of(spec, weight, own, plan.scheme) / ranks
        packed[routed] += weight.parameters / ranks if kind == "packed" else 0.0
        seconds[routed][kind] = seconds[routed].get(kind, 0.0) + 2 * weight.parameters * share / speed / ranks
    full = sum(c.kind in ("full", "mla") for c in spec.cache)
    width = 2 * spec.head_dim
    if spec.latent:
        width = sum(spec.latent.get(k, 0) for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return Work(
        layers=spec.layers, hidden=spec.hidden, ranks=ranks, link=gpu.link, engine=engine,
        bandwidth=gpu.bandwidth, weights=sizes[False], experts=sizes[True],
        packed=packed[False], packed_experts=packed[True],
        visited=spec.moe.active / spec.moe.experts if spec.moe else 0.0,
        compute=seconds[False], expert_compute=seconds[True],
        attention=2 * full * spec.heads * width / rate / ranks, cache=plan.kv_bytes_per_token,
    )  # fmt: skip


def _computed(work: Work, costs: Costs) -> float:
    """Seconds of a token's multiplications, attention apart."""
    plain = sum(t / costs.compute[k] for k, t in work.compute.items())
    return plain + sum(t / costs.compute[k] for k, t in work.expert_compute.items()) / costs.experts


def _reduced(work: Work, costs: Costs, tokens: float, calls: float = 1.0) -> float:
    """Seconds of a pass's all-reduces, two a layer, of so many tokens in 16 bits."""
    if work.ranks == 1:
        return 0.0
    moved = 2 * (work.ranks - 1) / work.ranks * tokens * work.hidden * 2
    return 2 * work.layers * (calls * costs.reduce[work.link] + moved / costs.link[work.link])


def step_seconds(work: Work, costs: Costs, sequences: float, cached: float) -> float:
    """Seconds of a step in which so many sequences, with so many tokens cached each, decode one token."""
    touched = 1 - (1 - work.visited) ** sequences if work.visited else 0.0
    read = work.weights + work.experts * touched / costs.experts + sequences * cached * work.cache
    unpacked = work.packed + work.packed_experts * touched / costs.experts
    busy = hypot(
        read / (work.bandwidth * costs.memory),
        unpacked * costs.unpack,
        sequences * _computed(work, costs),
    )
    host = costs.host[work.engine] + sequences * costs.sequence[work.engine]
    return busy + work.layers * costs.layer + host + _reduced(work, costs, sequences)


def prefill_seconds(work: Work, costs: Costs, tokens: float) -> float:
    """Seconds that reading a prompt of so many tokens adds to the steps that it shares with others."""
    attention = work.attention * tokens * tokens / 2 / costs.attention[work.engine]
    return tokens * _computed(work, costs) + attention + _reduced(work, costs, tokens, 0.0)


def served_rate(work: Work, costs: Costs, sequences: float, prompt: float, answer: float) -> float:
    """Tokens a second that so many sequences generate together, each with a prompt and an answer of so many
    tokens, and a new one for each that ends."""
    decoding = answer * step_seconds(work, costs, sequences, prompt + answer / 2)
    return sequences * answer / (decoding + sequences * prefill_seconds(work, costs, prompt))


@cache
def fitted_costs() -> Costs:
    """The constants of ``configs/throughput.json``."""
    return Costs(**load_json("throughput.json")["costs"])


def kinds_of(spec: ModelSpec, gpu: Gpu) -> tuple[str, str]:
    """The kind of model, as far as speed differs by it, and the device: its compute capability or
    architecture."""
    model = "dense"
    if gpu.platform == "rocm":
        model = "rocm"
    elif any(c.kind == "state" for c in spec.cache):
        model = "recurrent"
    elif spec.latent:
        model = "latent"
    elif spec.moe:
        model = "mixture"
    device = gpu.architecture or gpu.platform
    if gpu.platform == "cuda":
        device = ".".join(map(str, gpu.capability)) if gpu.capability else "unknown"
    return model, device


def kind_of(model: str, engine: str, streams: int) -> str:
    """The row of errors that a figure counts in: engines differ in what the model does not know of them.

    >>> kind_of("dense", "v1", 16)
    'dense on V1, several streams'
    """
    return f"{model} on {engine.upper()}, {'one stream' if streams == 1 else 'several streams'}"


@dataclass(frozen=True)
class Forecast:
    """Predicted speed: tokens a second of one stream, of all streams decoding together, and of all with
    prompts of :data:`quant.planning.speed.PROMPT_TOKENS` tokens for each generated one; seconds until the
    first token of such a prompt. The lengths are those of the bounds: half the context is cached in the mean.

    Attributes:
        sequences: how many streams ``batch`` and ``served`` are of.
        decode_error: share by which nine in ten held-out figures of one stream of the kind are off at most;
            ``batch_error``: of several.
    """

    decode: float
    batch: float
    served: float
    first_token_seconds: float
    sequences: int
    decode_error: float
    batch_error: float


#: Errors beyond which no figure is given.
FORETOLD = 1.0


def _error(table: dict[str, Any], row: dict[str, Any], device: str) -> float:
    """The error of a kind; the widest of those that enough figures tell, where few do, of the kind or of the
    device."""
    least, seen = table["least"], table["devices"][device]
    told = [r for r in table["kinds"].values() if r["fitted"] and r["held"] >= least]
    if row.get("held", 0) >= least and seen["fitted"] + seen["held"] >= least:
        return float(row["p90"])
    return max(float(r["p90"]) for r in told)


def forecast(
    spec: ModelSpec, gpu: Gpu, plan: MemoryPlan, request: EngineRequest
) -> tuple[Forecast | None, str]:
    """What the plan's speed will be about; or None and why no figure is given: nothing like it was fitted."""
    if request.enforce_eager:
        return None, "no published figures without CUDA graphs were fitted"
    if plan.pipeline_parallel > 1:
        return None, "no published figures of pipeline parallelism were fitted"
    table, (model, device) = load_json("throughput.json"), kinds_of(spec, gpu)
    seen = table["devices"].get(device, {})
    if not seen.get("fitted"):
        return None, f"no published figures of such a device ({gpu.name}, {device}) were fitted"
    if seen.get("p90", 0.0) > FORETOLD:
        return (
            None,
            f"published figures of such a device ({device}) are off by {seen['p90']:.0%}: none is foretold",
        )
    engine = model_rules(spec, gpu, request.vllm_version).engine
    rows = [table["kinds"].get(kind_of(model, engine, streams), {}) for streams in (1, 2)]
    if not any(row.get("fitted") for row in rows):
        return None, f"no published figures of such a model ({model}) were fitted"
    errors = [_error(table, row, device) for row in rows]
    if max(errors) > FORETOLD:
        return None, f"published figures of the kind ({model}) are off by {max(errors):.0%}: none is foretold"
    work = work_of(spec, gpu, plan, engine)
    if work is None:
        return None, f"the rates of {gpu.name} are not known"
    costs, answer = fitted_costs(), plan.context / 2 / (PROMPT_TOKENS + 0.5)
    prompt, cached = PROMPT_TOKENS * answer, plan.context / 2
    sequences = max(1, min(request.concurrency, plan.max_num_seqs))
    one = step_seconds(work, costs, 1, cached)
    return Forecast(
        decode=1 / one, batch=sequences / step_seconds(work, costs, sequences, cached),
        served=served_rate(work, costs, sequences, prompt, answer),
        first_token_seconds=prefill_seconds(work, costs, prompt) + one, sequences=sequences,
        decode_error=errors[0], batch_error=errors[1],
    ), ""  # fmt: skip


def speed_of(spec: ModelSpec, gpu: Gpu, plan: MemoryPlan, request: EngineRequest) -> Speed:
    """The bounds of a plan's speed and what it will be about."""
    about, unknown = forecast(spec, gpu, plan, request)
    return replace(speed_bounds(spec, gpu, plan, request.concurrency), about=about, unknown=unknown)
