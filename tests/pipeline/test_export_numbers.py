"""FP8, 8-bit activations, FP4, caches and mixed files through export: every number carried over, what has no
place refused or told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, Problems, QuantError
from quant.evaluation.compare import compare
from quant.evaluation.quality import evaluate
from quant.evaluation.verify import verify
from quant.formats import find_format
from quant.formats.reading import dequantized
from quant.pipeline.export import export
from quant.vllm.cache import cache_scale
from tests.helpers import (
    ROOT,
    TINYLM,
    change_config,
    copy_model,
    load_all,
    quantize,
    read_config,
    save_all,
    short_text,
)

PEERS = ROOT / "tests" / "fixtures" / "peers"
ATTENTION = "model.layers.0.self_attn"
Q = f"{ATTENTION}.q_proj"
#: Our checkpoints by what they hold.
KINDS: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "w8a8-int8"},
    "int8 static asymmetric": {
        "scheme": "w8a8-int8",
        "activations": "static",
        "symmetric_activations": False,
    },
    "fp8": {"scheme": "w8a8-fp8"},
    "fp8 tensor": {"scheme": "w8a8-fp8-tensor"},
    "fp8 static": {"scheme": "w8a8-fp8-tensor", "activations": "static"},
    "fp8 weights": {"scheme": "w8a16-fp8"},
    "block": {"scheme": "fp8-block"},
    "native block": {"scheme": "fp8-block", "format": "fp8"},
    "native tensor": {"scheme": "w8a8-fp8-tensor", "format": "fp8"},
    "native static": {"scheme": "w8a8-fp8-tensor", "format": "fp8", "activations": "static"},
    "nvfp4": {"scheme": "nvfp4"},
    "nvfp4a16": {"scheme": "nvfp4a16"},
    "mxfp4": {"scheme": "mxfp4"},
    "mxfp8": {"scheme": "mxfp8"},
    "cache": {"scheme": "w4a16", "group_size": 32, "kv_cache_scheme": "fp8"},
    "mixed": {
        "scheme": "nvfp4",
        "kv_cache_scheme": "fp8",
        "rules": [
            {"layers": "*.o_proj", "skip": True},
            {"layers": "*.self_attn.*", "scheme": "w8a8-int8", "activations": "static"},
            {"layers": "*.layers.0.mlp.down_proj", "scheme": "fp8-block"},
            {"layers": "*.layers.1.mlp.down_proj", "scheme": "w4a16-asym", "group_size": 32},
        ],
    },
}


@pytest.fixture(scope="module")
def checkpoint(
    checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """One of :data:`KINDS`, made once. Every side fills blocks of 128."""
    source = checkpoints(
        "llama", hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2
    )
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("numbers") / "output"
            text = {"samples": 8, "sequence_length": 64, "calibration_dataset": [short_text()]}
            quantize(source, made[kind], **{"method": "minmax"}, **KINDS[kind], **text)
        return made[kind]

    return get


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_format_gives_the_same_file_again(
    kind: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    report = export(checkpoint(kind), tmp_path / "out").to_dict()
    assert report["verify"]["passed"] and report["tensors_dropped"] == report["scales_rounded"] == []
    assert same(load_all(tmp_path / "out"), load_all(checkpoint(kind)))
    assert read_config(tmp_path / "out") == read_config(checkpoint(kind))
    assert report["kv_cache_scales"] == (4 if "kv_cache_scheme" in KINDS[kind] else 0)


@pytest.mark.parametrize(
    ("kind", "there"),
    [("native block", "block"), ("native tensor", "fp8 tensor"), ("native static", "fp8 static")],
)
def test_native_fp8_and_compressed_tensors_are_turned_into_one_another(
    kind: str, there: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """What comes out is the file that quantizing into that format makes; config and all."""
    for made, form, wanted in ((kind, "compressed-tensors", there), (there, "fp8", kind)):
        output = tmp_path / form
        assert export(checkpoint(made), output, form).to_dict()["verify"]["passed"]
        assert same(load_all(output), load_all(checkpoint(wanted)))
        assert (
            read_config(output)["quantization_config"]
            == read_config(checkpoint(wanted))["quantization_config"]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_plain_holds_the_values_and_the_report_says_what_it_has_no_place_for(
    kind: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    report = export(checkpoint(kind), tmp_path / "out", "plain").to_dict()
    before, after = dequantized(open_checkpoint(checkpoint(kind))), load_all(tmp_path / "out")
    assert before.tensors.keys() == after.keys() and "quantization_config" not in read_config(
        tmp_path / "out"
    )
    for name, tensor in after.items():
        assert torch.equal(tensor, before.read(name).to(tensor.dtype)), name
    calibrated = [n for n in load_all(checkpoint(kind)) if n.rpartition(".")[2].startswith("input_")]
    caches = [n for n in load_all(checkpoint(kind)) if n.endswith(("k_scale", "v_scale"))]
    assert {d["tensor"] for d in report["tensors_dropped"]} == {*calibrated, *caches}
    assert bool(caches) == ("kv_cache_scheme" in KINDS[kind]) and bool(calibrated) == (
        "static" in kind or kind in ("nvfp4", "mixed")
    )


@pytest.mark.parametrize(
    ("kind", "form", "said"),
    [
        ("int8", "gptq",
            "a GPTQ file holds integer weights and leaves activations alone, not w8a8-int8 .*: "
            "use --format compressed-tensors"),
        ("int8 static asymmetric", "awq", "an AWQ file holds integer weights and leaves activations alone"),
        ("int8", "fp8", "a native fp8 file holds FP8 weights with one scale a tensor or a block"),
        ("fp8", "fp8",
            "a native fp8 file holds FP8 weights with one scale a tensor or a block .*: use "
            "--format compressed-tensors"),
        ("fp8", "gptq", "a GPTQ file holds integer weights"),
        ("fp8 weights", "fp8", "a native fp8 file holds FP8 weights with one scale"),
        ("block", "awq", "an AWQ file holds integer weights"),
        ("native static", "gptq", "a GPTQ file holds integer weights"),
        ("nvfp4", "fp8", "a native fp8 file holds FP8 weights"),
        ("mxfp8", "fp8", "a native fp8 file holds FP8 weights"),
        ("mxfp4", "gptq", "a GPTQ file holds integer weights"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_say_is_refused_once_with_the_way_out(
    kind: str, form: str, said: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(Problems, match=said) as refused:
        export(checkpoint(kind), tmp_path / "out", form)
    assert len(refused.value.problems) == 1 and list(tmp_path.iterdir()) == []


def test_all_that_stands_against_a_mixed_file_in_another_format_is_listed(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    with pytest.raises(Problems) as refused:
        export(checkpoint("mixed"), tmp_path / "out", "gptq", source=tmp_path / "none")
    problems = "\n".join(refused.value.problems)
    for part in (
        "is not empty", "--source is", "not nvfp4", "not w8a8-int8", "not fp8-block",
            "vLLM refuses "
            "asymmetric GPTQ files",
        "the linears have several schemes; a gptq file of ours holds one",
    ):  # fmt: skip
        assert part in problems, problems
    assert [f.name for f in tmp_path.rglob("*")] == ["out", "x"]


PRESETS = ("fp8_dynamic", "fp8", "w8a8", "nvfp4", "mxfp4", "mxfp8")


@pytest.mark.parametrize("preset", PRESETS)
def test_files_of_llm_compressor_keep_every_number_and_get_the_dtypes_of_the_contract(
    preset: str, tmp_path: Path
) -> None:
    """It stores scales of 8-bit formats in fp16; vLLM's parameters are fp32, and nothing is lost in
    widening."""
    source = PEERS / f"llmc-{preset}"
    report = export(source, tmp_path / "out").to_dict()
    assert report["verify"]["passed"] and report["linears"] == 14 and report["scales_rounded"] == []
    assert all(t.equal for t in compare(tmp_path / "out", source).tensors)
    before, after = load_all(source), load_all(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor.float(), before[name].float()), name
        if name.endswith(("weight_scale", "input_scale")) and preset in ("fp8_dynamic", "fp8", "w8a8"):
            assert tensor.dtype == torch.float32, name


@pytest.mark.parametrize("place", ["compression_config", "text_config"])
def test_an_fp8_file_is_repaired_like_any_other(place: str, tmp_path: Path) -> None:
    """Its config where older programs put it, its recipe beside it, its tokenizer lost."""
    source = copy_model(PEERS / "llmc-fp8_dynamic", tmp_path / "source")
    stated = read_config(source)["quantization_config"]
    change_config(
        source,
        quantization_config=...,
        **{place: stated if place == "compression_config" else {"quantization_config": stated}},
    )
    (source / "recipe.yaml").write_text("x")
    report = export(source, tmp_path / "out", source=TINYLM).to_dict()
    assert any(f"moved from {place}" in r for r in report["repairs"])
    assert [d["file"] for d in report["side_files_dropped"]] == ["recipe.yaml"] and (
        tmp_path / "out" / "tokenizer.json"
    ).is_file()
    assert (
        read_config(tmp_path / "out")["quantization_config"]["format"] == "float-quantized"
        and verify(tmp_path / "out").passed
    )
    assert all(t.equal for t in compare(tmp_path / "out", PEERS / "llmc-fp8_dynamic").tensors)


@pytest.mark.parametrize("preset", [*PRESETS, "fp8_block"])
def test_files_of_llm_compressor_become_plain_ones(preset: str, tmp_path: Path) -> None:
    export(PEERS / f"llmc-{preset}", tmp_path / "out", "plain")
    found = compare(tmp_path / "out", PEERS / f"llmc-{preset}")
    assert not found.only_here and not found.only_there
    assert all(t.equal or (t.snr_db or 0) > 45 for t in found.tensors), [
        t for t in found.tensors if not t.equal
    ]
    near = [t for t in compare(tmp_path / "out", PEERS / "source").tensors if "_proj" in t.name]
    assert len(near) == 14 and all(
        t.snr_db is not None and t.snr_db > (15 if "4" in preset else 28) for t in near
    )


def test_blocks_that_vllm_cannot_load_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        Problems,
        match="64 inputs do not divide into groups of 128.*--format plain keeps its values",
    ):
        export(PEERS / "llmc-fp8_block", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_static_scale_of_llm_compressor_goes_into_a_native_file(tmp_path: Path) -> None:
    source = PEERS / "llmc-fp8"
    assert export(source, tmp_path / "out", "fp8").to_dict()["verify"]["passed"]
    before, after = load_all(source), load_all(tmp_path / "out")
    scales = [n for n in before if n.endswith(".input_scale")]
    assert len(scales) == 14 and all(torch.equal(after[n], before[n].float().reshape(1)) for n in scales)
    assert read_config(tmp_path / "out")["quantization_config"]["activation_scheme"] == "static"
    assert all(t.equal for t in compare(tmp_path / "out", source).tensors)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.k_scale"),
        ("model.layers.0.self_attn.attn.v_scale", "model.layers.0.self_attn.v_scale"),
        ("model.layers.0.self_attn.k_proj.k_scale", "model.layers.0.self_attn.k_scale"),
        ("model.layers.0.self_attn.v_proj.output_scale", "model.layers.0.self_attn.v_scale"),
        ("model.layers.0.attn.q_scale", "model.layers.0.attn.q_scale"),
        ("model.layers.0.self_attn.o_proj.output_scale", None),
        ("model.layers.0.self_attn.k_proj.weight_scale", None),
        ("k_scale", "k_scale"),
    ],
)
def test_scales_of_a_cache_are_told_by_their_names(name: str, canonical: str | None) -> None:
    assert cache_scale(name) == canonical


def renamed(source: Path, target: Path, change: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """A copy as one file, its tensors under other names."""
    copy_model(source, target)
    tensors = {change(n): t for n, t in load_all(target).items()}
    for file in target.glob("*.safetensors*"):
        file.unlink()
    save_all(target, tensors)
    return tensors


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("attn.{}_scale", "attn.attn.{}_scale"),
        ("attn.{}_scale", "attn.{0}_proj.{0}_scale"),
        ("attn.{}_scale", "attn.{}_proj.output_scale"),
    ]
)  # fmt: skip
def test_scales_of_a_cache_under_older_names_get_today_s(
    old: str, new: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(name: str) -> str:
        for letter in "kv":
            name = name.replace(old.format(letter), new.format(letter))
        return name

    source = checkpoint("cache")
    assert renamed(source, tmp_path / "old", change).keys() != load_all(source).keys()
    export(tmp_path / "old", tmp_path / "out")
    assert same(load_all(tmp_path / "out"), load_all(source))


def test_an_integer_format_without_a_place_for_a_cache_says_so(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    report = export(checkpoint("cache"), tmp_path / "out", "gptq").to_dict()
    assert report["kv_cache_scales"] == 0 and len(report["tensors_dropped"]) == 4
    assert all("no place for the scales of an FP8 KV cache" in d["reason"] for d in report["tensors_dropped"])
    assert not [n for n in load_all(tmp_path / "out") if n.endswith(("k_scale", "v_scale"))]


def test_the_command_tells_what_was_left_out_and_what_was_carried_over(
    checkpoint: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    kept = cli("export-vllm", "-m", checkpoint("mixed"), "-o", tmp_path / "kept")
    assert kept.code == 0 and "4 scales carried over" in kept.out and "has no place" not in kept.out
    plain = cli("export-vllm", "-m", checkpoint("mixed"), "-o", tmp_path / "plain", "--format", "plain")
    said = " ".join(plain.out.split())
    assert (
        plain.code == 0
        and "4 tensors: a plain checkpoint has no place for the scales of an FP8 KV cache" in said
    )
    assert "10 tensors: a plain checkpoint leaves activations as they are" in said, said


def test_a_cache_of_a_native_file_stays_and_gets_its_word_in_compressed_tensors(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    tensors = renamed(checkpoint("native static"), source, str)
    scales = {
        f"model.layers.{b}.self_attn.{x}_scale": torch.tensor([0.5 + b]) for b in range(2) for x in "kv"
    }
    save_all(source, tensors | scales)
    for form in ("fp8", "compressed-tensors"):
        report = export(source, tmp_path / form, form).to_dict()
        after = load_all(tmp_path / form)
        assert report["kv_cache_scales"] == 4 and all(torch.equal(after[n], s) for n, s in scales.items())
    assert (
        read_config(tmp_path / "compressed-tensors")["quantization_config"]["kv_cache_scheme"]["num_bits"]
        == 8
    )


def test_a_cache_scheme_of_heads_is_kept_and_one_without_scales_is_taken_out(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    heads = tmp_path / "heads"
    tensors = renamed(checkpoint("cache"), heads, str)
    config = read_config(heads)["quantization_config"]
    change_config(
        heads,
        quantization_config=config
        | {"kv_cache_scheme": config["kv_cache_scheme"] | {"strategy": "attn_head"}},
    )
    save_all(
        heads,
        {
            n: t.repeat(2).view(2, 1, 1) if n.endswith(("k_scale", "v_scale")) else t
            for n, t in tensors.items()
        },
    )
    export(heads, tmp_path / "out")
    assert read_config(tmp_path / "out")["quantization_config"]["kv_cache_scheme"]["strategy"] == "attn_head"
    assert load_all(tmp_path / "out")[f"{ATTENTION}.k_scale"].shape == (2, 1, 1)
    save_all(heads, {n: t for n, t in tensors.items() if not n.endswith(("k_scale", "v_scale"))})
    report = export(heads, tmp_path / "without").to_dict()
    assert any("kv_cache_scheme removed" in r for r in report["repairs"])
    assert read_config(tmp_path / "without")["quantization_config"]["kv_cache_scheme"] is None


def test_a_mixed_file_is_the_same_function_after_export(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    export(checkpoint("mixed"), tmp_path / "out")
    small = {"length": 32, "chunks": 2}
    before, after = (evaluate(p, **small) for p in (checkpoint("mixed"), tmp_path / "out"))
    assert before.perplexity == after.perplexity and before.activations == after.activations


#: Kind of checkpoint → what two of its linears lose.
LOST: dict[str, list[str]] = {
    "fp8": ["weight_scale"],
    "native block": ["weight_scale_inv"],
    "int8": ["weight_scale"],
    "nvfp4": ["weight_global_scale", "input_global_scale"],
    "int8 static asymmetric": ["input_scale", "input_zero_point"],
    "native static": ["input_scale"],
    "mxfp4": ["weight_scale"],
}


@pytest.mark.parametrize("kind", LOST)
def test_scales_that_a_checkpoint_lacks_are_named_with_all_else_before_any_work(
    kind: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    lost, source = LOST[kind], tmp_path / "source"
    tensors = renamed(checkpoint(kind), source, str)
    linears = [Q, "model.layers.1.mlp.down_proj"]
    gone = {f"{n}.{x}" for n in linears for x in lost}
    assert gone <= tensors.keys()
    save_all(source, {n: t for n, t in tensors.items() if n not in gone})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    before = sorted(f.name for f in tmp_path.iterdir())
    with pytest.raises(Problems) as refused:
        export(source, tmp_path / "full", source=tmp_path / "nowhere")
    problems = refused.value.problems
    assert (
        len(problems) == 2 + len(lost) and "is not empty" in problems[0] and "--source is" in problems[1]
    ), problems
    for name in lost:
        (line,) = [p for p in problems if f"2 quantized linears have no {name} (" in p]
        assert all(n in line for n in linears) and "the checkpoint is incomplete" in line
    assert sorted(f.name for f in tmp_path.iterdir()) == before
    assert not verify(source).passed
    if not lost[0].startswith("input_"):
        for broken in (
            lambda: dequantized(open_checkpoint(source)).read(f"{Q}.weight"),
            lambda: compare(source, source),
        ):
            with pytest.raises(CheckpointError, match="is incomplete"):
                broken()
    else:  # weights alone are there
        assert export(source, tmp_path / "plain", "plain").to_dict()["linears"] == 14
        with pytest.raises(QuantError, match="is incomplete"):
            evaluate(source, length=32, chunks=2)


def test_a_missing_scale_of_a_cache_is_named_before_any_work(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = renamed(checkpoint("cache"), tmp_path / "source", str)
    save_all(tmp_path / "source", {n: t for n, t in tensors.items() if n != f"{ATTENTION}.v_scale"})
    with pytest.raises(Problems, match=f"{ATTENTION}.v_scale is missing: vLLM would take 1.0"):
        export(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_found_linears_of_a_mixed_file_are_those_of_its_rules(checkpoint: Callable[[str], Path]) -> None:
    opened = open_checkpoint(checkpoint("mixed"))
    found = find_format(opened.config, opened.tensors)
    assert found is not None
    names = {n: x.scheme.name for n, x in found.linears.items()}
    assert names[Q] == "w8a8-int8" and names["model.layers.0.mlp.down_proj"] == "fp8-block"
    assert (
        names["model.layers.1.mlp.down_proj"] == "w4a16-asym"
        and names["model.layers.1.mlp.up_proj"] == "nvfp4"
    )
    assert not [n for n in names if n.endswith("o_proj")]
