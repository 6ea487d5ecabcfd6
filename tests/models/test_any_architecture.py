"""Methods that need no data take any architecture: text linears are quantized; towers, routers and everything
else are copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import QuantError
from quant.evaluation.verify import verify
from quant.pipeline.export import export
from quant.pipeline.plan import plan_job
from quant.report.value import NOT_ROUTED
from tests.helpers import (
    SHAPE,
    add_tokenizer,
    load_all,
    quantize,
    randomize,
    read_config,
    recipe,
    save_all,
    save_model,
    tiny_config,
)

MOE = {"num_experts_per_tok": 2, "head_dim": 16}


def moe(folder: Path, kind: str) -> Path:
    from transformers import AutoModelForCausalLM

    changes = {
        "mixtral": {"num_local_experts": 4},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    }[kind]
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **MOE, **changes), dtype=torch.bfloat16)
    randomize(model)
    return save_model(model, folder)


def gemma3(folder: Path) -> Path:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {k: v for k, v in SHAPE.items()} | {"head_dim": 32, "sliding_window": 16}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).bfloat16()
    randomize(model)
    return save_model(model, folder)


def qwen2_vl(folder: Path) -> Path:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=SHAPE | {"rope_parameters": rope}, vision_config=vision)
    ).bfloat16()
    randomize(model)
    return save_model(model, folder)


CASES: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "mixtral": (lambda f: moe(f, "mixtral"), {"block_sparse_moe.gate", "mlp.gate"}),
    "qwen3_moe": (lambda f: moe(f, "qwen3_moe"), {"mlp.gate"}),
    "gemma3": (gemma3, {"vision_tower", "multi_modal_projector"}),
    "qwen2_vl": (qwen2_vl, {"visual"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = CASES[kind][0](tmp_path_factory.mktemp(kind) / "model")
        return made[kind]

    return get


@pytest.mark.parametrize("kind", CASES)
def test_text_linears_are_quantized_and_all_else_is_copied_byte_for_byte(
    kind: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = models(kind)
    report = quantize(source, tmp_path / "out", group_size=32)
    before, after = load_all(source), load_all(tmp_path / "out")
    quantized = {n.removesuffix("_packed") for n in after if n.endswith(".weight_packed")}
    assert quantized == set(report["tensors"]["quantized"])
    expected = {
        n
        for n, t in before.items()
        if t.ndim == 2
        and ".layers." in n
        and n.endswith("_proj.weight") | (".experts." in n)
        and not any(f"{part}." in n for part in ("vision_tower", "visual"))
    }
    assert quantized == expected and len(quantized) >= 14
    for name in set(before) - quantized:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
    left = [
        n
        for n in before
        if n not in quantized and n.endswith(".weight") and before[n].ndim == 2 and "embed" not in n
    ]
    assert {part for part in CASES[kind][1] if any(f"{part}." in n for n in left)}, "what must stay is there"
    ignored = set(read_config(tmp_path / "out")["quantization_config"]["ignore"])
    assert {n.removesuffix(".weight") for n in left} <= ignored
    assert report["verify"]["passed"]


@pytest.mark.parametrize("kind", CASES)
def test_transformers_loads_the_plain_form_and_computes_nearly_the_same(
    kind: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    quantize(models(kind), tmp_path / "out", group_size=32, bits=8, format="plain")
    loader: Any = AutoModelForImageTextToText if kind in ("gemma3", "qwen2_vl") else AutoModelForCausalLM
    tokens = torch.randint(2, 4000, (1, 12), generator=torch.Generator().manual_seed(0))
    logits = []
    for path in (models(kind), tmp_path / "out"):
        with torch.no_grad():
            logits.append(loader.from_pretrained(path, dtype=torch.float32)(input_ids=tokens).logits)
    relative = float((logits[0] - logits[1]).norm() / logits[0].norm())
    assert 0 < relative < 0.1


@pytest.mark.parametrize(("kind", "told"), [("gemma3", True), ("qwen2_vl", False)])
def test_a_tower_under_names_that_vllm_does_not_read_is_told(
    kind: str, told: bool, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers 5 saves Gemma 3's tower without its ``vision_model``, as no published file has it."""
    job = plan_job(recipe(models(kind), tmp_path / "out", group_size=32))
    assert any("vision_tower.vision_model" in note for note in job.notes) == told
    (judged,) = [c for c in verify(models(kind)).checks if c.name == "model class"]
    assert ("vision_tower.vision_model" in judged.detail) == told
    assert plan_job(recipe(models(kind), tmp_path / "out", group_size=32, target="other")).notes == ()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gemma3"])
def test_methods_that_need_data_take_mixtures_and_wrappers(
    kind: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    report = quantize(models(kind), tmp_path / "out", method="gptq", group_size=32)
    layers = [x for x in report["layers"] if x["tokens"]]
    measured = [x["error"] for x in layers if x["error"] is not None]
    assert report["verify"]["passed"] and max(measured) < 0.2 and len(measured) > 0.8 * len(layers)
    # an expert that no token of the held-out row was sent to has none
    assert {x["error_missing"] for x in layers if x["error"] is None} <= {NOT_ROUTED}


def test_a_linear_whose_input_no_pass_shows_is_rounded_and_named(tmp_path: Path) -> None:
    """Mamba multiplies by dt_proj's weight without calling the module."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(hidden_size=192, num_hidden_layers=2, vocab_size=4096, state_size=16, time_step_rank=24)
    ).bfloat16()
    source = save_model(model, tmp_path / "model")
    with pytest.raises(QuantError, match="nothing that vLLM would read quantized: vLLM's mixer of Mamba 1"):
        quantize(source, tmp_path / "out", group_size=32)
    report = quantize(source, tmp_path / "out", method="gptq", group_size=32, target="other")
    assert {n.split("mixer.")[1] for n in report["tensors"]["quantized"]} == {
        "in_proj.weight",
        "x_proj.weight",
        "out_proj.weight",
    }
    assert set(report["left"].values()) == {"24 inputs do not divide into groups of 32"}
    report = quantize(source, tmp_path / "channels", method="gptq", group_size=-1, target="other")
    rounded = {x["name"]: x["fallback"] for x in report["fallbacks"]}
    assert {n.rpartition(".")[2] for n in rounded} == {"dt_proj"} and len(rounded) == 2
    assert all("no calibration token" in fallback for fallback in rounded.values())


@pytest.mark.parametrize(("method", "scheme"), [("gptq", "w4a16"), ("minmax", "w8a8-fp8")])
def test_weights_that_are_stored_transposed_are_quantized_along_their_inputs(
    method: str, scheme: str, tmp_path: Path
) -> None:
    """GPT-2: codes that are called ``weight`` lie as vLLM's loader turns them, packed ones as it takes them;
    values go back as the family stores them."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=4096, bos_token_id=0, eos_token_id=1)
    ).bfloat16()
    randomize(model)
    source = save_model(model, tmp_path / "model")
    options = {"group_size": 32} if scheme == "w4a16" else {}
    report = quantize(source, tmp_path / "out", method=method, scheme=scheme, **options)
    assert len(report["tensors"]["quantized"]) == 8 and report["verify"]["passed"]
    made, name = load_all(tmp_path / "out"), "transformer.h.0.attn.c_attn"
    if scheme == "w4a16":
        assert made[f"{name}.weight_shape"].tolist() == [192, 64]
        assert made[f"{name}.weight_scale"].shape == (192, 2)
    else:
        assert made[f"{name}.weight"].shape == (64, 192) and made[f"{name}.weight_scale"].shape == (192, 1)
    export(tmp_path / "out", tmp_path / "plain", "plain")
    tokens = torch.randint(2, 4000, (1, 12), generator=torch.Generator().manual_seed(0))
    logits = []
    for path in (source, tmp_path / "plain"):
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            logits.append(loaded(input_ids=tokens).logits)
    assert 0 < float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.2


def gemma4_text(folder: Path, **changes: Any) -> Path:
    """Embeddings of each token for each block, and layers that read another layer's keys and values."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    config = Gemma4TextConfig(
        **SHAPE | {"num_hidden_layers": 4, "head_dim": 32, "global_head_dim": 32},
        vocab_size_per_layer_input=SHAPE["vocab_size"],
        hidden_size_per_layer_input=32,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **changes,
    )
    model = Gemma4ForCausalLM(config).bfloat16()
    randomize(model)
    return save_model(model, folder)


def test_blocks_that_read_what_earlier_ones_leave_are_calibrated(tmp_path: Path) -> None:
    """A published file holds keys and values for layers that read another layer's: nothing reads them, and
    they are rounded."""
    source = gemma4_text(tmp_path / "model")
    tensors = load_all(source)
    unread = {
        n.replace("layers.1.", "layers.3."): t.clone()
        for n, t in tensors.items()
        if n.startswith("model.layers.1.self_attn.") and n.rsplit(".", 2)[1] in ("k_proj", "v_proj", "k_norm")
    }
    assert unread and not set(unread) & set(tensors)
    save_all(source, tensors | unread)
    report = quantize(source, tmp_path / "out", method="gptq", group_size=32, target="other")
    rounded = {x["name"] for x in report["fallbacks"]}
    assert rounded == {n.removesuffix(".weight") for n in unread if "_proj" in n}
    seen = [x for x in report["layers"] if x["name"] not in rounded]
    assert all(x["tokens"] and x["error"] < 0.2 for x in seen) and len(seen) > 30


def test_a_folder_whose_tensors_have_no_blocks_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "x"}))
    save_all(source, {"a.weight": torch.ones(32, 32)})
    with pytest.raises(QuantError, match="no linear of a decoder block is found among its 1 tensors"):
        quantize(source, tmp_path / "out")


def test_a_model_type_that_nobody_knows_is_quantized_without_data(tmp_path: Path, llama: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(
        json.dumps(
            {
                "model_type": "martian",
                "architectures": ["Martian"],
                "dtype": "bfloat16",
                "num_hidden_layers": 2,
            }
        )
    )
    add_tokenizer(source)
    save_all(source, load_all(llama))
    assert len(quantize(source, tmp_path / "out", group_size=32)["tensors"]["quantized"]) == 14
    with pytest.raises(QuantError, match="martian"):
        quantize(source, tmp_path / "gptq", method="gptq", group_size=32)


def test_linears_that_the_block_does_not_run_are_refused_before_any_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant.models.skeleton import Skeleton
    from quant.pipeline.manager import QuantizationManager

    plan = plan_job(recipe(llama, tmp_path / "out", method="gptq", group_size=32))
    groups = Skeleton.groups
    monkeypatch.setattr(Skeleton, "groups", lambda self, index: groups(self, index)[:-1])
    with pytest.raises(QuantError, match="model.layers.0.mlp.down_proj, .*are not among .*--ignore"):
        QuantizationManager(plan).prepare()
    assert open_checkpoint(llama).nbytes > 0
