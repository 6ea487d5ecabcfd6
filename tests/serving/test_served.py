"""What a server tells of prompts beside what is computed here: the arithmetic on answers of transformers' own
model, and refusals. Real vLLM's answers are in tests/vllm."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.errors import QuantError
from quant.progress import silent
from quant.serving import served
from quant.serving.client import Endpoint
from quant.serving.process import ServerError
from quant.serving.served import evaluate_served, lumped, tell
from tests.helpers import quantize
from tests.serving.endpoint import endpoint


class Sound:
    """Answers as vLLM does, from transformers' fp32 forward of a plain checkpoint."""

    url, name = "http://sound", "m"

    def __init__(self, path: Path):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.bodies: list[dict[str, Any]] = []

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        assert path == "/v1/completions" and body is not None
        self.bodies.append(dict(body))
        rows = torch.tensor(body["prompt"])
        with torch.no_grad():
            logs = self.model(input_ids=rows).logits[:, :-1].log_softmax(-1)
        top = logs.topk(body["prompt_logprobs"], dim=-1)
        choices: list[dict[str, Any]] = []
        for r, row in enumerate(rows[:, 1:].tolist()):
            said: list[dict[str, Any] | None] = [None]
            for t, own in enumerate(row):
                ids = {*top.indices[r, t].tolist(), own}
                said.append({str(i): {"logprob": float(logs[r, t, i]), "rank": 1} for i in ids})
            choices.append({"index": r, "prompt_logprobs": said})
        return {"choices": choices[::-1]}


@pytest.fixture(scope="module")
def output(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "out"
    quantize(llama, folder, bits=3, group_size=32, format="plain")
    return folder


def measured(monkeypatch: pytest.MonkeyPatch, server: Any, path: Path, **asked: Any) -> tuple[Any, Any]:
    monkeypatch.setattr(served, "Remote", lambda where: server)
    asked = {"length": 24, "chunks": 3} | asked
    return evaluate_served(path, endpoint=Endpoint("http://sound"), **asked)


def test_what_is_served_as_it_is_computed_has_our_own_numbers(
    llama: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, found = measured(monkeypatch, Sound(output), output, against=llama, width=20)
    assert found["perplexity"] == pytest.approx(own.perplexity.mean, rel=1e-2)  # bf16 weights, exactly held
    assert found["distance"] < 1e-2 and own.kl is not None
    bound, ours = found["kl_at_least"]["mean"], found["own_kl_at_least"]["mean"]
    assert bound == pytest.approx(ours, rel=0.05)
    assert 0 < ours < found["own_kl"]["mean"] and found["own_kl"]["mean"] == own.kl.mean
    assert found["top1"]["mean"] == pytest.approx(own.top1.mean, abs=0.05)
    assert found["loss"]["mean"] == pytest.approx(own.loss.mean, abs=0.01)
    assert 0 < found["told"] < 1 and (found["width"], found["chunks"], found["tokens"]) == (20, 3, 69)
    # told everything, nothing is left out of the bound
    _, whole = measured(monkeypatch, Sound(output), output, against=llama, width=4096)
    assert whole["own_kl_at_least"]["mean"] == pytest.approx(own.kl.mean, rel=1e-3)
    assert whole["told"] == pytest.approx(1, abs=1e-4) and bound < whole["kl_at_least"]["mean"]


def test_another_model_is_seen_and_a_checkpoint_alone_is_measured(
    llama: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = measured(monkeypatch, Sound(llama), output, against=llama)
    assert other["kl_at_least"]["mean"] < 1e-3 < other["own_kl_at_least"]["mean"]
    assert other["distance"] > 0.05 and other["top1"]["mean"] > 0.98
    server = Sound(output)
    own, alone = measured(monkeypatch, server, output, domains=True, chunks=2)
    assert alone["kl_at_least"] is None and own.kl is None and alone["chunks"] == 10
    assert [d["name"] for d in alone["domains"]] == [d.name for d in own.domains]
    for mine, theirs in zip(own.domains, alone["domains"], strict=True):
        assert theirs["perplexity"] == pytest.approx(mine.perplexity.mean, rel=1e-2)
    assert all(b["max_tokens"] == 1 and b["prompt_logprobs"] == 20 for b in server.bodies)


def test_the_bound_never_exceeds_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(200, 50, generator=generator, dtype=torch.float64)).log_softmax(-1)
    q = (p + 0.5 * torch.randn(200, 50, generator=generator, dtype=torch.float64)).log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1)
    before = torch.zeros(200, dtype=torch.float64)
    for width in (1, 5, 20, 49):
        ids = q.topk(width).indices
        told = torch.ones(200, width, dtype=torch.bool)
        bound = lumped(p.gather(1, ids), q.gather(1, ids), told)
        rest = (1 - p.gather(1, ids).exp().sum(-1)).clamp_min(1e-300)
        other = (1 - q.gather(1, ids).exp().sum(-1)).clamp_min(1e-300)
        inside = (p.gather(1, ids).exp() * (p - q).gather(1, ids)).sum(-1)
        torch.testing.assert_close(bound, inside + rest * (rest / other).log(), atol=1e-4, rtol=1e-4)
        assert bool((bound <= whole + 1e-6).all()) and bool((bound >= before - 1e-6).all())
        before = bound
    # what is padded counts once
    twice = torch.cat([ids, ids[:, :1]], 1)
    told = torch.cat([told, torch.zeros(200, 1, dtype=torch.bool)], 1)
    assert torch.equal(lumped(p.gather(1, twice), q.gather(1, twice), told), bound)


_TOLD, _OTHERS = {"2": {"logprob": -1}}, {"8": {"logprob": -1}, "9": {"logprob": -1}}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, "strict|zip|positions"),
        ([], "prompt_logprobs"),
        ([[None, {"7": {"logprob": -1.0}}]], "positions of 2"),
        ([[None, _TOLD, {"3": {"logprob": -1}}]], "1 tokens told where 2 were asked for"),
        ([[None, {"2": None, "3": {}}, {}]], "TypeError|KeyError"),
        ([[None, _OTHERS, _OTHERS]], "KeyError: 2"),
        ([[None, {"2": {"logprob": 3.0}, "9": {"logprob": -1}}, _OTHERS]], "have a probability of"),
        ([[None, {"2": {"logprob": math.nan}, "9": {"logprob": -1}}, _OTHERS]], "have a probability of nan"),
    ],
)
def test_an_answer_that_is_not_a_vllm_s_is_named(said: list[Any] | None, why: str) -> None:
    class Odd:
        name = "m"

        def request(self, path: str, body: Any = None) -> Any:
            if not said:
                return {"choices": [] if said is None else [{"index": 0}]}
            return {"choices": [{"index": 0, "prompt_logprobs": x} for x in said]}

    with pytest.raises(ServerError, match=f"/v1/completions did not answer.*({why})"):
        tell(Odd(), torch.tensor([[1, 2, 3]]), 2, silent)


def test_servers_and_options_that_cannot_be_are_refused_in_a_line(
    llama: Path, cli: Callable[..., Any], checkpoints: Callable[..., Path]
) -> None:
    asked = ["evaluate", llama, "--length", "24", "--chunks", "2"]
    cases = [
        (["--vllm", sys.executable], 1, "has no vLLM"),
        (["--vllm", "/nowhere/python"], 2, "does not run"),
        (["--url", "http://127.0.0.1:9"], 1, "127.0.0.1:9"),
        (["--vllm", "x", "--url", "http://y"], 2, "give one of them"),
        (
            ["--top-logprobs", "5"],
            2,
            "--top-logprobs is for a server that is asked: give --vllm or",
        ),
        (
            ["--vllm", "x", "--served-model", "m"],
            2,
            "--served-model is for a server that is asked",
        ),
        (["--url", "http://127.0.0.1:9", "--length", "256"], 1, "--length is 256, the whole context"),
    ]
    for more, code, said in cases:
        found = cli(*asked, *more)
        assert found.code == code and said in found.err and "Traceback" not in found.err, (more, found)
        assert found.out == "" and len([x for x in found.err.splitlines() if "error" in x]) == 1
    several = cli(*asked, llama, "--vllm", sys.executable)
    assert several.code == 2 and "measure one checkpoint" in several.err


def test_an_endpoint_that_tells_too_little_or_refuses_is_said(llama: Path, cli: Callable[..., Any]) -> None:
    from tests.serving.engine import Engine

    asked = ["evaluate", llama, "--length", "24", "--chunks", "2", "--url"]
    with endpoint(engine=Engine(llama), root=str(llama)) as server:
        found = cli(*asked, server.url)
        assert found.code == 1 and "did not answer with the log-probabilities of the prompt" in found.err
        wrong = cli(*asked, server.url, "--served-model", "other")
        assert wrong.code == 1 and "--served-model is 'other'" in wrong.err
        body = next(b for b in server.behaviour.bodies if "prompt_logprobs" in b)
        assert body["prompt_logprobs"] == 20 and json.dumps(body["prompt"])
    with pytest.raises(QuantError, match="either a Python with vLLM to start, or an endpoint"):
        evaluate_served(llama)
