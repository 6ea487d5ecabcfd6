"""What config.json implies of a file: every difference is named, and no file of a family that is saved as it
is made is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.catalog import catalogue
from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import open_checkpoint
from quant.models.built import built_problems
from quant.models.implied import implied_problems
from tests.helpers import FAMILIES, GENERIC
from tests.models.mixtures import FAMILIES as MIXTURES
from tests.models.mixtures import save_mixture
from tests.stand_ins import published_config, with_fewer_experts, write_stand_in

Headers = dict[str, TensorInfo]
Change = Callable[[Headers, dict[str, Any]], Any]


@pytest.mark.parametrize("kind", [*FAMILIES, *GENERIC])
def test_files_of_dense_families_are_what_their_config_implies(
    kind: str, checkpoints: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(checkpoints(kind))
    assert implied_problems(checkpoint.tensors, checkpoint.config) == []
    assert built_problems(checkpoint) == []


def renamed(headers: Headers, name: Callable[[str], str]) -> None:
    given = dict(headers)
    headers.clear()
    headers.update({name(n): replace(i, name=name(n)) for n, i in given.items()})


def reshaped(headers: Headers, end: str, *shape: int) -> None:
    for name in [n for n in headers if n.endswith(end)]:
        headers[name] = replace(headers[name], shape=shape)


def states(**values: Any) -> Change:
    return lambda headers, config: config.update(values)


def without(end: str) -> Change:
    return lambda headers, config: [headers.pop(n) for n in list(headers) if n.endswith(end)]


#: What is changed of a file of two blocks, 4 heads of 16, 2 KV heads, 4096 tokens → what is said of it.
CHANGES: Mapping[str, tuple[Change, list[str]]] = {
    "rows padded": (
        lambda h, c: reshaped(h, "embed_tokens.weight", 4160, 64),
        ["model.embed_tokens.weight is [4160, 64]", "vocab_size of 4096"],
    ),
    "stacks in cycles": (
        states(num_layers_per_stack=1),
        ["runs several stacks of num_layers_per_stack blocks in cycles", "serve it as it is"],
    ),
    "rows of the head": (
        lambda h, c: reshaped(h, "lm_head.weight", 4000, 64),
        ["lm_head.weight is [4000, 64]", "vocab_size of 4096"],
    ),
    "another width": (
        states(hidden_size=128, head_dim=16),
        ["model.embed_tokens.weight is [4096, 64]", "128"],
    ),
    "a block too few": (
        states(num_hidden_layers=3),
        ["num_hidden_layers is 3", "has 2 of those", "model.layers.2"],
    ),
    "a block too many": (states(num_hidden_layers=1), ["model.layers.1", "states 1 blocks"]),
    "no head": (without("lm_head.weight"), ["lm_head.weight", "tie_word_embeddings false"]),
    "a lost projection": (
        without("layers.1.mlp.down_proj.weight"),
        ["model.layers.1.mlp.down_proj", "not in"],
    ),
    "a trainer's prefix": (
        lambda h, c: renamed(h, lambda n: f"module.{n}"),
        ["module.lm_head.weight: 'module'", "is then lm_head.weight"],
    ),
    "a compiler's prefix": (
        lambda h, c: renamed(h, lambda n: n.replace("model.", "model._orig_mod.")),
        ["'_orig_mod'", "torch.compile"],
    ),
}  # fmt: skip
#: What only shapes of families that have a row tell, and how it is said of others.
SIZES: Mapping[str, tuple[Change, list[str]]] = {
    "KV heads": (
        lambda h, c: reshaped(h, "k_proj.weight", 48, 64),
        ["self_attn.k_proj.weight is [48, 64]", "2 KV heads of 16"],
    ),
    "another inner width": (states(intermediate_size=128), ["mlp.gate_proj.weight is [96, 64]", "128"]),
}


@pytest.mark.parametrize("change", [*CHANGES, *SIZES])
@pytest.mark.parametrize("kind", ["llama", "stablelm"])  # with a row of shapes, and without
def test_what_differs_is_named(kind: str, change: str, checkpoints: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(checkpoints(kind))
    headers, config = dict(checkpoint.tensors), dict(checkpoint.config)
    edit, parts = (CHANGES | SIZES)[change]
    edit(headers, config)
    said = "\n".join(implied_problems(headers, config))
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda h: renamed(h, lambda n: f"foo.{n}"), ["'foo.lm_head.weight'", "StableLmForCausalLM"]),
        (
            lambda h: h.pop("model.layers.1.input_layernorm.weight"),
            ["layers.1.input_layernorm.weight", "not in the file"],
        ),
        (
            lambda h: reshaped(h, "model.norm.weight", 32),
            ["model.norm.weight is [32]", "[64] by config.json"],
        ),
    ],
    ids=["a prefix", "a lost norm", "a norm of another width"],
)
def test_every_parameter_is_compared_where_transformers_knows_the_class(
    edit: Callable[[Headers], Any], parts: list[str], checkpoints: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(checkpoints("stablelm"))
    headers = dict(checkpoint.tensors)
    edit(headers)
    said = "\n".join(built_problems(replace(checkpoint, tensors=headers)))
    assert all(part in said for part in parts), said
    unknown = {**checkpoint.config, "architectures": ["OfSomeoneElse"]}
    assert built_problems(replace(checkpoint, tensors=headers, config=unknown)) == []


def test_a_files_blocks_lie_where_the_family_has_them(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    headers = dict(checkpoint.tensors)
    renamed(headers, lambda n: f"model.{n}")
    (line,) = implied_problems(headers, checkpoint.config)
    assert "model.model.layers.0" in line and "model.layers.0" in line
    renamed(headers, lambda n: n.removeprefix("model.model."))  # as a model without its head is saved
    assert implied_problems(headers, checkpoint.config) == []


def test_drafting_blocks_and_leftovers_are_no_blocks_too_many(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    headers = dict(checkpoint.tensors)
    for name in [n for n in headers if ".layers.1." in n]:
        headers[name.replace(".1.", ".2.")] = replace(headers[name], name=name.replace(".1.", ".2."))
    assert "model.layers.2" in implied_problems(headers, checkpoint.config)[0]
    name = "model.layers.2.eh_proj.weight"
    headers[name] = replace(headers["lm_head.weight"], name=name, shape=(64, 128))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    headers[name] = replace(headers["lm_head.weight"], name=name, shape=(8,))
    name = "model.layers.0.self_attn.rotary_emb.cos_cached"  # a table is no matrix of another family
    headers[name] = replace(headers["lm_head.weight"], name=name, shape=(1, 1, 512, 16))
    assert implied_problems(headers, checkpoint.config) == []
    counted = implied_problems(headers, {**checkpoint.config, "num_hidden_layers": 3})
    assert "model.layers.2 predicts further tokens" in counted[0]


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_counted(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_mixture(tmp_path / kind, kind))
    assert implied_problems(checkpoint.tensors, checkpoint.config) == []
    assert built_problems(checkpoint) == []
    key = next(k for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in checkpoint.config)
    config = {**checkpoint.config, key: checkpoint.config[key] + 1}
    assert f"config.json states {config[key]}" in implied_problems(checkpoint.tensors, config)[0]
    for chosen in (0, 5):
        config = {**checkpoint.config, "num_experts_per_tok": chosen}
        assert implied_problems(checkpoint.tensors, config) == [
            f"config.json states {chosen} experts a token of 4 (num_experts_per_tok): repair it"
        ]
    router = next(
        n for n in checkpoint.tensors if n.endswith(("gate.weight", "router.layer.weight", "router.weight"))
    )
    cut = replace(checkpoint.info(router), shape=(3, checkpoint.info(router).shape[1]))
    (problem,) = implied_problems({**checkpoint.tensors, router: cut}, checkpoint.config)
    assert f"{router} is {list(cut.shape)} in the file, and the router of 4 experts" in problem


def test_absurd_numbers_make_no_absurd_lists(llama: Path) -> None:
    """Neither a list of so many blocks, nor a model."""
    checkpoint = open_checkpoint(llama)
    config = {**checkpoint.config, "num_hidden_layers": 10**9, "num_experts": 10**9}
    assert "num_hidden_layers is 1000000000" in implied_problems(checkpoint.tensors, config)[0]
    towered = {**checkpoint.config, "vision_config": {"depth": 10**9}}
    assert built_problems(replace(checkpoint, config=towered)) == []


def test_experts_of_a_latent_width_are_as_wide_as_that(tmp_path: Path) -> None:
    entry = catalogue()["nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16"]
    config = with_fewer_experts(published_config(entry["config"]), 4)
    assert config["moe_latent_size"] < config["hidden_size"]
    checkpoint = open_checkpoint(write_stand_in(config, tmp_path / "model"))
    headers = dict(checkpoint.tensors)
    assert implied_problems(headers, checkpoint.config) == []
    reshaped(headers, "experts.0.up_proj.weight", config["moe_intermediate_size"], config["hidden_size"])
    (said,) = implied_problems(headers, checkpoint.config)
    assert f"{config['moe_latent_size']}] by config.json" in said
