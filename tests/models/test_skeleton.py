"""A model run block by block gives the logits that transformers' own whole model gives, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, SourceFault
from quant.evaluation.quality import evaluate
from quant.models import ModelRegistry
from quant.models.adapter import adapter_for
from quant.models.skeleton import Skeleton
from quant.pipeline.activation_store import ActivationStore, Batches, Calls
from quant.pipeline.staged import run_block
from tests.helpers import FAMILIES, GENERIC, change_config, copy_model, load_all, save_all, short_text

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 4096, (3, 40), generator=torch.Generator().manual_seed(0))


def blockwise_logits(skeleton: Skeleton, batches: list[torch.Tensor]) -> torch.Tensor:
    hidden, calls = skeleton.embed(batches)
    store = ActivationStore(1 << 30, Path("unused"))
    held = Batches(store, hidden)
    for index in range(skeleton.block_count):
        run_block(skeleton.load_block(index), index, held, Calls(store, calls))
        skeleton.free_block(index)
    with skeleton.outside(), torch.no_grad():
        return torch.cat([skeleton.logits(b, held.take(i)) for i, b in enumerate(batches)])


def whole_logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", [*FAMILIES, *GENERIC])
@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
def test_block_by_block_logits_equal_the_whole_models(
    kind: str, tie: bool, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints(kind, tie=tie)
    assert ("lm_head.weight" in open_checkpoint(folder).tensors) != tie
    skeleton = Skeleton(open_checkpoint(folder), CPU, torch.float32)
    found = blockwise_logits(skeleton, [TOKENS[:2], TOKENS[2:]])
    wanted = whole_logits(folder, torch.float32)
    assert float(wanted.std()) > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert all(p.is_meta for p in skeleton.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_stored_dtype_runs_in_the_dtype_that_suits_the_device(
    dtype: torch.dtype, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints("llama", dtype=dtype)
    skeleton = Skeleton(open_checkpoint(folder), CPU)
    assert skeleton.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    found, wanted = blockwise_logits(skeleton, [TOKENS]), whole_logits(folder, skeleton.dtype)
    assert found.dtype == wanted.dtype
    assert float((found.float() - wanted.float()).norm() / wanted.float().norm()) < (
        0.02 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_groups_of_a_row_are_the_ones_that_a_run_of_the_block_shows(
    kind: str, checkpoints: Callable[..., Path]
) -> None:
    skeleton = Skeleton(open_checkpoint(checkpoints(kind)), CPU)
    probed = skeleton._trace(0)
    assert [set(g.linears) for g in probed] == [set(g.linears) for g in skeleton.groups(0)]


@pytest.mark.parametrize("kind", GENERIC)
def test_a_family_without_a_row_gets_its_groups_from_a_run_of_the_block(
    kind: str, checkpoints: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(checkpoints(kind))
    assert adapter_for(checkpoint.config) is None
    groups = [set(g.linears) for g in Skeleton(checkpoint, CPU).groups(0)]
    attention = "attn" if kind == "gptj" else "self_attn"
    assert {f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"} <= groups[0]
    wanted = {
        n.split(".0.")[1].removesuffix(".weight")
        for n, i in checkpoint.tensors.items()
        if ".0." in n and len(i.shape) == 2
    }
    assert set().union(*groups) == wanted


def test_every_row_names_each_linear_once_and_sources_that_are_in_the_block() -> None:
    for row in ModelRegistry:
        assert len(set(row.linears())) == len(row.linears())
        for group in row.groups:
            assert group.source.endswith("norm") or group.source in row.linears()


def test_loading_a_block_fills_that_block_alone_and_freeing_empties_it(llama: Path) -> None:
    skeleton, stored = Skeleton(open_checkpoint(llama), CPU), load_all(llama)
    block = skeleton.load_block(1)
    assert all(torch.equal(p, stored[f"model.layers.1.{n}"]) for n, p in block.named_parameters())
    assert all(p.is_meta for n, p in skeleton.model.named_parameters() if ".layers.1." not in n)
    skeleton.free_block(1)
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_replaced_weights_take_the_place_of_the_files(llama: Path) -> None:
    skeleton = Skeleton(open_checkpoint(llama), CPU)
    name = "model.layers.0.self_attn.q_proj.weight"
    block = skeleton.load_block(0, {name: torch.full((64, 64), 3.0)})
    assert float(block.self_attn.q_proj.weight.float().mean()) == 3.0  # type: ignore[union-attr]


def test_building_the_skeleton_leaves_torch_as_it_was(llama: Path) -> None:
    before = torch.nn.Module.register_parameter, torch.get_default_dtype(), torch.get_rng_state()
    Skeleton(open_checkpoint(llama), CPU)
    assert torch.nn.Module.register_parameter is before[0] and torch.get_default_dtype() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_an_error_that_names_it(
    value: float, llama: Path, tmp_path: Path
) -> None:
    folder = copy_model(llama, tmp_path / "m")
    tensors = load_all(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_all(folder, tensors)
    skeleton = Skeleton(open_checkpoint(folder), CPU)
    skeleton.load_block(0)
    with pytest.raises(
        CheckpointError,
        match="mlp.up_proj.weight holds NaN or infinity: the source is damaged, fetch it again",
    ):
        skeleton.load_block(1)


@pytest.mark.parametrize("kind", ["llama", "stablelm"])
@pytest.mark.parametrize("damage", ["lost", "extra", "reshaped"])
def test_blocks_whose_tensors_do_not_match_the_model_are_refused_with_the_differences(
    kind: str, damage: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_model(checkpoints(kind), tmp_path / "m")
    tensors = load_all(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "lost":
        del tensors[name]
    elif damage == "extra":
        tensors["model.layers.1.mlp.surprise.weight"] = torch.ones(2, 2)
    else:
        tensors[name] = tensors[name][:, :-8]
    save_all(folder, tensors)
    message = {
        "lost": f"{name} is missing in the file",
        "extra": "surprise.weight is in the file only",
        "reshaped": r"is \(96, 56\) in the file, \(96, 64\) in the model",
    }
    with pytest.raises(
        CheckpointError, match=rf"do not match one to one: .*{message[damage]}.*--method minmax"
    ):
        Skeleton(open_checkpoint(folder), CPU)


def test_blocks_that_share_weights_are_refused_for_that_and_not_for_missing_tensors(tmp_path: Path) -> None:
    """Zamba2 runs one transformer in several blocks: transformers saves it in the first of them alone."""
    config = transformers.Zamba2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"] * 2, hybrid_layer_ids=[1, 3], num_attention_heads=2,
        mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=32, adapter_rank=8, pad_token_id=0,
    )  # fmt: skip
    transformers.Zamba2ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    said = r"share weights: model.layers.3.shared_\S+ is model.layers.1.shared_\S+, which .*--method minmax"
    with pytest.raises(CheckpointError, match=said):
        Skeleton(open_checkpoint(tmp_path), CPU)


def test_a_tensor_outside_the_blocks_that_is_lost_is_named(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "m")
    save_all(folder, {n: t for n, t in load_all(folder).items() if n != "model.norm.weight"})
    skeleton = Skeleton(open_checkpoint(folder), CPU)
    with pytest.raises(CheckpointError, match="has no tensor 'model.norm.weight', which the model needs"):
        skeleton.embed([TOKENS])
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_a_file_under_names_that_vllm_does_not_read_is_refused_for_these(tmp_path: Path) -> None:
    """transformers 5 saves the blocks of Qianfan-OCR's text decoder where no published file has them."""
    config = transformers.QianfanOCRConfig(
        text_config={
            "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
    )  # fmt: skip
    transformers.QianfanOCRForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path)
    skeleton = Skeleton(open_checkpoint(tmp_path), CPU)
    with pytest.raises(CheckpointError, match="vLLM's class looks for language_model.model.layers, as p"):
        skeleton.embed([TOKENS])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "martian"}, "config.json: transformers cannot use it"),
        ({"model_type": ...}, "config.json: transformers cannot use it"),
        ({"model_type": "bert"}, "do not match one to one|cannot be built|equal blocks"),
        ({"hidden_size": 63}, "do not match one to one|cannot be built|cannot use it"),
        ({"hidden_size": "many"}, "cannot be built|cannot use it"),
        ({"num_hidden_layers": 3}, r"model.layers.2\.\S+ is missing in the file"),
        ({"hidden_act": "warp"}, "cannot be built|cannot use it"),
        ({"num_attention_heads": 0}, "cannot be built|cannot use it"),
    ],
)
def test_a_config_that_makes_no_model_is_an_error_in_words(
    changes: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    folder = copy_model(llama, tmp_path / "m")
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        Skeleton(open_checkpoint(folder), CPU)


def test_values_that_blocks_are_called_with_go_with_their_batch(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What all batches share is kept once; values of each token are the batch's own, and set aside between
    blocks."""
    from transformers.models.stablelm.modeling_stablelm import StableLmModel

    plain = StableLmModel.forward

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        return plain(self, input_ids=input_ids, per_token={"values": [input_ids * 2]}, **kwargs)

    monkeypatch.setattr(StableLmModel, "forward", forward)
    skeleton = Skeleton(open_checkpoint(checkpoints("stablelm")), CPU)
    assert skeleton.groups(0)
    hidden, recorded = skeleton.embed([*TOKENS.split(1)])
    store = ActivationStore(0, tmp_path / "scratch")
    calls = Calls(store, recorded)
    for batch, tokens in enumerate(TOKENS.split(1)):
        (own,) = recorded[batch][0].kwargs["per_token"]["values"]
        assert bool(own.untyped_storage().nbytes()) is (batch == 0)  # what only the first has is not known
        for block in range(skeleton.block_count):
            call = calls.take(batch, block)
            assert torch.equal(call.kwargs["per_token"]["values"][0], tokens * 2)
            first = recorded[0][0].kwargs["position_embeddings"]
            assert all(a is b for a, b in zip(call.kwargs["position_embeddings"], first, strict=True))
            calls.put(batch, block)
    store.close()


def test_a_number_that_a_block_cannot_compute_with_is_told_as_the_source_s(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_model(checkpoints("gemma3_text"), tmp_path / "model")
    change_config(folder, query_pre_attn_scalar=-32)  # its root is no real number
    with pytest.raises(SourceFault, match="Layer: transformers' code of the block stops .*config.json"):
        evaluate(folder, text=short_text(), length=32, chunks=1)
