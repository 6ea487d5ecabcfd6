"""What a request becomes: method and scheme chosen, and what a scheme needs taken along."""

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
from quant import defaults, jobs
from quant.batch.manifest import read_manifest
from quant.batch.outputs import standing
from quant.errors import NoGradients, Problems, UsageError
from quant.pipeline.units import UnitWriter
from quant.pipeline.workspace import Workspace
from quant.planning.recommendation import Recommendation
from quant.progress import Event
from quant.recipe import Recipe, recipe_values
from quant.schemes import PRESETS, SCHEMES, ActivationScheme
from tests.helpers import TINYLM, copy_model, load_all, quantize, save_all, short_text, weight_files

TEXT: dict[str, Any] = {"samples": 8, "sequence_length": 64, "calibration_dataset": [short_text()]}
JOB = {"model_path": "m", "output_path": "o"}


def resolved(**values: Any) -> jobs.ResolvedJob:
    job = jobs.resolve({**JOB, **values})
    assert isinstance(job, jobs.ResolvedJob)
    return job


def suppressors(recipe: Recipe) -> list[str | None]:
    """Of the job, then of each rule."""
    return [recipe.outlier_suppression, *(rule.outlier_suppression for rule in recipe.rules)]


@pytest.mark.parametrize(
    ("given", "method", "scheme"),
    [
        ({"scheme": "w8a16"}, "minmax", "w8a16"),
        ({"bits": 4}, "yaqa", "w4a16"),
        ({"bits": 4, "effort": "fast"}, "gptq", "w4a16"),
        ({"bits": 4, "effort": "best"}, "yaqa", "w4a16"),
        ({"bits": 8, "effort": "best"}, "minmax", "w8a16"),
        ({"bits": 4, "act_order": "none"}, "gptq", "w4a16"),
        ({"method": "awq"}, "awq", "w4a16-asym"),
        ({"method": "fp8"}, "fp8", "w8a8-fp8"),
        ({"backend": "autoawq"}, "awq", "w4a16-asym"),
    ],
)
def test_what_is_left_open_is_chosen(given: dict[str, Any], method: str, scheme: str) -> None:
    recipe = resolved(**given).recipe
    assert (recipe.method, recipe.resolved_scheme(recipe.method).name) == (method, scheme)


def test_an_effort_is_a_method_with_its_options_and_how_many_rows_its_gradients_take() -> None:
    assert resolved(bits=4).recipe.effort == "balanced"
    assert resolved(bits=4).recipe.gradient_samples is None
    assert resolved(bits=4, effort="best", samples=99).recipe.gradient_samples == 99
    assert resolved(bits=4, effort="best", gradient_samples=7).recipe.gradient_samples == 7
    given = {"sweeps": 3}
    best = [resolved(bits=4, effort="best", **more).recipe for more in ({}, {"options": given})]
    assert [r.options for r in best] == [defaults.BEST, {**defaults.BEST, **given}]
    # negative scales are a part of the search
    assert resolved(
        bits=4, effort="best", clip_search=False
    ).recipe.options.keys() == defaults.BEST.keys() - {"signed"}
    assert resolved(bits=8, effort="best").recipe.options == resolved(bits=4).recipe.options == {}
    named = resolved(method="yaqa", bits=4).recipe
    assert named.effort is None and named.settings() == resolved(bits=4).recipe.settings()
    with pytest.raises(UsageError, match="--effort chooses the method, and --method gptq names it"):
        resolved(effort="best", method="gptq")
    with pytest.raises(UsageError, match="and --backend autoawq names it"):
        resolved(effort="fast", backend="autoawq")
    with pytest.raises(Problems, match="effort is 'most': input should be 'fast', 'balanced' or 'best'"):
        resolved(effort="most", bits=4)


def test_the_best_effort_gives_integer_inputs_zero_points_where_nothing_else_is_said() -> None:
    best = resolved(scheme="w8a8-int8", effort="best")
    inputs = best.recipe.resolved_scheme().activations
    assert inputs == ActivationScheme(symmetric=False) and any("zero point" in note for note in best.notes)
    for more in (
        {"symmetric_activations": True},
        {"activations": "static"},
        {"effort": "balanced"},
        {"scheme": "w8a8-fp8"},
        {"scheme": "w8a16"},
    ):
        other = resolved(**{"scheme": "w8a8-int8", "effort": "best", **more})
        assert other.recipe.symmetric_activations in (None, True), more
        assert not any("zero point" in note for note in other.notes)
    rule = {"layers": "*.down_proj", "scheme": "w4a16"}
    ruled = resolved(scheme="w8a8-int8", effort="best", rules=[rule]).recipe
    assert ruled.rules[0].assigned(ruled).scheme == PRESETS["w4a16"]


def test_where_no_gradients_go_through_an_effort_goes_on_without_and_a_named_method_ends(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.pipeline.manager.gradient_problem", lambda *_: "block 0 cuts the graph")
    asked = {"model_path": str(llama), "bits": 4, "group_size": 32, "gradient_samples": 4, **TEXT}
    said: list[Event] = []
    job = jobs.resolve({**asked, "output_path": str(tmp_path / "out")})
    assert isinstance(job, jobs.ResolvedJob) and job.recipe.method == "yaqa"
    assert jobs.estimate(jobs.plan(job.recipe))["method"] == "gptq"
    report = jobs.run(jobs.plan(job.recipe), said.append)
    assert report.quantization is not None and report.quantization.method == "gptq"
    note = "--method gptq instead of yaqa: block 0 cuts the graph"
    assert note in [event.message for event in said if event.warning]
    named = jobs.resolve({**asked, "method": "yaqa", "output_path": str(tmp_path / "named")})
    assert isinstance(named, jobs.ResolvedJob)
    with pytest.raises(NoGradients, match="cuts the graph: --method yaqa needs gradients: use --method gptq"):
        jobs.run(jobs.plan(named.recipe))
    # a rule names it where the effort takes another: it ends, too
    rule = [{"layers": "*.down_proj", "method": "yaqa"}]
    ruled = jobs.resolve({**asked, "rules": rule, "output_path": str(tmp_path / "ruled")})
    assert isinstance(ruled, jobs.ResolvedJob)
    with pytest.raises(NoGradients, match="--method yaqa needs gradients"):
        jobs.run(jobs.plan(ruled.recipe))


def test_memory_that_ends_halves_batches_to_a_row_and_keeps_what_is_finished(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "gptq", "group_size": 32, "samples": 64}
    whole = quantize(llama, tmp_path / "whole", **options)
    tried: list[tuple[int, int]] = []
    rooms: list[Workspace] = []
    place, write = Workspace.place, UnitWriter.write

    def placed(self: Any, placement: Any) -> Any:
        rooms.append(self)
        return place(self, placement)

    def exhausted(self: Any, unit: Any, work: Any, made: Any) -> None:
        tokens = rooms[-1].batch_tokens
        tried.append((tokens, len(work.finished)))
        if unit.block == 1 and tokens > 64:
            raise torch.OutOfMemoryError("no memory")
        write(self, unit, work, made)

    monkeypatch.setattr(Workspace, "place", placed)
    monkeypatch.setattr(UnitWriter, "write", exhausted)
    report = quantize(llama, tmp_path / "out", **options, fresh=True)
    assert [tokens for tokens, _ in tried] == [2048, 2048, 2048, 256, 128, 64]
    assert [finished for _, finished in tried] == [0, 1, 2, 2, 2, 2]
    assert any("rows go through blocks by 1" in note for note in report["calibration"]["notes"])
    assert report["output_hash"] == whole["output_hash"]
    for tokens, rows, length, wanted in ((16384, 64, 12000, None), (16384, 64, 4096, 8192), (9, 0, 0, None)):
        room = Workspace.__new__(Workspace)
        room.batch_tokens, room._calibration = tokens, (rows, length)
        room.plan = SimpleNamespace(gradients=False)  # type: ignore[assignment]
        assert room.smaller_batch() == wanted


def test_without_method_and_scheme_the_recommendation_decides(tmp_path: Path) -> None:
    asked = {"model_path": str(TINYLM), "output_path": str(tmp_path / "out"), "gpu": "T4"}
    found = quant.resolve(asked)
    assert isinstance(found, Recommendation) and found.recommended == "none"
    with pytest.raises(Problems, match="gpu is 3"):
        jobs.resolve({**asked, "gpu": 3})


def test_a_scheme_of_integer_activations_alone_is_smoothed_and_that_is_said() -> None:
    job = resolved(scheme="w8a8-int8")
    assert job.recipe.outlier_suppression == "smooth_quant" == job.recipe.settings()["outlier_suppression"]
    assert len(job.notes) == 1 and "--outlier-suppression none turns that off" in job.notes[0]
    static = resolved(scheme="w8a8-int8", activations="static", method="gptq", alpha=0.7)
    assert static.recipe.outlier_suppression == "smooth_quant"
    assert jobs.complete(job.recipe) == (job.recipe, ())


def test_inputs_of_four_bits_are_smoothed_where_it_pays() -> None:
    job = resolved(scheme="nvfp4", method="gptq")
    assert (job.recipe.outlier_suppression, job.recipe.alpha) == ("smooth_quant", "auto")
    assert len(job.notes) == 1 and "what 4 bits make of them" in job.notes[0]
    assert jobs.complete(job.recipe) == (job.recipe, ())
    assert resolved(scheme="nvfp4", method="gptq", alpha=0.7).recipe.alpha == 0.7
    assert resolved(scheme="mxfp4", method="gptq").recipe.outlier_suppression == "smooth_quant"
    assert resolved(scheme="mxfp4", method="minmax").recipe.outlier_suppression is None  # which reads no text
    ruled = resolved(method="gptq", rules=[{"layers": "0", "scheme": "nvfp4"}]).recipe
    assert (suppressors(ruled), ruled.alpha) == ([None, "smooth_quant"], "auto")


@pytest.mark.parametrize(
    "given",
    [
        {"scheme": "nvfp4", "outlier_suppression": "none", "method": "gptq"},
        {"scheme": "w8a8-int8", "outlier_suppression": "none"},
        {"scheme": "w8a8-int8", "outlier_suppression": "awq", "method": "gptq"},
        {"scheme": "w8a8-int8", "method": "awq"},  # which scales inputs itself
        {"scheme": "w8a8-fp8"},
        {"scheme": "w8a8-int8", "backend": "auto-gptq"},
        {"method": "none", "format": "plain"},
    ],
    ids=str,
)
def test_who_decides_otherwise_is_left_alone(given: dict[str, Any]) -> None:
    job = resolved(**given)
    assert (job.recipe.outlier_suppression, job.notes) == (given.get("outlier_suppression"), ())


def test_a_rule_gets_what_its_scheme_needs_and_the_others_stay_as_they_are() -> None:
    rules = [
        {"layers": "0", "scheme": "w8a8-int8"},
        {"layers": "1", "scheme": "w8a16"},
        {"layers": "2", "skip": True},
        {"layers": "3", "scheme": "w8a8-int8", "outlier_suppression": "none"},
        {"layers": "4", "scheme": "no-such-scheme"},
    ]
    job = resolved(method="minmax", rules=rules)
    assert suppressors(job.recipe) == [None, "smooth_quant", None, None, "none", None]
    assert [n.partition(":")[0] for n in job.notes] == ["rule 1"]


def test_smoothing_of_the_job_is_not_that_of_rules_which_need_none() -> None:
    rules = [
        {"layers": "0", "scheme": "w4a16"},
        {"layers": "1", "method": "awq", "scheme": "w4a16-asym"},
        {"layers": "2", "method": "gptq"},
    ]
    job = resolved(method="minmax", scheme="w8a8-int8", rules=rules)
    assert suppressors(job.recipe) == ["smooth_quant", "none", "awq", None]
    asked = resolved(method="minmax", scheme="w8a8-int8", rules=rules, outlier_suppression="smooth_quant")
    assert suppressors(asked.recipe) == ["smooth_quant", None, None, None]


def test_everything_that_a_scheme_needs_is_something_that_a_job_takes_along() -> None:
    needs = {name: dict(row.needs) for name, row in SCHEMES.items() if row.needs}
    assert "w8a8-int8" in needs
    for name, keys in needs.items():
        recipe = resolved(method="minmax", scheme=name).recipe
        assert {k: getattr(recipe, k) for k in keys} == keys


@pytest.fixture(scope="module")
def with_outliers(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose function is that of another, with two features of the inputs 256 times as large."""
    folder = copy_model(checkpoints("llama"), tmp_path_factory.mktemp("outliers") / "model")
    tensors = load_all(folder)
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for block in range(2):
        for norm, linears in readers.items():
            tensors[f"model.layers.{block}.{norm}.weight"][:2] *= 256
            for linear in linears:
                tensors[f"model.layers.{block}.{linear}.weight"][:, :2] /= 256
    save_all(folder, tensors)
    return folder


def test_four_bit_activations_survive_outliers_and_others_lose_nothing_by_it(
    with_outliers: Path, llama: Path, tmp_path: Path
) -> None:
    losses: dict[tuple[Path, bool], float] = {}
    text: Any = {"text": short_text(), "length": 64, "chunks": 4}
    for model in (with_outliers, llama):
        for told in (False, True):
            job = {"method": "minmax", "scheme": "nvfp4", **TEXT}
            job |= {"outlier_suppression": "none"} if told else {}
            output = tmp_path / f"{model.parent.name}-{told}"
            quant.quantize(quant.make_recipe({"model_path": model, "output_path": output, **job}))
            losses[model, told] = quant.evaluate(output, against=model, **text).kl.mean
    alone = losses[llama, True]
    assert max(losses[llama, False], losses[with_outliers, False]) < 1.1 * alone, losses
    assert losses[with_outliers, True] > 2 * alone, losses


def test_integer_activations_survive_outliers_without_being_told_how(
    with_outliers: Path, tmp_path: Path
) -> None:
    said: list[str] = []

    def listen(event: Event) -> None:
        said.append(event.message)

    job = {"method": "minmax", "scheme": "w8a8-int8", **TEXT}
    recipe = quant.make_recipe({"model_path": with_outliers, "output_path": tmp_path / "alone", **job})
    report = quant.quantize(recipe, listen).to_dict()
    assert any("smooth_quant scales inputs" in x for x in said)
    assert report["settings"]["outlier_suppression"] == "smooth_quant"
    assert {f["suppressor"] for f in report["folds"].values()} == {"smooth_quant"}
    quantize(with_outliers, tmp_path / "asked", outlier_suppression="smooth_quant", **job)
    quantize(with_outliers, tmp_path / "without", outlier_suppression="none", **job)
    assert weight_files(tmp_path / "alone") == weight_files(tmp_path / "asked")
    text = {"text": short_text(), "length": 64, "chunks": 4}
    alone, without = (
        quant.evaluate(tmp_path / n, against=with_outliers, **text).kl.mean for n in ("alone", "without")
    )
    assert alone < without / 20


def test_a_rule_of_integer_activations_is_smoothed_and_the_rest_has_the_same_bytes(
    with_outliers: Path, tmp_path: Path
) -> None:
    job = {"method": "minmax", "group_size": 32, **TEXT}
    rules = [{"layers": "1", "scheme": "w8a8-int8"}]
    quantize(with_outliers, tmp_path / "plain", **job)
    report = quantize(with_outliers, tmp_path / "ruled", rules=rules, **job)
    assert report["folds"] and all("layers.1." in n for f in report["folds"].values() for n in f["linears"])
    plain, ruled = load_all(tmp_path / "plain"), load_all(tmp_path / "ruled")
    first = [n for n in plain if ".layers.0." in n]
    assert first and all(plain[n].equal(ruled[n]) for n in first)


def test_a_suppressor_of_a_rule_that_is_none_is_named_with_the_rule(llama: Path, tmp_path: Path) -> None:
    rules = [{"layers": "0", "outlier_suppression": "smoothquant"}, {"layers": "9"}]
    recipe = quant.make_recipe(
        {"model_path": llama, "output_path": tmp_path / "o", "method": "minmax", "group_size": 32}
        | {"rules": rules}
    )
    with pytest.raises(Problems) as refused:
        quant.plan_job(recipe)
    assert "rule 1: outlier suppressor is 'smoothquant': did you mean 'smooth_quant'?" in str(refused.value)
    assert "rule 2: layers names block 9" in str(refused.value)


def test_alpha_belongs_to_smooth_quant_wherever_it_stands(llama: Path, tmp_path: Path) -> None:
    values = {"model_path": llama, "output_path": tmp_path / "o", "method": "minmax", "group_size": 32}
    rules = [{"layers": "0", "outlier_suppression": "smooth_quant"}]
    quant.plan_job(quant.make_recipe(values | {"alpha": 0.7, "rules": rules}))
    with pytest.raises(Problems, match="--alpha belongs to --outlier-suppression smooth_quant"):
        quant.plan_job(quant.make_recipe(values | {"alpha": 0.7, "target": "other", "ignore": ["nope"]}))


def test_plan_estimate_and_run_are_one_way_for_every_engine(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"model_path": llama, "output_path": tmp_path / "o"}
    plan = jobs.plan(quant.make_recipe(values | {"method": "minmax", "group_size": 32}))
    prediction = jobs.estimate(plan)
    assert prediction["output_bytes"] == jobs.run(plan).output_bytes and "seconds" in prediction
    monkeypatch.setattr("quant.backends.run.probe", lambda backend, python: [])
    values = {"model_path": TINYLM, "output_path": tmp_path / "p", "backend": "autoawq"}
    prediction = jobs.estimate(jobs.plan(quant.make_recipe(values)))
    assert prediction["backend"] == "autoawq" and "seconds" not in prediction


def test_the_commands_say_on_stderr_what_was_taken_along(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    text = ["--samples", "4", "--sequence-length", "64", "--calibration-dataset", short_text()]
    job = ["-m", llama, "-o", tmp_path / "out", "--scheme", "w8a8-int8", *text]
    result = cli("layer-wise", *job, "--layers", "first:1", "--json")
    assert result.code == 0 and "--outlier-suppression none turns that off" in result.err
    assert json.loads(result.out)["settings"]["outlier_suppression"] == "smooth_quant"
    quiet = cli("quantize", *job[:3], tmp_path / "no", *job[4:], "--outlier-suppression", "none", "--dry-run")
    assert quiet.code == 0 and "turns that off" not in quiet.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "minmax", "samples": 4}, "--samples has no effect: --method minmax"),
        ({"method": "hqq", "shuffle": True, "sequence_length": 64}, "--sequence-length, --shuffle have no"),
        ({"method": "gptq", "samples": 4}, ""),
        ({"method": "minmax"}, ""),
        ({"method": "fp8", "samples": 4, "kv_cache_scheme": "fp8"}, ""),
        ({"method": "minmax", "samples": 4, "rules": [{"layers": "0", "method": "gptq"}]}, ""),
    ],
)
def test_keys_of_calibration_text_that_nothing_reads_are_told(given: dict[str, Any], said: str) -> None:
    resolved = jobs.resolve({"model_path": "M", "output_path": "O", **given})
    assert isinstance(resolved, jobs.ResolvedJob)
    notes = [note for note in resolved.notes if "no effect" in note]
    assert len(notes) == bool(said) and all(said in note for note in notes)


def test_what_is_typed_wins_over_a_recipe_s_method_and_effort(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for text, typed, method in (("effort: best\n", "gptq", "gptq"), ("method: gptq\n", None, "yaqa")):
        recipe.write_text(text + "bits: 4\n")
        own = {"effort": "best"} if typed is None else {"method": typed}
        assert resolved(**recipe_values(recipe, {**JOB, **own})).recipe.method == method


def test_an_output_of_another_effort_or_size_is_not_a_job_s(llama: Path, tmp_path: Path) -> None:
    asked = {"scheme": "w4a16", "group_size": 32, **TEXT, "calibration_dataset": [str(short_text())]}
    made = jobs.resolve(
        {"model_path": str(llama), "output_path": str(tmp_path / "o"), **asked, "effort": "best"}
    )
    assert isinstance(made, jobs.ResolvedJob)
    jobs.run(jobs.plan(made.recipe))
    for own, words in (
        ({"effort": "best"}, ""),
        ({"effort": "best", "options": {"rounds": 1}}, "options"),
        ({"effort": "fast"}, "made by yaqa, and --effort fast takes gptq"),
        ({}, "made by yaqa, and --effort balanced takes yaqa"),
        ({"target_bits": 5.0}, "one scheme for all layers, not by --target-bits 5"),
    ):
        file = tmp_path / "m.yaml"
        job = {"model": str(llama), "output": "o", "overrides": {**asked, **own}}
        file.write_text(yaml.safe_dump({"jobs": [job]}))
        found = standing(read_manifest(file)[0], None)
        assert (found.status, words in found.message) == ("refused" if words else "done", True), found


def test_an_output_of_the_best_effort_s_inputs_is_a_job_s_of_that_effort_alone(
    llama: Path, tmp_path: Path
) -> None:
    asked = {"scheme": "w8a8-int8", "outlier_suppression": "none"}
    given = {"model_path": str(llama), "output_path": str(tmp_path / "o"), "effort": "best"}
    made = jobs.resolve({**given, **asked})
    assert isinstance(made, jobs.ResolvedJob)
    jobs.run(jobs.plan(made.recipe))
    for own, words in (({"effort": "best"}, ""), ({}, "symmetric_activations")):
        file = tmp_path / "m.yaml"
        job = {"model": str(llama), "output": "o", "overrides": {**asked, **own}}
        file.write_text(yaml.safe_dump({"jobs": [job]}))
        found = standing(read_manifest(file)[0], None)
        assert (found.status, words in found.message) == ("refused" if words else "done", True), found
