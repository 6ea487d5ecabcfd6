"""A student taught by its source: it comes nearer on text that it was not taught with, keeps its codes, and a
killed lesson goes on to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.checkpoint.reader import open_checkpoint
from quant.distillation import Distillation, distill, run
from quant.distillation.teacher import LIKELIEST, coarsened, divergence
from quant.errors import Problems, QuantError, UsageError
from quant.evaluation.quality import Runner, Source, run_both
from quant.evaluation.verify import verify
from quant.pipeline.gguf import export_gguf
from quant.pruning import Depth, drop_blocks
from quant.report import page
from quant.report.value import Report
from tests.helpers import TINYLM, change_config, copy_model, load_all, make_checkpoint, quantize

SHORT = {"samples": 8, "held_out": 3, "sequence_length": 64, "steps": 6, "judge_every": 3}


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model without one of its blocks."""
    path = tmp_path_factory.mktemp("shorter") / "model"
    drop_blocks(TINYLM, path, Depth(blocks=(3,)))
    return path


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in four bits."""
    path = tmp_path_factory.mktemp("rounded") / "model"
    quantize(TINYLM, path, method="minmax", bits=4, group_size=64)
    return path


def kl(path: Path, rows: torch.Tensor) -> float:
    """Of the whole distributions, as evaluate has it."""
    device = torch.device("cpu")
    source = Source(TINYLM, length=rows.shape[1])
    found = run_both(Runner(open_checkpoint(path), device), source, rows, device, lambda e: None)
    assert found.kl is not None
    return float(found.kl.double().mean())


def held_out(path: Path) -> torch.Tensor:
    how = Distillation(**SHORT)
    return run._rows(open_checkpoint(path), how).tokens[-how.held_out :]


def test_what_is_kept_of_a_distribution_bounds_the_divergence_from_below() -> None:
    generator = torch.Generator().manual_seed(1)
    for size, exact in ((LIKELIEST, True), (4 * LIKELIEST, False)):
        p, q = (torch.randn(50, size, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
        for temperature in (1.0, 2.5):
            whole = torch.nn.functional.kl_div(
                torch.log_softmax(q / temperature, -1),
                torch.log_softmax(p / temperature, -1),
                reduction="none",
                log_target=True,
            ).sum(-1)
            found = divergence(coarsened(p, temperature), q, temperature)
            if exact:
                torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
            else:
                assert bool((found <= whole + 1e-9).all()) and float(found.mean()) > 0.5 * float(whole.mean())
    same = divergence(coarsened(p, 1.0), p)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-9, rtol=0)


def test_a_pruned_model_comes_nearer_on_text_that_it_was_not_taught_with(
    shorter: Path, tmp_path: Path
) -> None:
    report = distill(shorter, TINYLM, tmp_path / "out", Distillation(**SHORT))
    done = report.teaching
    assert done is not None and done.before is not None and done.after is not None
    rows = held_out(shorter)
    before, after = kl(shorter, rows), kl(tmp_path / "out", rows)
    assert after < 0.85 * before
    # the report's are of the likeliest tokens and the rest, which is a little less
    assert 0.75 * before < done.before <= before
    assert 0.75 * after < done.after <= after
    verified = verify(tmp_path / "out", source=shorter)
    assert verified.passed and any(f"{len(done.changed)} taught" in c.detail for c in verified.checks)
    noisy = copy_model(tmp_path / "out", tmp_path / "noisy")
    name = "model.embed_tokens.weight"
    file = open_checkpoint(noisy).info(name).file
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name] + 0.1}, file, metadata={"format": "pt"})
    said = f"values of its own: {len(done.changed)} were trained by a teacher: the source does not tell"
    assert name in done.changed and any(p.startswith(said) for p in verify(noisy, source=shorter).failed)
    assert Report.load(tmp_path / "out").teaching == done  # type: ignore[union-attr]
    assert [p.name for p in (tmp_path / "out").glob("*teacher*")] == []
    assert "held-out KL to it" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 4, "symmetric": False},
        {"bits": 3, "format": "gptq", "target": "other"},
        {"bits": 4, "symmetric": False, "format": "awq"},
    ],
    ids=["symmetric", "asymmetric", "three bits", "awq"],
)
def test_a_quantized_model_keeps_its_codes(options: dict[str, Any], tmp_path: Path) -> None:
    quantize(TINYLM, tmp_path / "student", method="minmax", group_size=64, **options)
    report = distill(tmp_path / "student", TINYLM, tmp_path / "out", Distillation(**SHORT))
    before, after = load_all(tmp_path / "student"), load_all(tmp_path / "out")
    assert before.keys() == after.keys()
    different = {n for n in before if not torch.equal(before[n], after[n])}
    assert report.teaching is not None and different == set(report.teaching.changed)
    assert all("scale" in n or "norm" in n for n in different)
    assert sum("scale" in n for n in different) > 10 and any("norm" in n for n in different)
    assert all(before[n].dtype == after[n].dtype and before[n].shape == after[n].shape for n in before)
    target = options.get("target", "vllm")
    assert report.teaching.target == target and (report.serve_command is None) == (target == "other")
    assert verify(tmp_path / "out", source=tmp_path / "student", target=target).passed
    assert verify(tmp_path / "out", source=TINYLM, target=target).passed
    assert report.teaching.after is not None and report.teaching.before is not None
    assert report.teaching.after < report.teaching.before
    rows = held_out(TINYLM)
    assert kl(tmp_path / "out", rows) < kl(tmp_path / "student", rows)


def test_a_lesson_that_died_goes_on_to_the_same_bytes(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Distillation(**SHORT, train="numbers")
    wanted = distill(rounded, TINYLM, tmp_path / "whole", how)
    monkeypatch.setattr(run, "_KEPT_EVERY", 0.0)
    step, died = run._Lesson._one, []

    def dying(self: Any) -> float:
        if self.step in (2, 5) and self.step not in died:
            died.append(self.step)
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(run._Lesson, "_one", dying)
    asked = []
    ask = run.Teacher.ask
    monkeypatch.setattr(run.Teacher, "ask", lambda self, *a: (asked.append(1), ask(self, *a)))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            distill(rounded, TINYLM, tmp_path / "out", how)
    report = distill(rounded, TINYLM, tmp_path / "out", how)
    assert died == [2, 5] and len(asked) == 1  # the teacher was not asked again
    assert report.output_hash == wanted.output_hash
    assert report.teaching is not None and wanted.teaching is not None
    assert report.teaching.judged == wanted.teaching.judged
    assert report.teaching.losses == wanted.teaching.losses
    with pytest.raises(QuantError, match="another job"):
        (tmp_path / "out2").mkdir()
        monkeypatch.setattr(run._Lesson, "_one", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            distill(rounded, TINYLM, tmp_path / "out2", how)
        distill(rounded, TINYLM, tmp_path / "out2", Distillation(**{**SHORT, "steps": 7}))


def test_it_ends_when_nothing_is_gained_and_keeps_the_best(shorter: Path, tmp_path: Path) -> None:
    how = Distillation(**{**SHORT, "steps": 40, "judge_every": 1}, patience=2, learning_rate=0.5)
    done = distill(shorter, TINYLM, tmp_path / "out", how).teaching
    assert done is not None and done.steps < 10 and done.after is not None
    assert done.after == min(kl for _, kl in done.judged) <= done.judged[0][1]
    assert len(done.losses) == done.steps and len(done.judged) == done.steps + 1
    shown = (tmp_path / "out" / "quant_report.html").read_text()
    assert "<svg" in shown and f"{done.judged[0][1]:.4f}" in shown
    rates = [Distillation(steps=100, learning_rate=1.0).rate(s, "weights") for s in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates.index(max(rates)) in (4, 5)
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[52] == pytest.approx(0.505, abs=0.02)
    assert 0.01 <= rates[-1] < 0.012


def test_a_student_like_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    done = distill(TINYLM, TINYLM, tmp_path / "out", Distillation(**{**SHORT, "steps": 1})).teaching
    assert (
        done is not None and 0 <= done.judged[0][1] < 1e-5 and done.after == min(kl for _, kl in done.judged)
    )
    assert "<svg" in (tmp_path / "out" / "quant_report.html").read_text()
    below = replace(done, judged=((0, -1e-9), (1, 0.0)))
    assert "<svg" in "".join(page._teaching(below))


def test_smaller_batches_and_running_blocks_again_teach_the_same(shorter: Path, tmp_path: Path) -> None:
    whole = distill(shorter, TINYLM, tmp_path / "a", Distillation(**SHORT, batch=4)).teaching
    parts = distill(shorter, TINYLM, tmp_path / "b", Distillation(**SHORT, batch=2, accumulate=2)).teaching
    again = distill(shorter, TINYLM, tmp_path / "c", Distillation(**SHORT, batch=4, recompute=True)).teaching
    assert whole is not None and parts is not None and again is not None
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
    assert again.losses == pytest.approx(whole.losses, rel=1e-3)


def test_the_texts_own_tokens_have_their_share_of_the_loss(shorter: Path, tmp_path: Path) -> None:
    both = distill(
        shorter, TINYLM, tmp_path / "a", Distillation(**{**SHORT, "steps": 1}, alpha=0.25, temperature=2.0)
    ).teaching
    assert both is not None
    how = Distillation(**SHORT)
    rows = run._rows(open_checkpoint(shorter), how).tokens
    training = len(rows) - how.held_out
    chosen = torch.randperm(training, generator=torch.Generator().manual_seed(0))[: how.batch]
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (shorter, TINYLM)
    )
    with torch.no_grad():
        q, p = (m(rows[chosen]).logits[:, :-1] for m in (student, teacher))
    text = torch.nn.functional.cross_entropy(q.flatten(0, 1), rows[chosen][:, 1:].flatten())
    taught = 4 * divergence(coarsened(p, 2.0), q, 2.0).mean()
    assert both.losses[0] == pytest.approx(float(0.25 * taught + 0.75 * text), rel=5e-3)


def test_hidden_states_are_held_against_those_of_the_blocks_that_they_were(tmp_path: Path) -> None:
    shorter = tmp_path / "shorter"
    drop_blocks(TINYLM, shorter, Depth(blocks=(1,)))
    assert run.matched(open_checkpoint(shorter), open_checkpoint(TINYLM)) == {0: 0, 1: 2, 2: 3}
    how = Distillation(**{**SHORT, "steps": 1}, alpha=0.5, feature_weight=3.0, recompute=True)
    plain = Distillation(**{**SHORT, "steps": 1}, alpha=0.5)
    found = [
        distill(shorter, TINYLM, tmp_path / f"{i}", h).teaching.losses[0]  # type: ignore[union-attr]
        for i, h in enumerate((how, plain))
    ]
    rows = run._rows(open_checkpoint(shorter), how).tokens
    chosen = torch.randperm(8, generator=torch.Generator().manual_seed(0))[: how.batch]
    from transformers import AutoModelForCausalLM

    states: list[dict[int, torch.Tensor]] = []
    for path in (shorter, TINYLM):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        states.append({})
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_hook(
                lambda m, a, o, i=i: states[-1].__setitem__(i, o[0] if isinstance(o, tuple) else o)
            )
        with torch.no_grad():
            model(rows[chosen], use_cache=False)
    pairs = [(states[0][i], states[1][j]) for i, j in {0: 0, 1: 2, 2: 3}.items()]
    apart = [((s - t).square().sum(-1) / t.square().sum(-1)).mean() for s, t in pairs]
    assert found[0] - found[1] == pytest.approx(3 * float(sum(apart)) / 3, rel=0.02)
    stranger = make_checkpoint(tmp_path / "stranger", "llama", num_hidden_layers=3)
    with pytest.raises(UsageError, match="no report of quant prune says which became which"):
        distill(stranger, TINYLM, tmp_path / "out", how)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_weight": float("inf")}, "--feature-weight is inf"),
        ({"steps": 0}, "--steps is 0"),
        ({"batch": -1}, "--batch is -1"),
        ({"temperature": float("nan")}, "--teacher-temperature is nan"),
        ({"alpha": 1.5}, "--teacher-share is 1.5"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0"),
        ({"held_out": 0}, "--held-out is 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Distillation(**settings)


def test_pairs_that_do_not_fit_are_refused_before_any_work(
    rounded: Path, tmp_path: Path, llama: Path
) -> None:
    with pytest.raises(Problems, match="a teacher of the same tokens is needed"):
        distill(
            llama, make_checkpoint(tmp_path / "t", "llama", vocab_size=1024), tmp_path / "out", Distillation()
        )
    with pytest.raises(QuantError, match="codes stay"):
        distill(rounded, TINYLM, tmp_path / "out", Distillation(**SHORT, train="weights"))
    export_gguf(TINYLM, tmp_path / "file.gguf", "q4_0")
    with pytest.raises(QuantError, match="is a GGUF file, .* quant export-vllm"):
        distill(tmp_path / "file.gguf", TINYLM, tmp_path / "out", Distillation(**SHORT))
    other = copy_model(TINYLM, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["the"], words["of"] = words["of"], words["the"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="differ in 2 tokens, 'of' is one"):
        distill(TINYLM, other, tmp_path / "out", Distillation(**SHORT))
    with pytest.raises(Problems, match="inside|is not empty|source"):
        distill(TINYLM, other, other / "out", Distillation(**SHORT))
    damaged = copy_model(TINYLM, tmp_path / "damaged")
    change_config(damaged, num_hidden_layers=9)
    with pytest.raises(Problems, match="block"):
        distill(damaged, TINYLM, tmp_path / "out", Distillation(**SHORT))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_a_loss_that_overflows_ends_with_a_sentence(
    shorter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, asked = run.Student.logits, []

    def overflowing(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        asked.append(1)
        made: torch.Tensor = logits(self, tokens)
        return made * (float("inf") if len(asked) > 10 else 1.0)

    monkeypatch.setattr(run.Student, "logits", overflowing)
    with pytest.raises(QuantError, match="not finite at step 1: use a lower --learning-rate than 0.0002"):
        distill(shorter, TINYLM, tmp_path / "out", Distillation(**SHORT))


def test_the_command_says_what_was_gained(cli: Callable[..., Any], shorter: Path, tmp_path: Path) -> None:
    short = ["--samples", "4", "--held-out", "2", "--sequence-length", "32", "--steps", "2"]
    done = cli("distill", "-m", shorter, "--teacher", TINYLM, "-o", tmp_path / "out", *short)
    assert done.code == 0, done.err
    assert "held-out KL" in done.out and "all weights" in done.out
    again = cli("distill", "-m", shorter, "--teacher", TINYLM, "-o", tmp_path / "out", *short)
    assert again.code == 1 and "not empty" in again.err
    bad = cli("distill", "-m", shorter, "--teacher", TINYLM, "-o", tmp_path / "x", "--steps", "0")
    assert bad.code == 2 and "--steps is 0" in bad.err
