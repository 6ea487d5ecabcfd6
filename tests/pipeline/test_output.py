"""What a job leaves: every tensor accounted for, values equal to those the pipeline went on with, side files
byte for byte."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import INDEX, open_checkpoint
from quant.errors import NotFinite
from quant.evaluation.inspect import inspect as inspect_checkpoint
from quant.formats.reading import dequantized
from quant.pipeline.export import export
from quant.pipeline.plan import plan_job
from quant.pipeline.records import Records
from quant.quantizers import Quantized
from quant.tensors import QuantizedTensor
from tests.helpers import (
    TINYLM,
    change_config,
    copy_model,
    files_of,
    load_all,
    quantize,
    read_config,
    recipe,
    save_all,
)

JOBS = [
    {"method": method, "format": form, "bits": bits, "symmetric": symmetric, "group_size": group}
    for method in ("minmax", "gptq")
    for form, widths in (("compressed-tensors", (4, 8)), ("gptq", (2, 3, 4, 8)), ("plain", (2, 3, 4, 8)))
    for bits in widths
    for symmetric in (True, False)
    for group in (-1, 32, 64)
]


def name_of(job: dict[str, Any]) -> str:
    return "-".join(str(v) for v in job.values())


def caught(monkeypatch: pytest.MonkeyPatch) -> dict[str, QuantizedTensor]:
    """Every linear that the pipeline quantizes from now on, by name."""
    tensors: dict[str, QuantizedTensor] = {}
    record = Records.add

    def noting(self: Any, name: str, result: Quantized, *args: Any) -> None:
        tensors[name] = result.tensor
        record(self, name, result, *args)

    monkeypatch.setattr(Records, "add", noting)
    return tensors


@pytest.mark.parametrize("job", JOBS, ids=name_of)
def test_values_read_back_from_disk_are_those_that_the_pipeline_used(
    job: dict[str, Any], checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints("llama", num_hidden_layers=1, intermediate_size=128)
    tensors = caught(monkeypatch)
    report = quantize(source, tmp_path / "out", target="other", samples=4, **{k: v for k, v in job.items()})
    back = dequantized(open_checkpoint(tmp_path / "out"))
    assert len(tensors) == 7 and report["verify"]["passed"]
    for name, tensor in tensors.items():
        values = tensor.dequantize()
        assert torch.equal(
            back.read(f"{name}.weight").float(),
            values.bfloat16().float() if job["format"] == "plain" else values,
        )


def test_the_bundled_model_read_back_by_the_official_package_has_the_values_that_the_pipeline_used(
    tinylm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = caught(monkeypatch)
    report = quantize(tinylm, tmp_path / "out", method="gptq", samples=16, sequence_length=128)
    assert len(tensors) == 28 == len(report["layers"])
    assert all(
        0 < x["error"] < 0.5 and x["snr_db"] > 10 and x["tokens"] == 16 * 128 for x in report["layers"]
    )
    for name, values in official_values(tmp_path / "out").items():
        assert torch.equal(values, tensors[name].dequantize().bfloat16())


def official_values(folder: Path) -> dict[str, torch.Tensor]:
    """Quantized linears of a checkpoint as compressed-tensors decompresses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressors = pytest.importorskip("compressed_tensors.compressors")
        from compressed_tensors.quantization import QuantizationScheme
    config = read_config(folder)["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    tensors, values = load_all(folder), {}
    for name in (n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")):
        state = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        values[name] = compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 32])
def test_the_official_package_decompresses_to_our_values(
    bits: int, symmetric: bool, group: int, quantized: Callable[..., Path]
) -> None:
    folder = quantized(bits=bits, symmetric=symmetric, group_size=group)
    ours, theirs = dequantized(open_checkpoint(folder)), official_values(folder)
    assert len(theirs) == 14
    for name, values in theirs.items():
        assert torch.equal(ours.read(f"{name}.weight").to(values.dtype), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 32])
def test_what_the_official_package_compresses_is_read_to_its_values(
    bits: int, symmetric: bool, group: int
) -> None:
    from quant.formats import FormatRegistry
    from quant.schemes import WeightScheme
    from quant.vllm.layers import Linear

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressors = pytest.importorskip("compressed_tensors.compressors")
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    generator, scheme = torch.Generator().manual_seed(0), WeightScheme(bits, group, symmetric)
    n, k, groups = 24, 96, scheme.groups(96)
    scale = torch.rand(n, groups, generator=generator) * 0.1 + 0.01
    zero = torch.randint(scheme.low, scheme.high + 1, (n, groups), generator=generator).to(torch.int8)
    state = {"weight": torch.randn(n, k, generator=generator), "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = zero
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy=scheme.strategy,
        group_size=None if group == -1 else group,
    )
    official = QuantizationScheme(targets=["Linear"], weights=arguments)
    packed = compressors.PackedQuantizationCompressor.compress(
        {k: v.clone() for k, v in state.items()}, official
    )
    ours = FormatRegistry.get("compressed-tensors").unpack(
        Linear("x", n, k, scheme), {f"x.{k}": v for k, v in packed.items()}, {}
    )
    theirs = compressors.PackedQuantizationCompressor.decompress(dict(packed), official)["weight"]
    assert torch.equal(ours.dequantize(), theirs)
    assert ours.zeros is None or torch.equal(ours.zeros, zero)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "plain"])
def test_every_tensor_of_the_source_is_quantized_or_copied_and_the_report_says_which(
    form: str, llama: Path, quantized: Callable[..., Path]
) -> None:
    folder = quantized(format=form, layers="0", ignore=["o_proj"])
    report = json.loads((folder / "quant_report.json").read_text())
    before, after = load_all(llama), load_all(folder)
    assert (
        sorted(report["tensors"]["quantized"] + report["tensors"]["copied"]) == sorted(before)
        and report["tensors"]["dropped"] == []
    )
    assert {n.removeprefix("model.layers.0.") for n in report["tensors"]["quantized"]} == {
        f"{m}_proj.weight"
        for m in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
    }
    for name in report["tensors"]["copied"]:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    suffixes = {
        "compressed-tensors": ["weight_packed", "weight_scale", "weight_shape"],
        "gptq": ["g_idx", "qweight", "qzeros", "scales"],
        "plain": ["weight"],
    }
    made = sorted(n for n in after if n not in report["tensors"]["copied"])
    assert made == sorted(
        n.removesuffix("weight") + s for n in report["tensors"]["quantized"] for s in suffixes[form]
    )
    # of tensors, as every command counts them
    assert report["output_bytes"] == inspect_checkpoint(folder)["total_bytes"]
    assert report["source_bytes"] == inspect_checkpoint(llama)["total_bytes"]


def test_side_files_are_byte_for_byte_and_config_is_written_last(llama: Path, tmp_path: Path) -> None:
    source = copy_model(llama, tmp_path / "source")
    extra = {
        "chat_template.jinja": b"{{ x }}\r\n", "modeling_x.py": b"import os\n",
        "sub/dir/notes.bin.txt": bytes(range(256)), "LICENSE": b"",
        "recipe.yaml": b"old: yes", "quantize_config.json": b"{}", "original/consolidated.pth": b"pickle",
    }  # fmt: skip
    for name, content in extra.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    report = quantize(source, tmp_path / "out", group_size=32)
    before, after = files_of(source), files_of(tmp_path / "out")
    dropped = {"recipe.yaml", "quantize_config.json", "original/consolidated.pth"}
    assert {d["file"] for d in report["side_files_dropped"]} == dropped and all(
        d["reason"] for d in report["side_files_dropped"]
    )
    for name in set(before) - dropped - {"model.safetensors", "config.json"}:
        assert after[name] == before[name], name
    made = set(after) - set(before)
    told = {"quant_report.json", "quant_report.html", "README.md"}
    assert made == {
        *told,
        "vllm_config.json",
        INDEX,
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }
    written = {n: os.stat(tmp_path / "out" / n).st_mtime_ns for n in after}
    assert max(written, key=lambda n: written[n] if n not in told else 0) == "config.json"


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "plain"])
def test_a_tied_head_stays_tied(form: str, checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoints("llama", tie=True)
    quantize(source, tmp_path / "out", group_size=32, format=form, method="gptq")
    assert (
        "lm_head.weight" not in load_all(tmp_path / "out")
        and read_config(tmp_path / "out")["tie_word_embeddings"] is True
    )
    assert torch.equal(
        load_all(tmp_path / "out")["model.embed_tokens.weight"], load_all(source)["model.embed_tokens.weight"]
    )


def test_a_sharded_source_gives_the_bytes_that_a_single_file_gives(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    hashes = [
        quantize(checkpoints("llama", shard=shard), tmp_path / shard, group_size=32, method="gptq")[
            "output_hash"
        ]
        for shard in ("5GB", "50KB")
    ]
    assert hashes[0] == hashes[1]


def test_a_hub_cache_is_quantized_through_its_links(llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for file in llama.iterdir():
        os.symlink(file, cache / "snapshots" / "abc" / file.name)
    found = quantize(cache, tmp_path / "out", group_size=32)
    assert found["output_hash"] == quantize(llama, tmp_path / "direct", group_size=32)["output_hash"]
    assert not any(f.is_symlink() for f in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "stablelm"]
)
def test_every_family_goes_through_gptq_with_less_error_than_rounding(
    kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoints(kind)
    solved = quantize(
        source, tmp_path / "gptq", method="gptq", group_size=32, samples=24, sequence_length=128
    )
    assert solved["verify"]["passed"] and not [f for f in solved["fallbacks"] if "rounded" in f["fallback"]]
    biases = [n for n in load_all(source) if n.endswith("_proj.bias")]
    assert bool(biases) == (kind == "qwen2")
    assert all(torch.equal(load_all(tmp_path / "gptq")[n], load_all(source)[n]) for n in biases)
    assert {x["tokens"] for x in solved["layers"]} == {24 * 128}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stated", ["float32", "float16", "bfloat16", None])
@pytest.mark.parametrize("form", ["compressed-tensors", "plain"])
def test_scales_have_the_dtype_that_config_states_and_plain_weights_the_stored_one(
    stored: torch.dtype, stated: str | None, form: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = copy_model(checkpoints("llama", dtype=stored, num_hidden_layers=1), tmp_path / "source")
    change_config(source, dtype=stated if stated else ..., torch_dtype=...)
    quantize(source, tmp_path / "out", group_size=32, format=form)
    suffix = ".weight_scale" if form == "compressed-tensors" else "_proj.weight"
    wanted = getattr(torch, stated) if stated and form == "compressed-tensors" else stored
    assert {t.dtype for n, t in load_all(tmp_path / "out").items() if n.endswith(suffix)} == {wanted}


def test_predicted_bytes_are_the_bytes_written(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    for number, job in enumerate(JOBS[: len(JOBS) // 2 : 5]):
        source = checkpoints("llama", num_hidden_layers=1, intermediate_size=128)
        plan = plan_job(recipe(source, tmp_path / str(number), target="other", **job))
        report = quantize(source, tmp_path / str(number), target="other", **job)
        assert plan.output_bytes == report["output_bytes"]
        written = {f.name: f.stat().st_size for f in (tmp_path / str(number)).glob("*.safetensors")}
        assert written == {s.file: s.nbytes for u in plan.units for s in u.shards}


def test_shards_close_at_their_size_and_never_inside_a_linear(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant.pipeline import layout

    monkeypatch.setattr(layout, "SHARD_BYTES", 3000)
    quantize(llama, tmp_path / "out", group_size=32, symmetric=False, method="gptq")
    files = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert len(set(files.values())) > 10 and set(files) == set(load_all(tmp_path / "out"))
    for name in (n.removesuffix("weight_packed") for n in files if n.endswith("weight_packed")):
        assert len({f for n, f in files.items() if n.startswith(name)}) == 1
    wanted = quantize(llama, tmp_path / "whole", group_size=32, symmetric=False, method="gptq")
    assert len(wanted["layers"]) == 14
    monkeypatch.undo()
    a, b = load_all(tmp_path / "out"), load_all(tmp_path / "whole")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight",
     "model.embed_tokens.weight", "model.norm.weight"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["minmax", "gptq", "none", "export"])
def test_a_source_that_holds_nan_is_named_and_leaves_nothing(
    method: str, tensor: str, llama: Path, tmp_path: Path
) -> None:
    """Also tensors that are copied; and no unfinished work, which no settings could finish."""
    source = copy_model(llama, tmp_path / "source")
    tensors = load_all(source)
    tensors[tensor].view(-1)[5] = -torch.inf
    save_all(source, tensors)
    with pytest.raises(NotFinite, match=f"{tensor} holds NaN or infinity: the source is damaged"):
        if method == "export":
            export(source, tmp_path / "out")
        elif method == "none":
            quantize(
                source, tmp_path / "out", method=method, format="plain", outlier_suppression="smooth_quant"
            )
        else:
            quantize(source, tmp_path / "out", method=method, group_size=32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_leftover_masks_may_hold_infinity_and_plain_values_keep_their_dtype(
    llama: Path, tmp_path: Path
) -> None:
    source = copy_model(llama, tmp_path / "source")
    tensors = load_all(source)
    mask, wide = "model.layers.0.self_attn.masked_bias", "model.layers.1.mlp.up_proj.weight"
    tensors |= {mask: torch.tensor(-torch.inf), wide: tensors[wide].double()}
    save_all(source, tensors)
    quantize(source, tmp_path / "out", method="none", format="plain", outlier_suppression="smooth_quant")
    made = load_all(tmp_path / "out")
    assert torch.equal(made[mask], tensors[mask]) and made[wide].dtype == torch.float64
    assert bool((torch.frexp(made[wide] / tensors[wide]).mantissa == 0.5).all())  # scaled by powers of two


def test_the_report_has_the_keys_of_the_contract_and_is_the_file(tmp_path: Path) -> None:
    report = quantize(TINYLM, tmp_path / "out")
    contract = (
        "output_path method scheme format source_bytes output_bytes seconds peak_rss_bytes "
        "peak_gpu_bytes layers fallbacks tensors verify output_hash"
    )
    assert set(contract.split()) <= set(report)
    assert {"name", "scheme", "error", "seconds", "fallback"} <= set(report["layers"][0])
    assert set(report["tensors"]) == {"quantized", "copied", "folded", "added", "kept", "dropped"}
    assert json.loads((tmp_path / "out" / "quant_report.json").read_text()) == json.loads(json.dumps(report))
    assert report["bits_per_weight"] == pytest.approx(
        4 + 16 / 128 + 8 * 28 * 16 / (4 * (256 * 512 + 256 * 256 + 768 * 768)), abs=1e-3
    )


def test_an_fp16_model_goes_on_with_the_values_that_its_plain_file_holds(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """On a CPU its blocks run in fp32: the next block must still see what the file holds."""
    source = checkpoints("llama", dtype=torch.float16)
    quantize(source, tmp_path / "out", method="gptq", group_size=32, format="plain", bits=2, layers="0")
    report = quantize(source, tmp_path / "both", method="gptq", group_size=32, format="plain", bits=2)
    mixed = copy_model(tmp_path / "out", tmp_path / "mixed")
    (mixed / "quant_report.json").unlink()
    again = quantize(
        mixed, tmp_path / "second", method="gptq", group_size=32, format="plain", bits=2, layers="1"
    )
    assert again["output_hash"] == report["output_hash"]


def test_a_gptq_checkpoint_carries_the_side_file_that_autogptq_reads(quantized: Callable[..., Path]) -> None:
    folder = quantized(method="minmax", format="gptq")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (
        json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
        == config["quantization_config"]
    )
    assert not (quantized(method="minmax") / "quantize_config.json").exists()


def test_outliers_that_few_bits_lose_are_named(llama: Path, tmp_path: Path) -> None:
    """One feature of the first block's input a few hundred times stronger, and read by weights as much
    weaker: the function is the same."""
    source = copy_model(llama, tmp_path / "model")
    tensors = load_all(source)
    tensors["model.layers.0.input_layernorm.weight"][5] *= 256
    for name in "qkv":
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"][:, 5] /= 256
    save_all(source, tensors)

    def told(**options: Any) -> set[str]:
        report = quantize(
            source,
            tmp_path / "-".join(["out", *map(str, options.values())]),
            method="gptq",
            group_size=32,
            **options,
        )
        return {
            x["name"] for x in report["layers"] if any("--outlier-suppression awq" in n for n in x["notes"])
        }

    assert told() == {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"}
    assert told(outlier_suppression="awq") == told(bits=8) == set()
