"""Perplexity, KL and agreement against the whole models of transformers, computed here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant.calibration.files import bundled
from quant.calibration.text import evaluation_rows
from quant.errors import NotFinite, QuantError, VerificationFailed
from quant.evaluation.quality import evaluate
from quant.offline import load_tokenizer
from tests.helpers import TINYLM, copy_model, load_all, quantize, save_all

LENGTH, CHUNKS = 48, 6


def reference(path: Path) -> torch.Tensor:
    """Log-probabilities in fp64 of transformers' own model, [chunks, length - 1, vocabulary]."""
    from transformers import AutoModelForCausalLM

    rows = evaluation_rows(load_tokenizer(path), bundled("wikitext-2-test"), LENGTH, CHUNKS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None]).logits[:, :-1].double().log_softmax(-1) for row in rows])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair") / "out"
    quantize(TINYLM, folder, bits=3, format="plain")
    return folder


def test_every_number_equals_that_of_the_whole_models(pair: Path) -> None:
    found = evaluate(pair, against=TINYLM, length=LENGTH, chunks=CHUNKS)
    rows = evaluation_rows(load_tokenizer(TINYLM), bundled("wikitext-2-test"), LENGTH, CHUNKS)
    candidate, source = reference(pair), reference(TINYLM)
    wanted = rows[:, 1:, None]

    def stats(values: torch.Tensor) -> tuple[float, float]:
        means = values.mean(1)
        return float(means.mean()), float(means.std() / math.sqrt(CHUNKS))

    for measured, log in ((found.perplexity, candidate), (found.source_perplexity, source)):
        mean, error = stats(-log.gather(-1, wanted)[..., 0])
        assert measured is not None
        assert measured.mean == pytest.approx(math.exp(mean), rel=1e-4)
        assert measured.standard_error == pytest.approx(math.exp(mean) * error, rel=1e-3)
    kl, kl_error = stats((source.exp() * (source - candidate)).sum(-1))
    agree, agree_error = stats((source.argmax(-1) == candidate.argmax(-1)).double())
    assert found.kl is not None and found.top1 is not None
    assert (found.kl.mean, found.kl.standard_error) == (
        pytest.approx(kl, rel=1e-3),
        pytest.approx(kl_error, rel=1e-2),
    )
    assert (found.top1.mean, found.top1.standard_error) == (
        pytest.approx(agree, abs=5e-3),
        pytest.approx(agree_error, abs=5e-3),
    )
    assert found.perplexity_increase == pytest.approx(
        found.perplexity.mean / found.source_perplexity.mean - 1
    )  # type: ignore[union-attr]
    assert (found.chunks, found.tokens) == (CHUNKS, CHUNKS * (LENGTH - 1))


def test_a_quantized_file_measures_as_its_plain_form(tmp_path: Path) -> None:
    from tests.helpers import make_checkpoint

    source = make_checkpoint(tmp_path / "source", dtype=torch.float32)
    values = []
    for form in ("compressed-tensors", "gptq", "plain"):
        quantize(source, tmp_path / form, format=form, group_size=32)
        values.append(evaluate(tmp_path / form, against=source, length=32, chunks=3).to_dict())
    for key in ("perplexity", "kl", "top1"):
        assert values[0][key] == values[1][key] == values[2][key]


def test_a_model_against_itself_differs_in_nothing(llama: Path) -> None:
    found = evaluate(llama, against=llama, length=32, chunks=3)
    assert found.kl is not None and found.top1 is not None
    assert (found.kl.mean, found.top1.mean, found.perplexity_increase) == (0.0, 1.0, 0.0)


def test_a_rise_beyond_the_limit_fails_and_one_within_passes(pair: Path) -> None:
    found = evaluate(pair, against=TINYLM, length=LENGTH, chunks=CHUNKS)
    assert found.perplexity_increase is not None and found.perplexity_increase > 0.01
    found.demand(found.perplexity_increase + 0.001)
    with pytest.raises(VerificationFailed, match=r"perplexity rose by .*%, the limit is 0.10%"):
        found.demand(0.001)


def test_a_broken_checkpoint_is_not_called_good(llama: Path, tmp_path: Path) -> None:
    source = copy_model(llama, tmp_path / "source")
    tensors = load_all(source)
    tensors["model.norm.weight"][0] = torch.nan
    save_all(source, tensors)
    with pytest.raises(NotFinite, match="model.norm.weight"):
        evaluate(source, length=32, chunks=2)
    # every value is a number, and what is computed of them is none
    tensors["model.norm.weight"].fill_(torch.finfo(tensors["model.norm.weight"].dtype).max)
    save_all(source, tensors)
    with pytest.raises(
        VerificationFailed, match="perplexity is nan: the checkpoint is broken, run quant verify on it"
    ):
        evaluate(source, length=32, chunks=2).demand(None)


def test_lengths_beyond_the_context_and_short_texts_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="--length is 512: the model's longest context is 256"):
        evaluate(llama, length=512)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(QuantError, match=r"short.txt: has \d+ tokens, one chunk of 32 takes 31"):
        evaluate(llama, text=tmp_path / "short.txt", length=32)


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "qwen3"])
def test_other_families_are_measured_like_their_whole_models(
    kind: str, checkpoints: Callable[..., Path]
) -> None:
    path = checkpoints(kind)
    rows = evaluation_rows(load_tokenizer(path), bundled("wikitext-2-test"), LENGTH, CHUNKS)
    mean = float(-reference(path).gather(-1, rows[:, 1:, None]).mean())
    assert evaluate(path, length=LENGTH, chunks=CHUNKS).perplexity.mean == pytest.approx(
        math.exp(mean), rel=1e-4
    )
