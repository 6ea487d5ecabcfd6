"""Distributions compared in slices of the vocabulary: against whole rows in fp64, and in how much memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant.evaluation import divergence
from quant.evaluation.divergence import slices, token_numbers
from quant.evaluation.quality import Runner, evaluate
from quant.progress import silent
from tests.helpers import make_checkpoint


def columns(logits: torch.Tensor) -> divergence.Logits:
    return lambda first, last: logits[:, first:last].clone()


@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_slices_give_what_whole_rows_give(width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = 3 * torch.randn(40, 100, generator=generator)
    p = q + torch.randn(40, 100, generator=generator)
    q[:, 90:] = p[:, 90:] = -torch.inf  # padding that no model gives
    wanted = torch.randint(90, (40,), generator=generator)
    among = torch.randint(90, (40, 3), generator=generator)
    found = token_numbers(columns(q), columns(p), list(slices(100, width)), wanted, among)
    own, other = q.double().log_softmax(-1), p.double().log_softmax(-1)
    kl = (other.exp() * (other - own).nan_to_num(0)).sum(-1)
    assert found.kl is not None and found.source_nll is not None and found.top5 is not None
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.nll.double(), -own.gather(1, wanted[:, None])[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        found.source_nll.double(), -other.gather(1, wanted[:, None])[:, 0], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(found.among, own.gather(1, among), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.source_among, other.gather(1, among), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.top1, (own.argmax(-1) == other.argmax(-1)).float())
    mine, theirs = own.topk(5).indices, other.topk(5).indices
    common = [len(set(a) & set(b)) / 5 for a, b in zip(mine.tolist(), theirs.tolist(), strict=True)]
    torch.testing.assert_close(found.top5, torch.tensor(common))
    assert 0 < found.top1.mean() < 1 and 0.2 < found.top5.mean() < 1


def test_what_one_gives_and_the_other_cannot_is_infinite_and_nan_stays_nan() -> None:
    p = torch.zeros(3, 4)
    q = p.clone()
    q[0, 3] = -torch.inf
    q[1, 0] = torch.nan
    found = token_numbers(columns(q), columns(p), list(slices(4, 2)), torch.tensor([0, 0, 0]))
    assert found.kl is not None
    assert found.kl[0] == torch.inf and found.kl[1].isnan() and found.kl[2] == 0


def test_small_differences_are_not_lost_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    p = 5 * torch.randn(50, 1000, generator=generator)
    q = p + 1e-3 * torch.randn(50, 1000, generator=generator)
    found = token_numbers(columns(q), columns(p), list(slices(1000, 300)), torch.zeros(50, dtype=torch.int64))
    own, other = q.double().log_softmax(-1), p.double().log_softmax(-1)
    wanted = (other.exp() * (other - own)).sum(-1)
    assert found.kl is not None and 1e-8 < wanted.median() < 1e-6
    torch.testing.assert_close(found.kl.double(), wanted, rtol=0.05, atol=2e-8)


@pytest.mark.parametrize("kind", ["gemma2", "cohere"])
def test_models_are_measured_alike_in_any_slices(
    kind: str, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Gemma 2 caps its logits, Cohere scales them: both by the models' own code."""
    from tests.helpers import quantize

    source = checkpoints(kind)
    quantize(source, tmp_path / "out", bits=4, format="plain", group_size=32)
    asked = {"against": source, "length": 24, "chunks": 2}
    whole = evaluate(tmp_path / "out", **asked)
    monkeypatch.setattr(divergence, "COLUMNS", 1000)
    monkeypatch.setattr(divergence, "SLICE", 40_000)
    cuts = []
    logits = Runner.logits
    monkeypatch.setattr(Runner, "logits", lambda self, *a: cuts.append(a[2]) or logits(self, *a))
    cut = evaluate(tmp_path / "out", **asked)
    assert set(cuts) == set(slices(4096, 1000)) and len(cuts) > 2 * 5
    assert whole.kl is not None and cut.kl is not None and whole.kl.mean > 5e-5
    assert cut.kl.mean == pytest.approx(whole.kl.mean, rel=1e-3)
    assert cut.perplexity.mean == pytest.approx(whole.perplexity.mean, rel=1e-5)
    assert (cut.top1, cut.top5) == (whole.top1, whole.top5)


def test_a_head_whose_output_is_not_taken_value_by_value_is_not_cut(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant.checkpoint.reader import open_checkpoint

    runner = Runner(open_checkpoint(llama), torch.device("cpu"))
    tokens = torch.arange(5)[None]
    (hidden,) = runner.hidden([tokens], silent, "run")
    ranges = list(slices(4096, 1000))
    with runner.skeleton.outside(), torch.no_grad():
        assert runner.can_cut(tokens, hidden, ranges)

        def normalised(module: object, args: object, output: dict[str, torch.Tensor]) -> None:
            output["logits"] = output["logits"].log_softmax(-1)

        handle = runner.skeleton.model.register_forward_hook(normalised)
        assert not runner.can_cut(tokens, hidden, ranges)
        handle.remove()

        def of_one_width(module: object, args: object, output: dict[str, torch.Tensor]) -> None:
            output["logits"] = output["logits"] + torch.zeros(4096)

        handle = runner.skeleton.model.register_forward_hook(of_one_width)
        assert not runner.can_cut(tokens, hidden, ranges)
        handle.remove()
        assert runner.can_cut(tokens, hidden, ranges)


def test_a_head_with_fewer_rows_than_the_embedding_is_cut_at_its_own_end(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama 3.2 Vision's, whose image token has no logit."""
    from quant.checkpoint.reader import open_checkpoint
    from quant.evaluation.quality import run_both

    rows, device = torch.arange(12).view(2, 6), torch.device("cpu")
    whole = run_both(Runner(open_checkpoint(llama), device), None, rows, device, silent)
    runner = Runner(open_checkpoint(llama), device)
    monkeypatch.setattr(type(runner.skeleton), "vocabulary", 4104)
    monkeypatch.setattr(divergence, "COLUMNS", 100)
    cut = run_both(runner, None, rows, device, silent)
    torch.testing.assert_close(cut.nll, whole.nll)


_PEAK = """
import json, sys
from quant.evaluation.quality import evaluate
def now(key):
    return next(int(l.split()[1]) >> 10 for l in open('/proc/self/status') if l.startswith(key))
before = {}
def listen(event):
    if event.phase == "source":
        before["resident"] = now('VmRSS')
        open('/proc/self/clear_refs', 'w').write('5')  # the peak begins anew
found = evaluate(sys.argv[1], against=sys.argv[2], length=128, chunks=2, progress=listen)
print(json.dumps([now('VmHWM') - before["resident"], found.kl.mean]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_vocabulary_of_256_thousand_is_compared_in_bounded_memory(tmp_path: Path) -> None:
    """Whole logits of the 256 tokens take 250 MiB in fp32, both models' and their softmax 1.2 GiB."""
    import json

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 256_000,
             "num_attention_heads": 2, "num_key_value_heads": 1, "tie": True}  # fmt: skip
    paths = [make_checkpoint(tmp_path / str(seed), seed=seed, **shape) for seed in (0, 1)]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *map(str, paths)], capture_output=True, text=True, check=True
    )
    more, kl = json.loads(done.stdout.splitlines()[-1])
    # the embeddings of both models, tied to their heads, take 31 MiB each
    assert more < 450 and kl > 0.01, done.stdout
