"""Schemes chosen layer by layer for a size: what each would lose, what is chosen, and that the job goes on as
any other does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import quant
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import open_checkpoint
from quant.errors import NothingFits, Problems, QuantError, UsageError
from quant.pipeline import mixing, survey
from quant.pipeline.activation_store import ActivationStore
from quant.pipeline.candidates import candidates, family
from quant.pipeline.gradients import GradientStream, Seen
from quant.pipeline.manager import QuantizationManager
from quant.planning.fitting import fitting_bytes
from quant.planning.request import EngineRequest
from quant.progress import silent
from quant.quantizers.nearest import round_to_nearest
from quant.report.files import RECIPE
from tests.helpers import files_of, quantize, recipe, short_text, weight_files

TEXT: dict[str, Any] = {"samples": 16, "sequence_length": 64}


def mixed(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    """A job that is to reach a size."""
    values = {
        "method": "minmax",
        "effort": "balanced",  # as it is where none of both is typed
        "target_bits": 5.0,
        "calibration_dataset": [short_text()],
        **TEXT,
        **options,
    }
    return quantize(model, output, **values)


@pytest.fixture(scope="module")
def done(tinylm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("mixed") / "output"
    return output, mixed(tinylm, output)


def test_a_choice_has_the_bits_and_comes_out_of_several_schemes(done: tuple[Path, dict[str, Any]]) -> None:
    output, report = done
    chosen = report["allocation"]
    assert 4.9 < report["bits_per_weight"] <= 5.0
    assert report["scheme"]["name"] == "mixed" and chosen["mixed"] and chosen["gap"] == 0
    assert not output.with_name("output.choice.work").exists()
    layers = {x["name"]: x for x in chosen["layers"]}
    assert len(layers) == 4 * 4
    # vLLM's layers are items: their linears are alike, which verification demands too
    kinds = {x["name"]: x["scheme"] for x in report["layers"]}
    for block in range(4):
        attention = f"model.layers.{block}.self_attn"
        assert len({kinds[f"{attention}.{x}_proj"] for x in "qkv"}) == 1
        assert f"{attention}.qkv_proj" in layers
    # more bits never lose more of what the choice is made by, among the schemes that are on the hull
    for layer in layers.values():
        eight = next(c for c in layer["choices"] if c["scheme"] == "w8a16 by channel")
        assert all(c["nats"] > eight["nats"] for c in layer["choices"] if c["bits"] < 8)
        assert layer["choices"][-1] == {"scheme": "16 bits", "bits": 16.0, "nats": 0.0}
    assert sum(x["nats"] for x in layers.values()) == pytest.approx(chosen["summed"])


def test_what_is_predicted_is_what_is_measured(done: tuple[Path, dict[str, Any]], tinylm: Path) -> None:
    output, report = done
    chosen = report["allocation"]
    assert chosen["judged_apart"] and chosen["measured"]["mean"] < chosen["uniform"]["measured"]["mean"]
    assert chosen["predicted"] == pytest.approx(chosen["measured"]["mean"], rel=0.2)
    # and the checkpoint itself is as good on another text
    found = quant.evaluate(output, against=tinylm, length=64, chunks=40).kl
    assert found is not None and found.mean == pytest.approx(chosen["measured"]["mean"], rel=0.35)


def test_the_recipe_beside_an_output_makes_it_again(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output, report = done
    values = yaml.safe_load((output / RECIPE).read_text())
    assert not values.keys() & {"target_bits", "effort"} and len(values["rules"]) > 1
    again = quant.quantize(quant.make_recipe({**values, "output_path": tmp_path / "again"}))
    assert again.output_hash == report["output_hash"]
    assert weight_files(tmp_path / "again") == weight_files(output)
    assert again.quantization is not None and again.quantization.allocation is None
    assert again.quantization.calibration is None  # the text was for the choice alone


def test_the_page_shows_what_each_layer_might_have_been(done: tuple[Path, dict[str, Any]]) -> None:
    page = (done[0] / "quant_report.html").read_text()
    part = page[page.index("<h2>Bits by layer</h2>") : page.index("<h2>Bits and bytes</h2>")]
    assert part.count("<circle") == part.count('opacity="0.35"') == 16
    assert "model.layers.3.self_attn.qkv_proj" in part and "w8a16 by channel" in part


def test_losses_are_those_of_both_hessians(llama: Path, tmp_path: Path) -> None:
    """Against the formula written out, of sums made apart."""
    job = recipe(llama, tmp_path / "o", target_bits=5.0, calibration_dataset=[short_text()], **TEXT)
    prepared = mixing.prepare(job)
    manager = QuantizationManager(prepared.plan)
    rows, skeleton = manager.prepare()
    work = WorkFolder(tmp_path / "w", {}, False)
    found = survey.Survey(manager, prepared.pool, prepared.items, work, silent).run(
        skeleton, rows.tokens, rows.held_out
    )
    work.release()
    store = ActivationStore(1 << 30, None)
    stream = GradientStream(skeleton, [*rows.tokens.split(8)], None, store, 0)
    for index in range(2):
        stream.forward(index, skeleton.load_block(index))
    stream.at_logits()
    seen = Seen({n: (x, survey.BOTH) for n, x in skeleton.linears(1).items()})
    stream.backward(1, skeleton.load_block(1), seen)
    store.close()
    checked = 0
    for name, statistics in seen.finish().items():
        weight = skeleton.linears(1)[name].get(skeleton.blocks[1]).float()
        assert statistics.hessian is not None and statistics.gradients is not None
        inputs, outputs = statistics.hessian.double(), statistics.gradients[0].double()[: len(weight)]
        outputs = outputs[:, : len(weight)]
        for candidate, lost in zip(prepared.pool, found[f"model.layers.1.{name}"], strict=True):
            if candidate.assignment is None:
                assert lost == 0
            elif lost is not None:
                made = round_to_nearest(weight.clone(), candidate.assignment.scheme.weights, torch.bfloat16)
                errors = (weight - made.dequantize()).double()
                wanted = float(torch.trace(outputs @ errors @ inputs @ errors.t()) / (2 * inputs.trace()))
                assert lost == pytest.approx(wanted, rel=0.01), (name, candidate.label)
                checked += 1
    assert checked > 30


def test_a_job_that_stopped_anywhere_goes_on_and_makes_the_same_bytes(
    tinylm: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[int] = []
    real = survey.Survey._solve

    def stops(self: Any, skeleton: Any, index: int, *rest: Any) -> Any:
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(index)
        return real(self, skeleton, index, *rest)

    output = tmp_path / "output"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(survey.Survey, "_solve", stops)
        mixed(tinylm, output)
    assert solved == [3, 2]

    def counts(self: Any, skeleton: Any, index: int, *rest: Any) -> Any:
        solved.append(index)
        return real(self, skeleton, index, *rest)

    def stopped(self: Any, *rest: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(survey.Survey, "_solve", counts)
        patch.setattr("quant.pipeline.manager.finish", stopped)
        mixed(tinylm, output)
    assert solved == [3, 2, 1, 0]
    with monkeypatch.context() as patch:
        patch.setattr(survey.Survey, "_solve", stopped)
        patch.setattr(survey.Judge, "measure", stopped)
        report = mixed(tinylm, output)
    assert weight_files(output) == weight_files(done[0])
    assert report["allocation"] == done[1]["allocation"]
    assert [x.name for x in tmp_path.iterdir()] == ["output"]


def test_memory_that_ends_halves_the_batches_of_a_choice_and_keeps_what_is_finished(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, int]] = []
    real = survey.Survey._solve

    def exhausted(self: Any, skeleton: Any, index: int, *rest: Any) -> Any:
        tried.append((self.manager.workspace.batch_tokens, index))
        if index == 0 and self.manager.workspace.batch_tokens > 256:
            raise torch.OutOfMemoryError("no memory")
        return real(self, skeleton, index, *rest)

    monkeypatch.setattr(survey.Survey, "_solve", exhausted)
    report = mixed(llama, tmp_path / "o", target_bits=6.0, fresh=True)
    assert tried == [(2048, 1), (2048, 0), (64, 0)]  # a row of each of the eight parts that a job's rows have
    assert report["bits_per_weight"] <= 6.0 and [x.name for x in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize(("method", "kind"), [("yaqa", "llama"), ("gptq", "phi3")])
def test_methods_and_families(
    method: str, kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    report = mixed(checkpoints(kind), tmp_path / "o", method=method, target_bits=6.0)
    assert 5.5 < report["bits_per_weight"] <= 6.0
    assert report["methods"] == [method]
    chosen = report["allocation"]
    assert chosen["predicted"] == pytest.approx(chosen["measured"]["mean"], rel=0.3)


def test_a_size_in_bytes_counts_all_tensors(tinylm: Path, tmp_path: Path) -> None:
    size = open_checkpoint(tinylm).nbytes // 2
    report = mixed(tinylm, tmp_path / "o", target_bits=None, target_size=size)
    assert size * 0.99 < report["output_bytes"] <= size


def test_floats_that_the_target_computes_in_are_a_family_of_their_own(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Rounded inputs are part of what they lose."""
    job = recipe(
        checkpoints("llama"), tmp_path / "o", scheme="nvfp4", target_bits=7.0, gpu="B200",
        calibration_dataset=[short_text()], **TEXT,
    )  # fmt: skip
    assert [row.name for row in family(job)] == ["nvfp4", "w8a8-fp8"]
    report = quant.quantize(job).to_dict()
    labels = {x["scheme"] for x in report["allocation"]["layers"]}
    assert labels <= {"nvfp4", "w8a8-fp8", "16 bits"} and len(labels) > 1
    weights = recipe(
        checkpoints("llama"), tmp_path / "w", scheme="nvfp4a16", target_bits=7.0,
        calibration_dataset=[short_text()], **TEXT,
    )  # fmt: skip
    alone = quant.quantize(weights).to_dict()["allocation"]

    def lost(allocation: dict[str, Any]) -> float:
        return sum(x["choices"][0]["nats"] for x in allocation["layers"])

    assert lost(report["allocation"]) > 1.2 * lost(alone)


def test_a_target_without_kernels_of_a_scheme_is_not_given_it(
    tinylm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.hardware.cpu_instructions", lambda *_: None)
    job = recipe(tinylm, tmp_path / "o", method="gptq", target_bits=5.0, gpu="cpu")
    pool = mixing.prepare(job).pool
    assert [c.label for c in pool if c.label.startswith("w8")] == []
    assert pool[-1].label == "16 bits" and pool[0].label == "w4a16 by channel"


def test_what_is_out_of_reach_is_told_with_what_is_not(tinylm: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingFits, match=r"--target-bits 3: out of reach: .* give 4\.05\d* bits to 16 bits"):
        mixed(tinylm, tmp_path / "o", target_bits=3.0)
    with pytest.raises(UsageError, match="fits in 16 bits .* nothing to quantize"):
        mixed(tinylm, tmp_path / "o", target_bits=16.0)
    with pytest.raises(NothingFits, match=r"--target-size 1000: out of reach"):
        mixed(tinylm, tmp_path / "o", target_bits=None, target_size=1000)
    assert list(tmp_path.iterdir()) == []
    # the least that is named can be had
    said = mixing.prepare(recipe(tinylm, tmp_path / "o", target_bits=5.0)).to_dict()["reachable"][0]
    job = recipe(tinylm, tmp_path / "o", target_bits=float(said.split()[0]))
    assert mixing.prepare(job).budget.nbytes >= mixing.prepare(job).least


def test_contradictions_are_listed_together(
    tinylm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = recipe(
        tinylm, tmp_path / "o", method="gptq", target_bits=5.0, fit=True, gpu="L4", bits=4, format="gptq",
        rules=[{"layers": "0", "bits": 8}], outlier_suppression="awq", keep_quantized=True,
    )  # fmt: skip
    with pytest.raises(Problems) as wrong:
        quant.quantize(job)
    assert len(wrong.value.problems) == 6 and wrong.value.exit_code == 2
    monkeypatch.setattr(mixing, "detect", lambda: SimpleNamespace(gpus=()))
    with pytest.raises(
        Problems, match="--fit asks for .* GPU here, and there is none: name the one .*--gpu L40S"
    ):
        quant.quantize(recipe(tinylm, tmp_path / "o", method="gptq", fit=True))
    with pytest.raises(Problems, match="--context belongs to --fit"):
        quant.quantize(recipe(tinylm, tmp_path / "o", method="gptq", target_bits=5.0, context=100))
    with pytest.raises(UsageError, match="w8a8-int8.* needs smooth_quant"):
        quant.quantize(recipe(tinylm, tmp_path / "o", scheme="w8a8-int8", target_bits=9.0))


def test_a_choice_that_loses_more_than_one_scheme_for_all_is_given_up(tinylm: Path, tmp_path: Path) -> None:
    prepared = mixing.prepare(recipe(tinylm, tmp_path / "o", target_bits=5.0))
    found = [[None if s is None else 9.0 - n for n, s in enumerate(item.sizes)] for item in prepared.items]
    picks = [0] * len(prepared.items)
    uniform = mixing._best_uniform(prepared, found, {})
    assert uniform is not None
    for judged, kept in (([[2.0, 2.0], [1.0, 3.1]], True), ([[2.0, 2.0], [1.0, 2.9]], False)):
        told = mixing._told(prepared, found, picks, 0.0, uniform, judged, (2, 64), True, {})
        assert told["mixed"] is kept and told["picks"] == (picks if kept else uniform[1])
        assert any("taken instead" in note for note in told["notes"]) is not kept
    same = mixing._recipe(recipe(tinylm, tmp_path / "o"), prepared, uniform[1])
    assert same.rules == [] and same.scheme is not None


def test_room_is_what_a_gpu_has_beside_the_requests() -> None:
    model = "meta-llama/Llama-3.1-8B-Instruct"
    room = {
        (gpu, context): fitting_bytes(model, gpu, EngineRequest(context=context), "w4a16")
        for gpu in ("RTX 4070", "L4", "2xL4")
        for context in (4096, 16384)
    }
    gib = 2**30
    assert 6 * gib < room["RTX 4070", 4096] < 9 * gib < 15 * gib < room["L4", 4096] < 18 * gib
    assert room["2xL4", 4096] > 1.9 * room["L4", 4096]
    # 12288 more tokens of 32 layers with 8 heads of 128, K and V in bf16
    cache = 12288 * 32 * 8 * 128 * 2 * 2
    assert room["L4", 4096] - room["L4", 16384] == pytest.approx(cache, rel=0.05)
    with pytest.raises(NothingFits):
        fitting_bytes("meta-llama/Llama-3.1-70B-Instruct", "L4", EngineRequest(), "w4a16")


def test_a_model_that_no_gradient_goes_through_is_refused_before_anything_is_kept(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixing, "gradient_problem", lambda *_: "no gradient reaches block 1")
    with pytest.raises(QuantError, match="no gradient reaches block 1: --target-bits needs gradients"):
        mixed(checkpoints("llama"), tmp_path / "o")
    monkeypatch.setattr("quant.pipeline.manager.gradient_problem", lambda *_: "no gradient reaches block 2")
    with pytest.raises(QuantError, match="no gradient reaches block 2: --target-bits needs gradients"):
        mixed(checkpoints("llama"), tmp_path / "o", method="yaqa")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_would_be_chosen_among_and_writes_nothing(
    llama: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("quantize", "-m", llama, "--method", "minmax", "--target-bits", "5.5", "--samples", "4")
    asked += ("--sequence-length", "64", "--calibration-dataset", short_text())
    said = cli(*asked, "--dry-run", "--json")
    assert said.code == 0, said.err
    value = json.loads(said.out)
    assert value["allocation"]["layers"] == 8 and value["allocation"]["seconds"] > 0
    assert value["allocation"]["candidates"][-1] == "16 bits"
    assert list(tmp_path.iterdir()) == []
    made = cli(*asked, "-o", tmp_path / "o", "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["allocation"]["target"] == "--target-bits 5.5"
    assert "w4a16" in made.err and "predicted KL" in made.err
    assert RECIPE in files_of(tmp_path / "o")


def test_asked_for_symmetry_is_kept(tinylm: Path, tmp_path: Path) -> None:
    def labels(**options: Any) -> set[str]:
        job = recipe(tinylm, tmp_path / "o", target_bits=5.0, **options)
        return {c.label.split()[0] for c in mixing.prepare(job).pool}

    assert labels() == {"w4a16", "w4a16-asym", "w8a16", "16"}
    assert labels(symmetric=True) == labels(scheme="w4a16") == {"w4a16", "w8a16", "16"}
    assert labels(symmetric=False) == labels(scheme="w4a16-asym") == {"w4a16-asym", "w8a16", "16"}
    job = recipe(tinylm, tmp_path / "o", method="hqq", target_bits=5.0)
    assert {c.label.split()[0] for c in candidates(job, mixing.prepare(job).plan)} >= {"w4a16-asym", "16"}


def test_layers_that_no_token_reaches_get_the_finest_scheme(tinylm: Path, tmp_path: Path) -> None:
    job = recipe(tinylm, tmp_path / "o", target_bits=6.0, calibration_dataset=[short_text()], **TEXT)
    prepared = mixing.prepare(job)
    losses = {
        name: [None if s is None else 1.0 for s in item.sizes[:-1]] + [0.0]
        for item in prepared.items[1:]
        for name in item.linears
    }
    found = mixing.item_losses(prepared, losses)
    assert found[0][-1] is None and found[1][-1] == 0
