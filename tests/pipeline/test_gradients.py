"""The streamed backward pass against autograd through the whole model, and jobs that go by it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quant
from quant.calibration.statistics import Statistics
from quant.checkpoint.reader import open_checkpoint
from quant.errors import Problems, QuantError, UsageError
from quant.models.skeleton import Skeleton
from quant.pipeline import gradients as module
from quant.pipeline.activation_store import ActivationStore
from quant.pipeline.estimate import estimate
from quant.pipeline.gradients import (
    GradientStream,
    Seen,
    gradient_problem,
    kl_gradient,
    ordered_sums,
)
from quant.pipeline.plan import plan_job
from quant.progress import Event
from quant.quantizers import YAQAQuantizer
from tests.helpers import (
    copy_model,
    load_all,
    quantize,
    randomize,
    recipe,
    save_all,
    save_model,
    short_text,
    weight_files,
)
from tests.models.built import built_model
from tests.pipeline.test_resume import command

#: A job of the tiny models.
YAQA: dict[str, Any] = {"method": "yaqa", "group_size": 32}


def test_a_draw_at_the_logits_has_the_hessian_of_kl_for_its_covariance() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.5]).expand(200_000, 4)
    draws = kl_gradient(logits, torch.Generator().manual_seed(0))
    p = logits[0].softmax(-1)
    wanted = p.diag() - torch.outer(p, p)
    assert float((draws.t() @ draws / len(draws) - wanted).abs().max()) < 0.003
    assert float(draws.mean(0).abs().max()) < 0.003


def draws_of(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Gradients at logits [B, T, V], each row's by the seed after that of the one before."""
    return torch.stack(
        [kl_gradient(row, torch.Generator().manual_seed(seed + i)) for i, row in enumerate(logits)]
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_has_the_draw_of_its_number_in_batches_of_any_size(
    rows: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that goes on with smaller batches, or is killed afterwards, has the gradients of one that does
    not; slices of a row, whose logits do not fit, leave none out."""
    skeleton = Skeleton(open_checkpoint(llama), torch.device("cpu"), torch.float32)
    monkeypatch.setattr("quant.pipeline.gradients.LOGITS", skeleton.vocabulary * 7)
    tokens = torch.randint(0, 500, (6, 16), generator=torch.Generator().manual_seed(1))
    made = []
    for several in (6, rows):
        store = ActivationStore(1 << 30, None)
        stream = GradientStream(skeleton, [*tokens.split(several)], None, store, seed=5)
        stream.at_logits()
        assert stream._gradients is not None
        made.append(torch.cat([stream._gradients.take(i) for i in range(len(stream._gradients))]))
        store.close()
    assert torch.equal(*made)
    assert len({float(row.norm()) for row in made[0]}) == 6


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie": True}),
        ("gemma2", {}),
        ("qwen3", {}),
        ("phi3", {}),
        ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.7}),
        ("gpt2", {}),
    ],
)
def test_sums_are_those_of_autograd_through_the_whole_model(
    kind: str, settings: dict[str, Any], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = checkpoints(kind, dtype=torch.float32, **settings)
    skeleton = Skeleton(open_checkpoint(path), torch.device("cpu"))
    tokens = [*torch.randint(0, 500, (4, 24), generator=torch.Generator().manual_seed(1)).split(2)]
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    names = {
        f"{skeleton.blocks_path}.{i}.{x.module}": (i, n)
        for i in range(skeleton.block_count)
        for n, x in skeleton.linears(i).items()
    }
    for name in names:

        def note(_: Any, args: Any, output: torch.Tensor, name: str = name) -> None:
            inputs = args[0].detach()
            output.register_hook(lambda g: seen.setdefault(name, []).append((inputs, g)))

        whole.get_submodule(name).register_forward_hook(note)
    for batch, ids in enumerate(tokens):
        embedded = whole.get_input_embeddings()(ids).detach().requires_grad_()
        logits = whole(inputs_embeds=embedded, use_cache=False).logits
        logits.backward(draws_of(logits.detach(), 5 + 2 * batch))
    store = ActivationStore(1 << 14, tmp_path / "scratch")  # most of it goes to the file
    stream = GradientStream(skeleton, tokens, None, store, seed=5)
    needs = frozenset({"hessian", "gradients"})
    try:
        for index in range(skeleton.block_count):
            stream.forward(index, skeleton.load_block(index))
            skeleton.free_block(index)
        stream.at_logits()
        found = {}
        for index in reversed(range(skeleton.block_count)):
            shown = Seen({n: (x, needs) for n, x in skeleton.linears(index).items()})
            stream.backward(index, skeleton.load_block(index), shown)
            skeleton.free_block(index)
            found |= {(index, n): s for n, s in shown.finish().items()}
        assert store.spilled_bytes
    finally:
        store.close()
    checked = 0
    for name, (index, linear) in names.items():
        made, place = found[index, linear], skeleton.linears(index)[linear].place
        x, g = (torch.cat(t).flatten(0, 1) for t in zip(*seen[name], strict=True))
        if place is not None and place.count:
            g = g[:, place.first : place.first + place.step * place.count : place.step]
        wanted = (x * g.norm(dim=1, keepdim=True)).t() @ (x * g.norm(dim=1, keepdim=True)) / len(x)
        assert made.tokens == len(x) == 96
        # inputs are summed as 8-bit numbers
        assert made.hessian is not None and made.gradients is not None
        assert float((made.hessian - wanted).norm() / wanted.norm()) < 0.02
        g = g * x.norm(dim=1, keepdim=True)
        size = made.gradients.shape[1]
        for i, block in enumerate(made.gradients):
            part = g[:, i * size : (i + 1) * size]
            wanted = part.t() @ part / len(x)
            used = wanted.shape[0]
            assert float((block[:used, :used] - wanted).norm() / wanted.norm()) < 0.02
        checked += 1
    assert checked >= 4 * skeleton.block_count


def test_several_draws_are_summed_as_their_mean_and_count_their_tokens_once(llama: Path) -> None:
    skeleton = Skeleton(open_checkpoint(llama), torch.device("cpu"), torch.float32)
    tokens = torch.randint(0, 500, (3, 16), generator=torch.Generator().manual_seed(1))
    last = skeleton.block_count - 1

    def shown(seed: int, draws: int, several: int) -> dict[str, Statistics]:
        store = ActivationStore(1 << 30, None)
        stream = GradientStream(skeleton, [*tokens.split(several)], None, store, seed, draws)
        for index in range(last + 1):
            stream.forward(index, skeleton.load_block(index))
        stream.at_logits()
        for index in (last, last - 1):
            seen = Seen(
                {n: (x, frozenset({"hessian", "gradients"})) for n, x in skeleton.linears(index).items()}
            )
            stream.backward(index, skeleton.load_block(index), seen)
        store.close()
        return seen.finish()

    both, apart = shown(5, 2, 2), [shown(5, 1, 3), shown(5 + (1 << 20), 1, 3)]
    for name, made in both.items():
        one, other = (found[name] for found in apart)
        assert made.tokens == one.tokens == 48
        for a, b, c in zip(*((x.hessian, x.gradients) for x in (made, one, other)), strict=True):
            assert a is not None and b is not None and c is not None
            assert float((a - (b + c) / 2).norm() / a.norm()) < 0.02
            assert float((a - b).norm() / a.norm()) > 0.05


def test_slices_of_the_logits_change_nothing_but_the_draws(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice of tokens goes through the model's own norm and head as the whole row does."""
    skeleton = Skeleton(open_checkpoint(llama), torch.device("cpu"), torch.float32)
    tokens = torch.arange(12)[None]
    hidden = torch.randn(1, 12, skeleton.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def constant(logits: torch.Tensor) -> torch.Tensor:
        return torch.softmax(logits, -1)

    with skeleton.outside():
        whole = skeleton.head_gradient(tokens, hidden, constant)
        parts = [
            skeleton.head_gradient(tokens[:, i : i + 5], hidden[:, i : i + 5], constant) for i in (0, 5, 10)
        ]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)


def test_a_gpu_adds_in_order_while_gradients_are_taken_and_as_before_afterwards() -> None:
    for device, inside in (("cpu", False), ("cuda", True)):
        with pytest.raises(ValueError, match="interrupted"), ordered_sums(torch.device(device)):
            assert torch.are_deterministic_algorithms_enabled() == inside
            raise ValueError("interrupted")
        assert not torch.are_deterministic_algorithms_enabled()


class Stopped(Exception):
    """What the tests stop a job with."""


@pytest.mark.parametrize("phase", ["forward", "at_logits", "backward", "solve"])
def test_a_job_stopped_in_any_phase_goes_on_to_the_same_bytes(
    phase: str, checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints("llama", num_hidden_layers=3)
    wanted = quantize(source, tmp_path / "undisturbed", **YAQA)
    calls: list[int] = []
    place: Any = GradientStream if phase != "solve" else YAQAQuantizer
    name = phase if phase != "solve" else "many"
    inner = getattr(place, name)

    def stopping(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if phase == "at_logits" else 10 if phase == "solve" else 2):
            raise Stopped
        return inner(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(place, name, stopping)
        quantize(source, tmp_path / "stopped", **YAQA)
    journal = tmp_path / "stopped.work" / "journal.jsonl"
    # the last block comes first
    assert journal.exists() == (phase in ("backward", "solve"))
    assert not journal.exists() or "000002" in journal.read_text() or "layers.2" in journal.read_text()
    found = quantize(source, tmp_path / "stopped", **YAQA)
    assert found["output_hash"] == wanted["output_hash"]
    assert weight_files(tmp_path / "stopped") == weight_files(tmp_path / "undisturbed")
    assert [{k: v for k, v in x.items() if k != "seconds"} for x in found["layers"]] == [
        {k: v for k, v in x.items() if k != "seconds"} for x in wanted["layers"]
    ]


def test_a_process_killed_in_the_middle_is_resumed_to_the_same_bytes(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoints("llama", num_hidden_layers=6)
    options = YAQA | {"samples": 16, "sequence_length": 128, "calibration_dataset": short_text()}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": environment}
    job = subprocess.Popen(command(source, tmp_path / "out", **options), **quiet)
    journal = tmp_path / "out.work" / "journal.jsonl"
    deadline = time.monotonic() + 240
    while not (journal.exists() and journal.read_text().count("\n") > 2):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    hashes = []
    for output in ("out", "undisturbed"):
        done = subprocess.run(command(source, tmp_path / output, **options), check=True, **quiet)
        hashes.append(json.loads(done.stdout)["output_hash"])
    assert hashes[0] == hashes[1]
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": False, "bits": 3, "format": "plain"},
        {"group_size": -1},
        {"scheme": "w8a8-int8", "group_size": ...},
        {"scheme": "w8a8-fp8", "group_size": ...},
        {"scheme": "nvfp4", "group_size": ...},
        {"scheme": "mxfp4a16", "group_size": ..., "target": "other"},
        {"outlier_suppression": "awq", "format": "gptq"},
        {"rules": [{"layers": "0", "method": "gptq"}, {"layers": "*.o_proj", "method": "minmax"}]},
        {"layers": "1"},
        {"kv_cache_scheme": "fp8", "sequence_length": 100},  # longer than what one kernel takes
    ],
    ids=str,
)
def test_it_goes_with_what_gptq_goes_with(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    options = {k: v for k, v in (YAQA | options).items() if v is not ...}
    report = quantize(llama, tmp_path / "out", **options)
    assert report["verify"]["passed"]
    for layer in report["layers"]:
        if layer["method"] == "yaqa":
            assert any("nats per token" in note for note in layer["notes"]) and layer["fallback"] is None
            assert layer["error"] is not None and layer["tokens"] == 8 * options.get("sequence_length", 64)
    if "outlier_suppression" in options:
        assert report["folds"]


@pytest.mark.parametrize("suppressor", ["none", "awq"])
def test_linears_that_are_fused_get_one_number_for_the_whole_tensor(
    suppressor: str, llama: Path, tmp_path: Path
) -> None:
    options = YAQA | {"group_size": ..., "scheme": "nvfp4a16", "outlier_suppression": suppressor}
    quantize(llama, tmp_path / "out", **{k: v for k, v in options.items() if v is not ...})
    tensors = load_all(tmp_path / "out")
    for block in range(2):
        for fused in (("q", "k", "v"), ("gate", "up")):
            part = "self_attn" if len(fused) == 3 else "mlp"
            numbers = {
                float(tensors[f"model.layers.{block}.{part}.{x}_proj.weight_global_scale"]) for x in fused
            }
            assert len(numbers) == 1


def test_scaling_that_is_folded_in_changes_little_of_what_the_model_computes(
    llama: Path, tmp_path: Path
) -> None:
    """Every linear that reads a norm is divided by the same factors."""
    quantize(llama, tmp_path / "plain", **YAQA, bits=8, format="plain")
    quantize(llama, tmp_path / "scaled", **YAQA, bits=8, format="plain", outlier_suppression="awq")
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(60)[None]
    wanted, plain, scaled = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(tokens).logits.detach()
        for p in (llama, tmp_path / "plain", tmp_path / "scaled")
    )
    assert float((plain - wanted).norm() / wanted.norm()) < 0.05
    assert float((scaled - wanted).norm() / wanted.norm()) < 0.05


def test_rows_are_those_of_the_gradients(llama: Path, tmp_path: Path) -> None:
    report = quantize(llama, tmp_path / "few", **YAQA, gradient_samples=3)
    assert report["calibration"]["rows"] == 3 and report["layers"][0]["tokens"] == 3 * 64
    report = quantize(llama, tmp_path / "all", **(YAQA | {"samples": 70, "sequence_length": 32}))
    assert report["calibration"]["rows"] == 64
    assert "the first 64 of 70 rows are used" in report["calibration"]["notes"][-1]
    few = {"samples": 3, "gradient_samples": 9, "sequence_length": 32}
    report = quantize(llama, tmp_path / "less", **(YAQA | few))
    assert "gradients take all 3 rows" in report["calibration"]["notes"][-1]
    with pytest.raises(Problems, match="--gradient-samples belongs to --method yaqa"):
        quantize(llama, tmp_path / "gptq", method="gptq", group_size=32, gradient_samples=3)


def test_outputs_feed_back_on_as_many_as_are_asked_for(llama: Path, tmp_path: Path) -> None:
    said = {}
    for outputs in (16, 1024):
        report = quantize(llama, tmp_path / str(outputs), **YAQA, options={"outputs": outputs})
        said[outputs] = [" ".join(layer["notes"]) for layer in report["layers"]]
    assert all("its outputs feed back among 16 at a time" in notes for notes in said[16])
    assert not any("at a time" in notes for notes in said[1024])
    with pytest.raises(UsageError, match="outputs is 0: must be from 1 to 4096"):
        quantize(llama, tmp_path / "none", **YAQA, options={"outputs": 0})


def test_what_gradients_do_not_go_through_is_refused_before_any_work(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    model = built_model("gemma3n").bfloat16()
    randomize(model)
    shared = save_model(model, tmp_path / "shared")
    with pytest.raises(
        QuantError, match=r"model.layers.\d reads what earlier blocks leave.*use --method gptq"
    ):
        quantize(shared, tmp_path / "out", **YAQA, target="other")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("method", ["minmax", "gptq"])
def test_experts_may_have_a_method_of_their_own(
    method: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Whether it asks for what the pass shows of them or not."""
    rules = [{"layers": "*.experts.*", "method": method}]
    report = quantize(checkpoints("mixtral"), tmp_path / "mixed", **YAQA, rules=rules, target="other")
    assert {x["method"] for x in report["layers"] if ".experts." in x["name"]} == {method}
    assert {x["method"] for x in report["layers"] if ".experts." not in x["name"]} == {"yaqa"}
    assert not any(x["fallback"] for x in report["layers"])
    assert len(report["experts"]) == (2 if method == "gptq" else 0)


def test_a_block_that_cuts_the_graph_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = Skeleton(open_checkpoint(llama), torch.device("cpu"))
    call, needs = module.call_block, frozenset({"hessian", "gradients"})
    monkeypatch.setattr(module, "call_block", lambda *args: call(*args).detach())
    problem = gradient_problem(
        skeleton, lambda index: Seen({n: (x, needs) for n, x in skeleton.linears(index).items()})
    )
    assert problem is not None and problem.startswith("no gradient can be taken through model.layers.0")


def test_what_overflows_is_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = copy_model(llama, tmp_path / "broken")
    tensors = load_all(broken)
    tensors["model.layers.0.input_layernorm.weight"].fill_(1e38)
    save_all(broken, tensors)
    with pytest.raises(QuantError, match=r"model\.layers\.0 are not finite.*use --method gptq"):
        quantize(broken, tmp_path / "out", **YAQA)
    through, drawn, call = module._through, module.kl_gradient, module.call_block

    def overflowing(block: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        made = through(block, hidden, *rest)
        return made * (torch.inf if hidden.shape[1] == 64 else 1)  # not in the trial

    monkeypatch.setattr(module, "_through", overflowing)
    with pytest.raises(QuantError, match=r"^model\.layers\.1: the gradients at its inputs hold NaN"):
        quantize(llama, tmp_path / "out", **YAQA)
    monkeypatch.setattr(module, "kl_gradient", lambda *args, **options: drawn(*args, **options) * torch.nan)
    with pytest.raises(QuantError, match="^the head: the gradients at its inputs hold NaN"):
        quantize(llama, tmp_path / "out", **YAQA)
    monkeypatch.setattr(
        module, "call_block", lambda *args: call(*args) * (1e38 if args[1].shape[1] == 64 else 1)
    )
    with pytest.raises(QuantError, match=r"^model\.layers\.[01]: its outputs hold NaN or infinity"):
        quantize(llama, tmp_path / "out", **YAQA)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_gradients_that_say_little_or_nothing_are_named(llama: Path, tmp_path: Path) -> None:
    """Products of them that overflow, none at all, those of a few tokens."""
    broken = copy_model(llama, tmp_path / "broken")
    tensors = load_all(broken)
    tensors["lm_head.weight"] *= 1e37
    save_all(broken, tensors)
    with pytest.raises(QuantError, match="gradients at its outputs hold NaN or inf.*gptq needs no gradients"):
        quantize(broken, tmp_path / "out", **YAQA)
    tensors["lm_head.weight"].zero_()
    save_all(broken, tensors)
    report = quantize(broken, tmp_path / "none", **YAQA)
    assert all("zero on all calibration tokens" in x["fallback"] for x in report["layers"])
    few = {"samples": 1, "gradient_samples": 1, "sequence_length": 48}
    said: list[Event] = []
    report = quant.quantize(recipe(llama, tmp_path / "few", **(YAQA | few)), said.append).to_dict()
    # of all layers once, as they are made; the report has each
    assert len([e for e in said if e.warning and "48 tokens show how" in e.message]) == 1
    for layer in report["layers"]:
        assert layer["fallback"].startswith("48 tokens show how ") and layer["notes"]


def test_a_dry_run_predicts_the_scratch_file_and_more_time_than_none(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.pipeline.workspace.RESIDENT_CPU", 1 << 16)
    source = checkpoints("llama", num_hidden_layers=3)
    options = YAQA | {"samples": 32, "sequence_length": 128}
    predicted = estimate(plan_job(recipe(source, tmp_path / "out", **options)))
    report = quantize(source, tmp_path / "out", **options)
    assert predicted["calibration_tokens"] == 32 * 128 and predicted["tried"]
    assert predicted["scratch_bytes"] == pytest.approx(report["scratch_bytes"], rel=0.3)
    assert predicted["seconds"] > 0.2 * report["seconds"]["total"]
    monkeypatch.setattr("quant.pipeline.estimate.TRIAL_SECONDS", 0.0)
    monkeypatch.setattr("quant.pipeline.estimate._FEW", 0)
    counted = estimate(plan_job(recipe(source, tmp_path / "other", **options)))
    assert not counted["tried"] and counted["seconds"] > 0 and counted["peak_rss_bytes"] > 0
