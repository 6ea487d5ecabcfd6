"""What a served checkpoint lost, from the log-probabilities that the server itself tells.

An OpenAI-compatible vLLM tells of each prompt token the log-probabilities of the ``width`` likeliest tokens
and of the text's own. The text's own give the served perplexity exactly. Of the divergence they give a lower
bound: with S the tokens that are told, p the source's distribution and q the served one,

    KL(p ‖ q) ≥ Σ_S p·(log p - log q) + P·(log P - log Q),   P = 1 - Σ_S p,   Q = 1 - Σ_S q

by the log-sum inequality, which is what remains where all tokens outside of S count as one. p is computed
here, over the whole vocabulary, in fp32. The same bound of our own run of the checkpoint, on the same S, is
what the served one is to be compared with; our own KL over the whole vocabulary beside it tells what the
bound leaves out. What is served computes in 16 bits, which is part of what is measured.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quant.accelerator import device_of
from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, QuantError, UsageError
from quant.evaluation.agreement import demand_agreement
from quant.evaluation.divergence import TokenNumbers
from quant.evaluation.intervals import Measured, mean_of
from quant.evaluation.quality import Evaluation, Runner, Source, evaluation_of, only_measured, run_both
from quant.evaluation.simulation import Kernels, Simulation
from quant.evaluation.texts import EvaluationText, Sample, joined
from quant.progress import Event, Progress, silent
from quant.serving.client import Endpoint, get_json, resolve
from quant.serving.process import Server, ServerError, signals_to
from quant.serving.reference import Asked, kernels, open_server
from quant.vllm.context import context_length

#: By how much rounded log-probabilities of all tokens may say more than one.
_ROUNDED = 0.01
#: Tokens in a request; rows are asked for together up to so many.
_REQUEST_TOKENS = 2048
#: The least that a rest of probability may be: sums of fp32 log-probabilities are no more exact.
_LEAST = 1e-7
#: Chunks where no number is asked for: answers hold about 2 MB a thousand tokens.
CHUNKS = 16


@dataclass(frozen=True)
class ServedPart:
    """What a server computes, on a text or on several together.

    Attributes:
        perplexity: exp of the mean negative log-likelihood that it tells of the text's own tokens.
        loss: its rise over the source's, nats per token; None without a source.
        distance: root mean square of its log-probabilities' distance from our own run's, nats.
        kl_at_least: the lower bound of its KL to the source, on the tokens that it tells.
        own_kl_at_least, own_kl: the same bound of our own run, and that run's whole KL.
        top1: share of tokens where its likeliest token is the source's.
        told: mean probability of the tokens that it tells.
    """

    name: str
    tokens: int
    chunks: int
    perplexity: float
    distance: float
    told: float
    loss: Measured | None = None
    kl_at_least: Measured | None = None
    own_kl_at_least: Measured | None = None
    own_kl: Measured | None = None
    top1: Measured | None = None


@dataclass(frozen=True)
class Told:
    """What a server tells of rows [R, T + 1] of tokens.

    Attributes:
        tokens: int64 [R, T, W]: the text's own token, then the likeliest ones; padded with the text's own.
        logs: fp64 [R, T, W] their log-probabilities, natural.
        counts: bool [R, T, W]: each token once, and no padding.
        likeliest: int64 [R, T]: where in W the likeliest is.
    """

    tokens: torch.Tensor
    logs: torch.Tensor
    counts: torch.Tensor
    likeliest: torch.Tensor


class Remote:
    """An endpoint that is there already, asked one request after the other."""

    def __init__(self, endpoint: Endpoint):
        async def found() -> Endpoint:
            async with endpoint.client() as client:
                return await resolve(client, endpoint)

        self._endpoint = asyncio.run(found())
        self.name = self._endpoint.model

    @property
    def url(self) -> str:
        return self._endpoint.url

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        async def asked() -> Any:
            async with self._endpoint.client() as client:
                return await get_json(client, self._endpoint, path, body)

        value = asyncio.run(asked())
        if not isinstance(value, dict):
            raise ServerError(f"{path} answered {str(value)[:200]}: a JSON object was expected")
        return value


def tell(server: Asked, rows: torch.Tensor, width: int, progress: Progress) -> Told:
    """Asks a server for the ``width`` likeliest tokens at each position of rows [R, T + 1].

    Raises:
        ServerError: it answers something else, or tells fewer tokens.
        EndpointError: an endpoint refuses.
    """
    parts, done = [], 0
    for some in rows.split(max(1, _REQUEST_TOKENS // rows.shape[1])):
        body = {
            "model": server.name,
            "prompt": some.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": width,
        }
        parts.append(_told(server.request("/v1/completions", body), some, width))
        done += len(some)
        progress(Event("served log-probabilities", done, len(rows)))
    return Told(*(torch.cat([getattr(p, key) for p in parts]) for key in Told.__dataclass_fields__))


def _told(answer: Mapping[str, Any], rows: torch.Tensor, width: int) -> Told:
    try:
        choices = sorted(answer["choices"], key=lambda c: c["index"])
        said = [choice["prompt_logprobs"][1:] for choice in choices]
        if [len(x) for x in said] != [rows.shape[1] - 1] * len(rows):
            raise ValueError(f"{[len(x) for x in said][:4]} positions of {rows.shape[1] - 1}")
        found = [
            [_position(position, int(own), width) for own, position in zip(row[1:], x, strict=True)]
            for row, x in zip(rows, said, strict=True)
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"/v1/completions did not answer with the log-probabilities of the prompt ({type(error).__name__}"
            f": {error}): is that a vLLM?"
        ) from error
    kinds = (torch.int64, torch.float64, torch.bool, torch.int64)
    return Told(
        *(torch.tensor([[p[i] for p in row] for row in found], dtype=kind) for i, kind in enumerate(kinds))
    )


def _position(
    said: Mapping[str, Any], own: int, width: int
) -> tuple[list[int], list[float], list[bool], int]:
    """Fields of :class:`Told` at one position.

    Raises:
        ValueError: it has fewer tokens than were asked for.
    """
    known = {int(token): float(value["logprob"]) for token, value in said.items()}
    if len(known) < width:
        raise ValueError(f"{len(known)} tokens told where {width} were asked for")
    whole = sum(math.exp(min(x, 1.0)) for x in known.values())
    if not whole <= 1 + _ROUNDED:  # NaN, too
        raise ValueError(f"{len(known)} tokens told have a probability of {whole:.3g}")
    others = sorted((token for token in known if token != own), key=lambda token: -known[token])[:width]
    padding = width - len(others)
    values = [known[own], *(known[token] for token in others)]
    return (
        [own, *others, *[own] * padding],
        [*values, *[0.0] * padding],
        [*[True] * len(values), *[False] * padding],
        max(range(len(values)), key=lambda i: values[i]),
    )


def lumped(p: torch.Tensor, q: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The lower bound of KL(p ‖ q) where all tokens that are not told count as one.

    Args:
        p, q: log-probabilities fp64 [..., W] of the tokens that are told.
        counts: bool [..., W], those of them that are real.

    Returns:
        nats, fp64 [...].
    """
    weights = torch.where(counts, p.exp(), 0.0)
    inside = torch.where(weights > 0, weights * (p - q), 0.0).sum(-1)
    rest = (1 - weights.sum(-1)).clamp_min(0)
    other = (1 - torch.where(counts, q.exp(), 0.0).sum(-1)).clamp_min(_LEAST)
    return inside + torch.where(rest > _LEAST, rest * (rest.clamp_min(_LEAST).log() - other.log()), 0.0)


def _part(name: str, told: Told, numbers: TokenNumbers) -> ServedPart:
    """Served beside computed, of tokens [R, T]."""
    assert numbers.among is not None
    nll = -told.logs[..., 0]
    away = (told.logs - numbers.among).abs().nan_to_num(torch.inf)[told.counts]
    found = ServedPart(
        name=name,
        tokens=nll.numel(),
        chunks=len(nll),
        perplexity=_power(float(nll.mean())),
        distance=float(away.square().mean().sqrt()),
        told=float(torch.where(told.counts, told.logs.exp(), 0.0).sum(-1).mean()),
    )
    if numbers.source_among is None:
        return found
    assert numbers.source_nll is not None and numbers.kl is not None and numbers.source_most is not None
    first = numbers.source_among.gather(-1, told.likeliest[..., None])[..., 0]
    # equal but for the rounding of fp32
    agree = (numbers.source_most.double() - first).abs() < 1e-5
    bound = lumped(numbers.source_among, told.logs, told.counts)
    own = lumped(numbers.source_among, numbers.among, told.counts)

    def over_chunks(values: torch.Tensor) -> Measured:
        return mean_of(values.double().mean(1).tolist())

    return replace(
        found,
        loss=over_chunks(nll - numbers.source_nll.double()),
        kl_at_least=over_chunks(bound),
        own_kl_at_least=over_chunks(own),
        own_kl=over_chunks(numbers.kl),
        top1=over_chunks(agree),
    )


def _power(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@only_measured()
def evaluate_served(
    path: str | Path,
    *,
    python: str | Path | None = None,
    endpoint: Endpoint | None = None,
    against: str | Path | None = None,
    text: str | Path | None = None,
    length: int | None = None,
    chunks: int | None = None,
    domains: bool = False,
    long_context: bool = False,
    width: int = 20,
    device: str | None = None,
    progress: Progress = silent,
    log: Any = lambda line: None,
) -> tuple[Evaluation, dict[str, Any]]:
    """Measures a checkpoint as a real vLLM serves it, beside our own run of it.

    Args:
        python: of an environment with vLLM, which is started on the checkpoint and ended again.
        endpoint: a vLLM that serves it already, instead.
        width: likeliest tokens that it is asked for at each position; a vLLM tells 20 where it was not
            started with more (``--max-logprobs``).
        log: receives the lines of the server that is started.

    Returns:
        our own run's, and of what is served: fields of :class:`ServedPart` of all texts, ``width``, ``url``
        and ``domains``.

    Raises:
        ServerError, EndpointError: vLLM does not start or answer.
        QuantError: as :func:`quant.evaluation.quality.evaluate`.
    """
    if (python is None) == (endpoint is None):
        raise UsageError("give either a Python with vLLM to start, or an endpoint that is there")
    folder = Path(path).absolute()
    target, checkpoint = device_of(device), open_checkpoint(folder)
    demand_agreement(checkpoint)
    sample = Sample(None if text is None else Path(text), length, chunks, domains, long_context)
    if sample.chunks is None and not (domains or long_context):
        sample = replace(sample, chunks=CHUNKS)
    others = [] if against is None else [open_checkpoint(against)]
    size = sample.resolved(checkpoint, *others)
    longest = context_length(checkpoint.config)
    if longest is not None and size == longest:
        if length is not None:
            raise CheckpointError(
                f"--length is {length}, the whole context: a server needs room for one token more: give "
                f"--length {length - 1}"
            )
        size -= 1
    source = None if against is None else Source(against, sample, size, device, progress)
    if source is not None:
        texts, notes = source.texts, source.notes
    else:
        texts, notes = sample.texts(checkpoint, size, progress)
    rows = joined(texts)
    Runner(checkpoint, target)  # says at once what cannot be run here
    if endpoint is not None:
        remote = Remote(endpoint)
        told, url, used = tell(remote, rows, width, progress), remote.url, Kernels()
    else:
        assert python is not None
        server = open_server(folder, python, size + 1, ("--max-logprobs", str(width)), log)
        told, used = _asked(server, rows, width, progress)
        url = None
    simulation = Simulation(checkpoint, used)
    runner = Runner(checkpoint, target, simulation)
    numbers = run_both(runner, source, rows, target, progress, told.tokens)
    found = evaluation_of(path, source, texts, notes, simulation, numbers)
    return found, _served(found, told, numbers, texts) | {"width": width, "url": url}


def _asked(server: Server, rows: torch.Tensor, width: int, progress: Progress) -> tuple[Told, Kernels]:
    with signals_to(server), server:
        progress(Event("starting vLLM"))
        server.start()
        return tell(server, rows, width, progress), kernels(server.lines)


def _served(
    found: Evaluation, told: Told, numbers: TokenNumbers, texts: Sequence[EvaluationText]
) -> dict[str, Any]:
    parts, first = [], 0
    for text in texts:
        rows = slice(first, first + len(text.rows))
        first = rows.stop
        some = Told(*(getattr(told, key)[rows] for key in Told.__dataclass_fields__))
        parts.append(asdict(_part(text.name, some, numbers.rows(rows.start, rows.stop))))
    whole = asdict(_part(found.text, told, numbers)) if len(parts) > 1 else parts[0]
    if not math.isfinite(whole["perplexity"]):
        raise QuantError(
            f"{found.path}: the served perplexity is {whole['perplexity']}: run quant verify --vllm on it"
        )
    return {**whole, "domains": parts if len(parts) > 1 else []}
