"""Speculative decoding: the target's distribution is kept exactly, and what is predicted is what happens."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

import deploy_vllm
from quant.errors import UsageError
from quant.serving.deployment import DeploymentRequest, plan
from quant.speculation.measure import Acceptance, by_length, generate, measured_latencies
from quant.speculation.proposers import Draft, Model, NGram, Proposer
from quant.speculation.sampling import Sampling, draw, expected_tokens, judge, speed_up
from quant.speculation.suffix import Suffix
from quant.vllm.speculation import translated
from tests.helpers import ROOT, change_config, copy_model

TINY = ROOT / "examples" / "tinylm-4m"


def _chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The statistic in standard deviations of its distribution (Wilson and Hilferty 1931)."""
    kept = expected >= 5
    assert counts[~kept & (expected == 0)].sum() == 0  # what cannot be drawn is never drawn
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    degrees = int(kept.sum()) - 1
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert Sampling(1e-300).probabilities(logits).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7), Sampling(1.0, 0.9), Sampling(0.7, 0.9)])
@pytest.mark.parametrize("way", ["drawn", "likeliest"])
def test_tokens_are_distributed_as_the_targets_own(sampling: Sampling, way: str) -> None:
    """Two tokens by a target and a draft that disagree, 12,000 times, against their exact distribution."""
    vocabulary, samples = 6, 12_000
    generator = torch.Generator().manual_seed(len(way) + int(100 * sampling.temperature * sampling.top_p))
    logits = torch.randn(vocabulary + 1, vocabulary, generator=generator) * 1.5  # by the token before
    drafts = logits + torch.randn(logits.shape, generator=generator)
    p, q = sampling.probabilities(logits), sampling.probabilities(drafts)
    start = vocabulary
    counts = torch.zeros(vocabulary, vocabulary)
    for _ in range(samples):
        if way == "drawn":
            first = draw(q[start], generator)
            proposed, rows = [first, draw(q[first], generator)], q[[start, first]]
        else:
            first = int(drafts[start].argmax())
            proposed, rows = [first, int(drafts[first].argmax())], None
        kept, follows = judge(p[[start, *proposed]], proposed, rows, generator)
        made = [*proposed[:kept], follows]
        if len(made) < 2:
            made.append(draw(p[made[0]], generator))
        counts[made[0], made[1]] += 1
    expected = samples * p[start][:, None] * p[:vocabulary]
    assert abs(_chi_square(counts, expected)) < 3.5


def test_a_wrong_judgement_would_be_seen() -> None:
    """The same statistic on tokens that are accepted with the draft's probabilities alone."""
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(6, generator=generator).softmax(0) for _ in range(2))
    counts = torch.bincount(torch.multinomial(q, 12_000, True, generator=generator), minlength=6)
    assert _chi_square(counts.float(), 12_000 * p) > 5


class _Script:
    """A target whose likeliest token is known: the text goes on as a given one, in a circle."""

    def __init__(self, text: list[int]):
        self.text = text

    def logits(self, tokens: list[int], last: int) -> torch.Tensor:
        rows = torch.zeros(last, 50)
        for i in range(last):
            rows[i, self.text[(len(tokens) - last + 1 + i) % len(self.text)]] = 1.0
        return rows


def test_greedy_text_is_the_targets_own_and_repeats_are_found() -> None:
    text = [random.Random(0).randrange(50) for _ in range(20)]
    generator = torch.Generator().manual_seed(0)
    made, found = generate(_Script(text), NGram(3, 2), text[:5], 60, 4, Sampling(), generator)
    assert made == [text[i % 20] for i in range(5, 65)]
    # nothing repeats in the first round; then every proposal is right
    assert found.drafts < found.steps < 60 and found.rate > 0.9
    assert found.tokens == 60 and found.tokens_per_step == 60 / found.steps
    assert by_length(found, 4) == pytest.approx(1 + found.accepted / found.steps)
    assert by_length(found, 1) < by_length(found, 2)


def test_n_grams_are_looked_up_as_vllm_does() -> None:
    """Longest first, then where it stood first (vllm/v1/spec_decode/ngram_proposer.py, 0.32)."""
    assert NGram(3, 1).propose([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 2) == ([9, 1], None)
    assert NGram(3, 2).propose([5, 1, 2, 7, 2, 4, 1, 2], 3) == ([7, 2, 4], None)
    assert NGram(3, 2).propose([1, 2, 3, 4], 3) == ([], None)
    assert NGram(2, 1).propose([7, 7, 7], 4) == ([7], None)  # overlapping, and at most to the end


def test_suffixes_are_weighed_as_the_package_that_vllm_takes_does() -> None:
    """Each of these is what arctic-inference 0.3 answers (SuffixDecodingCache.speculate, 24 deep)."""
    suffix = Suffix()
    # 2 was followed by 3 twice and by 9 once, and stands at the end: half; as long as what matches
    assert suffix.propose([1, 2, 3, 1, 2, 9, 1, 2, 3, 7, 2], 8) == ([3], None)
    assert suffix.propose([1, 2, 3, 1, 2, 9, 1, 2, 3, 7, 2, 3, 7], 8) == ([2, 3, 7], None)
    assert suffix.propose([1, 2, 3, 1, 2, 9, 1, 2, 3, 7, 2, 3, 7, 5, 4], 8) == ([], None)
    suffix.ended([1, 2, 3, 1, 2, 9, 1, 2, 3, 7, 2, 3, 7, 5, 4, 6, 8])
    # another request: of the answers before it, not of their prompts
    assert suffix.propose([20, 21, 5], 8) == ([4], None)
    assert suffix.propose([20, 21, 5, 4, 6], 8) == ([8], None)
    assert suffix.propose([20, 21, 5, 4, 6, 9], 8) == ([], None)
    # of what is as frequent what came first, but for what has just caught up
    suffix.ended([20, 21, 5, 4, 6, 9, 31, 32, 33])
    assert suffix.propose([20, 21, 5, 4, 6], 8) == ([8], None)
    tie = Suffix()
    assert tie.propose([1, 5, 1, 6, 1, 6, 1, 5, 1], 1) == ([6], None)
    assert [tie.propose([7] * n, 9)[0] for n in (3, 5)] == [[7], [7, 7]]


def test_arithmetic_of_the_gain() -> None:
    assert expected_tokens(0.8, 4) == pytest.approx(sum(0.8**i for i in range(5)))
    # a draft of a tenth of the target's time, verification as fast as one token
    assert speed_up(expected_tokens(0.8, 4), 1.0, 0.4, 1.0) == pytest.approx(3.3616 / 1.4)
    assert Acceptance(0, 0, 0, 0, (), 0).tokens_per_step == 1.0


def test_a_model_as_its_own_draft_is_always_right_whatever_is_cut_back(tmp_path: Path) -> None:
    target, draft = (Model(TINY, torch.device("cpu"), tmp_path) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    prompt = [11, 480, 77, 902, 33, 5]
    plain = list(prompt)
    for _ in range(12):
        target.reset()
        plain.append(int(target.logits(plain, 1)[0].argmax()))
    target.reset()
    made, found = generate(target, Draft(draft, target.vocabulary), prompt, 12, 3, Sampling(), generator)
    assert made == plain[6:] and found.rate >= 0.9  # ties may round the other way in a wider pass
    # proposals that are always wrong: the cache is cut back each time
    wrong = lambda tokens, k: ([(plain[min(len(tokens), len(plain) - 1)] + 1) % 4096] * k, None)  # noqa: E731
    never = type("Never", (Proposer,), {"propose": staticmethod(wrong)})()
    target.reset()
    made, found = generate(target, never, prompt, 12, 3, Sampling(), generator)
    assert made == plain[6:] and found.accepted == 0 and found.steps == 12


def test_only_proposers_with_a_network_take_time(tmp_path: Path) -> None:
    model = Model(TINY, torch.device("cpu"), tmp_path)
    draft = Draft(model, model.vocabulary)
    assert draft.propose([5, 6, 7], 2)[0] and set(draft.seconds) == {1, 3} and draft.seconds == model.seconds
    model.seconds = {1: [2.0, 4.0, 3.0], 3: [3.0], 90: [900.0]}
    assert measured_latencies(model, draft.seconds).proposal == 3.0
    assert measured_latencies(model, NGram().seconds).proposal == 0.0
    assert measured_latencies(model, {90: [900.0], 99: [999.0]}).proposal == 900.0


def test_old_names_become_todays_with_a_note(tmp_path: Path) -> None:
    words = ("--max-num-seqs", "8", "--speculative-model", "a/b", "--num-speculative-tokens=3")
    extra, notes = translated(words)
    assert extra == (
        "--max-num-seqs",
        "8",
        "--speculative-config",
        '{"model": "a/b", "num_speculative_tokens": 3}',
    )
    assert len(notes) == 2 and "'model' of --speculative-config" in notes[0]
    made = plan(TINY, DeploymentRequest(extra=words))
    assert "--speculative-config" in made.command and any("older release" in w for w in made.warnings)
    with pytest.raises(UsageError, match="JSON object"):
        translated(["--speculative-config", "ngram"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ngram", "2,5"], "--ngram is '2,5'"),
        (["--new-tokens", "2000"], "the model has 1024"),
        (["--draft", str(TINY), "--top-p", "2"], "--top-p"),
    ],
)
def test_a_wrong_request_is_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        deploy_vllm.main(["speculate", str(TINY), *options])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_file_that_config_contradicts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_model(TINY, tmp_path / "m")
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(SystemExit) as stop:
        deploy_vllm.main(["speculate", str(folder)])
    assert stop.value.code == 1
    assert "model.layers.3" in capsys.readouterr().err
