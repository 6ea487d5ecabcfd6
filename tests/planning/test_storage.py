"""Predicted bytes of quantized checkpoints: against tensors packed in the test, and against what the command
writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.catalog import find_model, model_from_directory, stored_bytes
from quant.checkpoint.header import TensorInfo, read_header
from quant.errors import UsageError
from quant.formats import Contents, FormatRegistry
from quant.hardware import named_gpu
from quant.models.shapes import weights_from_tensors
from quant.planning import plan
from quant.planning.storage import checkpoint_bytes, file_bytes, source_kernels, source_schemes
from quant.schemes import PRESETS, SCHEMES, Scheme, WeightScheme, resolve_scheme
from quant.vllm.layers import Linear
from quant.vllm.lists import left_out
from tests.helpers import load_all, quantize, short_text

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT.parent / "shared" / "data" / "models"
MODEL = MODELS / "tinylm-11m"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 256, 128), (48, 352, 32), (8, 128, -1), (172, 64, 64)])
def test_packed_bytes_are_those_of_the_tensors(
    bits: int, symmetric: bool, n: int, k: int, group: int
) -> None:
    groups = 1 if group == -1 else k // group
    per_word = 32 // bits
    tensors = [
        np.zeros((n, -(-k // per_word)), np.int32),
        np.zeros((n, groups), np.float16),
        np.zeros(2, np.int64),
    ]
    if not symmetric:
        tensors.append(np.zeros((-(-n // per_word), groups), np.int32))
    scheme = Scheme("packed", WeightScheme(bits, group, symmetric))
    assert scheme.stored_bytes(n, k, 2) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    "scheme",
    [
        *PRESETS.values(),
        *(
            resolve_scheme(name, activations="static")
            for name in ("w8a8-int8", "w8a8-fp8", "w8a8-fp8-tensor")
        ),
        resolve_scheme("w8a8-int8", activations="static", symmetric_activations=False),
        resolve_scheme("w4a16", group_size=-1),
        resolve_scheme("w4a16-asym", group_size=32),
        resolve_scheme("w3a16", group_size=64, symmetric=False),
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (48, 384), (4096, 14336), (172, 128), (1, 128)])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_a_scheme_stores_is_what_the_format_specifies(
    scheme: Scheme, n: int, k: int, dtype: str
) -> None:
    linear = Linear("x", n, k, scheme.weights, scheme.activations)
    specs = FormatRegistry.get("compressed-tensors").specs(linear, dtype)
    expected = {s.name.removeprefix("x."): s.nbytes for s in specs}
    stored = scheme.stored_tensors(n, k, 2 if dtype == "BF16" else 4)
    assert stored == expected and scheme.stored_bytes(n, k, 2) <= sum(expected.values())


def test_a_quantized_checkpoint_keeps_embeddings_head_and_norms() -> None:
    spec = find_model("meta-llama/Llama-3.1-8B-Instruct")
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    kept = 2 * (spec.parameters - linears)
    expected = kept + linears // 2 + linears // 128 * 2 + 32 * 7 * 16
    assert checkpoint_bytes(spec, PRESETS["w4a16"]) == expected


def test_linears_that_groups_do_not_divide_stay_as_they_are() -> None:
    spec = find_model("openai-community/gpt2")
    scheme = PRESETS["w4a16"]
    assert checkpoint_bytes(spec, scheme.with_group_size(512)) > checkpoint_bytes(spec, scheme)


def test_a_smaller_group_costs_its_scales() -> None:
    spec = find_model("meta-llama/Llama-3.1-8B")
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    scheme = PRESETS["w4a16"]
    more = checkpoint_bytes(spec, scheme.with_group_size(32)) - checkpoint_bytes(spec, scheme)
    assert more == linears * 2 * 3 // 128


@pytest.mark.parametrize(
    ("name", "gib"),
    [  # as printed by vLLM when loading on one GPU
        ("openai/gpt-oss-20b", 12.0), ("RedHatAI/Qwen2.5-7B-Instruct-FP8-dynamic", 8.14),
        ("Meta-Llama-3.1-8B-Instruct-quantized.w4a16", 5.38),
    ],
)  # fmt: skip
def test_quantized_sources_are_read_in_their_own_scheme(name: str, gib: float) -> None:
    spec = find_model(name)
    own = source_schemes(spec)
    total = sum(
        s.stored_bytes(w.shape[0], w.shape[1], 2) * w.count if (s := own(w)) else 2 * w.parameters
        for w in spec.weights
        if w.role != "mtp"
    )
    assert total / 2**30 == pytest.approx(gib, rel=0.08 if "oss" in name else 0.02)


def test_an_ignore_list_leaves_its_modules_in_16_bits() -> None:
    spec = find_model("moonshotai/Kimi-K2.5")
    stored = {w.role: source_schemes(spec)(w) for w in spec.weights}
    assert {role: s.weights.bits for role, s in stored.items() if s is not None} == {"experts": 4}


def test_a_checkpoint_of_several_schemes_is_planned_linear_by_linear() -> None:
    """As the format writes it: groups with names for targets, one with a pattern, and one that is left."""
    spec = find_model("meta-llama/Llama-3.1-8B")
    form = FormatRegistry.get("compressed-tensors")
    kinds = {"w4a16": "self_attn", "w8a8-fp8": "mlp"}
    linears = [
        Linear(f"model.layers.{i}.{module}.{p}", 8, 128, PRESETS[name].weights, PRESETS[name].activations)
        for name, module in kinds.items()
        for i in range(32)
        for p in (
            ("q_proj", "k_proj", "v_proj", "o_proj") if module == "self_attn" else ("gate_proj", "up_proj")
        )
    ]
    config = form.config(Contents(linears, ["lm_head"]))
    assert config is not None and config["format"] == "mixed-precision"
    own = source_schemes(replace(spec, quantization=config))
    stored = {w.name: own(w) for w in spec.weights if w.linear}
    for name, scheme in stored.items():
        wanted = "w4a16" if "mlp" not in name else "w8a8-fp8"
        assert scheme == (None if name == "mlp.down_proj" else PRESETS[wanted]), name
    assert source_kernels(replace(spec, quantization=config)) == {"int4-weights", "fp8"}
    patterns = {
        **config,
        "config_groups": {
            "a": {**config["config_groups"]["group_0"], "targets": [r"re:.*layers\.[0-7]\.self_attn\."]},
            "b": {**config["config_groups"]["group_1"], "targets": ["Linear"]},
        },
        "ignore": ["re:.*layers.31.*"],
    }
    own = source_schemes(replace(spec, quantization=patterns))
    kept = {w.layer: own(w) for w in spec.weights if w.name == "self_attn.q_proj"}
    assert [kept[i] for i in (0, 7, 8, 31)] == [PRESETS["w4a16"], PRESETS["w4a16"], PRESETS["w8a8-fp8"], None]
    wrapped = {
        "a": {**config["config_groups"]["group_0"], "targets": ["Linear"]},
        "b": {
            **config["config_groups"]["group_1"],
            "targets": ["model.language_model.layers.3.self_attn.q_proj"],
        },
    }
    own = source_schemes(replace(spec, quantization={**config, "config_groups": wrapped}))
    kept = {w.layer: own(w) for w in spec.weights if w.name == "self_attn.q_proj"}
    assert [kept[i] for i in (2, 3)] == [PRESETS["w4a16"], PRESETS["w8a8-fp8"]]
    plans = [plan(replace(spec, quantization=q), [named_gpu("H100")]) for q in (config, None)]
    fewer = sum(
        2 * w.parameters - s.stored_bytes(w.shape[0], w.shape[1], 2)
        for w in spec.weights
        if (s := stored.get(w.name)) is not None
    )
    assert plans[1].weights_bytes - plans[0].weights_bytes == fewer


def test_a_config_that_cannot_be_understood_is_no_matter_where_the_tensors_were_counted() -> None:
    spec = replace(
        find_model("Llama-2-7b"),
        quantization={
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "int", "strategy": "novel"},
                }
            },
        },
    )
    with pytest.raises(UsageError, match="strategy 'novel'.*--model-path"):
        source_schemes(spec)
    counted = replace(spec, weights=tuple(replace(w, stored_bytes=1) for w in spec.weights))
    assert source_schemes(counted)(counted.weights[1]) is None and source_kernels(counted) == frozenset()


def test_an_unknown_source_format_asks_for_the_directory() -> None:
    with pytest.raises(UsageError, match="--model-path"):
        source_schemes(replace(find_model("Llama-2-7b"), quantization={"quant_method": "novel"}))


@pytest.mark.skipif(not MODEL.is_dir(), reason="../shared is not there")
@pytest.mark.parametrize(
    ("model", "name", "group"),
    [
        ("tinylm-11m", "w4a16", 128),
        ("tinylm-11m", "w4a16-asym", 128),
        ("tinylm-11m", "w8a16", 128),
        ("tinylm-4m", "w4a16", 32),
        ("babyllama-tok105", "w4a16-asym", 32),
    ],
)
def test_predicted_bytes_are_what_quantize_writes(tmp_path: Path, model: str, name: str, group: int) -> None:
    out, source = tmp_path / "out", model_from_directory(MODELS / model)
    arguments = [
        "quantize",
        "-m",
        str(MODELS / model),
        "-o",
        str(out),
        "--method",
        "minmax",
        "--scheme",
        name,
        "--group-size",
        str(group),
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "quantize.py"), *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scheme = resolve_scheme(name, group_size=group)
    assert checkpoint_bytes(source, scheme) == stored_bytes(model_from_directory(out))
    files = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert file_bytes(source, scheme) == pytest.approx(files, rel=0.005)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", sorted(name for name, row in SCHEMES.items() if row.methods))
def test_every_scheme_that_is_made_takes_what_was_predicted(
    name: str, kind: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Small models, of which headers and numbers of whole tensors are a large part: what is left out of the
    count shows."""
    sides = {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    }
    model, output = checkpoints(kind, **sides), tmp_path / "out"
    source = model_from_directory(model)
    text = {"samples": 4, "sequence_length": 32, "calibration_dataset": [short_text()]}
    report = quantize(model, output, method="minmax", scheme=name, **text)
    scheme = PRESETS[name]
    assert report["scheme"]["name"] == name and len(report["layers"]) == 14
    tensors = sum(t.nbytes for t in load_all(output).values())
    assert checkpoint_bytes(source, scheme) == tensors == stored_bytes(model_from_directory(output))
    assert file_bytes(source, scheme) == pytest.approx(
        sum(f.stat().st_size for f in output.glob("*.safetensors")), rel=0.005
    )


@pytest.mark.skipif(not MODEL.is_dir(), reason="../shared is not there")
def test_a_directory_as_it_is_costs_its_file() -> None:
    spec = model_from_directory(MODEL)
    sizes = 0
    for name, info in read_header(MODEL / "model.safetensors")[0].items():
        assert info.dtype == "BF16", name
        sizes += 2 * info.numel
    assert checkpoint_bytes(spec) == sizes


@pytest.mark.parametrize(
    ("config", "name", "left"),
    [
        ({"quant_method": "awq", "modules_to_not_convert": ["visual"]}, "model.visual.merger.0", True),
        # a part of the name of the layer that it is fused into
        ({"quant_method": "awq", "modules_to_not_convert": ["gate"]}, "a.mlp.up_proj", True),
        ({"quant_method": "fp8", "ignored_layers": ["q_proj"]}, "a.attn.q_proj", False),
        ({"quant_method": "fp8", "modules_to_not_convert": ["a.attn.q_proj"]}, "a.attn.q_proj", True),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*attn.*"]}, "a.attn.o_proj", True),
        ({"quant_method": "compressed-tensors", "ignore": ["attn"]}, "a.attn.o_proj", False),
        ({"quant_method": "modelopt", "ignore": ["a.*.attn*"]}, "a.3.attn.o_proj", True),
        ({"quant_method": "modelopt", "exclude_modules": ["router"]}, "a.router.proj", True),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["o_proj"]}, "a.o_proj", True),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["_proj"]}, "a.o_proj", False),
    ],
)
def test_each_methods_list_is_compared_as_vllm_compares_it(
    config: dict[str, Any], name: str, left: bool
) -> None:
    assert left_out(config)(f"x.{name}", name) is left


def test_what_vllm_builds_in_16_bits_is_planned_in_16_bits() -> None:
    """Mixers of Mamba 1, told by what stands beside, and the keys of sparse attention's indexer."""
    shapes = {"mamba.in_proj": (512, 128), "mamba.x_proj": (40, 256), "mamba.dt_proj": (256, 8),
              "mamba.out_proj": (128, 256), "feed_forward.up_proj": (512, 128)}  # fmt: skip
    infos = [
        TensorInfo(f"model.layers.0.{n}.weight", "BF16", s, Path("x"), 0, 2 * s[0] * s[1])
        for n, s in shapes.items()
    ]
    weights = weights_from_tensors(infos, {"hidden_size": 128, "num_hidden_layers": 1}, 1)
    assert [w.name for w in weights if w.linear] == ["model.layers.0.feed_forward.up_proj.weight"]
    indexer = [w for w in find_model("deepseek-ai/DeepSeek-V3.2").weights if ".indexer.w" in w.name]
    assert {w.name.rpartition(".")[2]: w.linear for w in indexer if w.layer == 5} == {
        "wq_b": True, "wk": False, "weights_proj": False,
    }  # fmt: skip
