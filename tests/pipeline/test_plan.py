"""Everything that stands against a job is found before it starts, and said at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.errors import Problems, QuantError, UsageError
from quant.pipeline.checks import check_disk
from quant.pipeline.estimate import estimate
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.plan import plan_job
from quant.pipeline.rows import job_rows
from quant.pipeline.scratch import ScratchFiles
from quant.pipeline.workspace import Workspace
from quant.progress import Event
from quant.recipe import make_recipe
from tests.helpers import LATENT, change_config, copy_model, files_of, quantize, recipe, short_text


def problems_of(model: Path, output: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(Problems) as refused:
        plan_job(recipe(model, output, **options))
    return refused.value.problems


def test_all_problems_are_listed_together(quantized: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    source = copy_model(quantized(layers="0"), tmp_path / "source")
    problems = problems_of(source, tmp_path / "out", group_size=256, bits=3, layers="1")
    for part in (
        "the output directory is not empty",
        "3: use --format plain",
        "do not divide into groups of 256",
    ):
        assert any(part in p for p in problems), part
    assert len(problems) >= 3


def test_a_group_size_that_does_not_divide_names_the_layers_and_one_that_does(
    llama: Path, tmp_path: Path
) -> None:
    (problem,) = problems_of(llama, tmp_path / "out", group_size=64)
    assert problem.startswith(
        "model.layers.*.mlp.down_proj: 96 inputs do not divide into groups of 64: quantize with "
        "--group-size 32 or -1"
    )
    (problem,) = problems_of(llama, tmp_path / "out", group_size=64, layers="down_proj")
    assert "or --ignore 'down_proj'" in problem
    assert len(plan_job(recipe(llama, tmp_path / "out", group_size=64, ignore=["down_proj"])).linears) == 12


@pytest.mark.parametrize(
    ("degree", "group", "named"),
    [
        (3, 32, "4 attention heads over --tensor-parallel 3 do not divide: tensor parallel"),
        (2, 32, "down_proj: 96 inputs over --tensor-parallel 2 do not divide into groups of 32"),
        (2, 16, None),
        (64, -1, "4 attention heads"),
    ],
)
def test_shapes_are_checked_for_the_ranks_that_will_serve_them(
    degree: int, group: int, named: str | None, llama: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tensor_parallel": degree, "group_size": group, "target": "other"}
    if named is None:
        plan_job(recipe(llama, tmp_path / "out", **options))
    else:
        assert any(named in p for p in problems_of(llama, tmp_path / "out", **options))


@pytest.mark.parametrize(("ignored", "left"), [("k_proj", "k_proj"), ("gate_proj", "gate_proj")])
def test_a_fused_layer_is_quantized_as_a_whole_or_not_at_all(
    ignored: str, left: str, llama: Path, tmp_path: Path
) -> None:
    (problem,) = problems_of(llama, tmp_path / "out", group_size=32, ignore=[ignored])
    assert f"but {left} would stay unquantized: select all of them or none, or use --target other" in problem
    plan_job(recipe(llama, tmp_path / "out", group_size=32, ignore=[ignored], target="other"))
    plan_job(recipe(llama, tmp_path / "out", group_size=32, ignore=[ignored], format="plain"))


def test_the_output_may_not_lie_in_the_source_by_any_name(llama: Path, tmp_path: Path) -> None:
    source = copy_model(llama, tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(source)
    for output in (
        source / "out",
        source,
        tmp_path / "elsewhere" / ".." / "source" / "out",
        tmp_path / "link" / "out",
    ):
        (problem,) = problems_of(source, output, group_size=32)
        assert "the output lies in the source directory" in problem or "is not empty" in problem


def test_an_output_path_that_is_a_file_or_has_files_is_refused_and_an_empty_one_is_taken(
    llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert "the output path is a file" in problems_of(llama, tmp_path / "file", group_size=32)[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("")
    assert "is not empty" in problems_of(llama, tmp_path / "full", group_size=32)[0]
    (tmp_path / "empty").mkdir()
    assert quantize(llama, tmp_path / "empty", group_size=32)["verify"]["passed"]


def test_the_current_directory_is_an_output_path(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plan = plan_job(recipe(llama, Path("."), group_size=32))
    assert plan.output_bytes > 0


def test_a_quantized_source_is_read_and_the_plan_says_what_becomes_of_it(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    """One of its blocks is quantized; the job takes the other, and stores that one in 16 bits."""
    plan = plan_job(recipe(quantized(layers="0"), tmp_path / "out", group_size=32, layers="1"))
    said = plan.to_dict()["source_quantization"]
    assert (said["quant_method"], said["rounded_anew"], said["kept"]) == ("compressed-tensors", 0, [])
    assert len(said["dequantized"]) == 7 and said["schemes"] == {"W4 g32 symmetric": 7}
    kept = plan_job(
        recipe(quantized(layers="0"), tmp_path / "out", group_size=32, layers="1", keep_quantized=True)
    )
    assert len(kept.kept) == 7 == len(kept.linears) and not set(kept.kept) & set(kept.linears)
    assert kept.output_bytes < plan.output_bytes and kept.bits_per_weight < plan.bits_per_weight


def test_a_legacy_backend_and_an_unread_method_are_refused_with_the_way_back(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    source = copy_model(quantized(), tmp_path / "source")
    problems = problems_of(source, tmp_path / "out", backend="autoawq", method="awq", format="awq")
    assert any(
        "is already quantized (compressed-tensors), which autoawq does not read" in p for p in problems
    )
    change_config(source, quantization_config={"quant_method": "quark"})
    with pytest.raises(QuantError, match="quant_method 'quark', which is not read here; read are awq"):
        plan_job(recipe(source, tmp_path / "out"))


def test_a_disk_without_room_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(
        QuantError, match=rf"{tmp_path}: 1048576 TiB are needed for the output, .* are free: free some room"
    ):
        check_disk(tmp_path / "not" / "there", 2**60)
    with pytest.raises(
        QuantError,
        match=r"10 B are needed for the output and 1048576 TiB for calibration activations, .*, or use "
        r"fewer --samples",
    ):
        check_disk(tmp_path / "not" / "there", 10, 2**60)


def test_a_dry_run_counts_the_scratch_file(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.pipeline.workspace.RESIDENT_CPU", 0)
    plan = plan_job(
        recipe(llama, tmp_path / "out", method="gptq", group_size=32, samples=4, sequence_length=64)
    )
    scratch = estimate(plan)["scratch_bytes"]
    assert scratch > 0
    room = plan.disk_bytes + scratch
    for free in (room, room - 1):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: type("Usage", (), {"free": free}))
        with (
            contextlib.nullcontext()
            if free == room
            else pytest.raises(QuantError, match="for calibration activations")
        ):
            estimate(plan)


@pytest.mark.parametrize(("kind", "method"), [("llama", "gptq"), ("gemma2", "awq"), ("gptj", "gptq")])
def test_the_scratch_file_is_as_large_as_predicted(
    kind: str, method: str, checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where attention and MLP wait side by side, as in GPT-J. Batches of two sizes leave holes in the
    file, of which nothing is foreseen."""
    monkeypatch.setattr("quant.pipeline.workspace.RESIDENT_CPU", 0)
    options = {"method": method, "group_size": 32, "samples": 300, "sequence_length": 64}
    prediction = estimate(plan_job(recipe(checkpoints(kind), tmp_path / "out", **options)))
    report = quantize(checkpoints(kind), tmp_path / "out", **options)
    assert report["scratch_bytes"] > 1 << 20
    assert prediction["scratch_bytes"] == pytest.approx(report["scratch_bytes"], rel=0.1)


@pytest.mark.parametrize(
    "options",
    [{"method": "gptq"}, {"method": "gptq", "moe_calibration": "all"}, {"method": "yaqa"}],
    ids=str,
)
def test_files_of_what_experts_read_are_as_large_as_predicted(
    options: dict[str, Any], checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints("mixtral")
    options = options | {"group_size": 32, "samples": 64, "sequence_length": 64}
    for place in ("experts", "footprint"):
        monkeypatch.setattr(f"quant.pipeline.{place}.RESIDENT", 1 << 16)
    prediction = estimate(plan_job(recipe(source, tmp_path / "out", **options)))
    files = list[ScratchFiles]()

    class Noted(ScratchFiles):
        def __init__(self, folder: Path | None = None):
            super().__init__(folder)
            files.append(self)

    monkeypatch.setattr("quant.pipeline.activation_store.ScratchFiles", Noted)
    report = quantize(source, tmp_path / "out", **options)
    assert report["scratch_bytes"] == sum(f.most for f in files) > 1 << 19
    assert all(f.held == 0 for f in files)
    assert prediction["scratch_bytes"] == pytest.approx(report["scratch_bytes"], rel=0.1)
    if options["method"] == "gptq":  # each rank has what the experts of both read
        several = estimate(plan_job(recipe(source, tmp_path / "ranks", **options, devices="cpu,cpu")))
        assert several["scratch_bytes"] >= 2 * prediction["scratch_bytes"]


@pytest.mark.parametrize("length", [1024, 2048])
def test_the_scratch_file_is_as_large_as_predicted_where_no_row_is_held_out(
    length: int, checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.pipeline.workspace.RESIDENT_CPU", 0)
    source = checkpoints("llama", max_position_embeddings=2048)
    text = tmp_path / "text.txt"
    text.write_text(short_text().read_text() * 40)
    options = {"method": "gptq", "group_size": 32, "sequence_length": length, "calibration_dataset": [text]}
    rows = 24 * 1024 // length
    whole = job_rows(plan_job(recipe(source, tmp_path / "out", **options, samples=rows)))
    monkeypatch.setattr("quant.pipeline.manager.job_rows", lambda plan: replace(whole, held_out=None))
    prediction = estimate(plan_job(recipe(source, tmp_path / "out", **options, samples=rows)))
    report = quantize(source, tmp_path / "out", **options, samples=rows)
    assert prediction["scratch_bytes"] == pytest.approx(report["scratch_bytes"], rel=0.1)


def test_a_gpu_without_room_is_an_error_that_says_what_to_do(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("quant.pipeline.blocks.BlockQuantizer.quantize", full)
    job = recipe(llama, tmp_path / "out", method="gptq", group_size=32)
    with pytest.raises(
        QuantError,
        match="out of memory .CUDA out of memory. Tried to allocate 2 GiB.: use fewer --samples.* --device "
        "cpu$",
    ):
        estimate(plan_job(job))
    with pytest.raises(
        QuantError, match="or --device cpu; finished blocks are kept, but other settings start over$"
    ):
        QuantizationManager(plan_job(job)).run()


def test_a_dry_run_goes_on_with_smaller_batches_as_the_job_would(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = Workspace.share, []

    def few(self: Workspace, rows: Any) -> Any:
        tried.append(self.batch_tokens)
        if self.batch_tokens > 128:
            raise torch.OutOfMemoryError("no memory")
        return real(self, rows)

    monkeypatch.setattr(Workspace, "share", few)
    job = recipe(llama, tmp_path / "out", method="yaqa", group_size=32, samples=64, sequence_length=64)
    assert estimate(plan_job(job))["seconds"] > 0
    assert list(dict.fromkeys(tried)) == [2048, 256, 128]  # of eight parts of eight rows


def test_a_dry_run_tries_one_block_of_each_kind(llama: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    plan = plan_job(
        recipe(
            llama, tmp_path / "out", method="gptq", group_size=32, layers="1", samples=4, sequence_length=64
        )
    )
    estimate(plan, events.append)  # a block that is left alone, and one that is not
    assert [(e.phase, e.done, e.total) for e in events] == [("trial", 0, 2), ("trial", 1, 2)]


def test_scales_of_a_latent_cache_are_not_made(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoints("deepseek_v3", **LATENT)
    (problem,) = problems_of(source, tmp_path / "out", group_size=32, kv_cache_scheme="fp8")
    assert problem.startswith(
        "model.layers.0.self_attn.kv_a_proj_with_mqa: of latent attention vLLM caches the latent itself"
    )


def test_an_output_path_below_a_file_is_found_before_any_work(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert problems_of(llama, tmp_path / "file" / "a" / "b", group_size=32) == (
        f"{tmp_path}/file/a/b: {tmp_path}/file is a file, no directory: choose another --output-path",
    )


def test_a_dry_run_says_what_the_job_will_write_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    for method in ("minmax", "gptq"):
        plan = plan_job(recipe(llama, tmp_path / "out", method=method, group_size=32))
        prediction = estimate(plan)
        assert list(tmp_path.iterdir()) == []
        report = quantize(llama, tmp_path / "out" / method, method=method, group_size=32)
        assert prediction["output_bytes"] == report["output_bytes"]
        side = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        assert prediction["side_files_bytes"] == sum(len(b) for n, b in files_of(llama).items() if n in side)
        assert prediction["peak_rss_bytes"] > 0 and prediction["seconds"] >= 0
        import shutil

        shutil.rmtree(tmp_path / "out")


def test_units_are_what_lies_outside_then_the_blocks_in_order(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    plan = plan_job(recipe(checkpoints("llama", num_hidden_layers=12), tmp_path / "out", group_size=32))
    assert [u.block for u in plan.units] == [None, *range(12)]
    assert [s.file for u in plan.units for s in u.shards] == [
        f"model-{i:05d}-of-00013.safetensors" for i in range(1, 14)
    ]


def test_an_fp8_source_is_refused(llama: Path, tmp_path: Path) -> None:
    import torch

    from tests.helpers import load_all, save_all

    source = copy_model(llama, tmp_path / "source")
    save_all(source, {n: t.to(torch.float8_e4m3fn) for n, t in load_all(source).items()})
    assert any(
        "most weights are stored as F8_E4M3: quantizing starts from BF16, F16 or F32" in p
        for p in problems_of(source, tmp_path / "out", group_size=32)
    )


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": "two"}, {"num_hidden_layers": None}, {"text_config": 3}, {"vocab_size": "many"}],
)
def test_odd_values_in_config_do_not_break_a_data_free_job(
    changes: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    source = copy_model(llama, tmp_path / "source")
    change_config(source, **changes)
    assert len(quantize(source, tmp_path / "out", group_size=32)["layers"]) == 14


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("gptq", {"damping": "abc"}, "damping is 'abc': must be a valid number"),
        ("gptq", {"damping": [1, 2]}, "damping is [1, 2]: must be a valid number"),
        ("gptq", {"damping": float("nan")}, "damping is nan: must be a finite number"),
        ("gptq", {"damping": 7.0}, "damping is 7.0: a share of the Hessian's diagonal"),
        (
            "gptq",
            {"clip_search": "maybe", "act_order": "sideways"},
            "act_order is 'sideways': must be 'none' or 'static'; clip_search is 'maybe': must be a valid "
            "boolean",
        ),
        ("minmax", {"clip_search": 1}, "clip_search is 1: must be a valid boolean"),
        ("hqq", {"iterations": {"a": 1}}, "iterations is {'a': 1}: must be a valid integer"),
        ("hqq", {"iterations": True}, "iterations is True: must be a valid integer"),
    ],
)
def test_settings_of_another_type_are_refused_before_any_work(
    method: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    values = {
        "model_path": tmp_path / "none",
        "output_path": tmp_path / "out",
        "method": method,
        "options": options,
    }
    with pytest.raises(UsageError) as refused:
        plan_job(make_recipe(values))
    assert said in str(refused.value)


def test_a_setting_given_by_its_name_and_among_the_options_is_refused(tmp_path: Path) -> None:
    values = {
        "model_path": tmp_path / "none",
        "output_path": tmp_path / "out",
        "method": "gptq",
        "damping": 0.1,
        "options": {"damping": 0.2},
    }
    with pytest.raises(UsageError, match="damping is given twice"):
        plan_job(make_recipe(values))
