"""Does vLLM compute with the values that we wrote? A checkpoint served by real vLLM, compared with the same
checkpoint dequantized here.

vLLM scores fixed prompts and continues them greedily; the same tokens then go through transformers' blocks
with the weights that :mod:`quant.formats` reads from the files, once in fp32 and once in the dtype that vLLM
computes in. The first is the truth; the distance of the second from it is what rounding to 16 bits costs on
these very weights and tokens, whatever the model. vLLM may be ``MARGIN`` times as far away and no more: it
rounds as we do, only in another order. A wrong order of nibbles, a shifted zero point or exchanged scales
moves log-probabilities by far more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from quant.calibration.files import bundled
from quant.calibration.text import evaluation_rows
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.errors import CheckpointError
from quant.evaluation.simulation import Kernels, Simulation
from quant.formats.reading import dequantized
from quant.hardware import cpu_instructions
from quant.models.calls import call_block
from quant.models.skeleton import Skeleton
from quant.offline import load_tokenizer
from quant.serving.deployment import DeploymentRequest, plan
from quant.serving.installation import ServerError, find_vllm
from quant.serving.process import Server, cpu_environment, free_port, signals_to
from quant.vllm.arguments import model_dtype
from quant.vllm.context import context_length
from quant.vllm.kernels import CPU_FORMATS, cpu_has
from quant.vllm.log import on_cpu, weight_only

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 12, 64, 32
#: How many times farther from fp32 than our own 16-bit run vLLM may be, as root mean square over all tokens.
#: Measured on vLLM with a model of 11M parameters: 0.9 to 1.0 times, packed or plain; with exchanged
#: scales in a single linear 1.5 times and more, in all linears over 20.
MARGIN = 1.4
#: The same for the single farthest token: the largest of a thousand values scatters more than their mean.
MARGIN_WORST = 3.0
#: A checkpoint in fp32 arithmetic leaves no noise to compare with; log-probabilities come as fp32 through
#: softmax.
_LEAST_NOISE = 1e-4
#: Every parameter must have come from a file; no compilation, whose time a single test does not earn back;
#: scores of whole prompts.
FLAGS = (
    "--model-loader-extra-config",
    '{"enable_weights_track": true}',
    "--enforce-eager",
    "--no-enable-prefix-caching",
)


@dataclass(frozen=True)
class Answers:
    """What vLLM said of some rows.

    Attributes:
        tokens: int64 [rows, T], each prompt with vLLM's greedy continuation.
        logs: fp32 [rows, T - 1], vLLM's log-probability (natural) of every token but the first.
        prompt: tokens of each row that were given.
    """

    tokens: torch.Tensor
    logs: torch.Tensor
    prompt: int


@dataclass(frozen=True)
class Comparison:
    """vLLM beside our own run; all in nats.

    Attributes:
        deviation, worst: root mean square and maximum of |vLLM - fp32| over all tokens.
        noise, noise_worst: the same of our own 16-bit run.
        ties: generated tokens that are not fp32's first choice.
        gap: the most that fp32 prefers its own choice by, at one of them.
    """

    deviation: float
    worst: float
    noise: float
    noise_worst: float
    ties: int
    gap: float
    generated: int
    tokens: int

    @property
    def limit(self) -> float:
        return MARGIN * max(self.noise, _LEAST_NOISE)

    @property
    def limit_worst(self) -> float:
        return MARGIN_WORST * max(self.noise_worst, _LEAST_NOISE)

    @property
    def passed(self) -> bool:
        # a token is chosen over fp32's choice when the errors of both together exceed the gap between them
        return (
            self.deviation <= self.limit
            and self.worst <= self.limit_worst
            and self.gap <= 2 * self.limit_worst
        )

    def describe(self) -> str:
        far = (
            f"log-probabilities of {self.tokens} tokens are {self.deviation:.4f} nats from the dequantized "
            f"values (worst {self.worst:.3f}), "
            f"16-bit rounding alone gives {self.noise:.4f} (worst {self.noise_worst:.3f}), allowed are "
            f"{self.limit:.4f} and {self.limit_worst:.3f}"
        )
        greedy = f"{self.generated - self.ties} of {self.generated} greedy tokens are the reference's own"
        return f"{far}; {greedy}" + (f", the others lie within {self.gap:.3f} of it" if self.ties else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "detail": self.describe(),
            "deviation": self.deviation,
            "worst": self.worst,
            "noise": self.noise,
            "noise_worst": self.noise_worst,
            "limit": self.limit,
            "limit_worst": self.limit_worst,
            "tokens": self.tokens,
            "generated": self.generated,
            "not_first_choice": self.ties,
            "largest_gap": self.gap,
        }


def prompts(path: Path, *, longest: int | None = None) -> torch.Tensor:
    """The fixed prompts as token ids [rows, T], from the bundled evaluation text.

    Args:
        longest: context of the model; shortens the prompts of very small ones.
    """
    length = min(PROMPT_TOKENS, (longest or PROMPT_TOKENS + NEW_TOKENS) - NEW_TOKENS)
    if length < 8:
        raise CheckpointError(
            f"{path}: its context is {longest} tokens: the comparison in vLLM takes at least {NEW_TOKENS + 8}"
        )
    return evaluation_rows(load_tokenizer(path), bundled("wikitext-2-test"), length, PROMPTS)


class Asked(Protocol):
    """What answers requests for a model: a server of ours, or whatever else does."""

    name: str

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]: ...


def question(name: str, rows: torch.Tensor, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """The body of a completion request that scores rows of token ids and continues them greedily, as vLLM
    reads it."""
    return {
        "model": name,
        "prompt": rows.tolist(),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,  # all continuations of one length
        "prompt_logprobs": 0,  # of the prompt's own tokens alone
        "logprobs": 0,
        "return_token_ids": True,
    }


def answers_in(answer: Mapping[str, Any], rows: torch.Tensor) -> Answers:
    """What an answer to :func:`question` says of its rows.

    Raises:
        ServerError: it lacks the tokens and log-probabilities asked for, or holds numbers that JSON has no
            word for (NaN).
    """
    try:
        choices = sorted(answer["choices"], key=lambda c: c["index"])
        tokens = [row.tolist() + list(c["token_ids"]) for row, c in zip(rows, choices, strict=True)]
        logs = []
        for row, choice in zip(rows.tolist(), choices, strict=True):
            scored = [
                float(said[str(token)]["logprob"])
                for token, said in zip(row[1:], choice["prompt_logprobs"][1:], strict=True)
            ]
            logs.append(scored + [float(x) for x in choice["logprobs"]["token_logprobs"]])
        return Answers(torch.tensor(tokens), torch.tensor(logs), rows.shape[1])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"/v1/completions did not answer with tokens and log-probabilities ({type(error).__name__}: "
            f"{error})"
        ) from error


def echo_question(name: str, rows: torch.Tensor) -> dict[str, Any]:
    """The body of a completion request that scores rows without continuing them, as OpenAI's own API once
    did: ``echo`` with ``logprobs``."""
    return {
        "model": name,
        "prompt": rows.tolist(),
        "max_tokens": 1,  # the least that every engine takes
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }


def echoed_in(answer: Mapping[str, Any], rows: torch.Tensor) -> Answers:
    """What an answer to :func:`echo_question` says of its rows.

    Raises:
        ServerError: it scores another number of tokens than were sent.
    """
    try:
        choices = sorted(answer["choices"], key=lambda c: c["index"])
        said = [c["logprobs"]["token_logprobs"] for c in choices]
        length = rows.shape[1]
        if len(said) != len(rows) or any(len(row) not in (length, length + 1) for row in said):
            raise ValueError(f"{list(map(len, said))[:4]} log-probabilities of {length} tokens")
        logs = [[float(x) for x in row[1:length]] for row in said]
        return Answers(rows, torch.tensor(logs), length)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"/v1/completions did not echo the prompt's log-probabilities ({type(error).__name__}: {error})"
        ) from error


def ask(server: Asked, rows: torch.Tensor, new_tokens: int = NEW_TOKENS) -> Answers:
    """Scores and continues rows of token ids through a completions endpoint, all in one request.

    Raises:
        ServerError: see :func:`answers_in`.
    """
    return answers_in(server.request("/v1/completions", question(server.name, rows, new_tokens)), rows)


@dataclass(frozen=True)
class Truth:
    """What a checkpoint's values make of tokens: fp32 [rows, T - 1] log-probabilities of every token but the
    first, computed in fp32 (``exact``) and in the model's dtype (``rounded``), and of the likeliest token
    (``most``)."""

    exact: torch.Tensor
    most: torch.Tensor
    rounded: torch.Tensor

    def rows(self, which: slice) -> Truth:
        return Truth(self.exact[which], self.most[which], self.rounded[which])


class Reference:
    """A checkpoint, quantized or not, run block by block from the values in its files, with activations
    rounded as its scheme says.

    Args:
        kernels: how the engine departs from the scheme (see :func:`kernels`).

    Raises:
        CheckpointError: one that cannot be read, or whose model cannot be built here.
    """

    def __init__(self, path: str | Path, kernels: Kernels | None = None):
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.dtype: torch.dtype = getattr(torch, model_dtype(self.checkpoint.config))
        self._values, self._simulation = dequantized(self.checkpoint), Simulation(self.checkpoint, kernels)
        Skeleton(self._values, torch.device("cpu"), self.dtype)  # says at once what cannot be built

    def logs(self, tokens: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities in fp32 of a run in ``dtype``: of each token but the first, and of the likeliest,
        both [rows, T - 1]."""
        skeleton = Skeleton(self._values, torch.device("cpu"), dtype)
        texts = tokens.split(1)
        hidden, calls = skeleton.embed(texts)
        with torch.no_grad():
            for index in range(skeleton.block_count):
                block = skeleton.load_block(index)
                prefix, linears = skeleton.block_prefix(index), skeleton.linears(index)
                with self._simulation.inside(block, prefix, linears):
                    hidden = [call_block(block, h, c[index]) for h, c in zip(hidden, calls, strict=True)]
                skeleton.free_block(index)
            said, most = [], []
            with skeleton.outside():
                # one row at a time: logits are wide
                for row, states in zip(texts, hidden, strict=True):
                    logs = skeleton.logits(row, states)[:, :-1].float().log_softmax(-1)
                    said.append(logs.gather(-1, row[:, 1:, None])[..., 0])
                    most.append(logs.amax(-1))
        return torch.cat(said), torch.cat(most)

    def truth(self, tokens: torch.Tensor) -> Truth:
        """What the values say of rows of tokens [rows, T]; equal rows are computed once."""
        distinct, where = torch.unique(tokens, dim=0, return_inverse=True)
        exact, most = self.logs(distinct, torch.float32)
        rounded, _ = self.logs(distinct, self.dtype)
        return Truth(exact[where], most[where], rounded[where])

    def compare(self, answers: Answers, like: Comparison | None = None) -> Comparison:
        """Judges what vLLM said.

        Args:
            like: take the noise of this comparison of the same answers, instead of another run.
        """
        if like is None:
            return judge(answers, self.truth(answers.tokens))
        exact, most = self.logs(answers.tokens, torch.float32)
        compared = judge(answers, Truth(exact, most, exact))
        return replace(compared, noise=like.noise, noise_worst=like.noise_worst)


def judge(answers: Answers, truth: Truth) -> Comparison:
    """What an engine said beside what the values say of the same tokens."""
    # NaN must fail: it is replaced by infinity before any maximum
    away = (answers.logs - truth.exact).abs().nan_to_num(torch.inf)
    noise = (truth.rounded - truth.exact).abs()
    chosen = (truth.most - truth.exact)[:, answers.prompt - 1 :]
    return Comparison(
        deviation=_rms(away),
        worst=float(away.max()),
        noise=_rms(noise),
        noise_worst=float(noise.max()),
        ties=int((chosen > 0).sum()),
        gap=float(chosen.max()) if chosen.numel() else 0.0,
        generated=chosen.numel(),
        tokens=away.numel(),
    )


def difference(one: Answers, other: Answers) -> tuple[float, float, int]:
    """How far two sets of answers to the same prompts are apart, up to where their tokens part, which greedy
    decoding may do at a tie.

    Returns:
        root mean square and maximum in nats, and the number of rows that part.
    """
    same = (one.tokens == other.tokens).cumprod(1).bool()
    away = (one.logs - other.logs).abs().nan_to_num(torch.inf)[same[:, 1:]]
    return _rms(away), float(away.max()), int((~same[:, -1]).sum())


def kernels(log: Iterable[str]) -> Kernels:
    """What vLLM's log says of the kernels that it chose.

    >>> kernels(["INFO Selected MarlinFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8"])
    Kernels(activations=False, nearest_cache=True)
    """
    lines = list(log)
    return Kernels(not weight_only(lines), not on_cpu(lines))


def saturation(log: Iterable[str]) -> str | None:
    """Why products of vLLM's int8 kernel are wrong on this CPU; None where it was not chosen or is exact."""
    row = CPU_FORMATS["int8"]
    if cpu_has(cpu_instructions(), *row.needs) or not any("CPUInt8ScaledMMLinearKernel" in x for x in log):
        return None
    return f"this CPU has {row.without}: compare on another machine"


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def open_server(
    path: Path,
    python: str | Path,
    length: int = PROMPT_TOKENS + NEW_TOKENS,
    extra: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> Server:
    """A server for comparisons on a free port, not started yet: every weight tracked, activations of 4-bit
    layers left in 16 bits.

    Args:
        length: tokens of a prompt and its continuation; of a shorter context as many as it has.
        extra: more arguments of vLLM.
        log: receives the lines that the server prints.
    """
    installation = find_vllm(python)
    longest = context_length(open_checkpoint(path).config)
    length = min(length, longest or length)
    deployment = plan(path, DeploymentRequest(max_model_len=length, extra=(*FLAGS, *extra)))
    deployment.demand_trust()
    port = free_port(deployment.host)
    return Server(
        deployment.model_path,
        deployment.flags(port=port),
        python=installation.python,
        host=deployment.host,
        port=port,
        name=deployment.name,
        program=installation.program,
        environment=cpu_environment(exact=True) if installation.cpu else {},
        log=log,
    )


def check_in_vllm(path: str | Path, python: str | Path) -> dict[str, Any]:
    """Loads a checkpoint in the vLLM of another environment and compares what it computes with the values in
    the files.

    Args:
        python: interpreter of the environment with vLLM.

    Returns:
        ``passed``, ``detail`` in words, and the numbers of :class:`Comparison`. A checkpoint that vLLM
        refuses has not passed.

    Raises:
        ServerError: vLLM did not start for a reason that lies not in the checkpoint.
        CheckpointError: one that cannot be read, or whose model cannot be built here.
    """
    folder = Path(path).absolute()
    reference = Reference(folder)
    rows = prompts(folder, longest=context_length(reference.checkpoint.config))
    server = open_server(folder, python)
    with signals_to(server), server:
        try:
            server.start()
        except ServerError as error:
            if error.cause is None or not error.cause.checkpoint:
                raise
            return {
                "passed": False,
                "detail": f"vLLM does not load it: {error.cause.kind}: {error.cause.text}",
            }
        answers = ask(server, rows)
    reference = Reference(folder, kernels(server.lines))
    comparison = reference.compare(answers).to_dict()
    if not comparison["passed"] and (reason := saturation(server.lines)):
        comparison["detail"] += f"; {reason}"
    return comparison | {"load_seconds": round(server.load_seconds, 2)}
