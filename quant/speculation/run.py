"""``quant-deploy speculate``: measures what proposers are worth to a checkpoint, chooses, and proves it in
vLLM."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.calibration.files import bundled
from quant.calibration.text import evaluation_rows
from quant.catalog import load_model, model_from_config
from quant.checkpoint.reader import open_checkpoint
from quant.errors import QuantError, UsageError
from quant.evaluation.agreement import demand_agreement
from quant.hardware import named_gpu
from quant.models.spec import ModelSpec
from quant.offline import load_tokenizer
from quant.planning.memory import plan
from quant.planning.request import EngineRequest
from quant.planning.speed import step_seconds
from quant.progress import Event, Progress, silent
from quant.speculation.dflash import dflash
from quant.speculation.heads import Unmeasured, eagle3, native_head
from quant.speculation.measure import (
    Acceptance,
    Latencies,
    measure,
    measured_latencies,
    table,
)
from quant.speculation.proposers import Draft, Model, NGram, Proposer, check_pair
from quant.speculation.sampling import Sampling
from quant.speculation.suffix import Suffix
from quant.vllm.config import without_quantization
from quant.vllm.context import context_length
from quant.vllm.speculation import (
    PACKAGES,
    PROPOSERS,
    dflash_config,
    draft_method,
    eagle3_config,
    head_bytes,
    native_heads,
)

#: Those that need no draft.
_WITHOUT_DRAFT = ("ngram", "mtp", "suffix")
#: Drafts that were trained for one target → their config in one form.
_TRAINED = {"eagle3": eagle3_config, "dflash": dflash_config}
#: Gain below which speculation is not worth its memory and its risk under load.
WORTH = 1.05


@dataclass(frozen=True)
class SpeculationRequest:
    """What is asked.

    Attributes:
        draft: a smaller checkpoint of the same tokenizer, or one that was trained to draft for the target
            (EAGLE-3 and others), which its config tells.
        method: one of :data:`quant.vllm.speculation.PROPOSERS` to take that one whatever it gains; None: what
            gains most.
        most: the largest number of proposals that is tried.
        ngram: longest and shortest n-gram.
        text: file that prompts are cut from; None: the bundled one.
        gpu: plan latencies and memory for it instead of measuring passes here.
        concurrency: sequences at a time, for the plan.
    """

    draft: Path | None = None
    method: str | None = None
    most: int = 5
    ngram: tuple[int, int] = (5, 2)
    prompts: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 64
    sampling: Sampling = Sampling()
    text: Path | None = None
    gpu: str | None = None
    concurrency: int = 1
    device: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """One way to speculate.

    Attributes:
        config: vLLM's ``--speculative-config``; None: plain decoding.
        rows: tokens of a step and times as fast by number of proposals.
        memory: what the draft takes of the GPU, where one is named.
        note: why it was not measured, where it was not; what vLLM needs for it beside itself.
    """

    name: str
    config: dict[str, Any] | None
    acceptance: Acceptance | None
    rows: tuple[dict[str, float], ...] = ()
    memory: dict[str, Any] | None = None
    note: str = ""

    @property
    def best(self) -> dict[str, float] | None:
        return max(self.rows, key=lambda r: r["speed_up"], default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "speculative_config": self.config,
            "acceptance": None if self.acceptance is None else self.acceptance.to_dict(),
            "rows": list(self.rows),
            "best": self.best,
            "memory": self.memory,
            "note": self.note,
        }


def speculate(path: Path, request: SpeculationRequest, progress: Progress = silent) -> dict[str, Any]:
    """Measures and chooses.

    Returns:
        ``candidates``, ``chosen`` (its name, or None), ``speculative_config``, ``reason``, ``latencies``
        (where they are from), and what was asked.

    Raises:
        UsageError: a draft of another tokenizer, or prompts that are longer than the context.
        CheckpointError: a file of which config.json says otherwise, or a model that cannot be run whole here.
    """
    methods = _methods(path, request)
    models = [path, *([request.draft] if request.draft is not None and "draft_model" in methods else ())]
    demand_agreement(*(open_checkpoint(p) for p in models))
    if len(models) > 1:
        check_pair(*models)
    if request.gpu is not None and not named_gpu(request.gpu).bandwidth:
        raise UsageError(
            f"--gpu is {request.gpu}: its speed is not known: leave it out to measure passes here"
        )
    prompts = _prompts(path, request)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quant-speculate-")))
        from quant.accelerator import device_of

        progress(Event("loading", detail=str(path)))
        target = Model(path, device_of(request.device), scratch)
        candidates = [_candidate(m, target, request, prompts, scratch, progress) for m in methods]
    chosen = max(
        (
            c
            for c in candidates
            if c.best and (request.method or (c.best["speed_up"] >= WORTH and not c.note))
        ),
        key=lambda c: c.best["speed_up"] if c.best else 0.0,
        default=None,
    )
    return {
        "checkpoint": str(path),
        "draft": None if request.draft is None else str(request.draft),
        "sampling": vars(request.sampling),
        "prompts": len(prompts),
        "candidates": [c.to_dict() for c in candidates],
        "chosen": None if chosen is None else chosen.name,
        "speculative_config": None if chosen is None else chosen.config,
        "reason": _reason(chosen, candidates, request),
        "latencies": f"planned for {request.gpu}" if request.gpu else "passes measured here, one sequence",
    }


def _prompts(path: Path, request: SpeculationRequest) -> list[list[int]]:
    longest = context_length(open_checkpoint(path).config)
    needed = request.prompt_tokens + request.new_tokens + request.most + 1
    if longest is not None and needed > longest:
        raise UsageError(
            f"--prompt-tokens {request.prompt_tokens} and --new-tokens {request.new_tokens} with "
            f"{request.most} proposals take {needed} tokens of context, the model has {longest}: lower them"
        )
    file = bundled("wikitext-2-test") if request.text is None else request.text
    rows = evaluation_rows(load_tokenizer(path), file, request.prompt_tokens, request.prompts)
    return [[int(t) for t in row] for row in rows.tolist()]


def _measured(
    name: str,
    target: Model,
    proposer: Proposer,
    request: SpeculationRequest,
    prompts: Sequence[Sequence[int]],
    progress: Progress,
) -> Acceptance:
    def done(count: int) -> None:
        progress(Event(name, count, len(prompts), detail="prompts"))

    done(0)
    target.reset()
    found = measure(
        target, proposer, prompts, request.new_tokens, request.most, request.sampling, request.seed, done
    )
    progress(
        Event(
            name,
            len(prompts),
            len(prompts),
            f"{name}: {found.rate:.1%} of {found.draft_tokens} proposed tokens accepted, "
            f"{found.tokens_per_step:.2f} tokens a step",
        )
    )
    return found


def _methods(path: Path, request: SpeculationRequest) -> list[str]:
    """vLLM's names of what there is to speculate with, or of what is asked for alone.

    Raises:
        UsageError: what is asked for is not there.
    """
    methods = ["ngram", "suffix"]
    if native_heads(open_checkpoint(path)) is not None:
        methods.insert(1, "mtp")
    if request.draft is not None:
        methods.insert(1, draft_method(open_checkpoint(request.draft).config))
    if request.method in (None, *methods):
        return methods if request.method is None else [request.method]
    if request.method == "mtp":
        raise UsageError(f"--proposer is mtp: {path} has no prediction heads of its own")
    if request.draft is None:
        raise UsageError(f"--proposer is {request.method}: name the draft with --draft")
    raise UsageError(f"--proposer is {request.method}: --draft {request.draft} is of kind {methods[1]}")


def _proposer(method: str, target: Model, request: SpeculationRequest, scratch: Path) -> Proposer:
    """
    Raises:
        Unmeasured: a method that is not computed here.
        CheckpointError: a draft that cannot be read, or is another model's.
    """
    if method == "ngram":
        return NGram(*request.ngram)
    if method == "mtp":
        return native_head(target, scratch)
    if method == "suffix":
        return Suffix()
    assert request.draft is not None
    if method == "eagle3":
        return eagle3(target, request.draft)
    if method == "dflash":
        return dflash(target, request.draft)
    if method == "draft_model":
        return Draft(Model(request.draft, target.device, scratch), target.vocabulary)
    raise Unmeasured(f"drafts of kind {method} are not computed here")


def _candidate(
    method: str,
    target: Model,
    request: SpeculationRequest,
    prompts: Sequence[Sequence[int]],
    scratch: Path,
    progress: Progress,
) -> Candidate:
    """One way to speculate, measured where it is computed here."""
    name, config = PROPOSERS.get(method, method), dict[str, Any](method=method)
    if request.draft is not None and method not in _WITHOUT_DRAFT:
        config["model"] = str(request.draft.absolute())
    if method == "ngram":
        config |= {"prompt_lookup_max": request.ngram[0], "prompt_lookup_min": request.ngram[1]}
    try:
        proposer = _proposer(method, target, request, scratch)
    except Unmeasured as reason:
        config["num_speculative_tokens"] = 1 if method == "mtp" else 3
        note = f"acceptance is not measured here: {reason}; vLLM's counters will show"
        return Candidate(name, config, None, note=note)
    found = _measured(name, target, proposer, request, prompts, progress)
    small = _drafting_spec(method, target.path, request.draft)
    latencies = _latencies(small, target, proposer.seconds, request)
    if method == "dflash":
        latencies = replace(latencies, at_once=True)
    rows = table(found, latencies, request.most)
    config["num_speculative_tokens"] = int(max(rows, key=lambda r: r["speed_up"])["k"])
    memory = None
    if request.gpu is not None and small is not None:
        memory = _memory(method, small, target.path, request)
    return Candidate(name, config, found, tuple(rows), memory, _needs(method))


def _needs(method: str) -> str:
    """What is to be said of a proposer that vLLM does not run by itself; empty of the others."""
    package = PACKAGES.get(method)
    return (
        f"vLLM needs the package {package} for it, so it is taken by --proposer {method} alone"
        if package
        else ""
    )


def _drafting_spec(method: str, path: Path, draft: Path | None) -> ModelSpec | None:
    """What one proposal runs through: the draft, or one block and the head; None without a network."""
    if method == "draft_model" and draft is not None:
        return load_model(draft)
    if method in _TRAINED and draft is not None:
        config = _TRAINED[method](open_checkpoint(draft).config)
        return model_from_config(
            config | {"vocab_size": config.get("draft_vocab_size") or config["vocab_size"]}
        )
    if method != "mtp":
        return None
    config = without_quantization(open_checkpoint(path).config)
    dense = {"first_k_dense_replace": 0} if "first_k_dense_replace" in config else {}
    return model_from_config({**config, "num_hidden_layers": 1, "num_nextn_predict_layers": 0, **dense})


def _latencies(
    small: ModelSpec | None,
    target: Model,
    proposals: Mapping[int, Sequence[float]],
    request: SpeculationRequest,
) -> Latencies:
    if request.gpu is None:
        return measured_latencies(target, proposals)
    gpu, n = named_gpu(request.gpu), request.concurrency
    spec, engine = load_model(target.path), EngineRequest()
    planned = plan(spec, [gpu], None, engine)

    def seconds(tokens: int) -> float:
        return step_seconds(spec, gpu, planned, n, tokens)

    proposal = 0.0
    if small is not None:
        proposal = step_seconds(small, gpu, plan(small, [gpu], None, engine), n, 1)
    return Latencies(seconds, proposal, f"planned for {gpu.name}")


def _memory(method: str, spec: ModelSpec, path: Path, request: SpeculationRequest) -> dict[str, Any]:
    """What the draft's weights and cache leave of the target's KV cache on the GPU."""
    assert request.gpu is not None
    gpu = named_gpu(request.gpu)
    alone, small = (plan(s, [gpu], None, EngineRequest()) for s in (load_model(path), spec))
    weights = small.weights_bytes
    if method == "mtp":  # embedding and head are the target's
        weights = head_bytes(open_checkpoint(path))
    elif method in _TRAINED and request.draft is not None:
        weights = open_checkpoint(request.draft).nbytes
    left = max(alone.kv_cache_bytes - weights, 0)
    each = alone.kv_bytes_per_token + small.kv_bytes_per_token
    tokens = int(left / each) if each else 0
    return {
        "draft_weights_bytes": weights,
        "draft_kv_bytes_per_token": small.kv_bytes_per_token,
        "kv_tokens_without": alone.kv_tokens,
        "kv_tokens_with": tokens,
        "fits": bool(tokens >= min(alone.context, alone.kv_tokens) and alone.fits),
    }


def _reason(chosen: Candidate | None, candidates: Sequence[Candidate], request: SpeculationRequest) -> str:
    if chosen is not None and chosen.best is not None:
        return (
            f"{chosen.name} with {int(chosen.best['k'])} tokens: {chosen.best['tokens_per_step']:.2f} tokens "
            f"a step, {chosen.best['speed_up']:.2f} times as fast"
        )
    rows = [c.best["speed_up"] for c in candidates if c.best is not None and not c.note]
    most = f"the best is {max(rows):.2f} times as fast" if rows else "nothing was measured"
    under = (
        f" at {request.concurrency} sequences at a time, where passes are bound by compute"
        if request.concurrency > 1
        else ""
    )
    return f"none pays{under}: {most}, below {WORTH:g}"


# -- the proof in vLLM ---------------------------------------------------------------------------------------


def prove_in_vllm(
    path: Path, result: dict[str, Any], request: SpeculationRequest, python: str | Path | None, log: Any
) -> dict[str, Any]:
    """Serves the checkpoint without and with the chosen speculation, and compares.

    Returns:
        ``same`` (whether greedy texts are equal), the counters of vLLM with its acceptance rate and tokens a
        step, and those that were predicted.

    Raises:
        QuantError: there is nothing to prove; vLLM does not start.
    """
    from quant.serving.deployment import DeploymentRequest
    from quant.serving.deployment import plan as plan_deployment
    from quant.serving.process import running
    from quant.serving.server_metrics import COUNTERS, parse_metrics
    from quant.vllm.metrics import HISTOGRAMS, PREFIX

    unmeasured = [c["speculative_config"] for c in result["candidates"] if c["acceptance"] is None]
    config = result["speculative_config"] or next(iter(unmeasured), None)
    if config is None:
        raise QuantError("nothing to prove in vLLM: no speculation pays")
    prompts = _prompts(path, request)
    texts: list[list[list[int]]] = []
    counters, gaps = dict[str, float](), 0.0
    for words in ((), ("--speculative-config", json.dumps(config))):
        extra = ("--enforce-eager", "--no-enable-prefix-caching", *words)
        deployment = plan_deployment(path, DeploymentRequest(port=0, gpu=request.gpu, extra=extra))
        with running(deployment, python=python, exact=True, log=log) as (server, _):
            rows = []
            for prompt in prompts:
                body = {
                    "model": server.name, "prompt": prompt, "max_tokens": request.new_tokens,
                    "temperature": 0, "ignore_eos": True, "return_token_ids": True,
                }  # fmt: skip
                rows.append(list(server.request("/v1/completions", body)["choices"][0]["token_ids"]))
            texts.append(rows)
            if words:
                series = parse_metrics(server.text("/metrics"))
                names = ("drafts", "draft_tokens", "accepted_tokens")
                counters = {n: sum(series.get(COUNTERS[n][0], [0.0])) for n in names}
                gaps = sum(series.get(f"{PREFIX}{HISTOGRAMS['itl']}_count", [0.0]))
    plain, fast = texts
    same = sum(a == b for a, b in zip(plain, fast, strict=True))
    made = sum(len(x) for x in fast)
    # a request's steps are one more than the gaps between them; the last accepts more than is asked for
    steps = gaps + len(prompts)
    return {
        "same": same == len(plain),
        "equal_texts": same,
        "texts": len(plain),
        **counters,
        "acceptance_rate": counters["accepted_tokens"] / counters["draft_tokens"]
        if counters["draft_tokens"]
        else 0.0,
        "tokens_per_step": made / steps,
    }


def predicted(result: dict[str, Any], path: Path, request: SpeculationRequest) -> Acceptance | None:
    """What the chosen speculation was predicted to do in vLLM: measured again with exactly its proposals."""
    config = result["speculative_config"]
    if config is None:
        return None
    request = replace(request, most=int(config["num_speculative_tokens"]), sampling=Sampling())
    with tempfile.TemporaryDirectory(prefix="quant-speculate-") as folder:
        from quant.accelerator import device_of

        device = device_of(request.device)
        target = Model(path, device, Path(folder))
        proposer = _proposer(config["method"], target, request, Path(folder))
        return measure(
            target, proposer, _prompts(path, request), request.new_tokens, request.most, Sampling()
        )
