"""8-bit activations, FP8 and FP4 in one file or in some layers of it: verified, and evaluated against
rounding written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.calibration.text import evaluation_rows
from quant.checkpoint.reader import open_checkpoint
from quant.evaluation.compare import compare
from quant.evaluation.quality import evaluate
from quant.evaluation.verify import verify
from quant.formats.reading import dequantized
from quant.offline import load_tokenizer
from tests.evaluation.test_simulation import E4M3, FP4
from tests.helpers import change_config, copy_model, load_all, quantize, read_config, short_text

TEXT: dict[str, Any] = {"samples": 8, "sequence_length": 64, "calibration_dataset": [short_text()]}
SMALL: dict[str, Any] = {"text": short_text(), "length": 48, "chunks": 4}
#: First match of a name's end → scheme of the linear.
RULES: list[dict[str, Any]] = [
    {"layers": "*.layers.0.mlp.down_proj", "scheme": "w8a8-fp8"},
    {"layers": "*.layers.1.mlp.down_proj", "method": "gptq", "scheme": "w4a16", "group_size": 32},
    {"layers": "*.layers.1.self_attn.o_proj", "scheme": "mxfp8"},
    {"layers": "*.layers.0.self_attn.o_proj", "skip": True},
    {"layers": "*.layers.0.self_attn.*", "scheme": "w8a8-int8"},
    {
        "layers": "*.layers.1.self_attn.*",
        "scheme": "w8a8-int8",
        "activations": "static",
        "symmetric_activations": False,
    },
]


@pytest.fixture(scope="module")
def source(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints(
        "llama", hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2
    )


@pytest.fixture(scope="module")
def mixed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Six kinds of numbers; NVFP4 in the MLPs."""
    output = tmp_path_factory.mktemp("mixed") / "out"
    return output, quantize(
        source, output, method="minmax", scheme="nvfp4", kv_cache_scheme="fp8", rules=RULES, **TEXT
    )


def to_nearest(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return numbers[(x.unsqueeze(-1) - numbers).abs().argmin(-1)]


def rounded_input(name: str, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What vLLM makes of a linear's input [T, K], by the definition of the scheme that the rules give it."""
    largest = x.abs().amax(-1, keepdim=True)
    if name.endswith("layers.0.mlp.down_proj"):
        return to_nearest(x / (largest / 448), E4M3) * (largest / 448)
    if name.endswith("layers.1.self_attn.o_proj"):
        groups = x.unflatten(-1, (-1, 32))
        scale = 2.0 ** torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 448))
        return (to_nearest(groups / scale, E4M3) * scale).flatten(-2)
    if name.endswith(("layers.1.mlp.down_proj", "layers.0.self_attn.o_proj")):
        return x
    if ".layers.0.self_attn." in name:
        return (x / (largest / 127)).round() * (largest / 127)
    if ".self_attn." in name:
        scale, zero = tensors[f"{name}.input_scale"], tensors[f"{name}.input_zero_point"].float()
        return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale
    whole = tensors[f"{name}.input_global_scale"]
    groups = x.unflatten(-1, (-1, 16))
    scale = (groups.abs().amax(-1, keepdim=True) / 6 * whole).to(torch.float8_e4m3fn).float() / whole
    return (to_nearest(groups / scale, FP4) * scale).flatten(-2)


def test_verify_passes_and_the_report_tells_every_part(
    source: Path, mixed: tuple[Path, dict[str, Any]]
) -> None:
    output, report = mixed
    result = verify(output, source=source)
    assert result.passed, result.failed
    assert report["verify"]["passed"] and {p["name"] for p in report["scheme"]["parts"]} == {
        "nvfp4",
        "w8a8-fp8",
        "w4a16",
        "mxfp8",
        "w8a8-int8",
    }
    quantization = read_config(output)["quantization_config"]
    assert quantization["format"] == "mixed-precision" and quantization["kv_cache_scheme"]["num_bits"] == 8
    formats = {
        target: group["format"]
        for group in quantization["config_groups"].values()
        for target in group["targets"]
    }
    assert formats == {
        **{f"model.layers.{b}.self_attn.{x}_proj": "int-quantized" for b in range(2) for x in "qkv"},
        **{
            f"model.layers.{b}.mlp.{x}_proj": "nvfp4-pack-quantized" for b in range(2) for x in ("gate", "up")
        },
        "model.layers.1.self_attn.o_proj": "mxfp8-quantized",
        "model.layers.0.mlp.down_proj": "float-quantized",
        "model.layers.1.mlp.down_proj": "pack-quantized",
    }
    assert (
        set(quantization["ignore"])
        == {"model.layers.0.self_attn.o_proj", "lm_head"}
        == set(report["unquantized_linears"])
    )
    assert {t.name for t in compare(output, source).tensors if not t.equal} == {
        f"{n}.weight" for n in formats
    }


@pytest.mark.parametrize(
    "damage", ["a target lost", "a shard in another group", "a format of another group", "ignored"]
)
def test_verify_sees_groups_that_do_not_fit(
    damage: str, mixed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = copy_model(mixed[0], tmp_path / "m")
    quantization = read_config(folder)["quantization_config"]
    groups = list(quantization["config_groups"].values())
    by_format = {g["format"]: g for g in groups}
    if damage == "a target lost":
        by_format["float-quantized"]["targets"] = ["model.layers.9.mlp.down_proj"]
    elif damage == "a shard in another group":
        by_format["nvfp4-pack-quantized"]["targets"].remove("model.layers.0.mlp.up_proj")
        by_format["mxfp8-quantized"]["targets"].append("model.layers.0.mlp.up_proj")
    elif damage == "a format of another group":
        by_format["float-quantized"]["format"] = "mxfp8-quantized"
    else:
        quantization["ignore"].append("model.layers.0.mlp.down_proj")
    change_config(folder, quantization_config=quantization)
    assert not verify(folder).passed


def test_evaluate_rounds_each_input_as_its_own_scheme_says(
    source: Path, mixed: tuple[Path, dict[str, Any]]
) -> None:
    """Against the model of transformers with the dequantized weights, every input and K and V rounded by
    hand."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    output = mixed[0]
    found = evaluate(output, against=source, **SMALL)
    assert found.kl is not None and found.activations is not None
    for part in (
        "INT8 dynamic token",
        "INT8 static tensor asymmetric",
        "FP8 dynamic token",
        "NVFP4",
        "MXFP8",
        "FP8 KV cache",
    ):
        assert part in found.activations, found.activations
    rows = evaluation_rows(load_tokenizer(source), short_text(), SMALL["length"], SMALL["chunks"])
    wanted_model, model = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval() for _ in range(2)
    )
    values, tensors = dequantized(open_checkpoint(output)), load_all(output)
    model.load_state_dict({n: values.read(n).float() for n in values.tensors})
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(lambda m, x, name=name: (rounded_input(name, x[0], tensors),))
    eager = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def cached(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **more: Any
    ) -> Any:
        prefix = f"model.layers.{module.layer_idx}.self_attn"
        key, value = (
            to_nearest(t / s, E4M3) * s
            for t, s in ((key, tensors[f"{prefix}.k_scale"]), (value, tensors[f"{prefix}.v_scale"]))
        )
        return eager(module, query, key, value, *args, **more)

    ALL_ATTENTION_FUNCTIONS.register("rounded", cached)
    model.set_attn_implementation("rounded")
    with torch.no_grad():
        wanted, made = (m(input_ids=rows).logits[:, :-1].log_softmax(-1) for m in (wanted_model, model))
    kl = (wanted.exp() * (wanted - made)).sum(-1).mean()
    # a value on the border of two codes may fall either way
    assert found.kl.mean == pytest.approx(float(kl), rel=0.05)
    weights_alone = copy_without_activations(output, source)
    assert abs(found.kl.mean - weights_alone) > 0.1 * found.kl.mean


def copy_without_activations(output: Path, source: Path) -> float:
    """KL of the weights alone: what a run without rounded inputs would give."""
    import tempfile

    from quant.pipeline.export import export

    with tempfile.TemporaryDirectory() as folder:
        export(output, Path(folder) / "plain", "plain")
        kl = evaluate(Path(folder) / "plain", against=source, **SMALL).kl
    assert kl is not None
    return kl.mean


NEW = [
    "w8a8-int8",
    "w8a8-fp8",
    "w8a8-fp8-tensor",
    "fp8-block",
    "w8a16-fp8",
    "nvfp4",
    "nvfp4a16",
    "mxfp4",
    "mxfp4a16",
    "mxfp8",
]


@pytest.mark.parametrize("scheme", NEW)
def test_layer_wise_leaves_the_other_block_as_it_is(
    scheme: str, source: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    text = ["--samples", "8", "--sequence-length", "64", "--calibration-dataset", short_text()]
    # smoothing would change the norms too
    options = ["--method", "minmax", "--scheme", scheme, "--outlier-suppression", "none", *text, "--json"]
    result = cli("layer-wise", "-m", source, "-o", tmp_path / "last", "--layers", "last:1", *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert len(report["layers"]) == 7 and all(".layers.1." in x["name"] for x in report["layers"])
    assert len(report["unquantized_linears"]) == 8
    assert verify(tmp_path / "last", source=source).passed
    before, after = load_all(source), load_all(tmp_path / "last")
    untouched = [n for n in before if ".layers.1." not in n or "norm" in n]
    assert all(torch.equal(after[n], before[n]) for n in untouched) and len(untouched) == 3 + 9 + 2
    assert cli("quantize", "-m", source, "-o", tmp_path / "all", *options).code == 0
    last, everything = (evaluate(tmp_path / n, against=source, **SMALL) for n in ("last", "all"))
    assert last.kl is not None and everything.kl is not None and 0 < last.kl.mean < everything.kl.mean < 0.5
    assert last.activations == everything.activations
    assert (last.activations is None) == ("a16" in scheme)
